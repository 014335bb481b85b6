"""How the time to find sites grows with the number of layers: it should be linear in the number of nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import fx

from benchmarks.coverage import architectures, build, inputs_of
from moe_fx.passes.find_sites import Routing, find_sites
from moe_fx.passes.fuse_experts import recognise
from moe_fx.passes.normalize import normalize
from moe_fx.passes.region import find_region

LAYERS = (12, 24, 48, 94)
ARCHITECTURE = "deepseek_v3"  # the longest router: groups, a bias, a scale
_REPEATS = 5


def run(say: Callable[[str], None]) -> list[dict[str, object]]:
    """One row for each number of layers: nodes, sites, and seconds of each analysis on a graph of the whole model."""
    (architecture,) = (a for a in architectures()[0] if a.name == ARCHITECTURE)
    rows: list[dict[str, object]] = []
    for layers in LAYERS:
        say(f"{layers} layers: tracing")
        gm = _graph(build(architecture, "grouped_mm", num_hidden_layers=layers))
        say(f"{layers} layers: finding")
        routings, _ = find_sites(gm)
        if len(routings) != layers:
            raise RuntimeError(f"{len(routings)} sites found in {layers} layers: there is nothing to time")
        find = _median_seconds(partial(find_sites, gm))
        fuse = _median_seconds(partial(_recognise, routings))
        rows.append(
            {
                "architecture": ARCHITECTURE,
                "layers": layers,
                "nodes": len(gm.graph.nodes),
                "sites": len(routings),
                "find_seconds": round(find, 4),
                "find_us_per_node": round(find / len(gm.graph.nodes) * 1e6, 2),
                "recognise_seconds": round(fuse, 4),
            }
        )
    return rows


def _graph(model: torch.nn.Module) -> fx.GraphModule:
    """The model as one graph of ATen ops."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(normalize(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(**inputs_of(model))
    return graphs[0]


def _recognise(routings: list[Routing]) -> None:
    for routing in routings:
        region = find_region(routing)
        if region is None or isinstance(recognise(routing, region), str):
            raise RuntimeError(f"the experts of {routing.site.name} are not recognised: there is nothing to time")


def _median_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
