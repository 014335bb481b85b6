"""fuse_experts: MLPs in every layout must be recognised and run equal; what only resembles one must be left."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
from moe_fx.testing import tolerance

T, K, E, H, I = 5, 3, 6, 8, 10

Act = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Batched(nn.Module):
    """Every pick's own matrices, gathered, and a batched product: the form whose parts are easiest to vary."""

    def __init__(self, act: Act = silu, layout: str = "concatenated", transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.layout, self.transposed = act, layout, transposed
        width = I if layout == "none" else 2 * I
        self.router = nn.Linear(H, E, bias=False)
        gate_up, down = torch.randn(E, width, H), torch.randn(E, H, I)
        self.gate_up = nn.Parameter(gate_up.mT.contiguous() if transposed else gate_up)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.gate_up_bias = nn.Parameter(torch.randn(E, width)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(E, H)) if bias else None

    def rows(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(K, dim=0)

    def times(self, stack: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
        if self.transposed:
            out = torch.bmm(rows.unsqueeze(1), stack[ids]).squeeze(1)
        else:
            out = torch.bmm(stack[ids], rows.unsqueeze(-1)).squeeze(-1)
        return out if bias is None else out + bias[ids]

    def split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout == "interleaved":
            return gate_up[..., 0::2], gate_up[..., 1::2]
        if self.layout == "sliced":
            return gate_up[..., :I], gate_up[..., I:]
        if self.layout == "none":
            return gate_up, gate_up
        gate, up = gate_up.chunk(2, dim=-1)
        return gate, up

    def weigh(self, out: Tensor, weights: Tensor) -> Tensor:
        return (out * weights.reshape(-1, 1)).view(-1, K, H).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        flat = ids.reshape(-1)
        gate, up = self.split(self.times(self.gate_up, self.gate_up_bias, flat, self.rows(x)))
        return self.weigh(self.times(self.down, self.down_bias, flat, self.act(gate, up)), weights)


class Expanded(Batched):
    def rows(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, K, -1).reshape(-1, H)


class Sorted(Batched):
    """Picks sorted by expert, a product by group, and the sum put back by index_add."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        flat = ids.flatten()
        order = flat.argsort()
        tokens = order // K
        chosen = flat[order]
        gate, up = self.split(self.times(self.gate_up, self.gate_up_bias, chosen, x[tokens]))
        out = self.times(self.down, self.down_bias, chosen, self.act(gate, up))
        return torch.zeros_like(x).index_add(0, tokens, out * weights.flatten()[order].unsqueeze(-1))


class Guarded(Batched):
    """Ids past the experts are clamped, in place, and their rows are zeroed: there are none, unless ``last`` is smaller."""

    def __init__(self, last: int = E - 1, **layout: bool) -> None:
        super().__init__(**layout)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        chosen, order = ids.flatten().sort()
        tokens = order // K
        past = (chosen >= self.last + 1).unsqueeze(-1)
        chosen.clamp_(max=self.last)
        gate, up = self.split(self.times(self.gate_up, self.gate_up_bias, chosen, x[tokens].masked_fill(past, 0.0)))
        out = self.times(self.down, self.down_bias, chosen, self.act(gate, up)).masked_fill(past, 0.0)
        return torch.zeros_like(x).index_add(0, tokens, out * weights.flatten()[order].unsqueeze(-1))


KNOWN: dict[str, Batched] = {
    "silu": Batched(),
    "up first": Batched(lambda g, u: u * F.silu(g)),
    "interleaved": Batched(layout="interleaved"),
    "sliced": Batched(layout="sliced"),
    "transposed": Batched(transposed=True),
    "biases": Batched(bias=True),
    "transposed, interleaved, biases": Batched(layout="interleaved", transposed=True, bias=True),
    "gelu": Batched(lambda g, u: F.gelu(g) * u),
    "gelu tanh": Batched(lambda g, u: F.gelu(g, approximate="tanh") * u),
    "relu": Batched(lambda g, u: F.relu(g) * u),
    "limited": Batched(lambda g, u: F.silu(g.clamp(max=1.5)) * u.clamp(-1.5, 1.5)),
    "clamped swiglu": Batched(
        lambda g, u: (u.clamp(-2.0, 2.0) + 1) * (g.clamp(max=2.0) * torch.sigmoid(g.clamp(max=2.0) * 1.702)), bias=True
    ),
    "ungated relu squared": Batched(lambda g, u: F.relu(g).square(), layout="none"),
    "ungated gelu": Batched(lambda g, u: F.gelu(g), layout="none"),
    "expanded rows": Expanded(),
    "sorted": Sorted(bias=True),
    "guarded": Guarded(bias=True),
}


class OtherWeights(Batched):
    def weigh(self, out: Tensor, weights: Tensor) -> Tensor:
        return (out * weights.reshape(-1, 1) * weights.reshape(-1, 1)).view(-1, K, H).sum(1)


class WrongGrouping(Batched):
    """Sums neighbours that belong to different tokens."""

    def weigh(self, out: Tensor, weights: Tensor) -> Tensor:
        return (out * weights.reshape(-1, 1)).view(K, -1, H).sum(0)


class WrongRows(Batched):
    """x.repeat puts the tokens in another order than the picks."""

    def rows(self, x: Tensor) -> Tensor:
        return x.repeat(K, 1)


class ReadThroughAView(Sorted):
    """The sum is written in place and read through a view made before."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        view = out.view(-1, H)
        tokens = torch.arange(x.shape[0]).repeat_interleave(K)
        gate, up = self.split(self.times(self.gate_up, None, ids.flatten(), x[tokens]))
        out.index_add_(0, tokens, self.times(self.down, None, ids.flatten(), silu(gate, up)) * weights.reshape(-1, 1))
        return view


class InputChangedBetween(Batched):
    """The experts read the input after it was changed in place."""

    def rows(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(K, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        view = x[:]
        weights, ids = self.router(x).softmax(-1).topk(K)
        view.mul_(2)
        flat = ids.reshape(-1)
        gate, up = self.split(self.times(self.gate_up, None, flat, self.rows(x)))
        return self.weigh(self.times(self.down, None, flat, self.act(gate, up)), weights)


class DoubleBias(Batched):
    def times(self, stack: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
        assert bias is not None
        return torch.add(super().times(stack, None, ids, rows), bias[ids], alpha=2)


class Rounded(Batched):
    """Rounds on the way, and means to."""

    def times(self, stack: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
        return super().times(stack, bias, ids, rows.to(torch.float8_e4m3fn).to(torch.float32))


class Residual(Batched):
    """Every expert adds its input to its output."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        flat, rows = ids.reshape(-1), self.rows(x)
        gate, up = self.split(self.times(self.gate_up, None, flat, rows))
        return self.weigh(self.times(self.down, None, flat, self.act(gate, up)) + rows, weights)


class WeighedInput(Batched):
    """The weights scale what goes in, not what comes out."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        flat = ids.reshape(-1)
        gate, up = self.split(self.times(self.gate_up, None, flat, self.rows(x) * weights.reshape(-1, 1)))
        return self.times(self.down, None, flat, self.act(gate, up)).view(-1, K, H).sum(1)


class ScaledExperts(Batched):
    """A factor for each expert and column, after the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(E, H))

    def times(self, stack: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
        out = super().times(stack, bias, ids, rows)
        return out * self.scale[ids] if stack is self.down else out


class Dropout(Batched):
    def times(self, stack: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
        return F.dropout(super().times(stack, bias, ids, rows), 1.0, self.training)


class WeightsOfColumns(Batched):
    """There are as many picks as columns, and the weights multiply columns."""

    def weigh(self, out: Tensor, weights: Tensor) -> Tensor:
        return (out * weights.reshape(-1)).view(-1, 2, H).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[: H // 2]
        weights, ids = self.router(x).softmax(-1).topk(2)
        flat, rows = ids.reshape(-1), x.repeat_interleave(2, dim=0)
        gate, up = self.split(self.times(self.gate_up, None, flat, rows))
        return self.weigh(self.times(self.down, None, flat, self.act(gate, up)), weights)


class BoundByTensor(Batched):
    def __init__(self) -> None:
        super().__init__(lambda g, u: F.silu(torch.clamp(g, max=self.bound)) * u)
        self.bound = nn.Parameter(torch.full((I,), 0.1))


class CapacityDrops(Batched):
    """Whoever comes third to an expert is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        hot = F.one_hot(ids, E)
        place = (hot.flatten(0, 1).cumsum(0).view_as(hot) * hot).sum(-1)
        flat = ids.reshape(-1)
        gate, up = self.split(self.times(self.gate_up, None, flat, self.rows(x)))
        return self.weigh(self.times(self.down, None, flat, self.act(gate, up)), weights * (place < 3))


class OtherRow(Batched):
    """The products' rows belong to the pick before."""

    def times(self, stack: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
        return super().times(stack, bias, ids.roll(1), rows)


UNKNOWN: dict[str, Batched] = {
    "last expert masked": Guarded(last=E - 2),
    "residual": Residual(),
    "weighs the input": WeighedInput(),
    "a scale for each expert": ScaledExperts(),
    "dropout": Dropout(),
    "weights of columns": WeightsOfColumns(),
    "bound by a tensor": BoundByTensor(),
    "capacity": CapacityDrops(),
    "other picks' experts": OtherRow(),
    "tanh": Batched(lambda g, u: torch.tanh(g) * u),
    "gate used twice": Batched(lambda g, u: F.silu(g) * g),
    "halves exchanged": Batched(lambda g, u: F.silu(u) * g),
    "limit from below too": Batched(lambda g, u: F.silu(g.clamp(0.0, 1.5)) * u.clamp(-1.5, 1.5)),
    "limits differ": Batched(lambda g, u: F.silu(g.clamp(max=1.5)) * u.clamp(-1.0, 1.5)),
    "scaled": Batched(lambda g, u: F.silu(g) * u * 2.0),
    "other alpha at the gate": Batched(lambda g, u: (u + 1) * (g * torch.sigmoid(u * 1.702))),
    "relu cubed": Batched(lambda g, u: F.relu(g).pow(3), layout="none"),
    "weights squared": OtherWeights(),
    "picks of other tokens": WrongGrouping(),
    "rows of other tokens": WrongRows(),
    "read through a view": ReadThroughAView(),
    "input changed between": InputChangedBetween(),
    "twice the bias": DoubleBias(bias=True),
    "rounded on the way": Rounded(),
}


def compiled(module: nn.Module, x: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return torch.compile(module, backend="moe_sparse", options={"inner": "eager", **options})(x)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dynamic", [False, True])
def test_recognised_and_equal(name: str, dynamic: bool) -> None:
    module, x = KNOWN[name], torch.randn(T, H)
    with torch.no_grad():
        got = torch.compile(module, backend="moe_sparse", options={"inner": "eager"}, dynamic=dynamic)(x)
        torch.testing.assert_close(got, module(x), **tolerance(torch.float32))
    report = moe_fx.last_report()
    assert [s.experts for s in report.sites] == ["fused"], report.skips
    assert report.ops_after["moe_fx.fused_experts"] == 1
    assert report.ops_after["aten.bmm"] == 0


@pytest.mark.parametrize("name", UNKNOWN)
def test_left_as_it_is(name: str) -> None:
    module, x = UNKNOWN[name], torch.randn(T, H)
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), rtol=0, atol=0)
    report = moe_fx.last_report()
    assert report.ops_after["moe_fx.fused_experts"] == 0
    assert all(s.experts == "untouched" for s in report.sites)


@pytest.mark.parametrize("name", KNOWN)
def test_off_picks_are_skipped_not_folded(name: str) -> None:
    module, x = KNOWN[name], torch.randn(T, H)
    masks = moe_fx.Artifact({"": {"mask_router": torch.randn(E, H)}})
    fused = compiled(module, x, policy=moe_fx.BEAM(masks))
    assert moe_fx.last_report().ops_after["moe_fx.fold_masked"] == 0
    torch._dynamo.reset()
    folded = compiled(module, x, policy=moe_fx.BEAM(masks), fuse_experts=False)
    assert moe_fx.last_report().ops_after["moe_fx.fold_masked"] == 1
    torch.testing.assert_close(fused, folded, **tolerance(torch.float32))


def test_experts_that_learn_are_left_to_autograd() -> None:
    module, x = Batched(), torch.randn(T, H)
    result = torch.compile(module, backend="moe_sparse", options={"inner": "aot_eager"})(x)
    assert [s.experts for s in moe_fx.last_report().sites] == ["untouched"]
    result.sum().backward()
    assert module.down.grad is not None


def test_weights_and_input_of_two_dtypes_are_left() -> None:
    class Mixed(Batched):
        def times(self, stack: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
            return super().times(stack, bias, ids, rows.to(stack.dtype))

    module, x = Mixed(), torch.randn(T, H)
    module.gate_up.data = module.gate_up.data.double()
    module.down.data = module.down.data.double()
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), rtol=0, atol=0)
    (skip,) = moe_fx.last_report().skips
    assert "they stay as they are" in skip.reason


# ---------------------------------------------------------------------------------------- every expert on every token


class Dense(nn.Module):
    """Every expert on every token, summed up by a matrix of weights; each step can be written in another way."""

    def __init__(
        self,
        project: Callable[[Dense, Tensor, Tensor, Tensor | None], Tensor],
        combine: Callable[[Tensor, Tensor], Tensor],
        gates: Callable[[Tensor, Tensor], Tensor] | None = None,
        act: Act = silu,
        *,
        bias: bool = False,
        width: int = 2 * I,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.combine, self.gates, self.act = project, combine, gates or scattered, act
        self.router = nn.Linear(H, E, bias=False)
        self.gate_up, self.down = nn.Parameter(torch.randn(E, H, width)), nn.Parameter(torch.randn(E, I, H))
        self.gate_up_bias = nn.Parameter(torch.randn(E, width)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(E, H)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        gates = self.gates(weights, ids)
        inner = self.activate(self.project(self, x, self.gate_up, self.gate_up_bias))
        return self.combine(gates, self.project(self, inner, self.down, self.down_bias))

    def activate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate, up)


def scattered(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros(ids.shape[0], E).scatter(1, ids, weights)


def one_hot_sum(weights: Tensor, ids: Tensor) -> Tensor:
    return (F.one_hot(ids, E) * weights.unsqueeze(-1)).sum(dim=1)


def one_hot_einsum(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.einsum("tke,tk->te", F.one_hot(ids, E).to(weights.dtype), weights)


def by_bmm(self: Dense, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    x = x.expand(E, *x.shape) if x.dim() == 2 else x
    return torch.bmm(x, w) if b is None else torch.bmm(x, w) + b.unsqueeze(1)


def by_baddbmm(self: Dense, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    assert b is not None
    return torch.baddbmm(b[:, None, :], x.unsqueeze(0).expand(E, -1, -1) if x.dim() == 2 else x, w)


def by_matmul(self: Dense, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x.unsqueeze(0) @ w if x.dim() == 2 else x @ w


def by_broadcast(self: Dense, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.matmul(x, w)


def by_repeat(self: Dense, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Experts and tokens in one dimension between the products."""
    flat = x.repeat(E, 1) if x.shape[0] != E * T else x
    return torch.bmm(flat.view(E, -1, w.shape[1]), w).view(-1, w.shape[2])


def by_einsum_eth(self: Dense, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.einsum("th,ehi->eti" if x.dim() == 2 else "eth,ehi->eti", x, w)


def by_einsum_teh(self: Dense, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    out = torch.einsum("eab,ta->teb" if x.dim() == 2 else "eab,tea->teb", *((w, x)))
    return out if b is None else out + b


def sum_teh(gates: Tensor, every: Tensor) -> Tensor:
    return torch.einsum("te,teh->th", gates, every)


def sum_eth(gates: Tensor, every: Tensor) -> Tensor:
    return torch.einsum("eth,te->th", every, gates)


def multiply_and_sum(gates: Tensor, every: Tensor) -> Tensor:
    return (every * gates.t().unsqueeze(-1)).sum(dim=0)


def multiply_flat_and_sum(gates: Tensor, every: Tensor) -> Tensor:
    return (every * gates.transpose(0, 1).reshape(-1, 1)).view(E, -1, H).sum(dim=0)


def weigh_by_matmul(gates: Tensor, every: Tensor) -> Tensor:
    return torch.bmm(gates.unsqueeze(1), every.transpose(0, 1)).squeeze(1)


def permuted_sum(gates: Tensor, every: Tensor) -> Tensor:
    return (every.permute(1, 0, 2) * gates[:, :, None]).sum(1)


class Loop(Dense):
    """One expert after the other, by slices of the stacks."""

    def __init__(self, first: int = 0, last: int = E, bias: bool = False, terms: str = "gates", act: Act = silu) -> None:
        super().__init__(by_bmm, sum_eth, act=act, bias=bias)
        self.first, self.last, self.terms = first, last, terms

    def one(self, e: int, x: Tensor) -> Tensor:
        inner = F.linear(x, self.gate_up[e].t(), None if self.gate_up_bias is None else self.gate_up_bias[e])
        out = self.activate(inner) @ self.down[e]
        return out if self.down_bias is None else out + self.down_bias[e]

    def weight(self, e: int, weights: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if self.terms == "gates":
            return gates[:, e, None]
        if self.terms == "slice":
            return gates[:, e : e + 1]
        if self.terms == "where":
            return torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)
        return (weights * (ids == e).to(weights.dtype)).sum(-1).unsqueeze(-1)

    def begin(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        gates = scattered(weights, ids)
        out = self.begin(x)
        for e in range(self.first, self.last):
            out = out + self.one(e, x) * self.weight(e, weights, ids, gates)
        return out


class StackedLoop(Loop):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        every = torch.stack([self.one(e, x) for e in range(E)], dim=1)
        return torch.einsum("te,teh->th", scattered(weights, ids), every)


class Unbound(Loop):
    """The stacks are iterated over."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        gates = scattered(weights, ids)
        terms = [self.activate(x @ up) @ down * gates[:, e, None]
                 for e, (up, down) in enumerate(zip(self.gate_up, self.down, strict=True))]  # fmt: skip
        return sum(terms)  # type: ignore[return-value]


class Pairs(Batched):
    """Picks by einsum, as [T, K, .]."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        gate, up = self.split(torch.einsum("th,tkgh->tkg", x, self.gate_up[ids]))
        return torch.einsum("tk,tki,tkhi->th", weights, self.act(gate, up), self.down[ids])


DENSE: dict[str, nn.Module] = {
    "bmm, einsum": Dense(by_bmm, sum_eth),
    "bmm, multiply and sum": Dense(by_bmm, multiply_and_sum),
    "bmm, product with the weights": Dense(by_bmm, weigh_by_matmul),
    "bmm, biases": Dense(by_bmm, permuted_sum, bias=True),
    "baddbmm": Dense(by_baddbmm, sum_eth, bias=True),
    "matmul": Dense(by_matmul, multiply_and_sum),
    "broadcast matmul": Dense(by_broadcast, multiply_and_sum),
    "repeat": Dense(by_repeat, multiply_flat_and_sum),
    "einsum eth": Dense(by_einsum_eth, sum_eth),
    "einsum teh": Dense(by_einsum_teh, sum_teh),
    "einsum teh, biases": Dense(by_einsum_teh, sum_teh, bias=True),
    "one-hot sum": Dense(by_bmm, sum_eth, one_hot_sum),
    "one-hot einsum": Dense(by_einsum_teh, sum_teh, one_hot_einsum),
    "clamped": Dense(by_bmm, sum_eth, act=lambda g, u: F.silu(g.clamp(max=1.5)) * u.clamp(-1.5, 1.5)),
    "loop": Loop(),
    "loop, biases": Loop(bias=True),
    "loop, slices": Loop(terms="slice"),
    "loop, masks": Loop(terms="mask"),
    "loop, where": Loop(terms="where"),
    "stacked loop": StackedLoop(bias=True),
    "unbound": Unbound(),
    "pairs by einsum": Pairs(),
}  # fmt: skip


class InnerDense(Dense):
    """What comes between the projections reads more than it should."""

    def __init__(self, change: Callable[[Dense, Tensor], Tensor], **kwargs: bool) -> None:
        super().__init__(by_bmm, sum_eth, **kwargs)
        self.change = change

    def activate(self, gate_up: Tensor) -> Tensor:
        return self.change(self, super().activate(gate_up))


class DenseResidual(Dense):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        every = torch.bmm(self.activate(by_bmm(self, x, self.gate_up, None)), self.down) + x
        return sum_eth(scattered(weights, ids), every)


class SharedInTheSum(Loop):
    """An expert that is always on is a term of the same sum."""

    def begin(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.down[0].t() @ self.down[1])


class SharedInTheStack(Dense):
    """The last of the stacked experts takes every token."""

    def __init__(self) -> None:
        super().__init__(by_bmm, sum_eth)
        self.router = nn.Linear(H, E - 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        gates = torch.zeros(x.shape[0], E - 1).scatter(1, ids, weights)
        gates = torch.cat([gates, torch.ones(x.shape[0], 1)], dim=1)
        return sum_eth(gates, torch.bmm(self.activate(by_bmm(self, x, self.gate_up, None)), self.down))


class Twice(Loop):
    """One expert's term is counted twice and another's not at all."""

    def one(self, e: int, x: Tensor) -> Tensor:
        return super().one(max(e, 1), x)

    def weight(self, e: int, weights: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return super().weight(max(e, 1), weights, ids, gates)


class OthersWeight(Loop):
    def weight(self, e: int, weights: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return super().weight((e + 1) % E, weights, ids, gates)


class OthersDown(Loop):
    def one(self, e: int, x: Tensor) -> Tensor:
        return self.activate(x @ self.gate_up[e]) @ self.down[(e + 1) % E]


class OwnActivations(Loop):
    def one(self, e: int, x: Tensor) -> Tensor:
        self.act = silu if e != 3 else lambda gate, up: F.relu(gate) * up
        return super().one(e, x)


class OwnInputs(Loop):
    def one(self, e: int, x: Tensor) -> Tensor:
        return super().one(e, x * 2 if e == 2 else x)


class Chained(Loop):
    """Each expert reads what the ones before it made."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        gates, out = scattered(weights, ids), torch.zeros_like(x)
        for e in range(E):
            out = out + self.one(e, x + out) * self.weight(e, weights, ids, gates)
        return out


def summed_over_tokens(gates: Tensor, every: Tensor) -> Tensor:
    return (every * gates.t().unsqueeze(-1)).sum(dim=1)


def gates_turned(gates: Tensor, every: Tensor) -> Tensor:
    return torch.einsum("et,eth->th", gates, every)


def all_pairs_of_tokens(gates: Tensor, every: Tensor) -> Tensor:
    return torch.einsum("se,eth->th", gates, every)


def unweighted(gates: Tensor, every: Tensor) -> Tensor:
    return every.sum(0) * gates.sum(-1, keepdim=True)


def weighted_twice(gates: Tensor, every: Tensor) -> Tensor:
    return torch.einsum("te,eth->th", gates, every * gates.t().unsqueeze(-1))


def grouped_wrongly(gates: Tensor, every: Tensor) -> Tensor:
    """[E, T, H] read as [T, E, H]."""
    return torch.einsum("te,teh->th", gates, every.reshape(every.shape[1], E, H))


DENSE_UNKNOWN: dict[str, nn.Module] = {
    "residual": DenseResidual(by_bmm, sum_eth),
    "tanh": Dense(by_bmm, sum_eth, act=lambda g, u: torch.tanh(g) * u),
    "scaled between": InnerDense(lambda self, inner: inner * 0.5),
    "dropout": InnerDense(lambda self, inner: F.dropout(inner, 1.0, training=True)),
    "mixed over tokens": InnerDense(lambda self, inner: inner - inner.mean(dim=1, keepdim=True)),
    "experts exchanged": InnerDense(lambda self, inner: inner.flip(0)),
    "experts rolled": InnerDense(lambda self, inner: inner.roll(1, 0)),
    "summed over tokens": Dense(by_bmm, summed_over_tokens),
    "matrix turned": Dense(by_bmm, gates_turned),
    "all pairs of tokens": Dense(by_bmm, all_pairs_of_tokens),
    "unweighted": Dense(by_bmm, unweighted),
    "weighted twice": Dense(by_bmm, weighted_twice),
    "grouped wrongly": Dense(by_bmm, grouped_wrongly),
    "shared expert in the sum": SharedInTheSum(),
    "shared expert in the stack": SharedInTheStack(),
    "an expert missing": Loop(last=E - 1),
    "an expert twice": Twice(terms="mask"),
    "another's weight": OthersWeight(),
    "another's matrix": OthersDown(),
    "an activation of its own": OwnActivations(),
    "an input of its own": OwnInputs(),
    "one after the other": Chained(),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_dense_experts_are_recognised_and_equal(name: str, dynamic: bool) -> None:
    if dynamic and name == "repeat":
        pytest.skip("the layer itself tells its two steps apart by the number of tokens")
    module, x = DENSE[name], torch.randn(T, H)
    with torch.no_grad():
        got = torch.compile(module, backend="moe_sparse", options={"inner": "eager"}, dynamic=dynamic)(x)
        torch.testing.assert_close(got, module(x), **tolerance(torch.float32))
    report = moe_fx.last_report()
    assert [s.experts for s in report.sites] == ["fused"], report.skips
    assert report.ops_after["moe_fx.fused_experts"] == 1
    products = ("aten.bmm", "aten.baddbmm", "aten.matmul", "aten.einsum")
    assert not any(report.ops_after[p] for p in products), "what every expert computed in vain must be gone"


@pytest.mark.parametrize("name", DENSE)
def test_dense_experts_under_policies(name: str) -> None:
    """Off and rerouted picks, fused, against the dense layer on a rebuilt matrix of weights."""
    module, x = DENSE[name], torch.randn(T, H)
    generator = torch.Generator().manual_seed(1)
    tables = {"mask_router": torch.randn(E, H, generator=generator), "similarity": torch.rand(E, E, generator=generator)}
    artifact = moe_fx.Artifact({"": tables | {"similarity": (tables["similarity"] + tables["similarity"].T) / 2}})
    with torch.no_grad():
        plain = module(x)
    for policy in (moe_fx.BEAM(artifact), moe_fx.SERE(artifact, primary=1)):
        torch._dynamo.reset()
        fused = compiled(module, x, policy=policy, strict=True)
        assert [s.experts for s in moe_fx.last_report().sites] == ["fused"]
        torch._dynamo.reset()
        folded = compiled(module, x, policy=policy, fuse_experts=False, strict=True)
        assert moe_fx.last_report().ops_after["moe_fx.fused_experts"] == 0
        torch.testing.assert_close(fused, folded, **tolerance(torch.float32))
        assert not torch.allclose(fused, plain, atol=1e-2)


@pytest.mark.parametrize("name", DENSE_UNKNOWN)
@pytest.mark.parametrize("tokens", [T, E])
def test_dense_experts_that_only_resemble_an_mlp_are_left(name: str, tokens: int) -> None:
    """With as many tokens as experts, too, where shapes alone would not tell them apart."""
    if name in ("matrix turned", "summed over tokens") and tokens != E:
        pytest.skip("this layer runs with as many tokens as experts only")
    module, x = DENSE_UNKNOWN[name], torch.randn(tokens, H)
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), rtol=0, atol=0)
    report = moe_fx.last_report()
    assert report.ops_after["moe_fx.fused_experts"] == 0
    assert all(s.experts == "untouched" for s in report.sites)


@pytest.mark.parametrize("name", DENSE)
def test_as_many_tokens_as_experts(name: str) -> None:
    """Shapes alone do not tell tokens from experts."""
    module, x = DENSE[name], torch.randn(E, H)
    if name == "repeat":
        pytest.skip("the layer itself tells its two steps apart by the number of tokens")
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), **tolerance(torch.float32))
    assert [s.experts for s in moe_fx.last_report().sites] == ["fused"]


def test_every_expert_picked_leaves_no_doubt_about_what_is_equal() -> None:
    """K = E: picks and experts are as many."""

    class All(Dense):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(E)
            every = torch.bmm(self.activate(by_bmm(self, x, self.gate_up, None)), self.down)
            return sum_eth(scattered(weights, ids), every)

    module, x = All(by_bmm, sum_eth), torch.randn(T, H)
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), **tolerance(torch.float32))


def test_experts_whose_outputs_are_read_elsewhere_are_left() -> None:
    class Returned(Dense):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            weights, ids = self.router(x).softmax(-1).topk(K)
            every = torch.bmm(self.activate(by_bmm(self, x, self.gate_up, None)), self.down)
            return sum_eth(scattered(weights, ids), every), every.mean(0)

    module, x = Returned(by_bmm, sum_eth), torch.randn(T, H)
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), rtol=0, atol=0)
    assert [s.experts for s in moe_fx.last_report().sites] == ["untouched"]
    assert "read outside" in moe_fx.last_report().skips[0].reason


def test_weights_that_serve_twice_are_read_where_they_lie() -> None:
    """One parameter for both projections, and in use elsewhere in the layer."""

    class Tied(Dense):
        def __init__(self) -> None:
            super().__init__(by_bmm, sum_eth)
            self.down = nn.Parameter(torch.randn(E, H, H))

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(K)
            every = torch.bmm(F.gelu(by_bmm(self, x, self.down, None)), self.down)
            return sum_eth(scattered(weights, ids), every) + x @ self.down[0]

    module, x = Tied(), torch.randn(T, H)
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), **tolerance(torch.float32))
    assert [s.experts for s in moe_fx.last_report().sites] == ["fused"]


@pytest.mark.parametrize("name", DENSE_UNKNOWN)
def test_the_reason_names_what_is_not_known(name: str) -> None:
    if name in ("matrix turned", "summed over tokens"):
        pytest.skip("this layer runs with as many tokens as experts only")
    compiled(DENSE_UNKNOWN[name], torch.randn(T, H))
    reasons = [skip.reason for skip in moe_fx.last_report().skips]
    assert reasons, "what is left alone is reported"
    if name == "tanh":
        assert "tanh" in reasons[0]
        assert "so they stay as they are" in reasons[0]


# --------------------------------------------------------------------------------------- weights that are kept apart


class Gated(nn.Module):
    """One expert as Mixtral had it: three matrices."""

    def __init__(self, bias: bool = False, width: int = I, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, width, bias=bias), nn.Linear(H, width, bias=bias)
        self.w2, self.act = nn.Linear(width, H, bias=bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class GateUpInOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(H, 2 * I), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


class PlainMatrices(nn.Module):
    """Parameters, and no modules, in the other layout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(H, I)), nn.Parameter(torch.randn(I, H))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.up) @ self.down


class DownTurned(PlainMatrices):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(H, I))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(x @ self.up), self.down)


class ModuleListLoop(nn.Module):
    """Experts that are modules, each of them on every token."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(make(e) for e in range(E))

    def into_experts(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        out, read = torch.zeros_like(x), self.into_experts(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(read) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


class WithShared(ModuleListLoop):
    """A shared expert of the same make beside them."""

    def __init__(self) -> None:
        super().__init__(lambda e: Gated())
        self.shared = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


class Latent(ModuleListLoop):
    """All experts read a projection of the hidden states, whose weight is nobody's own."""

    def __init__(self) -> None:
        super().__init__(lambda e: Gated())
        self.latent = nn.Linear(H, H)

    def into_experts(self, x: Tensor) -> Tensor:
        return self.latent(x)


class ModulesInARing(ModuleListLoop):
    """The picks of one expert number are computed by the next one's module, which is as good a mixture as any."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        masks = [(weights * (ids == e)).sum(-1, keepdim=True) for e in range(E)]
        return sum(self.experts[(e + 1) % E](x) * mask for e, mask in enumerate(masks))


class GateAndUpApart(Batched):
    """Two stacks for what the op reads as one, for every pick its own matrices."""

    def __init__(self, **layout: bool) -> None:
        super().__init__(layout="none", **layout)
        self.up = nn.Parameter(torch.randn_like(self.gate_up))
        self.up_bias = nn.Parameter(torch.randn(E, I)) if layout.get("bias") else None

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        flat, rows = ids.reshape(-1), self.rows(x)
        gate, up = self.times(self.gate_up, self.gate_up_bias, flat, rows), self.times(self.up, self.up_bias, flat, rows)
        return self.weigh(self.times(self.down, self.down_bias, flat, silu(gate, up)), weights)


class DenseApart(Dense):
    def __init__(self) -> None:
        super().__init__(by_bmm, sum_eth, width=I)
        self.up = nn.Parameter(torch.randn(E, H, I))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        inner = silu(by_bmm(self, x, self.gate_up, None), by_bmm(self, x, self.up, None))
        return sum_eth(scattered(weights, ids), torch.bmm(inner, self.down))


APART: dict[str, nn.Module] = {
    "two layers": ModuleListLoop(lambda e: nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H))),
    "three matrices": ModuleListLoop(lambda e: Gated()),
    "three matrices and biases": ModuleListLoop(lambda e: Gated(bias=True, act=F.gelu)),
    "gate and up in one": ModuleListLoop(lambda e: GateUpInOne()),
    "parameters": ModuleListLoop(lambda e: PlainMatrices()),
    "down turned": ModuleListLoop(lambda e: DownTurned()),
    "a shared expert": WithShared(),
    "in a ring": ModulesInARing(lambda e: Gated()),
    "stacked": GateAndUpApart(),
    "stacked, transposed, biases": GateAndUpApart(transposed=True, bias=True),
    "stacked, dense": DenseApart(),
}
APART_UNKNOWN: dict[str, tuple[nn.Module, str]] = {
    "sizes": (ModuleListLoop(lambda e: Gated(width=I + e)), "differ in size"),
    "activations": (ModuleListLoop(lambda e: Gated(act=F.silu if e else F.gelu)), "do not come together|not one that is known"),
    "a bias for some": (ModuleListLoop(lambda e: Gated(bias=e > 2)), "do not come together|not one that is known"),
    "latent": (Latent(), "begin with one projection"),
    "normed": (
        ModuleListLoop(lambda e: nn.Sequential(nn.LayerNorm(H), nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H))),
        "not one that is known",
    ),
    "three layers": (
        ModuleListLoop(lambda e: nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, I), nn.SiLU(), nn.Linear(I, H))),
        "begin with one projection",
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", APART)
def test_weights_kept_apart_are_read_where_they_lie(name: str, dynamic: bool) -> None:
    module, x = APART[name], torch.randn(T, H)
    with torch.no_grad():
        got = torch.compile(module, backend="moe_sparse", options={"inner": "eager"}, dynamic=dynamic)(x)
        torch.testing.assert_close(got, module(x), **tolerance(torch.float32))
    report = moe_fx.last_report()
    assert [s.experts for s in report.sites] == ["fused"], report.skips
    assert report.ops_after["moe_fx.separate_experts"] == 1
    assert report.ops_after["aten.linear"] == (4 if name == "a shared expert" else 1), "what was computed in vain must be gone"
    assert not any(report.ops_after[copied] for copied in ("aten.stack", "aten.cat", "aten.clone"))


@pytest.mark.parametrize("name", APART)
def test_weights_kept_apart_under_policies(name: str) -> None:
    module, x = APART[name], torch.randn(T, H)
    inner = "inductor" if name in ("three matrices and biases", "stacked, transposed, biases") else "eager"
    generator = torch.Generator().manual_seed(1)
    similarity = torch.rand(E, E, generator=generator)
    tables = {"mask_router": torch.randn(E, H, generator=generator), "similarity": (similarity + similarity.T) / 2}
    artifact = moe_fx.Artifact({"": tables})
    for policy in (moe_fx.BEAM(artifact), moe_fx.SERE(artifact, primary=1)):
        torch._dynamo.reset()
        fused = compiled(module, x, policy=policy, strict=True, inner=inner)
        assert [s.experts for s in moe_fx.last_report().sites] == ["fused"]
        torch._dynamo.reset()
        folded = compiled(module, x, policy=policy, fuse_experts=False, strict=True)
        torch.testing.assert_close(fused, folded, **tolerance(torch.float32))


@pytest.mark.parametrize("name", APART_UNKNOWN)
def test_modules_that_are_no_such_experts_are_left(name: str) -> None:
    (module, words), x = APART_UNKNOWN[name], torch.randn(T, H)
    got = compiled(module, x)
    with torch.no_grad():
        torch.testing.assert_close(got, module(x), rtol=0, atol=0)
    report = moe_fx.last_report()
    assert [s.experts for s in report.sites] == ["untouched"]
    assert report.ops_after["moe_fx.separate_experts"] == 0
    assert re.search(words, report.skips[0].reason), report.skips[0].reason


def test_weights_kept_apart_keep_their_gradients() -> None:
    """Where gradients are needed the experts stay as they are."""
    module, x = APART["three matrices"], torch.randn(T, H)
    parameters = [*module.parameters()]
    step = torch.compile(module, backend="moe_sparse", options={"inner": "eager"})
    got = torch.autograd.grad(step(x).square().mean(), parameters)
    want = torch.autograd.grad(module(x).square().mean(), parameters)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance(torch.float32))
    assert [s.experts for s in moe_fx.last_report().sites] == ["untouched"]
