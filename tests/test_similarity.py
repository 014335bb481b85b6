"""The similarity metrics, streamed, against the published formulas on all outputs at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_fx import similarity
from moe_fx.testing import tolerance

METRICS = sorted(similarity.METRICS)
TOLERANCE = tolerance(torch.float32)


def random_outputs(experts: int = 5, tokens: int = 24, width: int = 6, seed: int = 0) -> Tensor:
    """[E, T, H]: a part that all experts share, so that similarities spread over a range."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(experts, tokens, width, generator=generator)
    return own + torch.linspace(0, 2, experts)[:, None, None] * torch.randn(tokens, width, generator=generator) + 0.3


def published(outputs: Tensor, metric: str) -> Tensor:
    """Each pair by itself, in float64, as the paper's program does it."""
    outputs = outputs.double()
    experts = len(outputs)
    table = torch.stack([torch.stack([_pair(outputs[i], outputs[j], metric) for j in range(experts)]) for i in range(experts)])
    if metric == "frobenius":
        table = 1 - table / table.max()
    return table.fill_diagonal_(1).float()


def _pair(x: Tensor, y: Tensor, metric: str) -> Tensor:
    if metric == "frobenius":
        return (x - y).norm()
    if metric == "cosine":
        return (torch.nn.functional.cosine_similarity(x, y, dim=1).mean() + 1) / 2
    k, l = (_centered_kernel(z, metric) for z in (x, y))
    return ((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()).clamp(0, 1)


def _centered_kernel(x: Tensor, metric: str) -> Tensor:
    if metric == "cka-linear":
        kernel = x @ x.T
    else:
        distances = torch.cdist(x, x).square()
        kernel = torch.exp(-distances / (2 * distances.var()))
    center = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    return center @ kernel @ center


def streamed(outputs: Tensor, metric: str, sizes: list[int]) -> Tensor:
    site = similarity.Site(metric)
    for part in outputs.split(sizes, dim=1):
        site.add(part)
    return site.similarity()


@pytest.mark.parametrize("sizes", [[24], [1, 23], [8, 8, 8]])
@pytest.mark.parametrize("metric", METRICS)
def test_equals_the_published_formula(metric, sizes):
    outputs = random_outputs()
    torch.testing.assert_close(streamed(outputs, metric, sizes), published(outputs, metric), **TOLERANCE)


@pytest.mark.parametrize("metric", METRICS)
def test_properties(metric):
    outputs = random_outputs(seed=1)
    table = streamed(outputs, metric, [24])
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, table.T, **TOLERANCE)
    assert torch.equal(table.diagonal(), torch.ones(5))
    assert bool((table >= 0).all())
    assert bool((table <= 1).all())
    shuffled = outputs[:, torch.randperm(24, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(streamed(shuffled, metric, [24]), table, **TOLERANCE)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3))).Q
    torch.testing.assert_close(streamed(outputs @ rotation, metric, [24]), table, **TOLERANCE)
    if metric != "cka-rbf":  # whose published bandwidth is a variance of squares and does not scale with the distances
        torch.testing.assert_close(streamed(outputs * 3, metric, [24]), table, **TOLERANCE)


@pytest.mark.parametrize("metric", ["cosine", "cka-linear"])
def test_one_experts_own_scale_does_not_matter(metric):
    outputs = random_outputs(seed=4)
    scaled = outputs * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0])[:, None, None]
    torch.testing.assert_close(streamed(scaled, metric, [24]), streamed(outputs, metric, [24]), **TOLERANCE)


def test_a_rotation_of_one_expert_leaves_cka_alone_and_nothing_else():
    outputs = random_outputs(seed=5)
    turned = outputs.clone()
    turned[0] = outputs[0] @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(6))).Q
    for metric in METRICS:
        same = torch.allclose(streamed(turned, metric, [24]), streamed(outputs, metric, [24]), **TOLERANCE)
        assert same == metric.startswith("cka"), metric


