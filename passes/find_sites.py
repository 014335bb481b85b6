"""Step 2: find every routing decision in a graph.  Analysis only: nothing is changed.

The search follows data flow, not literal patterns.  It anchors on a selection over the last axis and asks three
questions, each in its own section below:

* backward: do the scores come from a linear map of a hidden state, through score-wise ops only?
* forward: where do the ids and the weights leave the router (the *cut*), and in what form?
* proof: do the ids select among as many experts as the router scores?

A selection that fails the first question is no router (an attention indexer, a group pick) and is passed over in
silence; one that fails a later question resembles routing and is reported as a skip with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Protocol, cast

import torch
from torch import fx
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import (
    Weights,
    argument,
    is_float,
    is_integer,
    module_path,
    op,
    outputs,
    rank,
    same_shape,
    size,
)
from moe_fx.site import Site, Skip, normal_name

#: Ops that turn scores into scores, each expert's from its own (or from its row's) scores.
SCORE_WISE = (
    g.RESHAPES
    | g.CASTS
    | frozenset(
        "softmax _softmax log_softmax _log_softmax sigmoid log_sigmoid log_sigmoid_forward softplus relu tanh sqrt rsqrt exp "
        "log log1p neg abs pow add sub rsub mul div clamp clamp_min clamp_max maximum minimum masked_fill where nan_to_num "
        "dropout native_dropout slice narrow expand scatter getitem chunk split split_with_sizes addcmul gelu silu "
        "layer_norm native_layer_norm rms_norm _fused_rms_norm".split()
    )
)
#: Ops that turn the weights of a token's picks into weights of the same picks.
WEIGHT_WISE = SCORE_WISE - {"slice", "narrow", "chunk", "split", "split_with_sizes", "scatter"}
#: Ops that reduce a token's weights to one number, to renormalise by.
REDUCTIONS = frozenset("sum amax max norm linalg_vector_norm logsumexp mean cumsum".split())
#: Ops after which ids are the same ids in another layout or integer type.
ID_WISE = g.LAYOUT | g.CASTS
#: Ops after which an id is the id of something else.
ARITHMETIC = frozenset(
    "add sub rsub mul div floor_divide remainder fmod bitwise_and bitwise_or bitwise_xor masked_fill index_put".split()
)
LINEAR = frozenset("linear mm addmm matmul bmm baddbmm einsum weight_packed_linear zentorch_linear_unary".split())
#: Engines' linear maps that keep their weight behind a handle: the names of their input and of the handle.
BEHIND_HANDLE = {"onednn_mm": ("a", "handler_tensor")}


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

    @property
    def tokens(self) -> list[object]:
        """The leading sizes of the ids, one for each axis of tokens, as expressions."""
        dims = [g.expression(d) for d in g.shape(self.ids) or ()]
        return dims if self.squeezed else dims[:-1]

    def is_per_pick(self, node: object) -> bool:
        """Whether a tensor has one entry for every pick; where there is one pick, with or without an axis for it."""
        dims = [g.expression(d) for d in g.shape(node) or ()]
        return dims == [*self.tokens, self.k] or (self.k == 1 and dims == self.tokens and len(dims) > 0)


@dataclass(frozen=True)
class Router:
    """The linear map that scores come from."""

    linear: Node
    hidden: Node  # [..., H], the linear map's input
    weight: Node  # the parameter it multiplies by
    num_experts: int
    hidden_size: int


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


@dataclass(frozen=True, eq=False)
class Routing:
    """A site with the graph nodes a rewrite needs.

    ``site.name`` is the block's path as this graph tells it.  A graph of one layer alone tells only the end of it.
    """

    site: Site
    selection: Selection
    router: Router
    cut: Cut
    experts: Node | None  # the first op where the ids meet the experts; None where that is outside the graph
    weighs_input: bool  # whether the weights multiply what goes into the experts, not what comes out


class Owner(Protocol):
    """What a graph cannot tell by itself: the modules its inputs belong to (see ``moe_fx.binding``)."""

    def expert_block(self, weight: Node, num_experts: int) -> str | None:
        """The smallest module around a router's weight that holds ``num_experts`` experts, as the graph names it."""
        ...


