"""Bring tensors into a graph: a site's artifact, and the counters of its statistics.

In a graph of the whole model a tensor becomes a parameter or buffer of the GraphModule, read by ``get_attr``.  A graph
that several layers share reads it through ``moe_fx::site_tensor``, which finds the layer by its router's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import SyntheticLocalSource
from torch.fx.node import Node

from moe_fx import tables
from moe_fx.artifacts import Artifact
from moe_fx.passes import graph as g
from moe_fx.passes.find_sites import Routing
from moe_fx.policy import BEAM, SERE, Baseline, Policy, PolicyError
from moe_fx.site import Layers, normal_name
from moe_fx.stats import new_counter

aten = torch.ops.aten


class Binder:
    """Binds tensors to one GraphModule.  New nodes go to the graph's current insertion point."""

    def __init__(self, gm: fx.GraphModule, layers_of: Callable[[Routing], Layers], roots: list[nn.Module]) -> None:
        self._gm = gm
        self._layers_of = layers_of
        self._roots = roots
        self._watched: list[tuple[BEAM, str, Node]] = []

    def similarity(self, routing: Routing, policy: SERE) -> Node:
        """The site's similarity [E, E], float32."""
        return self._artifact_tensor(routing, policy, policy.require_artifact(), (routing.router.num_experts,) * 2)

    def mask_router(self, routing: Routing, policy: BEAM) -> Node:
        """The site's mask router [E, H], float32; a trainable parameter where the policy trains."""
        shape = (routing.router.num_experts, routing.router.hidden_size)
        if policy.train:
            (name,) = self._only_name(routing, "training mask routers")
            return self._attribute(policy.trainable(name, shape, _device(routing)), routing)
        if policy.artifact is None:  # zero masks keep every pick: a fresh BEAM is exactly top-K
            return self._attribute(torch.zeros(shape, device=_device(routing)), routing)
        return self._artifact_tensor(routing, policy, policy.artifact, shape)

    def watch(self, routing: Routing, policy: BEAM, logits: Node) -> None:
        """Have the graph hand the policy the mask logits at a site's picks, [T, K], at every run."""
        (name,) = self._only_name(routing, "training mask routers")
        self._watched.append((policy, name, logits))

    def add_outputs(self) -> None:
        """Make further outputs of what is watched.  ``watched_outputs`` tells a graph's caller whose they are."""
        if self._watched:
            append_outputs(self._gm, [node for _, _, node in self._watched])
            watch_outputs(self._gm, [(policy, site) for policy, site, _ in self._watched])

    def sere_settings(self, routing: Routing, policy: SERE) -> tuple[int, float]:
        """S and the threshold at the site."""
        names = self._layers_of(routing).names(routing.site.name)
        found = {policy.at(name) for name in names}
        if len(found) > 1:
            raise PolicyError(
                f"SERE is tuned by site, but {len(names)} layers share one graph (site '{names[0]}' is one): use experts that "
                "trace, for example model.set_experts_implementation('grouped_mm'), or give SERE primary and threshold"
            )
        return found.pop()

    def baseline_tables(self, routing: Routing, policy: Baseline) -> list[Node]:
        """The tensors [E, E], float32, that a baseline's op reads."""
        artifact: Artifact | None = getattr(policy, "artifact", None)
        if policy.tables and artifact is None:
            raise PolicyError(f"{type(policy).__name__} needs an artifact: moe_fx.calibrate(model, batches, folds=True)")
        shape = (routing.router.num_experts,) * 2
        return [self._artifact_tensor(routing, policy, artifact, shape, kind) for kind in policy.tables if artifact]

    def count(self, routing: Routing, before: Node, after: Node, unfolded: Node) -> None:
        """Count the distinct experts of every forward, before and after the policy, and the picks it switched off."""
        counter = new_counter(self._layers_of(routing).names(routing.site.name), _device(routing))
        experts = routing.router.num_experts
        for ids, total in ((before, counter.before), (after, counter.active)):
            active = self._node(torch.ops.moe_fx.count_active.default, ids, experts)
            self._node(aten.add_.Tensor, self._attribute(total, routing), active)
        off = self._node(aten.sum.default, self._node(aten.lt.Scalar, unfolded, 0))
        self._node(aten.add_.Tensor, self._attribute(counter.off, routing), off)
        self._node(aten.add_.Scalar, self._attribute(counter.steps, routing), 1)

    def _only_name(self, routing: Routing, what: str) -> list[str]:
        layers = self._layers_of(routing)
        if layers.shared:
            raise PolicyError(
                f"{what} is not possible where layers share a graph (site '{layers.names(routing.site.name)[0]}'): use "
                "experts that trace, for example model.set_experts_implementation('batched_mm')"
            )
        return layers.names(routing.site.name)

    def _artifact_tensor(
        self, routing: Routing, policy: Policy, artifact: Artifact, shape: tuple[int, int], kind: str | None = None
    ) -> Node:
        layers, kind = self._layers_of(routing), kind or str(policy.kind)
        hidden_size = shape[1] if kind == "mask_router" else None
        found = [artifact.tensor(name, kind, shape[0], hidden_size) for name in layers.names(routing.site.name)]
        if not layers.shared:
            # a copy for each site: one tensor bound twice would be taken for aliased inputs
            return self._attribute(found[0].clone().to(_device(routing)), routing)
        weight = routing.router.weight
        suffix = normal_name(g.source_name(weight) or "")
        key = f"{policy.digest}/{kind}/{suffix}/{routing.site.name}"
        tables.register_table(key, tables.SiteTable.of(artifact, kind, suffix, routing.site.name, self._roots))
        return self._node(torch.ops.moe_fx.site_tensor.default, weight, key, list(shape))

    def _attribute(self, tensor: Tensor, routing: Routing) -> Node:
        """Register a tensor on the GraphModule and read it."""
        gm = self._gm
        name = f"moe_fx_{len(gm._parameters) + len(gm._buffers)}"
        if isinstance(tensor, nn.Parameter):
            gm.register_parameter(name, tensor)
        else:
            gm.register_buffer(name, tensor, persistent=False)
        if hasattr(gm, "_param_name_to_source"):
            # the inner compiler asks where each attribute comes from, to know which are the same at every call
            known: Any = gm._param_name_to_source
            gm._param_name_to_source = {**known, name: SyntheticLocalSource(name)}  # type: ignore[assignment]
        node = gm.graph.get_attr(name)
        mode = g.fake(routing.selection.ids).fake_mode
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        return node

    def _node(self, target: torch._ops.OpOverload, *args: Any) -> Node:
        return g.call(self._gm.graph, target, *args)


_WATCHED = "moe_fx_watched"


def append_outputs(gm: fx.GraphModule, nodes: list[Node]) -> None:
    """Return some more nodes from a graph that returns a tuple."""
    output = gm.graph.output_node()
    output.args = ((*output.args[0], *nodes),)  # type: ignore[misc]


def watched_outputs(gm: fx.GraphModule) -> list[tuple[BEAM, str]]:
    """Which policy, and for which site, each of a graph's last outputs is meant for.  Asked once: the note is taken off."""
    return gm.meta.pop(_WATCHED, [])


def watch_outputs(gm: fx.GraphModule, watched: list[tuple[BEAM, str]]) -> None:
    """Note that a graph's last outputs are meant for these, behind those that were noted before."""
    gm.meta[_WATCHED] = [*gm.meta.get(_WATCHED, []), *watched]


def _device(routing: Routing) -> torch.device:
    return g.fake(routing.selection.ids).device
