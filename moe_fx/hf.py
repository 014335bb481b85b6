"""``moe_fx::fused_experts`` as an experts implementation of transformers, for models that are not compiled, too.

    import moe_fx.hf
    model.set_experts_implementation("moe_fx")

runs every experts layer as the op, with or without ``torch.compile``.  Under the ``"moe_sparse"`` backend the routing is
found as ever, and what a policy switches off is skipped (``Site.experts == "fused"``): nothing has to be recognised.

An experts class tells where its weights are; what stands between its two projections is its method ``_apply_gate``, or its
``act_fn`` where there is no gate.  Both are looked up in tables here, by identity and not by name, so that a class that
does something else raises an error and is never run as what it only resembles.  transformers 5.17 to 5.19.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx.ops  # noqa: F401  (defines torch.ops.moe_fx)

try:
    from transformers import activations
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError("moe_fx.hf needs transformers 5.17 or newer: pip install 'transformers>=5.17'") from error

NAME = "moe_fx"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Gate:
    """What an ``_apply_gate`` computes, in the op's words.

    Attributes:
        layout: of gate and up in one projection, ``concatenated`` or ``interleaved``.
        activation: the op's name for it; None where it is that of the module's ``act_fn``.
        limit, alpha: the module's attributes that hold the clamp's bound and the factor in the sigmoid, if any.
    """

    layout: str = "concatenated"
    activation: str | None = None
    limit: str | None = None
    alpha: str | None = None


#: ``_apply_gate`` by the module and the name of its definition.
GATES: dict[tuple[str, str], Gate] = {
    ("transformers.integrations.moe", "_default_apply_gate"): Gate(),
    **{
        (f"transformers.models.{model}.modeling_{model}", f"{cls}._apply_gate"): gate
        for model, cls, gate in (
            ("gpt_oss", "GptOssExperts", Gate("interleaved", "swiglu_clamped", "limit", "alpha")),
            ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", Gate("concatenated", "swiglu_clamped", "limit", "alpha")),
            ("minimax_m3_vl", "MiniMaxM3VLExperts", Gate("concatenated", "swiglu_clamped", "swiglu_limit", "swiglu_alpha")),
            ("deepseek_v4", "DeepseekV4Experts", Gate(limit="limit")),
            ("glm5_next", "Glm5NextTextExperts", Gate(activation="silu", limit="swiglu_limit")),
            ("hy_v4", "HYV4Experts", Gate(activation="silu", limit="swiglu_limit")),
        )
    },
}

#: Activations by the class of ``act_fn``.
ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
}


def register() -> None:
    """Make ``"moe_fx"`` a name that ``set_experts_implementation`` takes.  Importing this module does it."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, fused_experts_forward)


def fused_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module, as one op.

    Args:
        self: a module whose class was decorated with ``use_experts_implementation``.
        hidden_states: [T, H].
        top_k_index: [T, K]; ids outside [0, E) are off, as under expert parallelism.
        top_k_weights: [T, K].

    Returns:
        [T, H] in the dtype of ``hidden_states``.

    Raises:
        NotImplementedError: the module's class, its gate or its activation is none that the op knows.
    """
    how = _settings(self)
    w_gate_up = self.gate_up_proj if self.has_gate else self.up_proj
    if w_gate_up.dtype not in _DTYPES:
        raise _unknown(self, "weights in float32, bfloat16 or float16", str(w_gate_up.dtype))
    biases: tuple[Any, Any] = (None, None)
    if self.has_bias:
        biases = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias)
    tensors = (hidden_states.to(w_gate_up.dtype), w_gate_up, self.down_proj, top_k_weights, top_k_index, *biases)
    return torch.ops.moe_fx.fused_experts(*tensors, *how).to(hidden_states.dtype)


def _settings(experts: Any) -> tuple[str, str, bool, float, float | None]:
    """activation, gated, transposed, alpha, limit: the op's arguments that are no tensors."""
    if not experts.has_gate:
        return _activation(experts), "none", experts.is_transposed, 1.702, None
    definition = _definition_of_gate(type(experts))
    gate = GATES.get(definition)
    if gate is None:
        raise _unknown(experts, "an _apply_gate that is in moe_fx.hf.GATES", ".".join(definition))
    activation = _activation(experts) if gate.activation is None else gate.activation
    limit = getattr(experts, gate.limit) if gate.limit is not None else None
    alpha = getattr(experts, gate.alpha) if gate.alpha is not None else 1.702
    return activation, gate.layout, experts.is_transposed, alpha, limit


@torch.compiler.assume_constant_result
def _definition_of_gate(experts_class: Any) -> tuple[str, str]:
    """The module and the name of a class's ``_apply_gate``.  Dynamo cannot read them, but may call this."""
    return experts_class._apply_gate.__module__, experts_class._apply_gate.__qualname__


def _activation(experts: Any) -> str:
    act: Any = experts.act_fn
    name = "silu" if act is F.silu else ACTIVATIONS.get(type(act))
    if name is None:
        known = ", ".join(sorted(cls.__name__ for cls in ACTIVATIONS))
        raise _unknown(experts, f"an act_fn of {known}", getattr(act, "__name__", type(act).__name__))
    return name


def _unknown(experts: object, expected: str, came: str) -> NotImplementedError:
    return NotImplementedError(
        f"experts implementation 'moe_fx' cannot run {type(experts).__name__}: expected {expected}, but it has {came}: "
        "choose 'grouped_mm' or 'batched_mm' for this model, which backend 'moe_sparse' rewrites too"
    )


register()
