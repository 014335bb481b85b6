"""The real engine against itself, its router patched in Python to call ``kernels/reference.py``: token for token."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ARCHITECTURES = ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "olmoe"]
STOCK = {"VLLM_PLUGINS": "none"}


def policies(folder):
    """The policies of every variant; the names are those of the results."""
    artifact = str(folder.with_suffix(".moe.safetensors"))
    sere = {"name": "sere", "artifact": artifact, "primary": 1}
    beam = {"name": "beam", "artifact": artifact}
    careful = {"name": "sere", "artifact": artifact, "primary": 2, "threshold": 0.4}
    return {"sere": [sere], "beam": [beam], "both": [beam, careful], "small batches": [{**sere, "max_tokens": 3}]}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engines(request, models, run_engine):
    """Tokens of stock vLLM, of the patched engine, and of ours in both forms."""
    folder = models(request.param)
    variants = policies(folder)
    entry = {"policy": variants["both"]}  # its graph is the most general: the other variants take its place at run time
    return {
        "stock": run_engine(folder, environment=STOCK)["started"],
        "patched": run_engine(folder, environment=STOCK, patched=True, variants={"none": [], **variants}),
        "open": run_engine(folder, entry=entry, variants={"started": None, "none": ["topk"], **variants}),
        "opaque": run_engine(folder, entry=entry, form="opaque", variants={"started": None, "none": ["topk"], **variants}),
    }


@pytest.mark.parametrize("engine", ["patched", "open", "opaque"])
def test_without_a_policy_every_token_is_stock_vllms(engines, engine):
    assert engines[engine]["none"] == engines["stock"]


@pytest.mark.parametrize("form", ["open", "opaque"])
@pytest.mark.parametrize("variant", ["sere", "beam", "both", "small batches"])
def test_every_token_is_the_patched_engines(engines, form, variant):
    assert engines[form][variant] == engines["patched"][variant]
    assert engines["patched"][variant] != engines["patched"]["none"], "the policy must matter for this to mean anything"


@pytest.mark.parametrize("form", ["open", "opaque"])
def test_what_the_engine_started_with_is_what_was_asked_for(engines, form):
    assert engines[form]["started"] == engines["patched"]["both"]


@pytest.mark.parametrize(
    ("form", "rewritten"), [("open", "2 routing sites"), ("opaque", "0 routing sites and 2 calls of vLLM's MoE op")]
)
def test_the_log_says_what_was_rewritten(engines, form, rewritten):
    log = engines[form]["log"]
    assert f"moe_fx: BEAM(tau=0.5) + SERE(primary=2, threshold=0.4) on {rewritten} of a compiled graph" in log
    assert "moe_fx: 2 of 2 MoE layers run BEAM(tau=0.5) + SERE(primary=2, threshold=0.4)" in log
