"""Step 4: recognise what an experts region computes, so that one op can do it and do nothing for a pick that is off.

The region is executed on *meanings* instead of numbers: "the ids in sorted order", "for every pick, the hidden state of
its token", "those rows, each times its own expert's matrix".  A rule says what one op makes of meanings; an op without
a rule, or meanings that do not go together, have no meaning, and then the region is left as it is.  At the end one
expression must stand: the picks' weighted outputs, summed over each token's picks (``mlp`` reads it).

Experts come in three forms.  Rows for picks (``Rows``): every pick's hidden state meets its expert's matrix.  A grid
(``Grid``): every expert runs on every token, and a matrix [T, E] of weights that is zero where nothing was picked weighs
the sum over experts.  One by one (``Lone``): each expert runs on every token, and what is added up are E such terms.
Both of the latter compute most of their products in vain, before the routing decision is even read.

Experts one by one may be modules of their own.  Whose a parameter is, nothing says but the weight that its result meets:
so such regions are read once more with every parameter taken for some expert's (``Own``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.find_sites import Routing
from moe_fx.passes.graph import argument, is_float, op
from moe_fx.passes.loops import (
    add_rows,
    added,
    any_pick,
    as_partial,
    coordinate,
    find,
    is_expert,
    look_up,
    only_coordinate,
    reach,
    write_rows,
)
from moe_fx.passes.meanings import (
    NUMBERS,
    At,
    Counts,
    Empty,
    Enumeration,
    Found,
    Gates,
    Grid,
    Halves,
    Hidden,
    Hot,
    Ids,
    Lone,
    Mask,
    Never,
    Numbers,
    One,
    Order,
    Output,
    Own,
    OwnMatrix,
    Partial,
    Picked,
    PickWeights,
    Places,
    Reached,
    Rows,
    Sorted,
    StackedBias,
    Tokens,
    Unstacked,
    Zero,
)
from moe_fx.passes.mlp import Experts, as_mlp
from moe_fx.passes.region import Region

# -------------------------------------------------------------------------------------------------- recognition


def recognise(routing: Routing, region: Region) -> Experts | str:
    """What the region computes, or why it could not be told."""
    problem = _unusable_decision(routing, region)
    if problem is not None:
        return problem
    found = _recognise(_Interpreter(routing, region), routing, region)
    return _recognise(_Interpreter(routing, region, own=True), routing, region) if found == _MODULES else found


def _recognise(interpreter: _Interpreter, routing: Routing, region: Region) -> Experts | str:
    for node in region.nodes:
        if interpreter.meaning(node) is None and not g.is_size(node):
            return _why_unknown(interpreter, node)
    result = interpreter.meaning(region.output)
    if not isinstance(result, Output):
        return "its experts' outputs do not come together as a weighted sum over the picks"
    problem = _unusable_surroundings(interpreter, routing, region)
    if problem is not None:
        return problem
    experts = _as_called(region, result) or as_mlp(region, result.expression)
    if isinstance(experts, str):
        return experts
    if len({g.dtype(n) for n in (experts.hidden, *experts.stacks)}) > 1:
        return "its experts' weights and input differ in dtype"
    return experts if experts.alike else "its experts differ in size"


def runs_our_op(routing: Routing) -> bool:
    """Whether the site's experts are a call of ``moe_fx::fused_experts`` already: the model asked for it."""
    return routing.experts is not None and g.qualified_op(routing.experts) == "moe_fx.fused_experts"


def _as_called(region: Region, result: Output) -> Experts | None:
    """The arguments of the model's own call of the op."""
    if result.expression[0] != "called":
        return None
    node = result.expression[1]
    names = [a.name for a in node.target._schema.arguments]
    given = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    return Experts(region, **{name: value for name, value in given.items() if name not in ("topk_weights", "topk_ids")})


def _called(interpreter: _Interpreter, node: Node) -> Output | None:
    """The op itself, called by the model."""
    weights, ids = argument(node, "topk_weights", 3), argument(node, "topk_ids", 4)
    as_routed = interpreter.meaning(weights) == PickWeights("flat") and interpreter.meaning(ids) == Ids("flat")
    return Output(("called", node)) if as_routed and g.same_shape(weights, ids) and g.rank(ids) == 2 else None


def _unusable_decision(routing: Routing, region: Region) -> str | None:
    """The region must read the ids in token order, and one form of the weights."""
    ids = routing.selection.ids
    edges = (*routing.cut.ids, *routing.cut.weights, *routing.cut.dense)
    if any(e.user not in region.nodes for e in edges):
        return "its picks are also read outside its experts"
    if any(u not in region.nodes for n in region.nodes[:-1] for u in n.users):
        return "its experts' inner values are also read outside them"
    if g.mutates_between(min(routing.router.linear, *region.nodes), region.output):
        return "a value is changed in place between its router and the end of its experts"
    weights = [n for n in region.replaced if not g.is_integer(n)]
    if len(weights) != 1 or g.rank(ids) != 2 or g.rank(weights[0]) != 2:
        return "its experts read the weights in another form than [T, K]"
    if routing.cut.dense:
        return None if g.size(weights[0], 1) == routing.router.num_experts else "its dense matrix of weights is not [T, E]"
    if not g.same_shape(weights[0], ids):
        return "its experts read the weights in another form than [T, K]"
    for node in region.replaced:
        while node not in (*weights, ids):
            if op(node) not in g.RESHAPES | g.CASTS:
                return f"its experts read the ids through {op(node)}"
            node = node.all_input_nodes[0]
    return None


def _unusable_surroundings(interpreter: _Interpreter, routing: Routing, region: Region) -> str | None:
    """What stands before the region, and is to go with it, must serve the region alone."""
    before = interpreter.before
    if any(u not in before and u not in region.nodes and u.users for n in before for u in n.users):
        return "its experts' inner values are also read outside them"
    if before and g.mutates_between(min(before), min(routing.router.linear, *region.nodes)):
        return "a value is changed in place between its router and the end of its experts"
    return None


