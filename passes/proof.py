"""Proof that a selection's ids select among as many experts as its router scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import Weights, argument, is_float, is_integer, module_path, op, rank, size
from moe_fx.passes.router import LINEAR, Router
from moe_fx.passes.selection import SELECTIONS, Selection


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
    proof = Proof()
    proof.leaves_graph = _leaves_graph(selection.ids)
    masks = _masks_by_expert(selection.ids, router.num_experts)
    every = set(masks) >= set(range(router.num_experts))
    if every and _weighs_own_layers(masks, router, weights):
        proof.at = masks[0][0]
        proof.paths = [p for p in [module_path(proof.at)] if p is not None]
        return proof
    scope = g.parent(module_path(selection.node) or "", 1)
    trail = _Trail(selection.ids, router, weights)
    frontier = [selection.ids]
    for _ in range(REACH):
        reached: list[Node] = []
        for node in frontier:
            for user in node.users:
                if user in trail.seen or not _within(user, scope) or g.reads_shape_only(user, node):
                    continue
                proven = trail.meets_experts(user) or trail.weighs_experts(user)
                weight = is_float(user) and selection.is_per_pick(user) and not trail.is_row(user) and not trail.holds_ids(user)
                if not proven and weight:
                    continue  # a pick's weight is not its id
                trail.add(user)
                meeting = user if proven else trail.taken_apart(user)
                if meeting is not None:
                    proof.at = meeting if proof.at is None or meeting < proof.at else proof.at
                    proof.paths += [p for p in [module_path(meeting)] if p is not None]
                elif not trail.ends(user):
                    reached.append(user)
        if proof.at is not None or not reached:
            break
        frontier = reached
    if proof.at is None and proof.leaves_graph:
        proof.hint = " in this graph; where the experts run outside it, compile the whole model or use experts that trace"
    return proof


def _masks_by_expert(ids: Node, num_experts: int) -> dict[int, list[Node]]:
    """Masks of one expert's picks, by its number: ``ids == 3``, ``one_hot(ids, E)[..., 3]``."""
    found: dict[int, list[Node]] = {}
    for user in ids.users:
        masks: dict[int, list[Node]] = {}
        if op(user) == "eq" and user.args[0] is ids and isinstance(user.args[1], int):
            masks = {user.args[1]: [user]}
        elif op(user) == "one_hot" and argument(user, "num_classes", 1) in (num_experts, num_experts + 1):
            masks = _slices(user, rank(user) - 1)
        elif op(user) in g.ID_WISE and is_integer(user):
            masks = _masks_by_expert(user, num_experts)
        for expert, nodes in masks.items():
            found.setdefault(expert, []).extend(nodes)
    return found


def _slices(hot: Node, axis: int) -> dict[int, list[Node]]:
    """The slices of a mask that are taken, by their number along an axis, whichever way it is laid out before."""
    found: dict[int, list[Node]] = {}
    for user in hot.users:
        taken: dict[int, list[Node]] = {}
        along = argument(user, "dim", 1, 0) in (axis, axis - rank(hot))
        if op(user) == "select" and along:
            taken = {cast(int, argument(user, "index", 2)): [user]}
        elif op(user) == "unbind" and along:
            taken = {cast(int, part.args[1]): [part] for part in user.users}
        elif op(user) in g.TRANSPOSES:
            taken = _slices(user, g.axes_before(user).index(axis))
        elif op(user) in g.CASTS:
            taken = _slices(user, axis)
        for number, nodes in taken.items():
            found.setdefault(number, []).extend(nodes)
    return found


def _weighs_own_layers(masks: dict[int, list[Node]], router: Router, weights: Weights) -> bool:
    """Whether masks of two experts' picks gate activations, or choose them, that go through weights of each one's own.

    What is averaged class by class goes through none, or through the same.
    """
    every = {mask for own in masks.values() for mask in own}
    one, other = (
        set().union(*(_gated_through(mask, every.difference(own), router, weights) for mask in own))
        for own in (masks[0], masks[router.num_experts - 1])
    )
    stacked = any(isinstance(w, Node) and is_expert_stack(w, router, weights) for w in one & other)
    return stacked or bool(one - other and other - one)


