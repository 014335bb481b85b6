"""What an inner compiler that knows Dynamo's graphs looks for in one, asked of ours and written into them.

Only Torch-TensorRT needs it: its lowering starts on the graph as it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from moe_fx.passes.graph import argument, value


def write_as_dynamo(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Write two things as Dynamo does, in place.

    * Placeholders have a type.  Torch-TensorRT copies the inputs of type ``Tensor`` while it traces; without the copies a
      model that returns a view of an input cannot be traced, and is not compiled at all.
    * ``item`` is a method.  With dynamic shapes Dynamo makes inputs of a model's numbers, and Torch-TensorRT writes their
      values into the graph; without that, each of them cuts the model in two.
    """
    for placeholder, given in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if placeholder.type is None:
            placeholder.type = Tensor if isinstance(given, Tensor) else type(given)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default):
        with gm.graph.inserting_before(node):
            method = gm.graph.call_method("item", node.args)
        method.meta.update(node.meta)
        node.replace_all_uses_with(method)
        gm.graph.erase_node(node)
    gm.recompile()


def writes_to_what_is_given(gm: fx.GraphModule) -> bool:
    """Whether running a graph, Dynamo's own or one of ATen ops, changes an input or an attribute of it."""
    given = [*gm.graph.find_nodes(op="placeholder"), *gm.graph.find_nodes(op="get_attr")]
    memories = {_memory(node) for node in given} - {None}
    return any(_memory(written) in memories for node in gm.graph.nodes for written in _written(node))


def _memory(node: object) -> int | None:
    """What the tensors that share memory have in common; None for what is no tensor."""
    val = value(node)
    return val.untyped_storage()._cdata if isinstance(val, Tensor) else None


def _written(node: Node) -> list[Any]:
    """The arguments that a call changes in place."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        writes = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
        return [argument(node, a.name, i) for i, a in enumerate(target._schema.arguments) if writes[i]]
    if node.op not in ("call_function", "call_method") or not node.args:
        return []
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True
    return [*([node.args[0]] if in_place else []), *([node.kwargs["out"]] if "out" in node.kwargs else [])]


#: ``x[i] = y``, ``x += y`` and the like, as Dynamo calls them.
_IN_PLACE = frozenset("setitem iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split())
