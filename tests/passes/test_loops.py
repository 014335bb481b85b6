"""Experts that look for their tokens: every spelling of the loop must be recognised, what only resembles it left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
from moe_fx.kernels import reference
from moe_fx.report import Report
from moe_fx.testing import tolerance

T, E, K, H, I = 9, 3, 2, 16, 12


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, I, bias=False), nn.Linear(H, I, bias=False), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


Loop = Callable[["MoE", Tensor, Tensor, Tensor], Tensor]


class MoE(nn.Module):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.loop = nn.Linear(H, E, bias=False), loop
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.w1, self.w2 = nn.Parameter(torch.randn(E, I, H)), nn.Parameter(torch.randn(E, H, I))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.loop(self, x, ids, weights)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x)


class StackedMoE(MoE):
    """Experts' weights are slices of stacks."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1[e])), self.w2[e])


# ---------------------------------------------------------------------------------------------- spellings of one loop


def one_hot_masks(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As Mixtral did."""
    out, masks = torch.zeros_like(x), F.one_hot(ids, E).permute(2, 1, 0)
    for e in range(E):
        places, tokens = torch.where(masks[e])
        current = x[None, tokens].reshape(-1, H)
        out.index_add_(0, tokens, (moe.expert(e, current) * weights[tokens, places, None]).to(x.dtype))
    return out


def added_in_place(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As DeepSeek's own code does."""
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, places = torch.where(ids == e)
        out[tokens] += moe.expert(e, x[tokens]) * weights[tokens, places, None]
    return out


def masks_in_turn(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, mask in enumerate(F.one_hot(ids, E).permute(2, 0, 1)):
        tokens, places = mask.nonzero(as_tuple=True)
        out[tokens] = out[tokens] + moe.expert(e, x[tokens]) * weights[tokens, places].unsqueeze(-1)
    return out


def weights_by_mask(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], H)
    for e in range(E):
        mask = ids == e
        tokens = mask.nonzero()[:, 0]
        out = out.index_add(0, tokens, moe.expert(e, x.index_select(0, tokens)) * weights[mask].unsqueeze(-1))
    return out


def accumulated(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, places = torch.nonzero(ids == e).unbind(1)
        out.index_put_((tokens,), moe.expert(e, x[tokens]) * weights[tokens, places, None], accumulate=True)
    return out


def flat_places(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, flat_ids, flat_weights = torch.zeros_like(x), ids.view(-1), weights.view(-1, 1)
    for e in range(E):
        picks = torch.nonzero(flat_ids == e).squeeze(-1)
        tokens = picks // K
        out.index_add_(0, tokens, moe.expert(e, x[tokens]) * flat_weights[picks])
    return out


def tokens_by_mask(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        mask = ids == e
        tokens, weight = mask.any(-1), (weights * mask).sum(-1)
        out[tokens] += moe.expert(e, x[tokens]) * weight[tokens].unsqueeze(-1)
    return out


def rows_of_picks(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As DeepSeek's inference code did: written pick by pick, weighted in the end."""
    flat, rows = ids.view(-1), x.repeat_interleave(K, dim=0)
    out = torch.empty_like(rows)
    for e in range(E):
        out[flat == e] = moe.expert(e, rows[flat == e])
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def rows_of_tokens_picks(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows, out = x.unsqueeze(1).expand(-1, K, -1), torch.zeros(x.shape[0], K, H)
    for e in range(E):
        mask = ids == e
        out[mask] = moe.expert(e, rows[mask])
    return (out * weights.unsqueeze(-1)).sum(1)


SPELLINGS = (one_hot_masks, added_in_place, masks_in_turn, weights_by_mask, accumulated, flat_places, tokens_by_mask,
             rows_of_picks, rows_of_tokens_picks)  # fmt: skip

# ------------------------------------------------------------------------------------------- what only resembles them


def first_weight(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every pick has the weight of the first."""
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, _ = torch.where(ids == e)
        out.index_add_(0, tokens, moe.expert(e, x[tokens]) * weights[tokens, 0, None])
    return out


def other_order(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Rows in the order of tokens, weights in the order of places."""
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, _ = torch.where(ids == e)
        places, other = torch.where((ids == e).t())
        out.index_add_(0, tokens, moe.expert(e, x[tokens]) * weights[other, places, None])
    return out


def first_tokens(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Each expert takes two tokens at most."""
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, places = torch.where(ids == e)
        tokens, places = tokens[:2], places[:2]
        out.index_add_(0, tokens, moe.expert(e, x[tokens]) * weights[tokens, places, None])
    return out


def last_expert_wins(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Written over, not added."""
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, places = torch.where(ids == e)
        out[tokens] = moe.expert(e, x[tokens]) * weights[tokens, places, None]
    return out


def neighbours_tokens(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Each expert runs on the tokens of the one before."""
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, moe.expert((e + 1) % E, x[tokens]) * weights[tokens, places, None])
    return out


def twice_as_much(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, moe.expert(e, x[tokens]) * weights[tokens, places, None], alpha=2)
    return out


def on_top_of_input(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = x.clone()
    for e in range(E):
        tokens, places = torch.where(ids == e)
        out[tokens] += moe.expert(e, x[tokens]) * weights[tokens, places, None]
    return out


def by_how_many(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """An expert's rows are divided by the number of its tokens."""
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, places = torch.where(ids == e)
        out.index_add_(0, tokens, moe.expert(e, x[tokens]) * weights[tokens, places, None] / (1 + tokens.shape[0]))
    return out


RESEMBLING = (first_weight, other_order, first_tokens, last_expert_wins, twice_as_much, on_top_of_input, by_how_many)

# -------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(autouse=True)
def _captured():
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def _tokens(number: int = T) -> Tensor:
    return torch.randn(number, H, generator=torch.Generator().manual_seed(number))


def _policy(name: str) -> moe_fx.SERE | moe_fx.BEAM | None:
    generator = torch.Generator().manual_seed(3)
    tables = {"similarity": torch.rand(E, E, generator=generator), "mask_router": torch.randn(E, H, generator=generator)}
    artifact = moe_fx.Artifact({"": tables})
    return {"topk": None, "sere": moe_fx.SERE(artifact, primary=1), "beam": moe_fx.BEAM(artifact)}[name]


def _wanted(moe: MoE, x: Tensor, name: str) -> Tensor:
    """Every pick's expert on its token, weighted and added up."""
    policy = _policy(name)
    weights, ids = moe.router(x).softmax(-1).topk(K)
    tables = policy.artifact.sites[""] if policy is not None else {}
    if name == "sere":
        ids = reference.sere_reroute(ids, tables["similarity"], 1, 0.0)
    if name == "beam":
        weights, ids = reference.beam_mask(weights, ids, x @ tables["mask_router"].T, 0.5)
    every = torch.stack([moe.expert(e, x) for e in range(E)], dim=1)  # [T, E, H]
    picked = every.gather(1, ids.clamp(min=0).unsqueeze(-1).expand(-1, -1, H))
    return torch.einsum("tkh,tk->th", picked, weights)


def _run(moe: MoE, x: Tensor, name: str, **options: object) -> tuple[Tensor, Report]:
    settings = {"inner": "eager", "strict": True, "policy": _policy(name), **options}
    return torch.compile(moe, backend="moe_sparse", options=settings)(x), moe_fx.last_report()


@pytest.mark.parametrize(("kind", "name"), [(MoE, "topk"), (MoE, "sere"), (MoE, "beam"), (StackedMoE, "beam")])
@pytest.mark.parametrize("loop", SPELLINGS, ids=lambda f: f.__name__)
def test_loops_become_one_op(loop: Loop, name: str, kind: type[MoE]) -> None:
    moe, x = kind(loop).eval(), _tokens()
    got, report = _run(moe, x, name)
    torch.testing.assert_close(got, _wanted(moe, x, name), **tolerance(torch.float32))
    assert [site.experts for site in report.sites] == ["fused"]
    assert sum(report.ops_before[op] for op in ("aten.where", "aten.nonzero", "aten.nonzero_numpy", "aten.index")) >= E
    fused = report.ops_after["moe_fx.separate_experts"], report.ops_after["moe_fx.fused_experts"]
    assert fused == ((1, 0) if kind is MoE else (0, 1))
    assert not any(report.ops_after[op] for op in ("aten.where", "aten.nonzero", "aten.nonzero_numpy", "aten._assert_scalar"))


@pytest.mark.parametrize(("loop", "name"), [(one_hot_masks, "beam"), (rows_of_picks, "beam"), *((f, "sere") for f in SPELLINGS)])
def test_loops_that_stay_get_the_policys_picks(loop: Loop, name: str) -> None:
    moe, x = MoE(loop).eval(), _tokens()
    got, report = _run(moe, x, name, fuse_experts=False)
    torch.testing.assert_close(got, _wanted(moe, x, name), **tolerance(torch.float32))
    assert [site.experts for site in report.sites] == ["untouched" if name == "sere" else "folded"]


@pytest.mark.parametrize("loop", RESEMBLING, ids=lambda f: f.__name__)
def test_what_resembles_a_loop_is_left(loop: Loop) -> None:
    moe, x = MoE(loop).eval(), _tokens()
    got, report = _run(moe, x, "topk", strict=False)
    assert torch.equal(got, moe(x))
    assert [site.experts for site in report.sites] == ["untouched"]
    assert "moe_fx.separate_experts" not in report.ops_after


def test_an_expert_may_be_another_one_by_number() -> None:
    """Whose a parameter is, the tokens tell: a loop may give its experts other numbers."""
    moe, x = MoE(neighbours_tokens).eval(), _tokens()
    got, report = _run(moe, x, "topk")
    torch.testing.assert_close(got, moe(x), **tolerance(torch.float32))
    assert [site.experts for site in report.sites] == ["fused"]


def test_slices_of_other_experts_stay() -> None:
    moe, x = StackedMoE(neighbours_tokens).eval(), _tokens()
    got, report = _run(moe, x, "topk", strict=False)
    assert torch.equal(got, moe(x))
    assert [site.experts for site in report.sites] == ["untouched"]


@pytest.mark.parametrize("loop", [one_hot_masks, rows_of_picks], ids=lambda f: f.__name__)
def test_inductor_compiles_what_was_a_loop(loop: Loop) -> None:
    moe = MoE(loop).eval()
    step = torch.compile(moe, backend="moe_sparse", options={"policy": _policy("beam")}, dynamic=True)
    for tokens in (4, 7):
        x = _tokens(tokens)
        torch.testing.assert_close(step(x), _wanted(moe, x, "beam"), **tolerance(torch.float32))
    assert {site.experts for site in moe_fx.last_report().sites} == {"fused"}


@pytest.mark.parametrize("loop", [one_hot_masks, added_in_place, rows_of_picks], ids=lambda f: f.__name__)
def test_exported_loops_become_one_op(loop: Loop) -> None:
    """torch.export follows such loops as they are."""
    moe, x, report = MoE(loop).eval(), _tokens(), Report()
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", max=64)},))
    rewritten = moe_fx.rewrite_exported(program, _policy("beam"), strict=True, report=report).module()
    for tokens in (T, 4):
        x = _tokens(tokens)
        torch.testing.assert_close(rewritten(x), _wanted(moe, x, "beam"), **tolerance(torch.float32))
    assert [site.experts for site in report.sites] == ["fused"]