def _gated_through(mask: Node, others: set[Node], router: Router, weights: Weights) -> set[object]:
    """The weights that were read on the way to, or are on the way from, activations that a mask gates a few ops on.

    What was made by the masks of ``others`` meanwhile, such as the sum so far, is passed over.
    """
    found: set[object] = set()
    frontier = [mask]
    for _ in range(6):
        frontier = [u for n in frontier for u in n.users if u.op == "call_function"]
        for user in frontier:
            floats = [i for i in user.all_input_nodes if is_float(i) and carries_activations(i, router, weights)]
            gated = [i for i in floats if not _comes_from(i, others)]
            if gated and (op(user) in ("mul", "where") or (op(user) in _LOOK_UPS and user.all_input_nodes[0] in gated)):
                found |= _read_before(gated, router, weights) | _read_behind(user, weights)
        if found:
            return found  # further on are the sums of all experts
    return found


def _comes_from(node: Node, sources: set[Node]) -> bool:
    """Whether a value was made from one of some others, not many ops before."""
    frontier, seen = [node], {node}
    while frontier and len(seen) < REACH and sources.isdisjoint(seen):
        frontier = [i for n in frontier for i in n.all_input_nodes if i not in seen]
        seen |= set(frontier)
    return not sources.isdisjoint(seen)


def _read_before(nodes: list[Node], router: Router, weights: Weights) -> set[object]:
    """The weights between the router's input and some values."""
    found: set[object] = set()
    seen: set[Node] = set()
    stack = [*nodes]
    while stack and len(seen) < REACH:
        node = stack.pop()
        if node in weights:
            found.add(_own_name(node))
        elif node not in seen and node is not router.linear and not node < router.hidden:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _read_behind(node: Node, weights: Weights) -> set[object]:
    """The weights that are read a few ops behind a value."""
    found: set[object] = set()
    frontier = [node]
    for _ in range(8):
        frontier = [*dict.fromkeys(u for n in frontier for u in n.users if u.op == "call_function" and is_float(u))][:REACH]
        found |= {_own_name(i) for u in frontier for i in u.all_input_nodes if i in weights}
    return found


def becomes_one_hot(ids: Node, num_experts: int) -> bool:
    """Whether the ids become masks over all experts that the graph does not use up (some models add a class for off picks)."""
    return any(
        argument(u, "num_classes", 1) in (num_experts, num_experts + 1) and _says_who_was_picked(u) if op(u) == "one_hot"
        else op(u) in g.ID_WISE and is_integer(u) and becomes_one_hot(u, num_experts)
        for u in ids.users
    )  # fmt: skip


#: Ops after which a mask of picks is one still.
_MASK_WISE = g.ID_WISE | frozenset(
    "sum amax any eq ne gt ge lt le bool bitwise_not bitwise_and mul select slice getitem unbind".split()
)


def _says_who_was_picked(mask: Node) -> bool:
    """Whether a mask of picks leaves the graph or becomes places in it, not only counts."""
    stack, seen = [mask], {mask}
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or op(user) in ("nonzero", "nonzero_numpy", "argwhere", "where"):
                return True
            if rank(user) >= 2 and user not in seen and op(user) in _MASK_WISE:
                seen.add(user)
                stack.append(user)
    return False


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
    while node in weights and op(node) in g.RESHAPES and size(node, 0) == size(node.all_input_nodes[0], 0):
        node = node.all_input_nodes[0]  # matrices written as rows
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
        inputs = [i for i in n.all_input_nodes if not g.reads_shape_only(n, i)]
        if n.op == "call_function" and not inputs:
            continue  # freshly filled
        if is_float(n) and n < router.linear:
            return True
        stack.extend(inputs)
    return False


