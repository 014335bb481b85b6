"""sere_reroute on CPU and in Triton: equal to the reference, and true to properties that need no reference."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.kernels import cpu, reference
from moe_fx.kernels import sere_reroute as triton_kernel
from moe_fx.testing import (
    FLOAT_DTYPES,
    ID_DTYPES,
    poisoned_allocations,
    random_routing,
    random_similarity,
    random_valid_tokens,
)


@dataclass(frozen=True)
class Case:
    num_tokens: int
    top_k: int
    num_experts: int
    primary: int
    seed: int
    threshold: float = 0.0
    valid_form: str = "none"
    ids_dtype: torch.dtype = torch.int64
    dtype: torch.dtype = torch.float32
    off: float = 0.0
    beyond: float = 0.0
    duplicates: bool = False
    levels: int | None = None
    nan: float = 0.0
    contiguous: bool = True

    def ids(self) -> Tensor:
        return random_routing(
            self.num_tokens, self.top_k, self.num_experts, self.seed,
            ids_dtype=self.ids_dtype, off=self.off, beyond=self.beyond, duplicates=self.duplicates,
        )[1]  # fmt: skip

    def similarity(self) -> Tensor:
        return random_similarity(self.num_experts, self.seed, dtype=self.dtype, levels=self.levels, nan=self.nan)

    def valid_tokens(self) -> Tensor | None:
        return random_valid_tokens(self.num_tokens, self.valid_form, self.seed)


# In most cases something must be able to move, so at most two fields are unusual at a time.
USUAL = {
    "num_tokens": [4, 5, 8],
    "top_k": [4, 6, 8],
    "more_experts": [8, 27, 60],
    "primary": [1, 2],
    "threshold": [0.0, 0.1, -1.0],
    "off": [0.0, 0.2],
    "nan": [0.0, 0.1],
}
UNUSUAL = {
    "num_tokens": [0, 1, 2, 3],
    "top_k": [1, 2, 3],
    "more_experts": [0, 1, 3],
    "primary": [3, 4, 9],
    "threshold": [0.5, 1.0],
    "off": [0.6, 1.0],
    "nan": [0.5, 1.0],
}


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    """Any case; ``fixed`` gives fields instead of drawing them."""
    unusual = draw(st.sets(st.sampled_from(sorted(UNUSUAL)), max_size=2))
    drawn = {name: draw(st.sampled_from((UNUSUAL if name in unusual else USUAL)[name])) for name in USUAL}
    drawn["num_experts"] = drawn["top_k"] + drawn.pop("more_experts")
    drawn |= {
        "seed": draw(st.integers(0, 10**6)),
        "valid_form": draw(st.sampled_from(["none", "mask", "count"])),
        "ids_dtype": draw(st.sampled_from(ID_DTYPES)),
        "dtype": draw(st.sampled_from(FLOAT_DTYPES)),
        "beyond": draw(st.sampled_from([0.0, 0.1])),
        "duplicates": draw(st.booleans()),
        "levels": draw(st.sampled_from([None, 3, 1])),
        "contiguous": draw(st.booleans()),
    }
    return Case(**(drawn | fixed))


def on_cpu(*args: object) -> Tensor:
    return cpu.sere_reroute(*args)


def by_triton(*args: object) -> Tensor:
    """The Triton launcher with all tensors on its device and every allocation poisoned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with poisoned_allocations():
        moved = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
        return triton_kernel.sere_reroute(*moved).cpu()


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [on_cpu, by_triton])


@IMPLEMENTATIONS
@given(case=cases())
def test_equals_the_reference(implementation, case):
    ids, similarity, valid = case.ids(), case.similarity(), case.valid_tokens()
    expected = reference.sere_reroute(ids, similarity, case.primary, case.threshold, valid)
    if not case.contiguous:
        ids, similarity = ids.t().contiguous().t(), similarity.t().contiguous().t()
        valid = torch.stack([valid, ~valid], dim=1)[:, 0] if case.valid_form == "mask" else valid
    before = ids.clone()
    new_ids = implementation(ids, similarity, case.primary, case.threshold, valid)
    assert new_ids.dtype == case.ids_dtype
    assert new_ids.is_contiguous()
    assert torch.equal(new_ids, expected)
    assert torch.equal(ids, before)
    assert new_ids.data_ptr() != ids.data_ptr() or ids.numel() == 0


@given(
    case=cases(),
    config=st.builds(
        triton_kernel.Config,
        BLOCK_P=st.sampled_from([2, 4, 32]),
        BLOCK_E=st.sampled_from([128, 256]),
        BLOCK_V=st.sampled_from([2, 4, 32]),
        num_warps=st.just(1),
        one_launch=st.booleans(),
    ),
)
def test_tile_sizes_do_not_change_the_result(case, config):
    args = (case.ids(), case.similarity(), case.primary, case.threshold, case.valid_tokens())
    with mock.patch.object(triton_kernel, "choose_config", return_value=config):
        assert torch.equal(by_triton(*args), reference.sere_reroute(*args))


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "primary"),
    [(16, 8, 64, 2), (40, 3, 512, 1), (3, 5, 1500, 2), (1, 8, 128, 1)],
    ids=str,
)
@IMPLEMENTATIONS
def test_equals_the_reference_at_model_shapes(implementation, num_tokens, top_k, num_experts, primary):
    _, ids = random_routing(num_tokens, top_k, num_experts)
    similarity = random_similarity(num_experts, levels=50)
    for threshold in (0.0, 0.9):
        args = (ids, similarity, primary, threshold)
        assert torch.equal(implementation(*args), reference.sere_reroute(*args))


