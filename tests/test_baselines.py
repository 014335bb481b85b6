"""The baselines through the backend, against models with their routing patched by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moe_fx
import tiny
from moe_fx.kernels import baselines
from moe_fx.policy import NAEE, OEA, Drop, ExFold, Policy, PolicyError, SmallerK, StaticPrune, TopP
from moe_fx.testing import tolerance
from variants import run_each


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


def compiled_logits(model: nn.Module, policy: Policy, fuse: bool, **inputs: object) -> Tensor:
    options = {"policy": policy, "inner": "eager", "strict": True, "fuse_experts": fuse}
    with torch.no_grad():
        return torch.compile(model, backend="moe_sparse", options=options)(**inputs).logits


def rule_of(change) -> tiny.Rule:
    """A rule from (ids, weights) -> (weights, ids) in which an off pick keeps its expert and has weight 0."""

    def rule(site, hidden, ids, weights):
        new_weights, new_ids = change(site, hidden, ids, weights)
        return torch.where(new_ids < 0, ids, new_ids).to(ids.dtype), new_weights

    return rule


def fold_artifact(name: str) -> moe_fx.Artifact:
    generator = torch.Generator().manual_seed(3)
    square = (tiny.EXPERTS, tiny.EXPERTS)
    return moe_fx.Artifact({
        site: {
            "fold_scale": torch.rand(square, generator=generator) + 0.2,
            "fold_gain": torch.rand(square, generator=generator) - 0.3,
            "coactivation": torch.rand(square, generator=generator),
        }
        for site in tiny.ARCHS[name].sites
    })  # fmt: skip


@pytest.mark.parametrize(("name", "fuse"), [("qwen3_moe", True), ("gpt_oss", True), ("deepseek_v3", False)])
def test_on_picks(name: str, fuse: bool) -> None:
    model, inputs, artifact = tiny.build(name), tiny.tokens(), fold_artifact(name)
    plain = tiny.expected(model, name, None, **inputs)

    def fold(site, hidden, ids, weights):
        tables = artifact.sites[site]
        return baselines.exfold(weights, ids, tables["fold_scale"], tables["fold_gain"], 1)

    cases = {
        Drop(1): lambda site, hidden, ids, weights: baselines.drop(weights, ids, tiny.EXPERTS, 1, False),
        TopP(0.6): lambda site, hidden, ids, weights: baselines.top_p(weights, ids, 0.6),
        NAEE(0.8): lambda site, hidden, ids, weights: baselines.naee_skip(weights, ids, 0.8),
        ExFold(artifact, 1): fold,
    }
    wanted = [{"policy": policy, "strict": True, "fuse_experts": fuse} for policy in cases]
    for (policy, change), (output, report) in zip(cases.items(), run_each(model, wanted, **inputs), strict=True):
        want = tiny.expected(model, name, rule_of(change), **inputs)
        torch.testing.assert_close(output.logits, want, **tolerance(want.dtype))
        assert not torch.allclose(want, plain, atol=1e-3), policy
        assert {s.experts for s in report.sites} == {"fused" if fuse else "folded"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("deepseek_v3", {}),
    ],
)
def test_smaller_k_is_the_model_with_a_smaller_k(name: str, config: dict[str, bool]) -> None:
    model, inputs = tiny.build(name, **config), tiny.tokens()
    got = compiled_logits(model, SmallerK(2), True, **inputs)
    want = tiny.expected(tiny.build(name, **config, num_experts_per_tok=2), name, None, **inputs)
    torch.testing.assert_close(got, want, **tolerance(want.dtype))
    assert not torch.allclose(want, tiny.expected(model, name, None, **inputs), atol=1e-3)


def reselected(model: nn.Module, keep) -> tiny.Rule:
    """Qwen3's router run again on the experts that ``keep(site, probabilities)`` allows; what is not there is off."""

    def change(site, hidden, ids, weights):
        probabilities = (hidden @ model.get_submodule(site).gate.weight.T).softmax(-1)
        allowed = keep(site, probabilities)
        values, new_ids = torch.where(allowed, probabilities, 0).topk(ids.shape[1], dim=-1)
        return torch.where(allowed[new_ids], values / values.sum(-1, keepdim=True), 0), new_ids

    return rule_of(change)


@pytest.mark.parametrize("fuse", [True, False])
def test_on_what_can_be_selected(fuse: bool) -> None:
    name = "qwen3_moe"
    model, inputs, artifact = tiny.build(name), tiny.tokens(1, 4), fold_artifact(name)

    def first_of_all(site, probabilities):
        first = probabilities.topk(1, dim=-1).indices.flatten()
        return torch.zeros(tiny.EXPERTS, dtype=torch.bool).index_fill(0, first, True)

    def frequent(site, probabilities):
        order = artifact.sites[site]["coactivation"].diagonal().argsort(descending=True)
        return torch.zeros(tiny.EXPERTS, dtype=torch.bool).index_fill(0, order[:4], True)

    for policy, keep in ((OEA(1), first_of_all), (StaticPrune(artifact, 4), frequent)):
        torch._dynamo.reset()
        want = tiny.expected(model, name, reselected(model, keep), **inputs)
        torch.testing.assert_close(compiled_logits(model, policy, fuse, **inputs), want, **tolerance(want.dtype))
        assert not torch.allclose(want, tiny.expected(model, name, None, **inputs), atol=1e-3)


def test_oea_with_fewer_experts_than_k_reads_no_others() -> None:
    model, inputs = tiny.build("qwen3_moe"), tiny.tokens(1, 1)
    moe_fx.reset_stats()
    options = {"policy": OEA(1), "inner": "eager", "stats": True}
    with torch.no_grad():
        torch.compile(model, backend="moe_sparse", options=options)(**inputs)
    counted = moe_fx.stats().values()
    assert [s.active for s in counted] == [1.0, 1.0]
    assert [s.off for s in counted] == [tiny.TOP_K - 1.0] * 2


def test_a_baseline_is_given_alone_and_with_what_it_reads() -> None:
    with pytest.raises(PolicyError, match="give it alone"):
        moe_fx.policy.from_config([Drop(1), "beam"])
    with pytest.raises(PolicyError, match="ExFold reads fold_scale"):
        ExFold(tiny.random_artifact("qwen3_moe"))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="ExFold needs an artifact"):
        compiled_logits(tiny.build("qwen3_moe"), ExFold(), True, **tiny.tokens())
    with pytest.raises(PolicyError, match=r"TopP's p must be a number in \[0, 1\]"):
        TopP(1.5)
