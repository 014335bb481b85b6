"""Backward from a selection: do its scores come from a linear map of a hidden state, by score-wise ops only?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import Weights, is_float, op, rank, size
from moe_fx.passes.selection import Selection

#: Ops that turn scores into scores, each expert's from its own (or from its row's) scores.
SCORE_WISE = (
    g.RESHAPES
    | g.CASTS
    | frozenset(
        "softmax _softmax log_softmax _log_softmax sigmoid log_sigmoid log_sigmoid_forward softplus relu tanh sqrt rsqrt exp "
        "log log1p neg abs pow add sub rsub mul div clamp clamp_min clamp_max maximum minimum masked_fill where nan_to_num "
        "dropout native_dropout slice narrow expand expand_as scatter getitem chunk split split_with_sizes addcmul gelu silu "
        "layer_norm native_layer_norm rms_norm _fused_rms_norm".split()
    )
)
LINEAR = frozenset("linear mm addmm matmul bmm baddbmm einsum weight_packed_linear zentorch_linear_unary".split())
#: Engines' linear maps that keep their weight behind a handle: the names of their input and of the handle.
BEHIND_HANDLE = {"onednn_mm": ("a", "handler_tensor")}


@dataclass(frozen=True)
class Router:
    """The linear map that scores come from."""

    linear: Node
    hidden: Node  # [..., H], the linear map's input
    weight: Node  # the parameter it multiplies by
    num_experts: int
    hidden_size: int


def find_router(selection: Selection, weights: Weights) -> Router | None:
    """The linear map behind the scores, or None: then the selection is no expert routing."""
    num_experts = size(selection.scores, -1)
    found = _walk_to_linear(selection.scores, num_experts, weights) if num_experts is not None else None
    if found is None or num_experts is None or selection.k > num_experts:
        return None
    linear, (hidden, weight) = found
    hidden_size = size(hidden, -1)
    leaf: Node | None = weight  # an engine's handle
    if weight in weights:
        leaf = next((n for n in weights.leaves(weight) if rank(n) >= 2), None)
    if hidden_size is None or leaf is None:
        return None
    return Router(linear, hidden, leaf, num_experts, hidden_size)


def _walk_to_linear(scores: Node, num_experts: int, weights: Weights) -> tuple[Node, tuple[Node, Node]] | None:
    """Depth-first, in argument order, through score-wise ops that keep an entry for every expert.

    Where the scores were transposed on the way, the axis of the experts is followed.
    """
    seen: set[Node] = set()
    stack: list[tuple[Node, bool, int]] = [(scores, False, -1)]  # (node, whether a wider row was sliced, axis of experts)
    while stack:
        node, sliced, axis = stack.pop()
        if node in seen or node in weights:
            continue
        seen.add(node)
        name = op(node)
        if name in LINEAR or name == "getitem":
            found = operands(node, weights, axis)
            width = size(node, axis)
            if found is not None and (width == num_experts or (sliced and width is not None and width > num_experts)):
                return node, found
            if found is not None:
                continue
        if name in g.TRANSPOSES:
            axis = g.axes_before(node)[axis] - rank(node)
        elif name not in SCORE_WISE or (axis != -1 and name in g.RESHAPES and not g.same_shape(node, node.args[0])):
            continue
        sliced = sliced or name in ("slice", "narrow")
        stack.extend((i, sliced, axis) for i in reversed(node.all_input_nodes) if is_float(i) and rank(i) >= 2)
    return None


def operands(linear: Node, weights: Weights, axis: int = -1) -> tuple[Node, Node] | None:
    """(hidden state, weight) of a linear map whose weight is a function of parameters alone, or an engine's handle.

    ``axis``, counted from the last, is that of the result which the weight brings; None if the map has another.
    """
    if op(linear) == "getitem":
        call: Node = linear.args[0]  # type: ignore[assignment]
        return tuple(call.kwargs[key] for key in BEHIND_HANDLE.get(op(call), ())) or None  # type: ignore[return-value]
    if op(linear) == "einsum":
        x, w = _einsum_operands(linear, axis)
    elif axis == -1:
        first = 1 if op(linear) in ("addmm", "baddbmm") else 0
        x, w = linear.args[first : first + 2]
    else:
        x, w = _from_the_left(linear) if axis == -2 else (None, None)
    if isinstance(x, Node) and isinstance(w, Node) and w in weights and x not in weights:
        return x, w
    return None


def _from_the_left(linear: Node) -> tuple[object, object]:
    """The (x, w) of w @ x.T; a pair of None for any other product."""
    if op(linear) not in ("mm", "matmul") or rank(linear) != 2:
        return None, None
    w, turned = linear.args[:2]
    return (turned.all_input_nodes[0], w) if op(turned) in g.TRANSPOSES and isinstance(turned, Node) else (None, None)


def _einsum_operands(node: Node, axis: int) -> tuple[object, object]:
    """The (x, w) of einsum("...h,eh->...e"), whichever stands first and e at the axis; a pair of None for any other einsum."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2 or "->" not in equation:
        return None, None
    left, result = equation.replace(" ", "").split("->")
    for (x, dims), (w, axes) in permutations(zip(operands, left.split(","), strict=True)):
        if len(axes) != 2 or len(dims) < 2 or dims[-1] not in axes:
            continue
        expert = axes.replace(dims[-1], "")
        if result[axis:][:1] == expert and result.replace(expert, "") == dims[:-1]:
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
