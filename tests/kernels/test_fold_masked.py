"""fold_masked on CPU and in Triton: equal to the reference, and true to properties that need no reference."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.kernels import cpu, reference
from moe_fx.kernels import fold_masked as triton_kernel
from moe_fx.testing import FLOAT_DTYPES, ID_DTYPES, poisoned_allocations, random_routing, tolerance


def on_cpu(*args: object) -> tuple[Tensor, Tensor]:
    return cpu.fold_masked(*args)


def by_triton(*args: object) -> tuple[Tensor, Tensor]:
    """The Triton launcher with all tensors on its device and every allocation poisoned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with poisoned_allocations():
        moved = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
        weights, ids = triton_kernel.fold_masked(*moved)
        return weights.cpu(), ids.cpu()


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [on_cpu, by_triton])
SHAPES = {
    "num_tokens": st.sampled_from([0, 1, 2, 5, 17]),
    "top_k": st.integers(1, 6),
    "seed": st.integers(0, 10**6),
    "off": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
}


@IMPLEMENTATIONS
@given(
    **SHAPES,
    ids_dtype=st.sampled_from(ID_DTYPES),
    dtype=st.sampled_from(FLOAT_DTYPES),
    contiguous=st.booleans(),
    block_t=st.sampled_from([1, 4, 32]),
    one_launch=st.booleans(),
)
def test_equals_the_reference(
    implementation, num_tokens, top_k, seed, off, ids_dtype, dtype, contiguous, block_t, one_launch
):
    weights, ids = random_routing(
        num_tokens, top_k, top_k + 9, seed, dtype=dtype, ids_dtype=ids_dtype, off=off, beyond=0.1
    )
    weights = weights.masked_fill(ids < 0, float("nan"))  # whatever an off pick weighs, it weighs 0 afterwards
    expected = reference.fold_masked(weights, ids)
    if not contiguous:
        weights, ids = weights.t().contiguous().t(), ids.t().contiguous().t()
    before = ids.clone()
    config = triton_kernel.Config(block_t, BLOCK_K=8, BLOCK_C=16, num_warps=1, one_launch=one_launch)
    with (
        mock.patch.object(triton_kernel, "choose_config", return_value=config),
        mock.patch.object(triton_kernel, "CHUNK", 16),
    ):
        new_weights, new_ids = implementation(weights, ids)
    assert new_weights.dtype == dtype
    assert new_ids.dtype == ids_dtype
    assert new_weights.is_contiguous()
    assert new_ids.is_contiguous()
    assert torch.equal(new_weights, expected[0])
    assert torch.equal(new_ids, expected[1])
    assert torch.equal(ids, before)
    assert ids.numel() == 0 or new_ids.data_ptr() != ids.data_ptr()


@IMPLEMENTATIONS
def test_equals_the_reference_at_model_shapes(implementation):
    for num_tokens, top_k in ((16, 8), (64, 6), (2000, 3)):
        weights, ids = random_routing(num_tokens, top_k, 64, off=0.6)
        result, expected = implementation(weights, ids), reference.fold_masked(weights, ids)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


def test_the_reference_serves_where_torch_has_no_numpy(monkeypatch):
    weights, ids = random_routing(5, 4, 9, off=0.5)
    expected = cpu.fold_masked(weights, ids)
    monkeypatch.setattr(cpu, "np", None)
    assert torch.equal(cpu.fold_masked(weights, ids)[1], expected[1])


@IMPLEMENTATIONS
@given(**SHAPES)
def test_folding_reads_no_expert_that_was_not_read(implementation, num_tokens, top_k, seed, off):
    weights, ids = random_routing(num_tokens, top_k, top_k + 9, seed, off=off)
    new_weights, new_ids = implementation(weights, ids)
    on = ids >= 0
    assert (new_ids >= 0).all()
    assert torch.equal(new_ids[on], ids[on])
    assert torch.equal(new_weights[on], weights[on])
    assert (new_weights[~on] == 0).all()
    if on.any():
        assert torch.equal(new_ids.unique(), ids[on].unique())
    else:
        assert (new_ids == 0).all()


@IMPLEMENTATIONS
@given(**SHAPES)
def test_folding_does_not_change_the_layer_output(implementation, num_tokens, top_k, seed, off):
    weights, ids = random_routing(num_tokens, top_k, top_k + 9, seed, off=off)
    expert_outputs = torch.randn(top_k + 9, 4, generator=torch.Generator().manual_seed(seed))
    outputs_of_picks = torch.where((ids >= 0)[..., None], expert_outputs[ids.clamp(min=0)], 0)
    expected = (weights[..., None] * outputs_of_picks).sum(1)
    new_weights, new_ids = implementation(weights, ids)
    folded = (new_weights[..., None] * expert_outputs[new_ids]).sum(1)
    torch.testing.assert_close(folded, expected, **tolerance(torch.float32))


@IMPLEMENTATIONS
def test_by_hand(implementation):
    weights = torch.ones(3, 3)
    ids = torch.tensor([[-1, 4, 7], [-1, -1, -1], [2, -1, 9]])
    new_weights, new_ids = implementation(weights, ids)
    assert new_ids.tolist() == [[4, 4, 7], [2, 2, 2], [2, 2, 9]]
    assert new_weights.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 1]]


@IMPLEMENTATIONS
@pytest.mark.parametrize("num_tokens", [300, 1500])
@pytest.mark.parametrize("ids_dtype", ID_DTYPES)
def test_the_lowest_active_expert_is_found_anywhere_in_the_batch(implementation, num_tokens, ids_dtype):
    ids = torch.full((num_tokens, 4), -1, dtype=ids_dtype)
    ids[0, 2], ids[-1, 1] = 9, 5
    new_ids = implementation(torch.ones(num_tokens, 4), ids)[1]
    assert (new_ids[0] == 9).all()
    assert (new_ids[1:] == 5).all()


@pytest.mark.gpu
def test_graph_capture_and_replay_with_changed_inputs():
    for num_tokens in (16, 4000):
        weights, ids = random_routing(num_tokens, 8, 64, off=0.5)
        inputs = [weights.cuda(), ids.cuda()]
        triton_kernel.fold_masked(*inputs)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = triton_kernel.fold_masked(*inputs)
        for seed in (1, 2, 3):
            changed = random_routing(num_tokens, 8, 64, seed, off=0.9)
            for static, new in zip(inputs, changed, strict=True):
                static.copy_(new)
            graph.replay()
            expected = reference.fold_masked(*changed)
            assert torch.equal(captured[0].cpu(), expected[0])
            assert torch.equal(captured[1].cpu(), expected[1])
