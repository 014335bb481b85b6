"""SERE's rerouting on a GPU: one launch for a decode step, two (and a memset) for a large batch, no host sync.

In a decode step the first picks of the whole batch are a few hundred ids, so every program reads them all and builds
the set of primary experts by itself: a second launch would cost more than that.  For more first picks than
``MAX_VOTES_PER_PROGRAM`` a kernel of its own marks the primary experts in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_VOTES_PER_PROGRAM = 1024  # first picks that every program reads; at S = 2 this is a batch of 512
MAX_EXPERTS_PER_PROGRAM = 1024  # experts whose votes a program can count in registers


@dataclass(frozen=True)
class Config:
    """Tile sizes: picks per program, similarity row length (a power of two >= E), votes read at a time."""

    BLOCK_P: int
    BLOCK_E: int
    BLOCK_V: int
    num_warps: int
    one_launch: bool


def choose_config(num_tokens: int, num_experts: int, primary: int) -> Config:
    """Tiles for a shape: 2048 similarities or 4096 votes to compare at a time, so that no register spills."""
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_p = max(2, min(16, 2048 // block_e))
    block_v = max(4, min(64, 4096 // block_e))
    one_launch = num_tokens * primary <= MAX_VOTES_PER_PROGRAM and block_e <= MAX_EXPERTS_PER_PROGRAM
    return Config(block_p, block_e, block_v, num_warps=4, one_launch=one_launch)


@triton.jit
def _votes(
    topk_ids_ptr, valid_ptr, vote, num_votes, num_experts, K: tl.constexpr, S: tl.constexpr, VALID: tl.constexpr
):
    """The first picks number ``vote`` of the batch, -1 where it is none, no expert, or padding."""
    token = vote // S
    is_vote = vote < num_votes
    if VALID == "mask":
        is_vote = is_vote & (tl.load(valid_ptr + token, mask=is_vote, other=0) != 0)
    if VALID == "count":
        is_vote = is_vote & (token < tl.load(valid_ptr))
    ids = tl.load(topk_ids_ptr + token.to(tl.int64) * K + vote % S, mask=is_vote, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_votes"])
def _mark_primary_kernel(
    topk_ids_ptr,  # [T, K]
    valid_ptr,  # None, [T] or [1]
    is_primary_ptr,  # int32 [E], zeroed
    num_votes,
    num_experts,
    K: tl.constexpr,
    S: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    vote = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    ids = _votes(topk_ids_ptr, valid_ptr, vote, num_votes, num_experts, K, S, VALID)  # [BLOCK_V]
    tl.store(is_primary_ptr + ids, tl.full([BLOCK_V], 1, tl.int32), mask=ids >= 0)  # all writers write the same


@triton.jit
def move_picks(
    ids,  # [P]
    is_secondary,  # bool [P]
    is_primary,  # bool [BLOCK_E]
    similarity_ptr,  # [E, E]
    num_experts,
    threshold,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Where each pick goes [P], once the primary experts are known."""
    expert = tl.arange(0, BLOCK_E)
    lowest_primary = tl.min(tl.where(is_primary, expert, BLOCK_E), axis=0)  # BLOCK_E: there is none
    may_move = is_secondary & (ids >= 0) & (ids < num_experts)
    row = tl.where(may_move, ids, 0).to(tl.int64)
    # [P, BLOCK_E]
    similarity = tl.load(
        similarity_ptr + row[:, None] * num_experts + expert[None, :],
        mask=may_move[:, None] & is_primary[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    similarity = tl.where(similarity == similarity, similarity, float("-inf"))  # NaN counts as -inf
    best = tl.max(similarity, axis=1)  # [P]
    target = tl.min(tl.where(similarity == best[:, None], expert[None, :], BLOCK_E), axis=1)  # the lowest of equals
    target = tl.where(best == float("-inf"), lowest_primary, target)  # all equal, also to those that are not primary
    stays = tl.max(((expert[None, :] == row[:, None]) & is_primary[None, :]).to(tl.int32), axis=1)  # [P]
    may_move = may_move & (stays == 0) & (target < num_experts)
    if HAS_THRESHOLD:
        may_move = may_move & (best >= threshold)
    return tl.where(may_move, target.to(ids.dtype), ids)


@triton.jit(do_not_specialize=["num_picks", "num_votes", "threshold"])
def _sere_reroute_kernel(
    topk_ids_ptr,  # [T, K]
    similarity_ptr,  # [E, E]
    valid_ptr,  # None, [T] or [1]
    is_primary_ptr,  # int32 [E], or None where every program finds the primary experts by itself
    new_ids_ptr,  # [T, K]
    num_picks,
    num_votes,
    num_experts,
    threshold,
    K: tl.constexpr,
    S: tl.constexpr,
    VALID: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    if ONE_LAUNCH:
        hits = tl.zeros([BLOCK_E, BLOCK_V], tl.int32)
        for start in range(0, num_votes, BLOCK_V):
            vote = start + tl.arange(0, BLOCK_V)
            voted = _votes(topk_ids_ptr, valid_ptr, vote, num_votes, num_experts, K, S, VALID)  # [BLOCK_V]
            hits = tl.maximum(hits, (expert[:, None] == voted[None, :]).to(tl.int32))
        is_primary = tl.max(hits, axis=1) > 0  # [BLOCK_E]
    else:
        is_primary = tl.load(is_primary_ptr + expert, mask=expert < num_experts, other=0) > 0  # [BLOCK_E]

    pick = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ids = tl.load(topk_ids_ptr + pick, mask=pick < num_picks, other=-1)  # [BLOCK_P]
    new_ids = move_picks(
        ids, pick % K >= S, is_primary, similarity_ptr, num_experts, threshold, HAS_THRESHOLD, BLOCK_E
    )
    tl.store(new_ids_ptr + pick, new_ids, mask=pick < num_picks)


def sere_reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """See ``reference.sere_reroute``.  Whether a batch is rerouted is decided from its shape alone, on the host."""
    num_tokens, top_k = topk_ids.shape
    if primary >= top_k or num_tokens == 0 or (max_tokens is not None and num_tokens > max_tokens):
        return topk_ids.clone(memory_format=torch.contiguous_format)
    topk_ids, similarity = topk_ids.contiguous(), similarity.contiguous()
    valid = "none"
    if valid_tokens is not None:
        valid = "mask" if valid_tokens.dtype == torch.bool else "count"
        valid_tokens = valid_tokens.contiguous()

    num_experts, num_votes = similarity.shape[0], num_tokens * primary
    config = choose_config(num_tokens, num_experts, primary)
    is_primary = None
    if not config.one_launch:
        is_primary = torch.zeros(num_experts, dtype=torch.int32, device=topk_ids.device)
        grid = (triton.cdiv(num_votes, 256),)
        _mark_primary_kernel[grid](
            topk_ids, valid_tokens, is_primary, num_votes, num_experts,
            K=top_k, S=primary, VALID=valid, BLOCK_V=256, num_warps=4,
        )  # fmt: skip
    new_ids = torch.empty_like(topk_ids)
    grid = (triton.cdiv(topk_ids.numel(), config.BLOCK_P),)
    _sere_reroute_kernel[grid](
        topk_ids, similarity, valid_tokens, is_primary, new_ids,
        topk_ids.numel(), num_votes, num_experts, float(threshold),
        K=top_k, S=primary, VALID=valid, HAS_THRESHOLD=threshold > 0, ONE_LAUNCH=config.one_launch,
        BLOCK_P=config.BLOCK_P, BLOCK_E=config.BLOCK_E, BLOCK_V=config.BLOCK_V, num_warps=config.num_warps,
    )  # fmt: skip
    return new_ids
