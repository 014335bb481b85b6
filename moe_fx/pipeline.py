"""The whole compiler as one function of named steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import fx

from moe_fx.owner import ModuleOwner
from moe_fx.passes.bind import Binder
from moe_fx.passes.check import check
from moe_fx.passes.find_sites import Routing, find_sites
from moe_fx.passes.graph import qualified_op
from moe_fx.passes.normalize import NormalizeError, normalize
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
    """

    policies: tuple[Policy, ...] = (TopK(),)
    strict: bool = False
    stats: bool = False

    @property
    def rewrites(self) -> bool:
        """Whether anything at all is to be put into graphs."""
        return self.stats or any(not isinstance(p, TopK) for p in self.policies)


def run(gm: fx.GraphModule, settings: Settings, report: Report) -> fx.GraphModule:
    """Dynamo graph -> normalize -> find_sites -> reroute -> check.  Records what it did in ``report``.

    Returns the rewritten graph, or ``gm`` itself where nothing was rewritten.

    Raises:
        ArtifactError, PolicyError: the policy cannot be applied to a site that was found.
        UnrewrittenError: with ``strict``, a real router was left alone.
    """
    report.graphs += 1
    before = _ops(gm)
    owner = ModuleOwner(known_sites=_known_sites(settings.policies))
    try:
        with _timed(report, "normalize"):
            new = normalize(gm)
    except NormalizeError as error:
        reason = f"the graph could not be read ({error}) and was compiled as it is"
        return _untouched(gm, report, [Skip("graph", reason)] if _selects(gm) else [], before)
    before = _ops(new)
    with _timed(report, "find"):
        routings, skips = find_sites(new, owner)
        layers = {r: owner.layers(r.router.weight, r.site) for r in routings}
    if not settings.rewrites:
        report.add([s for r in routings for s in _sites(r, layers[r], settings, "untouched")], skips)
        _be_strict(settings, skips)
        return _untouched(gm, report, [], before)
    with _timed(report, "rewrite"):
        binder = Binder(new, lambda r: layers[r], owner.roots)
        rewritten, refused = _reroute_all(new, routings, settings, binder)
    with _timed(report, "check"):
        if rewritten:
            check(new, rewritten)
            new.recompile()
    _be_strict(settings, [*skips, *refused])
    experts = "folded" if any(isinstance(p, BEAM) for p in settings.policies) else "untouched"
    report.add([s for r in rewritten for s in _sites(r, layers[r], settings, experts)], [*skips, *refused])
    if not rewritten:
        return _untouched(gm, report, [], before)
    report.ops_before += before
    report.ops_after += _ops(new)
    return new


def _reroute_all(
    gm: fx.GraphModule, routings: list[Routing], settings: Settings, binder: Binder
) -> tuple[list[Routing], list[Skip]]:
    rewritten, refused = [], []
    for routing in routings:
        reason = reroute(gm, routing, settings.policies, binder, stats=settings.stats)
        if reason is None:
            rewritten.append(routing)
        else:
            refused.append(Skip(routing.site.name, reason, routing=True))
    return rewritten, refused


def _selects(gm: fx.GraphModule) -> bool:
    """Whether a graph that could not be normalised has anything that might be routing."""
    names = {n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "") for n in gm.graph.nodes}
    return bool(names & {"topk", "sort", "argsort"})


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
