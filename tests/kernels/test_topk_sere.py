"""topk_sere on CPU and in Triton: equal to the reference, and to top-K followed by the op it stands for."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.kernels import cpu, reference
from moe_fx.kernels import topk_sere as triton_kernel
from moe_fx.testing import FLOAT_DTYPES, poisoned_allocations, random_scores, random_similarity, random_valid_tokens

DTYPES = st.sampled_from(FLOAT_DTYPES)


def on_cpu(*args: object) -> tuple[Tensor, ...]:
    return cpu.topk_sere(*args)


def by_triton(*args: object) -> tuple[Tensor, ...]:
    """The Triton launcher with all tensors on its device and every allocation poisoned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with poisoned_allocations():
        moved = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
        return tuple(t.cpu() for t in triton_kernel.topk_sere(*moved))


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [on_cpu, by_triton])


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@IMPLEMENTATIONS
@given(data=st.data())
def test_equals_the_reference(implementation, data):
    """Ties, NaN and infinities, experts that the table does not know, K = E, one token and none."""
    draw = data.draw
    num_tokens = draw(st.sampled_from([0, 1, 4, 5, 11]))
    num_experts = draw(st.sampled_from([1, 6, 16, 37]))
    top_k = draw(st.sampled_from(sorted({1, min(4, num_experts), min(6, num_experts)})))
    seed = draw(st.integers(0, 10**6))
    levels, odd = draw(st.sampled_from([None, 9, 2])), draw(st.sampled_from([0.0, 0.2, 1.0]))
    scores = random_scores(num_tokens, num_experts, seed, dtype=draw(DTYPES), levels=levels, odd=odd)
    num_similar = max(1, num_experts - draw(st.sampled_from([0, 0, 2])))
    similarity = random_similarity(num_similar, seed, dtype=draw(DTYPES), levels=draw(st.sampled_from([None, 3])))
    valid = random_valid_tokens(num_tokens, draw(st.sampled_from(["none", "mask", "count"])), seed)
    rest = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([0.0, 0.1, -1.0])), valid
    rest = (*rest, draw(st.sampled_from([None, None, 4])))
    expected = reference.topk_sere(scores, top_k, similarity, *rest)
    if draw(st.booleans()):
        scores, similarity = scores.t().contiguous().t(), similarity.t().contiguous().t()
    before = scores.clone()
    assert_same(implementation(scores, top_k, similarity, *rest), expected)
    torch.testing.assert_close(scores, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize(("block_t", "block_v"), [(1, 2), (2, 16), (8, 4)])
def test_tile_sizes_do_not_change_the_result(block_t, block_v, one_launch):
    config = triton_kernel.Config(block_t, 32, block_v, num_warps=1, one_launch=one_launch)
    args = random_scores(7, 20, levels=6), 4, random_similarity(20), 2, 0.1, random_valid_tokens(7, "mask")
    with mock.patch.object(triton_kernel, "choose_config", return_value=config):
        assert_same(by_triton(*args), reference.topk_sere(*args))


@IMPLEMENTATIONS
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(16, 64, 8), (9, 128, 8), (3, 512, 10), (2, 1500, 4)])
def test_equals_the_reference_at_model_shapes(implementation, num_tokens, num_experts, top_k):
    scores = random_scores(num_tokens, num_experts).softmax(-1)
    args = scores, top_k, random_similarity(num_experts, levels=50), 2, 0.3
    expected = reference.topk_sere(*args)
    assert not torch.equal(expected[1], expected[2])
    assert_same(implementation(*args), expected)


@IMPLEMENTATIONS
def test_without_ties_it_is_torch_topk(implementation):
    """What the pass replaces: without equal scores there is one right answer."""
    scores = random_scores(12, 40)
    values, ids, _ = implementation(scores, 6, random_similarity(40), 1, 0.0)
    expected = scores.topk(6, dim=-1)
    assert_same((values, ids), (expected.values, expected.indices))


