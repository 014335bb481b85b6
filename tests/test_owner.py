"""Experts that run outside the graph, by code that only the module behind it shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import layers
import moe_fx
from layers import E, H
from moe_fx.kernels import reference
from moe_fx.testing import tolerance


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class WrittenOver(layers.LoopOverExperts):
    """Each expert's rows are written to their places: of two picks on one expert, the last stays."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        counts = torch.bincount(ids.flatten(), minlength=E).tolist()
        for e, expert in enumerate(self.experts):
            if counts[e]:
                rows, place = torch.where(ids == e)
                out[rows] += expert(x[rows]) * weights[rows, place, None]
        return out


class AddedUp(WrittenOver):
    """The same, by an op that adds up."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            rows, place = torch.where(ids == e)
            out.index_add_(0, rows, self.experts[e](x[rows]) * weights[rows, place, None])
        return out


class Inherited(AddedUp):
    """Nothing that is written here writes anything."""


class WrittenByAssignment(WrittenOver):
    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, place = torch.where(ids == e)
            out[rows] = out[rows] + expert(x[rows]) * weights[rows, place, None]
        return out


def _put_down(out: Tensor, rows: Tensor, given: Tensor) -> None:
    out[rows] += given


class WrittenByHelper(WrittenOver):
    """What writes is a function beside the module."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, place = torch.where(ids == e)
            _put_down(out, rows, expert(x[rows]) * weights[rows, place, None])
        return out


class FirstPlaceRead(WrittenOver):
    """Added up, but only the first place of an expert is read."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(-1).nonzero().squeeze(-1)
            place = (ids[rows] == e).int().argmax(-1)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


def rewritten(layer: layers.Layer, x: Tensor, policy: object) -> Tensor:
    options = {"policy": policy, "inner": "eager", "strict": True}
    with torch.no_grad():
        return torch.compile(layer, backend="moe_sparse", options=options)(x)


@pytest.mark.parametrize("cls", [WrittenOver, Inherited, WrittenByAssignment, WrittenByHelper, FirstPlaceRead])
@pytest.mark.parametrize("policy", ["sere", "beam"])
def test_every_policy_is_the_definition(cls: type[layers.Layer], policy: str) -> None:
    layer, x = cls().eval(), torch.randn(3, H, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    site = {"similarity": torch.rand(E, E, generator=generator), "mask_router": torch.randn(E, H, generator=generator)}
    artifact = moe_fx.Artifact({"": site})
    with torch.no_grad():
        ids, weights = layer.route(x)
        if policy == "sere":
            ids, changed = reference.sere_reroute(ids, site["similarity"], 1, 0.0), moe_fx.SERE(artifact, primary=1)
            assert bool((ids[:, 0] == ids[:, 1]).any()), "a token must have an expert twice for the test to mean anything"
        else:
            weights, masked = reference.beam_mask(weights, ids, x @ site["mask_router"].T, 0.6)
            changed = moe_fx.BEAM(artifact, tau=0.6)
            assert 0 < (masked < 0).sum() < masked.numel()
        want = layer.run(x, ids, weights)
    torch.testing.assert_close(rewritten(layer, x, changed), want, **tolerance(torch.float32))
    (found,) = moe_fx.last_report().sites
    assert found.name == ""


def test_only_where_code_may_write_over_it_an_experts_second_pick_goes_elsewhere() -> None:
    artifact, x = moe_fx.Artifact({"": {"similarity": torch.rand(E, E)}}), torch.randn(7, H)
    ops = []
    for cls in (WrittenOver, AddedUp):
        torch._dynamo.reset()
        rewritten(cls().eval(), x, moe_fx.SERE(artifact, primary=1))
        ops.append(moe_fx.last_report().ops_after["aten.tril"])
    assert ops == [1, 0]
    torch._dynamo.reset()
    rewritten(WrittenOver().eval(), x, None)
    assert moe_fx.last_report().ops_after == moe_fx.last_report().ops_before


def test_an_experts_second_pick_goes_to_one_that_is_active() -> None:
    """So that no more experts run than tokens ask for, where that can be."""
    layer, x = WrittenOver().eval(), torch.randn(16, H)
    ran: set[int] = set()
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, e=e: ran.add(e))
    similarity = torch.rand(E, E)
    rewritten(layer, x, moe_fx.SERE(moe_fx.Artifact({"": {"similarity": similarity}}), primary=1))
    with torch.no_grad():
        ids, _ = layer.route(x)
    assert ran == set(reference.sere_reroute(ids, similarity, 1, 0.0).flatten().tolist())


class Expert(torch.nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class LooksForItsTokens(layers.LoopOverExperts):
    """As Mixtral did: how many tokens an expert has depends on the picks, and Dynamo gives the whole function up."""

    def __init__(self, expert: type[torch.nn.Sequential]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(expert(*old) for old in self.experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(self.router(x).softmax(-1), layers.K, dim=-1)
        masks = torch.nn.functional.one_hot(ids, layers.E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            place, rows = torch.where(masks[e])
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


class Around(torch.nn.Module):
    def __init__(self, expert: type[torch.nn.Sequential] = Expert) -> None:
        super().__init__()
        self.moe = LooksForItsTokens(expert)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


@pytest.mark.parametrize("strict", [False, True])
def test_a_router_in_code_that_dynamo_gave_up_is_told(strict: bool) -> None:
    model, x = Around().eval(), torch.randn(5, H, generator=torch.Generator().manual_seed(2))
    table = moe_fx.Artifact({"moe": {"similarity": torch.rand(layers.E, layers.E)}})
    options = {"policy": moe_fx.SERE(table, primary=1), "inner": "eager", "strict": strict}
    step = torch.compile(model, backend="moe_sparse", options=options)
    with torch.no_grad():
        if strict:
            with pytest.raises(Exception, match="strict: 'moe' left alone: Dynamo gave up"):
                step(x)
            return
        with pytest.warns(UserWarning, match=r"could not apply SERE\(primary=1.*'moe' left alone: Dynamo gave up"):
            assert torch.equal(step(x), model(x))
    assert [skip.name for skip in moe_fx.last_report().skips if "Dynamo gave up" in skip.reason] == ["moe"]


def test_explain_tells_of_it_even_where_no_graph_has_anything_of_it() -> None:
    """PyTorch's own modules are never compiled by themselves."""
    report = moe_fx.explain(Around(torch.nn.Sequential).eval(), torch.randn(5, H))
    assert [(skip.name, "Dynamo gave up" in skip.reason) for skip in report.skips] == [("moe", True)]


def test_a_loop_that_dynamo_captures_is_rewritten() -> None:
    model, x = Around().eval(), torch.randn(5, H, generator=torch.Generator().manual_seed(2))
    masks = torch.randn(layers.E, H, generator=torch.Generator().manual_seed(3))
    options = {"policy": moe_fx.BEAM(moe_fx.Artifact({"moe": {"mask_router": masks}})), "inner": "eager", "strict": True}
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = torch.compile(model, backend="moe_sparse", options=options)(x)
        weights, ids = torch.topk(model.moe.router(x).softmax(-1), layers.K, dim=-1)
        weights, ids = reference.beam_mask(weights, ids, x @ masks.T, 0.5)
        want = x + model.moe.run(x, ids.clamp(min=0), weights)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))
    assert [site.name for site in moe_fx.last_report().sites] == ["moe"]
