"""topk_beam on CPU and in Triton: equal to the reference, and to top-K followed by the op it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.kernels import cpu, reference
from moe_fx.kernels import topk_beam as triton_kernel
from moe_fx.testing import FLOAT_DTYPES, poisoned_allocations, random_scores

DTYPES = st.sampled_from(FLOAT_DTYPES)


def on_cpu(*args: object) -> tuple[Tensor, ...]:
    return cpu.topk_beam(*args)


def by_triton(*args: object) -> tuple[Tensor, ...]:
    """The Triton launcher with all tensors on its device and every allocation poisoned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with poisoned_allocations():
        moved = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
        return tuple(t.cpu() for t in triton_kernel.topk_beam(*moved))


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [on_cpu, by_triton])


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@IMPLEMENTATIONS
@given(data=st.data())
def test_equals_the_reference(implementation, data):
    """Ties, NaN and infinities in both inputs, experts without a mask logit, K = E, one token and none."""
    draw = data.draw
    num_tokens = draw(st.sampled_from([0, 1, 4, 5, 11]))
    num_experts = draw(st.sampled_from([1, 6, 16, 37]))
    top_k = draw(st.sampled_from(sorted({1, min(4, num_experts), min(6, num_experts)})))
    seed = draw(st.integers(0, 10**6))
    levels, odd = draw(st.sampled_from([None, 9, 2])), draw(st.sampled_from([0.0, 0.2]))
    scores = random_scores(num_tokens, num_experts, seed, dtype=draw(DTYPES), levels=levels, odd=odd)
    num_masked = max(1, num_experts - draw(st.sampled_from([0, 0, 2])))
    logits = random_scores(num_tokens, num_masked, seed + 1, dtype=draw(DTYPES), odd=odd)
    tau = draw(st.sampled_from([0.1, 0.5, 0.9]))
    expected = reference.topk_beam(scores, top_k, logits, tau)
    if draw(st.booleans()):
        scores, logits = scores.t().contiguous().t(), logits.t().contiguous().t()
    before = scores.clone()
    assert_same(implementation(scores, top_k, logits, tau), expected)
    torch.testing.assert_close(scores, before, rtol=0, atol=0, equal_nan=True)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(16, 64, 8), (9, 128, 8), (3, 512, 10), (2, 1500, 4)])
def test_equals_the_reference_at_model_shapes(implementation, num_tokens, num_experts, top_k):
    args = random_scores(num_tokens, num_experts).softmax(-1), top_k, random_scores(num_tokens, num_experts, 1), 0.6
    expected = reference.topk_beam(*args)
    assert 0 < (expected[2] < 0).sum() < expected[2].numel()
    assert_same(implementation(*args), expected)


@IMPLEMENTATIONS
def test_a_fresh_mask_router_is_exactly_top_k(implementation):
    scores = random_scores(12, 40)
    values, ids, new_ids = implementation(scores, 6, torch.zeros(12, 40), 0.5)
    expected = scores.topk(6, dim=-1)
    assert_same((values, ids, new_ids), (expected.values, expected.indices, expected.indices))


@IMPLEMENTATIONS
def test_float64_scores(implementation):
    scores = random_scores(5, 9, dtype=torch.float64)
    scores[:, 1] = scores[:, 0].nextafter(torch.tensor(9.0, dtype=torch.float64))  # equal in float32
    args = scores, 4, random_scores(5, 9, 1), 0.5
    assert_same(implementation(*args), reference.topk_beam(*args))


@pytest.mark.gpu
@given(data=st.data())
def test_equals_the_reference_on_a_gpu(data):
    """Few shapes, so that few kernels are compiled, and many batches."""
    num_tokens = data.draw(st.sampled_from([1, 3, 16, 64, 256, 300, 4000]))
    num_experts, top_k = data.draw(st.sampled_from([(64, 6), (128, 8), (60, 4), (512, 10)]))
    seed = data.draw(st.integers(0, 10**6))
    levels = data.draw(st.sampled_from([None, 50]))
    scores = random_scores(num_tokens, num_experts, seed, dtype=data.draw(DTYPES), levels=levels, odd=0.01)
    args = scores, top_k, random_scores(num_tokens, num_experts, seed + 1), 0.4
    assert_same(by_triton(*args), reference.topk_beam(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 2000])
def test_graph_capture_and_replay_with_changed_inputs(num_tokens):
    inputs = [random_scores(num_tokens, 128).cuda(), random_scores(num_tokens, 128, 1).cuda()]
    triton_kernel.topk_beam(inputs[0], 8, inputs[1], 0.5)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_kernel.topk_beam(inputs[0], 8, inputs[1], 0.5)
    for seed in (1, 2, 3):
        changed = [random_scores(num_tokens, 128, seed, levels=90), random_scores(num_tokens, 128, seed + 10)]
        for static, new in zip(inputs, changed, strict=True):
            static.copy_(new)
        graph.replay()
        assert_same(tuple(t.cpu() for t in captured), reference.topk_beam(changed[0], 8, changed[1], 0.5))
