"""fuse_routing: where it fires, where it must not, and that results stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import layers
import moe_fx
import tiny
from layers import ROUTES, E, H
from moe_fx.passes.fuse_routing import fuse_routing
from moe_fx.testing import random_scores, random_similarity, tolerance

OPS = torch.ops.moe_fx


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(layer: layers.Layer, x: Tensor, policy: object, **options: Any) -> Tensor:
    with torch.no_grad():
        return torch.compile(layer, backend="moe_sparse", options={"policy": policy, "inner": "eager", **options})(x)


def artifact() -> moe_fx.Artifact:
    generator = torch.Generator().manual_seed(3)
    return moe_fx.Artifact({"": {"similarity": random_similarity(E), "mask_router": torch.randn(E, H, generator=generator)}})


POLICIES = {
    "topk_sere": lambda: moe_fx.SERE(artifact(), primary=1, threshold=0.1),
    "topk_beam": lambda: moe_fx.BEAM(artifact(), tau=0.6),
}


def fuses(cls: type[layers.Layer]) -> bool:
    """Whether the layer selects by ``topk`` over two axes."""
    return cls in (layers.SoftmaxThenTopK, layers.TopKThenSoftmax)


@pytest.mark.parametrize("cls", [c for c in ROUTES if c is not layers.Capacity])
@pytest.mark.parametrize("op", POLICIES)
def test_every_layer_computes_the_same(cls: type[layers.Layer], op: str) -> None:
    layer, x = cls().eval(), torch.randn(4, H, generator=torch.Generator().manual_seed(5))
    want = compiled(layer, x, POLICIES[op](), fuse_routing=False)
    assert moe_fx.last_report().ops_after[f"moe_fx.{op}"] == 0
    torch._dynamo.reset()
    got = compiled(layer, x, POLICIES[op](), fuse_routing=True)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))
    after = moe_fx.last_report().ops_after
    assert after[f"moe_fx.{op}"] + after["moe_fx.sere_reroute"] + after["moe_fx.beam_mask"] == 1
    if fuses(cls):
        assert after[f"moe_fx.{op}"] == 1
        assert after["aten.topk"] == 0


def test_on_cpu_and_for_top_k_nothing_changes() -> None:
    layer, x = layers.SoftmaxThenTopK().eval(), torch.randn(4, H)
    compiled(layer, x, POLICIES["topk_sere"]())
    assert moe_fx.last_report().ops_after["moe_fx.topk_sere"] == 0
    torch._dynamo.reset()
    compiled(layer, x, moe_fx.TopK(), fuse_routing=True)
    assert moe_fx.last_report().ops_after["aten.topk"] == 1


@pytest.mark.parametrize("op", POLICIES)
def test_what_is_differentiated_stays(op: str) -> None:
    layer, x = layers.SoftmaxThenTopK(), torch.randn(4, H)
    options = {"policy": POLICIES[op](), "inner": "eager", "fuse_routing": True}
    torch.compile(layer, backend="moe_sparse", options=options)(x).sum().backward()
    assert moe_fx.last_report().ops_after[f"moe_fx.{op}"] == 0
    assert moe_fx.last_report().ops_after["aten.topk"] == 1


def traced(function: Any, *inputs: Tensor) -> fx.GraphModule:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(i) for i in inputs]
    return make_fx(function)(*fakes)


def targets(gm: fx.GraphModule) -> list[str]:
    return [node.target._schema.name for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def scale(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)


def beam_twice(scores: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Two forms of the weights, one gathered from other scores, mask logits made after the selection."""
    values, ids = scores.topk(4, dim=-1)
    logits = other * 2
    first, masked = OPS.beam_mask(scale(values), ids, logits, 0.5)
    second, _ = OPS.beam_mask(other.gather(1, ids), ids, logits, 0.5)
    return first, second, masked, ids


