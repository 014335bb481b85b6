"""One spelling for what can be written in several ways, so that the search for sites need know only one."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx
from torch.fx.node import Node

from moe_fx.passes import graph as g
from moe_fx.passes.graph import argument, is_float, op, rank, same_shape, size


def choose_along_last_axis(graph: fx.Graph) -> None:
    """Write a choice of best entries along another axis of fixed size as one along the last: scores [E, T] become [T, E]."""
    for node in list(graph.nodes):
        position = {"topk": 2, "max": 1, "argmax": 1}.get(op(node))
        scores, dim = node.args[0] if node.args else None, argument(node, "dim", position or 0, -1)
        axes = [*range(rank(scores))]
        if position is None or not isinstance(dim, int) or not axes or dim in (-1, axes[-1]) or not is_float(scores):
            continue
        if size(scores, dim) is None or "dim" in node.kwargs:
            continue
        to_last = [a for a in axes if a != axes[dim]] + [axes[dim]]
        with graph.inserting_before(node):
            turned = g.call(graph, torch.ops.aten.permute.default, scores, to_last)
        node.args = (turned, *node.args[1:position], -1, *node.args[position + 1 :])
        results = [u for u in node.users if op(u) == "getitem"] if op(node) != "argmax" else [node]
        _like_before(graph, node, results, [to_last.index(a) for a in axes])


def look_up_along_last_axis(graph: fx.Graph) -> None:
    """Write ``x[arange(T)[:, None], ids]`` as a gather, and ``x[arange(T)[:, None], ids] = y`` as a scatter."""
    for node in graph.nodes:
        name, x = op(node), node.args[0] if node.args else None
        places = node.args[1] if name in ("index", "index_put") and rank(x) == 2 else None
        if not isinstance(places, (list, tuple)) or len(places) != 2:
            continue
        if not _is_each_row(places[0], x) or not _are_chosen(places[1]):
            continue
        if name == "index":
            node.target, node.args = torch.ops.aten.gather.default, (x, 1, places[1])
        elif len(node.args) == 3 and same_shape(node.args[2], places[1]) and node.target is torch.ops.aten.index_put.default:
            node.target, node.args = torch.ops.aten.scatter.src, (x, 1, places[1], node.args[2])


def _is_each_row(rows: object, x: object) -> bool:
    """Whether integers [T, 1] are the numbers of all rows of x [T, .], in order."""
    height, width = (g.expression(d) for d in g.shape(x) or ())
    fits = [g.expression(d) for d in g.shape(rows) or ()] == [height, 1]
    while op(rows) in g.RESHAPES | g.CASTS:
        rows = cast(Node, rows).args[0]
    given = rows.args if isinstance(rows, Node) and op(rows) == "arange" else ()
    ends = [g.expression(g.value(a) if isinstance(a, Node) else a) for a in given]
    return fits and ends in ([height], [0, height])


def _are_chosen(ids: object) -> bool:
    """Whether integers [T, K] come from a choice, and so are none below 0."""
    fits = rank(ids) == 2
    while op(ids) in g.RESHAPES | g.CASTS | {"slice"}:
        ids = cast(Node, ids).args[0]
    source = ids.args[0] if op(ids) == "getitem" and isinstance(ids, Node) else None
    return fits and (op(ids) == "argsort" or op(source) in ("topk", "sort"))


def _like_before(graph: fx.Graph, node: Node, results: list[Node], back: list[int]) -> None:
    """Give the results of a choice that is now made along the last axis their old layout, for those who read them."""
    target = cast(torch._ops.OpOverload, node.target)
    with g.fake(cast(Node, node.args[0])).fake_mode:
        chosen = target(*(g.value(a) if isinstance(a, Node) else a for a in node.args), **node.kwargs)
    node.meta["val"] = chosen
    for result in results:
        result.meta["val"] = chosen if result is node else chosen[cast(int, result.args[1])]
        if rank(result) == len(back):
            readers = list(result.users)
            with graph.inserting_after(result):
                old = g.call(graph, torch.ops.aten.permute.default, result, back)
            for reader in readers:
                reader.replace_input_with(result, old)
                if op(reader) in g.TRANSPOSES and [back[axis] for axis in g.axes_before(reader)] == [*range(len(back))]:
                    reader.replace_all_uses_with(result)  # the model turns it back itself
                    graph.erase_node(reader)
            if not old.users:
                graph.erase_node(old)
