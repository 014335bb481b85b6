"""Forward from a selection: where do ids and weights leave the router for the experts, and in what form?"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import Weights, argument, dtype, is_float, is_integer, op, rank, same_shape, size
from moe_fx.passes.proof import REACH, Proof, is_expert_stack, meets_experts
from moe_fx.passes.router import LINEAR, SCORE_WISE, Router
from moe_fx.passes.selection import Selection
from moe_fx.passes.twice import OVERWRITES, bent_by, enters_layer, loses_second_pick

#: Ops that turn the weights of a token's picks into weights of the same picks.
WEIGHT_WISE = SCORE_WISE - {"slice", "narrow", "chunk", "split", "split_with_sizes", "scatter"}
#: Ops that reduce a token's weights to one number, to renormalise by.
REDUCTIONS = frozenset("sum amax max norm linalg_vector_norm logsumexp mean cumsum".split())
#: Ops after which an id is the id of something else.
ARITHMETIC = frozenset(
    "add sub rsub mul div floor_divide remainder fmod bitwise_and bitwise_or bitwise_xor masked_fill index_put".split()
)

#: Ops that take some of the picks.
PARTS = frozenset("select slice narrow getitem unbind split chunk".split())


@dataclass(frozen=True)
class Edge:
    """A use of ``node`` by ``user``: a place where a value leaves the router."""

    node: Node
    user: Node


@dataclass
class Cut:
    """Where routing leaves the router.

    In pair form the experts read ids and weights ``[..., K]``; in dense form they read a matrix ``[..., E]`` that is
    zero wherever an expert was not picked.  ``counts`` are read from matrices of ones at the picks, which are only added
    up over the tokens: how many tokens each expert gets.
    """

    ids: list[Edge] = field(default_factory=list)
    counts: list[Edge] = field(default_factory=list)
    weights: list[Edge] = field(default_factory=list)
    dense: list[Edge] = field(default_factory=list)


def find_cut(selection: Selection, router: Router, weights: Weights) -> tuple[Cut | None, str]:
    """The edges where ids and weights leave the router, or None and why no legal cut exists."""
    cut = Cut()
    weight_like: set[Node] = {selection.values} if selection.values is not None else set()
    dense_like: dict[Node, str] = {}
    reason = _follow_ids(selection, router, weights, cut, weight_like, dense_like)
    reason = reason or _follow_weights(selection, weight_like, dense_like, cut)
    reason = reason or _follow_dense(router, dense_like, cut)
    reason = reason or _looks_up_scores(selection, router, weights, cut)
    reason = reason or _looks_up_router(router, weights, cut)
    reason = reason or _writes_at_ids(cut)
    reason = reason or _chooses_again(selection, cut)
    reason = reason or loses_second_pick(selection, [(e.node, e.user) for e in cut.ids], weights)
    reason = reason or _bends_matrix(selection, cut)
    reason = reason or _leaves_picks_out(selection, cut)
    if not reason and not (cut.ids or cut.dense):
        reason = "its ids are not used outside the router"
    if not reason and cut.ids and cut.dense and cut.weights:
        reason = "its weights leave the router both as pairs and as a dense matrix"
    return (None, reason) if reason else (cut, "")


def _looks_up_scores(selection: Selection, router: Router, weights: Weights, cut: Cut) -> str:
    """Scores read by what became of the picks, other than by ``gather`` or a mask: weights that would change with the ids."""
    scores, stack = {router.linear}, [router.linear]
    while stack:
        for user in stack.pop().users:
            wide = is_float(user) and router.num_experts in (g.shape(user) or ()) and op(user) in SCORE_WISE | g.TRANSPOSES
            if wide and user not in scores and (user < selection.node or user is selection.scores):
                scores.add(user)
                stack.append(user)
    seen: set[Node] = set()
    frontier = [e.user for e in (*cut.ids, *cut.dense) if e.user.op != "output"]
    for _ in range(REACH):
        reached = []
        for node in frontier:
            if node in seen or meets_experts(node, router, weights):
                continue
            seen.add(node)
            if any(i in scores or (op(i) in g.LAYOUT and i.all_input_nodes[0] in scores) for i in node.all_input_nodes):
                return f"its picks meet scores in a way that is not known ({op(node)}), so its weights would change with them"
            if not is_float(node) or size(node, -1) in (router.num_experts, selection.k):
                reached += [u for u in node.users if u.op == "call_function"]
        if not reached:
            break
        frontier = reached
    return ""


def _bends_matrix(selection: Selection, cut: Cut) -> str:
    """Outputs weighed by a matrix, in which two picks of one expert are one, before an op that is not linear."""
    stack = [(e.node, e.user) for e in cut.dense if selection.k > 1]
    while stack:
        _, user = stack.pop()
        bend = bent_by(user) if op(user) == "mul" and rank(user) >= 2 else ""
        if bend:
            return f"what its experts give is weighed before {bend}, where two picks of one expert would not add up"
        if op(user) in g.LAYOUT | g.CASTS | PARTS:
            stack.extend((user, reader) for reader in user.users)
    return ""


def _looks_up_router(router: Router, weights: Weights, cut: Cut) -> str:
    """Rows of the router's weight looked up by the picks: scores, made once more, that would change with the ids."""
    for edge in cut.ids:
        source = edge.user.all_input_nodes[0] if op(edge.user) in ("index", "index_select", "embedding", "gather") else None
        if source in weights and router.weight in weights.leaves(cast(Node, source)):
            return f"its ids look up rows of the router's weight ({op(edge.user)}), so its weights would change with them"
    return ""


