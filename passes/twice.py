"""What experts make of two picks of one token on one expert, which no model selects and a policy may bring about.

Weights of both are added up by most code.  Some counts on each expert standing at most once in a token's picks: it takes
the largest weight, or the first place, or lets how often an expert was picked weigh its input.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import Weights, argument, is_float, op, rank, size
from moe_fx.passes.proof import PRODUCTS
from moe_fx.passes.router import LINEAR
from moe_fx.passes.selection import Selection

_TESTS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne}
#: Ops that give a mask of picks entry by entry.
_ENTRY_WISE = g.CASTS | frozenset(_TESTS) | {"mul", "where", "bool", "bitwise_and", "logical_and", "masked_fill", "clone"}
_LARGEST = frozenset("amax amin max min prod".split())
_PLACES = frozenset("argmax argmin topk".split())
#: Ops that take experts or tokens out of a row of numbers per expert, in any layout.
_TAKE = g.LAYOUT | g.CASTS | {"select", "slice", "getitem", "unbind", "index", "split", "chunk"}


@dataclass(frozen=True)
class _Mask:
    """Numbers that say which picks are which experts', or what each of them weighs there."""

    node: Node
    axis: int  # that of the picks, from the first
    weighted: bool  # whether the numbers are more than 0 and 1


def loses_second_pick(selection: Selection, masked_ids: list[tuple[Node, Node]], weights: Weights) -> str:
    """Why two picks of one token on one expert would not add up, or "".

    ``masked_ids`` are the ids where they leave the router, with what reads them.
    """
    if selection.k == 1:
        return ""
    stack = [_Mask(user, rank(ids) - 1, False) for ids, user in masked_ids if _marks_picks(selection, ids, user)]
    seen: set[Node] = set()
    while stack:
        mask = stack.pop()
        for user in mask.node.users:
            reduced = _reduces_picks(mask, user)
            if reduced and (op(user) in _PLACES or _takes_largest(mask, user)):
                return _REASON.format(f"only one of them is read ({op(user)})")
            if reduced and op(user) == "sum" and (why := _misreads_sum(user, mask.weighted, weights)):
                return _REASON.format(why)
            after = None if reduced or user in seen else _step(mask, user)
            if after is not None:
                seen.add(user)
                stack.append(after)
    return ""


_REASON = "its experts take for granted that a token picks none of them twice, as it may after a policy: {}"


def writes_over_second_pick(masked_ids: list[tuple[Node, Node]]) -> bool:
    """Whether one expert's rows are written to their tokens' places, not added: a token that has it twice stands there twice."""
    stack = [(user, False) for _, user in masked_ids if op(user) in ("eq", "one_hot")]
    seen: set[Node] = set()
    while stack:
        node, is_place = stack.pop()
        for user in node.users:
            if is_place and op(user) in OVERWRITES and user.args[0] is not node and not argument(user, "accumulate", 3, False):
                if not _names_each_pick(user):
                    return True
            elif user not in seen and not is_float(user) and user.op == "call_function":
                seen.add(user)
                stack.append((user, is_place or op(user) in _FINDS))
    return False


#: Ops that write rows or entries at places, one over the other.
OVERWRITES = frozenset("scatter index_copy index_fill index_put".split())
#: Ops that give the places where a mask is true.
_FINDS = frozenset("where nonzero nonzero_numpy argwhere".split())


def _names_each_pick(write: Node) -> bool:
    """Whether rows are written at all coordinates at which a mask was true: then each stands there once."""
    places = write.args[1]
    if op(write) != "index_put" or not isinstance(places, (list, tuple)):
        return False
    found = {place.all_input_nodes[0] for place in places if isinstance(place, Node) and op(place) == "getitem"}
    masks = {i for node in found if op(node) in _FINDS for i in node.all_input_nodes}
    return len(found) == len(masks) == 1 and len({*places}) == rank(masks.pop())


def _marks_picks(selection: Selection, ids: Node, user: Node) -> bool:
    per_pick = selection.is_per_pick(ids) and size(ids, -1) == selection.k and not selection.squeezed
    return per_pick and ((op(user) == "eq" and isinstance(user.args[1], int)) or op(user) == "one_hot")


