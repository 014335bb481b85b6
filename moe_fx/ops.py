"""The custom ops ``torch.ops.moe_fx.*``: schemas, checks, dispatch to the kernels, fake kernels and autograd.

What they compute stands in ``moe_fx.kernels.reference``.  They are defined with ``Library.define`` and ``impl`` and not
with ``torch.library.custom_op``, because a call then costs about 2 microseconds and not 6, and a call is made for every
layer of every decode step.  Triton is imported at the first call on a CUDA tensor.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fx.kernels import baselines, cpu, experts_cpu, reference
from moe_fx.kernels.experts_cpu import experts_by_pick as experts_by_pick  # what passes write into a graph, they take from here

# Checks: of dtypes and shapes only, so that they hold for fake tensors too and never wait for a device.


def _check_ids(topk_ids: Tensor) -> None:
    if topk_ids.dtype != torch.int64 and topk_ids.dtype != torch.int32:
        raise TypeError(f"topk_ids must be int32 or int64, but it is {topk_ids.dtype}: cast it")


def _check_picks(topk_ids: Tensor) -> None:
    _check_ids(topk_ids)
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must be [tokens, picks], but it is {list(topk_ids.shape)}: flatten its tokens")


def _check_weighted_picks(topk_weights: Tensor, topk_ids: Tensor) -> None:
    _check_picks(topk_ids)
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have the shape of topk_ids, {list(topk_ids.shape)}, but it is "
            f"{list(topk_weights.shape)}: give one weight per pick"
        )
    if not topk_weights.is_floating_point():
        raise TypeError(f"topk_weights must be floating point, but it is {topk_weights.dtype}: cast it")


def _check_sere_reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> None:
    _check_picks(topk_ids)
    _check_sere(similarity, primary)
    if valid_tokens is not None:
        _check_valid_tokens(topk_ids, valid_tokens)


def _check_sere(similarity: Tensor, primary: int) -> None:
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"similarity must be [experts, experts], but it is {list(similarity.shape)}: "
            "give the similarity of every pair of experts"
        )
    if not similarity.is_floating_point():
        raise TypeError(f"similarity must be floating point, but it is {similarity.dtype}: cast it")
    if primary < 1:
        raise ValueError(f"primary must be at least 1, but it is {primary}: some pick of a token must keep its expert")


def _check_valid_tokens(rows: Tensor, valid_tokens: Tensor) -> None:
    if valid_tokens.dtype == torch.bool:
        fits = valid_tokens.dim() == 1 and valid_tokens.shape[0] == rows.shape[0]
    else:
        fits = valid_tokens.numel() == 1 and valid_tokens.dtype in (torch.int32, torch.int64)
    if not fits:
        raise ValueError(
            f"valid_tokens must be bool [{rows.shape[0]}], or int32 or int64 with one element, but it is "
            f"{valid_tokens.dtype} {list(valid_tokens.shape)}: give a mask of the real tokens or their number"
        )


def _check_beam_mask(topk_weights: Tensor, topk_ids: Tensor, mask_logits: Tensor, tau: float) -> None:
    _check_weighted_picks(topk_weights, topk_ids)
    _check_beam(topk_ids, mask_logits, tau)


def _check_beam(rows: Tensor, mask_logits: Tensor, tau: float) -> None:
    if mask_logits.dim() != 2 or mask_logits.shape[0] != rows.shape[0] or mask_logits.shape[1] < 1:
        raise ValueError(
            f"mask_logits must be [{rows.shape[0]}, experts], but it is {list(mask_logits.shape)}: "
            "give one row of logits per token"
        )
    if not mask_logits.is_floating_point():
        raise TypeError(f"mask_logits must be floating point, but it is {mask_logits.dtype}: cast it")
    if not 0 < tau < 1:
        raise ValueError(f"tau must lie between 0 and 1, both excluded, but it is {tau}: 0.5 is the usual value")


def _check_scores(scores: Tensor, k: int) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores must be [tokens, experts], but it is {list(scores.shape)}: flatten its tokens")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, but it is {scores.dtype}: cast it")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be from 1 to the number of experts, {scores.shape[1]}, but it is {k}")


def _check_topk_sere(
    scores: Tensor,
    k: int,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> None:
    _check_scores(scores, k)
    _check_sere(similarity, primary)
    if valid_tokens is not None:
        _check_valid_tokens(scores, valid_tokens)


def _check_topk_beam(scores: Tensor, k: int, mask_logits: Tensor, tau: float) -> None:
    _check_scores(scores, k)
    _check_beam(scores, mask_logits, tau)


def _fake_topk(scores: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    values = scores.new_empty(scores.shape[0], k)
    return values, torch.empty_like(values, dtype=torch.int64), torch.empty_like(values, dtype=torch.int64)


def _check_count_active(topk_ids: Tensor, num_experts: int) -> None:
    _check_ids(topk_ids)
    if num_experts < 0:
        raise ValueError(f"num_experts must not be negative, but it is {num_experts}")


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, but it is '{value}'")


def _check_shape(name: str, tensor: Tensor, expected: tuple[Any, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be [{meaning}] = {list(expected)}, but it is {list(tensor.shape)}")


def _check_fused_experts(
    hidden: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    gated: str = "concatenated",
    transposed: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
) -> None:
    _check_weighted_picks(topk_weights, topk_ids)
    _check_one_of("activation", activation, reference.ACTIVATIONS)
    _check_one_of("gated", gated, reference.GATED)
    if gated == "none" and (activation == "swiglu_clamped" or limit is not None):
        raise ValueError("swiglu_clamped and limit act on a gate, but gated is 'none': give the layout of gate and up")
    if hidden.dim() != 2 or w_gate_up.dim() != 3 or w_down.dim() != 3:
        raise ValueError(
            f"hidden must be [tokens, features] and the weights [experts, rows, columns], but they are "
            f"{list(hidden.shape)}, {list(w_gate_up.shape)}, {list(w_down.shape)}: flatten the tokens"
        )
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, but it is {hidden.dtype}: cast it")
    parts = {"w_gate_up": w_gate_up, "w_down": w_down, "b_gate_up": b_gate_up, "b_down": b_down}
    for name, part in parts.items():
        if part is not None and part.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, but it is {part.dtype}: cast one")
    num_experts, num_gate_up, num_in = (w_gate_up.mT if transposed else w_gate_up).shape
    num_out = w_down.shape[2 if transposed else 1]
    half = num_gate_up if gated == "none" else num_gate_up // 2
    down = (num_experts, half, num_out) if transposed else (num_experts, num_out, half)
    _check_shape("topk_ids", topk_ids, (hidden.shape[0], topk_ids.shape[1]), "tokens of hidden, picks")
    _check_shape("hidden", hidden, (hidden.shape[0], num_in), "tokens, inputs of w_gate_up")
    _check_shape("w_down", w_down, down, "experts, I, outputs" if transposed else "experts, outputs, I")
    if gated != "none" and num_gate_up % 2:
        raise ValueError(f"w_gate_up must hold as many rows for gate as for up, but it has {num_gate_up}")
    if b_gate_up is not None:
        _check_shape("b_gate_up", b_gate_up, (num_experts, num_gate_up), "experts, G")
    if b_down is not None:
        _check_shape("b_down", b_down, (num_experts, num_out), "experts, outputs")


def _fake_fused_experts(
    hidden: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    gated: str = "concatenated",
    transposed: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], w_down.shape[2 if transposed else 1])


def _check_separate_experts(
    hidden: Tensor,
    w_gate: list[Tensor],
    w_up: list[Tensor],
    w_down: list[Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    b_gate: list[Tensor],
    b_up: list[Tensor],
    b_down: list[Tensor],
    activation: str = "silu",
    gated: str = "concatenated",
    transposed: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
) -> None:
    _check_weighted_picks(topk_weights, topk_ids)
    _check_one_of("activation", activation, reference.ACTIVATIONS)
    _check_one_of("gated", gated, reference.GATED)
    if hidden.dim() != 2 or hidden.shape[0] != topk_ids.shape[0]:
        raise ValueError(f"hidden must be [{topk_ids.shape[0]}, features], but it is {list(hidden.shape)}: flatten its tokens")
    if w_up and gated != "concatenated":
        raise ValueError(f"with w_up, gated must be 'concatenated', but it is '{gated}': w_gate and w_up are the two halves")
    if bool(b_up) != bool(b_gate and w_up):
        raise ValueError("b_up must be given where w_up and b_gate are, and only there")
    num_experts = len(w_down[0]) if w_down and w_down[0].dim() == 3 else len(w_down)
    given = {"w_gate": w_gate, "w_up": w_up, "w_down": w_down, "b_gate": b_gate, "b_up": b_up, "b_down": b_down}
    for name, parts in given.items():
        if parts or name in ("w_gate", "w_down"):
            _check_parts(name, parts, num_experts, 2 if name.startswith("w") else 1, hidden.dtype)


def _check_parts(name: str, parts: list[Tensor], num_experts: int, rank: int, dtype: torch.dtype) -> None:
    """One tensor stacked by expert, or a tensor for each."""
    stacked = len(parts) == 1 and parts[0].dim() == rank + 1 and len(parts[0]) == num_experts
    if not stacked and (len(parts) != num_experts or any(part.shape != parts[0].shape or part.dim() != rank for part in parts)):
        raise ValueError(
            f"{name} must be one tensor stacked by expert or {num_experts} tensors of {rank} dimensions and one shape, but it "
            f"is {[list(part.shape) for part in parts[:3]]}: give each expert's"
        )
    if any(part.dtype != dtype for part in parts):
        raise TypeError(f"{name} must have the dtype of hidden, {dtype}: cast one")


def _fake_separate_experts(hidden: Tensor, w_gate: list[Tensor], w_up: list[Tensor], w_down: list[Tensor], *args: Any) -> Tensor:
    transposed = args[7] if len(args) > 7 else False
    return hidden.new_empty(hidden.shape[0], w_down[0].shape[-1 if transposed else -2])


# Autograd


def _save_for_beam_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    topk_weights, topk_ids, mask_logits, _ = inputs
    ctx.save_for_backward(topk_weights, topk_ids, mask_logits, output[1])


def _beam_mask_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, Tensor | None, None]:
    """Straight-through: the hard mask for the weights, the sigmoid's slope at every pick for the mask logits."""
    topk_weights, topk_ids, mask_logits, new_ids = ctx.saved_tensors
    grad_weights = torch.where(new_ids >= 0, grad, 0)  # [T, K]
    if not ctx.needs_input_grad[2]:
        return grad_weights, None, None, None
    has_row = (topk_ids >= 0) & (topk_ids < mask_logits.shape[1])
    row = torch.where(has_row, topk_ids, 0).long()
    wide = torch.promote_types(mask_logits.dtype, torch.float32)
    probability = mask_logits.gather(1, row).to(wide).sigmoid()
    slope = grad.to(wide) * topk_weights.to(wide) * probability * (1 - probability)  # [T, K]
    grad_logits = torch.zeros_like(mask_logits, dtype=wide).scatter_add(1, row, torch.where(has_row, slope, 0))
    return grad_weights, None, grad_logits.to(mask_logits.dtype), None


