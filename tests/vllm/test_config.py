"""Our entry of ``additional_config``."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import moe_fx
from moe_fx.artifacts import is_artifact
from moe_fx.vllm import VllmError, config, engine_args

SITES = {"model.layers.0.mlp": {"similarity": torch.eye(4), "mask_router": torch.zeros(4, 8)}}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def path(tmp_path):
    return str(moe_fx.Artifact(SITES).save(tmp_path / "a.moe.safetensors"))


def test_the_entry_of_the_command_line(path):
    text = json.dumps({"policy": {"name": "sere", "artifact": path, "primary": 2, "threshold": 0.3}})
    settings = config.parse(json.loads(text))
    assert settings.policies == (moe_fx.SERE(path, primary=2, threshold=0.3),)
    assert (settings.stats, settings.changes_nothing, settings.switches_off) == (False, False, False)


def test_engine_args_write_the_entry_that_parse_reads(path):
    policies = [moe_fx.BEAM(path, tau=0.4), moe_fx.SERE(path, primary=3, threshold=0.1, max_tokens=64)]
    entry = json.loads(json.dumps(engine_args(policies, stats=True)))["additional_config"]["moe_fx"]
    settings = config.parse(entry)
    assert settings.policies == tuple(policies)
    assert (settings.stats, settings.switches_off) == (True, True)


def test_an_artifact_in_memory_is_written_where_other_processes_find_it():
    artifact = moe_fx.Artifact(SITES)
    (policy,) = engine_args(moe_fx.SERE(artifact))["additional_config"]["moe_fx"]["policy"]
    assert moe_fx.Artifact.load(policy["artifact"]) == artifact
    assert engine_args(moe_fx.SERE(artifact))["additional_config"]["moe_fx"]["policy"] == [policy], "vLLM's cache key holds it"


@pytest.mark.parametrize("entry", [{}, {"policy": None}, {"policy": "topk"}])
def test_an_entry_without_a_policy_changes_nothing(entry):
    assert config.parse(entry).changes_nothing
    assert not config.parse({**entry, "stats": True}).changes_nothing


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sere", "expected a mapping"),
        ({"polcy": "sere"}, "did you mean 'policy'"),
        ({"policy": "sere"}, "needs an artifact inside vLLM"),
        ({"policy": "beam"}, "needs an artifact inside vLLM"),
        ({"policy": {"name": "sere", "primry": 1}}, "did you mean 'primary'"),
        ({"policy": "ser"}, r"no policy 'ser' runs inside vLLM \(did you mean 'sere'\?\): it is 'sere', 'beam', a list"),
        ({"policy": [{"name": "beam", "artifact": "/nowhere"}, {"name": "smaller_k", "k": 2}]}, "no policy 'smaller_k' runs"),
        ({"policy": {"artifact": "/nowhere", "primary": 2}}, "no policy None runs inside vLLM"),
        ({"policy": 7}, "no policy 7 runs inside vLLM"),
        ({"policy": {"name": "sere", "artifact": "/nowhere"}}, "/nowhere"),
        ({"policy": {"name": "beam", "train": True}}, "cannot train inside vLLM"),
        ({"stats": "yes"}, "true or false"),
    ],
)
def test_a_wrong_entry_is_refused(entry, message):
    with pytest.raises(ValueError if "nowhere" in message or "primary" in message else VllmError, match=message):
        config.parse(entry)


def test_a_policy_object_that_is_not_served_is_refused():
    with pytest.raises(VllmError, match="no policy 'drop' runs inside vLLM"):
        engine_args(moe_fx.policy.Drop(primary=1))


def weights(folder, name):
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(4)}, folder / name)


def check_place(model):
    config._check_place(SimpleNamespace(model_config=SimpleNamespace(model=str(model))))


@pytest.mark.parametrize("name", ["a.moe.safetensors", "sere.safetensors"])
def test_an_artifact_among_the_models_weights_is_refused(tmp_path, name):
    """Whether the policy names that file or another: vLLM would load it as weights."""
    weights(tmp_path, "model.safetensors")
    check_place(tmp_path)
    moe_fx.Artifact(SITES).save(tmp_path / name)
    with pytest.raises(VllmError, match=f"{name} lies in the model's folder, .* move it to another folder"):
        check_place(tmp_path)


def test_an_artifact_beside_indexed_weights_does_no_harm(tmp_path):
    """vLLM then takes only the files that the index names."""
    moe_fx.Artifact(SITES).save(tmp_path / "a.moe.safetensors")
    weights(tmp_path, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    check_place(tmp_path)


@pytest.mark.parametrize("model", ["org/name", "/nowhere"])
def test_a_model_that_is_no_folder_has_no_place_to_check(model):
    check_place(model)


def test_what_is_no_artifact_is_told_by_its_header(tmp_path):
    weights(tmp_path, "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x40" + bytes(7) + b"{")
    moe_fx.Artifact(SITES).save(tmp_path / "a.moe.safetensors")
    found = {file.name: is_artifact(file) for file in tmp_path.iterdir()}
    assert found == {"model.safetensors": False, "broken.safetensors": False, "a.moe.safetensors": True}


def test_the_digest_follows_policy_threshold_and_artifact(tmp_path, path):
    other = {"model.layers.0.mlp": {"similarity": torch.ones(4, 4)}}
    changed = str(moe_fx.Artifact(other).save(tmp_path / "b.moe.safetensors"))
    entries = [
        {"name": "sere", "artifact": path},
        {"name": "sere", "artifact": path, "threshold": 0.5},
        {"name": "sere", "artifact": path, "max_tokens": 4},
        {"name": "sere", "artifact": changed},
        {"name": "beam", "artifact": path},
    ]
    digests = [config.parse({"policy": entry}).digest for entry in entries]
    assert len(set(digests)) == len(entries)
    assert digests[0] == config.parse({"policy": [dict(entries[0])]}).digest


def test_no_entry_and_foreign_configurations_are_left_alone():
    assert config.prepare(SimpleNamespace(additional_config={})) is None
    assert config.prepare(SimpleNamespace(additional_config={"other": 1})) is None
    assert config.prepare(SimpleNamespace(additional_config=object())) is None


@pytest.mark.parametrize("key", ["moe-fx", "MOE_FX", "moe_fx "])
def test_an_entry_under_another_spelling_is_not_ignored(key):
    with pytest.raises(VllmError, match=f"has an entry '{key}': write it 'moe_fx'"):
        config.prepare(SimpleNamespace(additional_config={key: {"policy": "sere"}}))


@pytest.mark.parametrize(("plugins", "is_refused"), [("other", True), ("other,moe_fx", False), (None, False)])
def test_engine_args_where_vllm_would_not_load_the_plugin(path, plugins, is_refused, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    if is_refused:
        with pytest.raises(VllmError, match="VLLM_PLUGINS is 'other', so vLLM will not load moe_fx: add 'moe_fx' to it"):
            engine_args(moe_fx.SERE(path))
    else:
        assert engine_args(moe_fx.SERE(path))
    engine_args()  # no policy needs no plugin


def test_importing_the_subpackage_does_not_import_vllm():
    program = "import sys, moe_fx; moe_fx.vllm.engine_args; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