def _reduces_picks(mask: _Mask, user: Node) -> bool:
    dims = argument(user, "dim", 2 if op(user) == "topk" else 1)
    if op(user) not in _LARGEST | _PLACES | {"sum"}:
        return False
    axes = dims if isinstance(dims, (list, tuple)) else [dims]
    return any(isinstance(axis, int) and axis % rank(mask.node) == mask.axis for axis in axes)


def _takes_largest(mask: _Mask, user: Node) -> bool:
    """Whether the largest of the weights is taken, or the place of the first pick."""
    return op(user) in _LARGEST and (mask.weighted or any(i.users for i in g.outputs(user, 1)))


def _step(mask: _Mask, user: Node) -> _Mask | None:
    """The mask that an op makes of one, or None where it is none any more, or the picks' axis is lost."""
    name, old, axis = op(user), rank(mask.node), mask.axis
    if name in g.TRANSPOSES:
        return _Mask(user, g.axes_before(user).index(axis), mask.weighted)
    if name in ("select", "sum", "amax", "any", "unsqueeze"):
        return _without_axis(mask, user)
    if name in _ENTRY_WISE or (name in g.RESHAPES and g.same_shape(user, mask.node)):
        weighted = mask.weighted or any(is_float(i) and i is not mask.node for i in user.all_input_nodes)
        return _Mask(user, axis + rank(user) - old, weighted) if rank(user) >= old else None
    return None


def _without_axis(mask: _Mask, user: Node) -> _Mask | None:
    """The mask after an op that adds or takes away one other axis."""
    dim = argument(user, "dim", 1, 0)
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if not isinstance(dim, int):
        return None
    dim = dim % max(rank(mask.node), rank(user))
    change = rank(user) - rank(mask.node)
    if change < 0 and dim == mask.axis:
        return None
    return _Mask(user, mask.axis + (change if dim <= mask.axis else 0), mask.weighted)


def _misreads_sum(total: Node, weighted: bool, weights: Weights) -> str:
    """Why a sum over a token's picks on an expert would be read amiss where there are two, or ""."""
    stack, seen = [total], {total}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if op(user) in _TAKE:
                stack.append(user)
            elif op(user) == "mul" and (bend := bent_by(user)):
                return f"what an expert gives is weighed before {bend}"
            elif not weighted and _tells_one_from_two(user, node):
                return f"how often it was picked is compared ({op(user)})"
            elif op(user) in PRODUCTS | {"mul"} and enters_layer(user, node, weights):
                return "its input is multiplied by how often it was picked"
    return ""


def bent_by(product: Node) -> str:
    """The op, if any, for which the weights of two picks, added up, are not the same as both picks' results, added up."""
    stack = [product]
    while stack:
        for user in stack.pop().users:
            if op(user) in _BENDS:
                return op(user)
            if op(user) in g.LAYOUT | g.CASTS:
                stack.append(user)
    return ""


#: Ops that are not linear.
_BENDS = frozenset(
    "tanh sigmoid relu silu gelu exp sqrt square pow abs softmax _softmax amax amin max min prod layer_norm rms_norm".split()
)


def _tells_one_from_two(user: Node, count: Node) -> bool:
    number = user.args[1] if op(user) in _TESTS and user.args[0] is count else None
    return isinstance(number, (int, float)) and _TESTS[op(user)](1, number) != _TESTS[op(user)](2, number)


def enters_layer(product: Node, factor: Node, weights: Weights) -> bool:
    """Whether activations that were multiplied by a factor go straight into a linear map."""
    others = [i for i in product.all_input_nodes if i is not factor and is_float(i) and rank(i) >= 2 and i not in weights]
    stack = [product] if others else []
    while stack:
        node = stack.pop()
        for user in node.users:
            if op(user) in LINEAR and any(i in weights and rank(i) >= 2 for i in user.all_input_nodes):
                return True
            if op(user) in g.LAYOUT | g.CASTS:
                stack.append(user)
    return False