def sere_then_more(scores: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Weights gathered by the original ids, a table made after the selection."""
    _, ids = scores.topk(4, dim=-1, sorted=True)
    return OPS.sere_reroute(ids, other.softmax(-1), 1, 0.0, None, 100), other[:5].gather(1, ids)


def beam_then_sere(scores: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    values, ids = scores.topk(4, dim=-1)
    weights, ids = OPS.beam_mask(values, ids, other[:5], 0.5)
    return weights, OPS.sere_reroute(ids, other, 1, 0.0)


@pytest.mark.parametrize(
    ("function", "rows", "fused"),
    [(beam_twice, 5, "topk_beam"), (sere_then_more, 20, "topk_sere"), (beam_then_sere, 20, "topk_beam")],
)
def test_fires_on_any_graph(function: Any, rows: int, fused: str) -> None:
    inputs = random_scores(5, 20), random_scores(rows, 20, 1)
    gm = traced(function, *inputs)
    assert fuse_routing(gm) == 1
    gm.recompile()
    assert f"moe_fx::{fused}" in targets(gm)
    assert not {"aten::topk", "moe_fx::beam_mask"}.intersection(targets(gm))
    for got, want in zip(gm(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def table_from_ids(scores: Tensor, other: Tensor) -> Tensor:
    """The table depends on the selection, so it cannot be there before it."""
    values, ids = scores.topk(4, dim=-1)
    return OPS.sere_reroute(ids, other + values.sum(), 1, 0.0)


def smallest(scores: Tensor, other: Tensor) -> Tensor:
    return OPS.sere_reroute(scores.topk(4, dim=-1, largest=False)[1], other, 1, 0.0)


def tokens(scores: Tensor, other: Tensor) -> Tensor:
    return OPS.sere_reroute(scores.topk(4, dim=0)[1], other, 1, 0.0)


def other_ids(scores: Tensor, other: Tensor) -> Tensor:
    return OPS.sere_reroute(scores.topk(4, dim=-1)[1] + 1, other, 1, 0.0)


def changed_in_place(scores: Tensor, other: Tensor) -> Tensor:
    _, ids = scores.topk(4, dim=-1)
    other.add_(1)
    return OPS.sere_reroute(ids, other * 2, 1, 0.0)


def two_masks(scores: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = scores.topk(4, dim=-1)
    return OPS.beam_mask(values, ids, other[:5], 0.5)[0], OPS.beam_mask(values, ids, other[5:10], 0.5)[0]


@pytest.mark.parametrize("function", [table_from_ids, smallest, tokens, other_ids, changed_in_place, two_masks])
def test_leaves_alone(function: Any) -> None:
    gm = traced(function, random_scores(5, 20), random_scores(20, 20, 1))
    before = targets(gm)
    assert fuse_routing(gm) == 0
    assert targets(gm) == before


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_whole_models_compute_what_the_hand_patched_model_does(name: str) -> None:
    """gpt-oss selects logits and makes weights of the selected ones; DeepSeek-V2 selects among groups before."""
    model, tables, inputs = tiny.build(name), tiny.random_artifact(name), tiny.tokens()
    rules = {
        "topk_sere": (moe_fx.SERE(tables, primary=1, threshold=0.4), tiny.sere_rule(tables, 1, 0.4)),
        "topk_beam": (moe_fx.BEAM(tables), tiny.beam_rule(tables, 0.5)),
    }
    for op, (policy, rule) in rules.items():
        for fuse_experts in (False, True):
            torch._dynamo.reset()
            options: Any = {"policy": policy, "inner": "eager", "strict": True, "fuse_routing": True}
            options["fuse_experts"] = fuse_experts
            with torch.no_grad():
                got = torch.compile(model, backend="moe_sparse", options=options)(**inputs).logits
            torch.testing.assert_close(got, tiny.expected(model, name, rule, **inputs), **tolerance(torch.float32))
            assert moe_fx.last_report().ops_after[f"moe_fx.{op}"] == tiny.LAYERS
