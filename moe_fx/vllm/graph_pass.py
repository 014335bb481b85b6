"""The pass inside vLLM's compiler: it puts a layer's policies on every routing decision of a post-grad graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node
from vllm.compilation.passes.inductor_pass import CallableInductorPass, InductorPass
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from moe_fx.passes import graph as g
from moe_fx.passes.find_sites import Routing, find_sites
from moe_fx.passes.reroute import Decision, reroute
from moe_fx.passes.router import SCORE_WISE
from moe_fx.policy import Policy
from moe_fx.site import Skip
from moe_fx.vllm import ops
from moe_fx.vllm.names import block_name

# one of vLLM's own loggers, so that its level and format apply
logger = init_logger("vllm.moe_fx")


class RoutingPass(InductorPass):
    """Rewrites routing in the open and in the opaque form; any pass that was there before runs first.

    Args:
        digest: of all that the rewritten graph depends on.
        policies: their settings, without artifacts: those are looked up while the graph runs.
        before: a pass of the user's, or a plain function, as Inductor takes it.
    """

    def __init__(self, digest: str, policies: tuple[Policy, ...], before: Any = None) -> None:
        self.digest = digest
        self.policies = policies
        self.before = before if before is None or hasattr(before, "uuid") else CallableInductorPass(before)
        self._runs_before = True

    def uuid(self) -> str | None:
        """Under which Inductor and vLLM cache what was compiled with this pass; None, not at all, where ``before`` has none."""
        before = "" if self.before is None else self.before.uuid()
        return None if before is None else self.hash_dict({"moe_fx": self.digest, "before": str(before)})

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """Always; remembers whether ``before`` is."""
        asked = getattr(self.before, "is_applicable_for_range", None)
        self._runs_before = asked is None or asked(compile_range)
        return True

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        if self.before is not None and self._runs_before:
            self.before(graph)
        opaque = [n for n in graph.nodes if n.op == "call_function" and ops.with_policy(g.called(n)) is not None]
        if any(p.switches_off for p in self.policies):
            opaque = [n for n in opaque if _is_given_routers_input(n)]
        for node in opaque:
            call_instead(node, ops.with_policy(g.called(node)))
        rewritten = self._rewrite_open(graph)
        if opaque or rewritten:
            graph.lint()
            policy = " + ".join(p.describe() for p in self.policies)
            shared = f" and {len(opaque)} calls of vLLM's MoE op" if opaque else ""
            sparse = sum(n.op == "call_function" and g.called(n) in ops.SPARSE.values() for n in graph.nodes)
            skipping = f"; {sparse} experts kernels leave out what is off" if sparse else ""
            logger.info("moe_fx: %s on %d routing sites%s of a compiled graph%s", policy, len(rewritten), shared, skipping)

    def _rewrite_open(self, graph: fx.Graph) -> list[str]:
        """Put ``route_layer`` on every cut; the engine's names of the layers."""
        layers = _layers()
        if not layers:
            return []
        routings, skips = find_sites(graph.owning_module)
        done = []
        for routing in routings:
            name = _layer_of(routing, layers)
            if name is None:
                skips.append(Skip(routing.site.name, f"it is not one of the engine's {len(layers)} MoE layers", routing=True))
            elif hasattr(layers[name], ops.ATTRIBUTE):  # a draft model's layers have none
                reason = self._rewrite(graph, routing, name)
                done += [name] if reason is None else []
                skips += [Skip(routing.site.name, reason, routing=True)] if reason is not None else []
        for skip in skips:
            if skip.routing:
                logger.warning("moe_fx left %s alone: %s", skip.name, skip.reason)
        return done

    def _rewrite(self, graph: fx.Graph, routing: Routing, layer: str) -> str | None:
        def apply(graph: fx.Graph, decision: Decision) -> Decision:
            if not decision.weights:
                ids = g.call(graph, torch.ops.moe_fx.route_layer_ids.default, decision.ids, layer)
                return Decision(ids, ())
            (weights,) = decision.weights
            args = (weights, decision.ids, routing.router.hidden, layer)
            new_weights, new_ids = g.call_pair(graph, torch.ops.moe_fx.route_layer.default, *args)
            return Decision(new_ids, (new_weights,))

        if any(p.switches_off for p in self.policies) and len({e.node for e in routing.cut.weights}) != 1:
            return "its weights leave the router in several forms"
        no_tensors: Any = None  # they are looked up while the graph runs
        experts = routing.experts
        reason = reroute(graph.owning_module, routing, self.policies, no_tensors, apply=apply)
        if reason is None and experts is not None and any(p.switches_off for p in self.policies):
            call_instead(experts, ops.SPARSE.get(g.called(experts)))
        return reason


def _is_given_routers_input(node: Node) -> bool:
    """Whether the hidden states that one of vLLM's MoE ops is given are those that its router reads, as BEAM's mask routers do.

    Gemma 4's are not: its router and its experts each have a norm of their own.  Without proof the op is left alone.
    """
    hidden, logits = (_bare(g.argument(node, name, i)) for i, name in enumerate(("hidden_states", "router_logits")))
    stack, seen = [logits], set()
    while stack:
        scores = stack.pop()
        if scores is hidden:
            return True  # the router's linear map is applied inside the op
        if scores in seen or not isinstance(scores, Node):
            continue
        seen.add(scores)
        inputs = [_bare(i) for i in scores.all_input_nodes]
        if g.op(scores) in SCORE_WISE:
            stack += inputs
        elif hidden in inputs:
            return True
    logger.warning("moe_fx left a call of vLLM's MoE op alone: its router does not read the hidden states that its experts read")
    return False


def _bare(node: object) -> object:
    """The node whose numbers these are in another shape, another dtype, or wider."""
    while g.op(node) in g.RESHAPES | g.CASTS | {"constant_pad_nd"}:
        node = node.args[0]  # type: ignore[attr-defined]
    return node


def call_instead(node: Node, ours: Any) -> None:
    """Have a call of one of vLLM's ops call ours, which has the same schema; None leaves it."""
    if ours is None:
        return
    if g.called(node) is node.target:
        node.target = ours
    else:
        node.args = (ours, *node.args[1:])


def _layers() -> dict[str, Any]:
    """The engine's MoE layers, by name.

    A model is compiled by its first forward, so there is a context.  What is compiled without one, as an encoder of images may
    be, has none of them.
    """
    layers = get_forward_context().no_compile_layers if is_forward_context_available() else {}
    return {name: layer for name, layer in layers.items() if isinstance(layer, MoERunner)}


def _layer_of(routing: Routing, layers: Iterable[str]) -> str | None:
    """The engine's layer whose routing this is: the compiled module's paths are the ends of the engine's names.

    None where several layers may be meant, as with a draft model beside the model.
    """
    site = block_name(routing.site.name)
    found = [layer for layer in layers if f".{block_name(layer)}".endswith(f".{site}")]
    return found[0] if len(found) == 1 else None
