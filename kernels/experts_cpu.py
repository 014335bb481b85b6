"""``fused_experts`` on CPU: every active expert's weights are read once, and picks that are off cost nothing.

The picks are sorted by expert, then the two projections run expert by expert over that expert's rows.  A decode step has
a few rows per expert and is bound by reading weights, so the number of rows decides which routine multiplies.  GB/s of
bf16 weights [1024, 1024] and [1024, 512], two threads of a Zen 5, where copying memory reaches 30:

    rows                          1     2     4     8    16
    F.linear, a new result      8.7   8.0  13.2  11.8  10.5   oneDNN; torch._grouped_mm is a loop of this
    mm into an old result      17.6  15.9  19.1  13.3  14.6   oneDNN
    PyTorch's dot products     32.7  15.3    11   5.4   2.6   what mm and mv do where oneDNN is off

So one row goes to PyTorch's own routine, two and three rows are padded to four, and every result goes into memory that
is in the cache.  In float32 slices of a weight, one for each thread, are faster than the whole (``bmm``: 16 to 22 GB/s
for 1 to 4 rows, ``mm``: 9 to 16).  In float16 a machine without such instructions multiplies several rows many times
faster in float32.  Weights packed beforehand for oneDNN would reach 22 for 2 to 8 rows in bf16, but a packed copy
doubles the memory that a model takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fx.kernels import reference
from moe_fx.kernels.cpu import np

PADDED_ROWS = 4  # what two and three rows are padded to
SLICES = 8


@dataclass(frozen=True)
class Rows:
    """The picks that are on, one row each, in ascending order of expert and then of token.

    Attributes:
        row_to_token: [R] int64.
        row_to_expert: [R] int64, NumPy.
        weights: [R], float32 or float64.
        runs: for every active expert its id, its first row and the row after its last.
    """

    row_to_token: Tensor
    row_to_expert: Any
    weights: Tensor
    runs: list[tuple[int, int, int]]


def sort_picks(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, wide: torch.dtype) -> Rows | None:
    """The picks as rows, those of one token on one expert merged; None where every pick is off."""
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.detach().numpy().ravel()
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
    return Rows(torch.from_numpy(row_to_token), row_to_expert, torch.from_numpy(weights), runs)


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
    token = rows.row_to_token.numpy()
    by_token = token.argsort(kind="stable")
    offsets = token[by_token].searchsorted(np.arange(num_tokens))
    row = torch.from_numpy(by_token)
    return torch.nn.functional.embedding_bag(
        row, outputs.to(rows.weights.dtype), torch.from_numpy(offsets), mode="sum", per_sample_weights=rows.weights[row]
    )


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
    settings: Any = (activation, gated, transposed, alpha, limit)
    if np is None:
        return reference.fused_experts(
            hidden, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down, *settings
        )
    if transposed:
        w_gate_up, w_down = w_gate_up.mT, w_down.mT
    num_tokens = hidden.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = sort_picks(topk_weights, topk_ids, w_down.shape[0], wide)
    if rows is None:
        return hidden.new_zeros(num_tokens, w_down.shape[1])
    num_rows = len(rows.weights)
    x = hidden.new_empty(num_rows + PADDED_ROWS - 1, hidden.shape[1])
    torch.index_select(hidden, 0, rows.row_to_token, out=x[:num_rows])
    gate_up = _project(x, w_gate_up, rows.runs)
    row_to_expert = None if b_gate_up is None and b_down is None else torch.from_numpy(rows.row_to_expert)
    if b_gate_up is not None:
        gate_up[:num_rows] += b_gate_up[row_to_expert]
    intermediate = reference.activate_gate_up(gate_up, activation, gated, alpha, limit)
    outputs = _project(intermediate, w_down, rows.runs)[:num_rows]
    if b_down is not None:
        outputs += b_down[row_to_expert]
    return _weighted_sum(outputs, rows, num_tokens).to(hidden.dtype)