#: Ops by which weights or ids pick from the outputs of all experts.
_WEIGH = PRODUCTS | {"mul", "where", "gather", "take_along_dim", "index", "index_select"}


class _Trail:
    """What was made from the ids, and in which sense it still tells which expert was picked.

    What ids look up in a table, or among activations, is content: whatever meets a stack of matrices later on has been
    picked before, and by something else.
    """

    def __init__(self, ids: Node, router: Router, weights: Weights) -> None:
        self.seen: set[Node] = {ids}
        self._router, self._weights = router, weights
        self._ids: set[Node] = {ids}  # integers that are ids still, in another order or number
        self._rows: set[Node] = set()  # masks and matrices whose last axis is that of the experts
        self._weighless: set[Node] = set()  # what holds activations (sorted by the ids, say) or is no token's own (a load)

    def add(self, node: Node) -> None:
        """Take a node that reads what is on the trail."""
        self.seen.add(node)
        source = node.all_input_nodes[0]
        name = op(node)
        if (is_integer(node) and source in self._ids and (name in g.ID_WISE or name in _PARTS)) or self.holds_ids(node):
            self._ids.add(node)
        elif name == "getitem" and op(source) == "sort" and node.args[1] == 0 and source.all_input_nodes[0] in self._ids:
            self._ids.add(node)
        if self.is_row(node):
            self._rows.add(node)
        joins = any(i not in self.seen and carries_activations(i, self._router, self._weights) for i in node.all_input_nodes)
        if is_float(node) and (joins or _reduces_tokens(node) or not self._weighless.isdisjoint(node.all_input_nodes)):
            self._weighless.add(node)

    def is_row(self, node: Node) -> bool:
        """Whether the last axis of what the ids became is that of all experts."""
        keeps = node.all_input_nodes[0] in self._rows and op(node) not in g.TRANSPOSES | PRODUCTS
        return (keeps or op(node) in ("one_hot", "scatter")) and size(node, -1) == self._router.num_experts

    def holds_ids(self, node: Node) -> bool:
        """Whether floats are the ids themselves: some code keeps them beside weights."""
        return is_float(node) and op(node) in g.ID_WISE and node.all_input_nodes[0] in self._ids

    def taken_apart(self, node: Node) -> Node | None:
        """The first column of a matrix over the experts, where each column weighs what another layer made of the activations."""
        columns = _columns(node, self._router.num_experts) if node in self._rows else {}
        if set(columns) != set(range(self._router.num_experts)):
            return None
        weighed = [activations for column in columns.values() if (activations := self._weighed(column)) is not None]
        distinct = len(weighed) == len(columns) and _are_distinct_layers(weighed, self._router, self._weights)
        return min(columns.values()) if distinct else None

    def _weighed(self, column: Node) -> Node | None:
        """The activations that a column of weights multiplies, a few ops on."""
        frontier, made = [column], {column}
        for _ in range(6):
            frontier = [u for n in frontier for u in n.users if u.op == "call_function"]
            for user in frontier:
                others = [i for i in user.all_input_nodes if i not in made and rank(i) >= 2 and is_float(i)]
                if op(user) == "mul" and len(others) == 1:
                    return others[0]
            made |= set(frontier)
        return None

    def meets_experts(self, node: Node) -> bool:
        """Whether activations go through the matrices of the experts that the ids say, in this op."""
        if not meets_experts(node, self._router, self._weights):
            return False
        stacks = [i for i in node.all_input_nodes if is_expert_stack(i, self._router, self._weights)]
        if self._attends(node):
            return False
        if any(i in self.seen and (i in stacks or not is_float(i)) for i in node.all_input_nodes):
            return True  # the ids look the matrices up, or an op that multiplies group by group reads them or their counts
        if any(_whole_of_slice(i, self._router) is not None for i in stacks):
            return True
        return any(i in self.seen and self._has_expert_axis(i) for i in node.all_input_nodes)

    def _attends(self, product: Node) -> bool:
        """Whether a stack's rows are keys, or values: activations meet it twice, with nothing but a softmax in between.

        Memories that are looked up and attended to are no experts.
        """
        beyond = [*_across_softmax(product, lambda n: [*n.users]), *_across_softmax(product, lambda n: n.all_input_nodes)]
        looked_up = any(op(node) in PRODUCTS and self._comes_from_ids(node) for node in beyond)
        return looked_up or any(meets_experts(node, self._router, self._weights) for node in beyond)

    def _comes_from_ids(self, node: Node) -> bool:
        """Whether a value was made from what is on the trail, in whichever way: keys may be projected first."""
        stack, visited = [node], {node}
        while stack and len(visited) < REACH:
            made_of = {i for i in stack.pop().all_input_nodes if i not in visited and i not in self._weights}
            if not self.seen.isdisjoint(made_of):
                return True
            visited |= made_of
            stack += [i for i in made_of if self._router.linear < i]
        return False

    def _has_expert_axis(self, node: Node) -> bool:
        """Whether rows were sorted into a tensor [..., E, C, H]; one that was only repeated for each expert was not."""
        dims = [g.expression(d) for d in g.shape(node) or ()]
        while op(node) in g.LAYOUT - {"expand"}:
            node = node.all_input_nodes[0]
        return self._router.num_experts in dims[:-1] and len(dims) >= 3 and op(node) not in ("expand", "repeat")

    def weighs_experts(self, user: Node) -> bool:
        """Whether the op joins ids, or a matrix of weights, with the outputs of a stack of experts, run on the router's input."""
        weigh = [i for i in user.all_input_nodes if i in self.seen and i not in self._weighless]
        if op(user) not in _WEIGH or not any(rank(i) >= 2 or is_integer(i) for i in weigh):
            return False
        stack = [i for i in user.all_input_nodes if i not in self.seen and is_float(i)]
        visited: set[Node] = set()
        while stack and len(visited) < REACH:
            node = stack.pop()
            if node in visited or node in self.seen or node in self._weights or node < self._router.hidden:
                continue
            if node is self._router.linear:
                continue
            visited.add(node)
            if meets_experts(node, self._router, self._weights) or _joins_experts(node, self._router, self._weights):
                return True
            stack.extend(node.all_input_nodes)
        return False

    def ends(self, node: Node) -> bool:
        """Whether what follows says nothing about experts any more."""
        name, inputs = op(node), node.all_input_nodes
        if name in SELECTIONS and is_float(inputs[0]):
            return True  # what another selection chooses among scores is its own
        if name in LINEAR:
            others = [i for i in inputs if i not in self.seen]
            if any(i in self._weights for i in others):
                return True  # a linear map, or a stack of them that is not the picks'
            return name != "einsum" and inputs[0] in self._rows  # a sum over experts of what is none of theirs
        if name in _LOOK_UPS and is_float(node) and inputs[0] not in self.seen and not self._ids.isdisjoint(inputs[1:]):
            return not is_expert_stack(node, self._router, self._weights)
        return False


