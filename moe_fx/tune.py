"""Choose SERE's S and threshold for each layer.

One decoding of the full model records every routing decision; what any (S, threshold) would do to a layer, how many experts
stay active and how much its output moves, is then computed from the record and the similarities without running the model.
What a movement costs in quality differs from layer to layer, and is not quite proportional to it: it is measured at a few
points of each layer, by decoding with SERE in that layer alone, and scaled from the nearest of them elsewhere.  The rest is a
choice of one point per layer with the fewest active experts for a given sum of costs, checked by decoding with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_fx.artifacts import Artifact
from moe_fx.evaluate import Decoder, Evaluation, Evaluator, Windows
from moe_fx.kernels.reference import sere_reroute
from moe_fx.policy import SERE
from moe_fx.site import normal_name

_QUANTILES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)  # of the similarities at which picks move, for thresholds
_MEASUREMENTS = 48  # of single points in all; a model of many layers gets two in each
_CHECKS = 8  # policies by layer that are measured before the best of them is taken


class TuneError(ValueError):
    """Nothing that was tried meets the limit; the message says how near it came."""


@dataclass(frozen=True)
class Point:
    """One (S, threshold) at one site: what it is predicted to do there."""

    primary: int
    threshold: float
    active: float  # mean distinct experts in a step
    movement: float  # mean over tokens of the squared movement of the output
    cost: float = 0.0  # predicted KL divergence


@dataclass
class Tuned:
    """The outcome of ``tune``.

    Attributes:
        artifact: the one given, with the settings of each site in its metadata: ``SERE(artifact)`` uses them.
        chosen: the evaluation of those settings on the tuning texts.
        best_global: that of the best single (S, threshold) within the limit, or None where none is.
        full: that of the exact model.
        tried: every evaluation made on the way.
    """

    artifact: Artifact
    chosen: Evaluation
    best_global: Evaluation | None
    full: Evaluation
    tried: list[Evaluation]


@dataclass(frozen=True)
class Limit:
    """How much quality may go: at most this KL divergence, or this relative increase of the perplexity."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.max_kl, self.max_ppl_increase) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise TuneError(f"a limit is one positive number, max_kl or max_ppl_increase, but got {self}: give one of them")

    @property
    def nats(self) -> float:
        """The limit in nats per token."""
        return self.max_kl if self.max_kl is not None else math.log1p(self.max_ppl_increase or 0.0)

    def spent(self, evaluation: Evaluation, full: Evaluation) -> float:
        """How much an evaluation takes of it, in nats per token."""
        return evaluation.kl if self.max_kl is not None else evaluation.loss_increase(full)[0]


def tune(
    model: nn.Module,
    artifact: Artifact,
    texts: Windows,
    limit: Limit,
    *,
    evaluator: Evaluator | None = None,
) -> Tuned:
    """Find S and the threshold of every site that keep within ``limit`` with the fewest active experts.

    Args:
        model: a causal language model of transformers, in eval mode.
        artifact: its similarities.
        texts: what to decode; other texts than those the result is judged on.
        limit: what quality may be lost on these texts.
        evaluator: one that has decoded ``texts`` already.

    Raises:
        TuneError: nothing that was tried keeps within the limit.
        PolicyError: the artifact has no similarities.
    """
    SERE(artifact)  # refuses one without similarities
    evaluator = evaluator or Evaluator(model, texts)
    search = _Search(evaluator, artifact, limit, record(model, texts))
    search.measure_layers()
    best_global = search.best_global()
    search.by_layer()
    within = [e for e in search.tried if search.is_within(e)]
    if not within:
        nearest = min(search.tried, key=lambda e: limit.spent(e, evaluator.full))
        raise TuneError(
            f"no setting keeps within {limit.nats:.4g} nats per token: the nearest, {nearest.name}, takes "
            f"{limit.spent(nearest, evaluator.full):.4g}; allow more, or serve the exact model"
        )
    chosen = min(within, key=lambda e: e.active_experts)
    (policy,) = chosen.policy
    assert isinstance(policy, SERE)
    metadata = dict(artifact.metadata) | {
        "tuned": {site: list(policy.at(site)) for site in artifact.sites},
        "tuned_for": {
            "batch": len(texts.groups[0]), "tokens": texts.scored, "limit_nats": limit.nats,
            "measured_by": "kl" if limit.max_kl is not None else "loss",
            "spent_nats": limit.spent(chosen, evaluator.full), "active_experts_per_layer": chosen.active_experts,
        },
    }  # fmt: skip
    return Tuned(Artifact(artifact.sites, metadata), chosen, best_global, evaluator.full, search.tried)


