"""``fused_experts`` on CPU: active experts' weights are read once, and picks that are off cost nothing.

The picks become rows, sorted by expert.  A decode step has a few rows per expert and is bound by reading weights, so the
number of rows decides which routine multiplies.  GB/s of bf16 weights (64 experts, [1024, 1024] and [1024, 512], all
active), two threads of a Zen 5 whose other two cores were at work too; copying memory reached 30 (first three lines) and
36 to 48 (last line, where mm had 17.5, 14, 15, 14 and 14):

    rows per expert               1     2     4     8    16
    F.linear, a new result      8.7   8.0  13.2  11.8  10.5   oneDNN; torch._grouped_mm is a loop of this
    mm into an old result      17.6  15.9  19.1  13.3  14.6   oneDNN, which first packs the weight, in every call
    PyTorch's dot products     32.7  15.3    11   5.4   2.6   what mm and mv do where oneDNN is off
    compiled, blocks of rows   34.1  30.8  27.0  14.8   8.7   by Inductor: below

* An expert with up to four rows, if it is large, goes to a function compiled by Inductor, in a block of 1, 2 or 4 rows,
  whose products are taken together where the weight lies.  Compiling takes some seconds for each size of block, once;
  where there is no C++ compiler the next way serves.
* For the others there is a loop over experts.  One row goes to PyTorch's own routine; two and three rows are padded to
  four; every result goes into memory that is in the cache.  In float32 slices of a weight, one for each thread, are
  faster than the whole (``bmm``: 16 to 22 GB/s for 1 to 4 rows, ``mm``: 9 to 16).  In float16 a machine without such
  instructions multiplies several rows many times faster in float32.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fx.kernels import reference
from moe_fx.kernels.cpu import np

BLOCKS = (1, 2, 4)  # rows of an expert whose products the compiled function takes together
LEAST_BYTES_COMPILED = 2**18  # of one expert's gate and up weights: below, little is to be gained
MAX_PICKS_IN_PYTHON = 256
MAX_ROWS_ADDED = 256
ROWS_ONE_BY_ONE = 1.5  # rows per active expert, on average, up to which all blocks are of one row
PADDED_ROWS = 4  # what two and three rows are padded to
SLICES = 8


@dataclass(frozen=True)
class Rows:
    """The picks that are on, one row each, in ascending order of expert and then of token.

    Attributes:
        row_to_token: [R] int64.
        row_to_expert: [R] int64.
        weights: [R], float32 or float64.
        runs: for every active expert its id, its first row and the row after its last.
    """

    row_to_token: Tensor
    row_to_expert: Tensor
    weights: Tensor
    runs: list[tuple[int, int, int]]


def sort_picks(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, wide: torch.dtype) -> Rows | None:
    """The picks as rows, those of one token on one expert merged; None where every pick is off."""
    num_tokens, top_k = topk_ids.shape
    if topk_ids.numel() <= MAX_PICKS_IN_PYTHON:
        return _sort_few_picks(topk_weights, topk_ids, num_experts, wide)
    ids = topk_ids.numpy().ravel()
    pick = ((ids >= 0) & (ids < num_experts)).nonzero()[0]
    if len(pick) == 0:
        return None
    key = ids[pick].astype(np.int64) * num_tokens + pick // top_k
    order = key.argsort(kind="stable")
    key, pick = key[order], pick[order]
    weights = topk_weights.detach().to(wide).numpy().ravel()[pick]
    is_new = np.ones(len(key), dtype=bool)
    np.not_equal(key[1:], key[:-1], out=is_new[1:])
    if not is_new.all():
        first = is_new.nonzero()[0]
        key, weights = key[first], np.add.reduceat(weights, first)
    row_to_expert, row_to_token = np.divmod(key, num_tokens)
    start = [0, *((row_to_expert[1:] != row_to_expert[:-1]).nonzero()[0] + 1).tolist()]
    runs = list(zip(row_to_expert[start].tolist(), start, [*start[1:], len(key)], strict=True))
    return Rows(torch.from_numpy(row_to_token), torch.from_numpy(row_to_expert), torch.from_numpy(weights), runs)


def _sort_few_picks(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, wide: torch.dtype) -> Rows | None:
    """The same without NumPy, whose twenty calls take 100 microseconds when other work has filled the caches."""
    merged: dict[tuple[int, int], float] = {}
    for token, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if 0 <= expert < num_experts:
                merged[expert, token] = merged.get((expert, token), 0.0) + weight
    if not merged:
        return None
    order = sorted(merged)
    experts, tokens = zip(*order, strict=True)
    runs, start = [], 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or experts[stop] != experts[start]:
            runs.append((experts[start], start, stop))
            start = stop
    weights_of_rows = torch.tensor([merged[row] for row in order], dtype=wide)
    return Rows(torch.tensor(tokens), torch.tensor(experts), weights_of_rows, runs)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """PyTorch's own matrix products.  The switch is the process's: another thread may see it, and only be slower."""
    was_on = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_on)


def _project_sliced(rows: Tensor, weight: Tensor, result: Tensor) -> None:
    """result [R, N] = rows [R, H] @ weight.T, weight [N, H] in slices along N, for the threads to share."""
    slices = weight.unflatten(0, (SLICES, -1)).mT  # [SLICES, H, N / SLICES]
    product = torch.bmm(rows.expand(SLICES, *rows.shape), slices)
    result.unflatten(1, (SLICES, -1)).copy_(product.transpose(0, 1))


def _project(x: Tensor, weights: Tensor, runs: list[tuple[int, int, int]]) -> Tensor:
    """Each expert's rows of x [R + 3, H] times its weight, [E, N, H]: [R + 3, N].

    The last three rows are spare, with no meaning, before and after.  Two or three rows of an expert are multiplied as
    four, together with rows of the next ones, which are written again when it is their turn.
    """
    result = torch.empty(x.shape[0], weights.shape[1], dtype=x.dtype)
    is_bf16, is_fp16, is_row_major = x.dtype == torch.bfloat16, x.dtype == torch.float16, weights.stride(-1) == 1
    has_slices = x.dtype == torch.float32 and weights.shape[1] % SLICES == 0
    alone = []
    for expert, start, stop in runs:
        weight, num_rows = weights.select(0, expert), stop - start
        if num_rows == 1 and is_row_major and (is_bf16 or is_fp16):
            alone.append((weight, start))
        elif has_slices:
            _project_sliced(x[start:stop], weight, result[start:stop])
        elif is_fp16 and (num_rows >= 4 or not is_row_major):
            result[start:stop] = x[start:stop].float() @ weight.mT.float()
        else:
            stop = start + PADDED_ROWS if is_bf16 and num_rows < PADDED_ROWS else stop
            torch.mm(x[start:stop], weight.mT, out=result[start:stop])
    with _without_onednn():
        for weight, start in alone:
            torch.mv(weight, x[start], out=result[start])
    return result


def _weighted_sum(outputs: Tensor, rows: Rows, num_tokens: int) -> Tensor:
    """[T, N], in the dtype of the weights: every token's sum over its rows, in ascending order of expert."""
    outputs = outputs.to(rows.weights.dtype)
    if len(outputs) <= MAX_ROWS_ADDED:
        out = outputs.new_zeros(num_tokens, outputs.shape[1])
        return out.index_add_(0, rows.row_to_token, outputs * rows.weights[:, None])
    token = rows.row_to_token.numpy()
    by_token = token.argsort(kind="stable")
    offsets = token[by_token].searchsorted(np.arange(num_tokens))
    row = torch.from_numpy(by_token)
    return torch.nn.functional.embedding_bag(
        row, outputs, torch.from_numpy(offsets), mode="sum", per_sample_weights=rows.weights[row]
    )


