"""fused_experts on CPU and in Triton: equal to the reference, and true to properties that need no reference."""

from __future__ import annotations

import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.kernels import experts_cpu, reference
from moe_fx.kernels import fused_experts as triton_kernel
from moe_fx.testing import FLOAT_DTYPES, ID_DTYPES, poisoned_allocations, random_routing, tolerance


@dataclass(frozen=True)
class Case:
    """A layer and its picks, from sizes and a seed."""

    num_tokens: int = 5
    top_k: int = 3
    num_experts: int = 6
    hidden: int = 16
    intermediate: int = 12
    out: int = 16
    seed: int = 0
    dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64
    activation: str = "silu"
    gated: str = "concatenated"
    transposed: bool = False
    limit: float | None = None
    bias: bool = False
    off: float = 0.0
    beyond: float = 0.0
    duplicates: bool = False
    contiguous: bool = True

    def random(self, *shape: int, salt: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10 + salt)
        return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

    def strided(self, tensor: Tensor) -> Tensor:
        """The same values, with other strides where the case is not contiguous."""
        return tensor if self.contiguous else tensor.mT.contiguous().mT

    def picks(self) -> tuple[Tensor, Tensor]:
        weights, ids = random_routing(
            self.num_tokens, self.top_k, self.num_experts, self.seed, dtype=self.weights_dtype,
            ids_dtype=self.ids_dtype, off=self.off, beyond=self.beyond, duplicates=self.duplicates,
        )  # fmt: skip
        is_expert = (ids >= 0) & (ids < self.num_experts)
        return weights.masked_fill(~is_expert, math.nan), ids

    def tensors(self) -> list[Any]:
        """The first seven arguments.  Experts that nobody picked are NaN, and so are the weights of picks that are off.

        Sizes are such that results are below 1: there the tolerances are those of a few roundings.
        """
        gate_up = self.intermediate * (1 if self.gated == "none" else 2)
        w_gate_up = self.random(self.num_experts, gate_up, self.hidden, salt=1, scale=self.hidden**-0.5)
        w_down = self.random(self.num_experts, self.out, self.intermediate, salt=2, scale=self.intermediate**-0.5)
        b_gate_up = self.random(self.num_experts, gate_up, salt=3, scale=0.2)
        b_down = self.random(self.num_experts, self.out, salt=4, scale=0.2)
        weights, ids = self.picks()
        for expert in set(range(self.num_experts)) - set(ids.flatten().tolist()):
            for parameter in (w_gate_up, w_down, b_gate_up, b_down):
                parameter[expert] = math.nan
        if self.transposed:
            w_gate_up, w_down = w_gate_up.mT.contiguous(), w_down.mT.contiguous()
        scale = 0.25 if self.activation == "relu2" else 0.5
        tensors = [self.random(self.num_tokens, self.hidden, salt=5, scale=scale), w_gate_up, w_down, weights, ids]
        biases = [b_gate_up, b_down] if self.bias else [None, None]
        return [*map(self.strided, tensors), *biases]

    def settings(self) -> tuple[Any, ...]:
        return self.activation, self.gated, self.transposed, 1.702, self.limit


def by_hand(case: Case) -> Tensor:
    """Pick by pick, in float64, with nothing in common with the implementations."""
    hidden, w_gate_up, w_down, weights, ids, b_gate_up, b_down = case.tensors()
    if case.transposed:
        w_gate_up, w_down = w_gate_up.mT, w_down.mT
    out = torch.zeros(case.num_tokens, case.out, dtype=torch.float64)
    for t in range(case.num_tokens):
        for k in range(case.top_k):
            e = int(ids[t, k])
            if not 0 <= e < case.num_experts:
                continue
            gate_up = w_gate_up[e].double() @ hidden[t].double()
            gate_up = gate_up + b_gate_up[e].double() if case.bias else gate_up
            down = w_down[e].double() @ between(gate_up, case)
            down = down + b_down[e].double() if case.bias else down
            out[t] += float(weights[t, k]) * down
    return out


