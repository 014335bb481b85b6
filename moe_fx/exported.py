"""The pass on what ``torch.export`` made, for deployments without Python compilation (AOTInductor)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from moe_fx.owner import GraphOwner
from moe_fx.passes.graph import IS_PARAMETER
from moe_fx.passes.normalize import tidy
from moe_fx.pipeline import Settings, rewrite
from moe_fx.policy import BEAM, PolicyError, from_config
from moe_fx.report import Report

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def rewrite_exported(
    program: ExportedProgram,
    policy: object = None,
    *,
    strict: bool = False,
    fuse_experts: bool | None = None,
    report: Report | None = None,
) -> ExportedProgram:
    """A new exported program with ``policy`` at every routing site; the given one stays as it is.

    The policy's tensors become buffers of the new program, so it can be saved, decomposed, and compiled by
    ``torch._inductor.aoti_compile_and_package``.  Who runs the result must have ``moe_fx.ops`` imported: it defines the
    ops that now stand in the graph.

    Args:
        program: of a whole model, as ``torch.export.export`` makes it, with static or dynamic shapes.
        policy: a policy, a list of them, or their configuration as dicts; None: exact top-K.
        strict: whether a real router that cannot be rewritten is an error.
        fuse_experts: whether recognised experts become one op.  None: where that was measured to be faster.
        report: filled with the sites, the skips and the ops before and after, if given.

    Raises:
        PolicyError, ArtifactError: the policy cannot be applied, or trains.
        UnrewrittenError: with ``strict``, a real router was left alone.
    """
    policies = from_config(policy)
    if any(isinstance(p, BEAM) and p.train for p in policies):
        raise PolicyError("BEAM(train=True) cannot train in an exported program: train with torch.compile, then export")
    gm = copy.deepcopy(program.graph_module)
    signature = copy.deepcopy(program.graph_signature)
    given = {*signature.user_inputs}
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        placeholder.meta[IS_PARAMETER] = placeholder.name not in given
    _erase_assertions(gm.graph)
    tidy(gm)
    report = Report() if report is None else report
    report.graphs += 1
    rewrite(gm, GraphOwner(), Settings(policies, strict=strict, fuse=fuse_experts), report)
    tensors = _lift(gm, signature)
    for node, spec in zip(gm.graph.output_node().args[0], signature.output_specs, strict=True):
        if isinstance(node, fx.Node):
            spec.arg.name = node.name  # the experts' output may be the program's
    return _like(program, gm, signature, {**program.state_dict, **tensors})


def _erase_assertions(graph: fx.Graph) -> None:
    """Erase assertions on dtypes, which hold for what the rewrite puts in as well, and would pass for readers of it."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def _lift(gm: fx.GraphModule, signature: Any) -> dict[str, Tensor]:
    """Make inputs of the buffers that the rewrite registered, as exported programs want them, and return their values."""
    from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

    tensors: dict[str, Tensor] = {}
    first = next(iter(gm.graph.nodes))
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if isinstance(getattr(gm, name, None), fx.GraphModule):
            continue  # the body of a branch
        if name not in tensors:
            tensors[name] = gm.get_buffer(name)
            with gm.graph.inserting_before(first):
                lifted = gm.graph.placeholder(f"b_{name}")
            lifted.meta["val"] = node.meta["val"]
            spec = InputSpec(InputKind.BUFFER, TensorArgument(lifted.name), name, persistent=True)
            signature.input_specs.insert(len(tensors) - 1, spec)
        node.replace_all_uses_with(lifted)
        gm.graph.erase_node(node)
        delattr(gm, name)
    gm.recompile()
    return tensors


def _like(program: ExportedProgram, gm: fx.GraphModule, signature: Any, state: dict[str, Tensor]) -> ExportedProgram:
    """The program with another graph."""
    return type(program)(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
