"""Step 2: find every routing decision in a graph.  Analysis only: nothing is changed.

The search follows data flow, not literal patterns.  It anchors on a selection over the last axis (``selection.py``) and
asks three questions:

* backward (``router.py``): do the scores come from a linear map of a hidden state, through score-wise ops only?
* forward (``cut.py``): where do the ids and the weights leave the router (the *cut*), and in what form?
* proof (``proof.py``): do the ids select among as many experts as the router scores?

A selection of which none is true is no router (an attention indexer, a group pick) and is passed over in silence; one that
resembles routing, and fails a question, is reported as a skip with its reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Protocol

from torch import fx
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.cut import Cut, find_cut, weighs_input
from moe_fx.passes.graph import Weights, is_float, is_integer, module_path, op, rank, size
from moe_fx.passes.proof import REACH, becomes_one_hot, prove_experts
from moe_fx.passes.router import SCORE_WISE, Router, find_router, scoring
from moe_fx.passes.selection import SELECTION_RULES, Selection, selections, thresholds, unreadable
from moe_fx.passes.twice import writes_over_second_pick
from moe_fx.site import Site, Skip, normal_name


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
    distinct: bool = False  # whether a token may have each expert only once, as its second pick may be written over the first


class Owner(Protocol):
    """What a graph cannot tell by itself: the modules its inputs belong to (see ``moe_fx.owner``)."""

    def expert_block(self, weight: Node, num_experts: int) -> str | None:
        """The smallest module around a router's weight that holds ``num_experts`` experts, as the graph names it."""
        ...

    def may_overwrite(self, weight: Node, num_experts: int) -> bool:
        """Whether the code of that module may lose one of two picks of one token on one expert."""
        ...


def find_sites(gm: fx.GraphModule, owner: Owner | None = None) -> tuple[list[Routing], list[Skip]]:
    """The routing decisions in ``gm``'s graph, in graph order, and the places that resemble one and were left.

    Time is linear in the number of nodes: each selection is followed only as far as its own router and cut.
    """
    weights = Weights(gm.graph)
    root = "" if any(n.meta.get("nn_module_stack") for n in gm.graph.nodes) else None  # what bears no path is the root's
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
            result = _examine(selection, router, weights, owner, root)
        if result is not None:
            (found if isinstance(result, Routing) else skips).append(result)  # type: ignore[arg-type]
    unread = (_examine_unknown(s, weights, _WHY_UNREAD.get(op(s.node), _HOW.format(op(s.node)))) for s in unreadable(gm.graph))
    masks = (_examine_threshold(s, weights) for s in thresholds(gm.graph))
    return _distinct_names(found), [*skips, *(s for s in (*unread, *masks) if s is not None)]


_HOW = "how it selects ({}) is not known"
_WHY_UNREAD = {"topk": "how many it selects is no constant of the graph"}


def _name(selection: Selection) -> str:
    return module_path(selection.node) or selection.node.name


def _examine_threshold(selection: Selection, weights: Weights) -> Skip | None:
    """Scores that are kept where they reach the k-th best: routing, if what is kept weighs experts."""
    router = find_router(selection, weights)
    if router is None or prove_experts(selection, router, weights).at is None:
        return None
    reason = (
        "it keeps every score that reaches the k-th best, which may be more than K where some are equal: select by the ids "
        "of topk, and set to 0 what they leave (torch.zeros_like(scores).scatter(-1, ids, values))"
    )
    return Skip(_name(selection), reason, routing=True)


def _examine_unknown(selection: Selection, weights: Weights, reason: str) -> Skip | None:
    """A selection that could not be read, or not its scores, is a router all the same if its ids select among experts."""
    stack = _looked_up_stack(selection.ids, weights)
    num_experts = size(stack, 0) if stack is not None else size(selection.scores, -1)
    if num_experts is None:
        return None
    scores = selection.scores
    proof = prove_experts(selection, Router(scores, scores, scores, num_experts, 0), weights)
    if proof.at is None:
        alone = proof.leaves_graph and selection.k > 1 and num_experts <= _MOST_EXPERTS and _enters_from_outside(scores)
        return Skip(_name(selection), _ALONE) if alone else None
    return Skip(_name(selection), reason, routing=True)


