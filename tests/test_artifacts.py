"""Artifacts: what they refuse, and their file."""

import copy
import json
import os
import pickle
import struct
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe_fx
from moe_fx import Artifact, ArtifactError, Site
from moe_fx.artifacts import model_identity

E, H = 4, 8


def similarity(num_experts=E, seed=0):
    return torch.rand(num_experts, num_experts, generator=torch.Generator().manual_seed(seed))


def mask_router(num_experts=E, hidden_size=H):
    return torch.randn(num_experts, hidden_size, generator=torch.Generator().manual_seed(1))


def three_layers():
    return Artifact({f"model.layers.{i}.mlp": {"similarity": similarity(seed=i)} for i in range(3)})


def site(name, num_experts=E, hidden_size=H):
    return Site(name, num_experts=num_experts, top_k=2, hidden_size=hidden_size, scoring="softmax -> topk")


# What the constructor takes and what it refuses


def test_tensors_are_float32_copies_under_normal_names():
    given_tensor = similarity().double().t()
    parameter = nn.Parameter(mask_router().bfloat16())
    artifact = Artifact({"_orig_mod.layers.0.mlp": {"similarity": given_tensor, "mask_router": parameter}})
    kinds = artifact.sites["layers.0.mlp"]
    assert list(artifact.sites) == ["layers.0.mlp"]
    assert artifact.kinds == ("mask_router", "similarity")
    assert kinds["similarity"].equal(given_tensor.float())
    assert kinds["mask_router"].equal(parameter.detach().float())
    for tensor in kinds.values():
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
    given_tensor.zero_()
    assert kinds["similarity"].any()


def test_an_artifact_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        artifact = Artifact({"mlp": {"mask_router": mask_router()}})
    assert not artifact.sites["mlp"]["mask_router"].is_inference()


def test_an_artifact_cannot_be_changed():
    artifact = three_layers()
    with pytest.raises(TypeError):
        artifact.sites["other"] = {}
    with pytest.raises(TypeError):
        artifact.sites["model.layers.0.mlp"]["similarity"] = similarity()
    with pytest.raises(TypeError):
        artifact.metadata["metric"] = "cosine"
    with pytest.raises(AttributeError):
        artifact.sites = {}


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({}, "needs a mapping with at least one site, but got {}"),
        (None, "needs a mapping with at least one site, but got None"),
        ([("mlp", {})], "needs a mapping with at least one site"),
        ({3: {"similarity": similarity()}}, r"must be a str such as 'model\.layers\.3\.mlp', but got 3 \(int\)"),
        ({"mlp": {}}, "site 'mlp' needs a mapping of kind to tensor"),
        ({"mlp": similarity()}, r"site 'mlp' needs a mapping of kind to tensor .*but got a .*tensor \[4, 4\]"),
        ({"mlp": {"distance": similarity()}}, "unknown kind 'distance': expected one of similarity, mask_router"),
        ({"mlp": {"similarity": [[1.0]]}}, r"must be a float tensor \[E, E\], but got \[\[1\.0\]\] \(list\)"),
        ({"mlp": {"similarity": similarity().int()}}, r"must be a float tensor \[E, E\] with values.*torch\.int32"),
        ({"mlp": {"similarity": similarity().cfloat()}}, r"must be a float tensor.*torch\.complex64"),
        ({"mlp": {"similarity": similarity().to("meta")}}, r"must be a float tensor.*on meta"),
        ({"mlp": {"similarity": similarity().to_sparse()}}, r"must be a float tensor.*sparse"),
        ({"mlp": {"similarity": torch.rand(4)}}, r"similarity for site 'mlp' must be .* \[E, E\], but it is \[4\]"),
        ({"mlp": {"similarity": torch.rand(4, 5)}}, r"\[E, E\], but it is \[4, 5\]: recalibrate with 'moe-fx calib"),
        ({"mlp": {"similarity": torch.rand(0, 0)}}, r"\[E, E\], but it is \[0, 0\]"),
        ({"mlp": {"mask_router": torch.rand(4, 2, 2)}}, r"\[E, H\], but it is \[4, 2, 2\]: retrain it with"),
        ({"mlp": {"mask_router": torch.rand(4, 0)}}, r"\[E, H\], but it is \[4, 0\]"),
        ({"mlp": {"similarity": similarity(), "mask_router": mask_router(5)}}, "router has 5 and similarity has 4"),
        (
            {"layers.0.mlp": {"similarity": similarity()}, "module.layers.0.mlp": {"similarity": similarity()}},
            r"two sites are called 'layers\.0\.mlp' \(one is given as 'module\.layers\.0\.mlp'\)",
        ),
    ],
)
def test_the_constructor_refuses(sites, message):
    with pytest.raises(ArtifactError, match=message):
        Artifact(sites)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["similarity", "mask_router"])
