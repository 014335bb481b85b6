"""Step 4: recognise what an experts region computes, so that one op can do it and do nothing for a pick that is off.

The region is executed on *meanings* instead of numbers: "the ids in sorted order", "for every pick, the hidden state of
its token", "those rows, each times its own expert's matrix".  A rule says what one op makes of meanings; an op without
a rule, or meanings that do not go together, have no meaning, and then the region is left as it is.  At the end one
expression must stand: the picks' weighted outputs, summed over each token's picks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.find_sites import Routing
from moe_fx.passes.graph import argument, is_float, op
from moe_fx.passes.region import Region


@dataclass(frozen=True)
class Experts:
    """A recognised region: the arguments of ``moe_fx::fused_experts`` that are not the routing decision.

    ``w_gate_up`` is [E, G, H] and ``w_down`` [E, H, I], or both with their last two axes exchanged (``transposed``).
    """

    region: Region
    hidden: Node
    w_gate_up: Node
    w_down: Node
    b_gate_up: Node | None
    b_down: Node | None
    activation: str
    gated: str
    transposed: bool
    alpha: float
    limit: float | None

    @property
    def stacks(self) -> list[Node]:
        """The parameters that the op reads."""
        return [n for n in (self.w_gate_up, self.w_down, self.b_gate_up, self.b_down) if n is not None]


# ------------------------------------------------------------------------------------------------------ meanings

#: The order of rows that stand for picks: "flat" is token by token; a ``sort`` node stands for the order it made.
Order = Node | str


@dataclass(frozen=True)
class Ids:
    """Each pick's expert."""

    order: Order


@dataclass(frozen=True)
class Places:
    """For each row of ``order``, which flat pick it is; ``inverse``: for each flat pick, its row."""

    order: Order
    inverse: bool = False


@dataclass(frozen=True)
class Tokens:
    """Each pick's token."""

    order: Order


@dataclass(frozen=True)
class Counts:
    """Picks per expert; ``ends``: where each expert's rows end when picks are sorted by expert."""

    ends: bool = False


@dataclass(frozen=True)
class PickWeights:
    """Each pick's weight."""

    order: Order


@dataclass(frozen=True)
class Hidden:
    """The experts' input, a row for each token."""

    node: Node


@dataclass(frozen=True)
class OwnMatrix:
    """For each pick, its expert's slice of a parameter stacked by expert."""

    stack: Node
    order: Order


@dataclass(frozen=True)
class Rows:
    """For each pick a row of numbers, given by an expression (see ``_ACTIVATIONS`` for how they are spelt)."""

    order: Order
    expression: tuple


@dataclass(frozen=True)
class Empty:
    """Memory not yet written."""


@dataclass(frozen=True)
class Enumeration:
    """0, 1, 2, ... as many as there are picks."""


@dataclass(frozen=True)
class Halves:
    """The two parts of rows split down the middle."""

    rows: Rows


@dataclass(frozen=True)
class Sorted:
    """What ``sort`` returns of ids: themselves in order, and their places."""

    order: Order


@dataclass(frozen=True)
class Output:
    """Each token's sum over its picks."""

    expression: tuple


# -------------------------------------------------------------------------------------------------- recognition


def recognise(routing: Routing, region: Region) -> Experts | str:
    """What the region computes, or why it could not be told."""
    problem = _unusable_decision(routing, region)
    if problem is not None:
        return problem
    interpreter = _Interpreter(routing, region)
    for node in region.nodes:
        meaning = interpreter.meaning(node)
        if meaning is None:
            return f"its experts' {op(node) or node.name} (node {node.name}) is not one that is known to be part of an MLP"
    result = interpreter.meaning(region.output)
    if not isinstance(result, Output) or interpreter.hidden is None:
        return "its experts' outputs do not come together as a weighted sum over the picks"
    experts = _as_mlp(region, interpreter.hidden, result.expression)
    if experts is None:
        return "its experts' activation is not one that is known"
    if len({g.dtype(n) for n in (experts.hidden, experts.w_gate_up, experts.w_down)}) > 1:
        return "its experts' weights and input differ in dtype"
    return experts