def _looped(
    hidden: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    rows: Rows, runs: list[tuple[int, int, int]], act: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """The outputs of some experts, [R, N], by a loop over them; the rows of the others have no meaning."""
    num_rows = len(rows.weights)
    x = hidden.new_empty(num_rows + PADDED_ROWS - 1, hidden.shape[1])
    torch.index_select(hidden, 0, rows.row_to_token, out=x[:num_rows])
    gate_up = _project(x, w_gate_up, runs)
    if b_gate_up is not None:
        gate_up[:num_rows] += b_gate_up[rows.row_to_expert]
    outputs = _project(reference.activate_gate_up(gate_up, *act), w_down, runs)[:num_rows]
    if b_down is not None:
        outputs += b_down[rows.row_to_expert]
    return outputs


def _products(x: Tensor, weights: Tensor, block_to_expert: Tensor) -> Tensor:
    """Each block of rows times its expert's weight: [B, S, H], [E, N, H] -> [B, S, N].

    Compiled, these S sums are one loop, which loads a weight once, and nothing of [B, N, H] exists.
    """
    weights_of_block = weights[block_to_expert].float()
    sums = [(weights_of_block * row[:, None].float()).sum(-1) for row in x.unbind(1)]
    return torch.stack(sums, 1).to(x.dtype)


@functools.cache
def _compiled_blocks(*act: Any) -> Callable[..., Tensor]:
    def outputs_of_blocks(
        x: Tensor, block_to_expert: Tensor, w_gate_up: Tensor, w_down: Tensor,
        b_gate_up: Tensor | None, b_down: Tensor | None,
    ) -> Tensor:  # fmt: skip
        gate_up = _products(x, w_gate_up, block_to_expert)
        if b_gate_up is not None:
            gate_up = gate_up + b_gate_up[block_to_expert][:, None]
        outputs = _products(reference.activate_gate_up(gate_up, *act), w_down, block_to_expert)
        if b_down is not None:
            outputs = outputs + b_down[block_to_expert][:, None]
        return outputs

    # fullgraph: where Dynamo gives up it must say so, and not run this uncompiled.
    compiled = torch.compile(outputs_of_blocks, fullgraph=True)

    def call(x: Tensor, block_to_expert: Tensor, *parameters: Any) -> Tensor:
        for per_block in (x, block_to_expert):  # only this dimension: with all of them dynamic the loops are slower
            torch._dynamo.maybe_mark_dynamic(per_block, 0)
        return compiled(x, block_to_expert, *parameters)

    return call


_failed: set[tuple[Any, ...]] = set()  # settings for which the function could not be compiled


def _blocks(runs: list[tuple[int, int, int]], size: int) -> tuple[Tensor, Tensor]:
    """The expert of each block and the rows of all blocks; the block of an expert with fewer rows repeats the last."""
    rows = [min(start + i, stop - 1) for _, start, stop in runs for i in range(size)]
    return torch.tensor([expert for expert, _, _ in runs]), torch.tensor(rows)


def _compile_or_loop(
    hidden: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    rows: Rows, act: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """The outputs of all rows, [R, N]."""
    parameters = w_gate_up, w_down, b_gate_up, b_down
    by_size = _runs_by_size(rows, w_gate_up, w_down) if act not in _failed else {0: rows.runs}
    looped = by_size.pop(0, None)
    try:
        with torch.no_grad():
            compiled = [(row, _compiled_blocks(*act)(*args, *parameters)) for row, *args in _inputs(hidden, rows, by_size)]
    except Exception as error:  # whatever stands in the compiler's way, the loop gives the same result
        _failed.add(act)
        warnings.warn(f"fused_experts is slower than it could be: Inductor failed with {error!r:.300}", stacklevel=2)
        return _looped(hidden, *parameters, rows, rows.runs, act)
    if looped is None and len(compiled) == 1 and 1 in by_size:
        return compiled[0][1].flatten(0, 1)
    shape = len(rows.weights), w_down.shape[1]
    outputs = hidden.new_empty(shape) if looped is None else _looped(hidden, *parameters, rows, looped, act)
    for row, outputs_of_blocks in compiled:
        outputs.index_copy_(0, row, outputs_of_blocks.flatten(0, 1))  # repeated rows have equal values
    return outputs


def _inputs(
    hidden: Tensor, rows: Rows, by_size: dict[int, list[tuple[int, int, int]]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each size: the rows of its blocks, the tokens' values [B, S, H], and the expert of each block."""
    for size, runs in by_size.items():
        block_to_expert, row = _blocks(runs, size)
        yield row, hidden.index_select(0, rows.row_to_token[row]).unflatten(0, (-1, size)), block_to_expert


def _runs_by_size(rows: Rows, w_gate_up: Tensor, w_down: Tensor) -> dict[int, list[tuple[int, int, int]]]:
    """The runs by the size of the blocks they are compiled for, 0: not compiled."""
    _, num_gate_up, num_in = w_gate_up.shape
    is_large = num_gate_up * num_in * w_gate_up.itemsize >= LEAST_BYTES_COMPILED and w_gate_up.dtype != torch.float64
    if not (is_large and w_gate_up.stride(-1) == w_down.stride(-1) == 1):
        return {0: rows.runs}
    if len(rows.weights) <= ROWS_ONE_BY_ONE * len(rows.runs):  # one call, although some weights are loaded twice
        return {1: [(expert, row, row + 1) for expert, start, stop in rows.runs for row in range(start, stop)]}
    by_size: dict[int, list[tuple[int, int, int]]] = {}
    for run in rows.runs:
        num_rows = run[2] - run[1]
        size = next((size for size in BLOCKS if size >= num_rows), 0)
        by_size.setdefault(size, []).append(run)
    return by_size


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
    """See ``reference.fused_experts``."""
    if np is None:
        return reference.fused_experts(
            hidden, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down, activation, gated, transposed, alpha, limit
        )
    if transposed:
        w_gate_up, w_down = w_gate_up.mT, w_down.mT
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = sort_picks(topk_weights, topk_ids, w_down.shape[0], wide)
    if rows is None:
        return hidden.new_zeros(hidden.shape[0], w_down.shape[1])
    act = activation, gated, alpha, limit
    outputs = _compile_or_loop(hidden, w_gate_up, w_down, b_gate_up, b_down, rows, act)
    return _weighted_sum(outputs, rows, hidden.shape[0]).to(hidden.dtype)