def test_values_must_be_finite(kind, bad):
    tensor = similarity()
    tensor[1, 2] = bad
    with pytest.raises(ArtifactError, match=f"{kind} for site 'mlp' has 1 of 16 values NaN or infinite: re"):
        Artifact({"mlp": {kind: tensor}})


def test_values_must_be_finite_in_float32():
    with pytest.raises(ArtifactError, match="has 16 of 16 values NaN or infinite"):
        Artifact({"mlp": {"similarity": torch.full((4, 4), 1e300, dtype=torch.float64)}})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([1], r"metadata must be a mapping with str keys, but got \[1\]"),
        ({1: "one"}, "metadata must be a mapping with str keys"),
        ({"moe_fx.format": 2}, r"metadata key 'moe_fx\.format' is reserved"),
        ({"made": object()}, "metadata 'made' must be something JSON can hold"),
        ({"made": {1, 2}}, "metadata 'made' must be something JSON can hold"),
        ({"score": float("nan")}, "metadata 'score' must be something JSON can hold"),
        ({"hidden_sizes": [8]}, r"metadata 'hidden_sizes' must map site names to integers, but got \[8\]"),
        ({"hidden_sizes": {"mlp": "8"}}, "metadata 'hidden_sizes' must map site names to integers"),
        ({"hidden_sizes": {"mlp": 16}}, r"hidden size 16 in the metadata but a mask_router \[4, 8\]"),
    ],
)
def test_the_constructor_refuses_metadata(metadata, message):
    with pytest.raises(ArtifactError, match=message):
        Artifact({"mlp": {"mask_router": mask_router()}}, metadata)


# Identity


def test_the_digest_depends_on_content_and_not_on_order():
    kinds = {"similarity": similarity(), "mask_router": mask_router()}
    forwards = Artifact({"a": kinds, "b": kinds})
    backwards = Artifact({"b": dict(reversed(kinds.items())), "a": kinds}, {"metric": "frobenius"})
    assert forwards == backwards
    assert hash(forwards) == hash(backwards)
    assert len(forwards.digest) == 64


def test_the_digest_sees_every_difference():
    square = torch.eye(E)
    changed = square.clone()
    changed[2, 3] = 1e-7
    sites = [
        {"a": {"similarity": square}},
        {"b": {"similarity": square}},
        {"a": {"mask_router": square}},
        {"a": {"similarity": changed}},
        {"a": {"mask_router": square.reshape(2, 8)}},
        {"a": {"similarity": square}, "b": {"similarity": square}},
        {"a": {"similarity": square, "mask_router": square}},
    ]
    assert len({Artifact(each).digest for each in sites}) == len(sites)
    assert Artifact(sites[0]) != "something else"


def test_repr_is_short():
    shown = repr(three_layers())
    assert shown.startswith("Artifact(3 sites, similarity, E=4, digest=")
    assert len(shown) < 80


def test_copies_and_other_processes_get_the_same_artifact(tmp_path):
    artifact = Artifact.load(
        Artifact({"mlp": {"similarity": similarity()}}, {"metric": "frobenius"}).save(tmp_path / "a.safetensors")
    )
    for other in (copy.copy(artifact), copy.deepcopy(artifact), pickle.loads(pickle.dumps(artifact))):
        assert other == artifact
        assert other.metadata == artifact.metadata
        assert other.versions == artifact.versions


# The file


