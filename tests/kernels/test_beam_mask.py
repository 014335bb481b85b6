"""beam_mask on CPU and in Triton: equal to the reference, and true to properties that need no reference."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.kernels import beam_mask as triton_kernel
from moe_fx.kernels import cpu, reference
from moe_fx.testing import FLOAT_DTYPES, ID_DTYPES, poisoned_allocations, random_routing


def on_cpu(*args: object) -> tuple[Tensor, Tensor]:
    return cpu.beam_mask(*args)


def by_triton(*args: object) -> tuple[Tensor, Tensor]:
    """The Triton launcher with all tensors on its device and every allocation poisoned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with poisoned_allocations():
        moved = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
        weights, ids = triton_kernel.beam_mask(*moved)
        return weights.cpu(), ids.cpu()


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [on_cpu, by_triton])
SHAPES = {
    "num_tokens": st.sampled_from([0, 1, 2, 5, 17]),
    "top_k": st.integers(1, 6),
    "more_experts": st.sampled_from([0, 1, 3, 40]),
    "seed": st.integers(0, 10**6),
}


def mask_logits(num_tokens: int, num_masked: int, seed: int, levels: int | None = None) -> Tensor:
    logits = torch.randn(num_tokens, num_masked, generator=torch.Generator().manual_seed(seed))
    return logits if levels is None else (logits * levels).round() / levels