def _save_for_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.shape, ctx.num_inputs = inputs[0].shape, len(inputs)


def _topk_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Of the values, to the scores they are; the ids have none, and so mask logits learn by ``beam_mask`` only."""
    (topk_ids,) = ctx.saved_tensors
    grad_scores = grad.new_zeros(ctx.shape).scatter(1, topk_ids, grad)
    return grad_scores, *[None] * (ctx.num_inputs - 1)


def _save_for_fold_masked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def _fold_masked_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
    (topk_ids,) = ctx.saved_tensors
    return torch.where(topk_ids >= 0, grad, 0), None


# Which arguments of fused_experts may need a gradient: hidden, both weights, topk_weights, both biases.
_LEARNED = (0, 1, 2, 3, 5, 6)


def _save_for_fused_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _fused_experts_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By an op of its own: the compiler must not trace a loop over the active experts.

    With ``create_graph=True`` the gradients are to be differentiated, which that op cannot be.
    """
    given = ctx.needs_input_grad  # shorter than the signature where the last arguments were left out
    needs = [position < len(given) and given[position] for position in _LEARNED]
    backward = _differentiable_backward if torch.is_grad_enabled() else torch.ops.moe_fx.fused_experts_backward
    found = iter(backward(grad, *ctx.saved_tensors, *ctx.settings, needs))
    return tuple(next(found) if needed else None for needed in given)


