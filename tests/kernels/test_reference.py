"""The specification itself, against loops that follow the definitions word by word."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.kernels import reference
from moe_fx.testing import random_routing, random_similarity, random_valid_tokens


def looped_sere(ids, similarity, primary, threshold, is_real):
    num_experts = len(similarity)
    kept = {e for t, row in enumerate(ids) for e in row[:primary] if is_real[t] and 0 <= e < num_experts}
    new_ids = [list(row) for row in ids]
    for t, row in enumerate(ids):
        for k, u in enumerate(row):
            if k < primary or not 0 <= u < num_experts or u in kept or not kept:
                continue
            v, best = -1, -math.inf
            for p in sorted(kept):
                score = -math.inf if math.isnan(similarity[u][p]) else similarity[u][p]
                if v == -1 or score > best:
                    v, best = p, score
            if threshold <= 0 or best >= threshold:
                new_ids[t][k] = v
    return new_ids


def looped_beam(weights, ids, logits, tau):
    cut = torch.tensor(math.log(tau / (1 - tau)), dtype=torch.float32).item()
    new_weights, new_ids = [list(row) for row in weights], [list(row) for row in ids]
    for t, row in enumerate(ids):
        for k, e in enumerate(row):
            on = e >= 0 and (e >= len(logits[t]) or logits[t][e] >= cut)
            if not on:
                new_weights[t][k], new_ids[t][k] = 0.0, -1
    return new_weights, new_ids


def looped_fold(weights, ids):
    new_weights, new_ids = [list(row) for row in weights], [list(row) for row in ids]
    anywhere = min((e for row in ids for e in row if e >= 0), default=0)
    for t, row in enumerate(ids):
        for k, e in enumerate(row):
            if e < 0:
                new_weights[t][k] = 0.0
                new_ids[t][k] = next((other for other in row if other >= 0), anywhere)
    return new_weights, new_ids


def rows(values: list, like: Tensor) -> Tensor:
    """A list of rows as a tensor of the same shape and dtype, also when there is no row."""
    return torch.tensor(values, dtype=like.dtype).reshape(like.shape)


@given(
    num_tokens=st.integers(0, 6),
    top_k=st.integers(1, 5),
    more_experts=st.integers(0, 9),
    primary=st.integers(1, 6),
    threshold=st.sampled_from([-0.5, 0.0, 0.1, 0.5, 1.0]),
    form=st.sampled_from(["none", "mask", "count"]),
    off=st.sampled_from([0.0, 0.3, 1.0]),
    levels=st.sampled_from([None, 2, 5]),
    nan=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_sere_reroute_follows_its_definition(
    num_tokens, top_k, more_experts, primary, threshold, form, off, levels, nan, seed
):
    num_experts = top_k + more_experts
    _, ids = random_routing(num_tokens, top_k, num_experts, seed, off=off, beyond=0.1)
    similarity = random_similarity(num_experts, seed, levels=levels, nan=nan)
    valid = random_valid_tokens(num_tokens, form, seed)
    is_real = reference.real_tokens(valid, num_tokens, ids.device).tolist()
    # The threshold as float32, as the values are: 0.1 is not the same number in both.
    limit = torch.tensor(threshold, dtype=torch.float32).item()
    expected = rows(looped_sere(ids.tolist(), similarity.tolist(), primary, limit, is_real), ids)
    assert torch.equal(reference.sere_reroute(ids, similarity, primary, threshold, valid), expected)


@given(
    num_tokens=st.integers(0, 6),
    top_k=st.integers(1, 5),
    more_experts=st.integers(0, 9),
    fewer_masked=st.integers(0, 3),
    tau=st.sampled_from([0.1, 0.5, 0.9]),
    off=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_beam_mask_follows_its_definition(num_tokens, top_k, more_experts, fewer_masked, tau, off, seed):
    num_experts = top_k + more_experts
    weights, ids = random_routing(num_tokens, top_k, num_experts, seed, off=off, beyond=0.1)
    num_masked = max(1, num_experts - fewer_masked)
    logits = torch.randn(num_tokens, num_masked, generator=torch.Generator().manual_seed(seed))
    expected = looped_beam(weights.tolist(), ids.tolist(), logits.tolist(), tau)
    new_weights, new_ids = reference.beam_mask(weights, ids, logits, tau)
    assert torch.equal(new_weights, rows(expected[0], weights))
    assert torch.equal(new_ids, rows(expected[1], ids))


@given(
    num_tokens=st.integers(0, 6),
    top_k=st.integers(1, 5),
    off=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_fold_masked_follows_its_definition(num_tokens, top_k, off, seed):
    weights, ids = random_routing(num_tokens, top_k, top_k + 3, seed, off=off, beyond=0.1)
    expected = looped_fold(weights.tolist(), ids.tolist())
    new_weights, new_ids = reference.fold_masked(weights, ids)
    assert torch.equal(new_weights, rows(expected[0], weights))
    assert torch.equal(new_ids, rows(expected[1], ids))


@given(num_tokens=st.integers(0, 6), top_k=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_count_active_counts_distinct_experts(num_tokens, top_k, seed):
    _, ids = random_routing(num_tokens, top_k, 7, seed, off=0.2, beyond=0.2)
    active = reference.count_active(ids, 7)
    assert active.dtype == torch.int64
    assert active.item() == len({e for e in ids.flatten().tolist() if 0 <= e < 7})


def test_sere_reroute_by_hand():
    ids = torch.tensor([[0, 3, 2], [1, 2, -1]])
    similarity = torch.tensor(
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.2, 0.6, 1.0, 0.9], [0.7, 0.7, 0.0, 1.0]],
    )
    # The primary experts are 0 and 1.  Expert 3 is as near to 0 as to 1: the lower id wins.
    assert reference.sere_reroute(ids, similarity, 1, 0.0).tolist() == [[0, 0, 1], [1, 1, -1]]
    # Expert 2 is too far from both of them.
    assert reference.sere_reroute(ids, similarity, 1, 0.65).tolist() == [[0, 0, 2], [1, 2, -1]]
    # The second row is padding: only expert 0 is primary.
    assert reference.sere_reroute(ids, similarity, 1, 0.0, torch.tensor(1)).tolist() == [[0, 0, 0], [1, 0, -1]]
    assert reference.sere_reroute(ids, similarity, 1, 0.0, max_tokens=1).tolist() == ids.tolist()


def test_a_number_of_valid_tokens_is_the_mask_of_the_first_rows():
    for number in (-1, 0, 2, 3, 9):
        real = reference.real_tokens(torch.tensor([number]), 3, torch.device("cpu"))
        assert real.tolist() == [row < number for row in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frobenius_similarity(dtype):
    distances = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]], dtype=dtype)
    expected = torch.tensor([[1.0, 0.75, 0.0], [0.75, 1.0, 0.5], [0.0, 0.5, 1.0]])
    before = distances.clone()
    assert torch.equal(reference.frobenius_similarity(distances), expected)
    assert torch.equal(distances, before)


def test_experts_that_never_differ_are_all_similar():
    assert torch.equal(reference.frobenius_similarity(torch.zeros(3, 3)), torch.ones(3, 3))
