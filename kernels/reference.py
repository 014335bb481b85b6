"""The specification: every op of moe_fx in plain torch, written to be read first and compared against.

Shapes: T tokens, K picks per token, E experts. ``topk_ids [T, K]`` (int32 or int64) and ``topk_weights [T, K]`` are a
routing decision in descending score order; id -1 is a pick that is off. Every function works on CPU and CUDA tensors,
for T = 0 and for non-contiguous inputs, and returns new contiguous tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def real_tokens(valid_tokens: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
    """Which rows are tokens and not padding, bool [T], from any form of ``valid_tokens``.

    ``valid_tokens`` is None (every row is a token), a bool tensor [T] (True is a token), or an integer tensor with one
    element n (the first n rows are tokens).
    """
    if valid_tokens is None:
        return torch.ones(num_tokens, dtype=torch.bool, device=device)
    if valid_tokens.dtype == torch.bool:
        return valid_tokens
    return torch.arange(num_tokens, device=device) < valid_tokens.reshape(())


def sere_reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """SERE (arXiv 2602.07616): keep the experts of all first S picks, move other picks to the most similar of those.

        P = union over real tokens t of topk_ids[t, :S]
        topk_ids[t, k >= S] = u, u not in P  ->  v = argmax over p in P of similarity[u, p]
                                                 if threshold <= 0 or similarity[u, v] >= threshold, else u

    Ties go to the lowest expert id; comparisons are in float32; a NaN similarity counts as -inf. Ids outside [0, E) are
    not experts: they neither vote nor move. Padding rows do not vote, but their picks move like all others. The result
    is ``topk_ids`` itself when S >= K, when P is empty, and when T > ``max_tokens``.

    Args:
        topk_ids: [T, K], int32 or int64.
        similarity: [E, E], floating point: ``similarity[u, p]`` says how well p stands in for u.
        primary: S >= 1.
        threshold: the least similarity at which a pick moves; at 0 or below every pick may move.
        valid_tokens: see ``real_tokens``.
        max_tokens: the largest T that is rerouted.

    Returns:
        [T, K] in the dtype of ``topk_ids``.
    """
    new_ids = topk_ids.clone(memory_format=torch.contiguous_format)
    num_tokens, num_experts = topk_ids.shape[0], similarity.shape[0]
    if max_tokens is not None and num_tokens > max_tokens:
        return new_ids

    is_expert = (topk_ids >= 0) & (topk_ids < num_experts)  # [T, K]
    votes = is_expert & real_tokens(valid_tokens, num_tokens, topk_ids.device)[:, None]  # [T, K]
    primary_ids = topk_ids[:, :primary][votes[:, :primary]].long().unique()  # [P], ascending
    if primary_ids.numel() == 0:
        return new_ids

    scores = similarity.float()[:, primary_ids]  # [E, P]
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    column = scores.argmax(dim=1, keepdim=True)  # [E, 1], the first of equals
    target = primary_ids[column[:, 0]]  # [E], where each expert's picks go
    experts = torch.arange(num_experts, device=topk_ids.device)
    if threshold > 0:
        target = torch.where(scores.gather(1, column)[:, 0] >= threshold, target, experts)
    target[primary_ids] = primary_ids

    moves = is_expert.clone()
    moves[:, :primary] = False
    new_ids[moves] = target[topk_ids[moves].long()].to(topk_ids.dtype)
    return new_ids


def beam_mask(topk_weights: Tensor, topk_ids: Tensor, mask_logits: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """BEAM (arXiv 2605.14438): switch off the picks whose mask probability is below tau.

        pick e of token t stays on  iff  e >= 0 and (e >= E_m or sigmoid(mask_logits[t, e]) >= tau)

    compared as ``mask_logits >= logit(tau)`` in float32. A NaN logit is off; ids for which the mask router has no row
    (e >= E_m: identity or zero experts) stay on. An off pick has id -1 and weight 0; weights are not renormalised.

    The gradient is straight-through: the weights' is that of a multiplication by the hard mask; a mask logit's is, for
    every pick of it that is not already off, ``grad * topk_weight * sigmoid'(mask_logit)``, kept or not.

    Args:
        topk_weights: [T, K], floating point.
        topk_ids: [T, K], int32 or int64.
        mask_logits: [T, E_m], floating point.
        tau: in (0, 1).

    Returns:
        Weights and ids, [T, K] each, in their dtypes.
    """
    num_masked = mask_logits.shape[1]
    has_row = (topk_ids >= 0) & (topk_ids < num_masked)
    padded = torch.nn.functional.pad(mask_logits.float(), (0, 1))  # one more column, for the ids without a row
    logits = padded.gather(1, torch.where(has_row, topk_ids, num_masked).long())  # [T, K]
    on = torch.where(has_row, logits >= math.log(tau / (1 - tau)), topk_ids >= 0)
    return torch.where(on, topk_weights, 0), torch.where(on, topk_ids, -1)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their experts, [T, K] each, in descending order.

    As ``torch.topk``, NaN is above all numbers; unlike it, the lower expert id comes first where scores are equal.
    """
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), ids[:, :k].contiguous()


