"""Step 3: put the policy's ops on the cut.

Each policy is one function from a ``Decision`` (the nodes that hold ids and weights) to a new one.  ``reroute`` takes
the decision off the cut, hands it through the policies in order, folds what they switched off, and puts it back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.node import Node

import moe_fx.ops  # noqa: F401  (defines torch.ops.moe_fx)
from moe_fx.passes import graph as g
from moe_fx.passes.bind import Binder
from moe_fx.passes.cut import PARTS, WEIGHT_WISE, Edge, fills_with, leaves_weights_out
from moe_fx.passes.find_sites import Routing
from moe_fx.passes.mlp import Experts
from moe_fx.passes.proof import PRODUCTS
from moe_fx.passes.region import find_region
from moe_fx.policy import BEAM, NAEE, OEA, SERE, Baseline, Drop, ExFold, Policy, SmallerK, StaticPrune, TopP

aten = torch.ops.aten


@dataclass(frozen=True)
class Decision:
    """The nodes that hold a routing decision: ids ``[T, K]`` and every form of the weights ``[T, K]`` that is read."""

    ids: Node
    weights: tuple[Node, ...]
    may_be_off: bool = False  # whether ids may be -1
    own: Node | None = None  # the ids before any were switched off, where what is off must still learn


def reroute(
    gm: fx.GraphModule,
    routing: Routing,
    policies: tuple[Policy, ...],
    binder: Binder,
    *,
    experts: Experts | None = None,
    stats: bool = False,
    apply: Callable[[fx.Graph, Decision], Decision] | None = None,
) -> str | None:
    """Rewrite one site.  Returns None when done, or the reason why it cannot be done: then nothing was changed.

    ``apply`` puts the policies on the decision in another way than by an op for each.

    With ``experts``, what the experts region computes, one op takes the region's place and skips what is off;
    otherwise the region stays, and what is off is folded.
    """
    carriers = _carriers(routing, policies, experts)
    hidden = [routing.router.hidden] if _switches_off(policies) else []
    reads = [experts.hidden, *experts.stacks] if experts is not None else []
    counts = _distinct(routing.cut.counts) if experts is None else []
    layouts = _layouts_of_ids(routing) if experts is None else set()
    shapes = [i for n in layouts for i in n.all_input_nodes if i not in layouts]  # that ids are laid out like
    last = max([routing.selection.ids, *carriers, *hidden, *reads, *counts, *shapes])
    reason = _obstacle(routing, policies, carriers, last) if experts is None else None
    if reason is not None:
        return reason
    if any(p.needs_order for p in policies):
        sort_selection(routing)
    graph = gm.graph
    for policy in policies:
        if isinstance(policy, Baseline) and type(policy) in _RESTRICT:
            _restrict_selection(graph, routing, policy, binder)
    with graph.inserting_after(last):
        anchor = graph.call_function(aten.alias.default, (last,))  # new nodes go before it; erased at the end
    with graph.inserting_before(anchor):
        decision = before = _read(graph, routing, carriers)
        for policy in policies if apply is None else ():
            if type(policy) in _APPLY:
                decision = _APPLY[type(policy)](graph, decision, routing, policy, binder)
        if apply is not None:
            decision = apply(graph, decision)
        unfolded = decision.ids
        if decision.own is not None:
            decision = _keep_own(graph, decision)
        elif decision.may_be_off and experts is None:
            decision = _fold(graph, decision)
        if routing.distinct and experts is None and decision.ids is not before.ids:
            decision = _keep_distinct(graph, decision, routing)
        if stats:
            binder.count(routing, before.ids, decision.ids, unfolded)
        if experts is not None:
            _replace_experts(graph, decision, experts)
        else:
            _put_back(graph, routing, carriers, decision)
    if experts is None:
        _restore_order(routing, anchor)
    graph.erase_node(anchor)
    return None


def _switches_off(policies: tuple[Policy, ...]) -> bool:
    return any(p.switches_off for p in policies)


# ------------------------------------------------------------------------------------------------------ policies


def _apply_sere(graph: fx.Graph, decision: Decision, routing: Routing, policy: SERE, binder: Binder) -> Decision:
    similarity = binder.similarity(routing, policy)
    args = (decision.ids, similarity, *binder.sere_settings(routing, policy), None, policy.max_tokens)
    return replace(decision, ids=g.call(graph, torch.ops.moe_fx.sere_reroute.default, *args))


def _apply_beam(graph: fx.Graph, decision: Decision, routing: Routing, policy: BEAM, binder: Binder) -> Decision:
    """A pick stays on iff its mask logit >= logit(tau)."""
    logits = mask_logits(graph, routing, policy, binder)
    masked = [
        g.call_pair(graph, torch.ops.moe_fx.beam_mask.default, w, decision.ids, logits, float(policy.tau))
        for w in decision.weights
    ]
    if policy.train:
        binder.watch(routing, policy, g.call(graph, aten.gather.default, logits, 1, decision.ids))
    return Decision(masked[0][1], tuple(w for w, _ in masked), may_be_off=True, own=decision.ids if policy.train else None)


def mask_logits(graph: fx.Graph, routing: Routing, policy: BEAM, binder: Binder) -> Node:
    """hidden @ mask_router.T in float32, [T, E]."""
    hidden = routing.router.hidden
    if g.rank(hidden) != 2:
        hidden = g.call(graph, aten.reshape.default, hidden, [-1, routing.router.hidden_size])
    if g.dtype(hidden) != torch.float32:
        hidden = g.call(graph, aten.to.dtype, hidden, torch.float32)
    with _without_autocast(graph, g.fake(hidden).device.type) if policy.train else contextlib.nullcontext():
        return g.call(graph, aten.linear.default, hidden, binder.mask_router(routing, policy))


@contextlib.contextmanager
def _without_autocast(graph: fx.Graph, device: str) -> Iterator[None]:
    """Nodes put in meanwhile run in the dtypes they have, whatever autocast is on where the graph runs."""
    entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, (device, None, False, None))
    with torch.autocast(device, enabled=False):  # for the fake values, too
        yield
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))


def _apply_baseline(graph: fx.Graph, decision: Decision, routing: Routing, policy: Baseline, binder: Binder) -> Decision:
    op = getattr(torch.ops.moe_fx, policy.op).default
    tables, settings = binder.baseline_tables(routing, policy), [getattr(policy, key) for key in policy.settings]
    counts = [routing.router.num_experts] if policy.op == "drop" else []
    last: list[object] = []
    if "renormalise" in {argument.name for argument in op._schema.arguments}:
        last = [isinstance(policy, OEA) or (not isinstance(policy, Drop) and _renormalises(routing))]
    changed = [g.call_pair(graph, op, w, decision.ids, *tables, *counts, *settings, *last) for w in decision.weights]
    return Decision(changed[0][1], tuple(w for w, _ in changed), may_be_off=True)


#: What each policy does to a decision.  TopK leaves it as it is and needs no rewrite.
_APPLY: dict[type[Policy], Callable[..., Decision]] = {
    SERE: _apply_sere,
    BEAM: _apply_beam,
    **dict.fromkeys((SmallerK, Drop, TopP, NAEE, OEA, ExFold, StaticPrune), _apply_baseline),
}

#: Policies that also change what can be selected, with the op that does it.
_RESTRICT: dict[type[Policy], str] = {OEA: "only_first_picks", StaticPrune: "only_frequent"}


def _restrict_selection(graph: fx.Graph, routing: Routing, policy: Baseline, binder: Binder) -> None:
    """Have the selection see scores in which some experts cannot be selected."""
    selection = routing.selection.node
    scores = selection.args[0]
    # a score of 0 where scores become weights as they are, because an infinite one would spoil their sum
    plain = _is_squashed(scores, routing) and not {"+bias", "masked"}.intersection(routing.site.scoring.split(" -> "))
    fill = 0.0 if plain else -math.inf if g.argument(selection, "largest", 3, True) else math.inf
    with graph.inserting_before(selection):
        op, tables = getattr(torch.ops.moe_fx, _RESTRICT[type(policy)]).default, binder.baseline_tables(routing, policy)
        settings = [getattr(policy, key) for key in policy.settings]
        selection.replace_input_with(scores, g.call(graph, op, scores, *tables, *settings, fill))


def _renormalises(routing: Routing) -> bool:
    """Whether the router's weights have a fixed sum: they were divided by it, or squashed after the selection."""
    stack, seen = [e.node for e in (*routing.cut.weights, *routing.cut.dense)], set()
    while stack:
        node = stack.pop()
        if node in seen or node in (routing.selection.node, routing.selection.scores):
            continue
        seen.add(node)
        if g.op(node) in ("softmax", "_softmax") or (g.op(node) == "div" and g.op(node.args[1]) in ("sum", "add", "clamp")):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _fold(graph: fx.Graph, decision: Decision) -> Decision:
    """For experts that do not know id -1: an off pick goes to an expert that is active anyway, with weight 0."""
    folded = [g.call_pair(graph, torch.ops.moe_fx.fold_masked.default, w, decision.ids) for w in decision.weights]
    return Decision(folded[0][1], tuple(w for w, _ in folded))


