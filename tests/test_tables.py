"""Tables of layers that share a graph: each layer reads its own, by where its router's weight is found."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import moe_fx
import tiny
from moe_fx.tables import SiteTable
from moe_fx.testing import tolerance


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_layers_that_change_places_read_the_tables_of_their_new_places() -> None:
    name, inputs = "qwen3_moe", tiny.tokens()
    model, artifact = tiny.build(name, "eager"), tiny.random_artifact(name)
    rule = tiny.sere_rule(artifact, 1, 0.0)
    options = {"policy": moe_fx.SERE(artifact, primary=1), "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="moe_sparse", options=options)
    layers = model.model.layers
    wants = []
    for _ in range(2):
        with torch.no_grad():
            got = compiled(**inputs).logits
        assert moe_fx.last_report().ops_after["moe_fx.site_tensor"] > 0, "the layers must share a graph"
        wants.append(tiny.expected(model, name, rule, **inputs))
        torch.testing.assert_close(got, wants[-1], **tolerance(got.dtype))
        layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    assert not torch.allclose(*wants, atol=1e-2)


def test_a_layer_that_stays_is_looked_for_once() -> None:
    name, inputs = "qwen3_moe", tiny.tokens()
    model, artifact = tiny.build(name, "eager"), tiny.random_artifact(name)
    options = {"policy": moe_fx.SERE(artifact, primary=1), "inner": "eager"}
    compiled = torch.compile(model, backend="moe_sparse", options=options)
    with torch.no_grad(), mock.patch.object(SiteTable, "_resolve", autospec=True, side_effect=SiteTable._resolve) as resolve:
        first, second = (compiled(**inputs).logits for _ in range(2))
    assert resolve.call_count == len(artifact.sites)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