def between(gate_up: Tensor, case: Case) -> Tensor:
    act = {
        "silu": lambda x: x / (1 + (-x).exp()),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: torch.where(x > 0, x, 0.0),
        "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
        "swiglu_clamped": lambda x: x / (1 + (-1.702 * x).exp()),
    }[case.activation]
    if case.gated == "none":
        return act(gate_up)
    half = len(gate_up) // 2
    gate, up = (gate_up[:half], gate_up[half:]) if case.gated == "concatenated" else (gate_up[0::2], gate_up[1::2])
    if case.limit is not None:
        gate = torch.where(gate > case.limit, case.limit, gate)
        up = torch.where(up > case.limit, case.limit, torch.where(up < -case.limit, -case.limit, up))
    return act(gate) * (up + 1 if case.activation == "swiglu_clamped" else up)


def on_cpu(tensors: list[Any], case_settings: tuple[Any, ...]) -> Tensor:
    with poisoned_allocations():
        return experts_cpu.fused_experts(*tensors, *case_settings)


def by_triton(tensors: list[Any], case_settings: tuple[Any, ...]) -> Tensor:
    """The Triton launcher with all tensors on its device and every allocation poisoned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with poisoned_allocations():
        moved = [value if value is None else value.to(device) for value in tensors]
        return triton_kernel.fused_experts(*moved, *case_settings).cpu()


def by_reference(tensors: list[Any], case_settings: tuple[Any, ...]) -> Tensor:
    return reference.fused_experts(*tensors, *case_settings)


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [on_cpu, by_triton])
ALL = pytest.mark.parametrize("implementation", [by_reference, on_cpu, by_triton])
LAYOUTS = [
    *(
        (activation, gated, limit)
        for activation in reference.ACTIVATIONS
        for gated in ("concatenated", "interleaved")
        for limit in (None, 0.3)
    ),
    *((activation, "none", None) for activation in reference.ACTIVATIONS if activation != "swiglu_clamped"),
]


def draw_case(data: st.DataObject, tokens: list[int]) -> Case:
    activation, gated, limit = data.draw(st.sampled_from(LAYOUTS))
    num_experts = data.draw(st.sampled_from([1, 5, 9]))
    return Case(
        num_tokens=data.draw(st.sampled_from(tokens)),
        top_k=data.draw(st.sampled_from(sorted({1, min(3, num_experts), num_experts}))),
        num_experts=num_experts,
        hidden=data.draw(st.sampled_from([8, 17])),
        intermediate=data.draw(st.sampled_from([4, 11])),
        out=data.draw(st.sampled_from([8, 19])),
        seed=data.draw(st.integers(0, 10**6)),
        dtype=data.draw(st.sampled_from(FLOAT_DTYPES)),
        weights_dtype=data.draw(st.sampled_from(FLOAT_DTYPES)),
        ids_dtype=data.draw(st.sampled_from(ID_DTYPES)),
        activation=activation,
        gated=gated,
        transposed=data.draw(st.booleans()),
        limit=limit,
        bias=data.draw(st.booleans()),
        off=data.draw(st.sampled_from([0.0, 0.4, 1.0])),
        beyond=data.draw(st.sampled_from([0.0, 0.2])),
        duplicates=data.draw(st.booleans()),
        contiguous=data.draw(st.booleans()),
    )


def check(implementation: Any, case: Case) -> None:
    tensors = case.tensors()
    before = [value if value is None else value.clone() for value in tensors]
    result, expected = implementation(tensors, case.settings()), by_reference(tensors, case.settings())
    assert result.dtype == case.dtype
    assert result.shape == (case.num_tokens, case.out)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, **tolerance(case.dtype))
    for value, was in zip(tensors, before, strict=True):
        assert value is None or torch.equal(value.nan_to_num(), was.nan_to_num())


@given(data=st.data())
@settings(max_examples=5 * settings.default.max_examples)
def test_on_cpu_equals_the_reference(data):
    check(on_cpu, draw_case(data, [0, 1, 2, 5, 17]))


@pytest.mark.parametrize("is_slow", [True, False])
@given(data=st.data())
def test_on_cpu_with_and_without_instructions_for_narrow_products(is_slow, data):
    case = draw_case(data, [1, 5, 17])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_cpu, "_is_slow", lambda dtype: is_slow and dtype.itemsize == 2)
        check(on_cpu, case)


def apart(weight: Tensor | None, stacked: bool) -> list[Tensor]:
    return [] if weight is None else [weight] if stacked else [*weight.unbind()]


def halves(gate_up: Tensor | None, case: Case) -> tuple[Tensor | None, Tensor | None]:
    if gate_up is None:
        return None, None
    gate, up = gate_up.chunk(2, dim=-1 if case.transposed or gate_up.dim() == 2 else 1)
    return gate, up


@given(data=st.data())
@settings(max_examples=3 * settings.default.max_examples)
def test_weights_kept_apart_equal_the_reference(data):
    """By expert, or gate from up, or both; what nobody picked is NaN."""
    case = draw_case(data, [0, 1, 2, 5, 17])
    hidden, w_gate_up, w_down, weights, ids, b_gate_up, b_down = case.tensors()
    splits = case.gated == "concatenated" and data.draw(st.booleans())
    (w_gate, w_up), (b_gate, b_up) = (halves(t, case) if splits else (t, None) for t in (w_gate_up, b_gate_up))
    lists = [apart(t, data.draw(st.booleans())) for t in (w_gate, w_up, w_down, b_gate, b_up, b_down)]
    args = (hidden, *lists[:3], weights, ids, *lists[3:], *case.settings())
    expected = by_reference(case.tensors(), case.settings())
    for result in (reference.separate_experts(*args), torch.ops.moe_fx.separate_experts(*args)):
        assert result.dtype == case.dtype
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected, **tolerance(case.dtype))


@given(data=st.data())
def test_by_triton_equals_the_reference(data):
    check(by_triton, draw_case(data, [0, 1, 5]))


@ALL
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("activation", "gated", "limit"), LAYOUTS)
def test_equals_a_loop_by_hand(implementation, activation, gated, limit, transposed):
    case = Case(
        num_tokens=3, num_experts=4, top_k=2, activation=activation, gated=gated, limit=limit, transposed=transposed,
        bias=True, off=0.2, duplicates=True, seed=3,
    )  # fmt: skip
    result = implementation(case.tensors(), case.settings())
    torch.testing.assert_close(result.double(), by_hand(case), **tolerance(torch.float32))


@IMPLEMENTATIONS
@pytest.mark.parametrize(("num_tokens", "dtype"), [(1, torch.bfloat16), (3, torch.float32), *((40, d) for d in FLOAT_DTYPES)])
def test_equals_the_reference_at_larger_sizes(implementation, num_tokens, dtype):
    """More rows per expert than one tile has, and sizes that fill whole tiles and slices."""
    case = Case(num_tokens, top_k=4, num_experts=8, hidden=128, intermediate=64, out=64, dtype=dtype, off=0.2, bias=True)
    check(implementation, case)


@pytest.mark.parametrize("block_t", [16, 32])
@pytest.mark.parametrize("block_s", [1, 4, 64])
@pytest.mark.parametrize("one_launch", [False, True])
def test_every_pick_is_sorted_into_a_tile_of_its_expert(block_t, block_s, one_launch, device):
    """Tiles cover the merged picks exactly once, with one launch and with two, for more tokens than one block."""
    case = Case(num_tokens=50, top_k=4, num_experts=6, off=0.3, beyond=0.1, duplicates=True)
    weights, ids = case.picks()
    tile = triton_kernel.Tile(16, 16, num_warps=1, num_stages=1)
    config = triton_kernel.Config(block_t, tile, tile, block_s, BLOCK_N=32, one_launch=one_launch)
    with poisoned_allocations():
        rows = triton_kernel._sort_picks(weights.to(device), ids.to(device), case.num_experts, config)
    found: dict[tuple[int, int], float] = {}
    to_expert, to_row, num_rows = (value.tolist() for value in rows.tiles)
    for index in range(rows.most_tiles):
        for row in range(to_row[index], to_row[index] + num_rows[index]):
            key = int(rows.to_token[row]), to_expert[index]
            assert key not in found
            found[key] = float(rows.weights[row])
    expected: dict[tuple[int, int], float] = {}
    for token, (ids_there, weights_there) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(ids_there, weights_there, strict=True):
            if 0 <= expert < case.num_experts:
                expected[token, expert] = expected.get((token, expert), 0.0) + weight
    assert found == pytest.approx(expected)
    pick_to_row = rows.pick_to_row.reshape(ids.shape).cpu()
    assert (pick_to_row >= 0).sum() == len(expected)
    assert (pick_to_row[(ids < 0) | (ids >= case.num_experts)] == -1).all()


@pytest.mark.parametrize("launches", [(False, False), (True, False), (True, True)], ids=["four", "three", "two"])
@given(data=st.data())
def test_tile_sizes_and_launches_do_not_change_the_result(launches, data):
    case = replace(draw_case(data, [0, 1, 2, 7, 16]), contiguous=True)
    tiles = [triton_kernel.Tile(size, 16, num_warps=1, num_stages=1) for size in data.draw(st.permutations([16, 32]))]
    config = triton_kernel.Config(16, *tiles, 4, 32, data.draw(st.booleans()), *launches)
    with mock.patch.object(triton_kernel, "choose_config", return_value=config):
        check(by_triton, case)


def test_tiles_grow_with_the_rows_of_an_expert():
    configs = [
        triton_kernel.choose_config(num_tokens, 8, 128, 2048, 768, torch.bfloat16, "a card that nobody measured")
        for num_tokens in (1, 16, 17, 512, 1024, 8192)
    ]
    assert [config.BLOCK_T for config in configs] == [16, 16, 16, 32, 64, 128]
    assert [config.by_pick for config in configs] == [True, True, False, False, False, False]
    assert not any(config.sum_in_down for config in configs)


def test_measured_tiles_are_those_of_the_next_larger_batch(tmp_path, monkeypatch):
    layer = {"top_k": 2, "experts": 4, "hidden": 32, "intermediate": 16, "dtype": "float16"}
    tiles = {"gate_up": [16, 32, 1, 2], "down": [32, 16, 2, 3]}
    rest = {"BLOCK_T": 16, "BLOCK_S": 8, "BLOCK_N": 64, "one_launch": True, "by_pick": True, "sum_in_down": True}
    rows = [{"layer": layer, "tokens": 4, "config": rest | tiles}]
    rows.append({"layer": layer, "tokens": 64, "config": rest | tiles | {"BLOCK_T": 32, "by_pick": False}})
    (tmp_path / "A_Card.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(triton_kernel, "CONFIGS", tmp_path)
    choose = triton_kernel.choose_config
    first, second = (choose(tokens, 2, 4, 32, 16, torch.float16, "A Card") for tokens in (3, 5))
    assert first == triton_kernel.Config(
        16, triton_kernel.Tile(16, 32, 1, 2), triton_kernel.Tile(32, 16, 2, 3), 8, 64, True, True, True
    )
    assert (second.BLOCK_T, second.by_pick) == (32, False)
    for other in ((65, 2, 4, 32, 16, torch.float16, "A Card"), (4, 2, 4, 32, 16, torch.float32, "A Card")):
        assert choose(*other) == choose(*other[:-1], "")
    assert choose(3, 2, 4, 32, 16, torch.float16, "Another Card") == choose(3, 2, 4, 32, 16, torch.float16)


def test_tables_of_measured_tiles_are_sound():
    for path in triton_kernel.CONFIGS.glob("*.json"):
        table = triton_kernel.measured_configs(path.stem.replace("_", " "))
        assert table, path
        for tokens, config in [item for configs in table.values() for item in configs.items()]:
            assert not config.by_pick or tokens <= config.BLOCK_T, (path, tokens)
            assert config.by_pick or not config.sum_in_down, (path, tokens)


@ALL
@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_all_picks_off_is_zero(implementation, num_tokens):
    """Every weight is NaN here, as nobody picked any expert."""
    case = Case(num_tokens, off=1.0, bias=True)
    assert torch.equal(implementation(case.tensors(), case.settings()), torch.zeros(num_tokens, 16))


@ALL
def test_two_picks_of_one_expert_are_one(implementation):
    case = Case(num_tokens=2, top_k=3, bias=True)
    hidden, w_gate_up, w_down, _, _, *biases = replace(case, num_tokens=6, top_k=6).tensors()
    hidden = hidden[:2]
    apart = torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 4.0]]), torch.tensor([[3, 1, 3], [2, 2, 2]])
    merged = torch.tensor([[0.625, 0.25], [7.0, math.nan]]), torch.tensor([[3, 1], [2, -1]])
    results = [
        implementation([hidden, w_gate_up, w_down, *picks, *biases], case.settings()) for picks in (apart, merged)
    ]
    torch.testing.assert_close(*results, **tolerance(torch.float32))


@IMPLEMENTATIONS
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_a_token_with_infinite_values_leaves_the_others_alone(implementation):
    case = Case(num_tokens=6)
    tensors = case.tensors()
    expected = implementation(tensors, case.settings())
    tensors[0][2] = math.inf
    result = implementation(tensors, case.settings())
    others = torch.arange(6) != 2
    assert torch.equal(result[others], expected[others])
    assert result[2].isnan().any()


@IMPLEMENTATIONS
def test_permuting_tokens_permutes_the_result(implementation):
    case = Case(num_tokens=9, off=0.3)
    hidden, w_gate_up, w_down, weights, ids, *biases = case.tensors()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    expected = implementation([hidden, w_gate_up, w_down, weights, ids, *biases], case.settings())
    permuted = [hidden[order], w_gate_up, w_down, weights[order], ids[order], *biases]
    torch.testing.assert_close(implementation(permuted, case.settings()), expected[order], **tolerance(torch.float32))


@IMPLEMENTATIONS
def test_the_same_call_gives_the_same_bits(implementation):
    case = Case(num_tokens=17, top_k=6, dtype=torch.bfloat16, duplicates=True)
    first, second = (implementation(case.tensors(), case.settings()) for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture
def compiled(monkeypatch):
    """The functions compiled for experts of any size, none at first, whose weights come in several tiles."""
    functions: dict[Any, Any] = {}
    monkeypatch.setattr(experts_cpu, "LEAST_BYTES_COMPILED", 0)
    monkeypatch.setattr(experts_cpu, "BYTES_OF_TILE", 256)
    monkeypatch.setattr(experts_cpu, "_compiled", functions)
    monkeypatch.setattr(experts_cpu, "_is_slow", lambda dtype: False)  # that decides, too, what is compiled
    return functions


@pytest.mark.parametrize(
    "settings_of_case",
    [
        {"dtype": torch.float16, "bias": True, "activation": "swiglu_clamped", "gated": "interleaved", "limit": 0.3},
        {"dtype": torch.float32, "activation": "relu2", "gated": "none", "hidden": 64, "intermediate": 32},
    ],
)
def test_large_experts_with_few_rows_are_compiled_once(settings_of_case, compiled):
    """One function for one token, one for each size of block, and the loop's weighted sum serve all batches."""
    for num_tokens in (9, 1, 17, 70, 2, 1):
        check(on_cpu, Case(num_tokens, top_k=3, num_experts=9, off=0.2, **settings_of_case))
    assert None not in compiled.values()
    assert len(compiled) == 4