def find_sites(gm: fx.GraphModule, owner: Owner | None = None) -> tuple[list[Routing], list[Skip]]:
    """The routing decisions in ``gm``'s graph, in graph order, and the places that resemble one and were left.

    Time is linear in the number of nodes: each selection is followed only as far as its own router and cut.
    """
    weights = Weights(gm.graph)
    routers = [(s, find_router(s, weights)) for s in selections(gm.graph)]
    singles = Counter(r.linear for s, r in routers if r is not None and op(s.node) in ("max", "argmax"))
    found: list[Routing] = []
    skips: list[Skip] = []
    for selection, router in routers:
        result: Routing | Skip | None
        if router is None:
            steps = "its scores do not come, by ops that are known, from a linear map with one output per expert"
            result = _examine_unknown(selection, weights, f"{steps}: {_origin(selection.scores)}")
        elif op(selection.node) in ("max", "argmax") and singles[router.linear] > 1:
            result = Skip(_name(selection), "its picks are chosen one after another and never joined in one tensor", True)
        else:
            result = _examine(selection, router, weights, owner)
        if result is not None:
            (found if isinstance(result, Routing) else skips).append(result)  # type: ignore[arg-type]
    unread = (_examine_unknown(s, weights, f"how it selects ({op(s.node)}) is not known") for s in _unreadable(gm.graph))
    return _distinct_names(found), [*skips, *(s for s in unread if s is not None)]


def _name(selection: Selection) -> str:
    return module_path(selection.node) or selection.node.name


def _examine_unknown(selection: Selection, weights: Weights, reason: str) -> Skip | None:
    """A selection that could not be read, or not its scores, is a router all the same if its ids select among experts."""
    stack = _looked_up_stack(selection.ids, weights)
    num_experts = size(stack, 0) if stack is not None else size(selection.scores, -1)
    if num_experts is None:
        return None
    scores = selection.scores
    proof = prove_experts(selection, Router(scores, scores, scores, num_experts, 0), weights)
    if proof.at is None:
        return None
    return Skip(_name(selection), reason, routing=True)


def _looked_up_stack(ids: Node, weights: Weights) -> Node | None:
    """A stack of matrices that integers made from the ids look up: candidates chosen twice are no score's own ids."""
    stack, seen = [ids], {ids}
    while stack and len(seen) < _REACH:
        for user in stack.pop().users:
            source = user.all_input_nodes[0] if op(user) in ("index", "index_select", "embedding") else None
            if source in weights and rank(source) >= 3:
                return source
            if is_integer(user) and user not in seen and op(user) not in _SELECTION_RULES:
                seen.add(user)
                stack.append(user)
    return None


def _origin(scores: Node) -> str:
    """The ops that made the scores, last first, as far as a reader needs them to see what is not known."""
    names: list[str] = []
    node: Node | None = scores
    while node is not None and op(node) and len(names) < 4:
        names.append(op(node))
        node = next((i for i in node.all_input_nodes if is_float(i)), None)
    return " of ".join(names) or "they enter this graph from outside"


def _examine(selection: Selection, router: Router, weights: Weights, owner: Owner | None) -> Routing | Skip | None:
    """All that is asked of a selection whose scores come from a router."""
    where = module_path(selection.node)
    name = _name(selection)
    proof = prove_experts(selection, router, weights)
    cut, reason = find_cut(selection, router, weights)
    if _takes_lowest(selection):
        cut, reason = None, "it takes the lowest scores"
    if cut is None:
        return Skip(name, reason, routing=proof.at is not None)
    scope = g.common_path([where, *proof.paths]) if where is not None else _parent(_weight_path(router.weight), 2)
    if proof.at is None:
        asks = owner is not None and (proof.leaves_graph or _becomes_one_hot(selection.ids, router.num_experts))
        block = owner.expert_block(router.weight, router.num_experts) if owner is not None and asks else None
        if block is not None and proof.leaves_graph and not any(e.user.op == "output" for e in cut.weights):
            return Skip(name, "its ids leave the graph without their weights, which may still be looked up by them", True)
        if block is None and op(selection.node) in ("max", "argmax") and not _becomes_one_hot(selection.ids, router.num_experts):
            return None  # the likeliest token of a vocabulary
        if block is None:
            return Skip(name, f"its ids are never seen to select among {router.num_experts} experts{proof.hint}")
        scope = block
    site = Site(scope, router.num_experts, selection.k, router.hidden_size, scoring(selection, router))
    return Routing(site, selection, router, cut, proof.at, _weighs_input(cut, proof, router, weights))


