"""calibrate against a brute-force measurement on the module itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layers
import moe_fx
import tiny
from moe_fx.calibrate import CalibrationError


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def brute_force(outputs: Tensor) -> Tensor:
    """Similarity from every expert's outputs [E, tokens, H], pair by pair."""
    flat = outputs.double().flatten(1)
    distances = torch.stack([torch.stack([(a - b).norm() for b in flat]) for a in flat])
    return (1 - distances / distances.max()).fill_diagonal_(1).float()


def every_expert(model: nn.Module, site: str, batches: list[dict[str, Any]]) -> Tensor:
    """Outputs [E, tokens, H] of a transformers experts module, on what its router's block really feeds it."""
    experts = model.get_submodule(site).experts
    fed: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: fed.append(args))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        handle.remove()
        first = torch.zeros(1, tiny.TOP_K)
        first[0, 0] = 1
        return torch.stack([
            torch.cat([experts(h, torch.full_like(ids, e), first.expand(len(ids), -1).to(w)) for h, ids, w in fed])
            for e in range(tiny.EXPERTS)
        ])  # fmt: skip


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_equals_brute_force(name: str, experts: str) -> None:
    model, batches = tiny.build(name, experts), [tiny.tokens(2, 9), tiny.tokens(3, 4, seed=1)]
    artifact = moe_fx.calibrate(model, batches)
    assert list(artifact.sites) == list(tiny.ARCHS[name].sites)
    for site in artifact.sites:
        want = brute_force(every_expert(model, site, batches))
        torch.testing.assert_close(artifact.sites[site]["similarity"], want, rtol=1e-5, atol=1e-6)
    assert artifact.metadata["calibration"] == {"batches": 2, "tokens": 30}
    assert artifact.validate(model) is artifact


@pytest.mark.parametrize("cls", [c for c in layers.ROUTES if c is not layers.Capacity])
def test_any_layer_that_is_detected(cls: type[layers.Layer]) -> None:
    layer, x = cls().eval(), torch.randn(8, layers.H)
    artifact = moe_fx.calibrate(nn.Sequential(layer), [x[:4], (x[4:],)])
    one = torch.ones(8, 1)
    with torch.no_grad():
        outputs = torch.stack([layer.run(x, torch.full((8, 1), e), one) for e in range(layers.E)])
    torch.testing.assert_close(artifact.sites["0"]["similarity"], brute_force(outputs), rtol=1e-5, atol=1e-6)


def test_order_and_batching_of_tokens_do_not_matter() -> None:
    layer, x = layers.SoftmaxThenTopK(), torch.randn(9, layers.H)
    whole = moe_fx.calibrate(layer, [x])
    torch._dynamo.reset()
    parts = moe_fx.calibrate(layer, [x[5:], x[:5]])
    torch.testing.assert_close(whole.sites[""]["similarity"], parts.sites[""]["similarity"])


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(layers.SoftmaxThenTopK(), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moe_fx.calibrate(model, [torch.randn(4, layers.H)])
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("batches", "metric", "words"),
    [
        ([], "frobenius", "no batches"),
        ([torch.randn(4, layers.H)], "manhattan", "unknown metric 'manhattan'"),
        (["text"], "frobenius", "a batch is a str"),
        ([torch.full((4, layers.H), float("inf"))], "frobenius", "not finite"),
    ],
)
def test_bad_input(batches: list[Any], metric: str, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        moe_fx.calibrate(layers.SoftmaxThenTopK(), batches, metric=metric)


def test_a_model_without_experts() -> None:
    with pytest.raises(CalibrationError, match="no expert routing was found"):
        moe_fx.calibrate(nn.Linear(4, 4), [torch.randn(2, 4)])


def test_experts_that_do_not_trace_say_what_to_do() -> None:
    with pytest.raises(CalibrationError, match="set_experts_implementation"):
        moe_fx.calibrate(tiny.build("qwen3_moe", "eager"), [tiny.tokens()])
