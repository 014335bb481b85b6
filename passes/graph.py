"""Questions every pass asks of an FX graph: what a node computes, its shape, where it came from.

The passes read three kinds of graph: pre-dispatch ATen (``aten.softmax.int``), Inductor's decomposed post-grad ATen
(``aten._softmax``, ``prims.convert_element_type``) and graphs with an engine's own ops.  So an op is known by its
plain name, without namespace, overload or the trailing underscore of its in-place form.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.node import Node

from moe_fx.site import normal_name

#: Same numbers in the same order under another shape or in another memory layout.
RESHAPES = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze contiguous clone alias detach lift_fresh_copy "
    "view_as reshape_as".split()
)
#: Same numbers in another dtype.
CASTS = frozenset("to _to_copy convert_element_type type_as float half bfloat16 double long int".split())
TRANSPOSES = frozenset("t transpose permute numpy_T mT movedim moveaxis swapaxes swapdims".split())
LAYOUT = RESHAPES | TRANSPOSES | {"expand"}
#: Ops after which ids are the same ids in another layout or integer type.
ID_WISE = LAYOUT | CASTS


def op(node: object) -> str:
    """The plain name of what a node calls (``softmax``, ``getitem``), or "" for anything that is no call."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    return plain_name(called(node))


def called(node: Node) -> object:
    """What a call computes: its target, or the op that it functionalizes (engines' ops write into a given output)."""
    target = node.target
    is_wrapper = isinstance(target, torch._ops.HigherOrderOperator) and target.name().startswith("auto_functionalized")
    return node.args[0] if is_wrapper else target


def plain_name(target: object) -> str:
    """The plain name of a call's target: a function, an op, or a method's name as Dynamo writes it."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.removesuffix("_") if not name.startswith("__") else name


def qualified_op(node: Node) -> str:
    """The op's name with its namespace (``aten.topk``), for tables of ops in reports."""
    if node.op != "call_function":
        return node.op
    target = called(node)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    return getattr(target, "__name__", str(target))


def value(node: object) -> object:
    """The fake tensor (or tuple, or number) a node produces, as recorded by the tracer; None where it is unknown."""
    if not isinstance(node, Node):
        return None
    meta = node.meta
    return meta["val"] if "val" in meta else meta.get("example_value")


def fake(node: Node) -> FakeTensor:
    """The fake tensor a node of a normalised graph produces."""
    val = value(node)
    assert isinstance(val, FakeTensor), f"{node.name} carries no fake tensor"
    return val


def shape(node: object) -> tuple | None:
    """The node's shape, or None when it is no tensor."""
    val = value(node)
    return tuple(val.shape) if isinstance(val, torch.Tensor) else None


def rank(node: object) -> int:
    """Number of dimensions, -1 when the node is no tensor."""
    dims = shape(node)
    return -1 if dims is None else len(dims)


def size(node: object, dim: int) -> int | None:
    """A dimension's size when it is static, else None.  Reading it never adds a guard."""
    dims = shape(node)
    if dims is None or not -len(dims) <= dim < len(dims):
        return None
    number = expression(dims[dim])
    return number if isinstance(number, int) else None


def expression(dim: object) -> object:
    """What a size is in terms of symbols: an int where it is known, even if it travels as a symbol.  Adds no guard."""
    if not isinstance(dim, torch.SymInt):
        return dim
    known = dim.node.maybe_as_int()
    return dim.node.expr if known is None else known


def same_shape(a: object, b: object) -> bool:
    """Whether two nodes have the same shape, symbol for symbol.  Adds no guard."""
    left, right = shape(a), shape(b)
    return left is not None and right is not None and [*map(expression, left)] == [*map(expression, right)]


def is_size(node: Node) -> bool:
    """Whether a node gives no tensor, but a size, or asserts something of sizes."""
    return op(node) in _ASSERTS or isinstance(value(node), (int, torch.SymInt, torch.SymBool))


_ASSERTS = frozenset("_assert_scalar sym_constrain_range sym_constrain_range_for_size".split())


def dtype(node: object) -> torch.dtype | None:
    """The node's dtype, or None when it is no tensor."""
    val = value(node)
    return val.dtype if isinstance(val, torch.Tensor) else None


def is_float(node: object) -> bool:
    """Whether the node is a floating-point tensor."""
    kind = dtype(node)
    return kind is not None and kind.is_floating_point


def is_integer(node: object) -> bool:
    """Whether the node is a tensor of integers (bool is not)."""
    kind = dtype(node)
    return kind is not None and not kind.is_floating_point and not kind.is_complex and kind != torch.bool