def _keep_distinct(graph: fx.Graph, decision: Decision, routing: Routing) -> Decision:
    """For code that would write one of two picks of an expert over the other: the first pick gets the weight of both.

    The other goes, with weight 0, to an expert that the token does not have: one that is active, if there is any.
    """
    ids, k = decision.ids, routing.selection.k
    column, row = (g.call(graph, aten.unsqueeze.default, ids, axis) for axis in (2, 1))
    same = g.call(graph, aten.eq.Tensor, column, row)  # [T, K, K]
    again = g.call(graph, aten.any.dim, g.call(graph, aten.tril.default, same, -1), 2)  # [T, K]: an earlier pick is the same
    has = g.call(graph, aten.sum.dim_IntList, g.call(graph, aten.one_hot.default, ids, routing.router.num_experts), [1])  # [T, E]
    active = g.call(graph, aten.gt.Scalar, g.call(graph, aten.sum.dim_IntList, has, [0]), 0)  # [E]
    lacks = g.call(graph, aten.eq.Scalar, has, 0)
    order = g.call(graph, aten.mul.Tensor, lacks, g.call(graph, aten.add.Scalar, active, 1))
    _, free = g.call_pair(graph, aten.topk.default, order, k)  # [T, K]
    place = g.call(graph, aten.cumsum.default, again, 1)  # 1 for the first pick that must go
    place = g.call(graph, aten.clamp_min.default, g.call(graph, aten.sub.Scalar, place, 1), 0)
    elsewhere = g.call(graph, aten.to.dtype, g.call(graph, aten.gather.default, free, 1, place), g.dtype(ids))
    weights = []
    for weight in decision.weights:
        of_same = g.call(graph, aten.mul.Tensor, same, g.call(graph, aten.unsqueeze.default, weight, 1))
        weights.append(g.call(graph, aten.masked_fill.Scalar, g.call(graph, aten.sum.dim_IntList, of_same, [2]), again, 0.0))
    return Decision(g.call(graph, aten.where.self, again, elsewhere, ids), tuple(weights))