def topk_sere(
    scores: Tensor,
    k: int,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``top_k`` and ``sere_reroute`` of its ids: what a router does between its scores and its experts.

    Args:
        scores: [T, E], floating point.
        k: K, at most E.

    Returns:
        The K largest scores, their experts (int64), and these experts after SERE, [T, K] each.
    """
    values, ids = top_k(scores, k)
    return values, ids, sere_reroute(ids, similarity, primary, threshold, valid_tokens, max_tokens)


def topk_beam(scores: Tensor, k: int, mask_logits: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """``top_k`` and ``beam_mask`` of its ids.

    Args:
        scores: [T, E], floating point.
        k: K, at most E.
        mask_logits: [T, E_m], floating point.

    Returns:
        The K largest scores, their experts (int64), and the same with -1 for what is off, [T, K] each.  The scores of
        picks that are off are not 0: weights are often made from those of all K picks, and only then masked.
    """
    values, ids = top_k(scores, k)
    return values, ids, beam_mask(values, ids, mask_logits, tau)[1]


def fold_masked(topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Point every off pick (id < 0) at an expert that is read anyway, with weight 0, for kernels that do not know -1.

    That expert is the first pick of the same token that is on; where a token has none, the lowest expert id that is on
    anywhere in the batch; where the batch has none, expert 0.

    Args:
        topk_weights: [T, K], floating point. The gradient is passed where the pick is on, and is 0 where it is off.
        topk_ids: [T, K], int32 or int64.

    Returns:
        Weights and ids, [T, K] each, in their dtypes; no id is negative.
    """
    on = topk_ids >= 0  # [T, K]
    lowest = topk_ids[on].min() if on.any() else torch.zeros((), dtype=topk_ids.dtype, device=topk_ids.device)
    first_on = topk_ids.gather(1, on.int().argmax(dim=1, keepdim=True))  # [T, 1]
    stand_in = torch.where(on.any(dim=1, keepdim=True), first_on, lowest)  # [T, 1]
    return torch.where(on, topk_weights, 0), torch.where(on, topk_ids, stand_in)


def count_active(topk_ids: Tensor, num_experts: int) -> Tensor:
    """How many of the experts 0 .. E-1 are picked at all: what a decode step must read. An int64 scalar tensor.

    Args:
        topk_ids: any shape, int32 or int64; ids outside [0, E) do not count.
        num_experts: E.
    """
    is_expert = (topk_ids >= 0) & (topk_ids < num_experts)
    slot = torch.where(is_expert, topk_ids, num_experts).flatten().long()  # all that are no experts share the last slot
    return slot.new_zeros(num_experts + 1).index_fill(0, slot, 1)[:num_experts].sum()


def frobenius_similarity(distances: Tensor) -> Tensor:
    """SERE's similarity from Frobenius distances between experts' outputs: ``1 - d / d_max``, with diagonal 1.

    Args:
        distances: [E, E], floating point, not negative. Where all are 0, every expert is every other's equal: all ones.

    Returns:
        [E, E] in [0, 1], float32.
    """
    largest = distances.max()
    similarity = 1 - distances / torch.where(largest > 0, largest, 1)
    return similarity.fill_diagonal_(1).float()


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")
GATED = ("concatenated", "interleaved", "none")


def _activate(x: Tensor, activation: str) -> Tensor:
    functional = torch.nn.functional
    if activation == "silu":
        return functional.silu(x)
    if activation.startswith("gelu"):
        return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x.relu().square() if activation == "relu2" else x.relu()


def activate_gate_up(
    gate_up: Tensor, activation: str = "silu", gated: str = "concatenated", alpha: float = 1.702, limit: float | None = None
) -> Tensor:
    """What stands between the two projections of an expert: [R, G] -> [R, I], in one dtype.  See ``fused_experts``."""
    if gated == "none":
        return _activate(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1) if gated == "concatenated" else (gate_up[..., ::2], gate_up[..., 1::2])
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_clamped":
        return (up + 1) * (gate * (gate * alpha).sigmoid())
    return _activate(gate, activation) * up


def fused_experts(
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
    """All experts of a layer: for each token the weighted sum of its picks' outputs.

        out[t] = sum over k with 0 <= topk_ids[t, k] < E of topk_weights[t, k] * expert(topk_ids[t, k])(hidden[t])
        expert(e)(x) = act(x @ w_gate_up[e] + b_gate_up[e]) @ w_down[e] + b_down[e]

    A pick whose id is outside [0, E) is off: it adds nothing, even if its weight is NaN.  Two picks of one token on one
    expert are one pick with the sum of their weights.  An expert that nobody picked is not read.

    Each projection, the activation and the experts' outputs are rounded to the dtype of ``hidden``, as models round
    them; the weighted sum is accumulated in float32 (float64 for float64) and rounded once.  An implementation may round
    less often, but the activation's result is always in the dtype of ``hidden``.

    Args:
        hidden: [T, H], floating point.
        w_gate_up: [E, G, H], or [E, H, G] where ``transposed``; dtype of ``hidden``, as are all that follow but the picks.
            G is 2 I with a gate and I without.
        w_down: [E, H_out, I], or [E, I, H_out] where ``transposed``.
        topk_weights: [T, K], floating point.
        topk_ids: [T, K], int32 or int64.
        b_gate_up: [E, G].
        b_down: [E, H_out].
        activation: ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``relu2`` (ReLU squared), each act(gate) * up where
            there is a gate; or ``swiglu_clamped``, (up + 1) * gate * sigmoid(alpha * gate), which needs one.
        gated: ``concatenated`` (first half gate, second half up), ``interleaved`` (even columns gate, odd up) or ``none``.
        transposed: the layout of the weights.
        alpha: for ``swiglu_clamped`` only.
        limit: before the activation the gate is clamped to at most this, and up to [-limit, limit].

    Returns:
        [T, H_out] in the dtype of ``hidden``.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    num_out = w_down.shape[2 if transposed else 1]
    out = torch.zeros(hidden.shape[0], num_out, dtype=wide, device=hidden.device)
    gate_ups, downs = ((w.mT if transposed else w).unbind(0) for w in (w_gate_up, w_down))
    is_expert = (topk_ids >= 0) & (topk_ids < len(downs))  # [T, K]
    for e in topk_ids[is_expert].unique().tolist():
        picks = topk_ids == e  # [T, K]
        tokens = picks.any(dim=1).nonzero()[:, 0]
        weights = torch.where(picks, topk_weights.to(wide), 0).sum(dim=1)[tokens]
        gate_up = torch.nn.functional.linear(hidden[tokens], gate_ups[e], None if b_gate_up is None else b_gate_up[e])
        intermediate = activate_gate_up(gate_up, activation, gated, alpha, limit)
        output = torch.nn.functional.linear(intermediate, downs[e], None if b_down is None else b_down[e])
        out = out.index_add(0, tokens, output.to(wide) * weights[:, None])
    return out.to(hidden.dtype)


def separate_experts(
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
) -> Tensor:
    """``fused_experts`` where weights are kept apart: by expert, as modules of their own, or gate from up, or both.

    Every list holds either one tensor stacked by expert, as ``fused_experts`` takes it, or a tensor for each expert.

    Args:
        hidden: [T, H], floating point.
        w_gate: what gives the gate, [I, H] or stacked [E, I, H] ([H, I] where ``transposed``); with an empty ``w_up`` what
            gives both, in the layout ``gated``, or, where that is ``none``, all there is.
        w_up: as ``w_gate``, or empty.
        w_down: [H_out, I], or stacked.
        topk_weights: [T, K], floating point.
        topk_ids: [T, K], int32 or int64.
        b_gate, b_up, b_down: [I] and [H_out], or stacked; empty where there is none.  ``b_up`` goes with ``b_gate``.
        activation, gated, transposed, alpha, limit: as for ``fused_experts``; with ``w_up``, ``gated`` is ``concatenated``.

    Returns:
        [T, H_out] in the dtype of ``hidden``.
    """
    w_gate_up, b_gate_up = _together(w_gate, 3), _together(b_gate, 2) if b_gate else None
    if w_up:
        w_gate_up = torch.cat((w_gate_up, _together(w_up, 3)), dim=2 if transposed else 1)
    if w_up and b_gate_up is not None:
        b_gate_up = torch.cat((b_gate_up, _together(b_up, 2)), dim=1)
    biases = b_gate_up, _together(b_down, 2) if b_down else None
    return fused_experts(
        hidden, w_gate_up, _together(w_down, 3), topk_weights, topk_ids, *biases, activation, gated, transposed, alpha, limit
    )


def _together(parts: list[Tensor], rank: int) -> Tensor:
    return parts[0] if parts[0].dim() == rank else torch.stack(parts)
