"""Step 1: retrace the graph Dynamo captured to ATen, so that one vocabulary of ops reaches the other passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Node

from moe_fx.passes.bodies import WrittenOut
from moe_fx.passes.graph import CASTS, RESHAPES, dtype, is_float, op, value
from moe_fx.passes.spelling import choose_along_last_axis, look_up_along_last_axis


class NormalizeError(RuntimeError):
    """The graph cannot be retraced; the message is the reason.  Such a graph is compiled untouched."""


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """The same computation in pre-dispatch ATen ops, over the same placeholders.

    The fake tensors Dynamo left in the placeholders are reused, so dynamic shapes keep their symbols and no guard is
    lost; ``nn_module_stack``, which gives sites their names, survives.

    Raises:
        NormalizeError: there is no fake tensor to take, or an op cannot be retraced.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [value(p) for p in placeholders]
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:
        raise NormalizeError("it has no tensor input")
    if torch.is_grad_enabled() and any("autograd_function_apply" in str(n.target) for n in gm.graph.nodes):
        raise NormalizeError("it trains through a custom autograd function, whose backward a retrace would lose")
    new = _retraced(gm, fakes, mode, pre_dispatch=True)
    if _holds_traced(new) and not torch.is_grad_enabled():
        # what stands under vmap, as some masks and scans do, is only seen below the dispatcher, and so below autograd
        new = _retraced(gm, fakes, mode, pre_dispatch=False)
    if _holds_traced(new):
        raise NormalizeError("a part of it, such as a scan, holds what was only traced")
    _carry_over(gm, new, placeholders)
    tidy(new)
    return new


def _retraced(gm: fx.GraphModule, fakes: list[Any], mode: Any, pre_dispatch: bool) -> fx.GraphModule:
    try:
        with fx.traceback.preserve_node_meta(), mode:
            return make_fx(WrittenOut(gm).run, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*fakes)
    except Exception as error:  # whatever the retrace meets, the graph must still compile
        raise NormalizeError(f"it cannot be retraced to ATen ({type(error).__name__}: {_first_line(error)})") from error


def _holds_traced(gm: fx.GraphModule) -> bool:
    """Whether the graph holds, as a constant, a value that exists while tracing only."""
    return any(isinstance(getattr(gm, str(n.target), None), FakeTensor) for n in gm.graph.find_nodes(op="get_attr"))


def tidy(gm: fx.GraphModule) -> None:
    """Make every effect on the graph's own values an edge, erase what nothing reads, and spell one thing in one way."""
    functionalize_locals(gm.graph)
    _erase_unread(gm.graph)
    choose_along_last_axis(gm.graph)
    look_up_along_last_axis(gm.graph)
    gm.recompile()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _carry_over(old: fx.GraphModule, new: fx.GraphModule, placeholders: list[Node]) -> None:
    """Keep what Dynamo tells the inner compiler beside the graph: input sources, static inputs, the compile id."""
    new.meta.update(old.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    for before, after in zip(placeholders, new.graph.find_nodes(op="placeholder"), strict=True):
        after.meta.update({k: v for k, v in before.meta.items() if k not in after.meta})
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    sources: Any = getattr(old, "_param_name_to_source", None)
    if sources is not None:
        # tensors that Dynamo kept as attributes come through under other names, which the inner compiler would miss
        names = {name for name, _ in [*new.named_parameters(), *new.named_buffers()]}
        if not names <= set(sources):
            del new._param_name_to_source


def _erase_unread(graph: fx.Graph) -> None:
    """Erase results that nothing reads: they would pass for readers of the routing decision.

    Only ATen ops that return tensors, draw no random numbers and write nothing; what else stands in a graph may be there
    for its effect.
    """
    for node in reversed(list(graph.nodes)):
        target = node.target
        if node.users or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            continue
        draws = torch.Tag.nondeterministic_seeded in target.tags
        if isinstance(value(node), torch.Tensor) and not draws and not target._schema.is_mutable:
            graph.erase_node(node)


def functionalize_locals(graph: fx.Graph) -> None:
    """Turn in-place ops on the graph's own intermediates into their functional forms.

    ``weights /= weights.sum()`` reaches us as ``div_``, whose effect on later readers of ``weights`` is no edge of the
    graph.  Only values that nothing else can alias are touched: made by a functional op here, never viewed.
    """
    for node in list(graph.nodes):
        functional = _functional_form(node)
        target = node.args[0] if node.args else None
        if functional is None or not isinstance(target, Node) or not _unaliased(target, node):
            continue
        _replace_later_uses(target, node)
        node.target = functional


def _replace_later_uses(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new, delete_user_cb=lambda user: new < user)


def _functional_form(node: Node) -> torch._ops.OpOverload | None:
    """``aten.div.Tensor`` for ``aten.div_.Tensor``; None where there is no such pair with the same arguments."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    form = getattr(packet, target._overloadname, None) if packet is not None else None
    if form is None or torch.Tag.nondeterministic_seeded in target.tags or name == "copy_":
        return None
    if [a.name for a in form._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    mutated = [i for i, a in enumerate(target._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return form if mutated == [0] else None


def _unaliased(node: Node, before: Node) -> bool:
    """Whether ``node`` owns its memory and nothing read so far shares it."""
    # an in-place op keeps its target's dtype, where the functional form would promote
    if node.op != "call_function" or any(is_float(i) and dtype(i) != dtype(node) for i in before.all_input_nodes):
        return False
    if _returns_alias(node):  # a view that nothing but the in-place op reads, of a value that nothing else reads
        return _unaliased_root(node)
    return not any(_returns_alias(u) for u in node.users if u is not before)


def _unaliased_root(view: Node) -> bool:
    """Whether a chain of views, each read once, starts at a value made here."""
    node = view
    while node.op == "call_function" and _returns_alias(node):
        if len(node.all_input_nodes) != 1 or len(node.users) != 1 or op(node) not in RESHAPES:
            return False
        node = node.all_input_nodes[0]
    return node.op == "call_function" and len(node.users) == 1


def _returns_alias(node: Node) -> bool:
    """Whether an output of the node may share memory with one of its inputs."""
    target = node.target
    if op(node) in CASTS and node.args and dtype(node) != dtype(node.args[0]):
        return False  # other numbers need other memory
    if isinstance(target, torch._ops.OpOverload):
        return any(r.alias_info is not None for r in target._schema.returns) or target.name() in _MAYBE_VIEWS
    # getitem of a multi-output functional op (topk) is a value of its own; of a view op (chunk), an alias
    if getattr(target, "__name__", "") == "getitem" and node.args and isinstance(node.args[0], Node):
        return _returns_alias(node.args[0])
    return node.op != "call_function"


#: Composite ops that return a view when they can, whatever their schema says.
_MAYBE_VIEWS = frozenset(
    {"aten::reshape", "aten::to.dtype", "aten::to.device", "aten::to.dtype_layout", "aten::to.other", "aten::contiguous",
     "aten::flatten.using_ints", "aten::type_as", "aten::reshape_as", "aten::unflatten.int", "aten::dropout"}
)
