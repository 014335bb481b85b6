"""The whole compiler as one function of named steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import fx

from moe_fx.owner import ModuleOwner
from moe_fx.passes.bind import Binder
from moe_fx.passes.check import check
from moe_fx.passes.find_sites import Routing, find_sites
from moe_fx.passes.fuse_experts import Experts, recognise
from moe_fx.passes.graph import fake, qualified_op
from moe_fx.passes.normalize import NormalizeError, normalize
from moe_fx.passes.region import find_region
from moe_fx.passes.reroute import reroute
from moe_fx.policy import BEAM, Policy, TopK
from moe_fx.report import Report
from moe_fx.site import Layers, Site, Skip


class UnrewrittenError(RuntimeError):
    """In strict mode: a real router could not be rewritten.  The message lists each with its reason."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        policies: applied at every site, in order.
        strict: whether a real router that cannot be rewritten is an error.
        stats: whether active experts are counted while the model runs.
        fuse: whether a recognised experts region becomes one op, which does no work for a pick that is off.  None: on
            devices where that was measured to be faster, which is the CPU so far.
    """

    policies: tuple[Policy, ...] = (TopK(),)
    strict: bool = False
    stats: bool = False
    fuse: bool | None = None

    @property
    def changes_picks(self) -> bool:
        """Whether the routing decision has to be taken off the cut even where the experts stay as they are."""
        return self.stats or any(not isinstance(p, TopK) for p in self.policies)

    @property
    def switches_off(self) -> bool:
        """Whether a policy can leave picks that are off."""
        return any(isinstance(p, BEAM) for p in self.policies)


def run(gm: fx.GraphModule, settings: Settings, report: Report) -> fx.GraphModule:
    """Dynamo graph -> normalize -> find_sites -> fuse_experts -> reroute -> check.  Records what it did in ``report``.

    Returns the rewritten graph, or ``gm`` itself where nothing was rewritten.

    Raises:
        ArtifactError, PolicyError: the policy cannot be applied to a site that was found.
        UnrewrittenError: with ``strict``, a real router was left alone.
    """
    report.graphs += 1
    if not _selects(gm):  # most graphs of a model that breaks, and all of one without experts, cost nothing more
        return _untouched(gm, report, [], _ops(gm))
    owner = ModuleOwner(known_sites=_known_sites(settings.policies))
    try:
        with _timed(report, "normalize"):
            new = normalize(gm)
    except NormalizeError as error:
        reason = f"the graph could not be read ({error}) and was compiled as it is"
        return _untouched(gm, report, [Skip("graph", reason)], _ops(gm))
    before = _ops(new)
    with _timed(report, "find"):
        routings, skips = find_sites(new, owner)
        layers = {r: owner.layers(r.router.weight, r.site) for r in routings}
    with _timed(report, "fuse"):
        experts = {r: found for r in routings if (found := _recognise(new, r, settings)) is not None}
        skips += [Skip(r.site.name, f"{e}, so they stay as they are") for r, e in experts.items() if isinstance(e, str)]
    with _timed(report, "rewrite"):
        binder = Binder(new, lambda r: layers[r], owner.roots)
        done: dict[Routing, str] = {}
        for routing in routings:
            outcome = _rewrite(new, routing, experts.get(routing), settings, binder)
            if isinstance(outcome, Skip):
                skips.append(outcome)
            else:
                done[routing] = outcome
    _be_strict(settings, skips)
    report.add([s for r in done for s in _sites(r, layers[r], settings, done[r])], skips)
    rewritten = [r for r in done if settings.changes_picks or done[r] == "fused"]
    if not rewritten:
        return _untouched(gm, report, [], before)
    with _timed(report, "check"):
        check(new, rewritten)
        new.recompile()
    report.ops_before += before
    report.ops_after += _ops(new)
    return new


def _recognise(gm: fx.GraphModule, routing: Routing, settings: Settings) -> Experts | str | None:
    """What a site's experts compute, why that could not be told, or None where they are not to be fused at all."""
    wanted = settings.fuse if settings.fuse is not None else fake(routing.selection.ids).device.type == "cpu"
    if not wanted or _needs_gradients(gm, settings) or routing.cut.dense:
        return None
    region = find_region(routing)
    return recognise(routing, region) if region is not None else None


def _needs_gradients(gm: fx.GraphModule, settings: Settings) -> bool:
    """Whether the graph will be differentiated.  It then keeps the experts' own backward, which is faster than ours."""
    if any(isinstance(p, BEAM) and p.train for p in settings.policies):
        return True
    inputs = [p.meta.get("example_value") for p in gm.graph.find_nodes(op="placeholder")]
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in inputs)


def _rewrite(
    gm: fx.GraphModule, routing: Routing, experts: Experts | str | None, settings: Settings, binder: Binder
) -> str | Skip:
    """Rewrite one site: what became of its experts, or a skip."""
    known = experts if isinstance(experts, Experts) else None
    if known is None and not settings.changes_picks:
        return "untouched"
    reason = reroute(gm, routing, settings.policies, binder, experts=known, stats=settings.stats)
    if reason is not None:
        return Skip(routing.site.name, reason, routing=True)
    return "fused" if known is not None else "folded" if settings.switches_off else "untouched"


def _selects(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one inside it, selects anything: without that there is no routing to find."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    targets = {n.target for graph in graphs for n in graph.nodes}
    return any(("topk" in name or "sort" in name) for t in targets for name in [t if isinstance(t, str) else str(t)])


def _untouched(gm: fx.GraphModule, report: Report, skips: list[Skip], before: Counter[str]) -> fx.GraphModule:
    report.add([], skips)
    report.ops_before += before
    report.ops_after += before
    return gm


def _be_strict(settings: Settings, skips: list[Skip]) -> None:
    left = [s for s in skips if s.routing]
    if settings.strict and left:
        raise UnrewrittenError("strict: " + "; ".join(f"'{s.name}' was left alone: {s.reason}" for s in left))


def _sites(routing: Routing, layers: Layers, settings: Settings, experts: str) -> list[Site]:
    """The public site of every layer that runs the graph."""
    policy = " + ".join(p.describe() for p in settings.policies)
    return [replace(routing.site, name=n, experts=experts, policy=policy) for n in layers.names(routing.site.name)]


def _known_sites(policies: tuple[Policy, ...]) -> frozenset[str]:
    artifacts = [a for p in policies if (a := getattr(p, "artifact", None)) is not None]
    return frozenset(name for a in artifacts for name in a.sites)


def _ops(gm: fx.GraphModule) -> Counter[str]:
    return Counter(qualified_op(n) for n in gm.graph.nodes if n.op == "call_function")


@contextmanager
def _timed(report: Report, step: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        report.add_seconds(step, time.perf_counter() - start)
