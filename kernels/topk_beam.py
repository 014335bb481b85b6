"""Top-K and BEAM's mask in one launch on a GPU: a program reads the scores and the mask logits of a few tokens."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.kernels import reference
from moe_fx.kernels.topk_sere import rank_rows, score_keys


def choose_config(num_experts: int) -> tuple[int, int, int]:
    """Tokens per program, row length (a power of two >= E), warps: a row per warp, so that reductions need no barrier."""
    block_e = max(32, triton.next_power_of_2(num_experts))
    block_t = max(1, min(4, 1024 // block_e))
    return block_t, block_e, 4


@triton.jit(do_not_specialize=["num_tokens", "cut"])
def _topk_beam_kernel(
    scores_ptr,  # [T, E]
    mask_logits_ptr,  # [T, E_m]
    values_ptr,  # [T, K]
    topk_ids_ptr,  # [T, K]
    new_ids_ptr,  # [T, K]
    num_tokens,
    num_experts,  # E
    num_masked,  # E_m
    cut,  # logit(tau)
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)[None, :]
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    is_score = (token < num_tokens) & (expert < num_experts)
    has_row = (token < num_tokens) & (expert < num_masked)
    scores = tl.load(scores_ptr + token * num_experts + expert, mask=is_score, other=0.0)  # [BLOCK_T, BLOCK_E]
    logits = tl.load(mask_logits_ptr + token * num_masked + expert, mask=has_row, other=0.0).to(tl.float32)
    rank = rank_rows(score_keys(scores, is_score), expert, K, BLOCK_E)
    pick = token * K + rank
    is_pick = is_score & (rank < K)
    ids = tl.broadcast_to(expert, [BLOCK_T, BLOCK_E]).to(tl.int64)
    on = (expert >= num_masked) | (logits >= cut)  # a NaN logit is off
    tl.store(values_ptr + pick, scores, mask=is_pick)
    tl.store(topk_ids_ptr + pick, ids, mask=is_pick)
    tl.store(new_ids_ptr + pick, tl.where(on, ids, -1), mask=is_pick)


def topk_beam(scores: Tensor, k: int, mask_logits: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.topk_beam``, which does the work for float64 scores."""
    if scores.dtype == torch.float64:
        return reference.topk_beam(scores, k, mask_logits, tau)
    num_tokens, num_experts = scores.shape
    scores, mask_logits = scores.contiguous(), mask_logits.contiguous()
    values = torch.empty(num_tokens, k, dtype=scores.dtype, device=scores.device)
    topk_ids = torch.empty(num_tokens, k, dtype=torch.int64, device=scores.device)
    new_ids = torch.empty_like(topk_ids)
    if num_tokens == 0:
        return values, topk_ids, new_ids
    block_t, block_e, num_warps = choose_config(num_experts)
    _topk_beam_kernel[(triton.cdiv(num_tokens, block_t),)](
        scores, mask_logits, values, topk_ids, new_ids,
        num_tokens, num_experts, mask_logits.shape[1], math.log(tau / (1 - tau)),
        K=k, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=num_warps,
    )  # fmt: skip
    return values, topk_ids, new_ids