@pytest.mark.parametrize(("is_slow", "most"), [(False, 12), (True, 32)])
def test_the_loop_serves_from_more_rows_on_where_it_multiplies_in_float32(is_slow, most, compiled, monkeypatch):
    monkeypatch.setattr(experts_cpu, "_is_slow", lambda dtype: is_slow)
    called = []
    for num_tokens in (most, most + 1):
        check(on_cpu, Case(num_tokens, top_k=1, num_experts=1, dtype=torch.bfloat16))
        called.append(list(compiled)[-1][0])
    assert called == ["_mixture", "_sum_of_picks"]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 30])
def test_every_number_of_rows_of_an_expert(num_tokens, compiled):
    check(on_cpu, Case(num_tokens, top_k=1, num_experts=1, dtype=torch.bfloat16))
    assert [key[0] for key in compiled] == ["_mixture" if num_tokens <= 12 else "_sum_of_picks"]


def test_wide_rows_go_to_the_loop_earlier(compiled, monkeypatch):
    monkeypatch.setattr(experts_cpu, "BYTES_OF_NARROW_ROWS", 0)
    for num_tokens, function in ((3, "_mixture"), (4, "_sum_of_picks")):
        compiled.clear()
        check(on_cpu, Case(num_tokens, top_k=1, num_experts=1, dtype=torch.bfloat16))
        assert [key[0] for key in compiled] == [function]


