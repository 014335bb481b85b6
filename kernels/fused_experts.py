"""All experts of a layer on a GPU: sort the picks, project up, project down, sum.  No host sync.

1. ``_sort_picks_kernel``, one program per expert, gives every token that picked the expert a *row*; picks that are off
   get none, and several picks of one token share one row, whose weight is their sum.  Rows of one expert follow each
   other, and every BLOCK_T of them are a *tile*: no tile has rows of two experts.  (For large batches
   ``_count_picks_kernel`` goes before it, so that not every program counts all picks.)
2. ``_gate_up_kernel`` multiplies a tile's tokens by slices of its expert's gate and up weights, and applies the
   activation before anything is written.
3. ``_down_kernel`` multiplies a tile's rows by slices of its expert's down weights.
4. ``_sum_picks_kernel`` adds up each token's rows, always in one order, so that the result has the same bits in every
   run; atomic additions would not give that.

A decode step of at most BLOCK_T tokens can do with three launches or two, where a launch is a tenth of the time:
``by_pick`` leaves out the sort.  A pick is then its own row, and the expert's first pick in the batch stands for its
tile: a few hundred ids are read faster by every program than sorted by a launch before it.  ``sum_in_down`` leaves out
the last launch: of the programs that multiply one slice, the one that finishes last adds up that slice.

Grids depend on shapes only: there are programs for as many tiles as the picks could make, and those without a tile
return at once.  So a captured CUDA graph is right when it is replayed with other picks.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.kernels import reference

MAX_PICKS_PER_PROGRAM = 4096  # picks that every program of the sort counts; at K = 8 this is a batch of 512
COUNT_BLOCK = 1024
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Tile:
    """What one program of a projection multiplies: columns of the result, length of one step along the sum."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """Tile sizes and launches.

    Attributes:
        BLOCK_T: rows of a tile.
        gate_up, down: tiles of the two projections.
        BLOCK_S: tokens that the sort reads at a time.
        BLOCK_N: columns of the sum.
        one_launch: whether every program of the sort counts all picks, so that no launch must count them before.
        by_pick: no sort, for at most BLOCK_T tokens; see the module's docstring.
        sum_in_down: no launch for the sum; needs ``by_pick``.
    """

    BLOCK_T: int
    gate_up: Tile
    down: Tile
    BLOCK_S: int
    BLOCK_N: int
    one_launch: bool
    by_pick: bool = False
    sum_in_down: bool = False


@functools.cache
def choose_config(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    device_name: str = "",
) -> Config:
    """Tiles for a shape: as measured on a card of this name, for the next larger batch; by rules where there is none."""
    layer = Layer(top_k, num_experts, hidden, intermediate, str(dtype).removeprefix("torch."))
    measured = measured_configs(device_name).get(layer, {})
    larger = [tokens for tokens in measured if tokens >= num_tokens]
    return measured[min(larger)] if larger else config_by_rules(num_tokens, layer)


@dataclass(frozen=True)
class Layer:
    """What a table of measured tiles is looked up by, beside the batch and the card."""

    top_k: int
    experts: int
    hidden: int
    intermediate: int
    dtype: str


@functools.cache
def measured_configs(device_name: str) -> dict[Layer, dict[int, Config]]:
    """The table of a card, by layer and batch; empty for a card that was never measured.  See ``configs/README.md``."""
    path = CONFIGS / f"{device_name.replace(' ', '_')}.json"
    if not device_name or not path.is_file():
        return {}
    table: dict[Layer, dict[int, Config]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        tiles = {name: Tile(*row["config"][name]) for name in ("gate_up", "down")}
        table.setdefault(Layer(**row["layer"]), {})[row["tokens"]] = Config(**{**row["config"], **tiles})
    return table


def config_by_rules(num_tokens: int, layer: Layer) -> Config:
    """Tiles for a card that was never measured.

    Rows of a tile follow the rows that an active expert has on average.  Up to 32 the time is that of reading weights:
    slices are narrow enough for about three programs on each of a hundred multiprocessors, also where a policy leaves
    one expert per token.  From 64 on it is that of multiplying.
    """
    picks = num_tokens * layer.top_k
    average = picks / max(1, min(picks, layer.experts))
    block_t = 16 if average <= 16 else 32 if average <= 32 else 64 if average <= 128 else 128
    if layer.dtype == "float32":  # twice the bytes, and no tensor cores to feed
        block_t = min(block_t, 32)
        gate_up, down = Tile(32, 32, num_warps=4, num_stages=3), Tile(64, 32, num_warps=4, num_stages=3)
    elif block_t <= 32:
        few = picks <= 128
        gate_up = Tile(16 if picks <= 8 else 32 if few else 64, 128, num_warps=4, num_stages=4 if few else 3)
        down = Tile(32 if few else 64, 128, num_warps=4, num_stages=4)
    elif block_t == 64:
        gate_up, down = Tile(64, 64, num_warps=4, num_stages=4), Tile(128, 64, num_warps=4, num_stages=4)
    else:
        gate_up, down = Tile(128, 64, num_warps=8, num_stages=3), Tile(256, 64, num_warps=8, num_stages=3)
    block_k = triton.next_power_of_2(layer.top_k)
    block_s = max(1, min(256, 2048 // block_k, triton.next_power_of_2(num_tokens)))  # more of them spill registers
    block_n = max(32, min(1024, 4096 // block_k))
    by_pick = num_tokens <= min(16, block_t) and layer.top_k <= 32
    return Config(block_t, gate_up, down, block_s, block_n, picks <= MAX_PICKS_PER_PROGRAM, by_pick)


@triton.jit(do_not_specialize=["num_picks", "num_experts"])
def _count_picks_kernel(topk_ids_ptr, counts_ptr, num_picks, num_experts, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """Picks per expert [E]; two of one token count as two, which leaves room for rows that then are not there."""
    pick = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ids = tl.load(topk_ids_ptr + pick, mask=pick < num_picks, other=-1)  # [BLOCK_P]
    slot = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)
    counts = tl.histogram(slot, BLOCK_E)  # [BLOCK_E], those that are off in slot E
    expert = tl.arange(0, BLOCK_E)
    tl.atomic_add(counts_ptr + expert, counts, mask=(expert < num_experts) & (counts > 0))


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "most_tiles"])
def _sort_picks_kernel(
    topk_weights_ptr,  # [T, K]
    topk_ids_ptr,  # [T, K]
    counts_ptr,  # [E], None: count here
    row_to_token_ptr,  # [T K]
    row_weights_ptr,  # [T K]
    pick_to_row_ptr,  # [T, K], -1: none
    tile_to_expert_ptr,  # [tiles]
    tile_to_row_ptr,  # [tiles], its first
    tile_rows_ptr,  # [tiles], how many: 0 where there is no tile
    num_tokens,
    num_experts,
    most_tiles,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    expert = tl.program_id(0)
    slot = tl.arange(0, BLOCK_E)
    if counts_ptr is None:
        counts = tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, num_tokens * K, BLOCK_P):
            counted = start + tl.arange(0, BLOCK_P)
            ids = tl.load(topk_ids_ptr + counted, mask=counted < num_tokens * K, other=-1)  # [BLOCK_P]
            counts += tl.histogram(tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32), BLOCK_E)
    else:
        counts = tl.load(counts_ptr + slot, mask=slot < num_experts, other=0)  # [BLOCK_E]
    tiles = tl.cdiv(counts, BLOCK_T)
    first_row = tl.sum(tl.where(slot < expert, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(slot < expert, tiles, 0), axis=0)
    own_tiles = tl.sum(tl.where(slot == expert, tiles, 0), axis=0)

    num_rows = tl.full([], 0, tl.int32)
    k = tl.arange(0, BLOCK_K)[None, :]
    for start in range(0, num_tokens, BLOCK_S):
        token = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        pick = token.to(tl.int64)[:, None] * K + k  # [BLOCK_S, BLOCK_K]
        in_range = (token[:, None] < num_tokens) & (k < K)
        ids = tl.load(topk_ids_ptr + pick, mask=in_range, other=-1)
        picked = in_range & (ids == expert)
        weights = tl.load(topk_weights_ptr + pick, mask=picked, other=0.0).to(tl.float32)
        has = tl.max(picked.to(tl.int32), axis=1)  # [BLOCK_S]
        row = first_row + num_rows + tl.cumsum(has, axis=0) - has  # [BLOCK_S]
        tl.store(row_to_token_ptr + row, token, mask=has > 0)
        tl.store(row_weights_ptr + row, tl.sum(weights, axis=1), mask=has > 0)
        first_k = tl.min(tl.where(picked, k, BLOCK_K), axis=1)  # [BLOCK_S]
        tl.store(pick_to_row_ptr + pick, tl.where(k == first_k[:, None], row[:, None], -1), mask=picked)
        if expert == 0:
            tl.store(pick_to_row_ptr + pick, -1, mask=in_range & ((ids < 0) | (ids >= num_experts)))
        num_rows += tl.sum(has, axis=0)

    for start in range(0, own_tiles, 32):
        own = start + tl.arange(0, 32)  # [32]
        tile, is_own = first_tile + own, own < own_tiles
        tl.store(tile_to_expert_ptr + tile, expert, mask=is_own)
        tl.store(tile_to_row_ptr + tile, first_row + own * BLOCK_T, mask=is_own)
        tl.store(tile_rows_ptr + tile, tl.minimum(tl.maximum(num_rows - own * BLOCK_T, 0), BLOCK_T), mask=is_own)
    if expert == num_experts - 1:
        for start in range(first_tile + own_tiles, most_tiles, 32):
            tile = start + tl.arange(0, 32)
            tl.store(tile_to_expert_ptr + tile, 0, mask=tile < most_tiles)
            tl.store(tile_to_row_ptr + tile, 0, mask=tile < most_tiles)
            tl.store(tile_rows_ptr + tile, 0, mask=tile < most_tiles)


@triton.jit
def rows_of_tile(tile, tile_to_expert_ptr, tile_to_row_ptr, tile_rows_ptr, BLOCK_T: tl.constexpr):
    """The expert of a tile, whether it has rows at all, which they are and which of them exist [BLOCK_T]."""
    in_tile = tl.arange(0, BLOCK_T)
    num_rows = tl.load(tile_rows_ptr + tile)
    expert = tl.load(tile_to_expert_ptr + tile).to(tl.int64)
    row = tl.load(tile_to_row_ptr + tile).to(tl.int64) + in_tile
    return expert, num_rows > 0, row, in_tile < num_rows


@triton.jit
def rows_of_pick(
    pick, topk_ids_ptr, num_tokens, num_experts, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The same without a sort.  A token's row is its first pick of the expert.

    The second result says whether the pick is the expert's first in the batch: the others' programs have nothing to do.
    """
    token, k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    picks = token[:, None] * K + k[None, :]  # [BLOCK_T, BLOCK_K]
    in_range = (token[:, None] < num_tokens) & (k[None, :] < K)
    ids = tl.load(topk_ids_ptr + picks, mask=in_range, other=-1)
    expert = tl.load(topk_ids_ptr + pick).to(tl.int64)
    picked = in_range & (ids == expert)
    first_k = tl.min(tl.where(picked, k[None, :], BLOCK_K), axis=1)  # [BLOCK_T]
    first = tl.min(tl.min(tl.where(picked, picks, BLOCK_T * K), axis=1), axis=0)
    leads = (expert >= 0) & (expert < num_experts) & (first == pick)
    return expert, leads, (token * K + first_k).to(tl.int64), first_k < BLOCK_K