def _unusable_decision(routing: Routing, region: Region) -> str | None:
    """The region must read the ids in token order, and one form of the weights."""
    edges = (*routing.cut.ids, *routing.cut.weights, *routing.cut.dense)
    if any(e.user not in region.nodes for e in edges):
        return "its picks are also read outside its experts"
    if any(u not in region.nodes for n in region.nodes[:-1] for u in n.users):
        return "its experts' inner values are also read outside them"
    if g.mutates_between(min(routing.router.linear, *region.nodes), region.output):
        return "a value is changed in place between its router and the end of its experts"
    weights = [n for n in region.replaced if not g.is_integer(n)]
    if len(weights) != 1 or not g.same_shape(weights[0], routing.selection.ids) or g.rank(routing.selection.ids) != 2:
        return "its experts read the weights in another form than [T, K]"
    for ids in region.replaced:
        while ids not in (*weights, routing.selection.ids):
            if op(ids) not in g.RESHAPES | g.CASTS:
                return f"its experts read the ids through {op(ids)}"
            ids = ids.all_input_nodes[0]
    return None


class _Interpreter:
    """Finds meanings, node by node, and remembers them."""

    def __init__(self, routing: Routing, region: Region) -> None:
        self.top_k = routing.selection.k
        self.num_experts = routing.router.num_experts
        self.hidden: Node | None = None
        self._ids = routing.selection.ids
        self._inside = set(region.nodes)
        self._known: dict[Node, Any] = {}
        for node in region.replaced:
            self._known[node] = Ids("flat") if g.is_integer(node) else PickWeights("flat")

    def meaning(self, node: object) -> Any:
        """The node's meaning, or None."""
        if not isinstance(node, Node):
            return None
        if node not in self._known:
            rule = _RULES.get(op(node)) if node in self._inside or op(node) in _PREPARES else None
            found = rule(self, node) if rule is not None else None
            if found is None and node not in self._inside and self._has_a_row_for_each_token(node):
                found = Hidden(node)
            self._known[node] = found
        return self._known[node]

    def _has_a_row_for_each_token(self, node: Node) -> bool:
        dims, ids = g.shape(node), g.shape(self._ids)
        if dims is None or ids is None or not g.is_float(node) or len(dims) != 2 or len(ids) != 2:
            return False
        return g.expression(dims[0]) == g.expression(ids[0])

    def take_hidden(self, hidden: Hidden) -> bool:
        """All experts must read one hidden state."""
        if self.hidden is None:
            self.hidden = hidden.node
        return self.hidden is hidden.node


def _same(interpreter: _Interpreter, node: Node) -> Any:
    """f(x) = x: another layout or dtype of the same numbers, where a row stays a row."""
    meaning = interpreter.meaning(node.args[0])
    if isinstance(meaning, Hidden):
        return None  # a new layout of the experts' input is itself the input, unless a rule says what it is
    converts = g.dtype(node) != g.dtype(node.args[0]) and op(node) in g.CASTS
    if converts and (isinstance(meaning, OwnMatrix) or (isinstance(meaning, Rows) and meaning.expression[0] != "weighted")):
        return None  # a model that computes in another dtype than it stores, or rounds on the way, means to
    keeps_rows = op(node) in g.CASTS | _ROW_KEEPING or g.size(node, -1) == g.size(node.args[0], -1)
    if isinstance(meaning, (Rows, OwnMatrix, Output)) and not keeps_rows:
        return None
    return meaning if isinstance(meaning, (Ids, Places, Tokens, PickWeights, Rows, OwnMatrix, Output, Counts)) else None


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
    return None


def _floor_divide(interpreter: _Interpreter, node: Node) -> Any:
    """place // K = token."""
    meaning = interpreter.meaning(node.args[0])
    floors = op(node) == "floor_divide" or node.kwargs.get("rounding_mode") == "floor"
    if floors and node.args[1] == interpreter.top_k and isinstance(meaning, Places) and not meaning.inverse:
        return Tokens(meaning.order)
    return _elementwise(interpreter, node)


