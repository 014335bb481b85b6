"""``fused_experts`` on CPU: active experts' weights are read from memory once, and picks that are off cost nothing.

The picks become rows, sorted by expert.  A decode step has a few rows per expert and is bound by reading weights, so the
number of rows decides which routine multiplies.  GB/s of bf16 weights (64 experts, [1024, 1024] and [1024, 512], all
active), two threads of a Zen 5 whose other two cores were at work too.  The first line is from other runs than the rest:
compare the two only roughly, since copying memory reached 35 to 63 there and 31 to 41 here:

    rows per expert                 1     2     4     6     8    12    16    64
    compiled, one block of rows    37    36    34    25    17    10   5.5     -   by Inductor: below
    mm into an old result          19    19    18    18    18    17    15   8.4   oneDNN, which packs the weight in every call
    mm(weight, rows.T)             20    12    12    12    12    12    12   9.6   oneDNN, which packs the rows
    torch._grouped_mm               -     -    19     -    17    16    15   8.7   F.linear is as fast
    bmm of all experts              -     -    24     -    22    20    18    10   for equal numbers of rows only

* An expert with up to 12 rows, if it is large, goes to a function compiled by Inductor, in blocks of 2, 4 or 6 rows.
  Their products are taken together where the weight lies.  Beyond 24 KB of rows in float32 in a block (6 of 1024)
  it was slower than the loop, presumably because they no longer fit into the first cache: wider rows go to the loop.  One
  token has a function of its own, with the weighted sum.  Compiling takes a few seconds for each size of block, once:
  Inductor keeps the code on disk.
* For the others there is a loop over experts, whose results go into memory that is used again: with a new result for
  every product 512 tokens took 36 ms, and so 26.
* What did not pay: two or four columns at once, -fprefetch-loop-arrays, weights as pairs in int32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fx.kernels import reference
from moe_fx.kernels.cpu import np

ROWS_TO_BLOCK = (0, 2, 2, 4, 4, 6, 6, 4, 4, 4, 4, 4, 4)  # an expert's rows: how many of them a compiled function takes at once
LEAST_BYTES_COMPILED = 2**15  # of one expert's gate and up weights: below (not measured) the loop
MOST_BYTES_OF_ROWS = 3 * 2**13  # of a block of more than two, in float32: what fits into the first cache beside the weight
SLICES = 8
CHUNK = 32  # columns of one row that lie together in a block


@dataclass(frozen=True)
class Layer:
    """The experts of a layer, weights as [E, N, H] in any strides, and what stands between their projections."""

    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None
    b_down: Tensor | None
    act: tuple[Any, ...]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that are there."""
        return tuple(p for p in (self.w_gate_up, self.w_down, self.b_gate_up, self.b_down) if p is not None)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What decides about the code that is compiled, beside shapes and dtypes."""
        return self.act, (self.b_gate_up is not None, self.b_down is not None)

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled functions pay: weights are large, and lie row by row."""
        weight = self.w_gate_up
        is_large = weight[0].numel() * weight.itemsize >= LEAST_BYTES_COMPILED
        return is_large and weight.dtype != torch.float64 and weight.stride(2) == self.w_down.stride(2) == 1

    @property
    def rows_to_block(self) -> list[int]:
        """For each number of rows of an expert, and in the last place for all larger ones, the block; 0: by the loop."""
        if not self.is_compiled:
            return [0]
        width = max(self.w_gate_up.shape[2], self.w_down.shape[2])
        return [size if size <= 2 or size * width * 4 <= MOST_BYTES_OF_ROWS else 0 for size in (*ROWS_TO_BLOCK, 0)]


@dataclass(frozen=True)
class Rows:
    """The picks that are on, in NumPy: one row for each expert of a token, in ascending order of expert, then token.

    Attributes:
        row_to_token: [R] int64.
        runs: [A, 3] int64: for every active expert its id, its first row and the row after its last.
        pick_to_row: [T, K] int64, -1 where the pick is off; two picks of a token on one expert share a row.
    """

    row_to_token: Any
    runs: Any
    pick_to_row: Any


def sort_picks(topk_ids: Tensor, num_experts: int) -> Rows | None:
    """The picks [T, K] as rows; None where every pick is off."""
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.numpy().ravel()
    picks = ((ids >= 0) & (ids < num_experts)).nonzero()[0]
    if len(picks) == 0:
        return None
    key = ids[picks].astype(np.int64) * num_tokens + picks // top_k
    order = key.argsort(kind="stable")
    key = key[order]
    is_new = _differs_from_previous(key)
    pick_to_row = np.full(topk_ids.shape, -1)
    pick_to_row.ravel()[picks[order]] = is_new.cumsum() - 1
    row_to_expert, row_to_token = np.divmod(key[is_new], num_tokens)
    start = _differs_from_previous(row_to_expert).nonzero()[0]
    runs = np.stack((row_to_expert[start], start, np.append(start[1:], len(row_to_expert))), 1)
    return Rows(row_to_token, runs, pick_to_row)


