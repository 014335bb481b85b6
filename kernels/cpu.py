"""The ops on CPU, written for decode: a few tokens, once per layer and step, where every call of an operator counts.

A NumPy call costs about 0.2 to 1 microsecond, a torch call 1 to 5, and torch's ``argmax`` over short rows is several
times slower than NumPy's.  So the tensors are worked on as NumPy views of the same memory: ``sere_reroute`` then takes
11 microseconds, not 55, for 16 tokens, and a fifth of the reference's time for 8192 tokens too.  Where torch has no
NumPy the reference does the work.

The shapes and the meaning are those of ``moe_fx.kernels.reference``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_fx.kernels import reference

np: Any
try:
    import numpy as np

    torch.from_numpy(np.empty(0))  # raises where torch was built for another NumPy
except (ImportError, RuntimeError):
    np = None


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _slots(ids: Any, num_slots: int) -> tuple[Any, bool]:
    """Ids as row numbers of a table with ``num_slots + 1`` rows, where all ids outside [0, num_slots) share the last.

    Also says whether there are such ids. ``ids`` must not be empty.
    """
    if np.minimum.reduce(ids, axis=None) >= 0 and np.maximum.reduce(ids, axis=None) < num_slots:
        return ids.astype(np.intp, copy=False), False
    return np.where((ids >= 0) & (ids < num_slots), ids, num_slots).astype(np.intp, copy=False), True


def _votes(primary_slots: Any, valid_tokens: Tensor | None) -> Any:
    """The first picks of the rows that are tokens and not padding."""
    if valid_tokens is None:
        return primary_slots
    if valid_tokens.dtype == torch.bool:
        return primary_slots[valid_tokens.numpy()]
    return primary_slots[: max(int(valid_tokens), 0)]


def _most_similar(similarity: Any, movers: Any, primary_ids: Any, threshold: float) -> Any:
    """For each expert in ``movers`` the primary expert its picks go to, or itself where none is similar enough."""
    scores = similarity.take(movers, 0).take(primary_ids, 1)  # [movers, P]
    highest = np.maximum.reduce(scores, axis=None)
    if highest != highest:  # NumPy takes NaN for the maximum
        scores[np.isnan(scores)] = -math.inf
    target = primary_ids[scores.argmax(1)]
    if threshold > 0:
        np.copyto(target, movers, where=np.maximum.reduce(scores, axis=1) < np.float32(threshold))
    return target


def sere_reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """See ``reference.sere_reroute``.  Only experts that are picked, and are not primary, are looked up."""
    num_tokens, top_k = topk_ids.shape
    if primary >= top_k or num_tokens == 0 or (max_tokens is not None and num_tokens > max_tokens):
        return _contiguous_copy(topk_ids)
    if np is None:
        return reference.sere_reroute(topk_ids, similarity, primary, threshold, valid_tokens)

    num_experts = similarity.shape[0]
    ids = topk_ids.numpy()  # [T, K]
    slots, has_others = _slots(ids, num_experts)  # [T, K]
    is_primary = np.zeros(num_experts + 1, dtype=bool)
    is_primary[_votes(slots[:, :primary], valid_tokens)] = True
    primary_ids = is_primary[:-1].nonzero()[0]
    moves = np.zeros(num_experts + 1, dtype=bool)
    moves[slots[:, primary:]] = True
    moves[primary_ids] = False
    movers = moves[:-1].nonzero()[0]
    if not (len(primary_ids) and len(movers)):
        return _contiguous_copy(topk_ids)

    target = np.arange(num_experts + 1, dtype=ids.dtype)
    target[movers] = _most_similar(similarity.detach().float().numpy(), movers, primary_ids, threshold)
    new_ids = target[slots]
    if has_others:
        new_ids = np.where(slots == num_experts, ids, new_ids)
    if valid_tokens is not None:
        new_ids[:, :primary] = ids[:, :primary]  # without padding these are primary, and their own targets
    return torch.from_numpy(new_ids).contiguous()


def beam_mask(topk_weights: Tensor, topk_ids: Tensor, mask_logits: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """See ``reference.beam_mask``."""
    num_tokens, num_masked = mask_logits.shape
    if np is None or topk_ids.numel() == 0:
        weights, new_ids = reference.beam_mask(topk_weights, topk_ids, mask_logits, tau)
        return weights.contiguous(), new_ids.contiguous()
    ids = topk_ids.numpy()  # [T, K]
    slots, has_others = _slots(ids, num_masked)
    rows = np.arange(0, num_tokens * num_masked, num_masked)[:, None]  # [T, 1]
    logits = mask_logits.detach().float().contiguous().numpy()
    on = logits.take(slots + rows, mode="clip") >= np.float32(math.log(tau / (1 - tau)))  # [T, K]
    if has_others:
        on = np.where(slots == num_masked, ids >= 0, on)
    new_ids = np.where(on, ids, ids.dtype.type(-1))
    return _switch_off(topk_weights, on), torch.from_numpy(new_ids).contiguous()


def topk_sere(
    scores: Tensor,
    k: int,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.topk_sere``."""
    values, ids = reference.top_k(scores, k)
    return values, ids, sere_reroute(ids, similarity, primary, threshold, valid_tokens, max_tokens)


def topk_beam(scores: Tensor, k: int, mask_logits: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.topk_beam``."""
    values, ids = reference.top_k(scores, k)
    return values, ids, beam_mask(values, ids, mask_logits, tau)[1]


def fold_masked(topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.fold_masked``."""
    if np is None:
        weights, new_ids = reference.fold_masked(topk_weights, topk_ids)
        return weights.contiguous(), new_ids.contiguous()
    ids = topk_ids.numpy()  # [T, K]
    if ids.size == 0 or np.minimum.reduce(ids, axis=None) >= 0:
        return _contiguous_copy(topk_weights), _contiguous_copy(topk_ids)
    on = ids >= 0
    stand_in = ids[np.arange(len(ids)), on.argmax(1)]  # [T], negative where a token has no pick that is on
    if np.minimum.reduce(stand_in) < 0:
        # Read as unsigned, a negative id is above all others.
        lowest = np.minimum.reduce(ids.view(f"u{ids.itemsize}"), axis=None).astype(ids.dtype)
        stand_in[stand_in < 0] = max(lowest, 0)
    new_ids = np.where(on, ids, stand_in[:, None])
    return _switch_off(topk_weights, on), torch.from_numpy(new_ids).contiguous()


def _switch_off(topk_weights: Tensor, on: Any) -> Tensor:
    """The weights where ``on``, and 0 elsewhere, contiguous.  By torch: NumPy does not know bfloat16."""
    return torch.where(torch.from_numpy(on), topk_weights, 0).contiguous()


def count_active(topk_ids: Tensor, num_experts: int) -> Tensor:
    """See ``reference.count_active``."""
    if np is None or topk_ids.numel() == 0:
        return reference.count_active(topk_ids, num_experts)
    active = np.zeros(num_experts + 1, dtype=bool)
    active[_slots(topk_ids.numpy(), num_experts)[0]] = True
    return torch.tensor(np.count_nonzero(active[:-1]))