def same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Equal bit for bit where numbers, NaN where NaN."""
    return torch.equal(result[1], expected[1]) and torch.equal(
        result[0].nan_to_num(nan=-9.0), expected[0].nan_to_num(nan=-9.0)
    )


@IMPLEMENTATIONS
@given(
    **SHAPES,
    fewer_masked=st.integers(0, 2),
    tau=st.sampled_from([0.1, 0.5, 0.9]),
    ids_dtype=st.sampled_from(ID_DTYPES),
    dtype=st.sampled_from(FLOAT_DTYPES),
    logits_dtype=st.sampled_from(FLOAT_DTYPES),
    off=st.sampled_from([0.0, 0.3, 1.0]),
    levels=st.sampled_from([None, 1]),
    contiguous=st.booleans(),
    block=st.sampled_from([None, 2, 16]),
)
def test_equals_the_reference(
    implementation, num_tokens, top_k, more_experts, seed, fewer_masked, tau, ids_dtype, dtype, logits_dtype, off,
    levels, contiguous, block,
):  # fmt: skip
    num_experts = top_k + more_experts
    weights, ids = random_routing(
        num_tokens, top_k, num_experts, seed, dtype=dtype, ids_dtype=ids_dtype, off=off, beyond=0.1
    )
    logits = mask_logits(num_tokens, max(1, num_experts - fewer_masked), seed, levels).to(logits_dtype)
    expected = reference.beam_mask(weights, ids, logits, tau)
    if not contiguous:
        weights, ids, logits = (x.t().contiguous().t() for x in (weights, ids, logits))
    before = weights.clone(), ids.clone()
    config = (lambda _: block) if block else triton_kernel.choose_config
    with mock.patch.object(triton_kernel, "choose_config", config):
        result = implementation(weights, ids, logits, tau)
    assert result[0].dtype == dtype
    assert result[1].dtype == ids_dtype
    assert result[0].is_contiguous()
    assert result[1].is_contiguous()
    assert same(result, expected)
    assert same((weights, ids), before)


@IMPLEMENTATIONS
def test_equals_the_reference_at_model_shapes(implementation):
    for num_tokens, top_k, num_experts in ((16, 8, 64), (128, 4, 512), (600, 3, 7)):
        weights, ids = random_routing(num_tokens, top_k, num_experts)
        args = (weights, ids, mask_logits(num_tokens, num_experts, 0), 0.5)
        assert same(implementation(*args), reference.beam_mask(*args))


def test_the_reference_serves_where_torch_has_no_numpy(monkeypatch):
    args = (*random_routing(5, 4, 9), mask_logits(5, 9, 0), 0.5)
    expected = cpu.beam_mask(*args)
    monkeypatch.setattr(cpu, "np", None)
    assert same(cpu.beam_mask(*args), expected)


@IMPLEMENTATIONS
@given(**SHAPES)
def test_a_fresh_mask_router_is_exactly_top_k(implementation, num_tokens, top_k, more_experts, seed):
    weights, ids = random_routing(num_tokens, top_k, top_k + more_experts, seed)
    result = implementation(weights, ids, torch.zeros(num_tokens, top_k + more_experts), 0.5)
    assert same(result, (weights, ids))


@IMPLEMENTATIONS
@given(**SHAPES, taus=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)))
def test_raising_tau_never_switches_a_pick_on(implementation, num_tokens, top_k, more_experts, seed, taus):
    weights, ids = random_routing(num_tokens, top_k, top_k + more_experts, seed, off=0.1)
    logits = mask_logits(num_tokens, top_k + more_experts, seed)
    low, high = (implementation(weights, ids, logits, tau)[1] for tau in sorted(taus))
    assert not ((high >= 0) & (low < 0)).any()


@IMPLEMENTATIONS
@given(**SHAPES)
def test_picks_keep_what_they_are_or_go_off(implementation, num_tokens, top_k, more_experts, seed):
    weights, ids = random_routing(num_tokens, top_k, top_k + more_experts, seed, off=0.2, beyond=0.2)
    logits = mask_logits(num_tokens, top_k + more_experts, seed)
    new_weights, new_ids = implementation(weights, ids, logits, 0.5)
    on = new_ids >= 0
    assert torch.equal(new_ids[on], ids[on])
    assert torch.equal(new_weights[on], weights[on])
    assert (new_ids[~on] == -1).all()
    assert (new_weights[~on] == 0).all()
    assert on[ids >= top_k + more_experts].all()
    assert same(implementation(new_weights, new_ids, logits, 0.5), (new_weights, new_ids))


@IMPLEMENTATIONS
def test_a_token_may_lose_all_its_picks(implementation):
    weights, ids = random_routing(2, 3, 5)
    logits = torch.tensor([[-1.0] * 5, [1.0] * 5])
    new_weights, new_ids = implementation(weights, ids, logits, 0.5)
    assert new_ids[0].tolist() == [-1, -1, -1]
    assert new_weights[0].tolist() == [0, 0, 0]
    assert same((new_weights[1], new_ids[1]), (weights[1], ids[1]))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_nan_and_infinity(implementation, dtype):
    nan, inf = float("nan"), float("inf")
    weights = torch.tensor([[nan, inf, nan, 0.5]], dtype=dtype)
    ids = torch.tensor([[0, 1, 2, -1]])
    logits = torch.tensor([[nan, -1.0, 1.0]], dtype=dtype)
    new_weights, new_ids = implementation(weights, ids, logits, 0.5)
    assert new_ids.tolist() == [[-1, -1, 2, -1]]
    assert new_weights[0, [0, 1, 3]].tolist() == [0, 0, 0]
    assert new_weights[0, 2].isnan()
    # 20 is on for any tau that float32 knows, as is +inf.
    logits = torch.tensor([[inf, 20.0, -inf]], dtype=dtype)
    assert implementation(weights, ids, logits, 0.999)[1].tolist() == [[0, 1, -1, -1]]


@pytest.mark.gpu
def test_graph_capture_and_replay_with_changed_inputs():
    weights, ids = random_routing(16, 8, 64)
    inputs = [weights.cuda(), ids.cuda(), mask_logits(16, 64, 0).cuda()]
    triton_kernel.beam_mask(*inputs, 0.5)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_kernel.beam_mask(*inputs, 0.5)
    for seed in (1, 2, 3):
        changed = [*random_routing(16, 8, 64, seed, off=0.1), mask_logits(16, 64, seed)]
        for static, new in zip(inputs, changed, strict=True):
            static.copy_(new)
        graph.replay()
        assert same((captured[0].cpu(), captured[1].cpu()), reference.beam_mask(*changed, 0.5))
