"""What runs inside vLLM's compiled graphs: a layer's policies, looked up by the layer's name at every call.

Nothing of a policy is baked into a compiled graph.  In the *open* form routing stands in the graph, and
``moe_fx::route_layer`` is put on its cut; in the *opaque* form it is inside ``vllm::moe_forward``, and
``moe_fx::moe_forward`` runs the same layer with its router's result rerouted.  Both end in ``route``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner import moe_runner

import moe_fx.ops  # noqa: F401  (defines the ops that are called here)
from moe_fx.policy import BEAM, SERE, Policy
from moe_fx.vllm.padding import valid_tokens

#: The attribute of a layer (a ``MoERunner``) that holds its ``LayerPolicy``.
ATTRIBUTE = "moe_fx_policy"

MoEForward = Callable[..., Any]


@dataclass(eq=False)
class LayerPolicy:
    """What is done to the routing of one layer.

    Attributes:
        layer: the engine's name of the layer.
        policies: in the order in which they apply.
        tensors: the artifact tensor of each policy, float32, on the layer's device; None for a policy that reads none.
        num_experts: E.
        sere: S and the threshold of SERE at this layer.
        totals: [4] int64: forwards, distinct experts before and after, picks switched off; None where nothing is counted.
        ran: whether the policies were applied at least once.
    """

    layer: str
    policies: tuple[Policy, ...]
    tensors: tuple[Tensor | None, ...]
    num_experts: int
    sere: tuple[int, float] = (1, 0.0)
    totals: Tensor | None = None
    ran: bool = False


def route(
    layer: LayerPolicy, topk_weights: Tensor | None, topk_ids: Tensor, hidden: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Apply a layer's policies to a routing decision whose best picks come first.

    Off picks are folded: no kernel of vLLM is known to take id -1 in all its forms, and its CPU kernel corrupts memory.

    Args:
        topk_weights: [T, K]; may be None where no policy switches picks off.
        topk_ids: [T, K], logical expert ids.
        hidden: [T, H], the router's input; may be None where no policy reads it.

    Returns:
        Weights and ids; the ids are a new tensor.
    """
    layer.ran = True
    ids = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.to(torch.int32)
    valid = valid_tokens(ids.shape[0], ids.device)
    before, may_be_off = ids, False
    for policy, tensor in zip(layer.policies, layer.tensors, strict=True):
        if isinstance(policy, SERE):
            ids = torch.ops.moe_fx.sere_reroute(ids, tensor, *layer.sere, valid, policy.max_tokens)
        elif isinstance(policy, BEAM):
            assert hidden is not None
            assert tensor is not None
            logits = hidden[:, : tensor.shape[1]].float() @ tensor.T  # the engine may have padded the width
            topk_weights, ids = torch.ops.moe_fx.beam_mask(topk_weights, ids, logits, policy.tau)
            may_be_off = True
    if layer.totals is not None:
        _count(layer.totals, before, ids, valid, layer.num_experts)
    if may_be_off:
        topk_weights, ids = torch.ops.moe_fx.fold_masked(topk_weights, ids)
    ids = ids.to(topk_ids.dtype)
    return topk_weights, ids.clone() if ids is topk_ids else ids


def _count(totals: Tensor, before: Tensor, after: Tensor, valid: Tensor | None, num_experts: int) -> None:
    """Add a forward's distinct experts and off picks.  Padding does not count, nor a forward of nothing else."""
    steps = torch.ones((), dtype=torch.int64, device=totals.device)
    if valid is not None:
        is_real = valid if valid.dtype == torch.bool else torch.arange(len(before), device=before.device) < valid
        steps = is_real.any().long()
        before, after = (torch.where(is_real[:, None], ids, num_experts) for ids in (before, after))
    active = [torch.ops.moe_fx.count_active(ids, num_experts) for ids in (before, after)]
    totals.add_(torch.stack([steps, *active, (after < 0).sum()]))


# ---------------------------------------------------------------------------------------------------- open form


def _policy_of(name: str) -> LayerPolicy:
    return getattr(get_forward_context().no_compile_layers[name], ATTRIBUTE)


