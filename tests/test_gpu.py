"""The backend on a GPU: whole models, captured graphs, and no wait for the device in a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_fx
import tiny
from moe_fx.testing import tolerance

pytestmark = pytest.mark.gpu
MODELS = ("qwen3_moe", "deepseek_v2")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.set_sync_debug_mode("default")


def policies(name: str) -> dict[str, tuple[Any, tiny.Rule | None]]:
    tables = tiny.random_artifact(name)
    return {
        "topk": (moe_fx.TopK(), None),
        "sere": (moe_fx.SERE(tables, primary=1, threshold=0.4), tiny.sere_rule(tables, 1, 0.4)),
        "beam": (moe_fx.BEAM(tables), tiny.beam_rule(tables, 0.5)),
    }


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cuda() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def compiled(model: nn.Module, policy: object, fuse: bool = True, **options: Any) -> Any:
    options = {"policy": policy, "strict": True, "fuse_experts": fuse, **options}
    return torch.compile(model, backend="moe_sparse", fullgraph=True, dynamic=False, options=options)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("policy", ["topk", "sere", "beam"])
@pytest.mark.parametrize("name", MODELS)
def test_every_policy_equals_the_hand_patched_model(name: str, policy: str, fuse: bool) -> None:
    """In float32, where rounding changes no routing decision; the expected values are computed on the CPU."""
    model, inputs = tiny.build(name), tiny.tokens()
    settings, rule = policies(name)[policy]
    want = tiny.expected(model, name, rule, **inputs)
    with torch.no_grad():
        got = compiled(model.cuda(), settings, fuse)(**on_gpu(inputs)).logits
    torch.testing.assert_close(got.cpu(), want, **tolerance(torch.float32))
    report = moe_fx.last_report()
    assert [site.name for site in report.sites] == list(tiny.ARCHS[name].sites)
    assert report.ops_after["moe_fx.topk_sere"] == (tiny.LAYERS if policy == "sere" else 0)
    assert report.ops_after["moe_fx.topk_beam"] == (tiny.LAYERS if policy == "beam" else 0)
    assert report.ops_after["moe_fx.fused_experts"] == (tiny.LAYERS if fuse else 0)


@pytest.mark.parametrize("policy", ["topk", "sere", "beam"])
def test_a_decode_step_waits_for_nothing_and_replays_with_changed_inputs(policy: str) -> None:
    """A step of compiled code, with the waits of PyTorch made errors; captured, and replayed on other tokens."""
    model = tiny.build("qwen3_moe", dtype=torch.bfloat16).cuda()
    step = compiled(model, policies("qwen3_moe")[policy][0])
    static = on_gpu(tiny.tokens(batch=4, length=1))
    with torch.inference_mode():
        for _ in range(3):
            step(**static)
        torch.cuda.set_sync_debug_mode("error")
        step(**static)
        torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(**static).logits
        seen = []
        for seed in (1, 2, 3):
            changed = on_gpu(tiny.tokens(batch=4, length=1, seed=seed))
            expected = step(**changed).logits
            static["input_ids"].copy_(changed["input_ids"])
            graph.replay()
            assert torch.equal(captured, expected)
            seen.append(expected.clone())
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("policy", ["sere", "beam"])
def test_training_on_a_gpu_keeps_the_selection(policy: str) -> None:
    """What is differentiated stays as it is; gradients are the model's own under the policy."""
    model, inputs = tiny.build("qwen3_moe", "batched_mm").cuda(), on_gpu(tiny.tokens())
    weight = model.model.embed_tokens.weight.requires_grad_()
    gradients = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        step = torch.compile(
            model, backend="moe_sparse", options={"policy": policies("qwen3_moe")[policy][0], "inner": inner, "strict": True}
        )
        (gradient,) = torch.autograd.grad(step(**inputs).logits.square().mean(), weight)
        gradients.append(gradient)
        assert moe_fx.last_report().ops_after[f"moe_fx.topk_{policy}"] == 0
    torch.testing.assert_close(*gradients, **tolerance(torch.float32))
