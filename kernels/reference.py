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
