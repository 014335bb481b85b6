"""find_sites and reroute on hand-written layers: each form that must be rewritten, each that must not."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import layers
import moe_fx
import tiny
from layers import LEFT_ALONE, ROUTES, E, H
from moe_fx.kernels import reference
from moe_fx.passes.find_sites import find_sites
from moe_fx.passes.normalize import normalize
from moe_fx.testing import tolerance
from variants import run_each

T = 4


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def make(cls: type[layers.Layer]) -> tuple[layers.Layer, Tensor, moe_fx.Artifact]:
    layer, generator = cls().eval(), torch.Generator().manual_seed(3)
    similarity = torch.rand(E, E, generator=generator)
    site = {"similarity": (similarity + similarity.T) / 2, "mask_router": torch.randn(E, H, generator=generator)}
    return layer, torch.randn(T, H, generator=generator), moe_fx.Artifact({"": site})


def compiled(layer: torch.nn.Module, x: Tensor, policy: object, **options: Any) -> Tensor:
    with torch.no_grad():
        return torch.compile(layer, backend="moe_sparse", options={"policy": policy, "inner": "eager", **options})(x)


def decided(layer: layers.Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), tiny.sorted_topk():
        return layer.route(x)


def run(layer: layers.Layer, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.run(x, ids, weights)


def captured(layer: layers.Layer, x: Tensor, fullgraph: bool = False) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []
    with torch.no_grad():
        torch.compile(layer, backend=lambda gm, _: graphs.append(normalize(gm)) or gm.forward, fullgraph=fullgraph)(x)
    (gm,) = graphs
    return gm


@pytest.mark.parametrize("cls", ROUTES)
def test_found_with_the_right_shape(cls: type[layers.Layer]) -> None:
    layer, x, _ = make(cls)
    routings, skips = find_sites(captured(layer, x))
    assert [(r.site.num_experts, r.site.top_k, r.site.hidden_size) for r in routings] == [(E, ROUTES[cls], H)]
    assert skips == []


@pytest.mark.parametrize("cls", ROUTES)
def test_sere_is_the_definition(cls: type[layers.Layer]) -> None:
    layer, x, artifact = make(cls)
    ids, weights = decided(layer, x)
    policies = [moe_fx.SERE(artifact, primary=s, threshold=threshold) for s in (1, 2) for threshold in (0.0, 0.3)]
    results = run_each(layer, [{"policy": policy, "strict": True} for policy in policies], x)
    for policy, (got, report) in zip(policies, results, strict=True):
        moved = reference.sere_reroute(ids, artifact.sites[""]["similarity"], policy.primary, policy.threshold)
        torch.testing.assert_close(got, run(layer, x, moved, weights), **tolerance(torch.float32))
        assert report.ops_after["moe_fx.sere_reroute"] == 1
        if policy.primary == 1 and policy.threshold == 0 and ROUTES[cls] > 1:
            assert not torch.equal(moved, ids), "something must move for the test to mean anything"


class AddedAtPlaces(layers.LoopOverExperts):
    """``out[tokens] += ...`` adds one of two rows of a token, so that no token may have an expert twice."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += weights[tokens, slots, None] * expert(x[tokens])
        return out


