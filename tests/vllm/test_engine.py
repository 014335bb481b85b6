"""The real engine against itself, its router patched in Python to call ``kernels/reference.py``: token for token."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import moe_fx

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ARCHITECTURES = ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "olmoe"]
STOCK = {"VLLM_PLUGINS": "none"}
# a batch of six prompts, and batches small enough for ``max_tokens``
ROUNDS = [
    [[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14], [15], [16, 17, 18, 19, 20, 21], [22, 23]],
    [[30, 31, 32]], [[40, 41], [50]], [[60], [61], [62]], [[70, 71], [80]],
]  # fmt: skip


def policies(folder):
    """The policies of every variant; the names are those of the results."""
    artifact = str(folder.with_suffix(".moe.safetensors"))
    sere = {"name": "sere", "artifact": artifact, "primary": 1}
    beam = {"name": "beam", "artifact": artifact}
    careful = {"name": "sere", "artifact": artifact, "primary": 2, "threshold": 0.4}
    first, second = moe_fx.Artifact.load(artifact).sites
    by_layer = {**sere, "layers": [[first, 3, 0.4], [second, 1, 0.2]]}
    return {
        "sere": [sere], "beam": [beam], "both": [beam, careful], "small batches": [{**sere, "max_tokens": 3}],
        "by layer": [by_layer],
    }  # fmt: skip


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engines(request, models, run_engine):
    """Tokens of stock vLLM, of the patched engine, and of ours in both forms."""
    folder = models(request.param)
    variants = policies(folder)
    entry = {"policy": variants["both"]}  # its graph is the most general: the other variants take its place at run time
    ours = {"entry": entry, "variants": {"started": None, "none": ["topk"], **variants}}
    specs = {
        "stock": {"environment": STOCK},
        "patched": {"environment": STOCK, "patched": True, "variants": {"none": [], **variants}},
        "open": ours,
        "opaque": {**ours, "form": "opaque"},
    }
    with ThreadPoolExecutor(2) as pool:  # a start is mostly work of one thread
        running = {name: pool.submit(run_engine, folder, rounds=ROUNDS, **spec) for name, spec in specs.items()}
        return {name: future.result() for name, future in running.items()}


@pytest.mark.parametrize("engine", ["patched", "open", "opaque"])
def test_without_a_policy_every_token_is_stock_vllms(engines, engine):
    assert engines[engine]["none"] == engines["stock"]["started"]


@pytest.mark.parametrize("form", ["open", "opaque"])
@pytest.mark.parametrize("variant", ["sere", "beam", "both", "small batches", "by layer"])
def test_every_token_is_the_patched_engines(engines, form, variant):
    assert engines[form][variant] == engines["patched"][variant]
    assert engines["patched"][variant] != engines["patched"]["none"], "the policy must matter for this to mean anything"


@pytest.mark.parametrize("form", ["open", "opaque"])
def test_what_the_engine_started_with_is_what_was_asked_for(engines, form):
    assert engines[form]["started"] == engines["patched"]["both"]


def test_chunked_prefill_and_cached_prefixes(models, run_engine):
    """Batches that mix decoding with pieces of prompts, some of which are already in the cache."""
    folder = models("qwen3_moe")
    variants = {name: policies(folder)[name] for name in ("sere", "both")}
    prefix = [(11 * i) % 250 + 3 for i in range(70)]
    prompts = [[*prefix, *range(3 + n, 9 + 2 * n)] for n in range(6)]
    settings = {
        "engine": {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 24, "max_num_seqs": 4},
        "rounds": [prompts, prompts[::-1]],
    }
    patched = run_engine(folder, environment=STOCK, patched=True, variants=variants, **settings)
    ours = run_engine(folder, entry={"policy": variants["both"]}, variants=variants, **settings)
    assert [ours[name] for name in variants] == [patched[name] for name in variants]
    assert ours["sere"] != ours["both"]
    assert all(tokens >= len(prompts) // 2 * 64 for tokens in ours["cached"][1::2]), "the second round found the prefix"


def masks_of(folder, path):
    """Mask routers that were trained for a few steps on the checkpoint, and how many of its four picks they leave on."""
    from transformers import AutoModelForCausalLM

    from moe_fx.beam import Recipe, train

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="batched_mm")
    tokens = torch.randint(3, 256, (16, 24), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=8, beta=0.05, learning_rate=0.01, warmup=1, rows=4)
    trained = train(model, tokens, recipe)
    trained.artifact.save(path)
    return trained.history[-1]["picks"].values()


def test_masks_that_were_trained_are_served(models, run_engine, tmp_path):
    """From training with transformers to the engine, in both forms: every token the patched engine's."""
    folder, path = models("qwen3_moe"), tmp_path / "masks.moe.safetensors"
    picks = masks_of(folder, path)
    assert all(0.5 < left < 3.5 for left in picks), "training must have switched picks off, and not all"
    beam = {"name": "beam", "artifact": str(path)}
    specs = [
        {"environment": STOCK, "patched": True, "variants": {"none": [], "started": [beam]}},
        {"entry": {"policy": beam}},
        {"entry": {"policy": beam}, "form": "opaque"},
    ]
    with ThreadPoolExecutor(2) as pool:
        patched, opened, opaque = pool.map(lambda spec: run_engine(folder, **spec), specs)
    assert opened["started"] == opaque["started"] == patched["started"]
    assert patched["started"] != patched["none"]


def has_vnni():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_vnni" in flags


@pytest.mark.skipif(not has_vnni(), reason="vLLM's int8 experts need AVX512-VNNI")
def test_quantised_experts_keep_their_kernel(models, run_engine):
    """Int8 experts: the same kernel in the graph, and every token the patched engine's."""
    folder = models("qwen3_moe")
    variants = {name: policies(folder)[name] for name in ("sere", "both")}
    patched = run_engine(folder, environment=STOCK, int8=True, patched=True, variants=variants)
    ours = run_engine(folder, entry={"policy": variants["both"]}, int8=True, variants=variants)
    assert [ours[name] for name in variants] == [patched[name] for name in variants]
    assert ours["sere"] != ours["both"]
    for result in (patched, ours):
        assert "Using CPU Int8 MoE backend" in result["log"]


@pytest.mark.parametrize(
    ("form", "rewritten"), [("open", "2 routing sites"), ("opaque", "0 routing sites and 2 calls of vLLM's MoE op")]
)
def test_the_log_says_what_was_rewritten(engines, form, rewritten):
    log = engines[form]["log"]
    assert f"moe_fx: BEAM(tau=0.5) + SERE(primary=2, threshold=0.4) on {rewritten} of a compiled graph" in log
    assert "moe_fx: 2 of 2 MoE layers run BEAM(tau=0.5) + SERE(primary=2, threshold=0.4)" in log
    assert ("2 experts kernels leave out what is off" in log) == (form == "open")