def route_layer(topk_weights: Tensor, topk_ids: Tensor, hidden: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """``route`` for the layer of that name: new weights and ids, [T, K] each."""
    weights, ids = route(_policy_of(layer), topk_weights, topk_ids, hidden)
    return topk_weights.clone() if weights is None or weights is topk_weights else weights, ids


def route_layer_ids(topk_ids: Tensor, layer: str) -> Tensor:
    """``route`` where no policy reads weights or hidden states: new ids [T, K]."""
    return route(_policy_of(layer), None, topk_ids, None)[1]


def experts_without_off_picks(
    output: Tensor, input: Tensor, w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None,
    topk_weights: Tensor, topk_id: Tensor, skip_weighted: bool, act: str, isa: str,
) -> None:  # fmt: skip
    """vLLM's CPU kernel, which computes a pick of weight 0 like any other, for the picks of another weight alone.

    Where that leaves at least a quarter out, each of the others is given to the kernel as a token of its own, and a token's
    results are summed in float32: the same up to rounding.
    """
    rest = w13, w2, w13_bias, w2_bias
    token, pick = topk_weights.nonzero(as_tuple=True)
    if skip_weighted or 4 * len(token) > 3 * topk_weights.numel():
        torch.ops._C.cpu_fused_moe(output, input, *rest, topk_weights, topk_id, skip_weighted, act, isa)
        return
    by_pick = output.new_empty(len(token), output.shape[1])
    picks = topk_weights[token, pick, None], topk_id[token, pick, None]
    if len(token):
        torch.ops._C.cpu_fused_moe(by_pick, input[token], *rest, *picks, skip_weighted, act, isa)
    output.copy_(torch.zeros_like(output, dtype=torch.float32).index_add_(0, token, by_pick.float()))


# -------------------------------------------------------------------------------------------------- opaque form


class _Active(threading.local):
    """The layer whose call through our op is running: two micro-batches run in two threads."""

    layer: Any = None


_active = _Active()


def arm(layer: Any) -> None:
    """Have the layer's router reroute its logical ids, from which vLLM's expert placement then maps, while our op runs it."""
    router = layer.router
    if "_compute_routing" in vars(router):
        return
    compute = router._compute_routing

    @functools.wraps(compute)
    def compute_routing(hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if _active.layer is not layer:
            return compute(hidden_states, router_logits, *args, **kwargs)
        policy = getattr(layer, ATTRIBUTE)
        in_order = any(p.needs_order for p in policy.policies)
        with SortedTopK() if in_order and is_custom(router) else contextlib.nullcontext():
            weights, ids = compute(hidden_states, router_logits, *args, **kwargs)
        if in_order:
            weights, ids = best_first(router, router_logits, weights, ids)
        return route(policy, weights, ids, hidden_states)  # type: ignore[return-value]

    router._compute_routing = compute_routing


class SortedTopK(TorchFunctionMode):
    """Has every ``topk`` return the largest first, which changes nothing but the order of picks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, Tensor.topk):
            return func(*args[:4], **{**(kwargs or {}), "sorted": True})  # the fifth argument is ``sorted``
        return func(*args, **(kwargs or {}))


def is_custom(router: Any) -> bool:
    """Whether a function of the model's own selects."""
    return getattr(router, "custom_routing_function", None) is not None


def best_first(router: Any, router_logits: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The picks in descending order of the score by which the router selected them.

    A custom routing function's score is not known: its picks stay in the order in which it returns them (``SortedTopK``).
    """
    if is_custom(router) or type(router).__name__ == "FusedTopKRouter":
        return topk_weights, topk_ids  # the fused kernel picks one after the other
    num_experts = router_logits.shape[1]
    is_expert = (topk_ids >= 0) & (topk_ids < num_experts)
    index = torch.where(is_expert, topk_ids, 0).long()
    score = router_logits.gather(1, index).float()
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None:
        score = _SCORING[router.scoring_func](router_logits.float()).gather(1, index) + bias.float()[index]
    order = score.masked_fill(~is_expert, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return topk_weights.gather(1, order), topk_ids.gather(1, order)


_SCORING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def _rerouting() -> MoEForward:
    """vLLM's op body, run with the layer's router rerouted.  What comes before the layer's name is the layer's input."""

    def moe_forward(*args: Any) -> Any:
        position = next(i for i, a in enumerate(args) if isinstance(a, (str, moe_runner.LayerName)))
        layer = moe_runner.get_layer_from_name(moe_runner._resolve_layer_name(args[position]))
        _active.layer = layer
        try:
            return layer._forward_impl(*args[:position])
        finally:
            _active.layer = None

    return moe_forward


def with_policy(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Our op for one of vLLM's MoE ops; None for any other op."""
    return _OURS.get(op)


_OURS: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
#: Our op for an experts kernel of vLLM's that computes off picks.
SPARSE: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
_LIBRARY = torch.library.Library("moe_fx", "FRAGMENT")


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any], tags: tuple[torch.Tag, ...]) -> None:
    _LIBRARY.define(name + schema, tags=tags)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"moe_fx::{name}", fake, lib=_LIBRARY)


def _define_opaque(name: str, forward: MoEForward, fake: MoEForward) -> None:
    """An op of ours with the very schema and tags of vLLM's op of that name: what they ask of strides differs by version."""
    theirs = getattr(torch.ops.vllm, name).default
    written = [a.name for a in theirs._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    schema = torch.library.infer_schema(forward, mutates_args=written)
    _define(name, schema, _rerouting(), fake, tuple(theirs.tags))
    _OURS[theirs] = getattr(torch.ops.moe_fx, name).default


def _define_sparse_experts() -> None:
    """An op of ours with the very schema of vLLM's experts kernel for CPUs, where this vLLM has that kernel and that schema."""
    theirs = getattr(torch.ops._C, "cpu_fused_moe", None)
    if theirs is None:
        return
    arguments = theirs.default._schema.arguments
    names = tuple(inspect.signature(experts_without_off_picks).parameters)
    if tuple(a.name for a in arguments) != names:
        return
    schema = str(theirs.default._schema).removeprefix("_C::cpu_fused_moe")
    _define("cpu_fused_moe", schema, experts_without_off_picks, lambda *_: None, (torch.Tag.needs_fixed_stride_order,))
    SPARSE[theirs.default] = torch.ops.moe_fx.cpu_fused_moe.default


if not hasattr(torch.ops.moe_fx, "route_layer"):
    _PT2 = (torch.Tag.pt2_compliant_tag,)
    _define(
        "route_layer", "(Tensor topk_weights, Tensor topk_ids, Tensor hidden, str layer) -> (Tensor, Tensor)", route_layer,
        lambda weights, ids, hidden, layer: (torch.empty_like(weights), torch.empty_like(ids)), _PT2,
    )  # fmt: skip
    _define("route_layer_ids", "(Tensor topk_ids, str layer) -> Tensor", route_layer_ids,
            lambda ids, layer: torch.empty_like(ids), _PT2)  # fmt: skip
    _define_opaque("moe_forward", moe_runner._moe_forward, moe_runner._moe_forward_fake)
    _define_opaque("moe_forward_shared", moe_runner._moe_forward_shared, moe_runner._moe_forward_shared_fake)
    _define_sparse_experts()
