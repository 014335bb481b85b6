"""Activation checkpointing: what Dynamo puts into a body of its own is rewritten like the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import layers
import moe_fx
from layers import E, H
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


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["sere", "beam", "train"])
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