def _differs_from_previous(values: Any) -> Any:
    return np.concatenate(([True], values[1:] != values[:-1]))


def _chunked(rows: list[Tensor]) -> Tensor:
    """Rows of blocks, S times [B, H], as [B, H / CHUNK, S, CHUNK]: what is read together lies together."""
    chunk = CHUNK if rows[0].shape[1] % CHUNK == 0 else rows[0].shape[1]
    return torch.stack([row.unflatten(1, (-1, chunk)).float() for row in rows], 2)


def _products(x: Tensor, weights: Tensor, bias: Tensor | None, block_to_expert: Tensor) -> list[Tensor]:
    """The rows of x, as ``_chunked`` leaves them, times their block's expert's weight [N, H]: S times [B, N], float32.

    Compiled, these sums are one loop, which loads a weight once, and nothing of [B, N, H] exists.
    """
    gather = torch.ops.aten._unsafe_index.Tensor  # without a check in the innermost loop
    weights_of_block = gather(weights, [block_to_expert]).unflatten(2, (-1, x.shape[3])).float()
    sums = [(weights_of_block * x[:, None, :, s]).sum((-1, -2)) for s in range(x.shape[2])]
    return sums if bias is None else [row + gather(bias, [block_to_expert]).float() for row in sums]


def _outputs_of_blocks(
    act: tuple[Any, ...], has_biases: tuple[bool, bool], hidden: Tensor, block_to_expert: Tensor, block_to_token: Tensor,
    w_gate_up: Tensor, w_down: Tensor, *biases: Tensor,
) -> Tensor:  # fmt: skip
    """[T, H], [B], [B, S] and the parameters that are there -> [B * S, N]: in a block S tokens meet one expert."""
    b_gate_up, b_down = biases[0] if has_biases[0] else None, biases[-1] if has_biases[1] else None
    gather = torch.ops.aten._unsafe_index.Tensor
    x = _chunked([gather(hidden, [token]) for token in block_to_token.unbind(1)])
    gate_up = _products(x, w_gate_up, b_gate_up, block_to_expert)
    inner = _chunked([reference.activate_gate_up(row.to(hidden.dtype), *act) for row in gate_up])
    outputs = _products(inner, w_down, b_down, block_to_expert)
    return torch.stack(outputs, 1).flatten(0, 1).to(hidden.dtype)


def _sum_of_experts(
    act: tuple[Any, ...], has_biases: tuple[bool, bool], hidden: Tensor, experts: Tensor, weights: Tensor, *parameters: Tensor
) -> Tensor:
    """[1, H], [B], [B] and the parameters that are there -> [1, N]: the weighted sum of one token's experts."""
    outputs = _outputs_of_blocks(act, has_biases, hidden, experts, torch.zeros_like(experts)[:, None], *parameters)
    return (outputs.float() * weights[:, None]).sum(0, keepdim=True).to(hidden.dtype)


def _sum_of_picks(outputs: Tensor, pick_to_place: Tensor, topk_weights: Tensor) -> Tensor:
    """[places, N], [T, K], [T, K] -> [T, N]: every token's weighted sum; a pick without a place (-1) is off."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    gather = torch.ops.aten._unsafe_index.Tensor
    total = torch.zeros((), dtype=wide, device=outputs.device)
    for place, weight in zip(pick_to_place.unbind(1), topk_weights.to(wide).unbind(1), strict=True):
        weighted = gather(outputs, [place.clamp(min=0)]).to(wide) * weight[:, None]
        total = total + torch.where(place[:, None] >= 0, weighted, 0)
    return total.to(outputs.dtype)


def _bagged(outputs: Tensor, pick_to_place: Tensor, topk_weights: Tensor) -> Tensor:
    """The same where nothing is compiled: a copy of ``outputs``, and not one for every pick."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    on = pick_to_place >= 0  # [T, K]
    ends = on.sum(1).cumsum(0)
    bags = torch.cat((ends.new_zeros(1), ends[:-1]))
    weights = topk_weights.to(wide)[on]
    summed = torch.nn.functional.embedding_bag(pick_to_place[on], outputs.to(wide), bags, mode="sum", per_sample_weights=weights)
    return summed.to(outputs.dtype)


