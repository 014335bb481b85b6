"""The pass on exported programs: the same decisions as in torch.compile, through saving and AOTInductor too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layers
import moe_fx
import tiny
from moe_fx.report import Report
from moe_fx.testing import tolerance
from variants import run_each


class Logits(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = tiny.build(name)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def policies(name: str) -> dict[str, Any]:
    artifact = moe_fx.Artifact({f"model.{site}": tensors for site, tensors in tiny.random_artifact(name).sites.items()})
    sere, beam = moe_fx.SERE(artifact, primary=1), moe_fx.BEAM(artifact)
    return {"topk": None, "sere": sere, "beam": beam, "both": [beam, sere]}


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def exported(request: pytest.FixtureRequest) -> tuple[str, Logits, Any]:
    module = Logits(request.param)
    lengths = {"ids": {1: torch.export.Dim.AUTO}}  # a named one meets a guard of attention that torch 2.11 cannot prove
    with torch.no_grad():
        return request.param, module, torch.export.export(module, (tiny.tokens()["input_ids"],), dynamic_shapes=lengths)


#: (policy, whether experts are fused)
KINDS = [("topk", True), ("sere", True), ("beam", True), ("sere", False), ("both", False)]


def test_equal_to_the_compiled_model_at_other_lengths(exported: tuple[str, Logits, Any]) -> None:
    name, module, program = exported
    asked, new = policies(name), []
    for kind, fuse in KINDS:
        report = Report()
        new.append(moe_fx.rewrite_exported(program, asked[kind], strict=True, fuse_experts=fuse, report=report))
        assert [s.name for s in report.sites] == [f"model.{s}" for s in tiny.ARCHS[name].sites]
        assert {s.experts for s in report.sites} == ({"fused"} if fuse else {"folded"} if "b" in kind else {"untouched"})
    for length in (9, 4):
        ids = tiny.tokens(length=length)["input_ids"]
        compiled = run_each(module, [{"policy": asked[kind], "fuse_experts": fuse} for kind, fuse in KINDS], ids)
        for (kind, _), rewritten, (want, _) in zip(KINDS, new, compiled, strict=True):
            with torch.no_grad():
                got = rewritten.module()(ids)
                torch.testing.assert_close(got, want, **tolerance(torch.float32))
                assert (kind == "topk") == torch.allclose(got, module(ids), **tolerance(torch.float32))


def test_the_given_program_stays_as_it_is(exported: tuple[str, Logits, Any]) -> None:
    name, _, program = exported
    before = str(program.graph), dict(program.state_dict)
    moe_fx.rewrite_exported(program, policies(name)["both"])
    assert (str(program.graph), dict(program.state_dict)) == before


def test_saved_loaded_and_decomposed(exported: tuple[str, Logits, Any], tmp_path: Path) -> None:
    name, _, program = exported
    new = moe_fx.rewrite_exported(program, policies(name)["both"])
    ids = tiny.tokens()["input_ids"]
    torch.export.save(new, tmp_path / "model.pt2")
    with torch.no_grad():
        want = new.module()(ids)
        torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(ids), want, rtol=0, atol=0)
        torch.testing.assert_close(new.run_decompositions().module()(ids), want, **tolerance(torch.float32))


@pytest.mark.slow
def test_packaged_by_aotinductor(exported: tuple[str, Logits, Any], tmp_path: Path) -> None:
    name, _, program = exported
    if name != "qwen3_moe":
        pytest.skip("one architecture is enough: packaging takes long and does not depend on the router")
    new = moe_fx.rewrite_exported(program, policies(name)["both"])
    path = torch._inductor.aoti_compile_and_package(new, package_path=str(tmp_path / "model.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for length in (9, 4):
        ids = tiny.tokens(length=length)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(packaged(ids), new.module()(ids), **tolerance(torch.float32))


def test_a_program_with_a_float_input_tells_weights_from_it() -> None:
    layer, x = layers.SoftmaxThenTopK().eval(), torch.randn(4, layers.H)
    report = Report()
    new = moe_fx.rewrite_exported(torch.export.export(layer, (x,)), report=report)
    torch.testing.assert_close(new.module()(x), layer(x), **tolerance(torch.float32))
    assert [(s.num_experts, s.top_k) for s in report.sites] == [(layers.E, layers.K)]


def test_what_routes_nothing_is_left_alone() -> None:
    program = torch.export.export(layers.Indexer().eval(), (torch.randn(4, layers.H),))
    artifact = moe_fx.Artifact({"": {"similarity": torch.eye(layers.E)}})
    new = moe_fx.rewrite_exported(program, moe_fx.SERE(artifact))
    assert str(new.graph) == str(program.graph)


def test_training_masks_is_refused(exported: tuple[str, Logits, Any]) -> None:
    with pytest.raises(moe_fx.PolicyError, match="cannot train in an exported program"):
        moe_fx.rewrite_exported(exported[2], moe_fx.BEAM(train=True))


@pytest.mark.parametrize("routes", [True, False])
def test_a_branch_stays_as_it_is_and_routing_in_it_is_a_skip(routes: bool) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taken = layers.SortThenSlice() if routes else nn.Linear(layers.H, layers.H)
            self.after = layers.SoftmaxThenTopK()

        def forward(self, x: Tensor) -> Tensor:
            return self.after(torch.cond(x.mean() > 0, lambda y: self.taken(y), lambda y: y * 1, (x,)))

    module, report = Branch().eval(), Report()
    x = torch.randn(4, layers.H).abs()
    with torch.no_grad():
        new = moe_fx.rewrite_exported(torch.export.export(module, (x,)), fuse_experts=True, report=report)
        torch.testing.assert_close(new.module()(x), module(x), **tolerance(torch.float32))
    assert [s.name for s in report.sites] == ["after"]
    assert ["body of cond" in s.reason for s in report.skips] == [True] * routes
