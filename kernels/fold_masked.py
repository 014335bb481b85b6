"""Folding on a GPU: one launch for a decode step, two for a large batch, no host sync.

A token whose picks are all off takes the lowest expert that is on anywhere in the batch.  A program that meets such a
token reads for that the *candidates*: in a decode step all ids, in a large batch the lowest of each chunk of ids, which
a first kernel has written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CANDIDATES = 4096  # ids that a program may have to read
CHUNK = 1024  # ids per program of the first kernel
NO_ID = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # above every id


@dataclass(frozen=True)
class Config:
    """Tile sizes: tokens per program, picks of a token (a power of two >= K), candidates read at a time."""

    BLOCK_T: int
    BLOCK_K: int
    BLOCK_C: int
    num_warps: int
    one_launch: bool


def choose_config(num_tokens: int, top_k: int) -> Config:
    """Tiles for a shape: about 256 picks per program."""
    block_k = triton.next_power_of_2(top_k)
    block_t = max(1, 256 // block_k)
    return Config(block_t, block_k, BLOCK_C=512, num_warps=4, one_launch=num_tokens * top_k <= MAX_CANDIDATES)


@triton.jit(do_not_specialize=["num_picks"])
def _lowest_on_kernel(topk_ids_ptr, lowest_ptr, num_picks, CHUNK: tl.constexpr):
    """The lowest id that is on in each chunk of picks, -1 where there is none."""
    pick = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(topk_ids_ptr + pick, mask=pick < num_picks, other=-1).to(tl.int64)  # [CHUNK]
    lowest = tl.min(tl.where(ids >= 0, ids, NO_ID), axis=0)
    tl.store(lowest_ptr + tl.program_id(0), tl.where(lowest == NO_ID, -1, lowest))


@triton.jit(do_not_specialize=["num_tokens", "num_candidates"])
def _fold_masked_kernel(
    topk_weights_ptr,  # [T, K]
    topk_ids_ptr,  # [T, K]
    candidates_ptr,  # [C]
    new_weights_ptr,  # [T, K]
    new_ids_ptr,  # [T, K]
    num_tokens,
    num_candidates,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    pick = token[:, None] * K + k[None, :]  # [BLOCK_T, BLOCK_K]
    in_range = (token[:, None] < num_tokens) & (k[None, :] < K)
    ids = tl.load(topk_ids_ptr + pick, mask=in_range, other=-1)  # [BLOCK_T, BLOCK_K]
    weights = tl.load(topk_weights_ptr + pick, mask=in_range, other=0.0)
    on = ids >= 0
    first_k = tl.min(tl.where(on, k[None, :], BLOCK_K), axis=1)  # [BLOCK_T]
    stand_in = tl.max(tl.where(on & (k[None, :] == first_k[:, None]), ids, -1), axis=1)  # [BLOCK_T], -1: none on

    lowest = tl.full([], 0, tl.int64)
    none_on = (stand_in < 0) & (token < num_tokens)
    if tl.max(none_on.to(tl.int32), axis=0) > 0:
        lowests = tl.full([BLOCK_C], NO_ID, tl.int64)
        for start in range(0, num_candidates, BLOCK_C):
            candidate = start + tl.arange(0, BLOCK_C)
            ids_there = tl.load(candidates_ptr + candidate, mask=candidate < num_candidates, other=-1).to(tl.int64)
            lowests = tl.minimum(lowests, tl.where(ids_there >= 0, ids_there, NO_ID))
        lowest = tl.min(lowests, axis=0)
        lowest = tl.where(lowest == NO_ID, 0, lowest)
    stand_in = tl.where(stand_in >= 0, stand_in, lowest.to(ids.dtype))  # [BLOCK_T]
    tl.store(new_weights_ptr + pick, tl.where(on, weights, 0.0), mask=in_range)
    tl.store(new_ids_ptr + pick, tl.where(on, ids, stand_in[:, None]), mask=in_range)


def fold_masked(topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.fold_masked``."""
    topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
    new_weights, new_ids = torch.empty_like(topk_weights), torch.empty_like(topk_ids)
    num_tokens, top_k = topk_ids.shape
    if num_tokens == 0:
        return new_weights, new_ids
    config = choose_config(num_tokens, top_k)
    candidates = topk_ids
    if not config.one_launch:
        num_chunks = triton.cdiv(topk_ids.numel(), CHUNK)
        candidates = torch.empty(num_chunks, dtype=topk_ids.dtype, device=topk_ids.device)
        _lowest_on_kernel[(num_chunks,)](topk_ids, candidates, topk_ids.numel(), CHUNK=CHUNK, num_warps=4)
    _fold_masked_kernel[(triton.cdiv(num_tokens, config.BLOCK_T),)](
        topk_weights, topk_ids, candidates, new_weights, new_ids, num_tokens, candidates.numel(),
        K=top_k, BLOCK_T=config.BLOCK_T, BLOCK_K=config.BLOCK_K, BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    return new_weights, new_ids
