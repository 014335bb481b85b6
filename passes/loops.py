"""Rules of ``fuse_experts`` for experts that look for their tokens, one expert after the other.

A mask says which picks are an expert's, ``where`` at which places these stand, and the expert runs on the tokens found.  Its
rows, weighted, are added to a sum so far at those tokens; or they are written, to be weighted later, to their picks' rows.
How many tokens an expert finds depends on the picks, so that most tracers do not follow such loops unless they are told to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import argument, op
from moe_fx.passes.meanings import (
    At,
    Found,
    Grid,
    Hidden,
    Ids,
    Lone,
    Mask,
    Output,
    Partial,
    Picked,
    PickWeights,
    Reached,
    Rows,
    Zero,
)

if TYPE_CHECKING:
    from moe_fx.passes.fuse_experts import _Interpreter


# ------------------------------------------------------------------------------------------------------ masks, places


def is_expert(interpreter: _Interpreter, node: Node) -> Mask | None:
    """ids == e."""
    ids, expert = node.args
    known = isinstance(expert, int) and 0 <= expert < interpreter.num_experts
    axes = {1: "N", 2: "TK"}.get(g.rank(ids))
    return Mask(expert, axes) if interpreter.meaning(ids) == Ids("flat") and known and axes is not None else None


def any_pick(interpreter: _Interpreter, node: Node) -> Mask | None:
    """any(mask of picks) over a token's picks: which tokens have picked the expert."""
    mask, dims = interpreter.meaning(node.args[0]), argument(node, "dim", 1)
    dim = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
    if not isinstance(mask, Mask) or not isinstance(dim, int) or argument(node, "keepdim", 2, False):
        return None
    return Mask(mask.expert, "T") if "K" in mask.axes and mask.axes[dim] == "K" else None


def find(interpreter: _Interpreter, node: Node) -> Found | None:
    """where(mask), nonzero(mask)."""
    mask = interpreter.meaning(node.args[0]) if len(node.args) == 1 else None
    return Found(mask) if isinstance(mask, Mask) else None


def coordinate(found: Found, axis: object) -> At | None:
    """One of the indices that were found."""
    axes = found.mask.axes
    return At(found.mask, axes[axis]) if isinstance(axis, int) and 0 <= axis < len(axes) else None


def only_coordinate(found: Found, node: Node) -> At | None:
    """nonzero(mask) [., 1] as [.]."""
    return coordinate(found, 0) if len(found.mask.axes) == 1 and g.rank(node) == 1 else None


# ------------------------------------------------------------------------------------------------------------ reading


def look_up(interpreter: _Interpreter, source: Node, indices: list[Any]) -> Any:
    """What stands at an expert's places: its tokens' hidden states, its picks' weights, the sum so far."""
    at = [interpreter.meaning(i) if isinstance(i, Node) else i for i in indices]
    meaning = interpreter.meaning(source)
    if indices[0] is None and isinstance(meaning, Grid) and meaning.axes == "1TC":
        return _rows_at(_tokens(at[1:]), meaning.expression)  # hidden[None, tokens]
    if isinstance(meaning, Hidden):
        return _rows_at(_tokens(at), ("input", meaning.node))
    if isinstance(meaning, Rows):
        return _rows_at(_picks(at, g.rank(source) - 1), meaning.expression) if meaning.order == "flat" else None
    if isinstance(meaning, PickWeights):
        return _weights_at(meaning, source, at)
    mask = _tokens(at)
    if mask is None:
        return None
    if isinstance(meaning, Picked) and meaning.at is None and (meaning.expert, mask.axes) == (mask.expert, "T"):
        return replace(meaning, at=mask) if meaning.form in ("row", "column") else None
    summed = isinstance(meaning, Zero) or (isinstance(meaning, Partial) and not meaning.per_pick)
    return Reached(meaning, mask) if summed else None


def _tokens(at: list[Any]) -> Mask | None:
    """The mask whose tokens an index takes: by their numbers, or by the mask itself."""
    if len(at) != 1:
        return None
    if isinstance(at[0], Mask):
        return at[0] if at[0].axes == "T" else None
    return at[0].mask if isinstance(at[0], At) and at[0].axis == "T" else None


def _picks(at: list[Any], rank: int) -> Mask | None:
    """The mask whose picks an index takes, from what has its picks in ``rank`` axes."""
    axes = {1: "N", 2: "TK"}.get(rank)
    if len(at) == 1 and isinstance(at[0], Mask):
        return at[0] if at[0].axes == axes else None
    if not all(isinstance(a, At) and a.mask == at[0].mask for a in at):
        return None
    return at[0].mask if "".join(a.axis for a in at) == axes else None


def _rows_at(mask: Mask | None, expression: tuple) -> Lone | None:
    """The experts' input at an expert's tokens, or, where it has a row for each pick, at its picks."""
    return Lone(None, expression, mask) if mask is not None and expression[0] == "input" else None