# ---------------------------------------------------------------------------------------------------- selection


def selections(graph: fx.Graph) -> Iterator[Selection]:
    """Every choice of a fixed number of best entries along the last axis."""
    for node in graph.nodes:
        rule = _SELECTION_RULES.get(op(node))
        selection = rule(node) if rule is not None else None
        if selection is not None:
            yield selection


def _unreadable(graph: fx.Graph) -> Iterator[Selection]:
    """Choices over the last axis in another way than by a fixed number of best entries; their k has no meaning."""
    for node in graph.nodes:
        name = op(node)
        if name not in ("sort", "argsort", "multinomial") or not _over_last_axis(node.args[0], -1):
            continue
        if name == "multinomial" or _SELECTION_RULES[name](node) is None:
            ids = outputs(node, 1) if name == "sort" else [node]
            yield from (Selection(node, node.all_input_nodes[0], 1, i, None, False) for i in ids)


def _topk(node: Node) -> Selection | None:
    """topk(scores, k, dim=-1) = the k largest of each row, or the k smallest."""
    scores, k = node.args[0], argument(node, "k", 1)
    if not _over_last_axis(scores, argument(node, "dim", 2, -1)) or not isinstance(k, int):
        return None
    ids, values = outputs(node, 1), outputs(node, 0)
    if len(ids) != 1 or len(values) > 1 or k < 1:
        return None
    ordered = argument(node, "sorted", 4, True) is True
    return Selection(node, scores, k, ids[0], values[0] if values else None, ordered)  # type: ignore[arg-type]


def _sort(node: Node) -> Selection | None:
    """sort(scores)[:, :k] = topk(scores, k), when nothing but the first k is read."""
    return _first_sorted(node, outputs(node, 1), outputs(node, 0))


def _argsort(node: Node) -> Selection | None:
    """argsort(scores)[:, :k] = topk(scores, k).indices, when nothing but the first k is read."""
    return _first_sorted(node, [node], [])


def _first_sorted(node: Node, ordered_ids: list[Node], ordered_values: list[Node]) -> Selection | None:
    # sort.stable(self, *, stable, dim, descending) takes all but the tensor by keyword
    scores, dim = node.args[0], argument(node, "dim", 1 if "stable" not in node.kwargs else len(node.args), -1)
    ids, values = _only_slice(ordered_ids), _only_slice(ordered_values)
    if not _over_last_axis(scores, dim) or ids is None or ids[1] is None:
        return None
    if ordered_values and (values is None or values[1] not in (None, ids[1])):
        return None
    return Selection(node, scores, ids[1], ids[0], values[0] if values else None, True)  # type: ignore[arg-type]


def _only_slice(taken: list[Node]) -> tuple[Node, int | None] | None:
    """The one slice ``[..., :k]`` that is all that is read of a sort's output, with its k; None if it is unused."""
    users = [u for t in taken for u in t.users]
    while len(users) == 1 and op(users[0]) == "slice" and _whole(users[0]):
        users = list(users[0].users)  # x[:, :k] is written as x[:][..., :k]
    if not users:
        return None
    first = users[0]
    end = argument(first, "end", 3)
    fits = (
        len(users) == 1
        and op(first) == "slice"
        and argument(first, "dim", 1, 0) in (-1, rank(first) - 1)
        and argument(first, "start", 2, 0) in (0, None)
        and argument(first, "step", 4, 1) == 1
        and isinstance(end, int)
        and 0 < end == size(first, -1)
    )
    return first, (end if fits else None)


def _whole(node: Node) -> bool:
    return same_shape(node, node.args[0])


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