def test_equal_experts_are_wholly_similar():
    outputs = random_outputs()[:1].expand(3, -1, -1)
    for metric in METRICS:
        torch.testing.assert_close(streamed(outputs, metric, [24]), torch.ones(3, 3), **TOLERANCE)


@pytest.mark.parametrize("metric", ["cka-linear", "cka-rbf"])
def test_windows_come_near_the_value_over_all_tokens(metric, monkeypatch):
    outputs = random_outputs(tokens=960, width=4, seed=7)
    whole = published(outputs, metric)
    monkeypatch.setattr(similarity, "WINDOW", 96)
    windows = streamed(outputs, metric, [960])
    mean_of_windows = torch.stack([published(part, metric) for part in outputs.split(96, dim=1)]).mean(0)
    assert float((windows - whole).abs().max()) < 0.03
    assert float((windows - whole).abs().mean()) < float((mean_of_windows - whole).abs().mean())  # no bias is left


def test_unbiased_hsic_ignores_what_is_independent():
    generator = torch.Generator().manual_seed(8)
    values = []
    for _ in range(60):
        kernels = torch.stack([similarity.linear_kernel(torch.randn(12, 5, generator=generator).double()) for _ in range(2)])
        values.append(float(similarity.unbiased_hsic(kernels)[0, 1]))
    mean = sum(values) / len(values)
    error = torch.tensor(values).std().item() / len(values) ** 0.5
    assert abs(mean) < 4 * error
    assert float(similarity.hsic(kernels)[0, 1]) > 0  # the published one never is 0


@pytest.mark.parametrize("metric", METRICS)
def test_state_goes_through_a_file_bit_for_bit(metric):
    outputs = random_outputs(seed=9)
    through, resumed = similarity.Site(metric), similarity.Site(metric)
    through.add(outputs[:, :10])
    for part, tensor in through.state().items():
        resumed.load(part, tensor.clone())
    for site in (through, resumed):
        site.add(outputs[:, 10:])
    assert torch.equal(through.similarity(), resumed.similarity())
    assert through.spread() == resumed.spread()
    assert through.tokens == resumed.tokens == 24


def test_spread_shrinks_with_tokens():
    spreads = []
    for tokens in (20, 2000):
        site = similarity.Site("frobenius")
        site.add(random_outputs(tokens=tokens, seed=10))
        spreads.append(site.spread())
    assert 0 < spreads[1] < spreads[0] / 3
    empty = similarity.Site("cosine")
    empty.add(random_outputs(tokens=1))
    assert empty.spread() is None


def test_folds_follow_their_definition():
    experts, tokens, top_k = 4, 9, 2
    outputs = random_outputs(experts, tokens, 3, seed=11)
    generator = torch.Generator().manual_seed(12)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    site = similarity.Site("frobenius")
    for rows in (slice(0, 4), slice(4, tokens)):
        site.add_picks(outputs[:, rows], ids[rows], weights[rows])
        site.add(outputs[:, rows])
    tables = site.fold_tables()
    inner, target, source, met = (torch.zeros(experts, experts, dtype=torch.float64) for _ in range(4))
    for t in range(tokens):
        for k in range(top_k):
            for other in range(top_k):
                u, v, w = int(ids[t, k]), int(ids[t, other]), float(weights[t, k])
                fu, fv = outputs[u, t].double(), outputs[v, t].double()
                inner[u, v] += w * (fu @ fv)
                target[u, v] += w * (fv @ fv)
                source[u, v] += w * (fu @ fu)
                met[u, v] += 1
    scale = inner / (target + target.sum() / met.sum())
    explained = 2 * scale * inner - scale.square() * target
    torch.testing.assert_close(tables["fold_scale"], scale.float(), **TOLERANCE)
    torch.testing.assert_close(tables["fold_gain"], torch.where(met > 0, explained / source, 0).float(), **TOLERANCE)
    torch.testing.assert_close(tables["coactivation"], (met / tokens).float(), **TOLERANCE)