def _why_unknown(interpreter: _Interpreter, node: Node) -> str:
    while (inner := next((i for i in node.all_input_nodes if interpreter.lacks_meaning(i)), None)) is not None:
        node = inner
    meanings = [interpreter.meaning(i) for i in node.all_input_nodes]
    gated = op(node) == "mul" and {Picked, Hidden} <= {*map(type, meanings)}
    if (gated or any(isinstance(m, Lone) and m.at is not None for m in meanings)) and not interpreter.own:
        return _MODULES
    return f"its experts' {op(node) or node.name} (node {node.name}) is not one that is known to be part of an MLP"


_MODULES = "its experts are modules of their own"


class _Interpreter:
    """Finds meanings, node by node, and remembers them.  ``own``: experts have parameters of their own."""

    def __init__(self, routing: Routing, region: Region, own: bool = False) -> None:
        self.own = own
        self.top_k = routing.selection.k
        self.num_experts = routing.router.num_experts
        self.tokens, _ = (g.expression(d) for d in g.shape(routing.selection.ids) or ())
        self._inside = set(region.nodes)
        self._dense = self._reads_stacks(routing, region)
        self._known: dict[Node, Any] = {}
        for node in region.replaced:
            self._known[node] = Gates("TE") if routing.cut.dense else Ids("flat") if g.is_integer(node) else PickWeights("flat")

    @property
    def before(self) -> list[Node]:
        """Experts' own nodes that stand outside the region, as they do not depend on the routing decision."""
        return [n for n in self._dense if isinstance(self._known.get(n), (Grid, Lone, Halves))]

    def meaning(self, node: object) -> Any:
        """The node's meaning, or None."""
        if not isinstance(node, Node):
            return None
        if node not in self._known:
            rule = _RULES.get(op(node)) if self._is_experts_own(node) else None
            found = rule(self, node) if rule is not None else None
            if found is None and self._is_own(node):
                found = Own(node)
            if found is None and node not in self._inside and self._has_a_row_for_each_token(node):
                found = Hidden(node)
            self._known[node] = found
        return self._known[node]

    def added(self, first: Partial | Zero, second: Partial) -> Any:
        """The sum of some experts' terms and of others'."""
        return added(first, second, self.num_experts)

    def lacks_meaning(self, node: Node) -> bool:
        """Whether an op of the experts' own, outside the region, was met and not understood."""
        return node in self._dense and node in self._known and self._known[node] is None and not self._is_leaf_stack(node)

    def stack(self, node: object, rank: int) -> Node | None:
        """A tensor with as many slices as there are experts: [E, ., .] or, of rank 2, [E, .]."""
        fits = isinstance(node, Node) and is_float(node) and g.rank(node) == rank and g.size(node, 0) == self.num_experts
        return node if fits and not isinstance(self.meaning(node), Numbers) else None  # type: ignore[return-value]

    def _is_experts_own(self, node: Node) -> bool:
        return node in self._inside or node in self._dense or op(node) in _PREPARES

    def _reads_stacks(self, routing: Routing, region: Region) -> dict[Node, None]:
        """What is computed from stacks [E, ...] between the router's input and the end of the experts, in graph order."""
        found: dict[Node, None] = {}
        node = routing.router.hidden
        while node is not region.output:
            node = node.next
            from_stack = any(i in found or self._is_leaf_stack(i) or self._is_own(i) for i in node.all_input_nodes)
            if from_stack and node.op == "call_function" and node not in self._inside:
                found[node] = None
        return found

    def _is_own(self, node: Node) -> bool:
        return self.own and is_float(node) and g.is_parameter(node)

    def _is_leaf_stack(self, node: Node) -> bool:
        while op(node) in g.LAYOUT | {"select", "unbind", "getitem"}:
            node = node.all_input_nodes[0]
        is_leaf = node.op in ("placeholder", "get_attr") and is_float(node)
        return is_leaf and g.rank(node) >= 2 and g.size(node, 0) == self.num_experts

    def _has_a_row_for_each_token(self, node: Node) -> bool:
        dims = g.shape(node)
        return dims is not None and is_float(node) and len(dims) == 2 and g.expression(dims[0]) == self.tokens


# -------------------------------------------------------------------------------------------------- picks as rows


def _same(interpreter: _Interpreter, node: Node) -> Any:
    """f(x) = x: another layout or dtype of the same numbers, where a row stays a row."""
    meaning = interpreter.meaning(node.args[0])
    if meaning is None or isinstance(meaning, (Hidden, One, Own, StackedBias)):
        return None  # a new layout of the experts' input is itself the input, unless a rule says what it is
    converts = g.dtype(node) != g.dtype(node.args[0]) and op(node) in g.CASTS
    if converts and (isinstance(meaning, OwnMatrix) or (isinstance(meaning, Numbers) and meaning.expression[0] != "weighted")):
        return None  # a model that computes in another dtype than it stores, or rounds on the way, means to
    if isinstance(meaning, (Grid, Gates)):
        return _relaid(interpreter, node, meaning)
    keeps_rows = op(node) in g.CASTS | _ROW_KEEPING or g.size(node, -1) == g.size(node.args[0], -1)
    if isinstance(meaning, (Rows, OwnMatrix, Output)) and not keeps_rows:
        return None
    if isinstance(meaning, Lone) and meaning.at is not None and not keeps_rows:
        return None
    as_it_was = isinstance(meaning, (Hot, Mask, Picked, Partial)) or (isinstance(meaning, Lone) and meaning.at is None)
    if as_it_was and not g.same_shape(node, node.args[0]):
        return None
    if isinstance(meaning, Found):
        return only_coordinate(meaning, node)
    return None if isinstance(meaning, (Sorted, Halves, Unstacked, Empty, Enumeration, At, Reached)) else meaning


_ROW_KEEPING = frozenset("unsqueeze squeeze contiguous clone alias detach".split())


def _sort(interpreter: _Interpreter, node: Node) -> Any:
    """sort(ids) = (ids in sorted order, their places)."""
    ascending = argument(node, "descending", 2, False) is False
    return Sorted(node) if interpreter.meaning(node.args[0]) == Ids("flat") and ascending else None


