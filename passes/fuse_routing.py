"""Step 6: one launch for a selection and the policy behind it.

    values, ids = topk(scores, k);  new = sere_reroute(ids, ...)    ->  values, ids, new = topk_sere(scores, k, ...)
    values, ids = topk(scores, k);  w', new = beam_mask(w, ids, m)  ->  values, ids, new = topk_beam(scores, k, m);
                                                                        w' = w where new >= 0, else 0

The pass reads only what it replaces, so that it serves any graph in which these ops follow each other.  Where scores
tie, ``topk`` may take either on a GPU, and the new ops take the lower id.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.node import Node

import moe_fx.ops  # noqa: F401  (defines torch.ops.moe_fx)
from moe_fx.passes import graph as g

aten = torch.ops.aten
ops = torch.ops.moe_fx


def fuse_routing(gm: fx.GraphModule) -> int:
    """Fuse every selection whose ids a policy's op reads; returns how many.  The graph must not be differentiated."""
    fused = sum(_fuse(gm.graph, node) for node in list(gm.graph.nodes) if node.target is aten.topk.default)
    if fused:
        gm.graph.lint()
    return fused


def _fuse(graph: fx.Graph, topk: Node) -> bool:
    k, ids = g.argument(topk, "k", 1), g.outputs(topk, 1)
    if not _selects_rows(topk) or not isinstance(k, int) or len(ids) != 1:
        return False
    for target, rule in ((ops.sere_reroute.default, _sere), (ops.beam_mask.default, _beam)):
        readers = [u for u in ids[0].users if u.target is target and _ids_read_by(u) is ids[0]]
        if readers:
            return rule(graph, topk, k, readers)
    return False


def _selects_rows(topk: Node) -> bool:
    """Whether it takes the largest along the last of two axes, in a precision the kernels compare in."""
    dim, largest = g.argument(topk, "dim", 2, -1), g.argument(topk, "largest", 3, True)
    return g.rank(topk.args[0]) == 2 and dim in (-1, 1) and largest is True and g.dtype(topk.args[0]) != torch.float64


def _ids_read_by(policy: Node) -> object:
    return policy.args[0] if policy.target is ops.sere_reroute.default else policy.args[1]


def _sere(graph: fx.Graph, topk: Node, k: int, readers: list[Node]) -> bool:
    first = readers[0]
    if len(readers) > 1 or not _move_before(topk, [a for a in first.args[1:] if isinstance(a, Node)]):
        return False
    _replace(first, _select(graph, topk, ops.topk_sere.default, k, *first.args[1:]))
    return True


def _beam(graph: fx.Graph, topk: Node, k: int, readers: list[Node]) -> bool:
    """Several weights of one decision may be masked by the same logits: their picks are the same."""
    logits, tau = readers[0].args[2:]
    same = all(r.args[2:] == (logits, tau) for r in readers)
    if not same or not isinstance(logits, Node) or not _move_before(topk, [logits]):
        return False
    new_ids = _select(graph, topk, ops.topk_beam.default, k, logits, tau)
    for reader in readers:
        with graph.inserting_before(reader):
            on = g.call(graph, aten.ge.Scalar, new_ids, 0)
            masked = g.call(graph, aten.where.ScalarOther, on, reader.args[0], 0)
        for index, new in ((0, masked), (1, new_ids)):
            for item in g.outputs(reader, index):
                _replace(item, new)
        graph.erase_node(reader)
    return True


def _select(graph: fx.Graph, topk: Node, target: torch._ops.OpOverload, k: int, *args: object) -> Node:
    """Put the fused op in the place of ``topk``; returns the ids after the policy."""
    with graph.inserting_before(topk):
        fused = g.call(graph, target, topk.args[0], k, *args)
        items = [graph.call_function(operator.getitem, (fused, index)) for index in range(3)]
    for item, value in zip(items, fused.meta["val"], strict=True):
        item.meta.update({**fused.meta, "val": value})
    for index in (0, 1):
        for old in g.outputs(topk, index):
            _replace(old, items[index])
    graph.erase_node(topk)
    for item in items[:2]:
        if not item.users:
            graph.erase_node(item)
    return items[2]


def _replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _move_before(topk: Node, needed: list[Node]) -> bool:
    """Move what the policy needs before the selection; False, and nothing moved, where that depends on the selection."""
    late: list[Node] = []
    stack = list(needed)
    while stack:
        node = stack.pop()
        if topk < node and node not in late:
            if node.op == "placeholder" or g.mutates(node):
                return False
            late.append(node)
            stack += node.all_input_nodes
        elif node is topk:
            return False
    if late and g.mutates_between(topk, max(late)):
        return False  # a value may be changed in place between where it is read and where it would be
    for node in sorted(late):
        topk.prepend(node)
    return True