SITE_NAMES = st.text(st.characters(codec="utf-8", exclude_characters=".'\"[]()"), min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(
    names=st.sets(SITE_NAMES, min_size=1, max_size=3),
    metadata=st.dictionaries(
        st.text(max_size=8).filter(lambda key: not key.startswith("moe_fx.") and key != "hidden_sizes"), JSON
    ),
)
def test_what_is_saved_is_loaded(tmp_path_factory, names, metadata):
    names = [name for name in names if moe_fx.site.normal_name(name) == name]
    kinds = {"similarity": similarity(), "mask_router": mask_router()}
    artifact = Artifact(dict.fromkeys([*names, ""], kinds), metadata)
    path = tmp_path_factory.mktemp("artifact") / "model.moe.safetensors"
    assert artifact.save(path) == path
    loaded = Artifact.load(path)
    assert loaded == artifact
    assert loaded.digest == artifact.digest
    assert list(loaded.sites) == sorted([*names, ""])
    assert loaded.metadata == artifact.metadata == metadata
    for name in loaded.sites:
        assert loaded.sites[name]["mask_router"].equal(kinds["mask_router"])


def test_metadata_is_the_same_before_and_after_a_file(tmp_path):
    artifact = Artifact({"mlp": {"similarity": similarity()}}, {"shape": (1, 2), "nested": {"text": "ä"}})
    loaded = Artifact.load(artifact.save(tmp_path / "a.safetensors"))
    assert loaded.metadata == artifact.metadata == {"shape": [1, 2], "nested": {"text": "ä"}}


def test_the_layout_of_the_file(tmp_path):
    """Other readers depend on it: a change here is a new format version."""
    path = Artifact(
        {"model.layers.0.mlp": {"similarity": similarity(), "mask_router": mask_router()}}, {"metric": "frobenius"}
    ).save(tmp_path / "model.moe.safetensors")
    with safetensors.safe_open(str(path), "pt") as opened:
        assert sorted(opened.keys()) == ["model.layers.0.mlp/mask_router", "model.layers.0.mlp/similarity"]
        metadata = opened.metadata()
    assert metadata.keys() == {"moe_fx.format", "moe_fx.versions", "metric"}
    assert json.loads(metadata["moe_fx.format"]) == 1
    assert json.loads(metadata["moe_fx.versions"]) == {"moe_fx": moe_fx.__version__, "torch": torch.__version__}
    assert json.loads(metadata["metric"]) == "frobenius"


def test_versions_are_those_of_the_maker(tmp_path, monkeypatch):
    monkeypatch.setattr(moe_fx, "__version__", "0.0.1")
    path = three_layers().save(tmp_path / "a.safetensors")
    monkeypatch.undo()
    loaded = Artifact.load(path)
    assert loaded.versions["moe_fx"] == "0.0.1"
    assert Artifact.load(loaded.save(tmp_path / "b.safetensors")).versions["moe_fx"] == "0.0.1"


def test_saving_replaces_a_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    three_layers().save(path)
    assert Artifact.load(str(path)) == three_layers()
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    three_layers().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Artifact.load(tmp_path / "target") == three_layers()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_the_old_file_survives_a_failing_save(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.safetensors"
    three_layers().save(path)

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(ArtifactError, match=r"cannot save to .*No space left on device.*is unchanged"):
        Artifact({"mlp": {"similarity": similarity()}}).save(path)
    monkeypatch.undo()
    assert Artifact.load(path) == three_layers()
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_an_interrupted_save_leaves_nothing_half_done(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        three_layers().save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_saved_to(tmp_path):
    with pytest.raises(ArtifactError, match="it is not a regular file"):
        three_layers().save(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="it is not a regular file"):
        three_layers().save(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match=r"there is no directory .*missing; create it first"):
        three_layers().save(tmp_path / "missing" / "a.safetensors")
    with pytest.raises(ArtifactError, match="path must be a str or a path, but got 3"):
        three_layers().save(3)
    assert os.listdir(tmp_path) == ["pipe"]


def write_file(path, tensors, metadata=None):
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


ONE_TENSOR = {"mlp/similarity": torch.eye(E)}
FORMAT_1 = {"moe_fx.format": "1"}


def test_the_least_that_can_be_loaded(tmp_path):
    """The cases below each differ from this file in one thing."""
    write_file(tmp_path / "a", ONE_TENSOR, FORMAT_1)
    assert Artifact.load(tmp_path / "a") == Artifact({"mlp": {"similarity": torch.eye(E)}})


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (ONE_TENSOR, None, r"is a safetensors file but not a moe_fx artifact .*recalibrate with 'moe-fx calibrate'"),
        (ONE_TENSOR, {"format": "pt"}, "is a safetensors file but not a moe_fx artifact"),
        (ONE_TENSOR, {"moe_fx.format": "2", "new": "{not json"}, "has format 2, this moe_fx reads format 1: upgrade"),
        (ONE_TENSOR, {"moe_fx.format": "0"}, "has format 0, which does not exist"),
        (ONE_TENSOR, {"moe_fx.format": "one"}, "has damaged metadata"),
        (ONE_TENSOR, FORMAT_1 | {"metric": "frobenius"}, "has damaged metadata"),
        (ONE_TENSOR, FORMAT_1 | {"moe_fx.versions": "[1]"}, "has damaged metadata"),
        (ONE_TENSOR, FORMAT_1 | {"score": "NaN"}, "metadata 'score' must be something JSON can hold"),
        ({}, FORMAT_1, "needs a mapping with at least one site"),
        ({"similarity": torch.eye(E)}, FORMAT_1, "has a tensor 'similarity': expected '<site>/<kind>'"),
        ({"mlp/weight": torch.eye(E)}, FORMAT_1, "site 'mlp' has a tensor of unknown kind 'weight'"),
        ({"mlp/similarity": torch.ones(2, 3)}, FORMAT_1, r"must be a float tensor \[E, E\], but it is \[2, 3\]"),
        ({"mlp/similarity": torch.eye(E).int()}, FORMAT_1, "must be a float tensor"),
        ({"mlp/similarity": torch.full((2, 2), torch.nan)}, FORMAT_1, "has 4 of 4 values NaN or infinite"),
        (ONE_TENSOR | {"module.mlp/similarity": torch.eye(E)}, FORMAT_1, "two sites are called 'mlp'"),
    ],
)
def test_load_refuses_the_content(tmp_path, tensors, metadata, message):
    path = tmp_path / "model.moe.safetensors"
    write_file(path, tensors, metadata)
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.load(path)
    assert str(path) in str(caught.value)


def test_every_cut_of_a_file_is_refused_as_cut_off(tmp_path):
    whole = three_layers().save(tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for length in {*range(0, 20), header_bytes - 1, header_bytes, header_bytes + 1, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"is cut off: copy it again, or recalibrate with 'moe-fx calibrate'"):
            Artifact.load(path)


def file_with_header(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is a text file, and no tensors are in it", "is not a safetensors file"),
        (b'{"mlp": {"similarity": [[1.0, 0.0], [0.0, 1.0]]}}', "is not a safetensors file"),
        (b"PK\x03\x04" + bytes(60), "is not a safetensors file"),
        (struct.pack("<Q", 1 << 40) + b"{" + bytes(60), "is not a safetensors file"),
        (file_with_header(b"{not json}"), "has a damaged safetensors header"),
        (file_with_header(b"{" * 100_000), "has a damaged safetensors header"),
        (file_with_header(b'{"a/similarity": 3}'), "has a damaged safetensors header"),
        (file_with_header(b'{"__metadata__": {"moe_fx.format": 1}}'), "is damaged"),
        (file_with_header(b'{"__metadata__": {"moe_fx.format": "1"}}', b"surplus"), "is damaged"),
        (
            file_with_header(
                b'{"__metadata__": {"moe_fx.format": "1"}, '
                b'"a/similarity": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}',
                bytes(8),
            ),
            "is damaged",
        ),
    ],
)
def test_load_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)


