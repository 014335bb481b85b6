"""A stand-in for Torch-TensorRT, for machines without it: it registers the same backend and takes a graph the same way.

It knows what Torch-TensorRT knows, and loses what that loses.  It copies the inputs of type ``Tensor`` while it traces, and
with them what the graph writes to its inputs, unless AOTAutograd traces; it puts numbers in the place of ``item`` methods;
and it dies of a sort without a dimension that it has to ask about.  Every op of ATen goes into an engine, which PyTorch
runs; every other op, and those in ``torch_executed_ops``, stand between engines.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import register_backend
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupport

__version__ = "2.13.0"


@dataclass
class Compiled:
    """One graph: the options it came with, the ops in each engine and those outside, by name."""

    options: dict[str, Any]
    engines: list[list[str]] = field(default_factory=list)
    outside: Counter[str] = field(default_factory=Counter)


COMPILED: list[Compiled] = []


@register_backend(name="torch_tensorrt")
def torch_tensorrt_backend(
    gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    compiled = Compiled(options or {})
    COMPILED.append(compiled)
    decompositions = core_aten_decompositions()
    _write_numbers(gm)
    if compiled.options.get("use_distributed_mode_trace"):
        return aot_autograd(fw_compiler=lambda gm, _: _partitioned(gm, compiled), decompositions=decompositions)(gm, inputs)
    _copy_inputs(gm)
    mode = detect_fake_mode(inputs)
    with mock.patch.object(mode, "allow_non_fake_inputs", True), mode:
        traced = aot_export_joint_simple(gm, tuple(inputs), trace_joint=False, decompositions=decompositions)
    return _partitioned(traced, compiled)


def _write_numbers(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_method", target="item"):
        example = node.args[0].meta["grapharg"].example
        node.replace_all_uses_with(example.item())
        gm.graph.erase_node(node)
    gm.recompile()


def _copy_inputs(gm: fx.GraphModule) -> None:
    placeholders = [p for p in gm.graph.find_nodes(op="placeholder") if p.type is not None and issubclass(p.type, Tensor)]
    for placeholder in placeholders:
        with gm.graph.inserting_after(placeholders[-1]):
            copy = gm.graph.call_function(torch.ops.aten.clone.default, (placeholder,))
        placeholder.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    gm.recompile()


class _HasConverter(OperatorSupport):
    def __init__(self, executed_by_torch: set[Any]) -> None:
        super().__init__()
        self.executed_by_torch = executed_by_torch

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return self.is_node_supported(submodules, node.args[0])
        if not isinstance(node.target, torch._ops.OpOverload) or node.target in self.executed_by_torch:
            return False
        if node.target is torch.ops.aten.sort.default:
            _ = node.args[1]
        return node.target.namespace in ("aten", "prims")


def _partitioned(gm: fx.GraphModule, compiled: Compiled) -> fx.GraphModule:
    support = _HasConverter(compiled.options.get("torch_executed_ops", set()))
    new = CapabilityBasedPartitioner(gm, support, allows_single_node_partition=True).partition_and_fuse()
    for node in new.graph.nodes:
        if node.op == "call_module":
            inside = new.get_submodule(str(node.target)).graph.nodes
            compiled.engines.append([str(n.target) for n in inside if n.op == "call_function"])
        elif isinstance(node.target, torch._ops.OpOverload):
            compiled.outside[str(node.target)] += 1
    return new