def _index(interpreter: _Interpreter, node: Node) -> Any:
    """Reading rows by places, tokens or ids."""
    source, indices = node.args[0], node.args[1]
    if op(node) == "index_select":
        indices = [node.args[2]] if node.args[1] == 0 else []
    if not isinstance(indices, (list, tuple)) or len(indices) != 1:
        return None
    rows, by = interpreter.meaning(source), interpreter.meaning(indices[0])
    stacked = isinstance(source, Node) and is_float(source) and g.size(source, 0) == interpreter.num_experts
    if isinstance(by, Ids) and isinstance(source, Node) and stacked:
        return OwnMatrix(source, by.order)
    if isinstance(by, Tokens) and isinstance(rows, Hidden) and interpreter.take_hidden(rows):
        return Rows(by.order, ("input",))
    if isinstance(by, Places) and isinstance(rows, (PickWeights, Rows, Ids)):
        reorders = rows.order == "flat" if not by.inverse else rows.order == by.order
        return replace(rows, order="flat" if by.inverse else by.order) if reorders else None
    return None


def _repeat(interpreter: _Interpreter, node: Node) -> Any:
    """Every token's row K times over is a row for each pick."""
    rows = interpreter.meaning(node.args[0])
    repeats, dim = argument(node, "repeats", 1), argument(node, "dim", 2)
    fits = isinstance(rows, Hidden) and repeats == interpreter.top_k and dim == 0
    return Rows("flat", ("input",)) if fits and interpreter.take_hidden(rows) else None


def _expand(interpreter: _Interpreter, node: Node) -> Any:
    """[T, 1, H] expanded to [T, K, H] is a row for each pick."""
    before = node.args[0]
    if not (isinstance(before, Node) and op(before) == "unsqueeze" and before.args[1] in (1, -2)):
        return _same(interpreter, node)
    rows = interpreter.meaning(before.args[0])
    fits = isinstance(rows, Hidden) and g.rank(node) == 3 and g.size(node, 1) == interpreter.top_k
    return Rows("flat", ("input",)) if fits and interpreter.take_hidden(rows) else None


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
    last = dim in (-1, g.rank(node.args[0]) - 1)
    return Halves(rows) if isinstance(rows, Rows) and halves and last and width is not None and width % 2 == 0 else None


