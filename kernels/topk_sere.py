"""Top-K and SERE in one launch on a GPU, for a decode step; for a large batch top-K is a launch of its own.  No host sync.

A program selects for a few tokens, and must know the first S picks of all others.  Their scores are read again by every
program, which costs less than to wait for the other programs or for a second launch as long as they are few: at 64
tokens and 128 experts they are 32 KB, and come from the L2 cache, where the kernel that made the scores left them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.kernels import reference
from moe_fx.kernels.sere_reroute import move_picks, sere_reroute

MAX_SCORES_PER_PROGRAM = 32768  # scores that every program reads: at 128 experts this is a batch of 256
MAX_EXPERTS_PER_PROGRAM = 1024  # experts whose similarities a program can hold in registers for every pick of a token
TAKEN = tl.constexpr(-0x80000000)  # below the key of every score


@dataclass(frozen=True)
class Config:
    """Tile sizes: tokens per program, row length (a power of two >= E), tokens whose votes are counted at a time."""

    BLOCK_T: int
    BLOCK_E: int
    BLOCK_V: int
    num_warps: int
    one_launch: bool


def choose_config(num_tokens: int, num_experts: int, top_k: int) -> Config:
    """Tiles for a shape: a row per warp, so that a reduction over experts needs no barrier.

    At most 32 values of a tile per thread: more of them spill registers, as do two such tiles of long rows.
    """
    block_e = max(32, triton.next_power_of_2(num_experts))
    block_t = max(1, min(8, 8192 // (block_e * triton.next_power_of_2(top_k))))
    block_v = max(1, min((8192 if block_e <= 256 else 4096) // block_e, max(8, triton.next_power_of_2(num_tokens))))
    fits = num_tokens * block_e <= MAX_SCORES_PER_PROGRAM and block_e <= MAX_EXPERTS_PER_PROGRAM
    return Config(block_t, block_e, block_v, num_warps=8, one_launch=fits)


@triton.jit
def score_keys(scores, is_score):
    """int32 keys in the order of the scores, TAKEN where there is none: NaN above all, -0.0 equal to 0.0."""
    wide = scores.to(tl.float32)
    bits = tl.where(wide == 0, 0.0, wide).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(is_score, tl.where(wide == wide, keys, 0x7FFFFFFF), TAKEN)


@triton.jit
def best_of_rows(keys, expert, BLOCK_E: tl.constexpr):
    """Where the largest key of every row stands, bool [R, BLOCK_E]: the lowest expert of equals."""
    largest = tl.max(keys, axis=1)  # [R]
    first = tl.min(tl.where(keys == largest[:, None], expert, BLOCK_E), axis=1)  # [R]
    return expert == first[:, None]


@triton.jit
def rank_rows(keys, expert, K: tl.constexpr, BLOCK_E: tl.constexpr):
    """The place of every expert among its row's K best [R, BLOCK_E], K for those that are not among them."""
    rank = tl.zeros_like(keys) + K
    for place in range(K):
        is_best = best_of_rows(keys, expert, BLOCK_E)
        rank = tl.where(is_best, place, rank)
        keys = tl.where(is_best, TAKEN, keys)
    return rank