def _chooses_again(selection: Selection, cut: Cut) -> str:
    """Picks that are only candidates, or in whose place others are put: the decision is another than the selection's."""
    stack = [(e.node, e.user) for e in cut.ids]
    while stack:
        node, user = stack.pop()
        name = op(user)
        if name in ("where", "masked_fill") and is_integer(user) and node in user.args[name == "where" :]:
            return f"its ids are changed ({name}) before they select"
        if name in ("gather", "take_along_dim") and user.args[0] is node and selection.is_per_pick(node) and not _reorders(user):
            return f"its picks are only candidates, of which some are chosen once more ({name})"
        if name in g.ID_WISE | PARTS and user.all_input_nodes[0] is node and is_integer(user):
            stack.extend((user, reader) for reader in user.users)
    return ""


def _reorders(looked_up: Node) -> bool:
    """Whether ids are gathered by the order of as many."""
    order = looked_up.args[1 if op(looked_up) == "take_along_dim" else 2]
    sorts = op(order) == "argsort" or (op(order) == "getitem" and op(cast(Node, order).args[0]) == "sort")
    return sorts and same_shape(order, looked_up.args[0])


def leaves_weights_out(selection: Selection, cut: Cut) -> bool:
    """Whether the weights of some picks are not read, so that a weight of 0 would not switch them off."""
    read: set[int] = set()
    for edge in cut.weights:
        columns = _columns(edge, selection) if selection.is_per_pick(edge.node) else None
        if columns is None:
            return False
        if not all(g.reads_shape_only(user, edge.user) for user in edge.user.users):
            read |= columns
    return bool(cut.weights) and len(read) < selection.k


def _leaves_picks_out(selection: Selection, cut: Cut) -> str:
    """Picks that were selected and never reach the experts: the decision is another than the selection's."""
    read: set[int] = set()
    for edge in cut.ids:
        columns = _columns(edge, selection) if selection.is_per_pick(edge.node) and not selection.squeezed else None
        if columns is None:
            return ""
        read |= columns
    missing = len(set(range(selection.k)) - read) if read else 0
    return f"its experts read only {selection.k - missing} of the {selection.k} picks that it selects" if missing else ""


def _columns(edge: Edge, selection: Selection) -> set[int] | None:
    """Which picks' columns an op takes from ids [..., K]; None if it reads all of them."""
    name, user, last = op(edge.user), edge.user, rank(edge.node) - 1
    if name not in ("slice", "select") or argument(user, "dim", 1, 0) not in (-1, last):
        return None
    picks = range(selection.k)
    if name == "select":
        return {picks[cast(int, argument(user, "index", 2))]}
    bounds = [argument(user, key, i) for i, key in ((2, "start"), (3, "end"), (4, "step"))]
    known = all(bound is None or isinstance(bound, int) for bound in bounds)
    return set(picks[slice(*cast("list[int | None]", bounds))]) if known else None


