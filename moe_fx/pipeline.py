"""The whole compiler as one function of named steps."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import fx

from moe_fx.owner import ModuleOwner, SiteOwner, uncompiled_routers
from moe_fx.passes.bind import Binder
from moe_fx.passes.bodies import checkpointed_bodies, put_back, sites_in_bodies
from moe_fx.passes.check import check
from moe_fx.passes.find_sites import Routing, find_sites
from moe_fx.passes.fuse_experts import recognise, runs_our_op
from moe_fx.passes.fuse_routing import fuse_routing
from moe_fx.passes.graph import fake, qualified_op
from moe_fx.passes.inline_experts import inline_experts
from moe_fx.passes.mlp import Experts
from moe_fx.passes.normalize import NormalizeError, normalize
from moe_fx.passes.region import find_region
from moe_fx.passes.reroute import reroute
from moe_fx.passes.selection import selects
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
        fuse_routing: whether a selection and the policy behind it become one op, where gradients are not needed.  None:
            on CUDA devices, where every launch counts.
        inline: whether the inner compiler fuses the lookup of weights into products, as Inductor does: then the experts of
            few tokens need no op.
    """

    policies: tuple[Policy, ...] = (TopK(),)
    strict: bool = False
    stats: bool = False
    fuse: bool | None = None
    fuse_routing: bool | None = None
    inline: bool = False

    @property
    def changes_picks(self) -> bool:
        """Whether the routing decision has to be taken off the cut even where the experts stay as they are."""
        return self.stats or any(not isinstance(p, TopK) for p in self.policies)

    @property
    def switches_off(self) -> bool:
        """Whether a policy can leave picks that are off."""
        return any(p.switches_off for p in self.policies)


def run(gm: fx.GraphModule, settings: Settings, report: Report) -> fx.GraphModule:
    """Dynamo graph -> normalize -> find_sites -> fuse_experts -> reroute -> check -> fuse_routing -> inline_experts.

    Records what it did in ``report``.

    Returns the rewritten graph, or ``gm`` itself where nothing was rewritten.  Where a policy trains, the graph returns more
    than before: ``passes.bind.watched_outputs`` tells what its last outputs are.

    Raises:
        ArtifactError, PolicyError: the policy cannot be applied to a site that was found.
        UnrewrittenError: with ``strict``, a real router was left alone.
    """
    report.graphs += 1
    rewritten = False
    for name, body in checkpointed_bodies(gm):
        new = _rewrite_graph(body, settings, report)
        rewritten = rewritten or new is not body
        put_back(gm, name, new)
    result = gm if rewritten and not selects(gm, inside=False) else _rewrite_graph(gm, settings, report)
    unseen = [Skip(name, UNCOMPILED, routing=True) for name in uncompiled_routers() if not report.mentions(name)]
    _be_strict(settings, unseen)
    report.add([], unseen)
    return result


def _rewrite_graph(gm: fx.GraphModule, settings: Settings, report: Report) -> fx.GraphModule:
    if not selects(gm):  # most graphs of a model that breaks, and all of one without experts, cost nothing more
        return _untouched(gm, report, [], _ops(gm))
    owner = ModuleOwner(known_sites=_known_sites(settings.policies))
    try:
        with _timed(report, "normalize"):
            new = normalize(gm)
    except NormalizeError as error:
        reason = f"the graph could not be read ({error}) and was compiled as it is"
        return _untouched(gm, report, [Skip("graph", reason)], _ops(gm))
    return new if rewrite(new, owner, settings, report) else gm


