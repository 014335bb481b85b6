"""Step 3: put the policy's ops on the cut.

Each policy is one function from a ``Decision`` (the nodes that hold ids and weights) to a new one.  ``reroute`` takes
the decision off the cut, hands it through the policies in order, folds what they switched off, and puts it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.node import Node

import moe_fx.ops  # noqa: F401  (defines torch.ops.moe_fx)
from moe_fx.passes import graph as g
from moe_fx.passes.bind import Binder
from moe_fx.passes.find_sites import Edge, Routing
from moe_fx.passes.fuse_experts import Experts
from moe_fx.policy import BEAM, SERE, Policy

aten = torch.ops.aten


@dataclass(frozen=True)
class Decision:
    """The nodes that hold a routing decision: ids ``[T, K]`` and every form of the weights ``[T, K]`` that is read."""

    ids: Node
    weights: tuple[Node, ...]
    may_be_off: bool = False  # whether ids may be -1


def reroute(
    gm: fx.GraphModule,
    routing: Routing,
    policies: tuple[Policy, ...],
    binder: Binder,
    *,
    experts: Experts | None = None,
    stats: bool = False,
) -> str | None:
    """Rewrite one site.  Returns None when done, or the reason why it cannot be done: then nothing was changed.

    With ``experts``, what the experts region computes, one op takes the region's place and skips what is off;
    otherwise the region stays, and what is off is folded.
    """
    carriers = _carriers(routing, policies, experts)
    hidden = [routing.router.hidden] if _switches_off(policies) else []
    reads = [experts.hidden, *experts.stacks] if experts is not None else []
    last = max([routing.selection.ids, *carriers, *hidden, *reads])
    reason = _obstacle(routing, policies, carriers, last) if experts is None else None
    if reason is not None:
        return reason
    if any(isinstance(p, SERE) for p in policies):
        _sort_selection(routing)
    graph = gm.graph
    with graph.inserting_after(last):
        anchor = graph.call_function(aten.alias.default, (last,))  # new nodes go before it; erased at the end
    with graph.inserting_before(anchor):
        decision = before = _read(graph, routing, carriers)
        for policy in policies:
            if type(policy) in _APPLY:
                decision = _APPLY[type(policy)](graph, decision, routing, policy, binder)
        if decision.may_be_off and experts is None:
            decision = _fold(graph, decision)
        if stats:
            binder.count(routing, before.ids, decision.ids)
        if experts is not None:
            _replace_experts(graph, decision, experts)
        else:
            _put_back(graph, routing, carriers, _unflat(graph, decision, routing))
    if experts is None:
        _restore_order(routing, anchor)
    graph.erase_node(anchor)
    return None


def _switches_off(policies: tuple[Policy, ...]) -> bool:
    return any(isinstance(p, BEAM) for p in policies)


# ------------------------------------------------------------------------------------------------------ policies


def _apply_sere(graph: fx.Graph, decision: Decision, routing: Routing, policy: SERE, binder: Binder) -> Decision:
    similarity = binder.similarity(routing, policy)
    args = (decision.ids, similarity, policy.primary, float(policy.threshold), None, policy.max_tokens)
    return replace(decision, ids=g.call(graph, torch.ops.moe_fx.sere_reroute.default, *args))


def _apply_beam(graph: fx.Graph, decision: Decision, routing: Routing, policy: BEAM, binder: Binder) -> Decision:
    """mask_logits = hidden @ mask_router.T in float32; a pick stays on iff its mask logit >= logit(tau)."""
    hidden = routing.router.hidden
    if g.rank(hidden) != 2:
        hidden = g.call(graph, aten.reshape.default, hidden, [-1, routing.router.hidden_size])
    if g.dtype(hidden) != torch.float32:
        hidden = g.call(graph, aten.to.dtype, hidden, torch.float32)
    logits = g.call(graph, aten.linear.default, hidden, binder.mask_router(routing, policy))
    masked = [
        g.call_pair(graph, torch.ops.moe_fx.beam_mask.default, w, decision.ids, logits, float(policy.tau))
        for w in decision.weights
    ]
    return Decision(masked[0][1], tuple(w for w, _ in masked), may_be_off=True)


#: What each policy does to a decision.  TopK leaves it as it is and needs no rewrite.
_APPLY: dict[type[Policy], Callable[..., Decision]] = {SERE: _apply_sere, BEAM: _apply_beam}


def _fold(graph: fx.Graph, decision: Decision) -> Decision:
    """For experts that do not know id -1: an off pick goes to an expert that is active anyway, with weight 0."""
    folded = [g.call_pair(graph, torch.ops.moe_fx.fold_masked.default, w, decision.ids) for w in decision.weights]
    return Decision(folded[0][1], tuple(w for w, _ in folded))


# ----------------------------------------------------------------------------------------------------- the cut


def _replace_experts(graph: fx.Graph, decision: Decision, experts: Experts) -> None:
    """One op in the place of the experts region."""
    (weights,) = decision.weights
    args = (experts.hidden, experts.w_gate_up, experts.w_down, weights, decision.ids, experts.b_gate_up, experts.b_down)
    how = (experts.activation, experts.gated, experts.transposed, experts.alpha, experts.limit)
    result = g.call(graph, torch.ops.moe_fx.fused_experts.default, *args, *how)
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
    return _distinct(routing.cut.weights) if _switches_off(policies) else []


def _obstacle(routing: Routing, policies: tuple[Policy, ...], carriers: list[Node], last: Node) -> str | None:
    """Why the policies cannot be put on this cut."""
    if _switches_off(policies) and not carriers:
        return "its picks carry no weights, so a pick cannot be switched off"
    if not routing.cut.dense and any(not g.same_shape(c, routing.selection.ids) for c in carriers):
        return "its weights leave the router in another shape than its ids"
    if _switches_off(policies) and has_capacity(routing):
        return "its experts have a capacity, in which a pick that is off would still take a place"
    if _switches_off(policies) and routing.weighs_input:
        return "its weights multiply the experts' input, and an expert may give something for an input of 0"
    if _switches_off(policies) and not _are_final(carriers, routing):
        return "its weights are not final where they leave the router: what comes after would undo a weight of 0"
    if _switches_off(policies) and g.mutates_between(routing.router.linear, last):
        return "a value is changed in place between its router and its weights"
    if any(g.mutates(n) for n in _between(_early_users(routing, last), last)):
        return "its experts begin before its weights are final, and values in between are changed in place"
    return None


_SQUASHES = frozenset("softmax _softmax sigmoid exp log_softmax log_sigmoid softplus tanh relu".split())
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
            alone = all(i in seen for i in user.all_input_nodes if g.is_float(i))
            if user in seen or not alone or not (g.is_float(user) or (g.value(user) is not None and g.dtype(user) is None)):
                continue
            if name in _SQUASHES:
                return False
            seen.add(user)
            stack.append(user)
    return True


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
    return [e.user for e in (*routing.cut.ids, *routing.cut.weights, *routing.cut.dense) if e.user < last]


def _between(users: list[Node], last: Node) -> list[Node]:
    """The nodes from the first of ``users`` up to ``last``, in order; none if there are no users."""
    nodes: list[Node] = []
    node = min(users, default=last)
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _sort_selection(routing: Routing) -> None:
    """SERE's primary picks are the best: have the selection put them first.  The set of picks stays the same."""
    selection = routing.selection
    if not selection.sorted:
        scores = selection.node.args[0]
        selection.node.args = (scores, selection.k, -1, True, True)
        selection.node.kwargs = {}