def _keep_own(graph: fx.Graph, decision: Decision) -> Decision:
    """For training: an off pick stays at its own expert, with weight 0.

    Its mask logit learns by what that expert gives, and so can switch the pick on again.
    """
    off = g.call(graph, aten.lt.Scalar, decision.ids, 0)
    ids = g.call(graph, aten.where.self, off, decision.own, decision.ids)
    return Decision(ids, decision.weights)


# ----------------------------------------------------------------------------------------------------- the cut


def _replace_experts(graph: fx.Graph, decision: Decision, experts: Experts) -> None:
    """One op in the place of the experts region."""
    (weights,) = decision.weights
    args = experts.arguments(experts.parts(graph), experts.hidden, weights, decision.ids)
    result = g.call(graph, experts.op, *args)
    old = experts.region.output
    if g.dtype(old) != g.dtype(result):
        result = g.call(graph, aten.to.dtype, result, g.dtype(old))
    old.replace_all_uses_with(result)
    for node in reversed(experts.region.nodes):
        graph.erase_node(node)
    _erase_unused([*experts.region.replaced, *experts.region.inputs])


def _erase_unused(nodes: list[Node]) -> None:
    """Erase what only the erased region read, so that no compiler need find out that it is dead."""
    while nodes:
        node = nodes.pop()
        if node.op == "call_function" and not node.users and not node._erased and not g.mutates(node):
            nodes += node.all_input_nodes
            node.graph.erase_node(node)


def _carriers(routing: Routing, policies: tuple[Policy, ...], experts: Experts | None) -> list[Node]:
    """The nodes whose values the rewrite replaces beside the ids: dense matrices, or weights that may become 0."""
    if experts is not None:
        return [n for n in experts.region.replaced if g.is_float(n)]
    if routing.cut.dense:
        return _distinct(routing.cut.dense)
    return _distinct(routing.cut.weights) if _needs_weights(routing, policies) else []


def _needs_weights(routing: Routing, policies: tuple[Policy, ...]) -> bool:
    """Whether weights become 0: those of picks that are off, or of an expert's second pick where there may be none."""
    return _switches_off(policies) or (routing.distinct and any(isinstance(p, SERE) for p in policies))