def _writes_at_ids(cut: Cut) -> str:
    """Two picks of one expert write to one place: after a rewrite one of them would be lost."""
    stack = [(e.node, e.user) for e in cut.ids]
    while stack:
        node, user = stack.pop()
        name = op(user)
        if name in OVERWRITES and user.args[0] is not node and argument(user, "accumulate", 3, False) is not True:
            return f"its ids say where something is written ({name}), where two picks of one expert would overwrite each other"
        same = name in g.ID_WISE | PARTS | _ORDERED_IDS and user.all_input_nodes[0] is node and not is_float(user)
        if same or (name == "sort" and user.args[0] is node):
            values = g.outputs(user, 0) if name == "sort" else [user]
            stack.extend((value, reader) for value in values for reader in value.users)
    return ""


#: Ops that give ids in another order.
_ORDERED_IDS = frozenset("index index_select gather".split())


def _follow_ids(
    selection: Selection, router: Router, weights: Weights, cut: Cut, weight_like: set[Node], dense_like: dict[Node, str]
) -> str:
    """Sort every use of the ids into: inside the router, a dense matrix of the router's, or the experts'."""
    ids, scores = selection.ids, _made_into_scores(selection)
    stack, seen = [ids], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            name = op(user)
            if g.reads_shape_only(user, node):
                continue
            if name in g.ID_WISE and user.args[0] is node and is_integer(user):
                stack.append(user)
            elif _gathers_score(user, node, router, weights) and _stays_a_weight(user, node):
                if _is_turned(node) and rank(node) == rank(ids):
                    return f"its weights are looked up by transposed ids ({name})"
                if op(user) in ("gather", "take_along_dim") and not _is_score(user.args[0], scores):
                    return f"its ids look up numbers that are none of its scores ({name}): its weights, or a part of its experts"
                weight_like.add(user)
            elif name == "scatter" and _scatters_into_experts(user, node, router):
                if _counts_tokens(user):
                    cut.counts += [Edge(user, reader) for reader in user.users]
                else:
                    dense_like[user] = ""
            elif name == "one_hot" and (mask := _mask_of_scores(user, router)) is not None:
                dense_like[mask] = ""
            elif name in ARITHMETIC:
                return f"its ids are changed by arithmetic ({name}) before they select"
            else:
                cut.ids.append(Edge(node, user))
            if _mutates(user, node):
                return f"its ids are changed in place by {name}"
    return ""


def _made_into_scores(selection: Selection) -> set[Node]:
    """The scores, all that they were made from by score-wise ops, and the linear maps that these read."""
    stack, found = [selection.scores], {selection.scores}
    while stack:
        node = stack.pop()
        for i in node.all_input_nodes if op(node) in SCORE_WISE | g.TRANSPOSES else ():
            if op(i) in SCORE_WISE | g.TRANSPOSES | LINEAR and is_float(i) and i not in found:
                found.add(i)
                stack.append(i)
    return found


def _is_score(source: object, scores: set[Node]) -> bool:
    """Whether numbers were made from what the scores were made from."""
    stack, seen = [cast(Node, source)], set()
    while stack:
        node = stack.pop()
        if node in scores:
            return True
        if node not in seen and is_float(node):
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def _mask_of_scores(hot: Node, router: Router) -> Node | None:
    """one_hot(ids) [..., K, E] summed over the picks, where that only says which scores stay; None where it says more."""
    summed = hot
    while op(summed) in g.CASTS | {"one_hot"} and len(summed.users) == 1:
        summed = next(iter(summed.users))
    dims = argument(summed, "dim", 1)
    over_picks = dims in ([-2], [rank(summed) - 1], -2, rank(summed) - 1) and not argument(summed, "keepdim", 2, False)
    if op(summed) not in ("sum", "amax", "any") or not over_picks or size(summed, -1) != router.num_experts:
        return None
    stack = [summed]
    while stack:
        for user in stack.pop().users:
            if op(user) in g.CASTS | _MASK_TESTS:
                stack.append(user)
            elif op(user) not in ("mul", "where", "masked_fill") or not _is_row_of_experts(user, router):
                return None
    return summed


def _stays_a_weight(looked_up: Node, ids: Node) -> bool:
    """Whether a number looked up per pick is used as one: a scale of an expert's matrix is the experts' own."""
    if op(looked_up) in ("gather", "take_along_dim"):
        return True
    return all(same_shape(user, ids) or op(user) in REDUCTIONS for user in looked_up.users)