def _argsort(interpreter: _Interpreter, node: Node) -> Any:
    """argsort(ids) = places in sorted order; argsort(places) = their inverse."""
    meaning = interpreter.meaning(node.args[0])
    if argument(node, "descending", 2, False) is not False:
        return None
    if meaning == Ids("flat"):
        return Places(node)
    return replace(meaning, inverse=True) if isinstance(meaning, Places) and not meaning.inverse else None


def _getitem(interpreter: _Interpreter, node: Node) -> Any:
    meaning, index = interpreter.meaning(node.args[0]), node.args[1]
    if isinstance(meaning, Sorted):
        return Ids(meaning.order) if index == 0 else Places(meaning.order)
    if isinstance(meaning, Halves) and index in (0, 1):
        return replace(meaning.rows, expression=("half", meaning.rows.expression, index, "concatenated"))
    if isinstance(meaning, Found):
        return coordinate(meaning, index)
    if not isinstance(meaning, Unstacked) or not isinstance(index, int) or index < 0:
        return None
    return _slice_of(interpreter, meaning.stack, index)


def _floor_divide(interpreter: _Interpreter, node: Node) -> Any:
    """place // K = token."""
    meaning = interpreter.meaning(node.args[0])
    floors = op(node) == "floor_divide" or node.kwargs.get("rounding_mode") == "floor"
    if floors and node.args[1] == interpreter.top_k and isinstance(meaning, Places) and not meaning.inverse:
        return Tokens(meaning.order)
    if floors and node.args[1] == interpreter.top_k and isinstance(meaning, At) and meaning.axis == "N":
        return At(meaning.mask, "T")
    return _elementwise(interpreter, node)


def _index(interpreter: _Interpreter, node: Node) -> Any:
    """Reading rows by places, tokens or ids."""
    source, indices = node.args[0], node.args[1]
    if op(node) == "index_select":
        indices = [node.args[2]] if node.args[1] == 0 else []
    if not isinstance(indices, (list, tuple)) or not isinstance(source, Node) or not indices:
        return None
    if any(isinstance(interpreter.meaning(i), (At, Mask)) for i in indices):
        return look_up(interpreter, source, [*indices])
    if len(indices) != 1:
        return None
    rows, by = interpreter.meaning(source), interpreter.meaning(indices[0])
    stacked = isinstance(source, Node) and is_float(source) and g.size(source, 0) == interpreter.num_experts
    if isinstance(by, Ids) and isinstance(source, Node) and stacked:
        return OwnMatrix(source, by.order)
    if isinstance(by, Tokens) and isinstance(rows, Hidden):
        return Rows(by.order, ("input", rows.node))
    if isinstance(by, Places) and isinstance(rows, (PickWeights, Rows, Ids)):
        reorders = rows.order == "flat" if not by.inverse else rows.order == by.order
        return replace(rows, order="flat" if by.inverse else by.order) if reorders else None
    return None


def _repeat(interpreter: _Interpreter, node: Node) -> Any:
    """Every token's row K times over is a row for each pick."""
    rows = interpreter.meaning(node.args[0])
    repeats, dim = argument(node, "repeats", 1), argument(node, "dim", 2)
    fits = isinstance(rows, Hidden) and repeats == interpreter.top_k and dim == 0
    return Rows("flat", ("input", rows.node)) if fits else None


def _expand(interpreter: _Interpreter, node: Node) -> Any:
    """[T, 1, H] expanded to [T, K, H] is a row for each pick; [T, H] to [E, T, H] a grid."""
    before = interpreter.meaning(node.args[0])
    if isinstance(before, Grid) and before.axes == "T1C" and g.rank(node) == 3 and g.size(node, 1) == interpreter.top_k:
        return Rows("flat", before.expression)
    return _expand_grid(interpreter, node, before) if isinstance(before, (Grid, Hidden)) else _same(interpreter, node)


def _count(interpreter: _Interpreter, node: Node) -> Any:
    """histc(ids, E, 0, E - 1) = bincount(ids, minlength=E) = picks per expert."""
    experts = interpreter.num_experts
    wanted = [experts, 0, experts - 1] if op(node) == "histc" else [None, experts]
    given = list(node.args[1:]) + [v for k, v in node.kwargs.items() if k in ("bins", "min", "max", "minlength")]
    return Counts() if isinstance(interpreter.meaning(node.args[0]), Ids) and given == wanted else None


def _cumsum(interpreter: _Interpreter, node: Node) -> Any:
    """The running sum of counts is where each expert's rows end."""
    return Counts(ends=True) if interpreter.meaning(node.args[0]) == Counts() else None


def _grouped_mm(interpreter: _Interpreter, node: Node) -> Any:
    """Rows sorted by expert, each times its expert's matrix."""
    rows, stack, ends = interpreter.meaning(node.args[0]), node.args[1], interpreter.meaning(node.args[2])
    biased = any(isinstance(a, Node) for a in (*node.args[3:], *node.kwargs.values()))
    fits = isinstance(rows, Rows) and rows.order != "flat" and ends == Counts(ends=True) and not biased
    if not fits or not isinstance(stack, Node) or g.rank(stack) != 3 or g.size(stack, 0) != interpreter.num_experts:
        return None
    return replace(rows, expression=("times", rows.expression, stack, True))


def _bmm(interpreter: _Interpreter, node: Node) -> Any:
    """[N, out, in] @ [N, in, 1] and [N, 1, in] @ [N, in, out]: each pick's row times its own matrix."""
    left, right = (interpreter.meaning(a) for a in node.args[:2])
    if not isinstance(left, OwnMatrix) and not isinstance(right, OwnMatrix):
        return _matmul_grid(interpreter, node)
    if any(isinstance(m, OwnMatrix) and g.rank(m.stack) != 3 for m in (left, right)):
        return None
    if any(not _same_leading(a, node) for a in node.args[:2]):
        return None
    if isinstance(left, OwnMatrix) and isinstance(right, Rows) and left.order == right.order and g.size(node, -1) == 1:
        return replace(right, expression=("times", right.expression, left.stack, False))
    if isinstance(left, Rows) and isinstance(right, OwnMatrix) and left.order == right.order and g.size(node, -2) == 1:
        return replace(left, expression=("times", left.expression, right.stack, True))
    return None


