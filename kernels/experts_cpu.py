"""``fused_experts`` on CPU: active experts' weights are read from memory once, and picks that are off cost nothing.

The picks become rows, sorted by expert.  A decode step has a few rows per expert and is bound by reading weights; how many
rows there are decides which routine multiplies.  GB/s of bf16 weights (64 experts, [1024, 1024] and [1024, 512], all
active), two threads of a Zen 5 whose other two cores were at work too, where copying memory reached 31 to 44:

    rows per expert                 1     2     4     8    12    16    32    64
    compiled, in blocks of four    37    39    39    26    20    15   8.2     -   by Inductor: below
    mm into an old result          19    19    18    18    17    15     -   8.4   oneDNN, which packs the weight in every call
    mm(weight, rows.T)             20    12    12    12    12    12     -   9.6   oneDNN, which packs the rows
    torch._grouped_mm               -     -    19    17    16    15     -   8.7   F.linear is as fast
    bmm of all experts              -     -    24    22    20    18     -    10   for equal numbers of rows only

* With up to 12 rows per active expert, on average, one function compiled by Inductor does all the work, in blocks of up to
  four rows, whose products are taken together where the weight lies.  A tile of an expert's weights that has come from
  memory meets all of the expert's blocks before the next one comes.  Rows of a block that no longer fit into the first
  cache (four of 4096 in float32) made it slower than the loop, so wide ones come in blocks of two and change to the loop
  earlier.  In a decode step everything but the weights counts, too: Python and its data have to come from memory again
  after every layer, and what takes 40 us in a tight loop takes 200.  Compiling takes a few seconds for each size of
  block, once: Inductor keeps the code on disk.
* Otherwise there is a loop over experts, whose results go into memory that is used again: with a new result for
  every product 512 tokens took 36 ms, and so 26.
* A machine without instructions for bfloat16 (a Zen 3) multiplies it in a plain loop: 512 tokens took 718 ms.  There the
  experts' weights are first copied to float32, one expert's at a time, which with the product takes 186 to 212 ms; and the
  compiled function serves up to 32 rows, or 16 wide ones: at 16 rows it took 49 ms where the loop took 107.
* What did not pay: blocks of more rows, two or four columns at once, rows in bfloat16 or in parts of their width,
  -fprefetch-loop-arrays, weights as pairs in int32.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fx.kernels import reference
from moe_fx.kernels.cpu import np

ROWS_IN_BLOCK = (4, 2)  # of narrow, of wide rows; fewer where active experts have at most two on average
MOST_ROWS_COMPILED = (12, 3)  # of an active expert, on average: the loop serves more
MOST_ROWS_COMPILED_SLOW = (32, 16)  # the same where the loop multiplies in float32
BYTES_OF_NARROW_ROWS = 2**15  # of four in float32: what stays in the first cache beside the weights that pass through
LEAST_BYTES_COMPILED = 2**15  # of one expert's gate and up weights: below (not measured) the loop
BYTES_OF_TILE = 2**17  # of weights that a thread keeps in its second cache
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
    def is_wide(self) -> bool:
        """Whether four rows are too many for a block."""
        return 4 * 4 * max(self.w_gate_up.shape[2], self.w_down.shape[2]) > BYTES_OF_NARROW_ROWS

    @property
    def tiles(self) -> int:
        """Into how many tiles of rows each of an expert's weights is cut: as many for both, of about BYTES_OF_TILE."""
        largest = max(self.w_gate_up[0].numel(), self.w_down[0].numel()) * self.w_gate_up.itemsize
        common = math.gcd(self.w_gate_up.shape[1], self.w_down.shape[1])
        return max(n for n in range(1, max(largest // BYTES_OF_TILE, 1) + 1) if common % n == 0)


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


def _steps(runs: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """The order in which blocks meet tiles of weights: expert, tile and block of every step [P, 3], P being B * tiles,
    and the step [B, tiles] of a block and a tile.

    A tile comes from memory for the first block of its expert.  The others follow at once, and find it in a cache.
    """
    block, tile = torch.arange(runs.shape[0], device=runs.device), torch.arange(tiles, device=runs.device)
    _, first, blocks = runs.unbind(1)
    step_of = (first * tiles + block - first)[:, None] + tile * blocks[:, None]
    step = torch.arange(runs.shape[0] * tiles, device=runs.device)
    expert, first, blocks = torch.ops.aten._unsafe_index.Tensor(runs, [step // tiles]).unbind(1)
    step = step - first * tiles
    return torch.stack((expert, step // blocks, first + step % blocks), 1), step_of


def _products(x: Tensor, weights: Tensor, bias: Tensor | None, steps: Tensor, step_of: Tensor) -> list[Tensor]:
    """The rows of x, as ``_chunked`` leaves them, times their block's expert's weight [N, H]: S times [B, N], float32.

    Compiled, these sums are one loop over steps, which loads a weight once, and nothing of [P, N / tiles, H] exists.
    """
    gather = torch.ops.aten._unsafe_index.Tensor  # without a check in the innermost loop
    tiles = step_of.shape[1]
    expert, tile, block = steps.unbind(1)
    weights_of_step = gather(weights.unflatten(1, (tiles, -1)), [expert, tile])  # [P, N / tiles, H]
    weights_of_step = weights_of_step.unflatten(2, (-1, x.shape[3])).float()
    rows_of_step = gather(x, [block])  # [P, H / CHUNK, S, CHUNK]
    sums = [(weights_of_step * rows_of_step[:, None, :, s]).sum((-1, -2)) for s in range(x.shape[2])]
    if bias is not None:
        sums = [row + gather(bias.unflatten(1, (tiles, -1)), [expert, tile]).float() for row in sums]
    return [gather(row, [step_of]).flatten(1) for row in sums]


def _mixture(
    act: tuple[Any, ...], has_biases: tuple[bool, bool], tiles: int, hidden: Tensor, topk_weights: Tensor,
    pick_to_place: Tensor, block_to_token: Tensor, runs: Tensor, w_gate_up: Tensor, w_down: Tensor, *biases: Tensor,
) -> Tensor:  # fmt: skip
    """[T, H], [T, K] and the tensors of ``Blocks`` -> [T, N]: the weighted sum of every token's experts."""
    b_gate_up, b_down = biases[0] if has_biases[0] else None, biases[-1] if has_biases[1] else None
    gather = torch.ops.aten._unsafe_index.Tensor
    x = _chunked([gather(hidden, [token]) for token in block_to_token.unbind(1)])
    steps = _steps(runs, tiles)
    gate_up = _products(x, w_gate_up, b_gate_up, *steps)
    inner = _chunked([reference.activate_gate_up(row.to(hidden.dtype), *act) for row in gate_up])
    outputs = _products(inner, w_down, b_down, *steps)
    return _sum_of_picks(torch.stack(outputs, 1).flatten(0, 1).to(hidden.dtype), pick_to_place, topk_weights)


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
        from torch._dynamo.convert_frame import compile_lock  # tracing patches torch for all threads of the process

        with compile_lock:
            if key not in _compiled:
                _compiled[key] = _compiled_or_none(lambda *tensors: function(*settings, *tensors), per_call, fixed)
    compiled = _compiled[key]
    return None if compiled is None else compiled(*per_call, *fixed)


def _compiled_or_none(
    function: Callable[..., Tensor], per_call: Sequence[Tensor], fixed: Sequence[Tensor]
) -> Callable[..., Tensor] | None:
    try:
        return _compile(function, per_call, fixed)
    except Exception as error:  # whatever stands in the compiler's way, there is another way to the same result
        if None not in _compiled.values():
            warnings.warn(f"fused_experts is slower than it could be: Inductor failed with {error!r:.300}", stacklevel=3)
        return None


@dataclass(frozen=True)
class Blocks:
    """The picks that are on, as rows in blocks of S, each block of one expert.

    Attributes:
        block_to_token: [B, S] int64: the tokens of a block's rows; an expert's last block repeats its last.
        runs: [B, 3] int64: a block's expert, that expert's first block, and how many blocks it has.
        pick_to_place: [T, K] int64, the pick's row among the B * S, -1 where it is off; two picks of a token on one
            expert share a row.
    """

    block_to_token: Tensor
    runs: Tensor
    pick_to_place: Tensor


def in_blocks(topk_ids: Tensor, num_experts: int, largest: int, most_rows: int) -> Blocks | None:
    """The picks [T, K] in blocks of one, two or ``largest`` rows; None where active experts have more than ``most_rows`` on
    average.

    In plain Python: for the picks of a decode step it takes half the time of NumPy's calls, whose code has to come from
    memory every time, since the weights of a layer have emptied the caches.
    """
    most_picks = 4 * most_rows * num_experts  # more than rows: a token's picks may have moved to one expert
    if topk_ids.numel() > most_picks and int((topk_ids >= 0).sum()) > most_picks:
        return None
    picks = topk_ids.tolist()
    tokens_of, row_of_pick = _by_expert(picks, num_experts)
    rows = [len(tokens) for tokens in tokens_of.values()]
    if sum(rows) > most_rows * len(rows):
        return None
    size = 1 if max(rows, default=1) == 1 else 2 if sum(rows) <= 2 * len(rows) else largest
    first_place: dict[int, int] = {}
    block_to_token: list[int] = []
    runs: list[int] = []
    for expert, tokens in sorted(tokens_of.items()):
        first, blocks = len(block_to_token) // size, -(-len(tokens) // size)
        first_place[expert] = first * size
        block_to_token += tokens + tokens[-1:] * (blocks * size - len(tokens))
        runs += (expert, first, blocks) * blocks
    experts = itertools.chain.from_iterable(picks)
    places = [-1 if row < 0 else first_place[expert] + row for expert, row in zip(experts, row_of_pick, strict=True)]
    return Blocks(_int64(block_to_token, (-1, size)), _int64(runs, (-1, 3)), _int64(places, topk_ids.shape))


def _by_expert(picks: list[list[int]], num_experts: int) -> tuple[dict[int, list[int]], list[int]]:
    """The tokens of every active expert, and which of them every pick is, -1 where it is off."""
    tokens_of: dict[int, list[int]] = {}
    row_of_pick = []
    for token, experts in enumerate(picks):
        for expert in experts:
            if not 0 <= expert < num_experts:
                row_of_pick.append(-1)
                continue
            tokens = tokens_of.get(expert)
            if tokens is None:
                tokens = tokens_of[expert] = [token]
            elif tokens[-1] != token:
                tokens.append(token)
            row_of_pick.append(len(tokens) - 1)
    return tokens_of, row_of_pick


def _int64(values: list[int], shape: Sequence[int]) -> Tensor:
    if not values:
        return torch.empty(0, dtype=torch.int64, device="cpu").view(shape)
    return torch.frombuffer(array("q", values), dtype=torch.int64).view(shape)  # half of torch.tensor's time


def _compiled_mixture(layer: Layer, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | None:
    """The result by one compiled function; None where none can be had, or a loop over the experts serves better."""
    if not layer.is_compiled:
        return None
    most_rows = (MOST_ROWS_COMPILED_SLOW if _is_slow(hidden.dtype) else MOST_ROWS_COMPILED)[layer.is_wide]
    blocks = in_blocks(topk_ids, len(layer.w_down), ROWS_IN_BLOCK[layer.is_wide], most_rows)
    if blocks is None:
        return None
    if len(blocks.runs) == 0:
        return hidden.new_zeros(len(hidden), layer.w_down.shape[1])
    tables = blocks.pick_to_place, blocks.block_to_token, blocks.runs
    tiles = 1 if len(hidden) == 1 else layer.tiles
    return _call(_mixture, (*layer.settings, tiles), (hidden, topk_weights, *tables), layer.parameters)


@dataclass(frozen=True)
class Projection:
    """Weights of all experts, [E, N, H] or a list of [N, H], the last two axes exchanged where ``transposed``, and biases."""

    weights: Tensor | list[Tensor]
    biases: Tensor | list[Tensor] | None
    transposed: bool = False

    @classmethod
    def of_parts(cls, weights: list[Tensor], biases: list[Tensor], transposed: bool) -> Projection:
        """From lists as ``reference.separate_experts`` takes them: of one stacked tensor, or of a tensor for each expert."""
        together = weights[0] if weights[0].dim() == 3 else weights
        return cls(together, None if not biases else biases[0] if biases[0].dim() == 2 else biases, transposed)

    @property
    def columns(self) -> int:
        """N."""
        return self.weights[0].shape[1 if self.transposed else 0]

    def __call__(self, x: Tensor, expert: int, result: Tensor, scratch: Tensor | None) -> None:
        """result [R, N] = x [R, H] times an expert's weight, and its bias; in float32 where there is a ``scratch`` for it."""
        weight = self.weights[expert].mT if self.transposed else self.weights[expert]
        if scratch is not None:
            x, weight = x.float(), _copied(weight, scratch)
        if x.dtype == torch.float32 and len(weight) % SLICES == 0:  # slices for the threads to share: half as fast without
            slices = weight.unflatten(0, (SLICES, -1)).mT  # [SLICES, H, N / SLICES]
            result.unflatten(1, (SLICES, -1)).copy_(torch.bmm(x.expand(SLICES, *x.shape), slices).transpose(0, 1))
        elif result.is_contiguous() and result.dtype == x.dtype:
            torch.mm(x, weight.mT, out=result)
        else:
            result.copy_(torch.mm(x, weight.mT))
        if self.biases is not None:
            result += self.biases[expert]


def _copied(weight: Tensor, scratch: Tensor) -> Tensor:
    """A weight in the dtype of ``scratch``, in its memory: memory that is new for every expert costs more than the product."""
    lies_by_row = weight.stride(1) == 1
    rows = weight if lies_by_row else weight.mT
    copy = scratch[: weight.numel()].view(rows.shape).copy_(rows)
    return copy if lies_by_row else copy.mT


@functools.cache
def _is_slow(dtype: torch.dtype) -> bool:
    """Whether this machine lacks instructions for products in a dtype, which then are many times faster in float32."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return asked is not None and not getattr(torch.ops.mkldnn, asked, lambda: False)()


def _looped(
    gate_up: list[Projection], down: Projection, act: tuple[Any, ...], hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    compiled: bool,
) -> Tensor:  # fmt: skip
    """The result by a loop over the experts.  What is projected up by more than one projection is put side by side."""
    num_out, widths = down.columns, [projection.columns for projection in gate_up]
    rows = sort_picks(topk_ids, len(down.weights))
    if rows is None:
        return hidden.new_zeros(len(hidden), num_out)
    token = torch.from_numpy(rows.row_to_token)
    outputs = hidden.new_empty(len(token), num_out)
    longest = int((rows.runs[:, 2] - rows.runs[:, 1]).max())
    projected = hidden.new_empty(longest, sum(widths))  # stays in the cache
    largest = max(projection.weights[0].numel() for projection in (*gate_up, down))
    scratch = hidden.new_empty(largest, dtype=torch.float32) if _is_slow(hidden.dtype) else None
    for expert, start, stop in rows.runs.tolist():
        x, of_expert = hidden.index_select(0, token[start:stop]), projected[: stop - start]
        for projection, part in zip(gate_up, of_expert.split(widths, 1), strict=True):
            projection(x, expert, part, scratch)
        down(reference.activate_gate_up(of_expert, *act), expert, outputs[start:stop], scratch)
    tables = outputs, torch.from_numpy(rows.pick_to_row), topk_weights
    result = _call(_sum_of_picks, (), tables) if compiled else None
    return _bagged(*tables) if result is None else result


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
        result = _compiled_mixture(layer, hidden, topk_weights, topk_ids)
        if result is not None:
            return result
        gate_up, down = Projection(w_gate_up, b_gate_up), Projection(w_down, b_down)
        return _looped([gate_up], down, layer.act, hidden, topk_weights, topk_ids, layer.is_compiled)


def separate_experts(
    hidden: Tensor,
    w_gate: list[Tensor],
    w_up: list[Tensor],
    w_down: list[Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    b_gate: list[Tensor],
    b_up: list[Tensor],
    b_down: list[Tensor],
    activation: str = "silu",
    gated: str = "concatenated",
    transposed: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """See ``reference.separate_experts``.  Nothing is put together: what is not picked is not read."""
    act = activation, gated, alpha, limit
    if np is None:
        parts = w_gate, w_up, w_down, topk_weights, topk_ids, b_gate, b_up, b_down
        return reference.separate_experts(hidden, *parts, activation, gated, transposed, alpha, limit)
    gate_up = [Projection.of_parts(w, b, transposed) for w, b in ((w_gate, b_gate), (w_up, b_up)) if w]
    down = Projection.of_parts(w_down, b_down, transposed)
    with torch.no_grad():
        return _looped(gate_up, down, act, hidden, topk_weights, topk_ids, compiled=False)


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