@IMPLEMENTATIONS
def test_identities(implementation):
    scores, similarity = random_scores(5, 16), random_similarity(16)
    for rest in ((4, 0.0), (9, 0.0), (1, 1.1), (1, 0.0, torch.tensor(0)), (1, 0.0, None, 4)):
        _, ids, new_ids = implementation(scores, 4, similarity, *rest)
        assert torch.equal(ids, new_ids)
        assert ids.data_ptr() != new_ids.data_ptr()
    _, ids, new_ids = implementation(scores, 4, similarity, 1, 0.0, None, 5)
    assert not torch.equal(ids, new_ids)


@IMPLEMENTATIONS
def test_values_keep_their_bits(implementation):
    """Values are the scores themselves, also -0.0, which ties with 0.0, and the smallest of each sign."""
    tiny = torch.finfo(torch.float32).smallest_normal
    scores = torch.tensor([[0.0, -0.0, -tiny, tiny, float("-inf"), float("inf")]])
    values, ids, _ = implementation(scores, 6, random_similarity(6), 1, 0.0)
    assert ids.tolist() == [[5, 3, 0, 1, 2, 4]]
    assert torch.equal(values.view(torch.int32), scores[:, ids[0]].view(torch.int32))


@IMPLEMENTATIONS
def test_float64_scores(implementation):
    scores = random_scores(5, 9, dtype=torch.float64)
    scores[:, 1] = scores[:, 0].nextafter(torch.tensor(9.0, dtype=torch.float64))  # equal in float32
    args = scores, 4, random_similarity(9), 1, 0.0
    assert_same(implementation(*args), reference.topk_sere(*args))


@pytest.mark.parametrize("num_experts", [1, 8, 60, 64, 128, 256, 384, 512, 1024, 2048])
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 8192])
def test_choose_config_keeps_tiles_in_registers(num_tokens, num_experts):
    config = triton_kernel.choose_config(num_tokens, num_experts, 8)
    assert all(size & (size - 1) == 0 for size in dataclasses.astuple(config)[:3])
    assert num_experts <= config.BLOCK_E
    assert config.BLOCK_V * config.BLOCK_E <= 8192
    assert config.BLOCK_T * 8 * config.BLOCK_E <= 8192 or config.BLOCK_T == 1
    assert config.one_launch == (num_tokens * config.BLOCK_E <= 32768 and num_experts <= 1024)


@pytest.mark.gpu
@given(data=st.data())
def test_equals_the_reference_on_a_gpu(data):
    """Few shapes, so that few kernels are compiled, and many batches."""
    num_tokens = data.draw(st.sampled_from([1, 3, 16, 64, 256, 300, 4000]))
    num_experts, top_k = data.draw(st.sampled_from([(64, 6), (128, 8), (60, 4), (512, 10)]))
    seed = data.draw(st.integers(0, 10**6))
    dtype, levels = data.draw(DTYPES), data.draw(st.sampled_from([None, 50]))
    scores = random_scores(num_tokens, num_experts, seed, dtype=dtype, levels=levels, odd=0.01)
    valid = random_valid_tokens(num_tokens, "mask", seed)
    args = scores, top_k, random_similarity(num_experts, seed), data.draw(st.sampled_from([1, 2])), 0.3, valid
    assert_same(by_triton(*args), reference.topk_sere(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 2000])
def test_graph_capture_and_replay_with_changed_inputs(num_tokens):
    inputs = [random_scores(num_tokens, 128).cuda(), random_similarity(128).cuda(), torch.ones(num_tokens).bool().cuda()]

    def call() -> tuple[Tensor, ...]:
        return triton_kernel.topk_sere(inputs[0], 8, inputs[1], 2, 0.1, inputs[2])

    call()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2, 3):
        changed = [random_scores(num_tokens, 128, seed, levels=90), random_similarity(128, seed)]
        changed.append(random_valid_tokens(num_tokens, "mask", seed))
        for static, new in zip(inputs, changed, strict=True):
            static.copy_(new)
        graph.replay()
        expected = reference.topk_sere(changed[0], 8, changed[1], 2, 0.1, changed[2])
        assert_same(tuple(t.cpu() for t in captured), expected)