@dataclass
class _Search:
    evaluator: Evaluator
    artifact: Artifact
    limit: Limit
    decisions: Mapping[str, list[tuple[Tensor, Tensor]]]
    points: dict[str, list[Point]] = field(default_factory=dict)
    tried: list[Evaluation] = field(default_factory=list)
    predicted: float = 0.0  # the cost predicted for the best single (S, threshold): what choices by layer start from

    @property
    def top_k(self) -> int:
        return max(steps[0][0].shape[1] for steps in self.decisions.values())

    def is_within(self, evaluation: Evaluation) -> bool:
        return self.limit.spent(evaluation, self.evaluator.full) <= self.limit.nats

    def measure_layers(self) -> None:
        """Predict every point of every site, with costs from what decoding with some of them alone shows."""
        count = max(2, _MEASUREMENTS // len(self.decisions))
        for site, steps in self.decisions.items():
            distances = squared_distances(self.artifact, site)
            points = list(predict(steps, self.artifact.sites[site]["similarity"], distances))
            measured = [self._alone(site, point) for point in spaced(front([p for p in points if p.movement > 0]), count)]
            self.points[site] = [_priced(point, measured) for point in points]

    def _alone(self, site: str, point: Point) -> Point:
        """A point with the KL divergence of SERE at that point of one site, and the exact model elsewhere."""
        policy = SERE(self.artifact, primary=self.top_k, layers=((site, point.primary, point.threshold),))
        kl = self.evaluator.evaluate(f"{site} alone, S={point.primary}, threshold {point.threshold:g}", policy).kl
        return replace(point, cost=max(kl, 0.0))

    def best_global(self) -> Evaluation | None:
        """The best single (S, threshold), of those predicted to come near the limit."""
        thresholds = sorted({round(p.threshold, 3) for points in self.points.values() for p in points})
        ranked = []
        for primary in range(1, self.top_k):
            for threshold in thresholds:
                nearest = [_nearest(points, primary, threshold) for points in self.points.values()]
                ranked.append((sum(p.active for p in nearest), sum(p.cost for p in nearest), primary, threshold))
        best = [r for r in ranked if not any(o[0] < r[0] and o[1] < r[1] for o in ranked)]
        best.sort(key=lambda r: abs(math.log(max(r[1], 1e-9) / self.limit.nats)))
        found = [self._measure(f"S={r[2]}, threshold {r[3]:g}", SERE(self.artifact, primary=r[2], threshold=r[3]))
                 for r in best[:_CHECKS]]  # fmt: skip
        within = [(e, r[1]) for e, r in zip(found, best, strict=False) if self.is_within(e)]
        chosen, self.predicted = min(within, key=lambda pair: pair[0].active_experts, default=(None, self.limit.nats))
        return chosen

    def by_layer(self) -> None:
        """Settings by layer: the prediction's scale is corrected by each measurement until the limit is met closely."""
        low, high = 0.0, math.inf  # predicted costs known to keep within the limit, and to exceed it
        budget = max(self.predicted, 1e-9)
        for _ in range(_CHECKS):
            policy = self._policy(budget)
            evaluation = self._measure(f"by layer, predicted {budget:.4g}", policy)
            spent = self.limit.spent(evaluation, self.evaluator.full)
            if spent <= self.limit.nats:
                low = max(low, budget)
            else:
                high = min(high, budget)
            if high < low * 1.02:
                break
            guess = budget * min(4.0, max(0.25, self.limit.nats / max(spent, 1e-9)))
            if not low * 1.01 < guess < high * 0.99:
                guess = low * 2 if high == math.inf else math.sqrt(max(low, high / 16) * high)
            budget = guess

    def _policy(self, budget: float) -> SERE:
        chosen = cheapest(self.points, budget)
        return SERE(self.artifact, primary=self.top_k, layers=tuple((s, p.primary, p.threshold) for s, p in chosen.items()))

    def _measure(self, name: str, policy: SERE) -> Evaluation:
        known = next((e for e in self.tried if e.policy == (policy,)), None)
        if known is None:
            known = self.evaluator.evaluate(name, policy)
            self.tried.append(known)
        return known


def squared_distances(artifact: Artifact, site: str) -> Tensor:
    """How far two experts' outputs are apart, as mean square over tokens [E, E]; for other metrics than Frobenius, only
    up to a factor."""
    similarity = artifact.sites[site]["similarity"]
    if artifact.metadata.get("metric", "frobenius") == "frobenius":
        scales = artifact.metadata.get("distance_scale")
        scale = scales.get(site, 1.0) if isinstance(scales, Mapping) else 1.0
        return ((1 - similarity) * scale).square()
    return 1 - similarity


def predict(steps: Sequence[tuple[Tensor, Tensor]], similarity: Tensor, distances: Tensor) -> Iterator[Point]:
    """What every (S, threshold) worth trying does at a site, from its recorded decisions (ids and weights [N, K])."""
    top_k = steps[0][0].shape[1]
    experts = len(similarity)
    for primary in range(1, top_k):
        moved = torch.cat([_moved(ids, sere_reroute(ids, similarity, primary, 0.0), similarity) for ids, _ in steps])
        cuts = torch.quantile(moved, torch.tensor(_QUANTILES)).tolist() if len(moved) else []
        for threshold in dict.fromkeys([0.0, *(round(c, 4) for c in cuts if c > 0)]):
            active, movement, tokens = 0, 0.0, 0
            for ids, weights in steps:
                new = sere_reroute(ids, similarity, primary, threshold)
                active += int(new[(new >= 0) & (new < experts)].unique().numel())
                safe_old, safe_new = ids.clamp(0, experts - 1), new.clamp(0, experts - 1)
                movement += float((weights.double().square() * distances[safe_old, safe_new] * (new != ids)).sum())
                tokens += len(ids)
            yield Point(primary, threshold, active / len(steps), movement / tokens)
    exact = sum(int(ids[(ids >= 0) & (ids < experts)].unique().numel()) for ids, _ in steps)
    yield Point(top_k, 0.0, exact / len(steps), 0.0)


def _moved(ids: Tensor, new: Tensor, similarity: Tensor) -> Tensor:
    """The similarities at which picks move."""
    moves = new != ids
    return similarity[ids[moves].long(), new[moves].long()]


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both active experts and movement, by active experts."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.active, p.movement)):
        if not best or point.movement < best[-1].movement:
            best.append(point)
    return best


def spaced(points: Sequence[Point], count: int) -> list[Point]:
    """At most ``count`` of the points, the first and the last among them, evenly along the list."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _priced(point: Point, measured: Sequence[Point]) -> Point:
    """With its cost, measured or in proportion to the movement of the measured point that moves most nearly as much."""
    if point.movement == 0 or not measured:
        return replace(point, cost=0.0)
    near = min(measured, key=lambda m: (abs(math.log(m.movement / point.movement)), m.primary != point.primary))
    return replace(point, cost=near.cost * point.movement / near.movement)


def _nearest(points: Sequence[Point], primary: int, threshold: float) -> Point:
    return min((p for p in points if p.primary == primary), key=lambda p: abs(p.threshold - threshold))


def cheapest(points: Mapping[str, Sequence[Point]], budget: float) -> dict[str, Point]:
    """One point per site with the fewest active experts in all whose costs sum to at most ``budget``.

    By Lagrange's method: at a price per nat each site chooses for itself; the price is bisected.  What the last step leaves
    of the budget is then spent where it saves most.
    """

    def choice(price: float) -> dict[str, Point]:
        return {site: min(options, key=lambda p: (p.active + price * p.cost, p.cost)) for site, options in points.items()}

    def total(chosen: Mapping[str, Point]) -> float:
        return sum(p.cost for p in chosen.values())

    low, high = 0.0, 1e12
    if total(choice(low)) <= budget:
        return choice(low)
    for _ in range(80):
        middle = math.sqrt(max(low, 1e-6) * high)
        low, high = (low, middle) if total(choice(middle)) <= budget else (middle, high)
    chosen = choice(high)
    while True:
        left = budget - total(chosen)
        moves = [(site, p) for site, options in points.items() for p in options
                 if p.active < chosen[site].active and p.cost - chosen[site].cost <= left]  # fmt: skip
        if not moves:
            return chosen
        site, point = max(moves, key=lambda m: chosen[m[0]].active - m[1].active)
        chosen[site] = point


def record(model: nn.Module, texts: Windows) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Every site's routing decisions (ids and weights [N, K], on the CPU) while the exact model decodes ``texts``."""
    decisions: dict[str, list[tuple[Tensor, Tensor]]] = {}
    decoder = Decoder(model, *texts.groups[0].shape, backend=_recording(decisions))
    decisions.clear()
    for group in texts.groups:
        for _ in decoder.decode(group):
            pass
    return decisions


def _recording(decisions: dict[str, list[tuple[Tensor, Tensor]]]) -> Callable[..., Any]:
    """A torch.compile backend that runs the graph as it is and keeps its routing decisions."""

    def compile_graph(gm: fx.GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
        from moe_fx.owner import ModuleOwner
        from moe_fx.passes.find_sites import find_sites
        from moe_fx.passes.normalize import normalize
        from moe_fx.passes.reroute import sort_selection

        new = normalize(gm)
        owner = ModuleOwner()
        for routing in find_sites(new, owner)[0]:
            layers = owner.layers(routing.router.weight, routing.site)
            if layers.shared:
                raise TuneError(
                    f"the layers of site '{routing.site.name}' share one graph, so that they cannot be tuned one by one: use "
                    "experts that trace, for example model.set_experts_implementation('grouped_mm')"
                )
            name = normal_name(layers.names(routing.site.name)[0])
            sort_selection(routing)
            carriers = [e.node for e in (*routing.cut.weights, *routing.cut.dense)]
            nodes = [routing.selection.ids, *carriers[:1]]

            def observe(ids: Tensor, weights: Tensor | None = None, *, name: str = name) -> None:
                ids = ids.reshape(-1, ids.shape[-1])
                if weights is None:
                    weights = torch.full(ids.shape, 1 / ids.shape[1], device=ids.device)
                weights = weights.reshape(-1, weights.shape[-1])
                weights = weights if weights.shape == ids.shape else weights.gather(1, ids.long())
                decisions.setdefault(name, []).append((ids.cpu().clone(), weights.float().cpu().clone()))

            with new.graph.inserting_after(max(nodes)):
                new.graph.call_function(observe, tuple(nodes))
        new.recompile()
        return new.forward

    return compile_graph