@given(
    num_tokens=st.integers(1, 12), top_k=st.integers(0, 5), num_experts=st.integers(1, 7), largest=st.sampled_from([2, 4]),
    tiles=st.sampled_from([1, 2, 5]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_blocks_hold_every_pick_and_meet_every_tile_in_turn(num_tokens, top_k, num_experts, largest, tiles, seed):
    """A tile of an expert's weights meets all blocks of the expert before another is read."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=generator)
    blocks = experts_cpu.in_blocks(ids, num_experts, largest, 12)
    tokens_of = {
        expert: tokens for expert in range(num_experts) if (tokens := (ids == expert).any(1).nonzero().flatten().tolist())
    }
    longest = max(map(len, tokens_of.values()), default=1)
    size = blocks.block_to_token.shape[1]
    assert size in ({1} if longest == 1 else {2, largest})
    assert blocks.block_to_token.shape == (sum(-(-len(tokens) // size) for tokens in tokens_of.values()), size)
    for token, picks in enumerate(ids.tolist()):
        for expert, place in zip(picks, blocks.pick_to_place[token].tolist(), strict=True):
            if expert not in tokens_of:
                assert place == -1
            else:
                assert blocks.block_to_token.flatten()[place] == token
                assert blocks.runs[place // size, 0] == expert
    for block, (expert, *_) in enumerate(blocks.runs.tolist()):
        assert set(blocks.block_to_token[block].tolist()) <= set(tokens_of[expert])

    steps, step_of = experts_cpu._steps(blocks.runs, tiles)
    visits = [tuple(step) for step in steps.tolist()]
    assert visits == sorted(set(visits))
    expected = [[(expert, tile, block) for tile in range(tiles)] for block, (expert, *_) in enumerate(blocks.runs.tolist())]
    assert [[visits[step] for step in row] for row in step_of.tolist()] == expected


@pytest.mark.parametrize("off", [0.0, 0.97])
def test_many_rows_of_an_expert_go_to_the_loop_and_many_picks_that_are_off_do_not(off):
    ids = Case(200, top_k=8, num_experts=8, off=off).picks()[1]
    assert (experts_cpu.in_blocks(ids, 8, 4, 12) is None) == (off == 0)


_functions_of_hypothesis: dict[Any, Any] = {}


@given(data=st.data())
def test_compiled_equals_the_reference(data):
    case = Case(
        num_tokens=data.draw(st.integers(1, 40)),
        top_k=4,
        num_experts=9,  # each number of them takes compiling anew
        seed=data.draw(st.integers(0, 10**6)),
        dtype=torch.bfloat16,
        ids_dtype=data.draw(st.sampled_from(ID_DTYPES)),
        bias=True,
        off=data.draw(st.sampled_from([0.0, 0.4, 0.9, 1.0])),
        beyond=data.draw(st.sampled_from([0.0, 0.2])),
        duplicates=data.draw(st.booleans()),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_cpu, "LEAST_BYTES_COMPILED", 0)
        patch.setattr(experts_cpu, "BYTES_OF_TILE", 256)
        patch.setattr(experts_cpu, "_compiled", _functions_of_hypothesis)
        check(on_cpu, case)
    assert None not in _functions_of_hypothesis.values()


def test_many_layers_meet_no_limit_of_dynamo(compiled):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for hidden in (8, 16, 24):
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            check(on_cpu, Case(3, top_k=1, num_experts=1, hidden=hidden))
    assert None not in compiled.values()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_compiled_function_serves_in_every_mode_and_with_other_threads(compiled):
    case = Case(3, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = experts_cpu.fused_experts(*case.tensors(), *case.settings())
    size = len(compiled)
    tensors = case.tensors()
    tensors[1].requires_grad_()
    assert torch.equal(experts_cpu.fused_experts(*tensors, *case.settings()), first)
    assert len(compiled) == size
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(on_cpu(case.tensors(), case.settings()), first)
    finally:
        torch.set_num_threads(threads)
    assert len(compiled) == 2 * size


def test_threads_that_meet_new_experts_at_once_compile_them_one_after_another(compiled, monkeypatch):
    compile_one, at_work, most = experts_cpu._compile, [], []

    def counted(*args: Any) -> Any:
        at_work.append(None)
        most.append(len(at_work))
        try:
            return compile_one(*args)
        finally:
            at_work.pop()

    monkeypatch.setattr(experts_cpu, "_compile", counted)
    cases = [Case(3, dtype=torch.bfloat16, hidden=hidden, off=0.2) for hidden in (16, 16, 24, 32)]
    threads_of_each = torch.get_num_threads()

    def serve(case: Case) -> Tensor:
        torch.set_num_threads(threads_of_each)  # a new thread begins with all cores, and they are a part of the key
        return experts_cpu.fused_experts(*case.tensors(), *case.settings())

    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(serve, cases))
    assert set(most) == {1}
    assert None not in compiled.values()
    assert len(most) == len(compiled) == 3, "equal experts are compiled once"
    for case, result in zip(cases, results, strict=True):
        torch.testing.assert_close(result, by_reference(case.tensors(), case.settings()), **tolerance(torch.bfloat16))


def test_the_loop_serves_where_nothing_can_be_compiled(compiled, monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(experts_cpu, "_compile", fail)
    with pytest.warns(UserWarning, match="slower than it could be.*no C.. compiler"):
        check(on_cpu, Case(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        for num_tokens in (1, 5, 40):
            check(on_cpu, Case(num_tokens, off=0.2))
    assert set(compiled.values()) == {None}


def test_the_picks_are_not_changed_and_may_have_any_strides(compiled):
    case = Case(5, top_k=3, dtype=torch.bfloat16, off=0.2)
    hidden, w_gate_up, w_down, weights, ids, *_ = case.tensors()
    expected = by_reference([hidden, w_gate_up, w_down, weights, ids], case.settings()[:0])
    strided = [value.mT.contiguous().mT for value in (hidden, weights, ids)]
    result = experts_cpu.fused_experts(strided[0], w_gate_up, w_down, *strided[1:])
    torch.testing.assert_close(result, expected, **tolerance(torch.bfloat16))
    assert None not in compiled.values()


def test_float64_on_cpu():
    check(on_cpu, Case(num_tokens=7, dtype=torch.float64, weights_dtype=torch.float64, bias=True))


def test_the_reference_serves_where_torch_has_no_numpy(monkeypatch):
    case = Case()
    expected = by_reference(case.tensors(), case.settings())
    monkeypatch.setattr(experts_cpu, "np", None)
    assert torch.equal(on_cpu(case.tensors(), case.settings()), expected)


@pytest.mark.gpu
@given(data=st.data())
def test_equals_the_reference_on_a_gpu(data):
    """Few shapes, so that few kernels are compiled, and many batches."""
    kinds = ("silu", "concatenated", False), ("swiglu_clamped", "interleaved", True)
    activation, gated, bias = data.draw(st.sampled_from(kinds))
    case = Case(
        num_tokens=data.draw(st.sampled_from([1, 3, 16, 17, 100, 1000])), top_k=4, num_experts=16, hidden=128,
        intermediate=96, out=128, seed=data.draw(st.integers(0, 10**6)), dtype=data.draw(st.sampled_from(FLOAT_DTYPES)),
        activation=activation, gated=gated, bias=bias, off=data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        duplicates=data.draw(st.booleans()),
    )  # fmt: skip
    check(by_triton, case)


@pytest.mark.gpu
@pytest.mark.parametrize("launches", [(False, False), (True, False), (True, True)], ids=["four", "three", "two"])
@pytest.mark.parametrize("off", [0.0, 0.6])
def test_launches_on_a_gpu_at_a_real_size(launches, off):
    """Enough programs to fill the card many times over, so that those that finish last are not those that began last."""
    case = Case(16, top_k=8, num_experts=64, hidden=1024, intermediate=512, out=1024, dtype=torch.bfloat16, off=off)
    tile = triton_kernel.Tile(32, 128, num_warps=4, num_stages=4)
    config = triton_kernel.Config(16, tile, tile, 16, 512, True, *launches)
    inputs = [value if value is None else value.cuda() for value in case.tensors()]
    expected = reference.fused_experts(*inputs)
    with mock.patch.object(triton_kernel, "choose_config", return_value=config):
        results = [triton_kernel.fused_experts(*inputs) for _ in range(50)]
    torch.testing.assert_close(results[0], expected, **tolerance(torch.bfloat16))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4, 2000])
def test_a_call_waits_for_no_result(num_tokens):
    case = Case(num_tokens, top_k=4, num_experts=16, hidden=64, intermediate=32, out=64, dtype=torch.bfloat16)
    inputs = [value if value is None else value.cuda() for value in case.tensors()]
    triton_kernel.fused_experts(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_kernel.fused_experts(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_graph_capture_and_replay_with_changed_inputs():
    for num_tokens in (4, 100, 2000):
        case = Case(num_tokens, top_k=4, num_experts=16, hidden=64, intermediate=32, out=64, dtype=torch.bfloat16)
        hidden, w_gate_up, w_down, weights, ids, *_ = replace(case, num_tokens=2000).tensors()
        inputs = [t.cuda() for t in (hidden[:num_tokens], w_gate_up, w_down, weights[:num_tokens], ids[:num_tokens])]
        triton_kernel.fused_experts(*inputs)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = triton_kernel.fused_experts(*inputs)
        for seed in (1, 2, 3):
            weights, ids = replace(case, seed=seed, off=0.5, duplicates=True).picks()
            inputs[3].copy_(weights)
            inputs[4].copy_(ids)
            graph.replay()
            expected = reference.fused_experts(*inputs)
            torch.testing.assert_close(captured, expected, **tolerance(torch.bfloat16))