def _takes_lowest(selection: Selection) -> bool:
    """Whether the k smallest are chosen, and that not of negated scores."""
    node, name = selection.node, op(selection.node)
    if name == "topk":
        highest = argument(node, "largest", 3, True) is True
    elif name in ("sort", "argsort"):
        highest = argument(node, "descending", 2 if "stable" not in node.kwargs else len(node.args) + 1, False) is True
    else:
        highest = True
    return not highest and op(selection.scores) != "neg"


def _over_last_axis(scores: object, dim: object) -> bool:
    return isinstance(scores, Node) and is_float(scores) and rank(scores) >= 2 and dim in (-1, rank(scores) - 1)


_SELECTION_RULES = {
    "topk": _topk, "sort": _sort, "argsort": _argsort, "max": _max, "argmax": _argmax, "cat": _joined, "concat": _joined,
}  # fmt: skip
#: Ops without one of which a graph routes nothing.
SELECTIONS = frozenset(_SELECTION_RULES) - {"cat", "concat"} | {"multinomial"}


# ----------------------------------------------------------------------------------------------------- backward


def find_router(selection: Selection, weights: Weights) -> Router | None:
    """The linear map behind the scores, or None: then the selection is no expert routing."""
    num_experts = size(selection.scores, -1)
    linear = _walk_to_linear(selection.scores, num_experts, weights) if num_experts is not None else None
    if linear is None or num_experts is None or selection.k > num_experts:
        return None
    hidden, weight = _operands(linear, weights)
    hidden_size = size(hidden, -1)
    leaf = weight  # an engine's handle
    if weight is not None and weight in weights:
        leaf = next((n for n in weights.leaves(weight) if rank(n) >= 2), None)
    if hidden is None or hidden_size is None or leaf is None:
        return None
    return Router(linear, hidden, leaf, num_experts, hidden_size)


def _walk_to_linear(scores: Node, num_experts: int, weights: Weights) -> Node | None:
    """Depth-first, in argument order, through score-wise ops that keep an entry for every expert."""
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(scores, False)]  # (node, whether experts were sliced off a wider row)
    while stack:
        node, sliced = stack.pop()
        if node in seen or node in weights:
            continue
        seen.add(node)
        name = op(node)
        if (name in LINEAR or name == "getitem") and _operands(node, weights)[1] is not None:
            width = size(node, -1)
            if width == num_experts or (sliced and width is not None and width > num_experts):
                return node
            continue
        if name not in SCORE_WISE:
            continue
        sliced = sliced or name in ("slice", "narrow")
        stack.extend((i, sliced) for i in reversed(node.all_input_nodes) if is_float(i) and rank(i) >= 2)
    return None


def _operands(linear: Node, weights: Weights) -> tuple[Node | None, Node | None]:
    """(hidden state, weight) of a linear map whose weight is a function of parameters alone, or an engine's handle."""
    if op(linear) == "getitem":
        call: Node = linear.args[0]  # type: ignore[assignment]
        return tuple(call.kwargs[key] for key in BEHIND_HANDLE.get(op(call), ())) or (None, None)  # type: ignore[return-value]
    if op(linear) == "einsum":
        x, w = _einsum_operands(linear)
    else:
        first = 1 if op(linear) in ("addmm", "baddbmm") else 0
        x, w = linear.args[first : first + 2]
    if isinstance(x, Node) and isinstance(w, Node) and w in weights and x not in weights:
        return x, w
    return None, None


