"""The ops that choose the k best along the last axis, and what they choose: ids, and the values by which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import cast

from torch import fx
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import argument, is_float, is_integer, op, outputs, rank, same_shape, size


@dataclass(frozen=True)
class Selection:
    """A choice of the k best along the last axis: a ``topk``, a ``sort`` and its slices, an ``argmax``."""

    node: Node
    scores: Node
    k: int
    ids: Node
    values: Node | None
    sorted: bool  # whether pick 0 is the best; SERE's primary picks are the first
    squeezed: bool = False  # whether ids and values lack the last axis, which would have one entry
    lowest: bool = False  # whether the k lowest scores are chosen

    @property
    def tokens(self) -> list[object]:
        """The leading sizes of the ids, one for each axis of tokens, as expressions."""
        dims = [g.expression(d) for d in g.shape(self.ids) or ()]
        return dims if self.squeezed else dims[:-1]

    def is_per_pick(self, node: object) -> bool:
        """Whether a tensor has one entry for every pick, its tokens in one axis or in as many as the ids have.

        Where there is one pick, with or without an axis for it.
        """
        dims = [g.expression(d) for d in g.shape(node) or ()]
        layouts = [tokens for tokens in (self.tokens, [math.prod(self.tokens)]) if self.tokens]  # type: ignore[arg-type]
        return any(dims == [*tokens, self.k] or (self.k == 1 and dims == tokens) for tokens in layouts)


def selections(graph: fx.Graph) -> Iterator[Selection]:
    """Every choice of a fixed number of best entries along the last axis."""
    for node in graph.nodes:
        rule = SELECTION_RULES.get(op(node))
        selection = rule(node) if rule is not None else None
        if selection is not None:
            yield selection


def unreadable(graph: fx.Graph) -> Iterator[Selection]:
    """Choices over the last axis in another way than by a fixed number of best entries; their k has no meaning."""
    for node in graph.nodes:
        name = op(node)
        if name not in ("topk", "sort", "argsort", "multinomial") or not _over_last_axis(node.args[0], -1):
            continue
        if name == "multinomial" or SELECTION_RULES[name](node) is None:
            ids = outputs(node, 1) if name in ("topk", "sort") else [node]
            yield from (Selection(node, node.all_input_nodes[0], 1, i, None, False) for i in ids)


def thresholds(graph: fx.Graph) -> Iterator[Selection]:
    """Masks [..., E] of the scores that reach the k-th best, which are more than k where some are equal.

    The ids are the mask, and the k has no meaning.
    """
    for node in graph.nodes:
        if op(node) not in ("ge", "gt", "le", "lt", "eq") or len(node.all_input_nodes) != 2 or rank(node) < 2:
            continue
        for scores, bound in permutations(node.all_input_nodes):
            if is_float(scores) and same_shape(scores, node) and size(bound, -1) in (1, None) and _is_kth_best(bound, node):
                yield Selection(node, scores, 0, node, None, False)


def _is_kth_best(bound: Node, compared: Node) -> bool:
    """Whether a bound comes from the order of scores whose ids are not read."""
    node = bound
    while op(node) in _TAKE_ONE or op(node) in g.LAYOUT | g.CASTS:
        node = node.all_input_nodes[0]
    best = _BEST if op(compared) in ("ge", "le", "eq") else frozenset()
    return op(node) in _ORDERS | best and not any(i.users for i in outputs(node, 1))


_ORDERS = frozenset("topk kthvalue sort msort quantile".split())
_BEST = frozenset(("max", "amax"))
#: Ops that take one of the ordered scores.
_TAKE_ONE = frozenset("select slice narrow getitem index index_select gather min amin minimum".split())


def _topk(node: Node) -> Selection | None:
    """topk(scores, k, dim=-1) = the k largest of each row, or the k smallest."""
    scores, k = node.args[0], argument(node, "k", 1)
    if not _over_last_axis(scores, argument(node, "dim", 2, -1)) or not isinstance(k, int):
        return None
    ids, values = outputs(node, 1), outputs(node, 0)
    if len(ids) != 1 or not ids[0].users or len(values) > 1 or k < 1:
        return None
    ordered = argument(node, "sorted", 4, True) is True
    first = _part_of_order(node, ids, values) if ordered else None  # topk(scores, 8)[..., :k] = topk(scores, k)
    lowest = argument(node, "largest", 3, True) is False and op(scores) != "neg"
    return first or Selection(node, scores, k, ids[0], values[0] if values else None, ordered, lowest=lowest)  # type: ignore[arg-type]


def _sort(node: Node) -> Selection | None:
    """sort(scores)[:, :k] = topk(scores, k), when nothing but the first k, or the last k, is read."""
    return _part_of_order(node, outputs(node, 1), outputs(node, 0))


def _argsort(node: Node) -> Selection | None:
    """argsort(scores)[:, :k] = topk(scores, k).indices, when nothing but the first k, or the last k, is read."""
    return _part_of_order(node, [node], [])


def _part_of_order(node: Node, ordered_ids: list[Node], ordered_values: list[Node]) -> Selection | None:
    """The k that are taken of a whole order, at either end of it, whichever way it runs."""
    scores = node.args[0]
    ids, values = _only_part(node, ordered_ids), _only_part(node, ordered_values)
    if not _over_last_axis(scores, _sorted_axis(node)) or ids is None:
        return None
    if any(v.users for v in ordered_values) and (values is None or values.how != ids.how):
        return None
    if op(node) == "topk" and not ids.first:
        return None  # all but the best
    # of negated scores the lowest are the best
    best_first = ids.descends != (op(scores) == "neg" and not ids.highest)
    lowest = not ids.highest and op(scores) != "neg"
    return Selection(node, scores, ids.k, ids.node, values.node if values else None, best_first, lowest=lowest)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Part:
    """``[..., :k]`` (first) or ``[..., -k:]`` of an order: ``descends`` tells which way its entries run in the end."""

    node: Node
    k: int
    first: bool
    highest: bool
    descends: bool

    @property
    def how(self) -> tuple[object, ...]:
        return self.k, self.first, self.highest, self.descends


def _only_part(order: Node, taken: list[Node]) -> _Part | None:
    """The one part that is all that is read of a sort's output; None if there is none, or more is read."""
    descends, users = _descends(order), [u for t in taken for u in t.users]
    while len(users) == 1 and (_turns(users[0]) or _is_whole(users[0])):
        descends = descends != _turns(users[0])  # x[:, :k] is written as x[:][..., :k]
        users = list(users[0].users)
    first, last = (len(users) == 1 and is_part(users[0]) for is_part in (_is_first_k, _is_last_k))
    if not first and not last:
        return None
    part, highest, k = users[0], descends == first, size(users[0], -1)
    turned = next(iter(part.users), part)
    if len(part.users) == 1 and _turns(turned) and not descends:
        part, descends = turned, True
    return _Part(part, cast(int, k), first, highest, descends)


