"""The experts implementation "moe_fx": equal to transformers' own, alone, compiled, under every policy, and in training."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_fx
import moe_fx.hf
import tiny
from moe_fx.testing import random_routing, tolerance
from variants import run_each

ARCHS = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe")
T, K, E, H, I = 7, 3, 6, 16, 12
PRIMARY, THRESHOLD, TAU = 1, 0.4, 0.5


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


def logits(model: nn.Module, experts: str, **inputs: Any) -> Tensor:
    model.set_experts_implementation(experts)
    with torch.no_grad():
        return model(**inputs).logits


def compiled(model: nn.Module, policy: object = None, inner: str = "eager", **options: Any) -> Tensor:
    model.set_experts_implementation("moe_fx")
    options = {"policy": policy, "inner": inner, "strict": True, **options}
    with torch.no_grad():
        return torch.compile(model, backend="moe_sparse", options=options, fullgraph=True)(**tiny.tokens()).logits


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **tolerance(want.dtype))


# ------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ARCHS)
def test_without_compiling(name: str) -> None:
    model = tiny.build(name)
    want = logits(model, "eager", **tiny.tokens())
    assert_same(logits(model, "moe_fx", **tiny.tokens()), want)


@pytest.mark.parametrize(("name", "dynamic"), [*((name, False) for name in ARCHS), ("gpt_oss", True)])
def test_compiled_by_another_backend(name: str, dynamic: bool) -> None:
    model = tiny.build(name, "moe_fx")
    seen: list[str] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> Any:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    program = torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        got = program(**tiny.tokens()).logits
    assert seen.count("moe_fx.fused_experts") + seen.count("moe_fx.fused_experts.default") == tiny.LAYERS
    assert_same(got, logits(model, "eager", **tiny.tokens()))


@pytest.mark.parametrize(("name", "fuse"), [*((name, True) for name in ARCHS), ("deepseek_v3", False)])
def test_every_policy_through_our_backend(name: str, fuse: bool) -> None:
    """What is off is skipped whether or not recognised experts are to be fused: the model itself asked for the op."""
    artifact, inputs = tiny.random_artifact(name), tiny.tokens()
    sere = moe_fx.SERE(artifact, primary=PRIMARY, threshold=THRESHOLD)
    beam = moe_fx.BEAM(artifact, tau=TAU)
    cases = {
        "topk": (None, None),
        "sere": (sere, tiny.sere_rule(artifact, PRIMARY, THRESHOLD)),
        "beam": (beam, tiny.beam_rule(artifact, TAU)),
        "beam+sere": ([beam, sere], tiny.beam_then_sere_rule(artifact, TAU, PRIMARY, THRESHOLD)),
    }
    plain = tiny.expected(tiny.build(name, "eager"), name, None, **inputs)
    wanted = [{"policy": policy, "strict": True, "fuse_experts": fuse} for policy, _ in cases.values()]
    results = run_each(tiny.build(name, "moe_fx"), wanted, **inputs)
    for (label, (_, rule)), (output, report) in zip(cases.items(), results, strict=True):
        want = tiny.expected(tiny.build(name, "eager"), name, rule, **inputs)
        assert_same(output.logits, want)
        assert [(s.name, s.experts) for s in report.sites] == [(site, "fused") for site in tiny.ARCHS[name].sites], label
        assert report.skips == []
        assert report.ops_after["moe_fx.fused_experts"] == tiny.LAYERS
        assert report.ops_after["moe_fx.fold_masked"] == 0
        if rule is not None:
            assert not torch.allclose(want, plain, atol=1e-2), label


@pytest.mark.slow
def test_inductor() -> None:
    name, inputs = "gpt_oss", tiny.tokens()
    artifact = tiny.random_artifact(name)
    want = tiny.expected(tiny.build(name, "eager"), name, tiny.beam_rule(artifact, TAU), **inputs)
    assert_same(compiled(tiny.build(name), moe_fx.BEAM(artifact, tau=TAU), "inductor"), want)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("backend", [None, "aot_eager", "moe_sparse"])
def test_gradients_are_the_models_own(name: str, backend: str | None) -> None:
    model, inputs = tiny.build(name, "batched_mm").requires_grad_(True), tiny.tokens()
    inputs["labels"] = inputs["input_ids"]
    want = gradients(model, model, inputs)
    model.set_experts_implementation("moe_fx")
    options = {"options": {"inner": "aot_eager", "stats": True}} if backend == "moe_sparse" else {}
    program = model if backend is None else torch.compile(model, backend=backend, **options)
    got = gradients(model, program, inputs)
    assert got.keys() == want.keys()
    assert any("experts" in key for key in want)
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, **tolerance(grad.dtype), msg=lambda text, key=key: f"{key}: {text}")


def gradients(model: nn.Module, program: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    program(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_mask_routers_train_through_the_models_own_op() -> None:
    model, inputs = tiny.build("qwen3_moe", "moe_fx"), tiny.tokens()
    inputs["labels"] = inputs["input_ids"]
    policy = moe_fx.BEAM(train=True)
    program = torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": "aot_eager"})
    program(**inputs).loss.backward()
    assert [s.experts for s in moe_fx.last_report().sites] == ["fused"] * tiny.LAYERS
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in policy.parameters())


# ----------------------------------------------------------------------------------------------- experts alone

CONFIG = {
    "hidden_size": H, "moe_intermediate_size": I, "intermediate_size": I, "expert_ffn_hidden_size": I,
    "n_routed_experts": E, "num_local_experts": E, "num_experts": E, "moe_num_experts": E, "moe_latent_size": None,
    "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2",
    "swiglu_limit": 0.8, "swiglu_alpha": 1.3,
}  # fmt: skip

#: Every way of computing that a gate in the table stands for, and layouts that no tiny model here has.
CLASSES = {
    "aria": "AriaExperts", "deepseek_v4": "DeepseekV4Experts", "gemma4": "Gemma4TextExperts", "gpt_oss": "GptOssExperts",
    "glm5_next": "Glm5NextTextExperts", "hy_v4": "HYV4Experts", "minimax_m3_vl": "MiniMaxM3VLExperts",
    "nemotron_h": "NemotronHExperts", "openai_privacy_filter": "OpenAIPrivacyFilterExperts", "qwen3_moe": "Qwen3MoeExperts",
}  # fmt: skip


def experts_of(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """An experts module of an architecture, outside any model."""
    found = importlib.util.find_spec(f"transformers.models.{name}")
    if found is None:
        pytest.skip(f"this transformers has no {name}")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    cls = getattr(module, CLASSES[name])
    if not hasattr(cls, "_apply_gate"):
        pytest.skip(f"the experts of {name} have no choice of implementation in this transformers")
    torch.manual_seed(0)
    experts = cls(SimpleNamespace(**(CONFIG | config)))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts.to(dtype).requires_grad_(False)


def through(experts: nn.Module, implementation: str, *args: Tensor) -> Tensor:
    experts.config._experts_implementation = implementation
    return experts(*args)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gate(name: str, dtype: torch.dtype) -> None:
    experts = experts_of(name, dtype)
    weights, ids = random_routing(T, K, E, dtype=dtype)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = through(experts, "batched_mm", hidden, ids, weights)
    got = through(experts, "moe_fx", hidden, ids, weights)
    assert got.dtype == dtype
    assert want.abs().max() > 0.5, "values must be large enough for limits and gates to show"
    assert_same(got, want)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])
def test_every_activation(act: str) -> None:
    experts = experts_of("qwen3_moe", hidden_act=act)
    weights, ids = random_routing(T, K, E)
    hidden = torch.randn(T, H)
    want = through(experts, "batched_mm", hidden, ids, weights)
    assert_same(through(experts, "moe_fx", hidden, ids, weights), want)


def test_picks_of_other_devices_experts_are_off() -> None:
    """Under expert parallelism an id beyond this device's experts is somebody else's."""
    experts = experts_of("qwen3_moe")
    weights, ids = random_routing(T, K, E, beyond=0.5)
    assert (ids >= E).any()
    hidden = torch.randn(T, H)
    kept = torch.where(ids < E, weights, 0)
    want = through(experts, "batched_mm", hidden, ids.clamp(max=E - 1), kept)
    assert_same(through(experts, "moe_fx", hidden, ids, weights), want)


def test_an_unknown_activation_is_refused() -> None:
    experts = experts_of("qwen3_moe", hidden_act="mish")
    words = r"Qwen3MoeExperts: expected an act_fn of .*SiLU.*it has MishActivation.*'grouped_mm'"
    with pytest.raises(NotImplementedError, match=words):
        through(experts, "moe_fx", torch.randn(T, H), *random_routing(T, K, E)[::-1])


def test_an_unknown_gate_is_refused_whatever_its_class_is_called() -> None:
    experts = experts_of("qwen3_moe")

    class Qwen3MoeExperts(type(experts)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate) * (up + 1)

    experts.__class__ = Qwen3MoeExperts
    with pytest.raises(NotImplementedError, match=r"expected an _apply_gate that is in .*GATES.*Qwen3MoeExperts\._apply_gate"):
        through(experts, "moe_fx", torch.randn(T, H), *random_routing(T, K, E)[::-1])


def test_a_gate_that_is_inherited_is_known() -> None:
    experts = experts_of("gpt_oss")
    weights, ids = random_routing(T, K, E)
    hidden = torch.randn(T, H)
    want = through(experts, "batched_mm", hidden, ids, weights)
    experts.__class__ = type("Mine", (type(experts),), {})
    assert_same(through(experts, "moe_fx", hidden, ids, weights), want)


def test_quantised_weights_are_refused() -> None:
    experts = experts_of("qwen3_moe")
    for parameter in experts.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="expected weights in float32, .* it has torch.float8_e4m3fn"):
        through(experts, "moe_fx", torch.randn(T, H), *random_routing(T, K, E)[::-1])


def test_importing_registers_and_moe_fx_alone_does_not_import_transformers() -> None:
    program = (
        "import sys, moe_fx; assert 'transformers' not in sys.modules; import moe_fx.hf; "
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as f; print(f['moe_fx'].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fused_experts_forward"