def _gathers_score(user: Node, ids: Node, router: Router, weights: Weights) -> bool:
    """Whether a use of the ids only looks up a number per pick: a score, or a per-expert scale."""
    name = op(user)
    if name in ("gather", "take_along_dim"):
        source = user.args[0]
        if op(ids) == "expand" and size(ids, -1) not in (1, size(ids.args[0], -1)):
            return False  # a whole vector for each pick
        if name == "take_along_dim" and not same_shape(user, ids):
            return False  # the same, spelled by broadcasting
        return is_float(source) and rank(source) == rank(ids) and user.args[0] is not ids and source not in weights
    if name == "index":
        source, index = user.args[0], user.args[1]
        return index == [ids] and rank(source) == 1 and is_float(source)
    if name in ("index_select", "embedding"):
        source = user.args[0]
        return is_float(source) and rank(source) == 1
    return False


def _is_turned(ids: Node) -> bool:
    """Whether ids were transposed, and not back again, or repeated since they were picked."""
    order = [*range(rank(ids))]
    while op(ids) in g.LAYOUT | g.CASTS:
        before = ids.all_input_nodes[0]
        if op(ids) in g.TRANSPOSES:
            axes = g.axes_before(ids)
            order = [axes[axis] for axis in order]
        elif not same_shape(ids, before):
            if op(ids) == "expand" or order != sorted(order):
                return True
            order = [*range(rank(before))]
        ids = before
    return order != sorted(order)


def _scatters_into_experts(user: Node, ids: Node, router: Router) -> bool:
    """Whether ``scatter(base, -1, ids, ...)`` marks each token's picks in a row of all experts."""
    dim, index = argument(user, "dim", 1), argument(user, "index", 2)
    if _is_turned(ids):
        return False  # another token's picks may stand in a row
    return index is ids and dim in (-1, rank(user) - 1) and size(user, -1) == router.num_experts and user.args[0] is not ids


def _counts_tokens(scatter: Node) -> bool:
    """Whether ones, scattered by the ids into zeros, are only added up over the tokens."""
    if argument(scatter, "value", 3) != 1 or rank(scatter) != 2 or fills_with(scatter.args[0]) != "zero":
        return False
    stack = [scatter]
    while stack:
        for user in stack.pop().users:
            if op(user) in g.CASTS:
                stack.append(user)
            elif op(user) != "sum" or argument(user, "dim", 1) not in (0, [0]) or argument(user, "keepdim", 2, False):
                return False
    return True


def _mutates(user: Node, node: Node) -> bool:
    target = user.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    writes = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    return any(w and i < len(user.args) and user.args[i] is node for i, w in enumerate(writes))


def _follow_weights(selection: Selection, weight_like: set[Node], dense_like: dict[Node, str], cut: Cut) -> str:
    """Grow the weights through renormalisation, scale and casts; what reads them beyond that is the experts."""
    stack = list(weight_like)
    rows: set[Node] = set()  # one number per token, to renormalise by
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in weight_like or user in rows or g.reads_shape_only(user, node):
                continue
            name = op(user)
            if name in WEIGHT_WISE and _joins_selected(user, cut, selection):
                cut.weights.append(Edge(node, user))  # the experts' own business: a mask of the picks of one expert
            elif name in WEIGHT_WISE and is_float(user) and selection.is_per_pick(user):
                weight_like.add(user)
                stack.append(user)
            elif node not in rows and (back := _back_to_picks(user, selection)) is not None:
                weight_like.update(back)
                stack.append(back[-1])
            elif node in rows and name in WEIGHT_WISE and same_shape(user, node):
                rows.add(user)
                stack.append(user)
            elif node not in rows and name in REDUCTIONS and _feeds_back(user, selection):
                rows.add(user)
                stack.append(user)
            elif name == "getitem" and node in rows:
                rows.add(user)
                stack.append(user)
            elif node in weight_like and user not in dense_like:
                if _mutates(user, node):
                    return f"its weights are changed in place by {name}"
                cut.weights.append(Edge(node, user))
    return ""


