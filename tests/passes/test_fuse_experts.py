"""fuse_experts: MLPs in every layout must be recognised and run equal; what only resembles one must be left."""

from __future__ import annotations

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


UNKNOWN: dict[str, Batched] = {
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