def _across_softmax(start: Node, neighbours: Callable[[Node], list[Node]]) -> list[Node]:
    """What stands on the other side of a softmax from a node, with but layout, masks and scales in between."""
    found: list[Node] = []
    seen: set[Node] = set()
    stack = [(n, False) for n in neighbours(start)]
    while stack:
        node, crossed = stack.pop()
        if node in seen or not is_float(node):
            continue
        seen.add(node)
        crossed = crossed or op(node) in ("softmax", "_softmax")
        if op(node) in _SCALES:
            stack.extend((n, crossed) for n in neighbours(node))
        elif crossed:
            found.append(node)
    return found


_SCALES = g.LAYOUT | g.CASTS | frozenset("softmax _softmax mul div add masked_fill where dropout".split())


def _columns(matrix: Node, num_experts: int) -> dict[int, Node]:
    """Columns of a matrix [..., E], by their number: ``gates[:, e]``, ``gates[:, e:e + 1]``, ``gates.unbind(-1)``."""
    last, found = rank(matrix) - 1, {}
    for user in matrix.users:
        if argument(user, "dim", 1, 0) not in (-1, last):
            continue
        if op(user) == "select":
            found[cast(int, argument(user, "index", 2)) % num_experts] = user
        elif op(user) == "slice" and size(user, -1) == 1 and isinstance(first := argument(user, "start", 2), int):
            found[first % num_experts] = user
    for parts in matrix.users:
        along = argument(parts, "dim", 1 if op(parts) == "unbind" else 2, 0) in (-1, last)
        if along and op(parts) in ("unbind", "split", "chunk", "split_with_sizes"):
            single = {i: cast(int, i.args[1]) for i in parts.users if op(parts) == "unbind" or size(i, -1) == 1}
            found |= {number: column for column, number in single.items()}
    return found