class AddedAtQuotients(layers.LoopOverExperts):
    """Tokens come from places among all picks."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            places = (ids.flatten() == e).nonzero().squeeze(1)
            tokens = places // layers.K
            out[tokens] = out[tokens] + weights.flatten()[places].unsqueeze(1) * expert(x[tokens])
        return out


class PutAtPicks(layers.LoopOverExperts):
    """Every pick has a row of its own, which is written once."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        rows, flat = x.repeat_interleave(layers.K, dim=0), ids.flatten()
        out = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            (places,) = torch.where(flat == e)
            out[places] = expert(rows[places])
        return (out.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


class AddedWhereAny(layers.LoopOverExperts):
    """The tokens that picked an expert, each once, and a column of a matrix at them."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        gates, out = torch.zeros(x.shape[0], E).scatter(1, ids, weights), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            picked = (ids == e).any(-1)
            out[picked] += expert(x[picked]) * gates[picked, e].unsqueeze(1)
        return out


@pytest.mark.parametrize("cls", [AddedAtPlaces, AddedAtQuotients, PutAtPicks, AddedWhereAny])
def test_policies_are_the_definition_where_rows_are_written_to_places(cls: type[layers.Layer]) -> None:
    layer, x, artifact = make(cls)
    ids, weights = decided(layer, x)
    site, distinct = artifact.sites[""], cls in (AddedAtPlaces, AddedAtQuotients)
    moved = reference.sere_reroute(ids, site["similarity"], 1, 0.0)
    assert (moved[:, 0] == moved[:, 1]).any(), "a token must have an expert twice for the test to mean anything"
    masked, _ = reference.beam_mask(weights, ids, x @ site["mask_router"].T, 0.6)
    policies = [moe_fx.TopK(), moe_fx.SERE(artifact, primary=1), moe_fx.BEAM(artifact, tau=0.6)]
    results = run_each(layer, [{"policy": policy, "strict": True} for policy in policies], x)
    for (got, report), new_ids, new_weights in zip(results, (ids, moved, ids), (weights, weights, masked), strict=True):
        torch.testing.assert_close(got, run(layer, x, new_ids, new_weights), **tolerance(torch.float32))
        assert [s.top_k for s in report.sites] == [layers.K]
    (routing,), _ = find_sites(captured(layer, x, fullgraph=True))
    assert routing.distinct == distinct


@pytest.mark.parametrize("cls", [c for c in ROUTES if c is not layers.Capacity])
def test_beam_is_the_definition(cls: type[layers.Layer]) -> None:
    layer, x, artifact = make(cls)
    ids, weights = decided(layer, x)
    tau = 0.6 if ROUTES[cls] > 1 else 0.2  # so that some picks are off and some are not
    masked, masked_ids = reference.beam_mask(weights, ids, x @ artifact.sites[""]["mask_router"].T, tau)
    assert 0 < (masked_ids < 0).sum() < masked_ids.numel()
    want = run(layer, x, ids, masked)
    got = compiled(layer, x, moe_fx.BEAM(artifact, tau=tau), strict=True, fuse_experts=False)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))
    assert moe_fx.last_report().ops_after["moe_fx.fold_masked"] == 1
    assert moe_fx.last_report().sites[0].experts == "folded"


def test_beam_reads_no_expert_that_nobody_picked() -> None:
    layer, x, artifact = make(layers.SoftmaxThenTopK)
    ids, weights = decided(layer, x)
    _, masked_ids = reference.beam_mask(weights, ids, x @ artifact.sites[""]["mask_router"].T, 0.95)
    active = set(masked_ids[masked_ids >= 0].tolist())
    assert 0 < len(active) < E
    with torch.no_grad():
        for expert in set(range(E)) - active:
            layer.up[expert] = float("nan")
    got = compiled(layer, x, moe_fx.BEAM(artifact, tau=0.95))
    assert not got.isnan().any()


def test_beam_is_refused_where_off_picks_would_fill_a_capacity() -> None:
    layer, x, artifact = make(layers.Capacity)
    policy = moe_fx.BEAM(artifact, tau=0.6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer, x, policy), layer(x))
    assert "capacity" in moe_fx.last_report().skips[-1].reason
    assert moe_fx.last_report().sites == []
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict: .*capacity"):
        compiled(layer, x, policy, strict=True)


@pytest.mark.parametrize("cls", LEFT_ALONE)
def test_left_alone(cls: type[layers.Layer]) -> None:
    layer, x, artifact = make(cls)
    for policy in (moe_fx.SERE(artifact, primary=1), moe_fx.BEAM(artifact, tau=0.6)):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(compiled(layer, x, policy), layer(x), rtol=0, atol=0)
        report = moe_fx.last_report()
        assert report.sites == []
        assert report.ops_before == report.ops_after


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (layers.Sampler, "never seen to select among 6 experts"),
        (layers.ShiftedIds, "arithmetic"),
        (layers.SmallestPicks, "lowest scores"),
        (layers.NucleusRouting, r"how it selects \(sort\) is not known"),
        (layers.EveryOther, r"how it selects \(argsort\) is not known"),
        (layers.NegatedDistance, "softmax of neg of cdist"),
        (layers.GatheredTransposed, "transposed ids"),
        (layers.DropsBest, "only 2 of the 3 picks"),
        (layers.PushedDown, r"meet scores in a way that is not known \(add\)"),
        (layers.Boosted, r"meet scores in a way that is not known \(mul\)"),
        (layers.WithoutBest, r"as a mask \(masked_fill\)"),
        (layers.ChannelGroups, "never seen to select"),
        (layers.ReachTheKth, "more than K where some are equal"),
        (layers.BelowTheKth, "more than K where some are equal"),
        (layers.EqualToBest, "more than K where some are equal"),
        (layers.RowsOfTheRouter, "rows of the router's weight"),
        (layers.RankOneExperts, "none of its scores"),
        (layers.ReplacedIds, r"changed \(where\)"),
        (layers.FirstReplaced, r"changed \(where\)"),
        (layers.WrittenInOrder, "overwrite each other"),
        (layers.LargestWeight, r"only one of them is read \(max\)"),
        (layers.FirstPlace, r"only one of them is read \(argmax\)"),
        (layers.PickedOnce, r"compared \(eq\)"),
        (layers.InputTimesPicks, "input is multiplied"),
        (layers.ChunkMemory, "never seen to select"),
        (layers.SquashedOutputs, "weighed before tanh"),
        (layers.LargestOutput, "weighed before amax"),
        (layers.SquashedInTurn, "weighed before tanh"),
    ],
)
def test_what_resembles_routing_is_reported_with_its_reason(cls: type[layers.Layer], words: str) -> None:
    layer, x, _ = make(cls)
    (skip,) = moe_fx.explain(layer, x).skips
    assert re.search(words, skip.reason)


@pytest.mark.parametrize("cls", [layers.ReachTheKthUnit, layers.KWinners, layers.GroupOnly, layers.Median])
def test_what_keeps_scores_without_choosing_experts_is_no_skip(cls: type[layers.Layer]) -> None:
    layer, x, _ = make(cls)
    assert not any(s.routing for s in moe_fx.explain(layer, x).skips)


@pytest.mark.parametrize(
    "cls", [layers.NegatedDistance, layers.EveryOther, layers.ProductKeys, layers.MasksInTurn, layers.ReachTheKth,
     layers.GatheredTransposed, layers.ChosenAgain, layers.LargestWeight],
)  # fmt: skip
def test_strict_objects_to_a_router_that_cannot_be_read(cls: type[layers.Layer]) -> None:
    layer, x, artifact = make(cls)
    with pytest.raises(Exception, match="strict: .* left alone: "):
        compiled(layer, x, moe_fx.SERE(artifact), strict=True)


def test_strict_does_not_mind_a_sampler() -> None:
    """Greedy decoding."""

    class Likeliest(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    _, x, artifact = make(layers.Layer)
    compiled(Likeliest(H, E), x, moe_fx.SERE(artifact), strict=True)
    assert moe_fx.last_report().skips == []


class InputWeighted(layers.Layer):
    """The weight multiplies what goes in; experts with biases give something even for 0."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.einsum("tkh,tkhi->tki", x.unsqueeze(1) * weights.unsqueeze(-1), self.up[ids])
        return torch.einsum("tki,tkih->th", (hidden + 1).sigmoid(), self.down[ids])


class LateSoftmax(layers.Layer):
    """The weights become weights in another shape than the ids'."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().run(x, ids, weights.unsqueeze(-1).softmax(1).squeeze(-1))


class NormalisedWithSink(layers.Layer):
    """The picks' scores share one softmax with a score of an expert that always runs."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        joined = torch.cat([weights, x[:, :1]], dim=-1).softmax(-1)
        return super().run(x, ids, joined[:, : layers.K].contiguous()) + x * joined[:, layers.K :]


class NormalisedAfter(layers.Layer):
    """The experts' sum is divided by the sum of the weights."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().run(x, ids, weights) / weights.view(-1, layers.K).sum(-1, keepdim=True)


class DropsLow(layers.Layer):
    """Low weights are dropped by the model itself."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        kept = torch.where(weights >= weights.mean(-1, keepdim=True), weights, 0.0)
        return super().run(x, ids, kept / kept.sum(-1, keepdim=True))


class WeighedInside(layers.Layer):
    """The weight stands before the second layer, which gives its bias even for 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(E, H))

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.einsum("th,tkhi->tki", x, self.up[ids]).relu() * weights.unsqueeze(-1)
        return (torch.einsum("tki,tkih->tkh", hidden, self.down[ids]) + self.bias[ids]).sum(1)


class WeighedBeforeSigmoid(layers.Layer):
    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.einsum("th,tkhi->tki", x, self.up[ids]) * weights.unsqueeze(-1)
        return torch.einsum("tki,tkih->th", hidden.sigmoid(), self.down[ids])


class WeighedInsideWithoutBias(layers.Layer):
    """The weight stands before the second layer, which gives nothing for 0."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.einsum("th,tkhi->tki", x, self.up[ids]).relu() * weights.unsqueeze(-1)
        return torch.einsum("tki,tkih->th", hidden, self.down[ids])


class MatrixWeighsInput(layers.LoopOverExperts):
    """A matrix of ones at the picks takes what was not picked off the experts' input."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, ones = (torch.zeros(x.shape[0], E).scatter(1, ids, w) for w in (weights, torch.ones_like(weights)))
        return sum(gates[:, e, None] * expert(x * ones[:, e, None]) for e, expert in enumerate(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.route(x))


class BestInFull(layers.Layer):
    """The best pick counts in full, whatever its weight."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().run(x, ids, torch.cat([torch.ones_like(weights[:, :1]), weights[:, 1:]], dim=-1))


class ChangedBetween(layers.Layer):
    """The router's input is changed in place before the weights are final."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        view = x[:]
        logits = self.router(x)
        view.mul_(2)
        weights, ids = logits.softmax(-1).topk(layers.K)
        return self.run(x, ids, weights)


@pytest.mark.parametrize(
    "cls", [InputWeighted, LateSoftmax, NormalisedWithSink, NormalisedAfter, DropsLow, ChangedBetween, BestInFull,
     WeighedInside, WeighedBeforeSigmoid, MatrixWeighsInput],
)  # fmt: skip
def test_beam_keeps_away_where_a_weight_of_zero_would_not_mean_off(cls: type[layers.Layer]) -> None:
    layer, x, artifact = make(cls)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer, x, moe_fx.BEAM(artifact, tau=0.6)), layer(x))
    assert moe_fx.last_report().ops_after["moe_fx.beam_mask"] == 0
    assert any(s.routing for s in moe_fx.last_report().skips)


def test_beam_switches_off_by_a_weight_inside_the_experts_that_nothing_follows() -> None:
    layer, x, artifact = make(WeighedInsideWithoutBias)
    ids, weights = decided(layer, x)
    masked, _ = reference.beam_mask(weights, ids, x @ artifact.sites[""]["mask_router"].T, 0.6)
    assert not torch.equal(masked, weights)
    got = compiled(layer, x, moe_fx.BEAM(artifact, tau=0.6), strict=True, fuse_experts=False)
    torch.testing.assert_close(got, run(layer, x, ids, masked), **tolerance(torch.float32))


def test_sere_keeps_away_where_a_matrix_multiplies_the_input_of_experts_that_are_modules() -> None:
    layer, x, artifact = make(MatrixWeighsInput)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer, x, moe_fx.SERE(artifact, primary=1)), layer(x), rtol=0, atol=0)
    assert "two picks of one expert cannot be merged" in moe_fx.last_report().skips[-1].reason


class HeadsOfClasses(layers.LoopOverExperts):
    """A box for each of the likeliest classes, beside the class and its score: nothing is added up."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        every = torch.stack([head(x) for head in self.experts], dim=1)
        boxes = every.gather(1, ids.unsqueeze(-1).expand(-1, -1, H))
        return torch.cat([boxes, weights.unsqueeze(-1), ids.unsqueeze(-1).float()], dim=-1)


def test_heads_of_the_likeliest_classes_are_left_alone() -> None:
    layer, x, artifact = make(HeadsOfClasses)
    for policy in (moe_fx.SERE(artifact, primary=1), moe_fx.BEAM(artifact, tau=0.6)):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(compiled(layer, x, policy), layer(x), rtol=0, atol=0)
        assert "neither weighed nor added up" in moe_fx.last_report().skips[-1].reason


def test_ops_before_and_after() -> None:
    layer, x, artifact = make(layers.GatheredBiased)
    compiled(layer, x, [moe_fx.BEAM(artifact), moe_fx.SERE(artifact, primary=1)], fuse_experts=False)
    report = moe_fx.last_report()
    added = Counter(report.ops_after)
    added.subtract(report.ops_before)
    assert {op: n for op, n in added.items() if n} == {
        "moe_fx.beam_mask": 1, "moe_fx.sere_reroute": 1, "moe_fx.fold_masked": 1, "aten.linear": 1, "getitem": 4,
    }  # fmt: skip


def test_an_unsorted_selection_is_sorted_for_sere_only() -> None:
    layer, x, artifact = make(layers.TopKThenSoftmax)
    graphs: list[fx.GraphModule] = []
    for policy in (moe_fx.SERE(artifact, primary=1), moe_fx.BEAM(artifact)):
        torch._dynamo.reset()
        compiled(layer, x, policy, inner=lambda gm, _: graphs.append(gm) or gm.forward)
    orders = [n.args[4] for gm in graphs for n in gm.graph.nodes if "topk" in str(n.target)]
    assert orders == [True, False]


def test_picks_that_feed_the_weights_stay_the_routers_own() -> None:
    """A pick that moves keeps its weight: the score it is gathered by, and its per-expert scale."""
    layer, x, artifact = make(layers.PerExpertScale)
    graphs: list[fx.GraphModule] = []
    compiled(layer, x, moe_fx.SERE(artifact, primary=1), inner=lambda gm, _: graphs.append(gm) or gm.forward)
    scale_reads = [n for n in graphs[0].graph.nodes if "index.Tensor" in str(n.target) and n.meta["val"].dim() == 2]
    assert scale_reads
    for node in scale_reads:
        assert not any("sere" in i.name for i in node.all_input_nodes)


def test_two_routers_of_one_block_are_two_sites() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layers.SoftmaxThenTopK(), layers.GatheredBiased()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x + self.first(x))

    assert [s.name for s in moe_fx.explain(Twice(), torch.randn(T, H)).sites] == ["first", "second"]