def _slice(interpreter: _Interpreter, node: Node) -> Any:
    """x[..., 0::2], x[..., 1::2]: every other column; x[..., :I], x[..., I:]: a half."""
    rows, width = interpreter.meaning(node.args[0]), g.size(node.args[0], -1)
    if not isinstance(rows, Rows) or width is None or argument(node, "dim", 1, 0) not in (-1, g.rank(node) - 1):
        return None
    start, end, step = (argument(node, name, i) for i, name in ((2, "start"), (3, "end"), (4, "step")))
    if not all(isinstance(a, (int, type(None))) for a in (start, end, step)):
        return None
    span = (start or 0, width if end is None else min(int(end), width), step or 1)
    spans = {(0, width, 2): (0, "interleaved"), (1, width, 2): (1, "interleaved"),
             (0, width // 2, 1): (0, "concatenated"), (width // 2, width, 1): (1, "concatenated")}  # fmt: skip
    if span == (0, width, 1):
        return rows
    return replace(rows, expression=("half", rows.expression, *spans[span])) if span in spans and width % 2 == 0 else None


def _inverse(interpreter: _Interpreter, node: Node) -> Any:
    """empty[places] = 0, 1, 2, ...: the inverse of the places."""
    into, at, values = node.args[:3]
    by = interpreter.meaning(at[0]) if isinstance(at, (list, tuple)) and len(at) == 1 else None
    written = isinstance(interpreter.meaning(into), Empty) and isinstance(interpreter.meaning(values), Enumeration)
    adds = argument(node, "accumulate", 3, False)
    return replace(by, inverse=True) if isinstance(by, Places) and not by.inverse and written and not adds else None


def _sum(interpreter: _Interpreter, node: Node) -> Any:
    """[T, K, H] summed over K: each token's sum over its picks."""
    rows, dims = interpreter.meaning(node.args[0]), argument(node, "dim", 1)
    over_picks = dims in ([1], [-2], (1,), (-2,)) and argument(node, "keepdim", 2, False) is False
    shaped = g.rank(node.args[0]) == 3 and g.size(node.args[0], 1) == interpreter.top_k
    return Output(rows.expression) if isinstance(rows, Rows) and rows.order == "flat" and over_picks and shaped else None


def _index_add(interpreter: _Interpreter, node: Node) -> Any:
    """zeros[token] += row: each token's sum over its picks."""
    into, dim, at, source = node.args[:4]
    by, rows = interpreter.meaning(at), interpreter.meaning(source)
    starts_at_zero = op(into) in ("zeros", "zeros_like", "new_zeros") and argument(node, "alpha", 4, 1) == 1
    fits = isinstance(by, Tokens) and isinstance(rows, Rows) and by.order == rows.order and dim == 0
    return Output(rows.expression) if fits and starts_at_zero else None


def _elementwise(interpreter: _Interpreter, node: Node) -> Any:
    """An op on rows alone, or on rows and numbers, keeps its name in the expression."""
    operands = [interpreter.meaning(a) if isinstance(a, Node) else a for a in node.args]
    rows = [o for o in operands if isinstance(o, Rows)]
    if not rows or len({r.order for r in rows}) > 1:
        return None
    name, order = op(node), rows[0].order
    if name in ("mul", "add") and node.kwargs:
        return None  # add(x, y, alpha=2)
    others = [o for o in operands if not isinstance(o, Rows)]
    if name == "mul" and others == [PickWeights(order)]:
        return Rows(order, ("weighted", rows[0].expression))
    if name == "add" and len(others) == 1 and isinstance(others[0], OwnMatrix) and others[0].order == order:
        if g.rank(others[0].stack) != 2:
            return None
        return Rows(order, ("biased", rows[0].expression, others[0].stack))
    if any(not isinstance(o, (int, float)) and o is not None for o in others):
        return None
    given = [o.expression if isinstance(o, Rows) else o for o in operands]
    named = [(k, v) for k, v in sorted(node.kwargs.items()) if isinstance(v, (int, float, str))]
    if name in ("mul", "add"):  # commutative: rows first
        given.sort(key=lambda o: not isinstance(o, tuple))
    return Rows(order, (name, *given, *named))


_RULES: dict[str, Callable[[_Interpreter, Node], Any]] = {
    **dict.fromkeys(g.RESHAPES | g.CASTS, _same),
    "expand": _expand,
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
    "index_put": _inverse,
    "empty_like": lambda interpreter, node: Empty() if isinstance(interpreter.meaning(node.args[0]), Places) else None,
    "arange": lambda interpreter, node: Enumeration() if len(node.args) == 1 else None,
    "sum": _sum,
    "index_add": _index_add,
    **dict.fromkeys("mul add silu gelu relu sigmoid square pow clamp clamp_min clamp_max".split(), _elementwise),
}
#: Ops that prepare the experts' input before the routing decision is read, so that they stand outside the region.
_PREPARES = frozenset({"repeat_interleave", "expand", "arange"}) | g.RESHAPES | g.CASTS


# -------------------------------------------------------------------------------------------------- expressions


def _as_mlp(region: Region, hidden: Node, expression: tuple) -> Experts | None:
    """weighted(down(act(gate_up(input)))), with or without biases, as arguments of the op; None if it is not that."""
    if expression[0] != "weighted":
        return None
    inner, b_down = _unbias(expression[1])
    if inner[0] != "times":
        return None
    _, activated, w_down, down_transposed = inner
    for match in _ACTIVATIONS:
        found = match(activated)
        if found is None:
            continue
        gate_up, kind = found
        projected, b_gate_up = _unbias(gate_up)
        if projected[0] != "times" or projected[1] != ("input",) or projected[3] != down_transposed:
            return None
        w_gate_up = projected[2]
        return _stacked_as_stored(
            Experts(region, hidden, w_gate_up, w_down, b_gate_up, b_down, transposed=down_transposed, **kind)
        )
    return None


def _unbias(expression: tuple) -> tuple[tuple, Node | None]:
    return (expression[1], expression[2]) if expression[0] == "biased" else (expression, None)


def _stacked_as_stored(experts: Experts) -> Experts:
    """Both matrices by the tensors the model stores, where the graph reads both through a transpose."""
    w_gate_up, w_down = _untransposed(experts.w_gate_up), _untransposed(experts.w_down)
    if w_gate_up is None or w_down is None:
        return experts
    return replace(experts, w_gate_up=w_gate_up, w_down=w_down, transposed=not experts.transposed)


def _untransposed(stack: Node) -> Node | None:
    swaps = op(stack) == "transpose" and set(stack.args[1:3]) in ({-2, -1}, {1, 2})
    return stack.args[0] if swaps and isinstance(stack.args[0], Node) else None


def _halves(gate: tuple, up: tuple) -> tuple[tuple, str] | None:
    """(gate_up, layout) when gate and up are the two parts of one projection."""
    if gate[0] == up[0] == "half" and gate[1] == up[1] and gate[2:] == (0, up[3]) and up[2] == 1:
        return gate[1], up[3]
    return None


def _clamp_bounds(expression: tuple) -> tuple[tuple, float | None, float | None]:
    """(inside, lower, upper) of a clamp; of anything else, itself without bounds."""
    if expression[0] != "clamp":
        return expression, None, None
    named: dict[str, Any] = dict(a for a in expression[2:] if isinstance(a, tuple))
    plain = dict(zip(("min", "max"), (a for a in expression[2:] if not isinstance(a, tuple)), strict=False))
    bounds = {**plain, **named}
    return expression[1], bounds.get("min"), bounds.get("max")


def _limited(gate: tuple, up: tuple) -> tuple[tuple, tuple, float | None] | None:
    """gate <= limit and |up| <= limit, or neither is limited."""
    gate, gate_low, gate_high = _clamp_bounds(gate)
    up, up_low, up_high = _clamp_bounds(up)
    if (gate_low, gate_high, up_low, up_high) == (None,) * 4:
        return gate, up, None
    if gate_low is None and gate_high is not None and up_high == gate_high and up_low == -gate_high:
        return gate, up, gate_high
    return None


_UNARY = {("silu",): "silu", ("relu",): "relu", ("gelu",): "gelu", ("gelu", ("approximate", "tanh")): "gelu_tanh",
          ("gelu", ("approximate", "none")): "gelu"}  # fmt: skip


def _kind(activation: str, gated: str, limit: float | None = None, alpha: float = 1.702) -> dict[str, Any]:
    return {"activation": activation, "gated": gated, "limit": limit, "alpha": alpha}


def _gated(expression: tuple) -> tuple[tuple, dict[str, Any]] | None:
    """act(gate) * up."""
    if expression[0] != "mul" or len(expression) != 3:
        return None
    for activated, up in (expression[1:], expression[:0:-1]):
        if not isinstance(activated, tuple) or not isinstance(up, tuple) or len(activated) < 2:
            continue
        name = _UNARY.get((activated[0], *activated[2:]))
        limited = _limited(activated[1], up) if name is not None and isinstance(activated[1], tuple) else None
        halves = _halves(*limited[:2]) if limited is not None else None
        if name is not None and limited is not None and halves is not None:
            return halves[0], _kind(name, halves[1], limited[2])
    return None


def _swiglu_clamped(expression: tuple) -> tuple[tuple, dict[str, Any]] | None:
    """(up + 1) * gate * sigmoid(alpha * gate), gate and up limited."""
    if expression[0] != "mul" or len(expression) != 3:
        return None
    for plus_one, swish in (expression[1:], expression[:0:-1]):
        if not (_is(plus_one, "add", 3) and plus_one[2] == 1 and _is(swish, "mul", 3)):
            continue
        for gate, sigmoid in (swish[1:], swish[:0:-1]):
            scaled = sigmoid[1] if _is(sigmoid, "sigmoid", 2) else None
            if not (_is(scaled, "mul", 3) and scaled[1] == gate and isinstance(scaled[2], float)):
                continue
            limited = _limited(gate, plus_one[1])
            halves = _halves(*limited[:2]) if limited is not None else None
            if limited is not None and halves is not None:
                return halves[0], _kind("swiglu_clamped", halves[1], limited[2] or math.inf, scaled[2])
    return None


def _ungated(expression: tuple) -> tuple[tuple, dict[str, Any]] | None:
    """act(up)."""
    if _is(expression, "square", 2) or (_is(expression, "pow", 3) and expression[2] == 2):
        inner = expression[1]
        return (inner[1], _kind("relu2", "none")) if _is(inner, "relu", 2) else None
    name = _UNARY.get((expression[0], *expression[2:]))
    return (expression[1], _kind(name, "none")) if name is not None else None


def _is(expression: Any, name: str, length: int) -> TypeGuard[tuple]:
    return isinstance(expression, tuple) and len(expression) == length and expression[0] == name


#: Every activation that is known, tried in order: (its argument, how the op calls it), or None.
_ACTIVATIONS: tuple[Callable[[tuple], tuple[tuple, dict[str, Any]] | None], ...] = (_gated, _swiglu_clamped, _ungated)
