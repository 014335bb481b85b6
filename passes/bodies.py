"""Graphs inside a graph: Dynamo puts what runs under activation checkpointing into a body of its own.

A body is rewritten like any graph.  What its placeholders are (a parameter, and of which module) stands only on the
outer graph's, and is copied to them.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import SyntheticLocalSource
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.bind import append_outputs, watch_outputs, watched_outputs

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def checkpointed_bodies(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The name and graph of every body that runs under activation checkpointing, in graph order.

    A body that is called twice is left out: its placeholders would stand for the parameters of two layers.
    """
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is _CHECKPOINT]
    uses = Counter(str(call.args[0].target) for call in calls)
    for call in calls:
        body, *given = call.args
        name = str(body.target)
        if uses[name] == 1:
            yield name, _with_sources(getattr(gm, name), given)


def _with_sources(body: fx.GraphModule, given: list[Node]) -> fx.GraphModule:
    for placeholder, argument in zip(body.graph.find_nodes(op="placeholder"), given, strict=False):
        source = getattr(argument, "_dynamo_source", None)
        if source is not None:
            placeholder._dynamo_source = source
        if "grapharg" in argument.meta:
            placeholder.meta["grapharg"] = argument.meta["grapharg"]
    return body


def put_back(gm: fx.GraphModule, name: str, body: fx.GraphModule) -> None:
    """Put a rewritten body in its place; AOTAutograd wants to know where each tensor it brought comes from."""
    setattr(gm, name, body)
    _pass_on_outputs(gm, name, body)
    known: Any = getattr(gm, "_param_name_to_source", None)
    if known is not None:
        tensors = [f"{name}.{inner}" for inner, _ in (*body.named_parameters(), *body.named_buffers())]
        new = {path: SyntheticLocalSource(path.replace(".", "_")) for path in tensors if path not in known}
        gm._param_name_to_source = {**known, **new}  # type: ignore[assignment]


def _pass_on_outputs(gm: fx.GraphModule, name: str, body: fx.GraphModule) -> None:
    """Return from the outer graph what a body returns for a policy that trains."""
    watched = watched_outputs(body)
    if not watched:
        return
    (call,) = (n for n in gm.graph.nodes if n.target is _CHECKPOINT and str(n.args[0].target) == name)
    returned: Any = body.graph.output_node().args[0]
    values, before = [g.value(node) for node in returned], g.value(call)
    first = len(values) - len(watched)
    call.meta["example_value"] = (*before, *values[first:]) if isinstance(before, (tuple, list)) else values
    with gm.graph.inserting_after(call):
        taken = [gm.graph.call_function(operator.getitem, (call, first + i)) for i in range(len(watched))]
    for node, value in zip(taken, values[first:], strict=True):
        node.meta["example_value"] = value
    append_outputs(gm, taken)
    watch_outputs(gm, watched)
    gm.recompile()