def _back_to_picks(node: Node, selection: Selection) -> list[Node] | None:
    """The ops that bring weights into another shape and straight back into one entry for every pick, if they do."""
    steps = [node]
    while op(steps[-1]) in g.RESHAPES and not selection.is_per_pick(steps[-1]) and len(steps[-1].users) == 1:
        steps.append(next(iter(steps[-1].users)))
    returns = op(steps[-1]) in g.RESHAPES and selection.is_per_pick(steps[-1]) and is_float(steps[-1])
    return steps if returns and len(steps) > 1 else None


def _joins_selected(user: Node, cut: Cut, selection: Selection) -> bool:
    """Whether an input of the op comes from ids that have left the router."""
    if len(user.all_input_nodes) < 2:
        return False
    leavers = {e.user for e in cut.ids}
    stack, seen = list(user.all_input_nodes), set()
    while stack:
        node = stack.pop()
        if node in leavers:
            return True
        if node not in seen and selection.ids < node:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def _feeds_back(reduction: Node, selection: Selection) -> bool:
    """Whether a reduction over the picks is used to renormalise them, so that it is the router's business."""
    stack, seen = [reduction], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is not reduction and selection.is_per_pick(node):
            return True
        if node is reduction or op(node) in WEIGHT_WISE:
            stack.extend(u for u in node.users if op(u) in WEIGHT_WISE)
    return False


#: Comparisons of a matrix with a number.
_MASK_TESTS = frozenset("bool gt ge lt le eq ne bitwise_not logical_not".split())
#: What an op makes of a row over all experts that is 0 ("zero"), -inf ("-inf") or 1 ("one") wherever nothing was picked,
#: or is a mask, False ("picked") or True ("unpicked") there.
_DENSE_RULES = {
    "zero": {
        "mul": "zero", "div": "zero", "bool": "picked", **dict.fromkeys(("sum", "amax", "norm", "linalg_vector_norm"), "row"),
        **dict.fromkeys(g.RESHAPES | g.CASTS | {"sqrt", "square", "relu"}, "zero"),
    },
    "-inf": {
        "softmax": "zero", "_softmax": "zero", "sigmoid": "zero", "exp": "zero", "add": "-inf",
        **dict.fromkeys(g.RESHAPES | g.CASTS, "-inf"),
    },
    "one": {"bool": "unpicked", **dict.fromkeys(g.RESHAPES | g.CASTS, "one")},
    "picked": {
        "bitwise_not": "unpicked", "logical_not": "unpicked", "mul": "zero",
        **dict.fromkeys(g.RESHAPES, "picked"), **dict.fromkeys(g.CASTS, "zero"),
    },
    "unpicked": {
        "bitwise_not": "picked", "logical_not": "picked",
        **dict.fromkeys(g.RESHAPES, "unpicked"), **dict.fromkeys(g.CASTS, "one"),
    },
}  # fmt: skip
#: The masks that matrices of these numbers become.
_AS_MASK = {"zero": "picked", "one": "unpicked"}


def _follow_dense(router: Router, dense_like: dict[Node, str], cut: Cut) -> str:
    """Follow matrices [..., E] made by scattering; the experts must read them where unpicked entries are zero."""
    stack = []
    for node in list(dense_like):
        state = "zero" if op(node) != "scatter" else fills_with(node.args[0])
        if state is None:
            return "its picks are scattered into a matrix whose other entries are neither 0 nor -inf"
        dense_like[node] = _AS_MASK.get(state, state) if dtype(node) == torch.bool else state
        stack.append(node)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in dense_like or g.reads_shape_only(user, node):
                continue
            state = _dense_step(node, dense_like, user, router)
            if state is not None:
                dense_like[user] = state
                stack.append(user)
            elif dense_like[node] == "zero" and is_float(node):
                cut.dense.append(Edge(node, user))
            elif dense_like[node] != "row":
                return f"its picks leave the router as a mask ({op(user) or user.op}), not as weights"
    return ""