def _descends(order: Node) -> bool:
    if op(order) == "topk":
        return argument(order, "largest", 3, True) is True
    return argument(order, "descending", 2 if "stable" not in order.kwargs else len(order.args) + 1, False) is True


def _turns(node: Node) -> bool:
    """Whether the op is flip(x, -1)."""
    return op(node) == "flip" and argument(node, "dims", 1) in ([-1], [rank(node) - 1])


def _sorted_axis(node: Node) -> object:
    # sort.stable(self, *, stable, dim, descending) takes all but the tensor by keyword
    return argument(node, "dim", 2 if op(node) == "topk" else 1 if "stable" not in node.kwargs else len(node.args), -1)


def _is_first_k(node: Node) -> bool:
    """Whether the op is ``x[..., :k]``, k spelled out."""
    end = argument(node, "end", 3)
    return _slices(node) and argument(node, "start", 2, 0) in (0, None) and isinstance(end, int) and 0 < end == size(node, -1)


def _is_last_k(node: Node) -> bool:
    """Whether the op is ``x[..., -k:]``."""
    start, width, k = argument(node, "start", 2, 0), size(node.args[0], -1), size(node, -1)
    return _slices(node) and isinstance(start, int) and None not in (width, k) and 0 < start % cast(int, width) == width - k


def _slices(node: Node) -> bool:
    along_last = argument(node, "dim", 1, 0) in (-1, rank(node) - 1)
    return op(node) == "slice" and along_last and argument(node, "step", 4, 1) == 1


def _is_whole(node: Node) -> bool:
    return op(node) == "slice" and same_shape(node, node.args[0])