def _joins_experts(node: Node, router: Router, weights: Weights) -> bool:
    """stack([expert(x) for expert in experts]): as many outputs as there are experts, each of its own weights."""
    if op(node) not in ("stack", "cat", "concat") or not isinstance(node.args[0], (list, tuple)):
        return False
    outputs = [i for i in node.args[0] if isinstance(i, Node)]
    return _stack_fits(len(outputs), router.num_experts) and _are_distinct_layers(outputs, router, weights)


def _are_distinct_layers(outputs: list[Node], router: Router, weights: Weights) -> bool:
    """Whether activations went through some weights on the way to each of the outputs that led to no other."""
    own = [_multiplied_by(output, router, weights) for output in outputs]
    shared = Counter(weight for each in own for weight in each)
    return all(any(shared[weight] == 1 for weight in each) for each in own)


def _multiplied_by(output: Node, router: Router, weights: Weights) -> set[object]:
    """The weights of the linear maps between the router's input and a value; of a stack, which slice."""
    found: set[object] = set()
    seen: set[Node] = set()
    stack = [output]
    while stack and len(seen) < REACH:
        node = stack.pop()
        if node in seen or node in weights or node is router.linear or node < router.hidden:
            continue
        seen.add(node)
        if op(node) in LINEAR:
            found |= {_own_name(i) for i in node.all_input_nodes if i in weights and rank(i) >= 2}
        stack.extend(node.all_input_nodes)
    return found


def _own_name(weight: Node) -> object:
    """The same for every way in which one parameter, or one slice of a stack, comes into a product."""
    while op(weight) in g.LAYOUT | g.CASTS:
        weight = weight.all_input_nodes[0]
    return (weight.all_input_nodes[0], *weight.args[1:]) if op(weight) == "select" else weight


def _reduces_tokens(node: Node) -> bool:
    """Whether a reduction runs over the first axis, or all of them."""
    dims = argument(node, "dim", 1)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return op(node) in ("sum", "mean", "amax", "amin", "any") and (dims[0] is None or 0 in dims or -rank(node.args[0]) in dims)


#: Ops that take some of the ids, or each of them several times.
_PARTS = frozenset("slice select index index_select gather repeat_interleave cat stack split chunk getitem expand repeat".split())
_LOOK_UPS = frozenset("index index_select embedding gather take_along_dim".split())


def _stack_fits(stacked: int | None, num_experts: int) -> bool:
    """Routers may score a few experts without weights (identity, skip), so the stack may be a little shorter."""
    return stacked is not None and num_experts - max(num_experts // 2, 1) < stacked <= num_experts


def _within(node: Node, scope: str) -> bool:
    path = module_path(node)
    return path is None or not scope or path == scope or path.startswith(scope + ".") or node.op == "output"