def _fused_experts_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    """Autograd of the reference, run again on the inputs: one expert after another, with a host sync on a GPU."""
    *inputs, needs = args
    inputs = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
    with torch.enable_grad():
        for position in _learned(needs):
            inputs[position].requires_grad_()
        return _reference_gradients(grad, inputs, needs, create_graph=False)


def _differentiable_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    """The same, with a graph from the inputs to their gradients."""
    *inputs, needs = args
    for position in _learned(needs):
        inputs[position] = inputs[position].view_as(inputs[position])  # one tensor may be given for two arguments
    return _reference_gradients(grad, inputs, needs, create_graph=True)


def _learned(needs: list[bool]) -> list[int]:
    return [position for position, needed in zip(_LEARNED, needs, strict=True) if needed]


def _reference_gradients(grad: Tensor, inputs: list[Any], needs: list[bool], create_graph: bool) -> list[Tensor]:
    output = reference.fused_experts(*inputs)
    wanted = [inputs[position] for position in _learned(needs)]
    if not output.requires_grad:  # every pick is off
        return [torch.zeros_like(value) for value in wanted]
    return list(torch.autograd.grad(output, wanted, grad, create_graph=create_graph, materialize_grads=True))


def _fake_fused_experts_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs = args
    return [torch.empty_like(inputs[p]) for p, needed in zip(_LEARNED, needs, strict=True) if needed]


