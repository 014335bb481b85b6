"""The baselines against loops that follow their definitions word by word, and by properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moe_fx  # noqa: F401  (defines the ops)
from moe_fx.kernels import baselines
from moe_fx.testing import random_routing, tolerance

TOLERANCE = tolerance(torch.float32)
shapes = {
    "num_tokens": st.integers(0, 6),
    "top_k": st.integers(1, 5),
    "more_experts": st.integers(0, 8),
    "off": st.sampled_from([0.0, 0.3, 1.0]),
    "seed": st.integers(0, 10**6),
}


def routing(num_tokens, top_k, more_experts, off, seed):
    weights, ids = random_routing(num_tokens, top_k, top_k + more_experts, seed, off=off, beyond=0.1)
    return torch.where(ids >= 0, weights, 0), ids, top_k + more_experts


def first_picks(ids, primary, num_experts):
    return {e for row in ids.tolist() for e in row[:primary] if 0 <= e < num_experts}


def rescaled(old, new):
    """Each row with the sum that it had, where anything of it is left."""
    return [[w * (sum(o) / sum(n)) if sum(n) else w for w in n] for o, n in zip(old, new, strict=True)]


def check(result, weights, ids, like):
    torch.testing.assert_close(result[0], torch.tensor(weights, dtype=like.dtype).reshape(like.shape), **TOLERANCE)
    assert result[1].tolist() == ids


def switch(weights, ids, keep, renormalise):
    """The picks (t, k) for which ``keep`` holds; the others are off."""
    new_ids = [[e if e >= 0 and keep(t, k) else -1 for k, e in enumerate(row)] for t, row in enumerate(ids.tolist())]
    old = weights.tolist()
    new = [[w if e >= 0 else 0.0 for w, e in zip(ws, es, strict=True)] for ws, es in zip(old, new_ids, strict=True)]
    return (rescaled(old, new) if renormalise else new), new_ids


@given(**shapes, k=st.integers(1, 6), renormalise=st.booleans())
def test_smaller_k(num_tokens, top_k, more_experts, off, seed, k, renormalise):
    weights, ids, _ = routing(num_tokens, top_k, more_experts, off, seed)
    expected = switch(weights, ids, lambda t, slot: slot < k, renormalise)
    check(baselines.smaller_k(weights, ids, k, renormalise), *expected, weights)


@given(**shapes, primary=st.integers(1, 6), renormalise=st.booleans())
def test_drop(num_tokens, top_k, more_experts, off, seed, primary, renormalise):
    weights, ids, experts = routing(num_tokens, top_k, more_experts, off, seed)
    kept = first_picks(ids, primary, experts)
    expected = switch(weights, ids, lambda t, k: int(ids[t, k]) in kept or int(ids[t, k]) >= experts, renormalise)
    check(baselines.drop(weights, ids, experts, primary, renormalise), *expected, weights)


@given(**shapes, p=st.sampled_from([0.0, 0.31, 0.57, 0.83]))
def test_top_p(num_tokens, top_k, more_experts, off, seed, p):
    weights, ids, _ = routing(num_tokens, top_k, more_experts, off, seed)

    def enough_before(t, k):
        return k > 0 and float(weights[t, :k].sum()) >= p * float(weights[t].sum())

    check(baselines.top_p(weights, ids, p), *switch(weights, ids, lambda t, k: not enough_before(t, k), False), weights)


@given(**shapes, ratio=st.sampled_from([0.0, 0.37, 0.81]))
def test_naee_skip(num_tokens, top_k, more_experts, off, seed, ratio):
    weights, ids, _ = routing(num_tokens, top_k, more_experts, off, seed)
    expected = switch(weights, ids, lambda t, k: float(weights[t, k]) >= ratio * float(weights[t, 0]), True)
    check(baselines.naee_skip(weights, ids, ratio), *expected, weights)


@given(**shapes, primary=st.integers(1, 6))
def test_exfold(num_tokens, top_k, more_experts, off, seed, primary):
    weights, ids, experts = routing(num_tokens, top_k, more_experts, off, seed)
    generator = torch.Generator().manual_seed(seed)
    scale, gain = torch.rand(experts, experts, generator=generator), torch.rand(experts, experts, generator=generator) - 0.4
    kept = first_picks(ids, primary, experts)
    new_weights, new_ids = weights.tolist(), ids.tolist()
    for row_weights, row in zip(new_weights, new_ids, strict=True):
        for k, u in enumerate(row):
            if 0 <= u < experts and u not in kept:
                v = max(sorted(kept), key=lambda v: float(gain[u, v]), default=None)
                row[k] = v if v is not None and gain[u, v] > 0 else -1
                row_weights[k] = row_weights[k] * float(scale[u, v]) if row[k] >= 0 else 0.0
    check(baselines.exfold(weights, ids, scale, gain, primary), new_weights, new_ids, weights)


@given(**shapes, keep=st.integers(1, 9), renormalise=st.booleans())
def test_prune_and_the_scores_it_leaves(num_tokens, top_k, more_experts, off, seed, keep, renormalise):
    weights, ids, experts = routing(num_tokens, top_k, more_experts, off, seed)
    shares = torch.rand(experts, generator=torch.Generator().manual_seed(seed))
    kept = set(sorted(range(experts), key=lambda e: -float(shares[e]))[:keep])
    expected = switch(weights, ids, lambda t, k: int(ids[t, k]) in kept or int(ids[t, k]) >= experts, renormalise)
    check(baselines.prune(weights, ids, torch.diag(shares), keep, renormalise), *expected, weights)
    scores = baselines.only_frequent(torch.ones(2, 3, experts), torch.diag(shares), keep, -math.inf)
    assert {e for e in range(experts) if scores[0, 0, e] == 1} == kept
    assert torch.equal(scores, scores[:1, :1].expand_as(scores))


@given(num_tokens=st.integers(1, 6), experts=st.integers(1, 9), primary=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_only_first_picks(num_tokens, experts, primary, seed):
    scores = torch.rand(num_tokens, experts, generator=torch.Generator().manual_seed(seed))
    kept = {e for row in scores.tolist() for e in sorted(range(experts), key=lambda e: -row[e])[:primary]}
    new = baselines.only_first_picks(scores, primary, -1.0)
    assert torch.equal(new, torch.where(torch.tensor([e in kept for e in range(experts)]), scores, -1.0))


SAMPLES = {
    "smaller_k": lambda w, i: (w, i, 2, True),
    "drop": lambda w, i: (w, i, 6, 1, True),
    "top_p": lambda w, i: (w, i, 0.6),
    "naee_skip": lambda w, i: (w, i, 0.5),
    "exfold": lambda w, i: (w, i, torch.rand(6, 6), torch.rand(6, 6), 1),
    "prune": lambda w, i: (w, i, torch.rand(6, 6), 3, False),
    "only_frequent": lambda w, i: (torch.rand(4, 6), torch.rand(6, 6), 3, 0.0),
    "only_first_picks": lambda w, i: (torch.rand(4, 6), 1, -math.inf),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_ops_pass_opcheck(name):
    weights, ids = random_routing(4, 3, 6)
    torch.library.opcheck(getattr(torch.ops.moe_fx, name).default, SAMPLES[name](weights, ids))
