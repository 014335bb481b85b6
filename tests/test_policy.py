"""Policies and how they are configured."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch

import moe_fx.policy
from moe_fx import BEAM, SERE, Artifact, ArtifactError, Policy, PolicyError, TopK
from moe_fx.policy import from_config


def make_artifact(kind="similarity", fill=0.5):
    return Artifact({"model.layers.0.mlp": {kind: torch.full((4, 4), fill)}})


SIMILARITY, MASK_ROUTER = make_artifact("similarity"), make_artifact("mask_router")


def test_defaults_are_those_of_the_design():
    assert SERE() == SERE(artifact=None, primary=2, threshold=0.0, max_tokens=None)
    assert BEAM() == BEAM(artifact=None, tau=0.5, train=False)
    assert [policy.name for policy in (TopK(), SERE(), BEAM())] == ["topk", "sere", "beam"]


@pytest.mark.parametrize("primary", [0, -1, True, 1.0, "2", None, float("nan"), torch.tensor(2)])
def test_primary_must_be_an_integer_of_at_least_one(primary):
    with pytest.raises(PolicyError, match="SERE's primary must be an integer of at least 1, but got "):
        SERE(primary=primary)


@pytest.mark.parametrize("threshold", [1.0001, -1.0001, float("nan"), float("inf"), 10**400, True, "0.3", None])
def test_threshold_must_be_in_its_range(threshold):
    with pytest.raises(PolicyError, match=r"SERE's threshold must be a number in \[-1, 1\], but got "):
        SERE(threshold=threshold)


@pytest.mark.parametrize("max_tokens", [0, -5, True, 2.0, "8"])
def test_max_tokens_must_be_none_or_an_integer_of_at_least_one(max_tokens):
    with pytest.raises(PolicyError, match="SERE's max_tokens must be an integer of at least 1, but got "):
        SERE(max_tokens=max_tokens)


@pytest.mark.parametrize("tau", [0, 0.0, 1, 1.0, -0.5, 2, float("nan"), float("-inf"), False, "0.5", None])
def test_tau_must_be_strictly_inside_its_range(tau):
    with pytest.raises(PolicyError, match="BEAM's tau must be a number strictly between 0 and 1, but got "):
        BEAM(tau=tau)


@pytest.mark.parametrize("train", [1, 0, None, "yes"])
def test_train_must_be_a_bool(train):
    with pytest.raises(PolicyError, match="BEAM's train must be True or False, but got "):
        BEAM(train=train)


def test_settings_at_the_ends_of_their_ranges_are_allowed_and_get_their_types():
    policy = SERE(primary=1, threshold=-1, max_tokens=1)
    assert (policy.primary, policy.threshold, policy.max_tokens) == (1, -1.0, 1)
    assert isinstance(policy.threshold, float)
    assert SERE(threshold=1).threshold == 1.0
    assert BEAM(tau=1e-300).tau == 1e-300


def test_a_policy_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SERE().primary = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        SERE(SIMILARITY).artifact = None


def test_the_base_is_not_a_policy():
    with pytest.raises(PolicyError, match=r"use one of moe_fx\.TopK, moe_fx\.SERE, moe_fx\.BEAM"):
        Policy()


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_path_is_read_at_construction(tmp_path, as_path):
    path = SIMILARITY.save(tmp_path / "model.moe.safetensors")
    policy = SERE(as_path(path), primary=1)
    path.unlink()
    assert policy.artifact == SIMILARITY
    assert policy == SERE(make_artifact(), primary=1)
    assert hash(policy) == hash(SERE(make_artifact(), primary=1))


def test_a_bad_artifact_fails_at_construction(tmp_path):
    with pytest.raises(ArtifactError, match="there is no artifact"):
        SERE(tmp_path / "none.safetensors")
    with pytest.raises(PolicyError, match=r"SERE's artifact must be a moe_fx.Artifact, a path or None, but got 3 "):
        SERE(3)
    with pytest.raises(PolicyError, match="BEAM's artifact must be"):
        BEAM({"model.layers.0.mlp": {}})


def test_an_artifact_without_what_the_policy_reads_fails_at_construction():
    with pytest.raises(PolicyError, match="SERE reads similarity from its artifact, but it has only 'mask_router'"):
        SERE(MASK_ROUTER)
    with pytest.raises(PolicyError, match="BEAM reads mask_router from its artifact, but it has only 'similarity'"):
        BEAM(SIMILARITY)


def test_only_applying_sere_needs_an_artifact():
    with pytest.raises(PolicyError, match=r"SERE needs an artifact: moe_fx.SERE\(moe_fx.calibrate\(model, batches\)\)"):
        SERE().require_artifact()
    assert SERE(SIMILARITY).require_artifact() is SIMILARITY
    assert BEAM(train=True).artifact is None


@pytest.mark.parametrize(
    ("policy", "described"),
    [
        (TopK(), "TopK"),
        (SERE(SIMILARITY, primary=2, threshold=0.3), "SERE(primary=2, threshold=0.3)"),
        (SERE(), "SERE(primary=2, threshold=0.0)"),
        (SERE(primary=1, max_tokens=64), "SERE(primary=1, threshold=0.0, max_tokens=64)"),
        (BEAM(), "BEAM(tau=0.5)"),
        (BEAM(tau=0.25, train=True), "BEAM(tau=0.25, train=True)"),
    ],
)
def test_describe(policy, described):
    assert policy.describe() == described


ALL_DIFFERENT = [
    TopK(),
    SERE(),
    SERE(SIMILARITY),
    SERE(make_artifact(fill=0.25)),
    SERE(SIMILARITY, primary=1),
    SERE(SIMILARITY, threshold=0.3),
    SERE(SIMILARITY, max_tokens=8),
    BEAM(),
    BEAM(MASK_ROUTER),
    BEAM(tau=0.25),
    BEAM(train=True),
]


def test_policies_differ_where_a_setting_or_the_artifact_differs():
    assert len({policy.digest for policy in ALL_DIFFERENT}) == len(ALL_DIFFERENT)
    assert len(set(ALL_DIFFERENT)) == len(ALL_DIFFERENT)


def test_equal_policies_have_equal_digests():
    assert SERE(make_artifact(), threshold=0).digest == SERE(make_artifact(), threshold=-0.0).digest
    assert BEAM(tau=0.5).digest == BEAM().digest


def test_the_digest_is_the_same_in_another_process():
    program = "import moe_fx; print(moe_fx.SERE(primary=3, threshold=0.1).digest)"
    came = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert came.stdout.strip() == SERE(primary=3, threshold=0.1).digest


@pytest.mark.parametrize("policy", ALL_DIFFERENT, ids=lambda policy: policy.digest[:6])
def test_policies_survive_copies_and_other_processes(policy):
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), dataclasses.replace(policy)):
        assert type(other) is type(policy)
        assert other.digest == policy.digest
        assert repr(other) == repr(policy)


def test_policies_are_equal_by_value():
    assert SERE(make_artifact(), threshold=0.3) == SERE(make_artifact(), threshold=0.3)
    assert BEAM(make_artifact("mask_router")) == BEAM(make_artifact("mask_router"))
    assert hash(BEAM(make_artifact("mask_router"))) == hash(BEAM(make_artifact("mask_router")))
    assert TopK() == TopK()
    assert SERE() != BEAM()


def test_a_policy_that_trains_is_equal_to_itself_only():
    policy = BEAM(train=True)
    assert policy.__eq__(policy)
    assert policy not in (BEAM(train=True), BEAM())
    assert BEAM() != policy


def test_training_starts_at_the_artifact_or_at_zero_and_keeps_its_masks():
    cpu = torch.device("cpu")
    fresh, tuned = BEAM(train=True), BEAM(MASK_ROUTER, train=True)
    assert fresh.parameters() == []
    mask = fresh.trainable("model.layers.0.mlp", (4, 4), cpu)
    assert mask.requires_grad
    assert not mask.any()
    assert fresh.trainable("model.layers.0.mlp", (4, 4), cpu) is mask
    assert [id(parameter) for parameter in fresh.parameters()] == [id(mask)]
    started = tuned.trainable("model.layers.0.mlp", (4, 4), cpu)
    assert started.equal(MASK_ROUTER.sites["model.layers.0.mlp"]["mask_router"])
    with torch.no_grad():
        started.add_(1)
    assert MASK_ROUTER.sites["model.layers.0.mlp"]["mask_router"].equal(torch.full((4, 4), 0.5))
    with pytest.raises(ArtifactError, match=r"is \[4, 4\] but the router has 8 experts"):
        BEAM(MASK_ROUTER, train=True).trainable("model.layers.0.mlp", (8, 4), cpu)


@pytest.mark.parametrize(
    ("config", "policies"),
    [
        (None, (TopK(),)),
        ("topk", (TopK(),)),
        ("SERE", (SERE(),)),
        ({"name": "topk"}, (TopK(),)),
        ({"name": "sere", "primary": 1, "threshold": 0.3, "max_tokens": 64}, (SERE(None, 1, 0.3, 64),)),
        ({"name": "beam", "tau": 0.25, "train": False}, (BEAM(tau=0.25),)),
        (SERE(SIMILARITY), (SERE(SIMILARITY),)),
        ([], (TopK(),)),
        (["topk"], (TopK(),)),
        (["topk", TopK()], (TopK(),)),
        (["topk", {"name": "sere"}], (SERE(),)),
        ((BEAM(), "topk", {"name": "sere", "artifact": None}), (BEAM(), SERE())),
    ],
)
def test_from_config(config, policies):
    assert from_config(config) == policies


def test_from_config_makes_a_policy_that_trains():
    (policy,) = from_config({"name": "beam", "tau": 0.25, "train": True})
    assert policy.describe() == "BEAM(tau=0.25, train=True)"


def test_from_config_reads_what_json_can_say(tmp_path):
    path = SIMILARITY.save(tmp_path / "model.moe.safetensors")
    config = json.loads(json.dumps([{"name": "beam"}, {"name": "sere", "artifact": str(path), "primary": 1}]))
    assert from_config(config) == (BEAM(), SERE(SIMILARITY, primary=1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ser", r"unknown policy 'ser' \(did you mean 'sere'\?\): the policies are 'topk', 'sere', 'beam'"),
        ("Top-K", r"unknown policy 'Top-K' \(did you mean 'topk'\?\)"),
        ("xyz", r"unknown policy 'xyz': the policies are"),
        ({"name": "bean"}, r"unknown policy 'bean' \(did you mean 'beam'\?\)"),
        ({"name": None}, "unknown policy None: the policies are"),
        ({"name": 3}, "unknown policy 3: the policies are"),
        ({}, "a policy's mapping needs a 'name', one of 'topk', 'sere', 'beam', .*, but got {}"),
        ({"primary": 2}, "a policy's mapping needs a 'name'"),
        ({"name": "sere", "treshold": 0.3}, r"'sere' has no setting 'treshold' \(did you mean 'threshold'\?\): it"),
        ({"name": "sere", "tau": 0.3}, "it has 'artifact', 'primary', 'threshold', 'max_tokens'"),
        ({"name": "sere", 1: 2}, "'sere' has no setting 1: it has"),
        ({"name": "topk", "primary": 2}, "'topk' has no setting 'primary': it has none"),
        ({"name": "sere", "primary": 0}, "SERE's primary must be an integer of at least 1, but got 0"),
        (3, r"a policy must be one of moe_fx.TopK, .*, a name, or a mapping with a 'name', but got 3 \(int\)"),
        (SERE, r"but got <class .*>.*: write SERE\(\.\.\.\)"),
        ([["sere"]], "a policy must be one of"),
        ([None], "a policy must be one of"),
        (["sere", {"name": "sere", "primary": 1}], "policy 'sere' is given 2 times: give it once"),
        ([BEAM(), BEAM(tau=0.25)], "policy 'beam' is given 2 times"),
        (["sere", "beam"], r"SERE must see which picks are off.*: write \[BEAM\(\.\.\.\), SERE\(\.\.\.\)\]"),
        ([SERE(), "topk", BEAM()], r"write \[BEAM\(\.\.\.\), SERE\(\.\.\.\)\]"),
    ],
)
def test_from_config_refuses(config, message):
    with pytest.raises(PolicyError, match=message):
        from_config(config)


def test_a_new_policy_is_a_dataclass_and_an_entry(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Fewer(Policy):
        name = "fewer"
        picks: int = 1

    @dataclasses.dataclass(frozen=True)
    class More(Policy):
        name = "more"
        picks: int = 1

    monkeypatch.setitem(moe_fx.policy.POLICIES, Fewer.name, Fewer)
    assert from_config(["topk", {"name": "fewer", "picks": 3}]) == (Fewer(picks=3),)
    assert Fewer(picks=3).describe() == "Fewer(picks=3)"
    assert len({Fewer(picks=3).digest, Fewer(picks=2).digest, More(picks=2).digest}) == 3
    with pytest.raises(PolicyError, match="did you mean 'fewer'"):
        from_config("fever")


def test_a_policy_that_trains_refuses_a_second_model_of_another_shape():
    policy = BEAM(train=True)
    policy.trainable("moe", (4, 8), torch.device("cpu"))
    with pytest.raises(PolicyError, match=r"already trains .*\[4, 8\].*\[6, 8\]"):
        policy.trainable("moe", (6, 8), torch.device("cpu"))