def _einsum_operands(node: Node) -> tuple[object, object]:
    """The (x, w) of einsum("...h,eh->...e"), whichever stands first; a pair of None for any other einsum."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2 or "->" not in equation:
        return None, None
    left, result = equation.replace(" ", "").split("->")
    for (x, dims), (w, axes) in permutations(zip(operands, left.split(","), strict=True)):
        if len(axes) == 2 and len(dims) >= 2 and dims[-1] in axes and result == dims[:-1] + axes.replace(dims[-1], ""):
            return x, w
    return None, None


def scoring(selection: Selection, router: Router) -> str:
    """How scores are made, for people: ``softmax -> topk``."""
    steps, node, seen = [], selection.scores, set()
    while isinstance(node, Node) and node is not router.linear and node not in seen:
        seen.add(node)
        name = op(node).strip("_")
        if name in _NAMED_SCORES:
            steps.append(_NAMED_SCORES[name])
        elif name == "add" and any(rank(i) <= 1 or size(i, 0) == 1 for i in node.all_input_nodes[1:]):
            steps.append("+bias")
        floats = [i for i in node.all_input_nodes if is_float(i) and rank(i) >= 2]
        if not floats:
            break
        node = floats[0]
    chosen = op(selection.node) if op(selection.node) not in ("cat", "concat") else f"{selection.k} x argmax"
    return " -> ".join([*dict.fromkeys(reversed(steps or ["logits"])), chosen])


_NAMED_SCORES = {
    "softmax": "softmax", "exp": "softmax", "sigmoid": "sigmoid", "softplus": "softplus", "sqrt": "sqrt",
    "masked_fill": "masked", "where": "masked", "tanh": "tanh",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ forward


def find_cut(selection: Selection, router: Router, weights: Weights) -> tuple[Cut | None, str]:
    """The edges where ids and weights leave the router, or None and why no legal cut exists."""
    cut = Cut()
    weight_like: set[Node] = {selection.values} if selection.values is not None else set()
    dense_like: dict[Node, str] = {}
    reason = _follow_ids(selection.ids, router, weights, cut, weight_like, dense_like)
    reason = reason or _follow_weights(selection, weight_like, dense_like, cut)
    reason = reason or _follow_dense(router, dense_like, cut)
    reason = reason or _looks_up_scores(selection, router, weights, cut)
    if not reason and not (cut.ids or cut.dense):
        reason = "its ids are not used outside the router"
    if not reason and cut.ids and cut.dense:
        reason = "its ids leave the router both as pairs and as a dense matrix"
    return (None, reason) if reason else (cut, "")


def _looks_up_scores(selection: Selection, router: Router, weights: Weights, cut: Cut) -> str:
    """Scores read by what became of the ids, other than by ``gather``: weights that would change with the ids."""
    scores, stack = {router.linear}, [router.linear]
    while stack:
        for user in stack.pop().users:
            wide = op(user) in SCORE_WISE and is_float(user) and size(user, -1) == router.num_experts
            if wide and user not in scores and (user < selection.node or user is selection.scores):
                scores.add(user)
                stack.append(user)
    seen: set[Node] = set()
    frontier = [e.user for e in cut.ids if e.user.op != "output"]
    for _ in range(_REACH):
        reached = []
        for node in frontier:
            if node in seen or _meets_experts(node, router, weights):
                continue
            seen.add(node)
            if any(i in scores or (op(i) in g.LAYOUT and i.all_input_nodes[0] in scores) for i in node.all_input_nodes):
                return f"its ids look scores up in a way that is not known ({op(node)}), so its weights would change with them"
            if not is_float(node) or size(node, -1) in (router.num_experts, selection.k):
                reached += [u for u in node.users if u.op == "call_function"]
        if not reached:
            break
        frontier = reached
    return ""


def _follow_ids(
    ids: Node, router: Router, weights: Weights, cut: Cut, weight_like: set[Node], dense_like: dict[Node, str]
) -> str:
    """Sort every use of the ids into: inside the router, a dense matrix of the router's, or the experts'."""
    stack, seen = [ids], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            name = op(user)
            if name in ID_WISE and user.args[0] is node and is_integer(user):
                stack.append(user)
            elif _gathers_score(user, node, router, weights) and _stays_a_weight(user, node):
                weight_like.add(user)
            elif name == "scatter" and _scatters_into_experts(user, node, router):
                if _counts_tokens(user):
                    cut.counts += [Edge(user, reader) for reader in user.users]
                else:
                    dense_like[user] = ""
            elif name in ARITHMETIC:
                return f"its ids are changed by arithmetic ({name}) before they select"
            else:
                cut.ids.append(Edge(node, user))
            if _mutates(user, node):
                return f"its ids are changed in place by {name}"
    return ""


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
        return is_float(source) and rank(source) == rank(ids) and user.args[0] is not ids and source not in weights
    if name == "index":
        source, index = user.args[0], user.args[1]
        return index == [ids] and rank(source) == 1 and is_float(source)
    if name in ("index_select", "embedding"):
        source = user.args[0]
        return is_float(source) and rank(source) == 1
    return False


def _scatters_into_experts(user: Node, ids: Node, router: Router) -> bool:
    """Whether ``scatter(base, -1, ids, ...)`` marks each token's picks in a row of all experts."""
    dim, index = argument(user, "dim", 1), argument(user, "index", 2)
    return index is ids and dim in (-1, rank(user) - 1) and size(user, -1) == router.num_experts and user.args[0] is not ids


