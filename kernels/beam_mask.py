"""BEAM's mask on a GPU: one launch that gathers the mask logits at the picks and switches picks off."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


def choose_config(num_picks: int) -> int:
    """Picks per program: small at decode, so that a few hundred picks still spread over many multiprocessors."""
    return 64 if num_picks <= 8192 else 512


@triton.jit(do_not_specialize=["num_picks", "cut"])
def _beam_mask_kernel(
    topk_weights_ptr,  # [T, K]
    topk_ids_ptr,  # [T, K]
    mask_logits_ptr,  # [T, E_m]
    new_weights_ptr,  # [T, K]
    new_ids_ptr,  # [T, K]
    num_picks,
    num_masked,  # E_m
    cut,  # logit(tau)
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pick = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    in_range = pick < num_picks
    ids = tl.load(topk_ids_ptr + pick, mask=in_range, other=-1)
    weights = tl.load(topk_weights_ptr + pick, mask=in_range, other=0.0)
    has_row = (ids >= 0) & (ids < num_masked)
    address = (pick // K) * num_masked + tl.where(has_row, ids, 0).to(tl.int64)
    logits = tl.load(mask_logits_ptr + address, mask=has_row, other=0.0).to(tl.float32)
    on = (ids >= 0) & ((ids >= num_masked) | (logits >= cut))  # a NaN logit is off
    tl.store(new_weights_ptr + pick, tl.where(on, weights, 0.0), mask=in_range)
    tl.store(new_ids_ptr + pick, tl.where(on, ids, -1), mask=in_range)


def beam_mask(topk_weights: Tensor, topk_ids: Tensor, mask_logits: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """See ``reference.beam_mask``."""
    topk_weights, topk_ids, mask_logits = topk_weights.contiguous(), topk_ids.contiguous(), mask_logits.contiguous()
    new_weights, new_ids = torch.empty_like(topk_weights), torch.empty_like(topk_ids)
    num_picks = topk_ids.numel()
    if num_picks == 0:
        return new_weights, new_ids
    block_p = choose_config(num_picks)
    _beam_mask_kernel[(triton.cdiv(num_picks, block_p),)](
        topk_weights, topk_ids, mask_logits, new_weights, new_ids,
        num_picks, mask_logits.shape[1], math.log(tau / (1 - tau)),
        K=topk_ids.shape[1], BLOCK_P=block_p, num_warps=2 if block_p == 64 else 4,
    )  # fmt: skip
    return new_weights, new_ids