def _read(graph: fx.Graph, routing: Routing, carriers: list[Node]) -> Decision:
    """The decision as it stands on the cut, as [T, K]."""
    ids = routing.selection.ids
    weights = [g.call(graph, aten.gather.default, m, -1, ids) for m in carriers] if routing.cut.dense else carriers
    if g.rank(ids) == 2:
        return Decision(ids, tuple(weights))
    flat = [g.call(graph, aten.reshape.default, n, [-1, routing.selection.k]) for n in (ids, *weights)]
    return Decision(flat[0], tuple(flat[1:]))  # some routers keep batch and sequence apart


def _unflat(graph: fx.Graph, decision: Decision, routing: Routing) -> Decision:
    """The decision in the shape that the cut's ids have."""
    if g.rank(routing.selection.ids) == 2:
        return decision
    like = routing.selection.ids
    full = [g.call(graph, aten.view_as.default, n, like) for n in (decision.ids, *decision.weights)]
    return Decision(full[0], tuple(full[1:]))


def _put_back(graph: fx.Graph, routing: Routing, carriers: list[Node], decision: Decision) -> None:
    """Point every edge of the cut at the new decision."""
    replacements = dict(zip(carriers, decision.weights, strict=True))
    for matrix in _distinct(routing.cut.dense):
        # two picks may have come to the same expert, and an off pick points at an active one with weight 0: add
        empty = g.call(graph, aten.zeros_like.default, matrix)
        replacements[matrix] = g.call(graph, aten.scatter_add.default, empty, -1, decision.ids, replacements[matrix])
    for edge in (*routing.cut.dense, *routing.cut.weights):
        if edge.node in replacements:
            edge.user.replace_input_with(edge.node, replacements[edge.node])
    _redirect_ids(graph, routing, decision.ids)


def _redirect_ids(graph: fx.Graph, routing: Routing, new_ids: Node) -> None:
    """Rebuild, on the new ids, every layout of the ids that leaves the router."""
    rebuilt = {routing.selection.ids: new_ids}

    def relaid(node: Node) -> Node:
        if node not in rebuilt:
            source = node.args[0]
            copy = graph.node_copy(node, lambda n: relaid(source) if n is source else n)
            rebuilt[node] = copy
        return rebuilt[node]

    for edge in routing.cut.ids:
        edge.user.replace_input_with(edge.node, relaid(edge.node))
    for old in reversed(rebuilt):
        if not old.users and old is not routing.selection.ids:
            graph.erase_node(old)


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