def test_a_pickle_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for number, dump in enumerate([torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))]):
        path = tmp_path / f"{number}.pt"
        dump({"mlp": Bomb()}, path)
        with pytest.raises(ArtifactError, match="is not a safetensors file"):
            Artifact.load(path)
    assert not (tmp_path / "exploded").exists()


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 600), value=st.integers(0, 255))
def test_a_damaged_byte_gives_an_artifact_or_an_artifact_error(tmp_path_factory, position, value):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    content = bytearray(three_layers().save(path).read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    with suppress(ArtifactError):
        assert isinstance(Artifact.load(path), Artifact)


def test_places_that_cannot_be_loaded_from(tmp_path):
    with pytest.raises(ArtifactError, match=r"there is no artifact .*none: check the path, or make one: recalibrate"):
        Artifact.load(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"is a directory: name the artifact's file in it"):
        Artifact.load(tmp_path)
    with pytest.raises(ArtifactError, match="is not a regular file"):
        Artifact.load("/dev/null")
    with pytest.raises(ArtifactError, match="path must be a str or a path, but got None"):
        Artifact.load(None)
    with pytest.raises(ArtifactError, match="cannot read"):
        Artifact.load(tmp_path / ("x" * 5000))


# Looking a tensor up


def test_tensor_takes_any_form_of_the_name():
    artifact = three_layers()
    for name in ("model.layers.1.mlp", "_orig_mod.model.layers.1.mlp", "L['self'].model.layers[1].mlp"):
        assert artifact.tensor(name, "similarity", E) is artifact.sites["model.layers.1.mlp"]["similarity"]


def test_tensor_refuses_another_number_of_experts():
    artifact = Artifact({"model.layers.3.mlp": {"similarity": similarity(64), "mask_router": mask_router(64)}})
    with pytest.raises(ArtifactError) as caught:
        artifact.tensor("model.layers.3.mlp", "similarity", 128)
    assert str(caught.value).startswith(
        "similarity for site 'model.layers.3.mlp' is [64, 64] but the router has 128 experts: "
        "recalibrate with 'moe-fx calibrate'"
    )
    with pytest.raises(ArtifactError, match=r"mask_router .* is \[64, 8\] but the router has 32 experts: retrain"):
        artifact.tensor("model.layers.3.mlp", "mask_router", 32, H)


def test_tensor_refuses_another_hidden_size():
    artifact = Artifact({"mlp": {"mask_router": mask_router()}})
    assert artifact.tensor("mlp", "mask_router", E, H).shape == (E, H)
    assert artifact.tensor("mlp", "mask_router", E).shape == (E, H)
    with pytest.raises(ArtifactError, match=r"is \[4, 8\] but the router's input has width 16: retrain"):
        artifact.tensor("mlp", "mask_router", E, 16)


def test_tensor_refuses_a_similarity_made_at_another_hidden_size():
    artifact = Artifact({"mlp": {"similarity": similarity()}}, {"hidden_sizes": {"_orig_mod.mlp": H}})
    assert artifact.tensor("mlp", "similarity", E, H).shape == (E, E)
    with pytest.raises(ArtifactError, match="was made at hidden size 8 but the router's input has 16: recalibrate"):
        artifact.tensor("mlp", "similarity", E, 16)
    assert Artifact({"mlp": {"similarity": similarity()}}).tensor("mlp", "similarity", E, 16).shape == (E, E)


def test_tensor_names_what_is_missing():
    artifact = Artifact({f"layers.{i}.mlp": {"similarity": similarity()} for i in range(5)})
    with pytest.raises(ArtifactError) as caught:
        artifact.tensor("layers.7.mlp", "similarity", E)
    assert str(caught.value).startswith(
        "the artifact has no site 'layers.7.mlp' (it has 'layers.0.mlp', 'layers.1.mlp', 'layers.2.mlp' and 2 more, "
        "5 in all): recalibrate with"
    )
    with pytest.raises(ArtifactError, match=r"no mask_router for site 'layers\.0\.mlp' \(it has 'similarity'\): "):
        artifact.tensor("layers.0.mlp", "mask_router", E)
    with pytest.raises(ArtifactError, match="no tensor of kind 'distance': the kinds are similarity, mask_router"):
        artifact.tensor("layers.0.mlp", "distance", E)


@pytest.mark.parametrize("name", ["", "mlp", "1.mlp"])
def test_tensor_advises_to_compile_the_whole_model_where_a_part_was(name):
    artifact = Artifact({f"layers.{i}.mlp": {"similarity": similarity()} for i in range(2)})
    with pytest.raises(ArtifactError, match=r"no site .*that has 'layers\.[01]\.mlp', compile the whole model"):
        artifact.tensor(name, "similarity", E)


# Validation against sites


def test_validate_against_the_sites_it_was_made_for():
    artifact = three_layers()
    sites = [site(f"model.layers.{i}.mlp") for i in range(3)]
    assert artifact.validate(sites) is artifact
    assert artifact.validate(iter(sites + sites)) is artifact  # one site in two graphs


def test_validate_lists_every_problem_with_sites():
    artifact = Artifact(
        {
            "a": {"similarity": similarity(), "mask_router": mask_router()},
            "b": {"similarity": similarity(), "mask_router": mask_router()},
            "c": {"similarity": similarity()},
            "surplus": {"similarity": similarity(), "mask_router": mask_router()},
        }
    )
    with pytest.raises(ArtifactError) as caught:
        artifact.validate([site("a", num_experts=8), site("b", hidden_size=16), site("c"), site("lacking")])
    assert str(caught.value).splitlines()[:-1] == [
        "the artifact does not fit the 4 sites given:",
        "  - mask_router for site 'a' is [4, 8] but the router has 8 experts",
        "  - similarity for site 'a' is [4, 4] but the router has 8 experts",
        "  - mask_router for site 'b' is [4, 8] but the router's input has width 16",
        "  - similarity for site 'b' was made at hidden size 8 but the router's input has 16",
        "  - the artifact has no mask_router for site 'c' (it has 'similarity')",
        "  - the artifact has no site 'lacking' (it has 'a', 'b', 'c' and 1 more, 4 in all)",
        "  - site 'surplus' of the artifact is not among them (they are 'a', 'b', 'c' and 1 more, 4 in all)",
    ]
    assert "recalibrate with 'moe-fx calibrate'" in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize("wrong", [3, ["model.layers.0.mlp"], "mlp", None])
def test_validate_refuses_what_is_neither_a_model_nor_sites(wrong):
    with pytest.raises(ArtifactError, match=r"validate needs a torch\.nn\.Module or moe_fx\.Site objects, but got "):
        three_layers().validate(wrong)


# Validation against a model, without a trace


class Moe(nn.Module):
    def __init__(self, num_experts=E, hidden_size=H):
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.up = nn.Parameter(torch.zeros(num_experts, hidden_size, 6))
        self.down = nn.Parameter(torch.zeros(num_experts, 6, hidden_size))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(H, 6)


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp
        self.norm = nn.LayerNorm(H)


class Model(nn.Module):
    def __init__(self, *mlps):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, mlps))