def test_a_layer_in_the_root_is_named_after_the_root_however_deep_its_router() -> None:
    class Deep(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(H, H), torch.nn.Tanh(), torch.nn.Linear(H, E))

        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, ids = self.net(x).softmax(-1).topk(layers.K)
            return ids, weights

    assert [s.name for s in moe_fx.explain(Deep(), torch.randn(T, H)).sites] == [""]


class Shared(torch.nn.Module):
    """A router of its own for all layers."""

    class Router(torch.nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, ids = super().forward(x).softmax(-1).topk(layers.K)
            return ids, weights

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = layers.Layer()

        def forward(self, x: Tensor, router: torch.nn.Module) -> Tensor:
            return x + self.experts.run(x, *router(x))

    def __init__(self) -> None:
        super().__init__()
        self.router = self.Router(H, E, bias=False)
        self.layers = torch.nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.router)
        return x


def test_layers_that_share_a_router_are_sites_of_their_own() -> None:
    model, x = Shared().eval(), torch.randn(T, H)
    names = [s.name for s in moe_fx.explain(model, x).sites]
    assert len(set(names)) == 2
    assert all(f"layers.{i}" in name for i, name in enumerate(names))


class Broken(layers.Layer):
    """The graph breaks before and behind the choice, so that it stands alone."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        torch._dynamo.graph_break()
        weights, ids = scores.topk(layers.K)
        weights = weights / weights.sum(-1, keepdim=True)
        torch._dynamo.graph_break()
        return self.run(x, ids, weights)


class Words(layers.Layer):
    """The likeliest words: nothing that could be experts."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x.repeat(1, 128)
        torch._dynamo.graph_break()
        return scores.topk(layers.K).indices * 1


