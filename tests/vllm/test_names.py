"""Which of an artifact's sites belongs to which of an engine's layers."""

import pytest
import torch

import moe_fx
from moe_fx.vllm.names import block_name, layer_key, match_sites


def artifact(*sites):
    return moe_fx.Artifact({site: {"similarity": torch.eye(4)} for site in sites})


@pytest.mark.parametrize(
    ("path", "block", "key"),
    [
        ("model.layers.3.mlp.experts", "model.layers.3.mlp", "layers.3"),
        ("model.layers.3.mlp.gate", "model.layers.3.mlp", "layers.3"),
        ("model.layers.3.mlp", "model.layers.3.mlp", "layers.3"),
        ("model.layers.3.mlp.experts.routed_experts", "model.layers.3.mlp", "layers.3"),
        ("L['self'].layers.12.block_sparse_moe.experts", "layers.12.block_sparse_moe", "layers.12"),
        ("language_model.model.layers.0.feed_forward.experts", "language_model.model.layers.0.feed_forward", "layers.0"),
        ("decoder.mlp.experts", "decoder.mlp", "decoder.mlp"),
        ("experts", "experts", "experts"),
    ],
)
def test_the_normal_forms(path, block, key):
    assert block_name(path) == block
    assert layer_key(path) == key


@pytest.mark.parametrize(
    "sites",
    [
        ("model.layers.0.mlp", "model.layers.1.mlp"),
        ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate"),
        ("model.layers.0.block_sparse_moe", "model.layers.1.block_sparse_moe"),
        ("language_model.model.layers.0.mlp", "language_model.model.layers.1.mlp"),
    ],
)
def test_an_artifact_of_another_engine_serves(sites):
    layers = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert match_sites(layers, artifact(*sites)) == (dict(zip(layers, sites, strict=True)), None)


def test_the_very_name_comes_before_the_number():
    sites = ("encoder.layers.0.mlp", "decoder.layers.0.mlp")
    assert match_sites(["decoder.layers.0.mlp.experts"], artifact(*sites))[0] == {"decoder.layers.0.mlp.experts": sites[1]}


@pytest.mark.parametrize(
    ("layers", "sites", "reason"),
    [
        (["m.layers.1.mlp.experts"], ("m.layers.0.mlp",), "it has 1 sites, but none for m.layers.1.mlp.experts"),
        (["m.layers.0.mlp.experts"], ("a.layers.0.mlp", "b.layers.0.mlp"), "it has 2 sites, but none for m.layers.0.mlp"),
        (["a.layers.0.mlp.experts", "b.layers.0.mlp.experts"], ("layers.0.mlp",), "its sites layers.0.mlp each fit several"),
        ([f"layers.{i}.mlp.experts" for i in range(1, 6)], ("layers.0.mlp",), "layers.3.mlp.experts and others"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(layers, sites, reason):
    assert reason in match_sites(layers, artifact(*sites))[1]
