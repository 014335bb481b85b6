"""Graphs inside a graph: Dynamo puts what runs under activation checkpointing into a body of its own.

A body is rewritten like any graph.  What its placeholders are (a parameter, and of which module) stands only on the
outer graph's, and is copied to them.  Without gradients there is nothing to checkpoint, and it is written out in the outer
graph.  So is, at each of its calls, a region that is compiled once for several layers, because the layers' tables differ.
Bodies of other kinds (branches, loops) stay as they are.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dynamo.source import SyntheticLocalSource
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.bind import append_outputs, watch_outputs, watched_outputs
from moe_fx.passes.find_sites import find_sites
from moe_fx.passes.selection import selects
from moe_fx.site import Skip, normal_name

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_REGION = torch.ops.higher_order.invoke_subgraph


def checkpointed_bodies(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The name and graph of every body that runs under activation checkpointing, in graph order, where that has an effect.

    A body that is called twice is left out: its placeholders would stand for the parameters of two layers.
    """
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is _CHECKPOINT]
    uses = Counter(str(call.args[0].target) for call in calls)
    for call in calls if torch.is_grad_enabled() else ():
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


class WrittenOut(fx.Interpreter):
    """Runs a graph with bodies in the place of their calls: of nested regions, and of what there is no need to checkpoint.

    A region (``torch.compiler.nested_compile_region``) has one body for all layers, whose nodes bear the module paths
    of the layer that was traced; at the call of another layer they get that layer's.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._traced: dict[str, tuple[Node, ...]] = {}  # the operands of each body's first call

    def run_node(self, n: Node) -> Any:
        """The value of one node of the outer graph."""
        body = _written_out(n, cast(fx.GraphModule, self.module))
        if body is None:
            return super().run_node(n)
        first = 2 if n.target is _REGION else 1  # a region's name stands between its body and what it is given
        traced = self._traced.setdefault(str(cast(Node, n.args[0]).target), n.args[first:])  # type: ignore[arg-type]
        given, _ = self.fetch_args_kwargs_from_env(n)
        return WrittenOut(_moved(body, traced, n.args[first:])).run(*given[first:])


def _written_out(call: Node, gm: fx.GraphModule) -> fx.GraphModule | None:
    """The body of a call that is to be written out, as it selects something; None for any other node."""
    kinds = (_REGION,) if torch.is_grad_enabled() else (_REGION, _CHECKPOINT)
    body = getattr(gm, str(call.args[0].target)) if call.target in kinds and isinstance(call.args[0], Node) else None
    return body if isinstance(body, fx.GraphModule) and selects(body) else None


def _moved(body: fx.GraphModule, traced: Sequence[object], given: Sequence[object]) -> fx.GraphModule:
    """The body with the module paths of the layer whose tensors are ``given``, where it was traced with another's."""
    steps = dict(step for pair in zip(traced, given, strict=True) if (step := _other_path(*pair)) is not None)
    if not steps:
        return body
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}), type_expr=None)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {key: (_path_at(steps, path), kind) for key, (path, kind) in stack.items()}
    return fx.GraphModule(body, graph)


def _other_path(traced: object, given: object) -> tuple[str, str] | None:
    """Where two parameters' paths differ: what stands before their common end in each."""
    before, after = (normal_name(g.source_name(n) or "").split(".") if isinstance(n, Node) else [""] for n in (traced, given))
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return (".".join(before), ".".join(after)) if before and after else None


def _path_at(steps: dict[str, str], path: str) -> str:
    """A module path of the traced layer as the other layer's."""
    plain = normal_name(path)
    for before in sorted(steps, key=len, reverse=True):
        if plain == before or plain.startswith(before + "."):
            return steps[before] + plain[len(before) :]
    return plain


def sites_in_bodies(gm: fx.GraphModule) -> list[Skip]:
    """Routing in the bodies of a normalised graph that stay as they are: branches, loops and scans."""
    calls = [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator) and n.target is not _CHECKPOINT]
    bodies = [(call, body) for call in calls for body in _bodies(gm, call) if selects(body)]
    weights = g.Weights(gm.graph) if bodies else ()
    found = []
    for call, body in bodies:
        leaves = [n for n in pytree.tree_leaves(call.args) if isinstance(n, Node)]
        operands = leaves[max(i for i, n in enumerate(leaves) if n.op == "get_attr") + 1 :]
        for placeholder, operand in zip(body.graph.find_nodes(op="placeholder"), operands, strict=False):
            placeholder.meta[g.IS_PARAMETER] = operand in weights
        routings, skips = find_sites(body)
        reason = f"it stands in a body of {call.target}, which is not rewritten: route outside of it"
        found += [*(Skip(r.site.name, reason, routing=True) for r in routings), *skips, *sites_in_bodies(body)]
    return found


def _bodies(gm: fx.GraphModule, call: Node) -> list[fx.GraphModule]:
    named = [getattr(gm, str(i.target), None) for i in call.all_input_nodes if i.op == "get_attr"]
    return [body for body in named if isinstance(body, fx.GraphModule)]