def _max(node: Node) -> Selection | None:
    """max(scores, -1) = topk(scores, 1), with or without its last axis."""
    ids, values = [i for i in outputs(node, 1) if i.users], outputs(node, 0)
    if len(ids) != 1 or len(values) > 1:  # the maximum of a whole tensor has no outputs to take
        return None
    return _best(node, ids[0], values[0] if values else None)


def _argmax(node: Node) -> Selection | None:
    """argmax(scores, -1) = topk(scores, 1).indices, with or without its last axis; the value may come from max(scores)."""
    maxima = [u for u in node.args[0].users if op(u) == "max" and argument(u, "dim", 1) == argument(node, "dim", 1)]  # type: ignore[union-attr]
    values = [v for u in maxima for v in outputs(u, 0)]
    return _best(node, node, values[0] if len(values) == 1 else None)


def _best(node: Node, ids: Node, values: Node | None) -> Selection | None:
    scores, dim = node.args[0], argument(node, "dim", 1)
    if dim is None or not _over_last_axis(scores, dim) or any(_joined(u) for u in _with_axis(ids)):
        return None
    return Selection(node, scores, 1, ids, values, True, squeezed=rank(ids) < rank(scores))  # type: ignore[arg-type]


def _with_axis(ids: Node) -> list[Node]:
    """The users of a single choice's ids, through the ``unsqueeze`` that gives them their last axis."""
    return [u for user in ids.users for u in (user.users if op(user) == "unsqueeze" else [user])]


def _joined(node: Node) -> Selection | None:
    """cat([max(scores), max(scores without the first), ...], -1) = topk(scores, k), chosen one after another."""
    if op(node) not in ("cat", "concat") or not is_integer(node) or argument(node, "dim", 1, 0) not in (-1, rank(node) - 1):
        return None
    choices = [choice for part in _parts(node) if (choice := _single_choice(part)) is not None]
    if len(choices) < 2 or not len(choices) == len(_parts(node)) == size(node, -1):
        return None
    return Selection(node, choices[0].all_input_nodes[0], len(choices), node, _joined_weights(node), True)


def _parts(joined: Node) -> list[Node]:
    """What a ``cat`` joins."""
    return [*cast("list[Node]", joined.args[0])]


def _single_choice(ids: Node) -> Node | None:
    """The ``max`` or ``argmax`` over the last axis that ids [..., 1] come from."""
    node = ids
    while op(node) in ("unsqueeze", "getitem") or op(node) in g.CASTS:
        node = node.all_input_nodes[0]
    over_last = op(node) in ("max", "argmax") and _over_last_axis(node.args[0], argument(node, "dim", 1))
    return node if over_last and size(ids, -1) == 1 else None


def _joined_weights(ids: Node) -> Node | None:
    """The floats joined in the same way as the ids, each looked up by (or chosen with) the id at its place."""
    candidates = [_looked_up(part) for part in _parts(ids)]
    for user in (u for weight in candidates[0] for u in weight.users):
        joins = op(user) == op(ids) and is_float(user) and same_shape(user, ids)
        if joins and all(weight in known for weight, known in zip(_parts(user), candidates, strict=True)):
            return user
    return None


def _looked_up(ids: Node) -> list[Node]:
    """The scores gathered by ids [..., 1], and the value that was chosen with them."""
    chosen = ids.args[0] if op(ids) == "getitem" else None
    return [u for u in ids.users if op(u) == "gather"] + (outputs(chosen, 0) if isinstance(chosen, Node) else [])


def _over_last_axis(scores: object, dim: object) -> bool:
    return isinstance(scores, Node) and is_float(scores) and rank(scores) >= 2 and dim in (-1, rank(scores) - 1)


SELECTION_RULES = {
    "topk": _topk, "sort": _sort, "argsort": _argsort, "max": _max, "argmax": _argmax, "cat": _joined, "concat": _joined,
}  # fmt: skip
#: Ops without one of which a graph routes nothing.
SELECTIONS = frozenset(SELECTION_RULES) - {"cat", "concat"} | {"multinomial"} | _ORDERS | _BEST


def selects(gm: fx.GraphModule, inside: bool = True) -> bool:
    """Whether a graph, or one inside it, selects anything: without that there is no routing to find."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)] if inside else [gm.graph]
    targets = {n.target for graph in graphs for n in graph.nodes}
    return not SELECTIONS.isdisjoint(map(g.plain_name, targets))