def axes_before(transpose: Node) -> list[int]:
    """For each axis of a transpose's result, which axis of its input it is."""
    target = cast(torch._ops.OpOverload, transpose.target)
    sizes = range(rank(transpose))  # each axis bears its own number
    return list(target(torch.empty(*sizes, device="meta"), *transpose.args[1:], **transpose.kwargs).shape)


def argument(node: Node, name: str, position: int, default: object = None) -> object:
    """An argument by its schema name or position, whichever way the graph spells it."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def reads_shape_only(user: Node, node: Node) -> bool:
    """Whether an op asks a node for its shape, dtype or device, and not for its numbers."""
    name = op(user)
    if name in ("view_as", "reshape_as", "expand_as", "type_as"):
        return user.args[0] is not node
    return name in _SHAPE_ONLY and user.args[0] is node


_SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full sym_size".split()
)


def mutates(node: Node) -> bool:
    """Whether the op changes one of its inputs in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def mutates_between(first: Node, last: Node) -> bool:
    """Whether any op from ``first`` up to ``last`` changes something in place."""
    node = first
    while node is not last:
        if mutates(node):
            return True
        node = node.next
    return mutates(last)


def outputs(node: Node, index: int) -> list[Node]:
    """The ``getitem`` nodes that take output ``index`` of a node with several outputs."""
    return [u for u in node.users if u.target is operator.getitem and u.args[1] == index]


def module_path(node: Node) -> str | None:
    """Normal form of the path of the module whose forward made the node; None when the graph does not tell."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    return normal_name(path)


def parent(path: str, steps: int) -> str:
    """A module path without its last names."""
    return ".".join(path.split(".")[:-steps]) if path else ""


def common_path(paths: Iterable[str]) -> str:
    """The deepest module that contains all the given module paths."""
    split = [p.split(".") if p else [] for p in paths]
    prefix: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


#: Where a graph whose inputs are told apart by a signature says of each whether it holds weights.
IS_PARAMETER = "moe_fx_is_parameter"


def is_parameter(node: Node) -> bool:
    """Whether a leaf holds weights: a parameter or buffer, so far as the graph tells."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    if IS_PARAMETER in node.meta:
        return bool(node.meta[IS_PARAMETER])
    source = source_name(node)
    if source is not None:
        return "_parameters[" in source or "_buffers[" in source
    return isinstance(value(node), torch.nn.Parameter)


def source_name(node: Node) -> str | None:
    """Where Dynamo read a graph input from (``L['self']._modules['gate']._parameters['weight']``)."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return name() if callable(name) else name


def _may_be_parameter(node: Node) -> bool:
    """Whether an input of a graph that does not say which of them are parameters may be one.

    Any matrix of fixed size may, or any stack of them, which may hold packed integers.
    """
    fixed = all(isinstance(expression(dim), int) for dim in shape(node) or ())
    return fixed and rank(node) >= (2 if is_float(node) else 3)


class Weights:
    """Which nodes of one graph are functions of weights alone (a cast, transpose or norm of parameters)."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        known = any(is_parameter(n) for n in nodes)
        self._of: set[Node] = set()
        for node in nodes:
            leaf = node.op in ("placeholder", "get_attr")
            if leaf and (is_parameter(node) or (not known and _may_be_parameter(node))):
                self._of.add(node)
            elif node.op == "call_function" and node.all_input_nodes and all(i in self._of for i in node.all_input_nodes):
                self._of.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self._of

    def leaves(self, node: Node) -> Iterator[Node]:
        """The parameters a weight node is computed from."""
        seen, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            if n.op in ("placeholder", "get_attr"):
                yield n
            stack.extend(n.all_input_nodes)


def call(graph: fx.Graph, target: torch._ops.OpOverload, *args: Any) -> Node:
    """A new call with its fake value computed, so that later passes and the inner compiler can read its shape."""
    node = graph.call_function(target, args)
    fakes: Any = fx.node.map_arg(args, cast(Any, value))
    mode = next(f.fake_mode for f in fakes if isinstance(f, FakeTensor))
    with mode:
        node.meta["val"] = target(*fakes)
    first = next(a for a in args if isinstance(a, Node))
    node.meta.update({k: first.meta[k] for k in ("nn_module_stack", "stack_trace") if k in first.meta})
    return node


def call_pair(graph: fx.Graph, target: torch._ops.OpOverload, *args: Any) -> tuple[Node, Node]:
    """A new call of an op with two outputs, and its two outputs."""
    pair = call(graph, target, *args)
    first, second = (graph.call_function(operator.getitem, (pair, index)) for index in (0, 1))
    for item, val in zip((first, second), pair.meta["val"], strict=True):
        item.meta.update({**pair.meta, "val": val})
    return first, second