@pytest.mark.parametrize(("cls", "skips"), [(Broken, 1), (Words, 0)])
def test_a_choice_of_which_the_graph_tells_nothing_is_a_skip(cls: type[layers.Layer], skips: int) -> None:
    layer, x, _ = make(cls)
    with torch.no_grad():
        report = moe_fx.explain(layer, x)
    assert report.sites == []
    assert ["TORCH_LOGS=graph_breaks" in s.reason and not s.routing for s in report.skips] == [True] * skips


def test_a_number_of_picks_that_is_no_constant_is_a_skip() -> None:
    class Given(layers.Layer):
        def forward(self, x: Tensor, k: int) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(k)
            return self.run(x, ids, weights)

    layer, x, _ = make(Given)
    with torch.no_grad():
        got = torch.compile(layer, backend="moe_sparse", options={"inner": "eager"}, dynamic=True)(x, 2)
        torch.testing.assert_close(got, layer(x, 2))
    (skip,) = moe_fx.last_report().skips
    assert skip.routing
    assert "no constant of the graph" in skip.reason


def test_one_layer_run_twice_is_one_site() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layers.SoftmaxThenTopK()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.layer(x))

    module, x = Shared(), torch.randn(T, H)
    report = moe_fx.explain(module, x)
    assert [s.name for s in report.sites] == ["layer"]
    _, _, artifact = make(layers.SoftmaxThenTopK)
    both = moe_fx.Artifact({"layer": artifact.sites[""]})
    torch._dynamo.reset()
    options = {"policy": moe_fx.SERE(both, primary=1), "inner": "aot_eager"}
    with torch.no_grad():
        got = torch.compile(module, backend="moe_sparse", options=options)(x)
    assert moe_fx.last_report().ops_after["moe_fx.sere_reroute"] == 2

    def once(y: Tensor) -> Tensor:
        ids, weights = decided(module.layer, y)
        return run(module.layer, y, reference.sere_reroute(ids, both.sites["layer"]["similarity"], 1, 0.0), weights)

    torch.testing.assert_close(got, once(x + once(x)), **tolerance(torch.float32))