def test_large_batches_equal_the_reference_on_cpu():
    _, ids = random_routing(8192, 8, 128, off=0.1)
    args = (ids, random_similarity(128), 2, 0.5, random_valid_tokens(8192, "mask"))
    assert torch.equal(cpu.sere_reroute(*args), reference.sere_reroute(*args))


def test_the_reference_serves_where_torch_has_no_numpy(monkeypatch):
    args = (random_routing(5, 4, 9)[1], random_similarity(9), 1, 0.0)
    expected = cpu.sere_reroute(*args)
    monkeypatch.setattr(cpu, "np", None)
    assert torch.equal(cpu.sere_reroute(*args), expected)


def primary_experts(case: Case) -> set[int]:
    real = reference.real_tokens(case.valid_tokens(), case.num_tokens, torch.device("cpu"))
    return {e for e in case.ids()[real][:, : case.primary].flatten().tolist() if 0 <= e < case.num_experts}


@IMPLEMENTATIONS
@given(case=cases(nan=0.0))
def test_picks_are_primary_or_critical_afterwards(implementation, case):
    ids, similarity = case.ids(), case.similarity().float()
    new_ids = implementation(ids, similarity, case.primary, case.threshold, case.valid_tokens())
    assert torch.equal(new_ids[:, : case.primary], ids[:, : case.primary])
    kept = sorted(primary_experts(case))
    for before, after in zip(ids[:, case.primary :].flatten(), new_ids[:, case.primary :].flatten(), strict=True):
        if not 0 <= before < case.num_experts or not kept:
            assert after == before
        elif after.item() not in kept:
            assert after == before
            assert case.threshold > 0
            assert similarity[before, kept].max() < torch.tensor(case.threshold)
        elif after != before:
            assert before.item() not in kept