def _compile(function: Callable[..., Tensor], per_call: Sequence[Tensor], fixed: Sequence[Tensor]) -> Callable[..., Tensor]:
    """``function`` for tensors of these kinds, of which those ``per_call`` may have any number of rows.

    Traced here and not by ``torch.compile``, whose guards cost time in every call, and which gives up in a process that
    meets many layers.
    """
    import torch._inductor
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(tensor: Tensor, rows: DimDynamic) -> Tensor:
        sizes = [rows, *[DimDynamic.STATIC] * (tensor.dim() - 1)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    # For as few rows as three Inductor lets the threads share the columns, too.
    examples: list[Any] = [fake(t.new_zeros(3, *t.shape[1:]), DimDynamic.DYNAMIC) for t in per_call]
    examples += [fake(t, DimDynamic.STATIC) for t in fixed]
    with torch.no_grad(), mode:
        graph = make_fx(function)(*examples)
    options = {
        "assert_indirect_indexing": False,
        "cpp.enable_floating_point_contract_flag": "fast",  # multiply and add in one instruction
        "cpp.threads": torch.get_num_threads(),
        "size_asserts": False,
    }
    return torch._inductor.compile(graph, examples, options)


_compiled: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}  # None: could not be compiled


def _call(
    function: Callable[..., Tensor], settings: tuple[Any, ...], per_call: Sequence[Tensor], fixed: Sequence[Tensor] = ()
) -> Tensor | None:
    """The result of ``function``, compiled at the first call of this kind; None where that fails, with a warning
    at the first time."""
    kinds = [(t.dtype, t.shape[1:]) for t in per_call] + [(t.dtype, t.shape, t.stride()) for t in fixed]
    key = function.__name__, settings, torch.get_num_threads(), *kinds
    if key not in _compiled:
        try:
            _compiled[key] = _compile(lambda *tensors: function(*settings, *tensors), per_call, fixed)
        except Exception as error:  # whatever stands in the compiler's way, there is another way to the same result
            if None not in _compiled.values():
                warnings.warn(f"fused_experts is slower than it could be: Inductor failed with {error!r:.300}", stacklevel=2)
            _compiled[key] = None
    compiled = _compiled[key]
    return None if compiled is None else compiled(*per_call, *fixed)


def _blocked(layer: Layer, hidden: Tensor, block_to_expert: Tensor, block_to_token: Tensor) -> Tensor | None:
    """``_outputs_of_blocks``, compiled; None where it cannot be."""
    return _call(_outputs_of_blocks, layer.settings, (hidden, block_to_expert, block_to_token), layer.parameters)


def _blocks(runs: Any, size: int) -> tuple[Any, Any]:
    """Runs of rows in blocks of ``size``: each block's expert [B] and rows [B, S].  The last of a run repeats its last row."""
    expert, start, stop = runs.T
    blocks = (stop - start + size - 1) // size
    number = np.arange(blocks.sum()) - (blocks.cumsum() - blocks).repeat(blocks)  # of the block in its run
    row = (start.repeat(blocks) + number * size)[:, None] + np.arange(size)
    return expert.repeat(blocks), np.minimum(row, stop.repeat(blocks)[:, None] - 1)


def _looped(layer: Layer, hidden: Tensor, rows: Rows, runs: Any) -> tuple[Tensor, Any]:
    """The outputs of some experts' rows, [R, N], by a loop over the experts, and which rows these are, [R]."""
    row = np.concatenate([np.arange(start, stop) for _, start, stop in runs.tolist()])
    token = torch.from_numpy(rows.row_to_token[row])
    outputs = hidden.new_empty(len(row), layer.w_down.shape[1])
    gate_up = hidden.new_empty(int((runs[:, 2] - runs[:, 1]).max()), layer.w_gate_up.shape[1])  # stays in the cache
    place = 0
    for expert, start, stop in runs.tolist():
        here = slice(place, place := place + stop - start)
        of_expert = gate_up[: stop - start]
        _linear(hidden.index_select(0, token[here]), layer.w_gate_up, layer.b_gate_up, expert, of_expert)
        inner = reference.activate_gate_up(of_expert, *layer.act)
        _linear(inner, layer.w_down, layer.b_down, expert, outputs[here])
    return outputs, row


