"""Random MoE blocks are found, and are right under every policy; random blocks that only resemble them are left alone.

30 examples of each in CI; ``pytest --hypothesis-profile=nightly`` tries 500.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import assume, given, settings
from torch import Tensor, fx, nn

import moe_fx
from moe_fx.kernels import reference
from moe_fx.pipeline import Settings, run
from moe_fx.report import Report
from moe_fx.testing import tolerance
from random_moe import Block, Recipe, recipes
from random_others import Other, others

EXAMPLES = settings(max_examples=min(500, settings().max_examples))
TAU = 0.5


class Variants:
    """A compiler that rewrites each graph once for each of several settings, of which ``chosen`` runs.

    Dynamo traces once, which takes longer than all the rest.
    """

    def __init__(self, wanted: Sequence[Settings]) -> None:
        self.reports = [Report() for _ in wanted]
        self.chosen = 0
        self._wanted = wanted

    def __call__(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs = [run(gm, wanted, report) for wanted, report in zip(self._wanted, self.reports, strict=True)]
        return lambda *args: graphs[self.chosen](*args)


def compiled(module: nn.Module, x: Tensor, wanted: Sequence[Settings]) -> list[tuple[Tensor, Report]]:
    """What a module gives under each of the settings, and what was done to it."""
    torch._dynamo.reset()
    variants = Variants(wanted)
    model = torch.compile(module, backend=variants, fullgraph=True)
    results = []
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for index, report in enumerate(variants.reports):
            variants.chosen = index
            results.append((model(x), report))
    return results


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

    policies = {
        moe_fx.TopK(): nothing,
        moe_fx.SERE(artifact, primary=primary, threshold=threshold): sere,
        moe_fx.BEAM(artifact, tau=TAU): beam,
    }
    wanted = [Settings((policy,), strict=True, fuse=fuse) for policy in policies for fuse in (False, True)]
    exact = block(x)
    with torch.no_grad():
        torch.testing.assert_close(exact, block.expected(x, nothing), **tolerance(recipe.dtype))
    for settings_, (got, report) in zip(wanted, compiled(Wrapped(block), x, wanted), strict=True):
        found = [(s.name, s.num_experts, s.top_k, s.hidden_size) for s in report.sites]
        assert found == [("block", experts, recipe.picks, hidden)]
        torch.testing.assert_close(got, block.expected(x, policies[settings_.policies[0]]), **tolerance(recipe.dtype))
        if settings_.policies == (moe_fx.TopK(),) and not settings_.fuse:
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
    for got, report in compiled(module, x, [Settings((policy,), fuse=True) for policy in policies]):
        assert report.sites == []
        assert report.ops_before == report.ops_after
        torch.testing.assert_close(got, exact, rtol=0, atol=0)