#: A choice among more than these is one of words.
_MOST_EXPERTS = 1024
_ALONE = (
    "its scores enter this graph from outside and its ids leave it, so nothing tells whether it routes: take the graph breaks "
    "before and behind it away (TORCH_LOGS=graph_breaks shows them)"
)


def _enters_from_outside(scores: Node) -> bool:
    """Whether scores are, but for score-wise ops, an input of the graph."""
    node: Node | None = scores
    while node is not None and op(node) in SCORE_WISE:
        node = next((i for i in node.all_input_nodes if is_float(i)), None)
    return node is not None and node.op == "placeholder" and not g.is_parameter(node)


def _looked_up_stack(ids: Node, weights: Weights) -> Node | None:
    """A stack of matrices that integers made from the ids look up: candidates chosen twice are no score's own ids."""
    stack, seen = [ids], {ids}
    while stack and len(seen) < REACH:
        for user in stack.pop().users:
            source = user.all_input_nodes[0] if op(user) in ("index", "index_select", "embedding") else None
            if source in weights and rank(source) >= 3:
                return source
            if is_integer(user) and user not in seen and op(user) not in SELECTION_RULES:
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


def _examine(
    selection: Selection, router: Router, weights: Weights, owner: Owner | None, root: str | None
) -> Routing | Skip | None:
    """All that is asked of a selection whose scores come from a router.

    ``root`` is the path of what bears none: None where the graph tells no modules.
    """
    where = module_path(selection.node)
    where = root if where is None else where
    name = _name(selection)
    proof = prove_experts(selection, router, weights)
    cut, reason = find_cut(selection, router, weights)
    if selection.lowest:
        cut, reason = None, "it takes the lowest scores"
    if cut is None:
        return Skip(name, reason, routing=proof.at is not None)
    scope = g.common_path([where, *proof.paths]) if where is not None else g.parent(_weight_path(router.weight), 2)
    if proof.at is None:
        asks = owner is not None and (proof.leaves_graph or becomes_one_hot(selection.ids, router.num_experts))
        block = owner.expert_block(router.weight, router.num_experts) if owner is not None and asks else None
        if block is not None and proof.leaves_graph and not any(e.user.op == "output" for e in cut.weights):
            return Skip(name, "its ids leave the graph without their weights, which may still be looked up by them", True)
        if block is None and op(selection.node) in ("max", "argmax") and not becomes_one_hot(selection.ids, router.num_experts):
            return None  # the likeliest token of a vocabulary
        if block is None:
            return Skip(name, f"its ids are never seen to select among {router.num_experts} experts{proof.hint}")
        scope = block
    outside = proof.at is None and not cut.dense
    distinct = outside and owner is not None and owner.may_overwrite(router.weight, router.num_experts)
    distinct = selection.k > 1 and (distinct or writes_over_second_pick([(e.node, e.user) for e in cut.ids]))
    site = Site(scope, router.num_experts, selection.k, router.hidden_size, scoring(selection, router))
    return Routing(site, selection, router, cut, proof.at, weighs_input(cut, proof, router, weights), distinct)


def _weight_path(weight: Node) -> str:
    return normal_name(g.source_name(weight) or "")


def _distinct_names(found: list[Routing]) -> list[Routing]:
    """Two sites in one block are told apart by their routers' own modules, or by their experts'.

    One router before the same experts, run twice, is one site.
    """
    by_name: dict[str, list[Routing]] = {}
    for routing in found:
        by_name.setdefault(routing.site.name, []).append(routing)
    return [_renamed(routing, by_name[routing.site.name]) for routing in found]


def _renamed(routing: Routing, namesakes: list[Routing]) -> Routing:
    name = routing.site.name
    if len({o.router.weight for o in namesakes}) > 1:
        name = module_path(routing.selection.node) or g.parent(_weight_path(routing.router.weight), 1)
    elif len({_experts_path(o) for o in namesakes}) > 1:  # layers that share a router
        blocks = {g.parent(_experts_path(o), 1) for o in namesakes}
        name = g.parent(_experts_path(routing), 1) if len(blocks) == len(namesakes) else _experts_path(routing)
    return replace(routing, site=replace(routing.site, name=name))


def _experts_path(routing: Routing) -> str:
    return (module_path(routing.experts) if routing.experts is not None else None) or ""