def _dense_step(node: Node, dense_like: dict[Node, str], user: Node, router: Router) -> str | None:
    """The state of ``user``, or None when it is no longer a row over experts of the router's own."""
    name, state = op(user), dense_like[node]
    if state == "row":  # a sum over experts, kept only to renormalise by
        if name in WEIGHT_WISE and (same_shape(user, node) or name in ("expand", "expand_as")):
            return "row"
        divides = any(dense_like.get(i) == "zero" for i in user.all_input_nodes)
        return "zero" if divides and _is_row_of_experts(user, router) else None
    after = _DENSE_RULES[state].get(name) or _compared_with_number(node, user, state) or _kept_by_mask(node, user, state)
    if dtype(user) == torch.bool and after is not None:
        after = _AS_MASK.get(after, after)
    if after == "row":
        return "row" if any(_is_row_of_experts(u, router) or op(u) in WEIGHT_WISE for u in user.users) else None
    if after is None or not _is_row_of_experts(user, router, mask=after not in ("zero", "-inf") or not is_float(user)):
        return None
    if name == "div" and user.args[0] is not node:
        return None
    if name in g.RESHAPES and not same_shape(user, node):
        return None  # the experts' own: no longer a row over experts for each row of ids
    if name in ("softmax", "_softmax") and argument(user, "dim", 1) not in (-1, rank(user) - 1):
        return None
    return after


def _compared_with_number(node: Node, user: Node, state: str) -> str | None:
    """The mask that a matrix becomes by a comparison, as 0 or 1, where nothing was picked, compares with the number."""
    tests = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne}
    background = {"zero": 0, "one": 1}.get(state)
    number = user.args[1] if op(user) in tests and user.args[0] is node else None
    if background is None or not isinstance(number, (int, float)):
        return None
    return "unpicked" if tests[op(user)](background, number) else "picked"


def _kept_by_mask(node: Node, user: Node, state: str) -> str | None:
    """What scores are, where nothing was picked, after a mask said which of them stay."""
    name = op(user)
    if name == "where" and user.args[0] is node and len(user.args) == 3 and state in ("picked", "unpicked"):
        return fills_with(user.args[2 if state == "picked" else 1])
    if name == "masked_fill" and state == "unpicked" and user.args[1] is node:
        return fills_with(user.args[2])
    return None


def _is_row_of_experts(node: Node, router: Router, mask: bool = False) -> bool:
    return (is_float(node) or mask) and size(node, -1) == router.num_experts and rank(node) <= 3


def fills_with(base: object) -> str | None:
    """What a number, or a freshly filled tensor, is: "zero", "one", "-inf" (or so low as to be that), or None for others."""
    while isinstance(base, Node) and op(base) in g.RESHAPES | g.CASTS | {"expand"}:
        base = base.args[0]
    if isinstance(base, Node) and base.op == "get_attr":
        constant = getattr(base.graph.owning_module, str(base.target), None)
        base = constant.item() if isinstance(constant, torch.Tensor) and constant.numel() == 1 else None
    if isinstance(base, Node):
        name = op(base)
        filled = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
        place = {"full": 1, "full_like": 1, "new_full": 2, "fill": 1, "scalar_tensor": 0}.get(name)
        key = {"fill": "value", "scalar_tensor": "s"}.get(name, "fill_value")
        base = filled.get(name) if place is None else argument(base, key, place)
    if not isinstance(base, (int, float)):
        return None
    return "-inf" if base <= _LOWEST else {0.0: "zero", 1.0: "one"}.get(base)


#: Beside any score, the lowest float16 and all below give 0 in a softmax, as -inf does.
_LOWEST = torch.finfo(torch.float16).min


def weighs_input(cut: Cut, proof: Proof, router: Router, weights: Weights) -> bool:
    """Whether weights that left the router flow into a product with the site's own experts."""
    if proof.at is None:
        return False
    if any(_weighs_layer(edge, weights) for edge in cut.dense):
        return True
    own = {i for i in proof.at.all_input_nodes if is_expert_stack(i, router, weights)}
    seen: set[Node] = set()
    stack = [e.user for e in (*cut.weights, *cut.dense)]
    while stack and len(seen) < 4 * REACH:
        node = stack.pop()
        if node in seen or not is_float(node):
            continue
        seen.add(node)
        if own.intersection(node.all_input_nodes) and meets_experts(node, router, weights):
            return True
        stack.extend(node.users)
    return False


def _weighs_layer(edge: Edge, weights: Weights) -> bool:
    """Whether a column of a matrix multiplies what goes into a linear map: that of one of the experts."""
    stack = [(edge.node, edge.user)]
    while stack:
        node, user = stack.pop()
        if op(user) == "mul" and enters_layer(user, node, weights):
            return True
        if op(user) in g.LAYOUT | g.CASTS | PARTS:
            stack.extend((user, reader) for reader in user.users)
    return False
