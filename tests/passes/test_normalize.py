"""normalize: one vocabulary, the same numbers, and in-place ops made functional only where nothing can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moe_fx.passes.graph import op
from moe_fx.passes.normalize import NormalizeError, normalize


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def normalized(f: Callable[..., Any], *args: Any, **compile_options: Any) -> tuple[fx.GraphModule, Any]:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(normalize(gm))
        return graphs[-1].forward

    result = torch.compile(f, backend=backend, **compile_options)(*args)
    return graphs[0], result


def mutations(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]


def masked_by_vmap(x: Tensor, window: Tensor) -> Tensor:
    """Attention with a mask that is made under vmap, as some models make theirs."""
    near = torch.vmap(torch.vmap(lambda q, k: (q - k).abs() <= window, in_dims=(None, 0)), in_dims=(0, None))
    places = torch.arange(x.shape[0])
    scores = (x @ x.T).masked_fill(~near(places, places), float("-inf"))
    return scores.softmax(-1).topk(2).values


def test_what_stands_under_vmap_is_read_where_no_gradient_is_needed() -> None:
    x, window = torch.randn(5, 4), torch.tensor(2)
    with torch.no_grad():
        gm, result = normalized(masked_by_vmap, x, window)
        torch.testing.assert_close(result, masked_by_vmap(x, window), rtol=0, atol=0)
        other, narrow = torch.randn(5, 4), torch.tensor(1)
        torch.testing.assert_close(gm(other, narrow)[0], masked_by_vmap(other, narrow), rtol=0, atol=0)
    assert "topk" in [op(n) for n in gm.graph.nodes]


def test_what_stands_under_vmap_is_not_read_below_autograd() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="holds what was only traced"):
        normalized(masked_by_vmap, torch.randn(5, 4, requires_grad=True), torch.tensor(2))


def test_all_spellings_become_one() -> None:
    for spelling in (lambda x: torch.topk(x, 2), lambda x: x.topk(2, dim=-1), lambda x: torch.Tensor.topk(x, k=2)):
        gm, _ = normalized(spelling, torch.randn(3, 5))
        assert "topk" in [op(n) for n in gm.graph.nodes]
        torch._dynamo.reset()


def test_module_paths_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    gm, _ = normalized(model, torch.randn(3, 4))
    from moe_fx.passes.graph import module_path

    assert [module_path(n) for n in gm.graph.nodes if op(n) == "linear"] == ["0", "1.1"]


def test_an_in_place_op_on_a_private_value_becomes_functional() -> None:
    def renormalised(x: Tensor) -> Tensor:
        weights = x.softmax(-1)
        weights /= weights.sum(-1, keepdim=True)
        mask = torch.zeros_like(weights)
        mask.scatter_(1, torch.tensor([[0], [1]]), 1.0)
        return weights * mask

    x = torch.randn(2, 4)
    gm, result = normalized(renormalised, x)
    assert mutations(gm) == []
    torch.testing.assert_close(result, renormalised(x))


def test_later_readers_see_the_change_and_earlier_ones_do_not() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        before = y + 1
        y.add_(10)
        return before, y * 3

    x = torch.randn(4)
    gm, result = normalized(f, x)
    assert mutations(gm) == []
    torch.testing.assert_close(result, f(x))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.add_(1),  # an input of the graph
        lambda x: ((y := x * 2).view(-1), y.add_(1))[0],  # an alias made before is read after
        lambda x: (x * 2)[0].mul_(3),  # a view itself
        lambda x: (x.bfloat16() * 2).add_(x),  # the functional form would promote
    ],
)
def test_what_others_can_see_stays_in_place(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3)
    expected_input = x.clone()
    want = f(expected_input)
    given = x.clone()
    gm, got = normalized(f, given)
    assert mutations(gm) != []
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(given, expected_input)


def test_dynamic_sizes_stay_symbols() -> None:
    gm, _ = normalized(lambda x: x.reshape(-1, 4).softmax(-1), torch.randn(3, 2, 4), dynamic=True)
    (softmax,) = [n for n in gm.graph.nodes if op(n) == "softmax"]
    assert isinstance(softmax.meta["val"].shape[0], torch.SymInt)


def test_placeholders_keep_what_dynamo_says_of_them() -> None:
    model = nn.Linear(4, 4)
    before: list[Any] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        new = normalize(gm)
        for old_node, new_node in zip(*(g.graph.find_nodes(op="placeholder") for g in (gm, new)), strict=True):
            graph_arguments = (old_node.meta["grapharg"], new_node.meta["grapharg"])
            before.append((old_node._dynamo_source, new_node._dynamo_source, *graph_arguments))
        assert new.meta["dynamo_compile_id"] == gm.meta["dynamo_compile_id"]
        return new.forward

    torch.compile(model, backend=backend)(torch.randn(2, 4))
    assert len(before) == 3
    assert all(a is b and c is d for a, b, c, d in before)


def test_what_cannot_be_retraced_is_an_error_with_a_reason() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(NormalizeError, match="no tensor input"):
        normalize(gm)


@pytest.mark.parametrize("dim", [0, 1, -2])
@pytest.mark.parametrize("name", ["topk", "max", "max with its axis", "argmax"])
def test_a_choice_along_another_axis_becomes_one_along_the_last(name: str, dim: int) -> None:
    def chosen(x: Tensor) -> Any:
        if name == "topk":
            return tuple(x.topk(2, dim))
        return x.argmax(dim) if name == "argmax" else tuple(x.max(dim, keepdim=name != "max"))

    x = torch.randn(4, 3, 5)
    gm, result = normalized(chosen, x)
    torch.testing.assert_close(result, chosen(x), rtol=0, atol=0)
    (node,) = [n for n in gm.graph.nodes if op(n) in ("topk", "max", "argmax")]
    assert node.args[-1 if name == "topk" else 1] == -1
    assert node.args[0].op == "call_function"
    for result_node, want in zip(gm.graph.output_node().args[0], result if isinstance(result, tuple) else [result], strict=True):
        assert result_node.meta["val"].shape == want.shape


@pytest.mark.parametrize(
    "choose", [lambda x: x.topk(2), lambda x: x.max(-1), lambda x: x.max(), lambda x: x.argmax(), lambda x: x.long().max(0)]
)
def test_other_choices_stay_as_they_are(choose: Callable[[Tensor], Any]) -> None:
    gm, _ = normalized(choose, torch.randn(4, 3))
    assert "permute" not in [op(n) for n in gm.graph.nodes]
