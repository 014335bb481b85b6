"""Proof that a selection's ids select among as many experts as its router scores."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import Weights, argument, is_float, is_integer, module_path, op, rank, size
from moe_fx.passes.router import LINEAR, Router, operands
from moe_fx.passes.selection import Selection


@dataclass
class Proof:
    """What the ids were seen to do."""

    at: Node | None = None  # the first op where the ids meet the experts
    leaves_graph: bool = False
    paths: list[str] = field(default_factory=list)  # module paths of the ops that select among experts
    hint: str = ""


#: How many ops the proof follows from the ids before it gives up: dispatch code is a dozen, a layer a hundred.
REACH = 64


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
    scope = g.parent(module_path(selection.node) or "", 1)
    frontier = [selection.ids]
    for _ in range(REACH):
        reached: list[Node] = []
        for node in frontier:
            for user in node.users:
                if user in seen or not _within(user, scope) or (is_float(user) and selection.is_per_pick(user)):
                    continue  # a pick's weight is not its id
                seen.add(user)
                if meets_experts(user, router, weights) or _weighs_experts(user, seen, router, weights):
                    proof.at = user if proof.at is None or user < proof.at else proof.at
                    proof.paths += [p for p in [module_path(user)] if p is not None]
                elif not (op(user) in LINEAR and operands(user, weights)[1] is not None and rank(user.args[-1]) == 2):
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
        elif op(user) in g.ID_WISE and is_integer(user):
            found |= _compared(user)
    return found


def _gates_activations(mask: Node, router: Router, weights: Weights) -> bool:
    """Whether a mask of one expert's picks multiplies activations, a few ops on."""
    frontier = [mask]
    for _ in range(6):
        frontier = [u for n in frontier for u in n.users if u.op == "call_function"]
        for user in frontier:
            others = [i for i in user.all_input_nodes if is_float(i) and carries_activations(i, router, weights)]
            if op(user) in ("mul", "where") and others:
                return True
    return False


def becomes_one_hot(ids: Node, num_experts: int) -> bool:
    """Whether the ids become masks over all experts (some models add a class for picks that are off)."""
    return any(
        argument(u, "num_classes", 1) in (num_experts, num_experts + 1) if op(u) == "one_hot"
        else op(u) in g.ID_WISE and is_integer(u) and becomes_one_hot(u, num_experts)
        for u in ids.users
    )  # fmt: skip


def _leaves_graph(ids: Node) -> bool:
    """Whether the ids themselves are an output of the graph, so that the experts may follow outside it."""
    return any(u.op == "output" or (op(u) in g.ID_WISE and is_integer(u) and _leaves_graph(u)) for u in ids.users)


#: Ops that multiply matrices.  An engine's own op (any namespace but ATen's) that reads a stack counts as one.
PRODUCTS = frozenset("bmm baddbmm matmul mm einsum _grouped_mm grouped_mm".split())


def meets_experts(user: Node, router: Router, weights: Weights) -> bool:
    """Whether the op multiplies activations by a stack of one matrix (or more) per expert.

    A codebook, a prompt pool or a decoder indexed or weighted by picks is no stack of experts: nothing goes through it.
    """
    is_product = op(user) in PRODUCTS or not g.qualified_op(user).startswith(("aten.", "getitem"))
    if user.op != "call_function" or not is_product:
        return False
    stacks = [i for i in user.all_input_nodes if is_expert_stack(i, router, weights)]
    return bool(stacks) and any(carries_activations(i, router, weights) for i in user.all_input_nodes if i not in stacks)


def is_expert_stack(node: Node, router: Router, weights: Weights) -> bool:
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


def carries_activations(node: Node, router: Router, weights: Weights) -> bool:
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


def _weighs_experts(user: Node, from_ids: set[Node], router: Router, weights: Weights) -> bool:
    """Whether the op joins what came from the ids with the outputs of a stack of experts, run on the router's input."""
    stack = [i for i in user.all_input_nodes if i not in from_ids and is_float(i)]
    seen: set[Node] = set()
    while stack and len(seen) < REACH:
        node = stack.pop()
        if node in seen or node in from_ids or node in weights or node < router.hidden or node is router.linear:
            continue
        seen.add(node)
        if meets_experts(node, router, weights):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _stack_fits(stacked: int | None, num_experts: int) -> bool:
    """Routers may score a few experts without weights (identity, skip), so the stack may be a little shorter."""
    return stacked is not None and num_experts - max(num_experts // 2, 1) < stacked <= num_experts


def _within(node: Node, scope: str) -> bool:
    path = module_path(node)
    return path is None or not scope or path == scope or path.startswith(scope + ".") or node.op == "output"
