"""Random MoE blocks are found, and are right under every policy; random blocks that only resemble them are left alone.

30 examples of each in CI; ``pytest --hypothesis-profile=nightly`` tries 500.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

import moe_fx
from moe_fx.kernels import reference
from moe_fx.policy import Policy
from moe_fx.testing import tolerance
from random_moe import Block, Recipe, recipes
from random_others import Other, others
from variants import run_each

EXAMPLES = settings(max_examples=min(500, settings().max_examples))
TAU = 0.5


class Wrapped(nn.Module):
    """A model around a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@EXAMPLES
@given(recipe=recipes())
def test_random_moe_is_found_and_rewritten_as_defined(recipe: Recipe) -> None:
    block = Block(recipe)
    x, (hidden, _, experts) = block.inputs(), recipe.sizes
    assume(not block.gate.is_ambiguous(x if recipe.flatten != "first" else x.flatten(0, -2)))
    generator = torch.Generator().manual_seed(recipe.seed)
    similarity = torch.rand(experts, experts, generator=generator)
    tables = {"similarity": (similarity + similarity.T) / 2, "mask_router": torch.randn(experts, hidden, generator=generator)}
    artifact = moe_fx.Artifact({"block": tables})
    primary, threshold = 1 + recipe.seed % 2, 0.3 * (recipe.seed % 3)

    def nothing(_: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return ids, weights

    def sere(_: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return reference.sere_reroute(ids, tables["similarity"], primary, threshold), weights

    def beam(rows: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        masked, masked_ids = reference.beam_mask(weights, ids, rows.float() @ tables["mask_router"].T, TAU)
        return torch.where(masked_ids < 0, ids, masked_ids), masked

    policies: dict[Policy, Any] = {
        moe_fx.TopK(): nothing,
        moe_fx.SERE(artifact, primary=primary, threshold=threshold): sere,
        moe_fx.BEAM(artifact, tau=TAU): beam,
    }
    wanted = [{"policy": policy, "strict": True, "fuse_experts": fuse} for policy in policies for fuse in (False, True)]
    exact = block(x)
    with torch.no_grad():
        torch.testing.assert_close(exact, block.expected(x, nothing), **tolerance(recipe.dtype))
    for options, (got, report) in zip(wanted, run_each(Wrapped(block), wanted, x), strict=True):
        found = [(s.name, s.num_experts, s.top_k, s.hidden_size) for s in report.sites]
        assert found == [("block", experts, recipe.picks, hidden)]
        torch.testing.assert_close(got, block.expected(x, policies[options["policy"]]), **tolerance(recipe.dtype))
        if options["policy"] == moe_fx.TopK() and not options["fuse_experts"]:
            assert torch.equal(got, exact)
            assert report.ops_before == report.ops_after


@EXAMPLES
@given(other=others())
def test_what_is_no_routing_is_never_rewritten(other: Other) -> None:
    module = other.build().eval().requires_grad_(False)
    x = module.inputs()
    torch.manual_seed(0)
    exact = module(x)
    tables = {"similarity": torch.rand(other.choices, other.choices), "mask_router": torch.randn(other.choices, other.hidden)}
    artifact = moe_fx.Artifact({"": tables})
    policies = (moe_fx.TopK(), moe_fx.SERE(artifact, primary=1), moe_fx.BEAM(artifact, tau=TAU))
    for got, report in run_each(module, [{"policy": policy, "fuse_experts": True} for policy in policies], x):
        assert report.sites == []
        assert report.ops_before == report.ops_after
        torch.testing.assert_close(got, exact, rtol=0, atol=0)