def rewrite(gm: fx.GraphModule, owner: SiteOwner, settings: Settings, report: Report) -> bool:
    """All steps after the first, on a graph of ATen ops, in place.  Returns whether anything was changed."""
    before = _ops(gm)
    with _timed(report, "find"):
        routings, skips = find_sites(gm, owner)
        skips += sites_in_bodies(gm)
        layers = {r: owner.layers(r.router.weight, r.site) for r in routings}
    with _timed(report, "fuse"):
        experts = {r: found for r in routings if (found := _recognise(gm, r, settings)) is not None}
        skips += [Skip(r.site.name, f"{e}, so they stay as they are") for r, e in experts.items() if isinstance(e, str)]
    with _timed(report, "rewrite"):
        binder = Binder(gm, lambda r: layers[r], owner.roots)
        done: dict[Routing, str] = {}
        for routing in routings:
            outcome = _rewrite(gm, routing, experts.get(routing), settings, binder)
            if isinstance(outcome, Skip):
                skips.append(outcome)
            else:
                done[routing] = outcome
    _be_strict(settings, skips)
    report.add([s for r in done for s in _sites(r, layers[r], settings, done[r])], skips)
    rewritten = [r for r in done if settings.changes_picks or done[r] == "fused"]
    binder.add_outputs()
    report.ops_before += before
    if rewritten:
        with _timed(report, "check"):
            check(gm, rewritten, exact=all(isinstance(p, TopK) for p in settings.policies))
        with _timed(report, "rewrite"):
            if _fuses_routing(gm, rewritten, settings):
                fuse_routing(gm)
            if settings.inline and not settings.changes_picks:
                inline_experts(gm)
            gm.recompile()
    report.ops_after += _ops(gm) if rewritten else before
    return bool(rewritten)


def _recognise(gm: fx.GraphModule, routing: Routing, settings: Settings) -> Experts | str | None:
    """What a site's experts compute, why that could not be told, or None where they are not to be fused at all."""
    wanted = settings.fuse if settings.fuse is not None else fake(routing.selection.ids).device.type == "cpu"
    if (not wanted or _needs_gradients(gm, settings)) and not runs_our_op(routing):
        return None
    region = find_region(routing)
    if region is not None:
        found = recognise(routing, region)
        on_cpu = fake(routing.selection.ids).device.type == "cpu"
        return _SEPARATE if isinstance(found, Experts) and found.separate and not on_cpu else found
    return "its experts' outputs never come together as one vector per token" if routing.experts is not None else None


UNCOMPILED = (
    "Dynamo gave up the code that selects its experts, as it does where a graph breaks inside a loop: it runs uncompiled, and "
    "whatever it routes was left alone (torch._dynamo.config.capture_dynamic_output_shape_ops = True captures loops over experts "
    "that look for their tokens; torch.compile(..., fullgraph=True) shows what else stands in the way)"
)
_SEPARATE = (
    "its experts keep their weights apart, which are read so on CPUs only (store them as w_gate_up [E, 2 I, H] and w_down "
    "[E, H, I] to have them fused)"
)


def _fuses_routing(gm: fx.GraphModule, rewritten: list[Routing], settings: Settings) -> bool:
    wanted = settings.fuse_routing
    if wanted is None:
        wanted = any(fake(r.router.hidden).device.type == "cuda" for r in rewritten)
    return wanted and not _needs_gradients(gm, settings)


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


def _untouched(gm: fx.GraphModule, report: Report, skips: list[Skip], before: Counter[str]) -> fx.GraphModule:
    report.add([], skips)
    report.ops_before += before
    report.ops_after += before
    return gm


def _be_strict(settings: Settings, skips: list[Skip]) -> None:
    """An error where routers were left alone, or, if not strict, a warning where a policy was to change their picks."""
    left: dict[str, list[str]] = {}
    for skip in skips:
        if skip.routing:
            left.setdefault(skip.reason, []).append(skip.name)
    more = {why: f" and {len(names) - 1} more" if len(names) > 1 else "" for why, names in left.items()}
    told = "; ".join(f"'{names[0]}'{more[why]} left alone: {why}" for why, names in left.items())
    if settings.strict and left:
        raise UnrewrittenError(f"strict: {told}")
    if left and any(not isinstance(p, TopK) for p in settings.policies):
        warnings.warn(f"moe_sparse could not apply {', '.join(p.describe() for p in settings.policies)}: {told}", stacklevel=2)


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
