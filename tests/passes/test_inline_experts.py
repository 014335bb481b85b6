"""inline_experts: a few tokens' experts are written out, with the same result; everything else stays one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import moe_fx
import tiny
from moe_fx.passes.inline_experts import MOST_TOKENS, inline_experts
from moe_fx.testing import tolerance

K, E, H, I = 3, 6, 8, 10
SETTINGS: dict[str, tuple[Any, ...]] = {
    "silu": ("silu", "concatenated", False, 1.702, None),
    "clamped": ("swiglu_clamped", "interleaved", False, 1.702, 2.0),
    "ungated": ("relu2", "none", False, 1.702, None),
}


def graph(
    tokens: int, settings: tuple[Any, ...], *, dtype: torch.dtype = torch.float32, scores: int = E, off: bool = False
) -> Any:
    """A router and its experts as one op, and their inputs."""
    generator = torch.Generator().manual_seed(0)
    width = I if settings[1] == "none" else 2 * I

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def layer(x: Tensor, router: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        weights, ids = (x @ router.T).softmax(-1).topk(K)
        if off:
            weights, ids = torch.ops.moe_fx.beam_mask(weights, ids, x.float() @ router.T.float(), 0.5)
        if settings[2]:
            up, down = up.mT, down.mT
        return torch.ops.moe_fx.fused_experts(x, up, down, weights, ids, up_bias, down_bias, *settings)

    inputs = (random(tokens, H), random(scores, H), random(E, width, H), random(E, H, I), random(E, width), random(E, H))
    return make_fx(layer, pre_dispatch=True, tracing_mode="fake")(*inputs), inputs


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if "moe_fx" in str(n.target)]


@pytest.mark.parametrize("tokens", [1, 2, MOST_TOKENS])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_are_written_out_and_equal(tokens: int, name: str, dtype: torch.dtype) -> None:
    gm, inputs = graph(tokens, SETTINGS[name], dtype=dtype)
    want = gm(*inputs)
    assert ops(gm) == ["moe_fx.fused_experts.default"]
    assert inline_experts(gm) == 1
    gm.graph.lint()
    gm.recompile()
    assert ops(gm) == []
    assert all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function")
    torch.testing.assert_close(gm(*inputs), want, **tolerance(dtype))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"tokens": MOST_TOKENS + 1}, id="more tokens"),
        pytest.param({"tokens": 0}, id="no token"),
        pytest.param({"tokens": 2, "scores": E + 1}, id="a score that is no expert's"),
        pytest.param({"tokens": 2, "off": True}, id="picks that may be off"),
        pytest.param({"tokens": 2, "settings": ("silu", "concatenated", True, 1.702, None)}, id="weights that lie across"),
    ],
)
def test_what_was_not_measured_or_would_be_wrong_stays_one_op(case: dict[str, Any]) -> None:
    gm, _ = graph(**{"settings": SETTINGS["silu"], **case})
    before = str(gm.graph)
    assert inline_experts(gm) == 0
    assert str(gm.graph) == before


@pytest.mark.parametrize(("inner", "length", "left"), [("inductor", 2, 0), ("inductor", 3, 1), ("aot_eager", 2, 1)])
def test_only_for_a_compiler_that_fuses_the_lookup(inner: str, length: int, left: int) -> None:
    torch._dynamo.reset()
    model, inputs = tiny.build("qwen3_moe", num_hidden_layers=1), tiny.tokens(length=length)  # two sequences
    with torch.no_grad():
        got = torch.compile(model, backend="moe_sparse", dynamic=False, options={"inner": inner})(**inputs).logits
        torch.testing.assert_close(got, model(**inputs).logits, **tolerance(torch.float32))
    assert moe_fx.last_report().ops_after["moe_fx.fused_experts"] == left
    assert [s.experts for s in moe_fx.last_report().sites] == ["fused"]


def test_a_policy_keeps_the_op() -> None:
    torch._dynamo.reset()
    model, inputs = tiny.build("qwen3_moe", num_hidden_layers=1), tiny.tokens(batch=1, length=2)
    site = tiny.ARCHS["qwen3_moe"].sites[0]
    artifact = moe_fx.Artifact({site: tiny.random_artifact("qwen3_moe").sites[site]})
    with torch.no_grad():
        torch.compile(model, backend="moe_sparse", dynamic=False, options={"policy": moe_fx.SERE(artifact, primary=1)})(**inputs)
    assert moe_fx.last_report().ops_after["moe_fx.fused_experts"] == 1