def _obstacle(routing: Routing, policies: tuple[Policy, ...], carriers: list[Node], last: Node) -> str | None:
    """Why the policies cannot be put on this cut."""
    zeroes = _needs_weights(routing, policies)
    if zeroes and not carriers:
        return "its picks carry no weights, so a pick cannot be switched off"
    if zeroes and leaves_weights_out(routing.selection, routing.cut):
        return "the weights of some of its picks are not read, so that a weight of 0 would not switch them off"
    if not routing.cut.dense and not all(map(routing.selection.is_per_pick, carriers)):
        return "its weights leave the router in another shape than its ids"
    moves = routing.selection.k > 1 and any(isinstance(p, SERE) for p in policies)
    if routing.experts is not None and routing.selection.k > 1 and not _come_together(routing):
        return "what its picks give is neither weighed nor added up, as predictions of the likeliest classes are not"
    weighs_input = routing.weighs_input and not _scales_output(routing)
    if moves and weighs_input and routing.cut.dense:
        return "its weights multiply the experts' input, where two picks of one expert cannot be merged"
    if _switches_off(policies) and has_capacity(routing):
        return "its experts have a capacity, in which a pick that is off would still take a place"
    if _switches_off(policies) and weighs_input:
        return "its weights multiply the experts' input, and an expert may give something for an input of 0"
    if _switches_off(policies) and not _gives_nothing_for_zero(routing):
        return "its weights stand before a part of its experts that may give something for a weight of 0"
    if zeroes and not _are_final(carriers, routing):
        return "its weights are not final where they leave the router: what comes after would undo a weight of 0"
    if zeroes and g.mutates_between(routing.router.linear, last):
        return "a value is changed in place between its router and its weights"
    if any(g.mutates(n) for n in _between(_early_users(routing, last), last)):
        return "its experts begin before its weights are final, and values in between are changed in place"
    return None


_SQUASHES = frozenset("softmax _softmax sigmoid exp log_softmax log_sigmoid softplus tanh relu".split())
_JOINS = frozenset("cat concat stack".split())
_COMPARES = frozenset("gt lt ge le eq ne".split())


def _are_final(carriers: list[Node], routing: Routing) -> bool:
    """Whether weights are only reshaped, scaled and multiplied from here on: not squashed, compared or divided by."""
    seen: set[Node] = set(carriers)
    stack = list(carriers)
    while stack:
        node = stack.pop()
        for user in node.users:
            name = g.op(user)
            if name in _COMPARES or (name == "div" and user.args[1] in seen):
                return False
            if user.op == "output" and not _is_squashed(node, routing):
                return False  # raw logits leave the graph
            alone = name in _JOINS or all(i in seen for i in user.all_input_nodes if g.is_float(i))
            if user in seen or not alone or not (g.is_float(user) or (g.value(user) is not None and g.dtype(user) is None)):
                continue
            if name in _SQUASHES:
                return False
            seen.add(user)
            stack.append(user)
    return True


def _gives_nothing_for_zero(routing: Routing) -> bool:
    """Whether what stands between the weights and the experts' output turns 0 into 0, whichever expert was picked."""
    region = find_region(routing)
    leaves = {(e.node, e.user) for e in (*routing.cut.weights, *routing.cut.dense)}
    picked = {e.user for e in routing.cut.ids}  # what depends on the ids
    scaled: set[Node] = set()  # what is 0 where a weight is
    for node in region.nodes if region is not None else ():
        inputs = [i for i in node.all_input_nodes if i in scaled or (i, node) in leaves or fills_with(i) == "zero"]
        others = [i for i in node.all_input_nodes if i not in inputs and g.is_float(i)]
        if not picked.isdisjoint(node.all_input_nodes):
            picked.add(node)
        if not inputs or not g.is_float(node):
            continue
        if g.op(node) in _NOT_ZERO_AT_ZERO or (g.op(node) in _ADDS and not picked.isdisjoint(others)):
            return False
        scaled.add(node)
    return True


def _come_together(routing: Routing) -> bool:
    """Whether the picks' outputs become one vector for each token, or are at least weighed."""
    if routing.cut.dense or find_region(routing) is not None:
        return True
    stack, seen = [e.user for e in routing.cut.weights], set()
    while stack:
        node = stack.pop()
        if g.op(node) in PRODUCTS | {"mul"} or node.op == "output":
            return True
        # weights may be joined with those of shared experts, but not with what the picks give
        joins = g.op(node) in _JOINS and g.rank(node) <= g.rank(routing.selection.scores)
        if node not in seen and (joins or g.op(node) in g.LAYOUT | PARTS | WEIGHT_WISE | {"index", "index_select", "sum"}):
            seen.add(node)
            stack.extend(node.users)
    return False


