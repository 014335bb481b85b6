"""Step 5: verify a rewritten graph before any compiler sees it."""

from __future__ import annotations

from torch import fx
from torch.fx.node import Node

from moe_fx.passes.find_sites import Routing
from moe_fx.passes.graph import value


class CheckError(RuntimeError):
    """A rewrite broke one of our own invariants: a defect of moe_fx, never of the model."""


def check(gm: fx.GraphModule, rewritten: list[Routing], exact: bool = False) -> None:
    """Lint the graph; every node must know its value, and every rewritten site must be read through its new ops.

    ``exact``: no policy changes a pick, so that what was only counted may still be read as the router left it.

    Raises:
        CheckError: naming the node or the site.
    """
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op in ("call_function", "get_attr") and node.users and value(node) is None and _has_value(gm, node):
            raise CheckError(f"node {node.name} ({node.target}) of a rewritten graph has no recorded value")
    for routing in rewritten:
        stale = [e for e in (*routing.cut.ids, *routing.cut.counts, *routing.cut.dense) if e.node in e.user.all_input_nodes]
        if stale and not exact:
            raise CheckError(f"site '{routing.site.name}': {stale[0].user.name} still reads the router's own picks")
        new = [u for u in routing.selection.ids.users if "moe_fx" in str(u.target)]
        if not new and not any("moe_fx" in str(u.target) for r in routing.selection.ids.users for u in r.users):
            raise CheckError(f"site '{routing.site.name}' was not rewritten")


def _has_value(gm: fx.GraphModule, node: Node) -> bool:
    """Mode switches (grad, autocast) return nothing; the bodies of branches and regions are no tensors."""
    if node.op == "get_attr":
        return not isinstance(getattr(gm, str(node.target), None), fx.GraphModule)
    name = getattr(node.target, "__name__", "")
    return not name.startswith(("_set_grad", "_enter_", "_exit_"))
