"""Eight transformers architectures through the backend, against their eager selves with hand-patched routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_fx
import tiny
from moe_fx.report import Report
from moe_fx.testing import tolerance
from variants import run_each

PRIMARY, THRESHOLD, TAU = 1, 0.4, 0.5


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


def policies(artifact: moe_fx.Artifact) -> dict[str, tuple[Any, tiny.Rule | None]]:
    """What to ask the backend for, and the hand-written rule it must equal."""
    sere = moe_fx.SERE(artifact, primary=PRIMARY, threshold=THRESHOLD)
    beam = moe_fx.BEAM(artifact, tau=TAU)
    return {
        "topk": (None, None),
        "sere": (sere, tiny.sere_rule(artifact, PRIMARY, THRESHOLD)),
        "beam": (beam, tiny.beam_rule(artifact, TAU)),
        "beam+sere": ([beam, sere], tiny.beam_then_sere_rule(artifact, TAU, PRIMARY, THRESHOLD)),
        "fresh beam": (moe_fx.BEAM(), None),
    }


def run(model: nn.Module, policy: object, inner: object, fuse: bool = True, **inputs: Any) -> Tensor:
    """Logits through the backend."""
    compile_options = {k: inputs.pop(k) for k in ("dynamic", "fullgraph") if k in inputs}
    options = {"policy": policy, "inner": inner, "strict": True, "fuse_experts": fuse}
    with torch.no_grad():
        return torch.compile(model, backend="moe_sparse", options=options, **compile_options)(**inputs).logits


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **tolerance(want.dtype))


#: (policy, whether experts are fused) by experts implementation.
CASES = {
    "grouped_mm": [("topk", True), ("sere", False), ("beam", True), ("beam+sere", False)],
    "batched_mm": [("sere", True), ("beam", False), ("beam+sere", True), ("fresh beam", True)],
}


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", tiny.ARCHS)
def test_every_policy_equals_the_hand_patched_model(name: str, experts: str) -> None:
    model, artifact, inputs = tiny.build(name, experts), tiny.random_artifact(name), tiny.tokens()
    asked = policies(artifact)
    wanted = [{"policy": asked[label][0], "fuse_experts": fuse, "strict": True} for label, fuse in CASES[experts]]
    results = run_each(model, wanted, **inputs)
    for (label, fuse), (output, report) in zip(CASES[experts], results, strict=True):
        check_result(model, name, label, asked[label][1], output.logits, report)
        assert {s.experts for s in report.sites} == {"fused" if fuse else "folded" if "beam" in label else "untouched"}


@pytest.mark.parametrize("label", ["sere", "beam+sere"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_every_policy_equals_the_hand_patched_model_whose_graphs_break(name: str, label: str) -> None:
    """Eager experts break the graph at every expert, which takes longest to compile: not all architectures."""
    model, artifact, inputs = tiny.build(name, "eager"), tiny.random_artifact(name), tiny.tokens()
    policy, rule = policies(artifact)[label]
    logits = run(model, policy, "eager", **inputs)
    check_result(model, name, label, rule, logits, moe_fx.last_report())
    assert {s.experts for s in moe_fx.last_report().sites} == {"folded" if "beam" in label else "untouched"}


def check_result(model: nn.Module, name: str, label: str, rule: tiny.Rule | None, logits: Tensor, report: Report) -> None:
    """Equal to the model patched by hand, whose rule changes something; all sites found, nothing skipped."""
    want, plain = (tiny.expected(model, name, r, **tiny.tokens()) for r in (rule, None))
    assert_same(logits, want)
    assert [s.name for s in report.sites] == list(tiny.ARCHS[name].sites), label
    assert report.skips == []
    if rule is not None:  # a rewrite that did nothing would pass against a rule that did nothing
        assert not torch.allclose(want, plain, atol=1e-2), label


SHARES = (0.0, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_any_share_of_the_picks_off(name: str) -> None:
    """Fused and folded."""
    model, inputs = tiny.build(name), tiny.tokens()
    artifacts = {share: tiny.artifact_with_share_off(model, name, share, TAU, **inputs) for share in SHARES}
    plain = tiny.expected(model, name, None, **inputs)
    cases = [(label, share, fuse) for label in ("beam", "beam+sere") for share in SHARES for fuse in (True, False)]
    asked = [policies(artifacts[share])[label] for label, share, _ in cases]
    wanted = [{"policy": p, "fuse_experts": fuse, "strict": True} for (p, _), (*_, fuse) in zip(asked, cases, strict=True)]
    results = run_each(model, wanted, **inputs)
    for (label, share, fuse), (_, rule), (output, report) in zip(cases, asked, results, strict=True):
        want = tiny.expected(model, name, rule, **inputs)
        assert torch.allclose(want, plain, atol=1e-2) == (share == 0 and label == "beam"), "the share must show"
        assert_same(output.logits, want)
        assert {s.experts for s in report.sites} == {"fused" if fuse else "folded"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share", "fuse"), [("qwen3_moe", 0.9, True), ("gpt_oss", 0.5, False), ("deepseek_v2", 1.0, True)]
)
def test_any_share_of_the_picks_off_under_inductor(name: str, share: float, fuse: bool) -> None:
    """Some of the shares of above."""
    model, inputs = tiny.build(name), tiny.tokens()
    policy, rule = policies(tiny.artifact_with_share_off(model, name, share, TAU, **inputs))["beam"]
    assert_same(run(model, policy, "inductor", fuse, **inputs), tiny.expected(model, name, rule, **inputs))


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_sites_are_described(name: str) -> None:
    model = tiny.build(name)
    report = moe_fx.explain(model, **tiny.tokens())
    assert len(report.sites) == tiny.LAYERS
    for site in report.sites:
        assert (site.num_experts, site.top_k, site.hidden_size) == (tiny.EXPERTS, tiny.TOP_K, tiny.HIDDEN)
        assert site.policy == "TopK"
        assert site.experts == "fused"
    scoring = {"mixtral": "softmax -> topk", "gpt_oss": "logits -> topk", "deepseek_v3": "sigmoid -> +bias -> masked -> topk"}
    if name in scoring:
        assert report.sites[0].scoring == scoring[name]


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_the_aot_road(name: str) -> None:
    model, artifact, inputs = tiny.build(name, "batched_mm"), tiny.random_artifact(name), tiny.tokens()
    policy, rule = policies(artifact)["beam+sere"]
    assert_same(run(model, policy, "aot_eager", **inputs), tiny.expected(model, name, rule, **inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "experts", "label"),
    [("qwen3_moe", "grouped_mm", "sere"), ("deepseek_v3", "grouped_mm", "beam+sere"), ("gpt_oss", "batched_mm", "beam"),
     ("mixtral", "eager", "sere")],
)  # fmt: skip
def test_inductor(name: str, experts: str, label: str) -> None:
    model, artifact, inputs = tiny.build(name, experts), tiny.random_artifact(name), tiny.tokens()
    policy, rule = policies(artifact)[label]
    assert_same(run(model, policy, "inductor", **inputs), tiny.expected(model, name, rule, **inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    name = "qwen3_moe"
    model, artifact, inputs = tiny.build(name, dtype=dtype), tiny.random_artifact(name), tiny.tokens()
    asked = {label: policies(artifact)[label] for label in ("topk", "beam+sere")}
    wanted = [{"policy": policy, "fuse_experts": fuse, "strict": True} for policy, _ in asked.values() for fuse in (False, True)]
    outputs = [output.logits for output, _ in run_each(model, wanted, **inputs)]
    for (label, (_, rule)), got, fused in zip(asked.items(), outputs[::2], outputs[1::2], strict=True):
        want = tiny.expected(model, name, rule, **inputs)
        assert torch.equal(got, want), label  # the same kernels in the same order
        torch.testing.assert_close(fused, want, rtol=5e-2, atol=5e-2)  # two layers of rounding in another order


# ----------------------------------------------------------------------------------------------- exact top-K


@pytest.mark.parametrize(
    ("name", "experts"), [*((name, "grouped_mm") for name in tiny.ARCHS), ("gpt_oss", "batched_mm"), ("qwen3_moe", "eager")]
)
def test_without_a_policy_the_inner_compiler_gets_dynamos_own_graphs(name: str, experts: str) -> None:
    model, inputs = tiny.build(name, experts), tiny.tokens(2, 5)
    seen: list[str] = []
    alone: list[str] = []

    def keep(into: list[str]) -> Any:
        return lambda gm, _: into.append(gm.print_readable(print_output=False)) or gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep(alone))(**inputs)
        torch._dynamo.reset()
        torch.compile(model, backend="moe_sparse", options={"inner": keep(seen), "fuse_experts": False})(**inputs)
    assert seen == alone
    assert seen


# ------------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize(("experts", "inner"), [("grouped_mm", "aot_eager"), ("batched_mm", "eager"), ("eager", "eager")])
def test_dynamic_shapes_and_changing_batches(experts: str, inner: str, dynamic: bool | None) -> None:
    name = "deepseek_v3"
    model, artifact = tiny.build(name, experts), tiny.random_artifact(name)
    policy, rule = policies(artifact)["beam+sere"]
    options = {"policy": policy, "inner": inner, "strict": True}
    compiled = torch.compile(model, backend="moe_sparse", options=options, dynamic=dynamic)
    for batch, length in ((2, 9), (3, 5)) if dynamic else ((2, 9), (1, 1), (4, 7)):
        inputs = tiny.tokens(batch, length, seed=batch)
        # transformers wraps all forwards in one function, which soon is compiled as often as Dynamo compiles any
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            got = compiled(**inputs).logits
        assert_same(got, tiny.expected(model, name, rule, **inputs))


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_fullgraph(experts: str) -> None:
    name = "qwen3_moe"
    model, artifact, inputs = tiny.build(name, experts), tiny.random_artifact(name), tiny.tokens()
    policy, rule = policies(artifact)["sere"]
    assert_same(run(model, policy, "aot_eager", fullgraph=True, **inputs), tiny.expected(model, name, rule, **inputs))
    assert moe_fx.last_report().graphs == 1


def test_inference_mode() -> None:
    name = "qwen3_moe"
    model, artifact, inputs = tiny.build(name), tiny.random_artifact(name), tiny.tokens()
    policy, rule = policies(artifact)["beam+sere"]
    compiled = torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": "aot_eager"})
    with torch.inference_mode():
        got = compiled(**inputs).logits
    assert_same(got, tiny.expected(model, name, rule, **inputs))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_under_topk_are_the_models_own(name: str, inner: str) -> None:
    model, inputs = tiny.build(name, "batched_mm").requires_grad_(True), tiny.tokens()
    inputs["labels"] = inputs["input_ids"]
    model(**inputs).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="moe_sparse", options={"inner": inner, "stats": True})
    compiled(**inputs).loss.backward()
    assert moe_fx.last_report().sites, "counting puts ops at every site, so this is a rewritten graph"
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-5, msg=key)


def test_gradients_under_beam_are_the_patched_models() -> None:
    name = "qwen3_moe"
    model, artifact, inputs = tiny.build(name, "batched_mm").requires_grad_(True), tiny.random_artifact(name), tiny.tokens()
    inputs["labels"] = inputs["input_ids"]
    with tiny.patched(model, name, tiny.beam_rule(artifact, TAU)):
        model(**inputs).loss.backward()
    # outside the gates the straight-through estimator adds nothing: a mask router's gradient is no model weight's
    down = "model.layers.1.mlp.experts.down_proj"
    want = dict(model.named_parameters())[down].grad.clone()
    model.zero_grad()
    options = {"policy": moe_fx.BEAM(artifact, tau=TAU), "inner": "aot_eager"}
    torch.compile(model, backend="moe_sparse", options=options)(**inputs).loss.backward()
    torch.testing.assert_close(dict(model.named_parameters())[down].grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_key_value_cache(cache: str) -> None:
    name = "qwen3_moe"
    model, artifact = tiny.build(name, use_cache=True), tiny.random_artifact(name)
    policy, rule = policies(artifact)["sere"]
    prompt = tiny.tokens(4, 6)["input_ids"]
    settings = {
        "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache if cache == "static" else None,
        "attention_mask": torch.ones_like(prompt), "disable_compile": True,
    }  # fmt: skip
    with tiny.patched(model, name, rule):
        want = model.generate(prompt, **settings)
    plain = model.generate(prompt, **settings)
    original = model.forward
    model.forward = torch.compile(
        original, backend="moe_sparse", options={"policy": policy, "inner": "aot_eager", "strict": True}
    )
    got = model.generate(prompt, **settings)
    assert torch.equal(got, want)
    assert not torch.equal(want, plain), "the policy must have shown"


def test_an_empty_batch_and_nan_logits() -> None:
    name = "qwen3_moe"
    model, artifact = tiny.build(name, "batched_mm"), tiny.random_artifact(name)
    policy, _ = policies(artifact)["beam+sere"]
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, backend="moe_sparse", options={"inner": "eager", "stats": True})
    for hidden in (torch.randn(0, 4, tiny.HIDDEN), torch.full((2, 4, tiny.HIDDEN), float("nan"))):
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden), block(hidden), equal_nan=True)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_mask_routers_train_from_exactly_topk(inner: str) -> None:
    name = "qwen3_moe"
    model, inputs = tiny.build(name, "batched_mm"), tiny.tokens()
    inputs["labels"] = inputs["input_ids"]
    policy = moe_fx.BEAM(train=True)
    compiled = torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": inner})
    first = compiled(**inputs)
    assert torch.equal(first.logits.detach(), model(**inputs).logits)
    masks = policy.parameters()
    assert [tuple(m.shape) for m in masks] == [(tiny.EXPERTS, tiny.HIDDEN)] * tiny.LAYERS
    first.loss.backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in masks)
    optimizer = torch.optim.SGD(masks, lr=10.0)
    for _ in range(5):
        optimizer.zero_grad()
        loss = compiled(**inputs).loss
        loss.backward()
        optimizer.step()
    assert not torch.allclose(compiled(**inputs).logits, first.logits, atol=1e-3), "the masks must have switched picks off"