# Registration


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@functools.cache
def _launcher(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"moe_fx.kernels.{name}"), name)


def _triton(name: str) -> Callable[..., Any]:
    """The launcher of ``moe_fx.kernels.<name>``, imported at the first call, on the device of the first tensor."""

    def launch(first: Tensor, *args: Any) -> Any:
        for other in args:
            if isinstance(other, Tensor) and other.device != first.device:
                raise ValueError(f"{name}: a tensor is on {other.device}, another on {first.device}: move it there")
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return _launcher(name)(first, *args)

    return launch


def _after(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return call


def _define(
    library: torch.library.Library,
    name: str,
    schema: str,
    check: Callable[..., None],
    *,
    on_cpu: Callable[..., Any],
    on_cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _after(check, on_cpu), "CPU")
    library.impl(name, _after(check, on_cuda), "CUDA")
    torch.library.register_fake(f"moe_fx::{name}", _after(check, fake), lib=library)


def _define_all() -> None:
    library = torch.library.Library("moe_fx", "FRAGMENT")
    _define(
        library,
        "sere_reroute",
        "(Tensor topk_ids, Tensor similarity, int primary, float threshold, Tensor? valid_tokens=None, "
        "int? max_tokens=None) -> Tensor",
        _check_sere_reroute,
        on_cpu=cpu.sere_reroute,
        on_cuda=_triton("sere_reroute"),
        fake=lambda topk_ids, *_: _like(topk_ids),
    )
    _define(
        library,
        "beam_mask",
        "(Tensor topk_weights, Tensor topk_ids, Tensor mask_logits, float tau) -> (Tensor, Tensor)",
        _check_beam_mask,
        on_cpu=cpu.beam_mask,
        on_cuda=_triton("beam_mask"),
        fake=lambda topk_weights, topk_ids, *_: (_like(topk_weights), _like(topk_ids)),
    )
    torch.library.register_autograd(
        "moe_fx::beam_mask", _beam_mask_backward, setup_context=_save_for_beam_mask, lib=library
    )
    _define(
        library,
        "fold_masked",
        "(Tensor topk_weights, Tensor topk_ids) -> (Tensor, Tensor)",
        _check_weighted_picks,
        on_cpu=cpu.fold_masked,
        on_cuda=_triton("fold_masked"),
        fake=lambda topk_weights, topk_ids: (_like(topk_weights), _like(topk_ids)),
    )
    torch.library.register_autograd(
        "moe_fx::fold_masked", _fold_masked_backward, setup_context=_save_for_fold_masked, lib=library
    )
    _define(
        library,
        "topk_sere",
        "(Tensor scores, int k, Tensor similarity, int primary, float threshold, Tensor? valid_tokens=None, "
        "int? max_tokens=None) -> (Tensor, Tensor, Tensor)",
        _check_topk_sere,
        on_cpu=cpu.topk_sere,
        on_cuda=_triton("topk_sere"),
        fake=_fake_topk,
    )
    _define(
        library,
        "topk_beam",
        "(Tensor scores, int k, Tensor mask_logits, float tau) -> (Tensor, Tensor, Tensor)",
        _check_topk_beam,
        on_cpu=cpu.topk_beam,
        on_cuda=_triton("topk_beam"),
        fake=_fake_topk,
    )
    for name in ("topk_sere", "topk_beam"):
        torch.library.register_autograd(f"moe_fx::{name}", _topk_backward, setup_context=_save_for_topk, lib=library)
    _define(
        library,
        "count_active",
        "(Tensor topk_ids, int num_experts) -> Tensor",
        _check_count_active,
        on_cpu=cpu.count_active,
        on_cuda=reference.count_active,
        fake=lambda topk_ids, num_experts: topk_ids.new_empty((), dtype=torch.int64),
    )
    settings = "str activation{}, str gated{}, bool transposed{}, float alpha{}, float? limit{}"
    tensors = "Tensor hidden, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, Tensor topk_ids, "
    _define(
        library,
        "fused_experts",
        f"({tensors}Tensor? b_gate_up=None, Tensor? b_down=None, "
        + settings.format('="silu"', '="concatenated"', "=False", "=1.702", "=None")
        + ") -> Tensor",
        _check_fused_experts,
        on_cpu=experts_cpu.fused_experts,
        on_cuda=_triton("fused_experts"),
        fake=_fake_fused_experts,
    )
    torch.library.register_autograd(
        "moe_fx::fused_experts", _fused_experts_autograd, setup_context=_save_for_fused_experts, lib=library
    )
    _define(
        library,
        "fused_experts_backward",
        f"(Tensor grad, {tensors}Tensor? b_gate_up, Tensor? b_down, {settings.format(*[''] * 5)}, bool[] needs) -> Tensor[]",
        lambda *_: None,  # its arguments are those of a call that was checked
        on_cpu=_fused_experts_backward,
        on_cuda=_fused_experts_backward,
        fake=_fake_fused_experts_backward,
    )
    _define(  # without a gradient: the passes keep away where one is needed
        library,
        "separate_experts",
        "(Tensor hidden, Tensor[] w_gate, Tensor[] w_up, Tensor[] w_down, Tensor topk_weights, Tensor topk_ids, "
        "Tensor[] b_gate, Tensor[] b_up, Tensor[] b_down, "
        + settings.format('="silu"', '="concatenated"', "=False", "=1.702", "=None")
        + ") -> Tensor",
        _check_separate_experts,
        on_cpu=experts_cpu.separate_experts,
        on_cuda=reference.separate_experts,
        fake=_fake_separate_experts,
    )
    _define_baselines(library)
    _LIBRARIES.append(library)


def _define_baselines(library: torch.library.Library) -> None:
    """The ops of ``moe_fx.kernels.baselines``: one function in plain torch is the kernel on every device."""
    picks, scores = "(Tensor topk_weights, Tensor topk_ids, {}) -> (Tensor, Tensor)", "(Tensor scores, {}) -> Tensor"
    schemas = {
        "smaller_k": picks.format("int k, bool renormalise"),
        "drop": picks.format("int num_experts, int primary, bool renormalise"),
        "top_p": picks.format("float p"),
        "naee_skip": picks.format("float ratio"),
        "exfold": picks.format("Tensor fold_scale, Tensor fold_gain, int primary"),
        "prune": picks.format("Tensor coactivation, int keep, bool renormalise"),
        "only_frequent": scores.format("Tensor coactivation, int keep, float fill"),
        "only_first_picks": scores.format("int primary, float fill"),
    }
    for name, schema in schemas.items():
        function: Callable[..., Any] = getattr(baselines, name)
        on_picks = schema.startswith("(Tensor topk_weights")
        _define(
            library,
            name,
            schema,
            (lambda weights, ids, *_: _check_weighted_picks(weights, ids)) if on_picks else (lambda *_: None),
            on_cpu=function,
            on_cuda=function,
            fake=(lambda weights, ids, *_: (_like(weights), _like(ids))) if on_picks else (lambda scores, *_: _like(scores)),
        )


# The registrations live as long as their Library.  A second import of this module must not define the ops again, nor a
# reload let the Library go: who holds an op would hold freed memory.  The functions, which the dispatcher holds, keep
# the first module's list alive.
if not hasattr(torch.ops.moe_fx, "sere_reroute"):
    _LIBRARIES: list[torch.library.Library] = []
    _define_all()