def _counts_tokens(scatter: Node) -> bool:
    """Whether ones, scattered by the ids into zeros, are only added up over the tokens."""
    if argument(scatter, "value", 3) != 1 or rank(scatter) != 2 or _background(scatter.args[0]) != "zero":
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
            if user in weight_like or user in rows:
                continue
            name = op(user)
            if name in WEIGHT_WISE and _joins_selected(user, cut, selection):
                cut.weights.append(Edge(node, user))  # the experts' own business: a mask of the picks of one expert
            elif name in WEIGHT_WISE and is_float(user) and selection.is_per_pick(user):
                weight_like.add(user)
                stack.append(user)
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


#: What an op makes of a row over all experts that is zero ("zero") or -inf ("-inf") wherever nothing was picked.
_DENSE_RULES = {
    "zero": {
        "mul": "zero", "div": "zero", "bool": "picked", "sum": "row", "amax": "row", "clamp_min": "zero",
        **dict.fromkeys(g.RESHAPES | g.CASTS, "zero"),
    },
    "-inf": {
        "softmax": "zero", "_softmax": "zero", "sigmoid": "zero", "exp": "zero", "add": "-inf",
        **dict.fromkeys(g.RESHAPES | g.CASTS, "-inf"),
    },
}  # fmt: skip


def _follow_dense(router: Router, dense_like: dict[Node, str], cut: Cut) -> str:
    """Follow matrices [..., E] made by scattering; the experts must read them where unpicked entries are zero."""
    stack = []
    for node in list(dense_like):
        state = _background(node.args[0])
        if state is None:
            return "its picks are scattered into a matrix whose other entries are neither 0 nor -inf"
        dense_like[node] = state
        stack.append(node)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in dense_like:
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
        if name in WEIGHT_WISE and same_shape(user, node):
            return "row"
        divides = any(dense_like.get(i) == "zero" for i in user.all_input_nodes)
        return "zero" if divides and _is_row_of_experts(user, router) else None
    after = _DENSE_RULES.get(state, {}).get(name)
    if after == "row":
        return "row" if any(_is_row_of_experts(u, router) or op(u) in WEIGHT_WISE for u in user.users) else None
    if after is None or not _is_row_of_experts(user, router):
        return None
    if name == "div" and user.args[0] is not node:
        return None
    if name in g.RESHAPES and not same_shape(user, node):
        return None  # the experts' own: no longer a row over experts for each row of ids
    if name in ("softmax", "_softmax") and argument(user, "dim", 1) not in (-1, rank(user) - 1):
        return None
    return after


def _is_row_of_experts(node: Node, router: Router) -> bool:
    return is_float(node) and size(node, -1) == router.num_experts and rank(node) <= 3


def _background(base: object) -> str | None:
    """What a freshly filled tensor holds: "zero", "-inf", or None for anything else."""
    while isinstance(base, Node) and op(base) in g.RESHAPES | g.CASTS | {"expand"}:
        base = base.args[0]
    if not isinstance(base, Node):
        return None
    name = op(base)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return "zero"
    fill = {"full": 1, "full_like": 1, "new_full": 2, "fill": 1, "masked_fill": None}.get(name)
    number = argument(base, "fill_value" if name != "fill" else "value", fill) if fill is not None else None
    return {0.0: "zero", float("-inf"): "-inf"}.get(number) if isinstance(number, (int, float)) else None


# -------------------------------------------------------------------------------------------------------- proof


@dataclass
class Proof:
    """What the ids were seen to do."""

    at: Node | None = None  # the first op where the ids meet the experts
    leaves_graph: bool = False
    paths: list[str] = field(default_factory=list)  # module paths of the ops that select among experts
    hint: str = ""


