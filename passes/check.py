"""Step 5: verify a rewritten graph before any compiler sees it."""

from __future__ import annotations

from torch import fx
from torch.fx.node import Node

from moe_fx.passes.find_sites import Routing
from moe_fx.passes.graph import value


class CheckError(RuntimeError):
    """A rewrite broke one of our own invariants: a defect of moe_fx, never of the model."""


def check(gm: fx.GraphModule, rewritten: list[Routing]) -> None:
    """Lint the graph; every node must know its value, and every rewritten site must be read through its new ops.

    Raises:
        CheckError: naming the node or the site.
    """
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op in ("call_function", "get_attr") and node.users and value(node) is None and _has_value(node):
            raise CheckError(f"node {node.name} ({node.target}) of a rewritten graph has no recorded value")
    for routing in rewritten:
        stale = [e for e in (*routing.cut.ids, *routing.cut.counts, *routing.cut.dense) if e.node in e.user.all_input_nodes]
        if stale:
            raise CheckError(f"site '{routing.site.name}': {stale[0].user.name} still reads the router's own picks")
        new = [u for u in routing.selection.ids.users if "moe_fx" in str(u.target)]
        if not new and not any("moe_fx" in str(u.target) for r in routing.selection.ids.users for u in r.users):
            raise CheckError(f"site '{routing.site.name}' was not rewritten")


def _has_value(node: Node) -> bool:
    """Mode switches (grad, autocast) return nothing."""
    name = getattr(node.target, "__name__", "")
    return not name.startswith(("_set_grad", "_enter_", "_exit_"))