def _linear(x: Tensor, weights: Tensor, biases: Tensor | None, expert: int, result: Tensor) -> None:
    """result [R, N] = x [R, H] times an expert's weight, [N, H], and its bias."""
    if x.dtype == torch.float16:  # many times faster in float32, where a machine lacks instructions for it
        result.copy_(x.float() @ weights[expert].float().mT)
    elif x.dtype == torch.float32 and weights.shape[1] % SLICES == 0:  # slices for the threads to share: half as fast without
        slices = weights[expert].unflatten(0, (SLICES, -1)).mT  # [SLICES, H, N / SLICES]
        result.unflatten(1, (SLICES, -1)).copy_(torch.bmm(x.expand(SLICES, *x.shape), slices).transpose(0, 1))
    else:
        torch.mm(x, weights[expert].mT, out=result)
    if biases is not None:
        result += biases[expert]


def _outputs(layer: Layer, hidden: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """The outputs of all rows, [places, N], and each pick's place there, [T, K].  None where every pick is off."""
    rows = sort_picks(topk_ids, len(layer.w_down))
    if rows is None:
        return None
    lengths = rows.runs[:, 2] - rows.runs[:, 1]
    sizes = np.array(layer.rows_to_block)
    size_of_run = sizes[np.minimum(lengths, len(sizes) - 1)]
    parts = []
    for size in np.unique(size_of_run).tolist():
        runs, outputs = rows.runs[size_of_run == size], None
        if size:
            block_to_expert, row = _blocks(runs, size)
            tables = torch.from_numpy(block_to_expert), torch.from_numpy(rows.row_to_token[row])
            outputs = _blocked(layer, hidden, *tables)
        parts.append(_looped(layer, hidden, rows, runs) if outputs is None else (outputs, row.ravel()))
    row = np.concatenate([row for _, row in parts])
    row_to_place = np.full(len(rows.row_to_token) + 1, -1)  # the last, -1, is for picks that are off
    row_to_place[row] = np.arange(len(row))  # of a row that was repeated any place will do
    outputs = parts[0][0] if len(parts) == 1 else torch.cat([outputs for outputs, _ in parts])
    return outputs, torch.from_numpy(row_to_place[rows.pick_to_row])


def _of_one_token(layer: Layer, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | None:
    """The result for one token, in one compiled call; None where it cannot be compiled, and where every pick is off.

    NumPy's calls, and a second compiled one, would take a fifth of the time when other work has emptied the caches.
    """
    merged: dict[int, float] = {}
    for expert, weight in zip(topk_ids[0].tolist(), topk_weights[0].tolist(), strict=True):
        if 0 <= expert < len(layer.w_down):
            merged[expert] = merged.get(expert, 0.0) + weight
    if not merged:
        return None
    experts, weights = torch.tensor(list(merged)), torch.tensor(list(merged.values()))
    return _call(_sum_of_experts, layer.settings, (hidden, experts, weights), layer.parameters)


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
    layer = Layer(w_gate_up, w_down, b_gate_up, b_down, (activation, gated, alpha, limit))
    hidden, topk_weights = hidden.contiguous(), topk_weights.contiguous()  # as what is compiled expects them
    with torch.no_grad():
        if len(hidden) == 1 and layer.is_compiled:
            result = _of_one_token(layer, hidden, topk_weights, topk_ids)
            if result is not None:
                return result
        found = _outputs(layer, hidden, topk_ids)
        if found is None:
            return hidden.new_zeros(hidden.shape[0], w_down.shape[1])
        result = _call(_sum_of_picks, (), (*found, topk_weights)) if layer.is_compiled else None
        return _bagged(*found, topk_weights) if result is None else result


def experts_by_pick(
    hidden: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    b_gate_up: Tensor | None = None, b_down: Tensor | None = None, activation: str = "silu", gated: str = "concatenated",
    transposed: bool = False, alpha: float = 1.702, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """See ``reference.fused_experts``: for few picks, all on, in a graph that Inductor compiles; ``transposed`` is False.

    A product with one column is what Inductor makes a sum, without copying the weights.
    """
    tokens, picks = topk_ids.shape
    ids = topk_ids.flatten()
    rows = hidden.unsqueeze(1).expand(-1, picks, -1).reshape(tokens * picks, -1, 1)
    gate_up = torch.bmm(w_gate_up[ids], rows).squeeze(-1)
    if b_gate_up is not None:
        gate_up = gate_up + b_gate_up[ids]
    inner = reference.activate_gate_up(gate_up, activation, gated, alpha, limit)
    outputs = torch.bmm(w_down[ids], inner.unsqueeze(-1)).squeeze(-1)
    if b_down is not None:
        outputs = outputs + b_down[ids]
    wide = torch.float64 if outputs.dtype == torch.float64 else torch.float32  # promote_types would be traced
    weighted = outputs.view(tokens, picks, -1).to(wide) * topk_weights.unsqueeze(-1).to(wide)
    return weighted.sum(1).to(hidden.dtype)
