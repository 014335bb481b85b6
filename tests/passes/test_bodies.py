"""What Dynamo puts into a body of its own: checkpointed layers and shared regions are rewritten, branches are skips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import layers
import moe_fx
from layers import E, H
from moe_fx.kernels import reference
from moe_fx.testing import tolerance


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class TwoLayers(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second = layers.SoftmaxThenTopK(), layers.GatheredBiased()
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def artifact() -> moe_fx.Artifact:
    generator = torch.Generator().manual_seed(3)
    sites = {}
    for name in ("first", "second"):
        similarity = torch.rand(E, E, generator=generator)
        sites[name] = {"similarity": (similarity + similarity.T) / 2, "mask_router": torch.randn(E, H, generator=generator)}
    return moe_fx.Artifact(sites)


def trained(checkpointed: bool, policy: moe_fx.SERE | moe_fx.BEAM, inner: str) -> list[Tensor]:
    """The output and every gradient of one step."""
    torch._dynamo.reset()
    model, x = TwoLayers(checkpointed), torch.randn(4, H, generator=torch.Generator().manual_seed(5), requires_grad=True)
    out = torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": inner, "strict": True})(x)
    out.square().sum().backward()
    report = moe_fx.last_report()
    assert [s.name for s in report.sites] == ["first", "second"]
    assert report.skips == []
    learned = [x, *model.parameters(), *(policy.parameters() if isinstance(policy, moe_fx.BEAM) else [])]
    return [out.detach(), *(p.grad for p in learned if p.grad is not None)]


@pytest.mark.parametrize(
    ("policy", "inner"),
    [
        *((policy, inner) for policy in ("sere", "beam", "train") for inner in ("eager", "aot_eager")),
        pytest.param("train", "inductor", marks=pytest.mark.slow),  # the graph that the most leaves
    ],
)
def test_checkpointed_layers_are_rewritten_like_others(policy: str, inner: str) -> None:
    def make() -> moe_fx.SERE | moe_fx.BEAM:
        return moe_fx.SERE(artifact(), primary=1) if policy == "sere" else moe_fx.BEAM(artifact(), train=policy == "train")

    want, got = trained(False, make(), inner), trained(True, make(), inner)
    assert len(got) == len(want) == (10 if policy == "train" else 8)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32))


def test_the_policy_changes_what_a_checkpointed_model_computes() -> None:
    model, x = TwoLayers(True), torch.randn(4, H)
    got = torch.compile(model, backend="moe_sparse", options={"policy": moe_fx.SERE(artifact(), primary=1), "inner": "eager"})(x)
    assert not torch.allclose(got, model(x))


def test_a_body_without_routing_is_left_as_it_is() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(H, H)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.linear, x, use_reentrant=False)

    model, x = Plain(), torch.randn(4, H)
    got = torch.compile(model, backend="moe_sparse", options={"policy": moe_fx.SERE(artifact()), "inner": "eager"})(x)
    torch.testing.assert_close(got, model(x), rtol=0, atol=0)
    assert moe_fx.last_report().sites == []


class Region(nn.Module):
    """A block that is compiled once for all layers that have it."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = layers.SoftmaxThenTopK()
        with torch.no_grad():
            self.moe.router.weight.normal_()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([Region(), Region()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_region_that_layers_share_is_rewritten_with_the_table_of_each(inner: str) -> None:
    model, x, names = Regions().eval(), torch.randn(5, H), ["layers.0.moe", "layers.1.moe"]
    tables = moe_fx.Artifact(dict(zip(names, artifact().sites.values(), strict=True)))
    options = {"policy": moe_fx.SERE(tables, primary=1), "inner": inner, "strict": True}
    with torch.no_grad():
        got = torch.compile(model, backend="moe_sparse", options=options, fullgraph=True)(x)
        want = x
        for name, layer in zip(names, model.layers, strict=True):
            ids, weights = layer.moe.route(want)
            moved = reference.sere_reroute(ids, tables.sites[name]["similarity"], 1, 0.0)
            assert not torch.equal(moved, ids)
            want = want + layer.moe.run(want, moved, weights)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))
    report = moe_fx.last_report()
    assert [s.name for s in report.sites] == names
    assert report.skips == []


def test_a_shared_region_is_calibrated_layer_by_layer() -> None:
    model, x = Regions().eval(), torch.randn(5, H)
    assert list(moe_fx.calibrate(model, [x]).sites) == ["layers.0.moe", "layers.1.moe"]


def test_a_shared_region_without_routing_stays_one() -> None:
    class Plain(nn.Linear):
        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    calls: list[int] = []

    def inner(gm: torch.fx.GraphModule, _: object) -> object:
        calls.append(sum("invoke_subgraph" in str(n.target) for n in gm.graph.nodes if n.op == "call_function"))
        return gm.forward

    model, x = nn.Sequential(Plain(H, H), layers.SoftmaxThenTopK(), Plain(H, H)), torch.randn(4, H)
    with torch.no_grad():
        torch.compile(model, backend="moe_sparse", options={"inner": inner, "fuse_experts": True})(x)
    assert [s.experts for s in moe_fx.last_report().sites] == ["fused"]
    assert calls == [2]


class Branch(nn.Module):
    """Tokens go through the experts only where their mean is positive, all or none."""

    def __init__(self, taken: nn.Module) -> None:
        super().__init__()
        self.taken = taken

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.mean() > 0, lambda y: self.taken(y), lambda y: y * 1, (x,))


def test_routing_in_a_branch_is_a_skip_that_says_so() -> None:
    model, x = Branch(layers.SortThenSlice()), torch.randn(4, H).abs()
    with torch.no_grad():
        (skip,) = moe_fx.explain(model, x).skips
        assert skip.routing
        assert "body of cond" in skip.reason
        torch._dynamo.reset()
        with pytest.raises(Exception, match="strict: .*body of cond"):
            torch.compile(model, backend="moe_sparse", options={"inner": "eager", "strict": True})(x)


def test_a_branch_without_routing_is_none() -> None:
    model, x = Branch(nn.Linear(H, H)), torch.randn(4, H).abs()
    with torch.no_grad():
        report = moe_fx.explain(model, x)
    assert report.sites == []
    assert report.skips == []


def test_without_gradients_checkpointed_layers_are_calibrated_and_rewritten() -> None:
    model, x = TwoLayers(True).eval(), torch.randn(4, H)
    tables = moe_fx.calibrate(model, [x])
    assert list(tables.sites) == ["first", "second"]
    wants = []
    for other in (model, TwoLayers(False).eval()):
        torch._dynamo.reset()
        options = {"policy": moe_fx.SERE(tables, primary=1), "inner": "eager", "strict": True}
        with torch.no_grad():
            wants.append(torch.compile(other, backend="moe_sparse", options=options)(x))
        assert [s.name for s in moe_fx.last_report().sites] == ["first", "second"]
    torch.testing.assert_close(*wants, **tolerance(torch.float32))
    assert not torch.allclose(wants[0], model(x))