#: How many ops the proof follows from the ids before it gives up: dispatch code is a dozen, a layer a hundred.
_REACH = 64


def prove_experts(selection: Selection, router: Router, weights: Weights) -> Proof:
    """Follow the ids until an op meets weights stacked by expert, [E, ., .].

    The walk stays inside the parent of the module that selects, where the graph tells modules, and ends at other
    linear maps of activations, so that it never reaches the next layer's experts.
    """
    proof, seen = Proof(), set()
    proof.leaves_graph = _leaves_graph(selection.ids)
    compared = _compared(selection.ids)
    if set(compared) >= set(range(router.num_experts)) and all(
        _gates_activations(compared[e], router, weights) for e in (0, router.num_experts - 1)
    ):
        proof.at = compared[0]
        return proof
    scope = _parent(module_path(selection.node) or "", 1)
    frontier = [selection.ids]
    for _ in range(_REACH):
        reached: list[Node] = []
        for node in frontier:
            for user in node.users:
                if user in seen or not _within(user, scope) or (is_float(user) and selection.is_per_pick(user)):
                    continue  # a pick's weight is not its id
                seen.add(user)
                if _meets_experts(user, router, weights) or _weighs_experts(user, seen, router, weights):
                    proof.at = user if proof.at is None or user < proof.at else proof.at
                    proof.paths += [p for p in [module_path(user)] if p is not None]
                elif not (op(user) in LINEAR and _operands(user, weights)[1] is not None and rank(user.args[-1]) == 2):
                    reached.append(user)
        if proof.at is not None or not reached:
            break
        frontier = reached
    if proof.at is None and proof.leaves_graph:
        proof.hint = " in this graph; where the experts run outside it, compile the whole model or use experts that trace"
    return proof


def _compared(ids: Node) -> dict[int, Node]:
    """What the ids are compared with, one expert after the other: ``ids == 3``."""
    found: dict[int, Node] = {}
    for user in ids.users:
        if op(user) == "eq" and user.args[0] is ids and isinstance(user.args[1], int):
            found[user.args[1]] = user
        elif op(user) in ID_WISE and is_integer(user):
            found |= _compared(user)
    return found


def _gates_activations(mask: Node, router: Router, weights: Weights) -> bool:
    """Whether a mask of one expert's picks multiplies activations, a few ops on."""
    frontier = [mask]
    for _ in range(6):
        frontier = [u for n in frontier for u in n.users if u.op == "call_function"]
        for user in frontier:
            others = [i for i in user.all_input_nodes if is_float(i) and _carries_activations(i, router, weights)]
            if op(user) in ("mul", "where") and others:
                return True
    return False


def _becomes_one_hot(ids: Node, num_experts: int) -> bool:
    """Whether the ids become masks over all experts (some models add a class for picks that are off)."""
    return any(
        argument(u, "num_classes", 1) in (num_experts, num_experts + 1) if op(u) == "one_hot"
        else op(u) in ID_WISE and is_integer(u) and _becomes_one_hot(u, num_experts)
        for u in ids.users
    )  # fmt: skip


def _leaves_graph(ids: Node) -> bool:
    """Whether the ids themselves are an output of the graph, so that the experts may follow outside it."""
    return any(u.op == "output" or (op(u) in ID_WISE and is_integer(u) and _leaves_graph(u)) for u in ids.users)


#: Ops that multiply matrices.  An engine's own op (any namespace but ATen's) that reads a stack counts as one.
PRODUCTS = frozenset("bmm baddbmm matmul mm einsum _grouped_mm grouped_mm".split())


def _meets_experts(user: Node, router: Router, weights: Weights) -> bool:
    """Whether the op multiplies activations by a stack of one matrix (or more) per expert.

    A codebook, a prompt pool or a decoder indexed or weighted by picks is no stack of experts: nothing goes through it.
    """
    is_product = op(user) in PRODUCTS or not g.qualified_op(user).startswith(("aten.", "getitem"))
    if user.op != "call_function" or not is_product:
        return False
    stacks = [i for i in user.all_input_nodes if _is_expert_stack(i, router, weights)]
    return bool(stacks) and any(_carries_activations(i, router, weights) for i in user.all_input_nodes if i not in stacks)


