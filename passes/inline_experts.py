"""Step 7: few tokens on a CPU need no op of ours for their experts: Inductor fuses the lookup of weights into the products.

    fused_experts(x, W1, W2, weights, ids)  ->  sum over the picks of  weights * (act(x @ W1[ids].T) @ W2[ids].T)

Each pick reads its expert's weights, where the op reads those of two picks once.  So this is for picks that are all on
and seldom meet; there it saves the op's own Python, a fifth of a decode step of one token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Node

from moe_fx.ops import experts_by_pick
from moe_fx.passes import graph as g

MOST_TOKENS = 4  # from 8 tokens on the op is faster: measured with 64 experts, 8 picks, in bfloat16


def inline_experts(gm: fx.GraphModule) -> int:
    """Write out every ``fused_experts`` of few tokens; returns how many.  No pick may be off."""
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.fused_experts.default)
    few = [node for node in nodes if _pays(node)]
    for node in few:
        _write_out(gm.graph, node)
    return len(few)


def _pays(node: Node) -> bool:
    """Whether the tokens are few, and what was measured."""
    hidden, w_gate_up, _, _, ids = cast("list[Node]", node.args[:5])
    tokens, transposed = g.size(hidden, 0), g.argument(node, "transposed", 9, False)
    few = tokens is not None and 1 <= tokens <= MOST_TOKENS
    return few and not transposed and g.fake(hidden).device.type == "cpu" and _all_on(ids, g.size(w_gate_up, 0))


def _all_on(ids: object, num_experts: int | None) -> bool:
    """Whether the ids are a selection's own, among as many scores as there are experts: a router may score a few more."""
    node: Any = ids
    while g.op(node) in g.ID_WISE | {"getitem", "slice"}:
        node = node.all_input_nodes[0]
    return g.op(node) in ("topk", "sort", "argsort") and g.size(node.all_input_nodes[0], -1) == num_experts


def _write_out(graph: fx.Graph, node: Node) -> None:
    given = [a for a in node.args if isinstance(a, Node)]

    def by_pick(*values: Tensor) -> Tensor:
        found = iter(values)
        args: list[Any] = [next(found) if isinstance(a, Node) else a for a in node.args]
        return experts_by_pick(*args)

    with g.fake(given[0]).fake_mode:
        body = make_fx(by_pick, pre_dispatch=True)(*map(g.fake, given))
    with graph.inserting_before(node):
        copies: dict[Node, Node] = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
    (result,) = body.graph.output_node().all_input_nodes
    node.replace_all_uses_with(copies[result])
    graph.erase_node(node)