def _scales_output(routing: Routing) -> bool:
    """Whether weights that multiply what goes into a layer of the experts scale their output all the same.

    That is so where it is their last layer, behind which no op is other than linear.
    """
    region = find_region(routing)
    leaves = {(e.node, e.user) for e in (*routing.cut.weights, *routing.cut.dense)}
    scaled: set[Node] = set()
    for node in region.nodes if region is not None else ():
        inputs = [i for i in node.all_input_nodes if i in scaled or (i, node) in leaves]
        linear = g.op(node) in _LINEAR_IN_ONE and len(inputs) == 1 and not (g.op(node) == "linear" and len(node.args) > 2)
        if inputs and not linear and g.op(node) not in _LINEAR_IN_ALL:
            return False
        scaled |= {node} if inputs else set()
    return region is not None


#: Ops that are linear in one of the values that they multiply, and in all of those that they join.
_LINEAR_IN_ONE = frozenset("mul linear mm bmm matmul einsum".split()) | g.LAYOUT | g.CASTS
_LINEAR_IN_ALL = frozenset("sum add cat stack select slice getitem unbind split chunk".split())

#: Ops that give something for 0.
_NOT_ZERO_AT_ZERO = frozenset("sigmoid exp softmax _softmax softplus cos log_sigmoid reciprocal".split())
_ADDS = frozenset("add sub rsub addmm baddbmm".split())


def _is_squashed(weights: Node, routing: Routing) -> bool:
    """Whether scores became weights somewhere between the router's linear map and here."""
    stack, seen = [weights], set()
    while stack:
        node = stack.pop()
        if node in seen or node is routing.router.linear:
            continue
        seen.add(node)
        if g.op(node) in _SQUASHES:
            return True
        stack.extend(node.all_input_nodes)
    return False


def has_capacity(routing: Routing) -> bool:
    """Whether the experts number each pick's place among its expert's tokens: a cumulative count over [T, E]."""
    seen: set[Node] = set()
    stack = [e.user for e in routing.cut.ids]
    while stack:
        node = stack.pop()
        if node in seen or g.dtype(node) is None or g.is_float(node):
            continue
        seen.add(node)
        if g.op(node) == "cumsum" and g.rank(node) >= 2:
            return True
        stack.extend(node.users)
    return False


def _early_users(routing: Routing, last: Node) -> list[Node]:
    """Users on the cut that stand before the place where the new decision can be computed."""
    cut = routing.cut
    return [e.user for e in (*cut.ids, *cut.counts, *cut.weights, *cut.dense) if e.user < last]


def _between(users: list[Node], last: Node) -> list[Node]:
    """The nodes from the first of ``users`` up to ``last``, in order; none if there are no users."""
    nodes: list[Node] = []
    node = min(users, default=last)
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def sort_selection(routing: Routing) -> None:
    """SERE's primary picks are the best: have the selection put them first.  The set of picks stays the same."""
    selection = routing.selection
    if selection.sorted:
        return
    if g.op(selection.node) == "topk":
        largest = g.argument(selection.node, "largest", 3, True)
        selection.node.args = (selection.node.args[0], selection.k, -1, largest, True)
        selection.node.kwargs = {}
        return
    for last in (selection.ids, selection.values):  # the last of an order that ascends are the first of the same turned round
        if last is not None:
            with last.graph.inserting_before(last):
                turned = g.call(last.graph, aten.flip.default, last.args[0], [-1])
            last.args, last.kwargs = (turned, -1, 0, selection.k), {}


def _read(graph: fx.Graph, routing: Routing, carriers: list[Node]) -> Decision:
    """The decision as it stands on the cut, as [T, K]."""
    selection = routing.selection
    ids, weights = selection.ids, carriers
    if routing.cut.dense:
        index = g.call(graph, aten.unsqueeze.default, ids, -1) if selection.squeezed else ids
        weights = [_gathered(graph, m, index, selection.k) for m in carriers]
    return Decision(_as_picks(graph, ids, selection.k), tuple(_as_picks(graph, w, selection.k) for w in weights))


