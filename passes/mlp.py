"""What an expert computes, written as an expression, as arguments of ``moe_fx::fused_experts``.

An expression is a nested tuple: an op's name, its operands and its other arguments.  Some names are ours: ``input`` (the
experts' input), ``times`` (the row times its own expert's matrix of a stack; transposed or not), ``biased`` and
``weighted``; ``half`` is a part of a row, in a layout; ``apart`` is gate and up by two projections.  ``fuse_experts`` writes
expressions, this file reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import op
from moe_fx.passes.region import Region

#: All experts' weights: one tensor stacked by expert, or each expert's own, in order.
Stack = Node | tuple[Node, ...]


@dataclass(frozen=True)
class Experts:
    """A recognised region: the arguments of ``moe_fx::fused_experts`` that are not the routing decision.

    ``w_gate_up`` is [E, G, H] and ``w_down`` [E, H, I], or both with their last two axes exchanged (``transposed``).
    Where only ``w_down`` has them the other way round, the rewrite has to turn it (``turned``), which is a view.

    Where experts keep weights of their own, or gate and up as two parameters (``w_gate_up`` the gate, and ``w_up``), the op
    is ``moe_fx::separate_experts``.
    """

    region: Region
    hidden: Node
    w_gate_up: Stack
    w_down: Stack
    b_gate_up: Stack | None
    b_down: Stack | None
    activation: str
    gated: str
    transposed: bool
    alpha: float
    limit: float | None
    turned: bool = False
    w_up: Stack | None = None
    b_up: Stack | None = None

    @property
    def separate(self) -> bool:
        """Whether the weights are kept apart."""
        return self.w_up is not None or isinstance(self.w_down, tuple)

    @property
    def alike(self) -> bool:
        """Whether matrices that experts keep for themselves have one shape."""
        return all(g.same_shape(n, stack[0]) for stack in self._given for n in stack)

    @property
    def op(self) -> Any:
        """The op that computes them."""
        return (torch.ops.moe_fx.separate_experts if self.separate else torch.ops.moe_fx.fused_experts).default

    @property
    def stacks(self) -> list[Node]:
        """The parameters that the op reads."""
        return [n for stack in self._given for n in stack]

    @property
    def _given(self) -> list[list[Node]]:
        """All weights and biases that there are, each as a list."""
        parts = (self.w_gate_up, self.w_up, self.w_down, self.b_gate_up, self.b_up, self.b_down)
        return [_listed(part) for part in parts if part is not None]

    def parts(self, graph: fx.Graph) -> list[Any]:
        """The op's arguments that are weights, then those that are biases; nodes that turn weights go into ``graph``."""
        w_down = [_turned(graph, w) for w in _listed(self.w_down)] if self.turned else _listed(self.w_down)
        if not self.separate:
            return [self.w_gate_up, *w_down, self.b_gate_up, self.b_down]
        return [_listed(self.w_gate_up), _listed(self.w_up), w_down, *map(_listed, (self.b_gate_up, self.b_up, self.b_down))]

    def arguments(self, parts: list[Any], hidden: Any, weights: Any, ids: Any) -> tuple[Any, ...]:
        """All of the op's arguments, of nodes or of tensors."""
        half = len(parts) // 2
        how = self.activation, self.gated, self.transposed, self.alpha, self.limit
        return (hidden, *parts[:half], weights, ids, *parts[half:], *how)


def _listed(stack: Stack | None) -> list[Node]:
    return [] if stack is None else [*stack] if isinstance(stack, tuple) else [stack]


def _turned(graph: fx.Graph, weight: Node) -> Node:
    return g.call(graph, torch.ops.aten.transpose.int, weight, -2, -1)


def as_mlp(region: Region, expression: tuple) -> Experts | str:
    """weighted(down(act(gate_up(input)))), with or without biases, as arguments of the op; or why it is not that."""
    if expression[0] != "weighted":
        return "its experts' outputs do not come together as a weighted sum over the picks"
    inner, b_down = _unbias(expression[1])
    if inner[0] != "times":
        return "its experts do not end in a projection by one matrix for each of them"
    _, activated, w_down, down_transposed = inner
    found = next((f for match in _ACTIVATIONS if (f := match(activated)) is not None), None)
    if found is None:
        return "its experts' activation is not one that is known"
    gate_up, kind = found
    projections = [_unbias(projected) for projected in (gate_up[1:] if gate_up[0] == "apart" else [gate_up])]
    if any(projected[0] != "times" or projected[1][0] != "input" for projected, _ in projections):
        return "its experts do not begin with one projection of their input"
    (gate, b_gate), (up, b_up) = projections[0], projections[-1]
    _, (_, hidden), w_gate, transposed = gate
    apart = {"w_up": up[2], "b_up": b_up} if len(projections) == 2 else {}
    turned = transposed != down_transposed
    experts = Experts(region, hidden, w_gate, w_down, b_gate, b_down, **kind, transposed=transposed, turned=turned, **apart)
    return _stacked_as_stored(experts)


def _unbias(expression: tuple) -> tuple[tuple, Stack | None]:
    return (expression[1], expression[2]) if expression[0] == "biased" else (expression, None)