def _chunk(interpreter: _Interpreter, node: Node) -> Any:
    """The two halves of a row."""
    rows, dim = interpreter.meaning(node.args[0]), argument(node, "dim", 2, 0)
    width = g.size(node.args[0], -1)
    parts = argument(node, "chunks", 1) if op(node) == "chunk" else None
    halves = parts == 2 or (width is not None and width % 2 == 0 and argument(node, "split_size", 1) == width // 2)
    last = dim in (-1, g.rank(node.args[0]) - 1) and _ends_in_columns(rows)
    return Halves(rows) if halves and last and width is not None and width % 2 == 0 else None


def _slice(interpreter: _Interpreter, node: Node) -> Any:
    """x[..., 0::2], x[..., 1::2]: every other column; x[..., :I], x[..., I:]: a half."""
    rows, width = interpreter.meaning(node.args[0]), g.size(node.args[0], -1)
    if g.same_shape(node, node.args[0]):
        return rows if isinstance(rows, (*NUMBERS, Gates, StackedBias)) else None  # x[:, :]
    if width is None or argument(node, "dim", 1, 0) not in (-1, g.rank(node) - 1):
        return None
    start, end, step = (argument(node, name, i) for i, name in ((2, "start"), (3, "end"), (4, "step")))
    if not all(isinstance(a, (int, type(None))) for a in (start, end, step)):
        return None
    span = (start or 0, width if end is None else min(int(end), width), step or 1)
    if rows == Gates("TE"):
        return Picked(span[0], "column") if span == (span[0], span[0] + 1, 1) and span[0] >= 0 else None
    if not _ends_in_columns(rows):
        return None
    spans = {(0, width, 2): (0, "interleaved"), (1, width, 2): (1, "interleaved"),
             (0, width // 2, 1): (0, "concatenated"), (width // 2, width, 1): (1, "concatenated")}  # fmt: skip
    return replace(rows, expression=("half", rows.expression, *spans[span])) if span in spans and width % 2 == 0 else None


def _ends_in_columns(meaning: object) -> bool:
    """Whether the last dimension holds a row's columns."""
    return isinstance(meaning, (Rows, Lone)) or (isinstance(meaning, Grid) and meaning.axes.endswith("C"))


def _index_put(interpreter: _Interpreter, node: Node) -> Any:
    """x[indices] = values, or += values."""
    into, indices, values = cast("tuple[Node, list[Node], Node]", node.args[:3])
    if not isinstance(interpreter.meaning(values), (Lone, Reached)) or None in indices:
        return _inverse(interpreter, node)
    if not argument(node, "accumulate", 3, False):
        return write_rows(interpreter, into, indices, values)
    return add_rows(interpreter, into, indices[0], values) if len(indices) == 1 else None


def _inverse(interpreter: _Interpreter, node: Node) -> Any:
    """empty[places] = 0, 1, 2, ...: the inverse of the places."""
    into, at, values = node.args[:3]
    by = interpreter.meaning(at[0]) if isinstance(at, (list, tuple)) and len(at) == 1 else None
    written = isinstance(interpreter.meaning(into), Empty) and isinstance(interpreter.meaning(values), Enumeration)
    adds = argument(node, "accumulate", 3, False)
    return replace(by, inverse=True) if isinstance(by, Places) and not by.inverse and written and not adds else None


def _sum(interpreter: _Interpreter, node: Node) -> Any:
    """[T, K, H] summed over K, or a weighted grid over E: each token's sum over its picks."""
    meaning, dims, rank = interpreter.meaning(node.args[0]), argument(node, "dim", 1), g.rank(node.args[0])
    keeps = argument(node, "keepdim", 2, False) is True
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or argument(node, "dtype", 3) is not None:
        return None
    dim = dims[0] % rank
    if meaning == Hot(weighted=True) and dim == 1 and not keeps:
        return Gates("TE")
    if isinstance(meaning, Picked) and meaning.form == "weights" and dim == 1:
        return replace(meaning, form="column" if keeps else "row")
    if isinstance(meaning, Grid) and meaning.expression[0] == "weighted" and meaning.axes[dim] == "E" and not keeps:
        return Output(meaning.expression) if meaning.axes.replace("E", "") == "TC" else None
    over_picks = isinstance(meaning, Rows) and meaning.order == "flat" and dim == 1 and not keeps
    shaped = rank == 3 and g.size(node.args[0], 1) == interpreter.top_k
    return Output(meaning.expression) if over_picks and shaped else None


def _index_add(interpreter: _Interpreter, node: Node) -> Any:
    """zeros[token] += row: each token's sum over its picks."""
    into, dim, at, source = node.args[:4]
    by, rows = interpreter.meaning(at), interpreter.meaning(source)
    if isinstance(rows, Lone):
        return add_rows(interpreter, into, at, source) if dim == 0 and argument(node, "alpha", 4, 1) == 1 else None
    starts_at_zero = op(into) in ("zeros", "zeros_like", "new_zeros") and argument(node, "alpha", 4, 1) == 1
    fits = isinstance(by, Tokens) and isinstance(rows, Rows) and by.order == rows.order and dim == 0
    return Output(rows.expression) if fits and starts_at_zero else None


def _past_experts(interpreter: _Interpreter, node: Node) -> Any:
    """ids >= E, ids > E - 1: nowhere."""
    least = node.args[1] if op(node) == "ge" else node.args[1] + 1 if isinstance(node.args[1], int) else None
    never = isinstance(least, int) and least >= interpreter.num_experts
    return Never() if never and isinstance(interpreter.meaning(node.args[0]), Ids) else None


def _masked_fill(interpreter: _Interpreter, node: Node) -> Any:
    """Filled nowhere."""
    return interpreter.meaning(node.args[0]) if interpreter.meaning(node.args[1]) == Never() else None


def _clamp(interpreter: _Interpreter, node: Node) -> Any:
    """clamp(ids, 0, E - 1) = ids."""
    ids = interpreter.meaning(node.args[0])
    if not isinstance(ids, Ids):
        return _elementwise(interpreter, node)
    name = op(node)
    low = None if name == "clamp_max" else argument(node, "min", 1)
    high = argument(node, "max", 1) if name == "clamp_max" else None if name == "clamp_min" else argument(node, "max", 2)
    keeps = (low is None or (isinstance(low, int) and low <= 0)) and (
        high is None or (isinstance(high, int) and high >= interpreter.num_experts - 1)
    )
    return ids if keeps else None


def _elementwise(interpreter: _Interpreter, node: Node) -> Any:
    """An op on numbers alone, or on numbers and constants, keeps its name in the expression."""
    meanings = [interpreter.meaning(a) if isinstance(a, Node) else a for a in node.args]
    name = op(node)
    if name == "add" and any(isinstance(m, Grid) for m in meanings):
        pairs = zip(meanings, node.args, strict=True)
        meanings = [m if isinstance(m, (Grid, StackedBias)) else _as_bias(interpreter, a) for m, a in pairs]
    if any(m is None and isinstance(a, Node) for m, a in zip(meanings, node.args, strict=True)):
        return None
    if name in ("mul", "add") and len(meanings) == 2:
        if node.kwargs:
            return None  # add(x, y, alpha=2)
        if not isinstance(meanings[0], NUMBERS):  # commutative: numbers first
            meanings.reverse()
        if not all(isinstance(m, (*NUMBERS, int, float)) for m in meanings):
            return _joined(interpreter, node, name, *meanings)
    numbers = [m for m in meanings if isinstance(m, NUMBERS)]
    constant = all(isinstance(m, (*NUMBERS, int, float, type(None))) for m in meanings)
    if not numbers or not constant or len({replace(m, expression=()) for m in numbers}) > 1 or not _unbroadcast(node):
        return None
    if any(isinstance(v, Node) for v in node.kwargs.values()):
        return None
    given = [m.expression if isinstance(m, NUMBERS) else m for m in meanings]
    named = [(k, v) for k, v in sorted(node.kwargs.items()) if isinstance(v, (int, float, str))]
    return replace(numbers[0], expression=(name, *given, *named))


def _as_bias(interpreter: _Interpreter, node: object) -> StackedBias | None:
    """[E, C] as it is, which meets a grid's last two dimensions."""
    stack = interpreter.stack(node, 2)
    return StackedBias(stack, "EC") if stack is not None else None


def _unbroadcast(node: Node) -> bool:
    """Whether every tensor the op reads has the shape of its result."""
    return all(g.same_shape(i, node) for i in node.all_input_nodes)


def _same_leading(operand: object, node: Node) -> bool:
    """Whether a product's operand has the leading dimensions of its result."""
    left, right = g.shape(operand), g.shape(node)
    return left is not None and right is not None and [*map(g.expression, left[:-2])] == [*map(g.expression, right[:-2])]


def _joined(interpreter: _Interpreter, node: Node, name: str, first: Any, second: Any) -> Any:
    """Numbers times weights, numbers plus biases, and terms of a sum over experts."""
    nodes = node.all_input_nodes
    if name == "mul" and isinstance(first, Numbers):
        return _weighted(node, first, second)
    if name == "mul" and {type(first), type(second)} == {PickWeights, Hot}:
        weights, hot = (next(n for n in nodes if isinstance(interpreter.meaning(n), kind)) for kind in (PickWeights, Hot))
        per_pick = g.rank(weights) == 3 and g.size(weights, -1) == 1 and g.size(weights, 1) == interpreter.top_k
        return Hot(weighted=True) if interpreter.meaning(hot) == Hot() and per_pick and g.same_shape(hot, node) else None
    if name == "mul" and {type(first), type(second)} == {PickWeights, Mask} and _unbroadcast(node):
        mask = first if isinstance(first, Mask) else second
        return Picked(mask.expert, "weights") if mask.axes == "TK" else None
    if name == "add" and Reached in (type(first), type(second)):
        return reach(first, second) if _unbroadcast(node) else None
    if name == "add" and isinstance(first, Numbers):
        return _biased(interpreter, node, first, second)
    return _added(interpreter, node, first, second) if name == "add" else None


def _weighted(node: Node, numbers: Numbers, weights: Any) -> Any:
    """Every row times its weight."""
    result = replace(numbers, expression=("weighted", numbers.expression))
    ranks = {g.rank(n) for n in node.all_input_nodes}
    columns = {g.size(n, -1) for n in node.all_input_nodes}
    if isinstance(numbers, Rows) and weights == PickWeights(numbers.order):
        return result if ranks == {g.rank(node)} and columns == {1, g.size(node, -1)} else None
    if isinstance(numbers, Grid) and isinstance(weights, Gates):
        return result if _aligned(numbers.axes, weights.axes, {"T": "T", "E": "E", "F": "F", "C": "1", "1": "1"}) else None
    if isinstance(numbers, Lone) and isinstance(weights, Picked) and weights.form == "column" and numbers.at == weights.at:
        fits = numbers.expert in (None, weights.expert)
        return (result if numbers.at is not None else as_partial(result, weights.expert)) if fits else None
    return None


def _biased(interpreter: _Interpreter, node: Node, numbers: Numbers, bias: Any) -> Any:
    """Every row plus its expert's bias."""
    if isinstance(bias, (int, float)):
        return None
    stack, fits = None, False
    if isinstance(numbers, Rows) and isinstance(bias, OwnMatrix):
        stack, fits = bias.stack, bias.order == numbers.order and _unbroadcast(node)
    if isinstance(numbers, Grid) and isinstance(bias, StackedBias):
        stack, fits = bias.stack, _aligned(numbers.axes, bias.axes, {"T": "1", "E": "E", "C": "C", "1": "1"})
    if isinstance(numbers, Lone) and isinstance(bias, One):
        stack, fits = bias.stack, bias.expert == numbers.expert
    if isinstance(numbers, Lone) and numbers.expert is None and isinstance(bias, Own) and g.rank(bias.node) == 1:
        same = g.size(bias.node, 0) == g.size(node, -1)
        return replace(numbers, expression=("biased", numbers.expression, bias.node)) if same else None
    if stack is None or not fits or g.rank(stack) != 2 or g.size(stack, 1) != g.size(node, -1):
        return None
    return replace(numbers, expression=("biased", numbers.expression, stack))


def _aligned(axes: str, other: str, wanted: dict[str, str]) -> bool:
    """Whether dimensions that broadcast from the right meet as they should."""
    return [wanted.get(a) for a in axes] == [*other.rjust(len(axes), "1")]


def _added(interpreter: _Interpreter, node: Node, first: Any, second: Any) -> Any:
    """The sum of some experts' terms and of others'."""
    terms = [m for m in (first, second) if not (isinstance(m, Zero) or (isinstance(m, (int, float)) and m == 0))]
    if len(terms) == 1 and isinstance(terms[0], (Partial, Output)):
        kept = next(n for n in node.all_input_nodes if interpreter.meaning(n) is terms[0])
        return terms[0] if g.same_shape(kept, node) else None
    if not isinstance(first, Partial) or not isinstance(second, Partial) or not _unbroadcast(node) or first.per_pick:
        return None
    return interpreter.added(first, second)


# ---------------------------------------------------------------------------------------- every expert on every token


def _relaid(interpreter: _Interpreter, node: Node, meaning: Grid | Gates) -> Any:
    """A grid's or a matrix's dimensions in another shape: [E, T, C] as [E T, C] and back, ones put in or taken out."""
    if g.same_shape(node, node.args[0]):
        return meaning
    columns = g.size(node.args[0], -1)
    sizes = {"T": interpreter.tokens, "E": interpreter.num_experts, "C": columns}
    left, axes = [*meaning.axes.replace("F", "ET").replace("1", "")], ""
    for size in map(g.expression, g.shape(node) or ()):
        if left and size == sizes[left[0]]:
            axes += left.pop(0)
        elif left[:2] == ["E", "T"] and size == interpreter.num_experts * sizes["T"]:
            axes, left = axes + "F", left[2:]
        elif size == 1:
            axes += "1"
        else:
            return None
    return None if left else replace(meaning, axes=axes)


def _unsqueeze(interpreter: _Interpreter, node: Node) -> Any:
    source, dim = node.args[0], argument(node, "dim", 1)
    meaning = interpreter.meaning(source)
    if not isinstance(dim, int):
        return None
    at = dim % g.rank(node)
    stack = interpreter.stack(source, 2)
    if stack is not None and (meaning is None or (isinstance(meaning, Hidden) and g.is_parameter(stack))):
        return StackedBias(stack, "EC"[:at] + "1" + "EC"[at:])
    if isinstance(meaning, Hidden) and at < 2:
        return Grid("1TC" if at == 0 else "T1C", ("input", meaning.node))
    if isinstance(meaning, (Grid, Gates)):
        return replace(meaning, axes=meaning.axes[:at] + "1" + meaning.axes[at:])
    if isinstance(meaning, Picked) and meaning.form == "row" and (at, g.rank(node)) == (1, 2):
        return replace(meaning, form="column")
    return _same(interpreter, node)


def _expand_grid(interpreter: _Interpreter, node: Node, before: Grid | Hidden) -> Any:
    """A dimension of one that becomes a dimension of experts."""
    axes = before.axes if isinstance(before, Grid) else "TC"
    expression = before.expression if isinstance(before, Grid) else ("input", before.node)
    dims = [g.expression(d) for d in g.shape(node) or ()]
    if len(dims) < 3:
        return None
    named = [
        axis if axis != "1" or size == 1 else "E" if size == interpreter.num_experts and "E" not in axes else "?"
        for axis, size in zip(axes.rjust(len(dims), "1"), dims, strict=True)
    ]
    return Grid("".join(named), expression) if "?" not in named else None


def _repeat_grid(interpreter: _Interpreter, node: Node) -> Any:
    """x.repeat(E, 1): all tokens, E times over."""
    meaning, times = interpreter.meaning(node.args[0]), argument(node, "repeats", 1)
    if not isinstance(times, (list, tuple)) or times[0] != interpreter.num_experts or any(t != 1 for t in times[1:]):
        return None
    if isinstance(meaning, Hidden) and len(times) in (2, 3):
        return Grid("FC" if len(times) == 2 else "ETC", ("input", meaning.node))
    return Grid("ETC", meaning.expression) if isinstance(meaning, Grid) and meaning.axes == "1TC" and len(times) == 3 else None


def _permute(interpreter: _Interpreter, node: Node) -> Any:
    """Dimensions in another order."""
    meaning, order = interpreter.meaning(node.args[0]), g.axes_before(node)
    if isinstance(meaning, (One, Own)):
        return replace(meaning, turned=not meaning.turned) if order == [1, 0] else None
    if isinstance(meaning, (Grid, Gates, Hot)):
        return replace(meaning, axes="".join(meaning.axes[d] for d in order))
    return None


def _matmul(interpreter: _Interpreter, node: Node) -> Any:
    """x @ W in all its forms: a pick's own matrix, all experts' matrices, one expert's."""
    left, right = (interpreter.meaning(a) for a in node.args[:2])
    if isinstance(left, OwnMatrix) or isinstance(right, OwnMatrix):
        return _bmm(interpreter, node)
    if isinstance(right, (One, Own)):
        return _times_one(left, right, transposed=not right.turned)
    return _matmul_grid(interpreter, node)


def _matmul_grid(interpreter: _Interpreter, node: Node) -> Any:
    """[E, T, in] @ [E, in, out]: every row times its expert's matrix; [T, 1, E] @ [T, E, C]: the sum over experts."""
    left, right = (interpreter.meaning(a) for a in node.args[:2])
    if left == Gates("T1E") and isinstance(right, Grid) and right.axes == "TEC":
        return Output(("weighted", right.expression))
    stack = interpreter.stack(node.args[1], 3)
    if stack is None:
        return None
    if isinstance(left, Hidden):
        return Grid("ETC", ("times", ("input", left.node), stack, True))
    if not isinstance(left, Grid) or left.axes not in ("1TC", "ETC", "TE1C"):
        return None
    return Grid(left.axes.replace("1T", "ET"), ("times", left.expression, stack, True))


def _baddbmm(interpreter: _Interpreter, node: Node) -> Any:
    """bias + [E, T, in] @ [E, in, out]."""
    bias, left = (interpreter.meaning(a) for a in node.args[:2])
    stack = interpreter.stack(node.args[2], 3)
    scaled = bool(node.kwargs) or stack is None
    if scaled or not isinstance(bias, StackedBias) or not isinstance(left, Grid) or (bias.axes, left.axes) != ("E1C", "ETC"):
        return None
    return Grid("ETC", ("biased", ("times", left.expression, stack, True), bias.stack))


def _select(interpreter: _Interpreter, node: Node) -> Any:
    """W[e], or the weights' column e."""
    source, dim, index = node.args[0], node.args[1], node.args[2]
    if not isinstance(index, int) or index < 0:
        return None
    if interpreter.meaning(source) == Gates("TE"):
        return Picked(index, "row") if dim in (1, -1) else None
    return _slice_of(interpreter, cast(Node, source), index) if dim == _axis_of_slices(interpreter, source) else None


def _unbind(interpreter: _Interpreter, node: Node) -> Any:
    source, dim = node.args[0], argument(node, "dim", 1, 0)
    return Unstacked(source) if dim == _axis_of_slices(interpreter, source) else None


def _axis_of_slices(interpreter: _Interpreter, source: object) -> int | None:
    """The axis along which a stack, or the masks of all experts' picks, or places found, are taken apart."""
    meaning = interpreter.meaning(source)
    if isinstance(meaning, Hot):
        return meaning.axes.index("E") if not meaning.weighted else None
    if isinstance(meaning, Found):
        return 1 if op(source) == "nonzero" else None
    return 0 if interpreter.stack(source, 3) or interpreter.stack(source, 2) else None


def _slice_of(interpreter: _Interpreter, source: Node, index: int) -> Any:
    meaning = interpreter.meaning(source)
    if isinstance(meaning, Hot):
        return Mask(index, meaning.axes.replace("E", "")) if index < interpreter.num_experts else None
    return coordinate(meaning, index) if isinstance(meaning, Found) else One(source, index)


def _linear(interpreter: _Interpreter, node: Node) -> Any:
    """x @ W[e].T + b[e]."""
    x, weight = (interpreter.meaning(a) for a in node.args[:2])
    product = _times_one(x, weight, transposed=weight.turned) if isinstance(weight, (One, Own)) else None
    bias = argument(node, "bias", 2)
    return product if bias is None or product is None else _biased(interpreter, node, product, interpreter.meaning(bias))


def _times_one(x: Any, weight: One | Own, transposed: bool) -> Lone | None:
    """A row for each token, times one expert's matrix."""
    expert, stack, rank = (weight.expert, weight.stack, 3) if isinstance(weight, One) else (None, weight.node, 2)
    if isinstance(x, Hidden):
        x = Lone(expert, ("input", x.node))
    if g.rank(stack) != rank or not isinstance(x, Lone):
        return None
    begins = x.expression[0] == "input" and (x.at is None or expert in (None, x.at.expert))
    return Lone(expert, ("times", x.expression, stack, transposed), x.at) if begins or x.expert == expert else None


def _stacked(interpreter: _Interpreter, node: Node) -> Any:
    """stack of every expert's rows, in order."""
    parts, dim = node.args[0], argument(node, "dim", 1, 0)
    rows = [interpreter.meaning(p) for p in parts] if isinstance(parts, (list, tuple)) else []
    if not all(isinstance(r, Lone) for r in rows) or [r.expert for r in rows] != [*range(interpreter.num_experts)]:
        return None
    if len({r.expression for r in rows}) > 1 or dim not in (0, 1, -2):
        return None
    return Grid("ETC" if dim == 0 else "TEC", rows[0].expression)


def _one_hot(interpreter: _Interpreter, node: Node) -> Any:
    ids, classes = node.args[0], argument(node, "num_classes", 1)
    per_token = interpreter.meaning(ids) == Ids("flat") and g.rank(ids) == 2
    return Hot() if per_token and classes == interpreter.num_experts else None


def _where(interpreter: _Interpreter, node: Node) -> Any:
    """The weights of one expert's picks, 0 for all others."""
    if len(node.args) != 3:
        return find(interpreter, node)
    condition, weights, other = node.args
    mask = interpreter.meaning(condition)
    zero = isinstance(other, (int, float)) and other == 0
    fits = isinstance(mask, Mask) and mask.axes == "TK" and interpreter.meaning(weights) == PickWeights("flat")
    return Picked(mask.expert, "weights") if fits and zero and _unbroadcast(node) else None


# ------------------------------------------------------------------------------------------------------------ einsum


@dataclass(frozen=True)
class _Factor:
    """One operand of an einsum: its letters, and what each of them runs over (C, R: columns and rows, not told apart)."""

    letters: str
    axes: str
    meaning: Any
    node: Node

    @property
    def index(self) -> dict[str, str]:
        """Letters that count tokens, picks or experts."""
        return {letter: axis for letter, axis in zip(self.letters, self.axes, strict=True) if axis in "TKEN"}


def _einsum(interpreter: _Interpreter, node: Node) -> Any:
    """Rows times matrices, weighted, summed over picks or experts: any of it in one op."""
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or "." in equation or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    factors = [_factor(interpreter, *pair) for pair in zip(inputs.split(","), operands, strict=True)]
    if any(f is None or len(set(f.letters)) < len(f.letters) for f in factors):
        return None
    index: dict[str, str] = {}
    for f in factors:
        if any(index.setdefault(letter, axis) != axis for letter, axis in f.index.items()):  # type: ignore[union-attr]
            return None
    if len(set(index.values())) < len(index):
        return None  # two letters for one thing: all pairs of tokens, say
    if any(letter in index and letter not in f.index for f in factors for letter in f.letters):  # type: ignore[union-attr]
        return None  # one letter for two things
    kinds = {
        kind: [f for f in factors if isinstance(f.meaning, types)]  # type: ignore[union-attr]
        for kind, types in (("rows", (Hidden, *NUMBERS)), ("matrix", (OwnMatrix, _Stack)), ("weights", (PickWeights, Gates)),
                            ("hot", (Hot,)))
    }  # fmt: skip
    return _contract(interpreter, kinds, index, output)  # type: ignore[arg-type]


class _Stack:
    """A tensor [E, ., .] as it is."""


def _factor(interpreter: _Interpreter, letters: str, node: Node) -> _Factor | None:
    """What each dimension of an operand runs over, or None."""
    meaning: Any = interpreter.meaning(node)
    if meaning is None and interpreter.stack(node, 3) is not None:
        meaning = _Stack()
    axes = _axes(interpreter, node, meaning)
    return _Factor(letters, axes, meaning, node) if axes is not None and len(axes) == len(letters) else None


def _axes(interpreter: _Interpreter, node: Node, meaning: Any) -> str | None:
    rank, fixed = g.rank(node), {Hidden: "TC", _Stack: "ERC", Hot: "TKE"}
    if type(meaning) in fixed:
        return fixed[type(meaning)]
    if isinstance(meaning, (Grid, Gates)):
        return meaning.axes if set(meaning.axes) <= set("TEC") else None
    tail = {Rows: "C", OwnMatrix: "RC", PickWeights: ""}.get(type(meaning))
    if tail is None or (isinstance(meaning, OwnMatrix) and g.rank(meaning.stack) != 3):
        return None
    dims = [g.expression(d) for d in g.shape(node) or ()]
    by_token = meaning.order == "flat" and dims[:2] == [interpreter.tokens, interpreter.top_k]
    lead = "N" if rank == 1 + len(tail) else "TK" if rank == 2 + len(tail) and by_token else None
    return lead + tail if lead is not None else None


def _contract(interpreter: _Interpreter, kinds: dict[str, list[_Factor]], index: dict[str, str], output: str) -> Any:
    rows, matrix, weights, hot = kinds["rows"], kinds["matrix"], kinds["weights"], kinds["hot"]
    kept = "".join(index.get(letter, "C") for letter in output)
    if not rows and not matrix and len(weights) == len(hot) == 1 and hot[0].meaning == Hot():
        return Gates("TE") if kept == "TE" and weights[0].axes == "TK" else None
    if len(rows) != 1 or hot or len(matrix) > 1 or len(weights) > 1:
        return None
    (row,), order = rows, None
    column = next((letter for letter, axis in zip(row.letters, row.axes, strict=True) if axis == "C"), None)
    expression = ("input", row.node) if isinstance(row.meaning, Hidden) else row.meaning.expression
    orders = {f.meaning.order for f in (*rows, *matrix, *weights) if isinstance(f.meaning, (Rows, OwnMatrix, PickWeights))}
    for product in matrix:
        first, second = product.letters[-2], product.letters[-1]
        if column not in (first, second):
            return None
        stack = product.node if isinstance(product.meaning, _Stack) else product.meaning.stack
        expression = ("times", expression, stack, first == column)
        inner, column = column, second if first == column else first
        if any(letter in output for letter in inner) or column in row.letters:
            return None
    if weights:
        expression = ("weighted", expression)
    if len(orders) > 1 or not output.endswith(column or "?") or "C" in kept[:-1]:
        return None
    order = orders.pop() if orders else None
    summed = set(index.values()) - set(kept)
    return _placed(expression, order, set(index.values()), kept, summed, weighed=bool(weights))


def _placed(expression: tuple, order: Order | None, axes: set[str], kept: str, summed: set[str], weighed: bool) -> Any:
    """The result of a contraction by the dimensions that are left of it."""
    if not summed and kept in ("TKC", "NC") and order is not None and axes in ({"T", "K"}, {"N"}):
        return Rows(order, expression)
    if not summed and sorted(kept) == ["C", "E", "T"] and order is None:
        return Grid(kept, expression)
    if weighed and kept == "TC" and (axes, summed) in (({"T", "K"}, {"K"}), ({"T", "E"}, {"E"})):
        return Output(expression)
    return None


# ------------------------------------------------------------------------------------------------------------- rules


_RULES: dict[str, Callable[[_Interpreter, Node], Any]] = {
    **dict.fromkeys(g.RESHAPES | g.CASTS, _same),
    **dict.fromkeys(g.TRANSPOSES, _permute),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda interpreter, node: Zero()),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "repeat": _repeat_grid,
    "matmul": _matmul,
    "mm": _matmul,
    "linear": _linear,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "select": _select,
    "unbind": _unbind,
    "stack": _stacked,
    "one_hot": _one_hot,
    "eq": is_expert,
    "any": any_pick,
    **dict.fromkeys(("nonzero", "nonzero_numpy"), find),
    "where": _where,
    "fused_experts": _called,
    "sort": _sort,
    "argsort": _argsort,
    "getitem": _getitem,
    "floor_divide": _floor_divide,
    "div": _floor_divide,
    "index": _index,
    "index_select": _index,
    "repeat_interleave": _repeat,
    "histc": _count,
    "bincount": _count,
    "cumsum": _cumsum,
    "_grouped_mm": _grouped_mm,
    "grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,
    "bmm": _bmm,
    "chunk": _chunk,
    "split": _chunk,
    "slice": _slice,
    "index_put": _index_put,
    "empty_like": lambda interpreter, node: Empty() if isinstance(interpreter.meaning(node.args[0]), Places) else None,
    "arange": lambda interpreter, node: Enumeration() if len(node.args) == 1 else None,
    "sum": _sum,
    "index_add": _index_add,
    **dict.fromkeys(("ge", "gt"), _past_experts),
    "masked_fill": _masked_fill,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys("mul add silu gelu relu sigmoid square pow".split(), _elementwise),
}
#: Ops that prepare the experts' input before the routing decision is read, so that they stand outside the region.
_PREPARES = frozenset("repeat_interleave expand repeat arange zeros zeros_like new_zeros select unbind".split()) | (
    g.RESHAPES | g.CASTS | g.TRANSPOSES
)