@triton.jit
def primary_experts(
    scores_ptr,  # [T, E]
    valid_ptr,  # None, [T] or [1]
    num_tokens,
    num_experts,
    S: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Which experts are among the S best of any token that is no padding, bool [BLOCK_E]."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    hits = tl.zeros([BLOCK_V, BLOCK_E], tl.int32)
    for start in range(0, num_tokens, BLOCK_V):
        token = start + tl.arange(0, BLOCK_V)[:, None]
        votes = token < num_tokens
        if VALID == "mask":
            votes = votes & (tl.load(valid_ptr + token, mask=votes, other=0) != 0)
        if VALID == "count":
            votes = votes & (token < tl.load(valid_ptr))
        is_score = votes & (expert < num_experts)
        # [BLOCK_V, BLOCK_E]
        scores = tl.load(scores_ptr + token.to(tl.int64) * num_experts + expert, mask=is_score, other=0.0)
        keys = score_keys(scores, is_score)
        for _ in tl.static_range(S):
            is_best = best_of_rows(keys, expert, BLOCK_E)
            hits = tl.where(is_best & is_score, 1, hits)
            keys = tl.where(is_best, TAKEN, keys)
    return tl.max(hits, axis=0) > 0


@triton.jit(do_not_specialize=["num_tokens", "threshold"])
def _topk_sere_kernel(
    scores_ptr,  # [T, E]
    similarity_ptr,  # [E_s, E_s]
    valid_ptr,  # None, [T] or [1]
    values_ptr,  # [T, K]
    topk_ids_ptr,  # [T, K]
    new_ids_ptr,  # [T, K], None: another launch makes them
    num_tokens,
    num_experts,  # E
    num_similar,  # E_s
    threshold,
    K: tl.constexpr,
    S: tl.constexpr,
    VALID: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    REROUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)[None, :]
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = first_token + tl.arange(0, BLOCK_T)[:, None]
    is_score = (token < num_tokens) & (expert < num_experts)
    scores = tl.load(scores_ptr + token * num_experts + expert, mask=is_score, other=0.0)  # [BLOCK_T, BLOCK_E]
    rank = rank_rows(score_keys(scores, is_score), expert, K, BLOCK_E)
    pick = token * K + rank
    is_pick = is_score & (rank < K)
    ids = tl.broadcast_to(expert, [BLOCK_T, BLOCK_E]).to(tl.int64)
    tl.store(values_ptr + pick, scores, mask=is_pick)
    tl.store(topk_ids_ptr + pick, ids, mask=is_pick)
    if REROUTE:
        is_primary = primary_experts(scores_ptr, valid_ptr, num_tokens, num_experts, S, VALID, BLOCK_E, BLOCK_V)
        is_primary = is_primary & (tl.arange(0, BLOCK_E) < num_similar)
        tl.debug_barrier()  # the picks below were written by other threads of this program
        own = tl.arange(0, BLOCK_P)  # [BLOCK_P]
        is_own = (own < BLOCK_T * K) & (first_token + own // K < num_tokens)
        own_ids = tl.load(topk_ids_ptr + first_token * K + own, mask=is_own, other=-1)
        moved = move_picks(
            own_ids, own % K >= S, is_primary, similarity_ptr, num_similar, threshold, HAS_THRESHOLD, BLOCK_E
        )
        tl.store(new_ids_ptr + first_token * K + own, moved, mask=is_own)
    elif new_ids_ptr is not None:
        tl.store(new_ids_ptr + pick, ids, mask=is_pick)


def topk_sere(
    scores: Tensor,
    k: int,
    similarity: Tensor,
    primary: int,
    threshold: float,
    valid_tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.topk_sere``, which does the work for float64."""
    if scores.dtype == torch.float64:
        return reference.topk_sere(scores, k, similarity, primary, threshold, valid_tokens, max_tokens)
    num_tokens, num_experts = scores.shape
    scores, similarity = scores.contiguous(), similarity.contiguous()
    values = torch.empty(num_tokens, k, dtype=scores.dtype, device=scores.device)
    topk_ids = torch.empty(num_tokens, k, dtype=torch.int64, device=scores.device)
    config = choose_config(num_tokens, max(num_experts, similarity.shape[0]), k)
    moves = primary < k and (max_tokens is None or num_tokens <= max_tokens)
    new_ids = torch.empty_like(topk_ids) if config.one_launch or not moves else None
    if num_tokens == 0:
        return values, topk_ids, torch.empty_like(topk_ids)
    valid = "none"
    if valid_tokens is not None:
        valid = "mask" if valid_tokens.dtype == torch.bool else "count"
        valid_tokens = valid_tokens.contiguous()
    _topk_sere_kernel[(triton.cdiv(num_tokens, config.BLOCK_T),)](
        scores, similarity, valid_tokens, values, topk_ids, new_ids,
        num_tokens, num_experts, similarity.shape[0], float(threshold),
        K=k, S=min(primary, k), VALID=valid, HAS_THRESHOLD=threshold > 0, REROUTE=moves and config.one_launch,
        BLOCK_T=config.BLOCK_T, BLOCK_P=triton.next_power_of_2(config.BLOCK_T * k), BLOCK_E=config.BLOCK_E,
        BLOCK_V=config.BLOCK_V, num_warps=config.num_warps,
    )  # fmt: skip
    if new_ids is None:
        new_ids = sere_reroute(topk_ids, similarity, primary, threshold, valid_tokens)
    return values, topk_ids, new_ids