def _is_expert_stack(node: Node, router: Router, weights: Weights) -> bool:
    """A weight [E, ., .], what ids or a scale picked from one, or one of its slices, where all are taken."""
    node = _whole_of_slice(node, router) or node
    while op(node) in g.LAYOUT | g.CASTS | {"index", "index_select", "embedding", "mul"} and node not in weights:
        node = node.all_input_nodes[0]
    return node in weights and rank(node) >= 3 and _stack_fits(size(node, 0), router.num_experts)


def _whole_of_slice(node: Node, router: Router) -> Node | None:
    """The stack that a node is one expert's slice of; None where not every expert's slice is taken."""
    while op(node) in g.LAYOUT | g.CASTS | {"getitem"}:
        node = node.all_input_nodes[0]
    if op(node) == "unbind" and argument(node, "dim", 1, 0) == 0:
        return node.all_input_nodes[0]
    if op(node) != "select" or node.args[1] != 0:
        return None
    stack = node.all_input_nodes[0]
    taken = {u.args[2] for u in stack.users if op(u) == "select" and u.args[1] == 0}
    return stack if taken >= set(range(router.num_experts)) else None


def _carries_activations(node: Node, router: Router, weights: Weights) -> bool:
    """Whether a value depends on activations in another way than through the router's own scores."""
    stack: list[Node] = [node]
    seen: set[Node] = set()
    while stack:
        n = stack.pop()
        if n in seen or n in weights or n is router.linear:
            continue
        seen.add(n)
        if is_float(n) and n < router.linear and n not in weights:
            return True
        stack.extend(n.all_input_nodes)
    return False


def _weighs_input(cut: Cut, proof: Proof, router: Router, weights: Weights) -> bool:
    """Whether weights that left the router flow into a product with the site's own experts."""
    if proof.at is None:
        return False
    own = {i for i in proof.at.all_input_nodes if _is_expert_stack(i, router, weights)}
    seen: set[Node] = set()
    stack = [e.user for e in (*cut.weights, *cut.dense)]
    while stack and len(seen) < 4 * _REACH:
        node = stack.pop()
        if node in seen or not is_float(node):
            continue
        seen.add(node)
        if own.intersection(node.all_input_nodes) and _meets_experts(node, router, weights):
            return True
        stack.extend(node.users)
    return False


def _weighs_experts(user: Node, from_ids: set[Node], router: Router, weights: Weights) -> bool:
    """Whether the op joins what came from the ids with the outputs of a stack of experts, run on the router's input."""
    stack = [i for i in user.all_input_nodes if i not in from_ids and is_float(i)]
    seen: set[Node] = set()
    while stack and len(seen) < _REACH:
        node = stack.pop()
        if node in seen or node in from_ids or node in weights or node < router.hidden or node is router.linear:
            continue
        seen.add(node)
        if _meets_experts(node, router, weights):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _stack_fits(stacked: int | None, num_experts: int) -> bool:
    """Routers may score a few experts without weights (identity, skip), so the stack may be a little shorter."""
    return stacked is not None and num_experts - max(num_experts // 2, 1) < stacked <= num_experts


def _within(node: Node, scope: str) -> bool:
    path = module_path(node)
    return path is None or not scope or path == scope or path.startswith(scope + ".") or node.op == "output"


# -------------------------------------------------------------------------------------------------------- names


def _weight_path(weight: Node) -> str:
    return normal_name(g.source_name(weight) or "")


def _parent(path: str, steps: int) -> str:
    return ".".join(path.split(".")[:-steps]) if path else ""


def _distinct_names(found: list[Routing]) -> list[Routing]:
    """Two routers in one block are told apart by their own modules' paths; one router run twice is one site."""
    by_name: dict[str, list[Routing]] = {}
    for routing in found:
        by_name.setdefault(routing.site.name, []).append(routing)
    return [_renamed(r) if len({o.router.weight for o in by_name[r.site.name]}) > 1 else r for r in found]


def _renamed(routing: Routing) -> Routing:
    name = module_path(routing.selection.node) or _parent(_weight_path(routing.router.weight), 1)
    return replace(routing, site=replace(routing.site, name=name))
