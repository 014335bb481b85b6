"""Tuning: the prediction against the reference, the choice against all choices, and the whole on a tiny model."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor

import moe_fx
import tiny
from moe_fx.evaluate import Evaluator, windows
from moe_fx.kernels import reference
from moe_fx.testing import random_routing, random_similarity
from moe_fx.tune import Limit, Point, TuneError, cheapest, front, predict, record, spaced, tune


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


def documents(count: int = 5, length: int = 20) -> list[Tensor]:
    return [tiny.tokens(1, length, seed=i)["input_ids"][0] for i in range(count)]


def test_predictions_are_what_sere_does() -> None:
    steps = [tuple(reversed(random_routing(4, 3, 8, seed))) for seed in range(5)]
    similarity, distances = random_similarity(8).abs(), torch.rand(8, 8)
    points = list(predict(steps, similarity, distances))
    assert {p.primary for p in points} == {1, 2, 3}
    assert len(points) > 6
    for point in points:
        moved = [reference.sere_reroute(ids, similarity, point.primary, point.threshold) for ids, _ in steps]
        assert point.active == pytest.approx(sum(len(ids.unique()) for ids in moved) / len(moved))
        movement = sum(
            float(w) ** 2 * float(distances[u, v])
            for new, (ids, weights) in zip(moved, steps, strict=True)
            for v, u, w in zip(new.flatten(), ids.flatten(), weights.flatten(), strict=True) if u != v
        )  # fmt: skip
        assert point.movement == pytest.approx(movement / 20, rel=1e-5, abs=1e-9)
    exact = points[-1]
    assert (exact.primary, exact.movement) == (3, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_keeps_to_the_budget_and_is_nearly_the_best(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = {
        site: [
            Point(s, 0.0, 10 * active, 0.0, cost * (s < 6))
            for s, (active, cost) in enumerate(torch.rand(6, 2, generator=generator).tolist(), start=1)
        ]
        for site in "abc"
    }  # fmt: skip
    for budget in (0.0, 0.2, 0.8, 5.0):
        chosen = cheapest(points, budget)
        assert sum(p.cost for p in chosen.values()) <= budget
        best = min(sum(p.active for p in c) for c in itertools.product(*points.values()) if sum(p.cost for p in c) <= budget)
        assert best <= sum(p.active for p in chosen.values()) <= best + 5  # at most about half a site's range is lost


def test_points_to_measure_lie_on_the_front_from_end_to_end() -> None:
    points = [Point(1, t / 10, float(a), float(m)) for t, (a, m) in enumerate([(1, 9), (2, 5), (2, 7), (3, 6), (4, 4), (5, 1)])]
    best = front(points)
    assert [(p.active, p.movement) for p in best] == [(1, 9), (2, 5), (4, 4), (5, 1)]
    assert spaced(best, 2) == [best[0], best[3]]
    assert spaced(best, 9) == best


def test_recorded_decisions_are_the_models_own() -> None:
    model, texts = tiny.build("deepseek_v3"), windows(documents(), 3, 4, 4, 1)
    decisions = record(model, texts)
    assert list(decisions) == list(tiny.ARCHS["deepseek_v3"].sites)
    with tiny.patched(model, "deepseek_v3", lambda site, hidden, ids, weights: (ids, weights)) as seen, torch.no_grad():
        model(input_ids=texts.groups[0][:, :1])
    for site, steps in decisions.items():
        assert len(steps) == 4
        assert torch.equal(steps[0][0], seen[site][0])


def test_tuned_settings_keep_the_limit_go_into_the_artifact_and_beat_the_best_global(tmp_path) -> None:
    model, texts = tiny.build("qwen3_moe"), windows(documents(), 4, 6, 6, 1)
    artifact = moe_fx.calibrate(model, [tiny.tokens(4, 16)])
    evaluator = Evaluator(model, texts)
    worst = evaluator.evaluate("worst", moe_fx.SERE(artifact, primary=1)).kl
    limit = Limit(max_kl=worst / 2)
    with mock.patch.multiple("moe_fx.tune", _CHECKS=2, _MEASUREMENTS=3):
        tuned = tune(model, artifact, texts, limit, evaluator=evaluator)
    assert tuned.chosen.kl <= limit.nats
    assert tuned.best_global is None or tuned.chosen.active_experts <= tuned.best_global.active_experts
    policy = moe_fx.SERE(tuned.artifact.save(tmp_path / "a"))
    assert {site for site, _, _ in policy.layers} == set(artifact.sites)
    again = evaluator.evaluate("from the file", policy)
    assert again.active_experts == tuned.chosen.active_experts
    assert again.kl == pytest.approx(tuned.chosen.kl, rel=1e-4)
    assert tuned.artifact == artifact  # the tables are untouched


def test_policies_tuned_by_layer() -> None:
    artifact = tiny.random_artifact("qwen3_moe")
    site = artifact.sites and next(iter(artifact.sites))
    tuned = moe_fx.Artifact(artifact.sites, {"tuned": {site: [3, 0.5]}})
    policy = moe_fx.SERE(tuned)
    assert policy.at(site) == (3, 0.5)
    assert policy.at(f"_orig_mod.{site}") == (3, 0.5)
    assert policy.at("elsewhere") == (2, 0.0)
    assert policy.describe() == "SERE(tuned for 1 sites)"
    assert moe_fx.SERE(tuned, primary=2).layers == ()
    without = moe_fx.Artifact({name: tables for name, tables in artifact.sites.items() if name != site}, tuned.metadata)
    assert moe_fx.SERE(without).layers == ()
    assert moe_fx.SERE(tuned, threshold=0.0).at(site) == (2, 0.0)
    assert policy != moe_fx.SERE(artifact)
    assert policy.digest != moe_fx.SERE(artifact).digest
    for bad in ([[site, 0, 0.5]], [[site, 1, 2.0]], [[site, 1]], site):
        with pytest.raises(moe_fx.PolicyError, match="SERE's"):
            moe_fx.SERE(artifact, layers=bad)
    with pytest.raises(moe_fx.PolicyError, match=rf"settings for '{site}.experts', but .* \(did you mean '{site}'\?\)"):
        moe_fx.SERE(artifact, layers=[[f"{site}.experts", 1, 0.5]])


def test_layers_that_share_a_graph_cannot_differ() -> None:
    model, artifact = tiny.build("qwen3_moe", "eager"), tiny.random_artifact("qwen3_moe")
    layers = tuple((site, 1 + i, 0.0) for i, site in enumerate(artifact.sites))
    options = {"policy": moe_fx.SERE(artifact, layers=layers), "inner": "eager"}
    compiled = torch.compile(model, backend="moe_sparse", options=options)
    words = "tuned by site, but 2 layers share one graph"
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=words), torch.no_grad():
        compiled(**tiny.tokens())


def test_a_limit_that_nothing_keeps() -> None:
    model, texts = tiny.build("qwen3_moe"), windows(documents(), 2, 3, 3, 1)
    with (
        mock.patch.object(Limit, "spent", return_value=1.0),
        mock.patch.multiple("moe_fx.tune", _CHECKS=1, _MEASUREMENTS=2),
        pytest.raises(TuneError, match=r"no setting keeps within 0\.5 nats per token: the nearest, .*, takes 1"),
    ):
        tune(model, tiny.random_artifact("qwen3_moe"), texts, Limit(max_kl=0.5))
    for wrong in ({}, {"max_kl": 0.0}, {"max_kl": 0.1, "max_ppl_increase": 0.1}):
        with pytest.raises(TuneError, match="a limit is one positive number"):
            Limit(**wrong)
