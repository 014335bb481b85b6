"""calibrate against a brute-force measurement on the module itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layers
import moe_fx
import tiny
from moe_fx import similarity
from moe_fx.calibrate import CalibrationError
from moe_fx.passes.normalize import NormalizeError


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def brute_force(outputs: Tensor) -> Tensor:
    """Similarity from every expert's outputs [E, tokens, H], pair by pair."""
    flat = outputs.double().flatten(1)
    distances = torch.stack([torch.stack([(a - b).norm() for b in flat]) for a in flat])
    return (1 - distances / distances.max()).fill_diagonal_(1).float()


def every_expert(model: nn.Module, site: str, batches: list[dict[str, Any]]) -> Tensor:
    """Outputs [E, tokens, H] of a transformers experts module, on what its router's block really feeds it."""
    experts = model.get_submodule(site).experts
    fed: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: fed.append(args))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        handle.remove()
        first = torch.zeros(1, tiny.TOP_K)
        first[0, 0] = 1
        return torch.stack([
            torch.cat([experts(h, torch.full_like(ids, e), first.expand(len(ids), -1).to(w)) for h, ids, w in fed])
            for e in range(tiny.EXPERTS)
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "experts"),
    [("qwen3_moe", "grouped_mm"), ("qwen3_moe", "batched_mm"), ("gpt_oss", "batched_mm"), ("deepseek_v3", "grouped_mm"),
     ("granitemoe", "grouped_mm")],
)  # fmt: skip
def test_equals_brute_force(name: str, experts: str) -> None:
    model, batches = tiny.build(name, experts), [tiny.tokens(2, 9), tiny.tokens(3, 4, seed=1)]
    artifact = moe_fx.calibrate(model, batches)
    assert list(artifact.sites) == list(tiny.ARCHS[name].sites)
    for site in artifact.sites:
        want = brute_force(every_expert(model, site, batches))
        torch.testing.assert_close(artifact.sites[site]["similarity"], want, rtol=1e-5, atol=1e-6)
    assert artifact.metadata["calibration"] == {"batches": 2, "tokens": 30}
    assert artifact.validate(model) is artifact


# With sizes that Dynamo has made symbols, what they do to their weights or tokens cannot be followed.
ONE_SHAPE_ONLY = layers.ChannelsFirst, layers.MatrixByColumns, layers.PutAtPlaces, layers.NormalisedFlat