class OtherModel(Model):
    def __init__(self, *mlps):
        super().__init__(*mlps)
        self.head = nn.Linear(H, 3)


class UnrelatedModel(nn.Module):
    def __init__(self, *mlps):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, mlps))
        self.head = nn.Linear(H, 3)


def for_layers(*numbers, **metadata):
    return Artifact({f"layers.{i}.mlp": {"similarity": similarity()} for i in numbers}, metadata)


def test_validate_against_the_model_it_was_made_for():
    model = Model(Dense(), Moe(), Moe())
    artifact = for_layers(1, 2, model=model_identity(model), hidden_sizes={"layers.1.mlp": H, "layers.2.mlp": H})
    assert artifact.validate(model) is artifact
    assert artifact.validate(torch.compile(model)) is artifact
    with_routers = {f"layers.{i}.mlp": {"similarity": similarity(), "mask_router": mask_router()} for i in (1, 2)}
    assert Artifact(with_routers).validate(model)


@pytest.mark.parametrize(
    ("artifact", "model", "problem"),
    [
        (for_layers(0, 1), Model(Moe()), "site 'layers.1.mlp' of the artifact is not a module of the model"),
        (for_layers(0), Model(Moe(), Moe()), "the artifact lacks site 'layers.1.mlp', a Moe like the others"),
        (for_layers(0), Model(Moe(), Moe(8)), "the artifact lacks site 'layers.1.mlp', a Moe like the others"),
        (
            for_layers(0),
            Model(Moe(8)),
            "site 'layers.0.mlp' has similarity [4, 4], but no parameter there is a router of shape [4, H] "
            "(it has gate.weight [8, 8])",
        ),
        (
            Artifact({"layers.0.mlp": {"mask_router": mask_router()}}),
            Model(Moe(hidden_size=16)),
            "site 'layers.0.mlp' has mask_router [4, 8], but no parameter there is a router of shape [4, 8] "
            "(it has gate.weight [4, 16])",
        ),
        (
            for_layers(0, hidden_sizes={"layers.0.mlp": H}),
            Model(Moe(hidden_size=16)),
            "site 'layers.0.mlp' has similarity [4, 4], but no parameter there is a router of shape [4, 8] "
            "(it has gate.weight [4, 16])",
        ),
        (
            for_layers(0, model=model_identity(Model(Moe()))),
            UnrelatedModel(Moe()),
            "it was made on another model, a Model, and this is a UnrelatedModel",
        ),
        (
            Artifact(
                {
                    "layers.0.mlp": {"similarity": similarity()},
                    "layers.1.mlp": {"similarity": similarity(), "mask_router": mask_router()},
                }
            ),
            Model(Moe(), Moe()),
            "the artifact has no mask_router for site 'layers.0.mlp' (it has 'similarity')",
        ),
    ],
)
def test_validate_names_what_does_not_fit_a_model(artifact, model, problem):
    with pytest.raises(ArtifactError) as caught:
        artifact.validate(model)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"the artifact does not fit a model of class {type(model).__name__}:"
    assert lines[1:-1] == [f"  - {problem}"]
    assert "recalibrate with 'moe-fx calibrate'" in lines[-1]


