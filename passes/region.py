"""The experts region of a site: everything between the cut and the one value where all of it comes together again.

Copied out of the graph as a function of the routing decision, it runs any expert on any token with no knowledge of
the architecture: give every token the id of one expert and the weight 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.find_sites import Routing


@dataclass(frozen=True)
class Region:
    """An experts region.

    Attributes:
        nodes: its nodes in graph order; the last one is the region's output, ``[T, H]`` (or ``[B, S, H]``).
        inputs: nodes outside it that it reads, other than the routing decision.
        replaced: the nodes of the routing decision that it reads across the cut.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    replaced: tuple[Node, ...]

    @property
    def output(self) -> Node:
        """The one value where the experts' outputs have come together."""
        return self.nodes[-1]


def find_region(routing: Routing) -> Region | None:
    """The experts region behind a site's cut; None when it does not come together in this graph.

    Its output is the first value with a vector for each token that all of the cut has flowed into, experts included:
    before them, a dense matrix [T, E] of weights may be such a value too.
    """
    edges = [*routing.cut.ids, *routing.cut.weights, *routing.cut.dense]
    graph = routing.selection.ids.graph
    starts = {(e.node, e.user) for e in edges}
    cone: list[Node] = []
    members: set[Node] = set()
    last_use = max((e.user for e in edges if e.user.op != "output"), default=None)  # the furthest reader so far
    layouts = _token_layouts(routing)
    node = min(e.user for e in edges)
    while node is not graph.output_node():
        if any((i, node) in starts or i in members for i in node.all_input_nodes):
            members.add(node)
            cone.append(node)
            complete = routing.experts in members and (last_use is None or not node < last_use)
            if complete and _has_token_shape(node, layouts):
                return _close(cone, members, starts)
            furthest = max((u for u in node.users if u.op != "output"), default=node)
            last_use = furthest if last_use is None or last_use < furthest else last_use
        node = node.next
    return None


def _token_layouts(routing: Routing) -> list[list[object]]:
    """The axes of tokens as the selection has them, and as they leave the router: batch and sequence apart or together."""
    picks = [e.node for e in routing.cut.ids if _only_reshaped(e.node, routing.selection.ids)]
    matrices = [e.node for e in routing.cut.dense]
    tokens = routing.selection.tokens
    found = [tokens, [math.prod(tokens)]]
    for nodes, columns in ((picks, routing.selection.k), (matrices, routing.router.num_experts)):
        shapes = [[g.expression(d) for d in g.shape(node) or ()] for node in nodes]
        found += [dims[:-1] for dims in shapes if len(dims) > 1 and dims[-1] == columns]
    return found


def _only_reshaped(node: Node, ids: Node) -> bool:
    """Whether a layout of the ids still has one entry for each of them."""
    while node is not ids and g.op(node) in g.RESHAPES | g.CASTS:
        node = node.all_input_nodes[0]
    return node is ids


def _has_token_shape(node: Node, layouts: list[list[object]]) -> bool:
    """Whether a value has one float vector for each token."""
    dims, width = g.shape(node), g.size(node, -1)
    if dims is None or width is None or not g.is_float(node):
        return False
    return width > 1 and [g.expression(d) for d in dims[:-1]] in layouts


def _close(cone: list[Node], members: set[Node], starts: set[tuple[Node, Node]]) -> Region:
    """The cone with what it reads from outside, told apart by whether that comes across the cut."""
    replaced: dict[Node, None] = {}
    inputs: dict[Node, None] = {}
    for node in cone:
        for i in node.all_input_nodes:
            if i not in members:
                (replaced if (i, node) in starts else inputs)[i] = None
    return Region(tuple(cone), tuple(inputs), tuple(replaced))


def extract(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """The region as a function of (the routing decision's nodes, then its other inputs)."""
    graph = fx.Graph()
    decision = {n: graph.placeholder(f"decision_{i}") for i, n in enumerate(region.replaced)}
    copies = {n: graph.placeholder(f"input_{i}") for i, n in enumerate(region.inputs)}
    for node in region.nodes:
        # a node of the decision that is also an input (a sum over the scores, say) is told apart by who reads it
        copies[node] = graph.node_copy(node, lambda n: decision[n] if n in decision else copies[n])
    graph.output(copies[region.output])
    return fx.GraphModule(gm, graph)