def _gathered(graph: fx.Graph, matrix: Node, index: Node, k: int) -> Node:
    """The picks' entries of a matrix [..., E], which may have its tokens in another shape than the ids."""
    if g.rank(matrix) != g.rank(index):
        matrix = g.call(graph, aten.reshape.default, matrix, [-1, g.size(matrix, -1)])
        index = _as_picks(graph, index, k)
    return g.call(graph, aten.gather.default, matrix, -1, index)


def _as_picks(graph: fx.Graph, node: Node, k: int) -> Node:
    """[T, K] of what has one entry for every pick: some routers keep batch and sequence apart, or one pick's axis out."""
    if g.rank(node) == 2 and g.size(node, 1) == k:
        return node
    return g.call(graph, aten.reshape.default, node, [-1, k])


def _put_back(graph: fx.Graph, routing: Routing, carriers: list[Node], decision: Decision) -> None:
    """Point every edge of the cut at the new decision."""
    as_it_was = _scattered if routing.cut.dense else _like
    replacements = {c: as_it_was(graph, w, c, decision) for c, w in zip(carriers, decision.weights, strict=True)}
    for edge in (*routing.cut.dense, *routing.cut.weights):
        if edge.node in replacements:
            edge.user.replace_input_with(edge.node, replacements[edge.node])
    counted = {matrix: _counted_again(graph, matrix, decision) for matrix in _distinct(routing.cut.counts)}
    for edge in routing.cut.counts:
        edge.user.replace_input_with(edge.node, counted[edge.node])
    _redirect_ids(graph, routing, _like(graph, decision.ids, routing.selection.ids, decision))


def _counted_again(graph: fx.Graph, matrix: Node, decision: Decision) -> Node:
    """Ones added up at the new picks [T, E], instead of put there: a token may have an expert twice."""
    ones = g.call(graph, aten.ones_like.default, decision.ids)
    ones = g.call(graph, aten.to.dtype, ones, g.dtype(matrix))
    return g.call(graph, aten.scatter_add.default, matrix.args[0], -1, decision.ids, ones)


def _like(graph: fx.Graph, flat: Node, old: Node, _: Decision) -> Node:
    """What is [T, K] in the shape that the old one has."""
    return flat if g.same_shape(flat, old) else g.call(graph, aten.view_as.default, flat, old)


def _scattered(graph: fx.Graph, weights: Node, matrix: Node, decision: Decision) -> Node:
    """The weights in a matrix [..., E], in the place of the old one.

    Two picks may have come to the same expert, and an off pick points at an active one with weight 0: add.
    """
    flat = matrix if g.rank(matrix) == 2 else g.call(graph, aten.reshape.default, matrix, [-1, g.size(matrix, -1)])
    empty = g.call(graph, aten.zeros_like.default, flat)
    return _like(graph, g.call(graph, aten.scatter_add.default, empty, -1, decision.ids, weights), matrix, decision)


def _redirect_ids(graph: fx.Graph, routing: Routing, new_ids: Node) -> None:
    """Rebuild, on the new ids, every layout of the ids that leaves the router."""
    layouts = _layouts_of_ids(routing)
    rebuilt = {routing.selection.ids: new_ids}

    def relaid(node: Node) -> Node:
        if node not in rebuilt:
            rebuilt[node] = graph.node_copy(node, lambda n: relaid(n) if n in layouts or n in rebuilt else n)
        return rebuilt[node]

    for edge in routing.cut.ids:
        edge.user.replace_input_with(edge.node, relaid(edge.node))
    for old in reversed(rebuilt):
        if not old.users and old is not routing.selection.ids:
            graph.erase_node(old)


def _layouts_of_ids(routing: Routing) -> set[Node]:
    """What stands between the ids and where they leave the router: the same ids in another layout."""
    found: set[Node] = set()
    for edge in routing.cut.ids:
        node = edge.node
        while node is not routing.selection.ids:
            found.add(node)
            node = node.all_input_nodes[0]
    return found


def _distinct(edges: list[Edge]) -> list[Node]:
    return list(dict.fromkeys(edge.node for edge in edges))


def _restore_order(routing: Routing, anchor: Node) -> None:
    """Move what reads the new nodes but was written before them.

    The experts may begin to read the ids before the router has finished the weights.
    """
    users = _early_users(routing, anchor)
    late: list[Node] = []
    for node in _between(users, anchor):
        if node in users or any(i in late for i in node.all_input_nodes):
            late.append(node)
    for node in reversed(late):
        anchor.append(node)