@pytest.mark.parametrize("cls", [c for c in layers.ROUTES if c not in (layers.Capacity, layers.CountedGroups)])
def test_any_layer_that_is_detected(cls: type[layers.Layer]) -> None:
    layer, x = cls().eval(), torch.randn(12, layers.H)
    sizes = [6, 6] if cls in ONE_SHAPE_ONLY else [4, 8]
    artifact = moe_fx.calibrate(nn.Sequential(layer), [(part,) for part in x.split(sizes)])
    one = torch.ones(12, 1)
    with torch.no_grad():
        outputs = torch.stack([layer.run(x, torch.full((12, 1), e), one) for e in range(layers.E)])
    torch.testing.assert_close(artifact.sites["0"]["similarity"], brute_force(outputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", ONE_SHAPE_ONLY)
def test_a_site_that_is_lost_with_another_shape_is_an_error(cls: type[layers.Layer]) -> None:
    with pytest.raises(CalibrationError, match="one shape|never come together"):
        moe_fx.calibrate(nn.Sequential(cls().eval()), list(torch.randn(10, layers.H).split([4, 6])))


class SinglePick(layers.BestOnly):
    """The weight is never given an axis for the one pick."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).max(-1)
        hidden = torch.einsum("th,thi->ti", x, self.up[ids]).sigmoid()
        return torch.einsum("ti,tih,t->th", hidden, self.down[ids], weights)


def test_a_single_pick_without_an_axis() -> None:
    layer, x = SinglePick().eval(), torch.randn(10, layers.H)
    with torch.no_grad():
        outputs = torch.stack([(x @ up).sigmoid() @ down for up, down in zip(layer.up, layer.down, strict=True)])
    torch.testing.assert_close(moe_fx.calibrate(layer, [x]).sites[""]["similarity"], brute_force(outputs), rtol=1e-5, atol=1e-6)


class NeverTogether(layers.Layer):
    """The picks' outputs stay apart."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("th,tkhi->tki", x, self.up[ids]))
        return torch.einsum("tki,tkih,tk->kth", hidden, self.down[ids], weights)


def test_outputs_that_never_come_together_say_so() -> None:
    with pytest.raises(CalibrationError, match="never come together"):
        moe_fx.calibrate(NeverTogether(), [torch.randn(5, layers.H)])


def test_order_and_batching_of_tokens_do_not_matter() -> None:
    layer, x = layers.SoftmaxThenTopK(), torch.randn(9, layers.H)
    whole = moe_fx.calibrate(layer, [x])
    torch._dynamo.reset()
    parts = moe_fx.calibrate(layer, [x[5:], x[:5]])
    torch.testing.assert_close(whole.sites[""]["similarity"], parts.sites[""]["similarity"])


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(layers.SoftmaxThenTopK(), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moe_fx.calibrate(model, [torch.randn(4, layers.H)])
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("batches", "metric", "words"),
    [
        ([], "frobenius", "no batches"),
        ([torch.randn(4, layers.H)], "manhattan", "unknown metric 'manhattan'"),
        (["text"], "frobenius", "a batch is a str"),
        ([torch.full((4, layers.H), float("inf"))], "frobenius", "not finite"),
    ],
)
def test_bad_input(batches: list[Any], metric: str, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        moe_fx.calibrate(layers.SoftmaxThenTopK(), batches, metric=metric)


def test_experts_that_count_their_tokens_apart() -> None:
    with pytest.raises(CalibrationError, match="count their tokens beside the routing decision"):
        moe_fx.calibrate(layers.CountedGroups(), [torch.randn(4, layers.H)])


def test_any_number_of_calibrations_in_one_process_even_of_a_compiled_model() -> None:
    """More than Dynamo compiles of one function; and what a compiled ``forward`` changes is not calibrated on."""
    x = torch.randn(4, layers.H)
    layer = layers.SoftmaxThenTopK().eval()
    want = [moe_fx.calibrate(layer, [x]) for _ in range(10)]
    assert all(artifact == want[0] for artifact in want)
    options = {"policy": moe_fx.SERE(want[0], primary=1), "inner": "eager"}
    layer.forward = torch.compile(layer.forward, backend="moe_sparse", options=options)
    with torch.no_grad():
        served = layer(x)
        assert moe_fx.calibrate(layer, [x]) == want[0]
        assert torch.equal(layer(x), served)


def test_a_model_without_experts() -> None:
    with pytest.raises(CalibrationError, match="no expert routing was found"):
        moe_fx.calibrate(nn.Linear(4, 4), [torch.randn(2, 4)])


def test_experts_that_do_not_trace_say_what_to_do_after_one_batch(tmp_path: Path) -> None:
    def batches() -> Iterator[dict[str, Any]]:
        yield tiny.tokens()
        raise AssertionError("the first batch tells that the others are in vain")

    with pytest.raises(CalibrationError, match="set_experts_implementation"):
        moe_fx.calibrate(tiny.build("qwen3_moe", "eager"), batches(), checkpoint=tmp_path / "partial")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_cannot_be_read_says_why() -> None:
    with (
        mock.patch("moe_fx.passes.normalize.normalize", side_effect=NormalizeError("a scan")),
        pytest.raises(CalibrationError, match=r"was found in this SoftmaxThenTopK \(a graph could not be read: a scan\)"),
    ):
        moe_fx.calibrate(layers.SoftmaxThenTopK(), [torch.randn(4, layers.H)])


def published(outputs: Tensor, metric: str) -> Tensor:
    """The similarity of all outputs at once, by the streaming class given everything in one window."""
    site = similarity.Site(metric)
    site.add(outputs)
    return site.similarity()


@pytest.mark.parametrize("metric", ["cosine", "cka-linear", "cka-rbf"])
def test_every_metric_on_a_model(metric: str) -> None:
    model, batches = tiny.build("qwen3_moe"), [tiny.tokens(2, 9), tiny.tokens(3, 4, seed=1)]
    artifact = moe_fx.calibrate(model, batches, metric=metric)
    for site in artifact.sites:
        want = published(every_expert(model, site, batches), metric)
        torch.testing.assert_close(artifact.sites[site]["similarity"], want, rtol=1e-4, atol=1e-5)
    assert artifact.metadata["metric"] == metric


class _StoppedError(Exception):
    pass


def stopped_after(count: int, batches: list[Any]) -> Iterator[Any]:
    yield from batches[:count]
    raise _StoppedError


@pytest.mark.parametrize("metric", ["frobenius", "cka-rbf"])
def test_resumed_gives_the_same_file(metric: str, tmp_path: Path) -> None:
    model, batches = tiny.build("qwen3_moe"), [tiny.tokens(2, 9, seed=s) for s in range(4)]
    settings: dict[str, Any] = {"metric": metric, "folds": True, "noise_seed": 7}
    whole = moe_fx.calibrate(model, batches, **settings).save(tmp_path / "whole")
    checkpoint = tmp_path / "checkpoint"
    for count in (1, 3):
        torch._dynamo.reset()
        with pytest.raises(_StoppedError), mock.patch("moe_fx.calibrate._CHECKPOINT_SECONDS", 0.0):
            moe_fx.calibrate(model, stopped_after(count, batches), checkpoint=checkpoint, **settings)
        assert checkpoint.is_file()
    with pytest.raises(CalibrationError, match="another calibration"):
        moe_fx.calibrate(model, batches, checkpoint=checkpoint, metric="cosine")
    revision = tiny.build("qwen3_moe")
    for parameter in revision.parameters():
        parameter.mul_(1.1)
    with pytest.raises(CalibrationError, match="another calibration"):
        moe_fx.calibrate(revision, batches, checkpoint=checkpoint, **settings)
    torch._dynamo.reset()
    parts = moe_fx.calibrate(model, batches, checkpoint=checkpoint, **settings).save(tmp_path / "parts")
    assert not checkpoint.exists()
    assert whole.read_bytes() == parts.read_bytes()


def test_noise_instead_of_data() -> None:
    model, batches = tiny.build("gpt_oss"), [tiny.tokens(2, 9)]
    data, noise, again, other = (
        moe_fx.calibrate(model, batches, noise_seed=seed) for seed in (None, 0, 0, 1)
    )  # fmt: skip
    assert noise == again
    assert data != noise != other
    assert "no data" in str(noise.metadata["calibrated_on"])
    assert "calibrated_on" not in data.metadata


def test_unrecognised_experts_get_noise_too() -> None:
    layer, x = layers.LoopOverExperts().eval(), torch.randn(8, layers.H)
    data, noise = moe_fx.calibrate(layer, [x]), moe_fx.calibrate(layer, [x], noise_seed=0)
    assert data != noise


def test_folds_come_from_the_models_own_picks() -> None:
    model, batches = tiny.build("qwen3_moe"), [tiny.tokens(2, 9), tiny.tokens(3, 4, seed=1)]
    artifact = moe_fx.calibrate(model, batches, folds=True)
    with tiny.patched(model, "qwen3_moe", lambda site, hidden, ids, weights: (ids, weights)) as seen, torch.no_grad():
        for batch in batches:
            model(**batch)
    for site, picked in seen.items():
        ids = torch.cat(picked)
        share = torch.stack([(ids == e).any(dim=1) for e in range(tiny.EXPERTS)]).float().mean(dim=1)
        torch.testing.assert_close(artifact.sites[site]["coactivation"].diagonal(), share)
        own = artifact.sites[site]["fold_scale"].diagonal()
        assert bool(((own > 0.3) & (own <= 1)).logical_or(share == 0).all())  # an expert explains itself, but for lambda


def test_folds_of_a_matrix_over_as_many_experts_as_picks() -> None:
    layer, x = layers.EveryExpertAsMatrix().eval(), torch.randn(7, layers.H)
    folded = moe_fx.calibrate(layer, [x], folds=True).sites[""]
    torch._dynamo.reset()
    pairs = layers.EveryExpertPicked().eval()  # the same routing, by ids
    pairs.load_state_dict(layer.state_dict())
    for key, table in moe_fx.calibrate(pairs, [x], folds=True).sites[""].items():
        torch.testing.assert_close(folded[key], table, rtol=1e-4, atol=1e-5)


def test_another_revision_of_the_model_is_refused() -> None:
    model = tiny.build("qwen3_moe")
    artifact = moe_fx.calibrate(model, [tiny.tokens()])
    assert artifact.validate(copy.deepcopy(model).to(torch.bfloat16)) is artifact
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    with pytest.raises(moe_fx.ArtifactError, match="another revision"):
        artifact.validate(model)


def test_spread_tells_that_tokens_are_few() -> None:
    few, many = (moe_fx.calibrate(tiny.build("qwen3_moe"), [tiny.tokens(b, 8)]) for b in (1, 24))
    assert few.metadata["spread"] > 2 * many.metadata["spread"] > 0