def _weights_at(weights: PickWeights, source: Node, at: list[Any]) -> Picked | None:
    """Weights [T, K] or [T K], with or without a last axis of 1, at an expert's picks."""
    column = g.rank(source) > 1 and g.size(source, -1) == 1 and g.rank(source) > len(at) + sum(_spans_two(a) for a in at)
    axes = g.rank(source) - column
    mask = _picks(at, axes) if weights.order == "flat" else None
    return Picked(mask.expert, "column" if column else "row", mask) if mask is not None else None


def _spans_two(index: object) -> bool:
    return isinstance(index, Mask) and len(index.axes) == 2


# ------------------------------------------------------------------------------------------------------------ writing


def add_rows(interpreter: _Interpreter, into: object, at: object, rows: object) -> Any:
    """sum[tokens] += rows: the sum so far, and one more expert's term."""
    total, mask, term = interpreter.meaning(into), _tokens([interpreter.meaning(at)]), interpreter.meaning(rows)
    if not isinstance(term, Lone) or term.expression[0] != "weighted" or term.at != mask or mask is None:
        return None
    if g.size(into, -1) != g.size(rows, -1):
        return None
    return interpreter.added(total, as_partial(term)) if isinstance(total, (Zero, Partial)) else None


def write_rows(interpreter: _Interpreter, into: Node, indices: list[Any], rows: Node) -> Any:
    """sum[tokens] = sum[tokens] + rows; or y[picks] = rows, for each expert's picks in turn."""
    at = [interpreter.meaning(i) for i in indices]
    term, before = interpreter.meaning(rows), interpreter.meaning(into)
    if isinstance(term, Reached) and term.added is not None and term.sum == before and _tokens(at) == term.at:
        return interpreter.added(before, as_partial(term.added))
    if not isinstance(term, Lone) or term.at is None or g.size(into, -1) != g.size(rows, -1):
        return None
    begins = op(into) in _FRESH
    if _picks(at, g.rank(into) - 1) != term.at or not (begins or (isinstance(before, Partial) and before.per_pick)):
        return None
    return interpreter.added(Zero() if begins else before, replace(as_partial(term), per_pick=True))


_FRESH = frozenset("zeros zeros_like new_zeros empty empty_like new_empty".split())


def reach(first: Any, second: Any) -> Reached | None:
    """sum[tokens] + rows."""
    term, reached = (first, second) if isinstance(first, Lone) else (second, first)
    fits = isinstance(term, Lone) and isinstance(reached, Reached) and reached.added is None and term.at == reached.at
    return replace(reached, added=term) if fits and term.expression[0] == "weighted" else None


# -------------------------------------------------------------------------------------------------- sums over experts


def as_partial(term: Lone, expert: int | None = None) -> Partial:
    """One expert's term of a sum, with numbers in the place of parameters of its own."""
    own: list[Node] = []
    numbered = _numbered(term.expression, own) if term.expert is None else term.expression
    expert = term.at.expert if term.at is not None else expert
    assert expert is not None
    return Partial(frozenset({expert}), numbered, ((expert, tuple(own)),))


def added(first: Partial | Zero, second: Partial, num_experts: int) -> Partial | Output | Rows | None:
    """The sum of some experts' terms and of others'; when none is missing, what all of them are."""
    if isinstance(first, Zero):
        sums = second
    elif first.experts & second.experts or (first.expression, first.per_pick) != (second.expression, second.per_pick):
        return None
    else:
        sums = replace(second, experts=first.experts | second.experts, own=first.own + second.own)
    if len(sums.experts) < num_experts:
        return sums
    expression = _of_all_experts(sums.expression, dict(sums.own))
    return Rows("flat", expression) if sums.per_pick else Output(expression)


def _numbered(expression: tuple, own: list[Node]) -> tuple:
    """The expression with numbers in the place of an expert's own parameters, which are collected in ``own``."""
    if expression[0] == "input":
        return expression
    return tuple(_number(part, own) if isinstance(part, Node) else _numbered(part, own) if _is_expression(part) else part
                 for part in expression)  # fmt: skip


def _number(parameter: Node, own: list[Node]) -> tuple[str, int]:
    if parameter not in own:
        own.append(parameter)
    return "own", own.index(parameter)


def _of_all_experts(expression: tuple, own: dict[int, tuple[Node, ...]]) -> tuple:
    """The expression with every expert's parameters, in order, in the place of the numbers."""
    if expression[0] == "own":
        return tuple(own[expert][expression[1]] for expert in sorted(own))
    return tuple(_of_all_experts(part, own) if _is_expression(part) else part for part in expression)


def _is_expression(part: object) -> bool:
    return isinstance(part, tuple) and len(part) > 0 and isinstance(part[0], str)