@triton.jit
def note_picks(
    pick,
    expert,
    leads,
    topk_weights_ptr,  # [T, K]
    topk_ids_ptr,  # [T, K]
    row_weights_ptr,  # [T K]
    pick_to_row_ptr,  # [T, K]
    num_tokens,
    num_experts,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Without a sort: the rows and weights of all picks of an expert, by the program of the first; -1 for an off pick."""
    token, k = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_K)[None, :]
    picks = token * K + k  # [BLOCK_T, BLOCK_K]
    in_range = (token < num_tokens) & (k < K)
    ids = tl.load(topk_ids_ptr + picks, mask=in_range, other=-1)
    picked = in_range & (ids >= 0) & (ids == tl.where(leads, expert, -1))
    weights = tl.load(topk_weights_ptr + picks, mask=picked, other=0.0).to(tl.float32)
    first_k = tl.min(tl.where(picked, k, BLOCK_K), axis=1)[:, None]  # [BLOCK_T, 1]
    is_first = picked & (k == first_k)
    merged = tl.broadcast_to(tl.sum(weights, axis=1)[:, None], [BLOCK_T, BLOCK_K])
    tl.store(row_weights_ptr + picks, merged, mask=is_first)
    tl.store(pick_to_row_ptr + picks, tl.where(is_first, picks, -1), mask=picked)
    if (expert < 0) | (expert >= num_experts):
        tl.store(pick_to_row_ptr + pick, -1)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, alpha):
    """In float32.  Comparisons are such that NaN stays NaN."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "swiglu_clamped":
        return x * tl.sigmoid(x * alpha)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    else:
        return tl.where(x < 0, 0.0, x)


@triton.jit
def _dot(x, w, sums, UPCAST: tl.constexpr):
    """sums + x @ w, accumulated in float32.  UPCAST is for Triton's interpreter, which multiplies bfloat16 wrongly."""
    if UPCAST:
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "num_arrivals"])
def _gate_up_kernel(
    hidden_ptr,  # [T, H], contiguous
    w_ptr,  # [E, G, H]
    bias_ptr,  # [E, G] or None
    row_to_token_ptr,  # this and the tiles: None where BY_PICK
    tile_to_expert_ptr,
    tile_to_row_ptr,
    tile_rows_ptr,
    topk_weights_ptr,  # [T, K]; this and the next four: None unless BY_PICK
    topk_ids_ptr,  # [T, K]
    row_weights_ptr,  # [T K]
    pick_to_row_ptr,  # [T, K]
    arrivals_ptr,  # [slices of the down projection], or None
    intermediate_ptr,  # [T K, I], contiguous
    num_tokens,
    num_experts,
    num_arrivals,
    H,
    I,
    stride_we,
    stride_wg,
    stride_wh,
    stride_be,
    stride_bg,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN: tl.constexpr,
    BY_PICK: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    num_slices = tl.cdiv(I, BLOCK_I)
    tile, tile_slice = tl.program_id(0) // num_slices, tl.program_id(0) % num_slices
    if BY_PICK:
        expert, has_rows, row, is_row = rows_of_pick(tile, topk_ids_ptr, num_tokens, num_experts, K, BLOCK_T, BLOCK_K)
        token = tl.arange(0, BLOCK_T).to(tl.int64)
        if tile_slice == 0:
            note_picks(
                tile, expert, has_rows, topk_weights_ptr, topk_ids_ptr, row_weights_ptr, pick_to_row_ptr, num_tokens,
                num_experts, K, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            if arrivals_ptr is not None and tile == 0:
                arrival = tl.arange(0, BLOCK_A)
                tl.store(arrivals_ptr + arrival, tl.zeros([BLOCK_A], tl.int32), mask=arrival < num_arrivals)
    else:
        expert, has_rows, row, is_row = rows_of_tile(tile, tile_to_expert_ptr, tile_to_row_ptr, tile_rows_ptr, BLOCK_T)
        token = tl.load(row_to_token_ptr + row, mask=is_row, other=0).to(tl.int64)
    if not has_rows:
        return
    i = tile_slice.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    is_i = i < I
    gate_g = 2 * i if GATED == "interleaved" else i  # rows of the weights
    up_g = 2 * i + 1 if GATED == "interleaved" else I + i
    h = tl.arange(0, BLOCK_H)

    x_ptrs = hidden_ptr + token[:, None] * H + h[None, :]  # [BLOCK_T, BLOCK_H]
    gate_ptrs = w_ptr + expert * stride_we + gate_g[None, :] * stride_wg + h.to(tl.int64)[:, None] * stride_wh
    up_ptrs = w_ptr + expert * stride_we + up_g[None, :] * stride_wg + h.to(tl.int64)[:, None] * stride_wh
    gate = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN:
            x = tl.load(x_ptrs, mask=is_row[:, None], other=0.0)
            w_gate = tl.load(gate_ptrs)  # [BLOCK_H, BLOCK_I]
        else:
            is_h = start + h < H
            x = tl.load(x_ptrs, mask=is_row[:, None] & is_h[None, :], other=0.0)
            w_gate = tl.load(gate_ptrs, mask=is_h[:, None] & is_i[None, :], other=0.0)
        gate = _dot(x, w_gate, gate, UPCAST)
        if GATED != "none":
            if EVEN:  # noqa: SIM108  (a branch of the compiler's, not of the kernel's)
                w_up = tl.load(up_ptrs)
            else:
                w_up = tl.load(up_ptrs, mask=(start + h < H)[:, None] & is_i[None, :], other=0.0)
            up = _dot(x, w_up, up, UPCAST)
        x_ptrs += BLOCK_H
        gate_ptrs += BLOCK_H * stride_wh
        up_ptrs += BLOCK_H * stride_wh

    if bias_ptr is not None:
        biases = bias_ptr + expert * stride_be
        gate += tl.load(biases + gate_g * stride_bg, mask=is_i, other=0.0).to(tl.float32)[None, :]
        if GATED != "none":
            up += tl.load(biases + up_g * stride_bg, mask=is_i, other=0.0).to(tl.float32)[None, :]
    if limit is not None:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    result = _activate(gate, ACTIVATION, alpha)
    if ACTIVATION == "swiglu_clamped":
        up += 1
    if GATED != "none":
        result *= up
    pointers = intermediate_ptr + row[:, None] * I + i[None, :]
    tl.store(pointers, result.to(intermediate_ptr.dtype.element_ty), mask=is_row[:, None] & is_i[None, :])


@triton.jit
def sum_slice(
    outputs_ptr, row_weights_ptr, pick_to_row_ptr, out_ptr, n, num_tokens, N, K: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Columns ``n`` of the sum of every token's rows, in the order of its picks."""
    token = tl.arange(0, BLOCK_T)
    is_n = (n < N)[None, :]
    sums = tl.zeros([BLOCK_T, n.shape[0]], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(pick_to_row_ptr + token * K + k, mask=token < num_tokens, other=-1).to(tl.int64)  # [BLOCK_T]
        weight = tl.load(row_weights_ptr + row, mask=row >= 0, other=0.0)
        # Past the first-level cache, which does not see what other programs wrote.  [BLOCK_T, BLOCK_N]
        pointers = outputs_ptr + row[:, None] * N + n[None, :]
        outputs = tl.load(pointers, mask=(row >= 0)[:, None] & is_n, other=0.0, cache_modifier=".cg")
        sums += weight[:, None] * outputs.to(tl.float32)
    pointers = out_ptr + token.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(pointers, sums.to(out_ptr.dtype.element_ty), mask=(token < num_tokens)[:, None] & is_n)


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def _down_kernel(
    intermediate_ptr,  # [T K, I], contiguous
    w_ptr,  # [E, N, I]
    bias_ptr,  # [E, N] or None
    tile_to_expert_ptr,  # this and the next two: None where BY_PICK
    tile_to_row_ptr,
    tile_rows_ptr,
    topk_ids_ptr,  # [T, K]; None unless BY_PICK
    row_weights_ptr,  # [T K]; this and the next three: None unless SUM
    pick_to_row_ptr,  # [T, K]
    arrivals_ptr,  # [slices], zeros
    out_ptr,  # [T, N]
    outputs_ptr,  # [T K, N], contiguous
    num_tokens,
    num_experts,
    I,
    N,
    stride_we,
    stride_wn,
    stride_wi,
    stride_be,
    stride_bn,
    UPCAST: tl.constexpr,
    EVEN: tl.constexpr,
    BY_PICK: tl.constexpr,
    SUM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    num_slices = tl.cdiv(N, BLOCK_N)
    tile, tile_slice = tl.program_id(0) // num_slices, tl.program_id(0) % num_slices
    if BY_PICK:
        expert, has_rows, row, is_row = rows_of_pick(tile, topk_ids_ptr, num_tokens, num_experts, K, BLOCK_T, BLOCK_K)
    else:
        expert, has_rows, row, is_row = rows_of_tile(tile, tile_to_expert_ptr, tile_to_row_ptr, tile_rows_ptr, BLOCK_T)
    n = tile_slice.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if has_rows:
        is_n = n < N
        i = tl.arange(0, BLOCK_I)
        x_ptrs = intermediate_ptr + row[:, None] * I + i[None, :]  # [BLOCK_T, BLOCK_I]
        w_ptrs = w_ptr + expert * stride_we + n[None, :] * stride_wn + i.to(tl.int64)[:, None] * stride_wi
        sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, I, BLOCK_I):
            if EVEN:
                x = tl.load(x_ptrs, mask=is_row[:, None], other=0.0)
                w = tl.load(w_ptrs)  # [BLOCK_I, BLOCK_N]
            else:
                is_i = start + i < I
                x = tl.load(x_ptrs, mask=is_row[:, None] & is_i[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=is_i[:, None] & is_n[None, :], other=0.0)
            sums = _dot(x, w, sums, UPCAST)
            x_ptrs += BLOCK_I
            w_ptrs += BLOCK_I * stride_wi
        if bias_ptr is not None:
            biases = bias_ptr + expert * stride_be
            sums += tl.load(biases + n * stride_bn, mask=is_n, other=0.0).to(tl.float32)[None, :]
        pointers = outputs_ptr + row[:, None] * N + n[None, :]
        tl.store(pointers, sums.to(outputs_ptr.dtype.element_ty), mask=is_row[:, None] & is_n[None, :])
    if SUM:
        tl.debug_barrier()  # all threads have written before one says so
        arrived = tl.atomic_add(arrivals_ptr + tile_slice, 1, sem="acq_rel", scope="gpu")
        if arrived == num_tokens * K - 1:
            sum_slice(outputs_ptr, row_weights_ptr, pick_to_row_ptr, out_ptr, n, num_tokens, N, K, BLOCK_T)


@triton.jit
def _sum_picks_kernel(
    outputs_ptr,  # [T K, N]
    row_weights_ptr,  # [T K]
    pick_to_row_ptr,  # [T, K]
    out_ptr,  # [T, N]
    N,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = tl.load(pick_to_row_ptr + token * K + k, mask=k < K, other=-1).to(tl.int64)
    weight = tl.load(row_weights_ptr + row, mask=row >= 0, other=0.0)
    mask = (row >= 0)[:, None] & (n < N)[None, :]
    outputs = tl.load(outputs_ptr + row[:, None] * N + n[None, :], mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
    sums = tl.sum(weight[:, None] * outputs.to(tl.float32), axis=0)
    tl.store(out_ptr + token * N + n, sums.to(out_ptr.dtype.element_ty), mask=n < N)


@dataclass(frozen=True)
class Rows:
    """Where the picks' rows are: see the module's docstring.  All int32 but the weights.

    Without a sort ``to_token`` and ``tiles`` are None, and the rest is written by ``_gate_up_kernel``.
    ``most_tiles`` is known on the host.
    """

    to_token: Tensor | None
    weights: Tensor
    pick_to_row: Tensor
    tiles: tuple[Tensor | None, Tensor | None, Tensor | None]
    most_tiles: int


def _sort_picks(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, config: Config) -> Rows:
    num_tokens, top_k = topk_ids.shape
    num_picks, device = topk_ids.numel(), topk_ids.device
    row_weights = torch.empty(num_picks, dtype=torch.float32, device=device)
    pick_to_row = torch.empty(num_picks, dtype=torch.int32, device=device)
    if config.by_pick:
        return Rows(None, row_weights, pick_to_row, (None, None, None), num_picks)
    full = min(num_experts, num_picks)  # active experts, at most: each has a tile that is not full, at worst
    most_tiles = full + (num_picks - full) // config.BLOCK_T
    block_e = max(32, triton.next_power_of_2(num_experts + 1))
    counts = None
    if not config.one_launch:
        counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
        grid = (triton.cdiv(num_picks, COUNT_BLOCK),)
        _count_picks_kernel[grid](
            topk_ids, counts, num_picks, num_experts, BLOCK_P=COUNT_BLOCK, BLOCK_E=block_e, num_warps=4
        )
    row_to_token = torch.empty(num_picks, dtype=torch.int32, device=device)
    tile_to_expert, tile_to_row, tile_rows = (
        torch.empty(most_tiles, dtype=torch.int32, device=device) for _ in range(3)
    )
    block_k = triton.next_power_of_2(top_k)
    _sort_picks_kernel[(num_experts,)](
        topk_weights, topk_ids, counts, row_to_token, row_weights, pick_to_row,
        tile_to_expert, tile_to_row, tile_rows, num_tokens, num_experts, most_tiles,
        K=top_k, BLOCK_T=config.BLOCK_T, BLOCK_S=config.BLOCK_S, BLOCK_K=block_k, BLOCK_E=block_e,
        BLOCK_P=min(COUNT_BLOCK, max(32, triton.next_power_of_2(num_picks))),
        num_warps=4 if config.BLOCK_S * block_k <= 1024 else 8,
    )  # fmt: skip
    return Rows(row_to_token, row_weights, pick_to_row, (tile_to_expert, tile_to_row, tile_rows), most_tiles)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


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
    """See ``reference.fused_experts``, which does the work for float64."""
    if hidden.dtype == torch.float64:
        return reference.fused_experts(
            hidden, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down, activation, gated, transposed, alpha, limit
        )
    if transposed:
        w_gate_up, w_down = w_gate_up.mT, w_down.mT
    num_tokens, num_in = hidden.shape
    num_experts, num_out, intermediate = w_down.shape
    out = torch.empty(num_tokens, num_out, dtype=hidden.dtype, device=hidden.device)
    if topk_ids.numel() == 0 or num_experts == 0 or num_out == 0:
        return out.zero_()
    hidden, topk_weights, topk_ids = hidden.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    num_picks, top_k = topk_ids.numel(), topk_ids.shape[1]
    config = choose_config(
        num_tokens, top_k, num_experts, num_in, intermediate, hidden.dtype, _device_name(hidden.device)
    )
    by_pick, in_down = config.by_pick, config.sum_in_down
    rows = _sort_picks(topk_weights, topk_ids, num_experts, config)
    num_slices = triton.cdiv(num_out, config.down.BLOCK_N)
    arrivals = torch.empty(num_slices, dtype=torch.int32, device=hidden.device) if in_down else None
    common = {
        "UPCAST": hidden.device.type == "cpu", "BY_PICK": by_pick, "K": top_k,
        "BLOCK_K": triton.next_power_of_2(top_k), "BLOCK_T": config.BLOCK_T,
    }  # fmt: skip

    tile = config.gate_up
    activated = torch.empty(num_picks, intermediate, dtype=hidden.dtype, device=hidden.device)
    _gate_up_kernel[(rows.most_tiles * triton.cdiv(intermediate, tile.BLOCK_N),)](
        hidden, w_gate_up, b_gate_up, rows.to_token, *rows.tiles,
        *((topk_weights, topk_ids, rows.weights, rows.pick_to_row) if by_pick else (None,) * 4), arrivals, activated,
        num_tokens, num_experts, num_slices, num_in, intermediate,
        *w_gate_up.stride(), *(b_gate_up.stride() if b_gate_up is not None else (0, 0)),
        float(alpha), None if limit is None else float(limit), ACTIVATION=activation, GATED=gated,
        EVEN=num_in % tile.BLOCK_C == 0 and intermediate % tile.BLOCK_N == 0, BLOCK_A=triton.next_power_of_2(num_slices),
        BLOCK_I=tile.BLOCK_N, BLOCK_H=tile.BLOCK_C, **common, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = config.down
    outputs = torch.empty(num_picks, num_out, dtype=hidden.dtype, device=hidden.device)
    _down_kernel[(rows.most_tiles * num_slices,)](
        activated, w_down, b_down, *rows.tiles, topk_ids if by_pick else None,
        *((rows.weights, rows.pick_to_row, arrivals, out) if in_down else (None,) * 4), outputs,
        num_tokens, num_experts, intermediate, num_out,
        *w_down.stride(), *(b_down.stride() if b_down is not None else (0, 0)),
        EVEN=intermediate % tile.BLOCK_C == 0 and num_out % tile.BLOCK_N == 0, SUM=in_down,
        BLOCK_N=tile.BLOCK_N, BLOCK_I=tile.BLOCK_C, **common, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if not in_down:
        _sum_picks_kernel[(num_tokens, triton.cdiv(num_out, config.BLOCK_N))](
            outputs, rows.weights, rows.pick_to_row, out, num_out,
            K=top_k, BLOCK_K=triton.next_power_of_2(top_k), BLOCK_N=config.BLOCK_N, num_warps=4,
        )  # fmt: skip
    return out