def test_validate_lists_every_problem_with_a_model():
    with pytest.raises(ArtifactError) as caught:
        for_layers(0, 1, 5, model={"class": "Another"}).validate(Model(Moe(), Moe(8), Moe()))
    assert len(str(caught.value).splitlines()[1:-1]) == 4


def test_a_dense_module_of_the_same_class_is_no_lacking_site():
    """Where the router stands in the decoder layer itself, layers that do not route have the same class."""
    model = Model(Dense(), Moe())
    artifact = Artifact({"layers.1": {"similarity": similarity()}})
    assert artifact.validate(model) is artifact
    with pytest.raises(ArtifactError, match=r"lacks site 'layers\.2', a Layer like the others"):
        artifact.validate(Model(Dense(), Moe(), Moe()))


def test_a_module_under_two_names_is_one_site():
    shared = Moe()
    artifact = for_layers(1)
    assert artifact.validate(Model(shared, shared)) is artifact


def test_a_model_made_from_the_recorded_one_is_not_another():
    recorded = model_identity(Model(Moe()))
    artifact = for_layers(0, model=recorded)
    subclass, with_adapter = OtherModel(Moe()), Model(Moe())
    with_adapter.adapter = nn.Linear(H, H)
    assert artifact.validate(subclass) is artifact
    assert artifact.validate(with_adapter) is artifact
    same_parameters = type("Renamed", (nn.Module,), {})()
    same_parameters.layers = Model(Moe()).layers
    assert artifact.validate(same_parameters) is artifact


def test_model_identity():
    model = Model(Moe(), Dense())
    identity = model_identity(model)
    assert identity.keys() == {"class", "num_parameters", "fingerprint"}
    assert identity["class"] == "Model"
    assert identity["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert json.loads(json.dumps(identity)) == identity
    with torch.no_grad():
        model.layers[0].mlp.gate.weight.add_(1)
    assert model_identity(model) == identity
    assert model_identity(torch.compile(model)) == identity
    assert model_identity(model.to("meta")) == identity
    assert model_identity(Model(Moe(hidden_size=16), Dense()))["fingerprint"] != identity["fingerprint"]
    assert model_identity(Model(Dense(), Moe()))["fingerprint"] != identity["fingerprint"]


@pytest.mark.parametrize("attribute", ["name_or_path", "_name_or_path"])
def test_model_identity_names_where_the_model_came_from(attribute):
    model = Model(Moe())
    model.config = type("Config", (), {attribute: "someone/some-moe"})()
    assert model_identity(torch.compile(model))["name_or_path"] == "someone/some-moe"