@IMPLEMENTATIONS
@given(case=cases(), thresholds=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_raising_the_threshold_never_moves_more_picks(implementation, case, thresholds):
    ids, similarity, valid = case.ids(), case.similarity(), case.valid_tokens()
    low, high = (implementation(ids, similarity, case.primary, t, valid) for t in sorted(thresholds))
    moved_low, moved_high = low != ids, high != ids
    assert not (moved_high & ~moved_low).any()
    assert torch.equal(high[moved_high], low[moved_high])


@IMPLEMENTATIONS
@given(case=cases(), shuffle=st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_result(implementation, case, shuffle):
    ids, similarity = case.ids(), case.similarity()
    real = reference.real_tokens(case.valid_tokens(), case.num_tokens, ids.device)
    order = list(range(case.num_tokens))
    shuffle.shuffle(order)
    order = torch.tensor(order, dtype=torch.int64)
    result = implementation(ids, similarity, case.primary, case.threshold, real)
    permuted = implementation(ids[order], similarity, case.primary, case.threshold, real[order])
    assert torch.equal(permuted, result[order])


@IMPLEMENTATIONS
@given(case=cases(levels=None, nan=0.0, dtype=torch.float32, beyond=0.0), shuffle=st.randoms(use_true_random=False))
def test_relabelling_experts_relabels_the_result(implementation, case, shuffle):
    ids, similarity, valid = case.ids(), case.similarity(), case.valid_tokens()
    label = list(range(case.num_experts))
    shuffle.shuffle(label)
    labels = torch.tensor([*label, -1], dtype=ids.dtype)  # the last one serves id -1
    new_similarity = torch.empty_like(similarity)
    new_similarity[labels[:-1].long()[:, None], labels[:-1].long()[None, :]] = similarity
    result = implementation(ids, similarity, case.primary, case.threshold, valid)
    relabelled = implementation(labels[ids.long()], new_similarity, case.primary, case.threshold, valid)
    assert torch.equal(relabelled, labels[result.long()])


@IMPLEMENTATIONS
@given(case=cases())
def test_applying_it_twice_is_applying_it_once(implementation, case):
    rest = (case.similarity(), case.primary, case.threshold, case.valid_tokens())
    once = implementation(case.ids(), *rest)
    assert torch.equal(implementation(once, *rest), once)


@IMPLEMENTATIONS
@given(case=cases())
def test_no_more_experts_are_active_afterwards(implementation, case):
    ids = case.ids()
    new_ids = implementation(ids, case.similarity(), case.primary, case.threshold, case.valid_tokens())
    assert reference.count_active(new_ids, case.num_experts) <= reference.count_active(ids, case.num_experts)


@IMPLEMENTATIONS
def test_identities(implementation):
    _, ids = random_routing(5, 4, 16)
    similarity = random_similarity(16)
    assert not torch.equal(implementation(ids, similarity, 1, 0.0), ids)
    assert torch.equal(implementation(ids, similarity, 4, 0.0), ids)
    assert torch.equal(implementation(ids, similarity, 9, 0.0), ids)
    assert torch.equal(implementation(ids, similarity, 1, 1.1), ids)
    assert torch.equal(implementation(ids, similarity, 1, 0.0, None, 4), ids)
    assert not torch.equal(implementation(ids, similarity, 1, 0.0, None, 5), ids)
    # Nobody votes: all rows are padding, or all first picks are off or no experts.
    assert torch.equal(implementation(ids, similarity, 1, 0.0, torch.zeros(5, dtype=torch.bool)), ids)
    for none in (torch.tensor([0]), torch.tensor(-2)):
        assert torch.equal(implementation(ids, similarity, 1, 0.0, none), ids)
    for no_expert in (-1, 16):
        ids[:, 0] = no_expert
        assert torch.equal(implementation(ids, similarity, 1, 0.0), ids)


@IMPLEMENTATIONS
def test_padding_does_not_vote_but_its_picks_move(implementation):
    ids = torch.tensor([[0, 1], [2, 3]])
    similarity = torch.eye(4)
    for valid in (torch.tensor([True, False]), torch.tensor(1), torch.tensor([1], dtype=torch.int32)):
        assert implementation(ids, similarity, 1, 0.0, valid).tolist() == [[0, 0], [2, 0]]


@IMPLEMENTATIONS
def test_a_nan_similarity_is_the_lowest(implementation):
    nan, inf = float("nan"), float("inf")
    ids = torch.tensor([[1, 3], [2, 0]])
    similarity = torch.ones(4, 4)
    similarity[3] = torch.tensor([0.0, nan, -2.0, 1.0])
    similarity[0] = torch.tensor([1.0, nan, -inf, 1.0])
    # Expert 3 prefers any number to NaN; to expert 0 the primary experts 1 and 2 are equally bad: the lower id.
    assert implementation(ids, similarity, 1, 0.0).tolist() == [[1, 2], [2, 1]]
    assert implementation(ids, similarity, 1, 0.1).tolist() == ids.tolist()


@IMPLEMENTATIONS
def test_comparisons_are_in_float32(implementation):
    ids = torch.tensor([[0, 2], [1, 3]])
    similarity = torch.zeros(4, 4)
    limit = torch.tensor(0.7)  # in float64, 0.7 is above it
    similarity[2, :2] = torch.stack([limit, limit.nextafter(torch.tensor(1.0))])
    similarity[3, :2] = torch.stack([limit.nextafter(torch.tensor(0.0)), torch.tensor(0.0)])
    assert implementation(ids, similarity, 1, 0.0).tolist() == [[0, 1], [1, 0]]
    assert implementation(ids, similarity, 1, 0.7).tolist() == [[0, 1], [1, 3]]
    similarity[2, 1] = 0.7
    assert implementation(ids, similarity, 1, 0.7).tolist() == [[0, 0], [1, 3]]


@pytest.mark.parametrize("num_experts", [1, 8, 60, 64, 128, 256, 384, 512, 2048])
@pytest.mark.parametrize("num_tokens", [1, 16, 512, 8192])
def test_choose_config_keeps_tiles_in_registers(num_tokens, num_experts):
    config = triton_kernel.choose_config(num_tokens, num_experts, 2)
    assert num_experts <= config.BLOCK_E
    assert config.BLOCK_P * config.BLOCK_E <= 4096
    assert not config.one_launch or config.BLOCK_E * config.BLOCK_V <= 4096
    assert config.one_launch == (num_tokens <= 512 and num_experts <= 1024)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_changed_inputs():
    for num_tokens in (16, 2000):
        _, ids = random_routing(num_tokens, 8, 128)
        inputs = [ids.cuda(), random_similarity(128).cuda(), torch.ones(num_tokens, dtype=torch.bool).cuda()]
        triton_kernel.sere_reroute(inputs[0], inputs[1], 2, 0.1, inputs[2])  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = triton_kernel.sere_reroute(inputs[0], inputs[1], 2, 0.1, inputs[2])
        for seed in (1, 2, 3):
            changed = [
                random_routing(num_tokens, 8, 128, seed, off=0.1)[1],
                random_similarity(128, seed),
                random_valid_tokens(num_tokens, "mask", seed),
            ]
            for static, new in zip(inputs, changed, strict=True):
                static.copy_(new)
            graph.replay()
            expected = reference.sere_reroute(changed[0], changed[1], 2, 0.1, changed[2])
            assert torch.equal(captured.cpu(), expected)


@pytest.mark.gpu
def test_large_batches_equal_the_reference_on_cuda():
    for num_tokens in (512, 513, 8192, 100_000):
        _, ids = random_routing(num_tokens, 8, 128, off=0.1)
        args = (ids, random_similarity(128, levels=20), 1, 0.5, random_valid_tokens(num_tokens, "count"))
        assert torch.equal(by_triton(*args), reference.sere_reroute(*args))
