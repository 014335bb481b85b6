"""Eight transformers architectures through the backend, against their eager selves with hand-patched routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_fx
import tiny
from moe_fx.testing import tolerance

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


#: Eager experts break the graph at every expert, which takes longest to compile: not all architectures.
CASES_OF_EXPERTS = [
    *((name, experts) for name in tiny.ARCHS for experts in ("grouped_mm", "batched_mm")),
    *((name, "eager") for name in ("qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")),
]


@pytest.mark.parametrize(("name", "experts"), CASES_OF_EXPERTS)
def test_every_policy_equals_the_hand_patched_model(name: str, experts: str) -> None:
    model, artifact, inputs = tiny.build(name, experts), tiny.random_artifact(name), tiny.tokens()
    plain = tiny.expected(model, name, None, **inputs)
    for label, fuse in CASES[experts]:
        torch._dynamo.reset()
        policy, rule = policies(artifact)[label]
        want = tiny.expected(model, name, rule, **inputs)
        got = run(model, policy, "eager", fuse, **inputs)
        report = moe_fx.last_report()
        assert_same(got, want)
        assert [s.name for s in report.sites] == list(tiny.ARCHS[name].sites), label
        assert report.skips == []
        switches_off = "beam" in label
        assert {s.experts for s in report.sites} == {"fused" if fuse else "folded" if switches_off else "untouched"}
        if rule is not None:  # a rewrite that did nothing would pass against a rule that did nothing
            assert not torch.allclose(want, plain, atol=1e-2), label


SHARES = (0.0, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("name", tiny.ARCHS)
@pytest.mark.parametrize("label", ["beam", "beam+sere"])
def test_any_share_of_the_picks_off(name: str, label: str) -> None:
    """Fused and folded, each compiled once: the mask routers of the other shares are copied into the compiled graph's."""
    model, inputs = tiny.build(name), tiny.tokens()
    artifacts = {share: tiny.artifact_with_share_off(model, name, share, TAU, **inputs) for share in SHARES}
    plain = tiny.expected(model, name, None, **inputs)
    want = {share: tiny.expected(model, name, policies(a)[label][1], **inputs) for share, a in artifacts.items()}
    for share, logits in want.items():
        assert torch.allclose(logits, plain, atol=1e-2) == (share == 0 and label == "beam"), "the share must show"
    for fuse in (True, False):
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []
        options = {"inner": lambda gm, _, graphs=graphs: graphs.append(gm) or gm.forward, "fuse_experts": fuse, "strict": True}
        program = torch.compile(model, backend="moe_sparse", options={"policy": policies(artifacts[0.0])[label][0], **options})
        for share, artifact in artifacts.items():
            for gm in graphs:  # none yet for the first share, whose own mask routers are compiled in
                masks = [b for n, b in gm.named_buffers() if n.startswith("moe_fx_") and b.shape == (tiny.EXPERTS, tiny.HIDDEN)]
                for mask, site in zip(masks, tiny.ARCHS[name].sites, strict=True):
                    mask.copy_(artifact.sites[site]["mask_router"])
            with torch.no_grad():
                assert_same(program(**inputs).logits, want[share])
        assert len(graphs) == 1
        assert {s.experts for s in moe_fx.last_report().sites} == {"fused" if fuse else "folded"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("qwen3_moe", 0.9), ("gpt_oss", 0.5), ("deepseek_v2", 1.0)])
@pytest.mark.parametrize("fuse", [True, False])
def test_any_share_of_the_picks_off_under_inductor(name: str, share: float, fuse: bool) -> None:
    model, inputs = tiny.build(name), tiny.tokens()
    policy, rule = policies(tiny.artifact_with_share_off(model, name, share, TAU, **inputs))["beam"]
    assert_same(run(model, policy, "inductor", fuse, **inputs), tiny.expected(model, name, rule, **inputs))


#: (policy, whether experts are fused) by experts implementation.  Experts that do not trace cannot be fused.
CASES = {
    "grouped_mm": [("topk", True), ("sere", False), ("beam", True), ("beam+sere", False)],
    "batched_mm": [("sere", True), ("beam", False), ("beam+sere", True), ("fresh beam", True)],
    "eager": [("sere", False), ("beam+sere", False)],
}


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
    for label in ("topk", "beam+sere"):
        policy, rule = policies(artifact)[label]
        torch._dynamo.reset()
        got, want = run(model, policy, "eager", False, **inputs), tiny.expected(model, name, rule, **inputs)
        assert torch.equal(got, want), label  # the same kernels in the same order
        torch._dynamo.reset()
        fused = run(model, policy, "eager", True, **inputs)
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


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_dynamic_shapes_and_changing_batches(experts: str) -> None:
    name = "deepseek_v3"
    model, artifact = tiny.build(name, experts), tiny.random_artifact(name)
    policy, rule = policies(artifact)["beam+sere"]
    options = {"policy": policy, "inner": "aot_eager", "strict": True}
    for dynamic, shapes in ((True, ((2, 9), (3, 5))), (None, ((2, 9), (1, 1), (4, 7)))):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="moe_sparse", options=options, dynamic=dynamic)
        for batch, length in shapes:
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
