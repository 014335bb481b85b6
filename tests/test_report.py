"""Report: what a person reads of it must not mislead."""

from __future__ import annotations

import torch

import layers
import moe_fx
from moe_fx.report import Report
from moe_fx.site import Site, Skip

SITE = Site("model.layers.0.mlp", 8, 2, 16, "softmax -> topk", policy="SERE")


def test_a_site_whose_experts_are_not_fused_is_not_called_left_alone() -> None:
    text = str(Report(sites=[SITE], skips=[Skip(SITE.name, "its experts' activation is not known")]))
    assert "why they are not fused" in text
    assert "left alone" not in text


def test_a_refused_site_is_left_alone_and_its_routing_was_found() -> None:
    text = str(Report(skips=[Skip(SITE.name, "its experts have a capacity", routing=True)]))
    assert "No expert routing could be rewritten" in text
    assert "why it was left alone" in text


def test_both_kinds_are_told_apart() -> None:
    skips = [Skip(SITE.name, "tanh"), Skip("model.head", "its ids are never seen to select")]
    text = str(Report(sites=[SITE], skips=skips))
    assert text.index("not fused") < text.index("tanh") < text.index("left alone") < text.index("model.head")


def test_nothing_found_says_so() -> None:
    assert "No expert routing was found" in str(Report())


def test_of_a_real_layer() -> None:
    torch._dynamo.reset()
    layer = layers.LoopOverExperts()
    for expert in layer.experts:
        expert[1] = torch.nn.Tanh()
    text = str(moe_fx.explain(layer.eval().requires_grad_(False), torch.randn(4, layers.H)))
    assert "1 site" in text
    assert "why they are not fused" in text
    assert "left alone" not in text