def _stacked_as_stored(experts: Experts) -> Experts:
    """Both matrices by the tensors the model stores, where the graph reads both through a transpose."""
    w_gate_up, w_down = _untransposed(experts.w_gate_up), _untransposed(experts.w_down)
    if experts.separate or experts.turned or w_gate_up is None or w_down is None:
        return experts
    return replace(experts, w_gate_up=w_gate_up, w_down=w_down, transposed=not experts.transposed)


def _untransposed(stack: Stack) -> Node | None:
    if isinstance(stack, tuple):
        return None
    swaps = op(stack) == "transpose" and set(stack.args[1:3]) in ({-2, -1}, {1, 2})
    return stack.args[0] if swaps and isinstance(stack.args[0], Node) else None


def _halves(gate: tuple, up: tuple) -> tuple[tuple, str] | None:
    """(gate_up, layout) when gate and up are the two parts of one projection, or two alike of one input."""
    if gate[0] == up[0] == "half" and gate[1] == up[1] and gate[2:] == (0, up[3]) and up[2] == 1:
        return gate[1], up[3]
    (first, bias), (second, other) = _unbias(gate), _unbias(up)
    alike = first[0] == second[0] == "times" and first[1] == second[1] and first[3] == second[3]
    return (("apart", gate, up), "concatenated") if alike and (bias is None) == (other is None) else None


def _clamp_bounds(expression: tuple) -> tuple[tuple, float | None, float | None]:
    """(inside, lower, upper) of a clamp; of anything else, itself without bounds."""
    if expression[0] != "clamp":
        return expression, None, None
    named: dict[str, Any] = dict(a for a in expression[2:] if isinstance(a, tuple))
    plain = dict(zip(("min", "max"), (a for a in expression[2:] if not isinstance(a, tuple)), strict=False))
    bounds = {**plain, **named}
    return expression[1], bounds.get("min"), bounds.get("max")


def _limited(gate: tuple, up: tuple) -> tuple[tuple, tuple, float | None] | None:
    """gate <= limit and |up| <= limit, or neither is limited."""
    gate, gate_low, gate_high = _clamp_bounds(gate)
    up, up_low, up_high = _clamp_bounds(up)
    if (gate_low, gate_high, up_low, up_high) == (None,) * 4:
        return gate, up, None
    if gate_low is None and gate_high is not None and up_high == gate_high and up_low == -gate_high:
        return gate, up, gate_high
    return None


_UNARY = {("silu",): "silu", ("relu",): "relu", ("gelu",): "gelu", ("gelu", ("approximate", "tanh")): "gelu_tanh",
          ("gelu", ("approximate", "none")): "gelu"}  # fmt: skip


def _kind(activation: str, gated: str, limit: float | None = None, alpha: float = 1.702) -> dict[str, Any]:
    return {"activation": activation, "gated": gated, "limit": limit, "alpha": alpha}


def _gated(expression: tuple) -> tuple[tuple, dict[str, Any]] | None:
    """act(gate) * up."""
    if expression[0] != "mul" or len(expression) != 3:
        return None
    for activated, up in (expression[1:], expression[:0:-1]):
        if not isinstance(activated, tuple) or not isinstance(up, tuple) or len(activated) < 2:
            continue
        name = _UNARY.get((activated[0], *activated[2:]))
        limited = _limited(activated[1], up) if name is not None and isinstance(activated[1], tuple) else None
        halves = _halves(*limited[:2]) if limited is not None else None
        if name is not None and limited is not None and halves is not None:
            return halves[0], _kind(name, halves[1], limited[2])
    return None


def _swiglu_clamped(expression: tuple) -> tuple[tuple, dict[str, Any]] | None:
    """(up + 1) * gate * sigmoid(alpha * gate), gate and up limited."""
    if expression[0] != "mul" or len(expression) != 3:
        return None
    for plus_one, swish in (expression[1:], expression[:0:-1]):
        if not (_is(plus_one, "add", 3) and plus_one[2] == 1 and _is(swish, "mul", 3)):
            continue
        for gate, sigmoid in (swish[1:], swish[:0:-1]):
            scaled = sigmoid[1] if _is(sigmoid, "sigmoid", 2) else None
            if not (_is(scaled, "mul", 3) and scaled[1] == gate and isinstance(scaled[2], float)):
                continue
            limited = _limited(gate, plus_one[1])
            halves = _halves(*limited[:2]) if limited is not None else None
            if limited is not None and halves is not None:
                return halves[0], _kind("swiglu_clamped", halves[1], limited[2] or math.inf, scaled[2])
    return None


def _ungated(expression: tuple) -> tuple[tuple, dict[str, Any]] | None:
    """act(up)."""
    if _is(expression, "square", 2) or (_is(expression, "pow", 3) and expression[2] == 2):
        inner = expression[1]
        return (inner[1], _kind("relu2", "none")) if _is(inner, "relu", 2) else None
    name = _UNARY.get((expression[0], *expression[2:]))
    return (expression[1], _kind(name, "none")) if name is not None else None


def _is(expression: Any, name: str, length: int) -> TypeGuard[tuple]:
    return isinstance(expression, tuple) and len(expression) == length and expression[0] == name


#: Every activation that is known, tried in order: (its argument, how the op calls it), or None.
_ACTIVATIONS: tuple[Callable[[tuple], tuple[tuple, dict[str, Any]] | None], ...] = (_gated, _swiglu_clamped, _ungated)
