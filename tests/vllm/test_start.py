"""How an engine starts: what it takes from vLLM's compile cache, what it refuses, what else its user has put there."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import moe_fx

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def artifact_of(folder, tmp_path, seed=0, **site):
    """A copy of the model's artifact with something changed, at one path."""
    given = moe_fx.Artifact.load(folder.with_suffix(".moe.safetensors"))
    sites = {name: {**tensors, **site} for name, tensors in given.sites.items()}
    return str(moe_fx.Artifact(sites).save(tmp_path / "changed.moe.safetensors"))


def outcome(result):
    """What a start did with the compile cache."""
    was_loaded = "Directly load AOT compilation from path" in result["log"]
    was_compiled = "routing site" in result["log"] and "of a compiled graph" in result["log"]
    assert was_loaded != was_compiled
    assert "moe_fx: 2 of 2 MoE layers run SERE" in result["log"]
    return "loaded" if was_loaded else "compiled"


@pytest.mark.parametrize("form", ["open", "opaque"])
def test_the_compile_cache_of_vllms_own_backend_follows_the_policy(models, run_engine, tmp_path, form):
    """A second start loads what the first compiled; another threshold, or another artifact at the same path, compiles.

    Compiled in pieces, as on a GPU.  Where the CPU engine of vLLM 0.32 compiles as it does by itself, it fails to load what
    it finds, with or without a policy, and compiles again.
    """
    folder = models("qwen3_moe")
    sere = {"name": "sere", "artifact": artifact_of(folder, tmp_path), "primary": 1}
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}  # the key does not tell the forms apart: only tests choose

    def start(policy):
        return run_engine(folder, entry={"policy": policy}, form=form, pieces=True, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        patched = pool.submit(run_engine, folder, environment={"VLLM_PLUGINS": "none"}, patched=True, variants={"sere": [sere]})
        first = start(sere)
        expected = patched.result()["sere"]
        second, threshold = pool.map(start, [sere, {**sere, "threshold": 0.7}])
    artifact_of(folder, tmp_path, similarity=torch.rand(16, 16, generator=torch.Generator().manual_seed(9)))
    artifact = start(sere)
    assert [outcome(r) for r in (first, second, threshold, artifact)] == ["compiled", "loaded", "compiled", "compiled"]
    assert first["started"] == second["started"] == expected
    assert len({json.dumps(r["started"]) for r in (first, threshold, artifact)}) == 3


@pytest.mark.parametrize(
    ("change", "message", "processes"),
    [
        ({"similarity": torch.eye(8)}, r"similarity for site .model.layers.0.mlp. is \[8, 8\] but the router has 16 exp", "1"),
        ({"mask_router": torch.zeros(16, 32)}, "was made at hidden size 32 but the router's input has 64", "0"),
    ],
)
def test_an_artifact_of_another_model_stops_the_start(models, run_engine, tmp_path, change, message, processes):
    """Its message is one line of the log and the very last line, also where the engine runs in other processes."""
    folder = models("qwen3_moe")
    if "similarity" in change:
        change["mask_router"] = torch.zeros(8, 64)
    entry = {"policy": {"name": "sere", "artifact": artifact_of(folder, tmp_path, **change)}}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": processes}
    lines = run_engine(folder, entry=entry, fails=True, environment=environment)["log"].strip().splitlines()
    assert re.search(message, lines[-1])
    (logged,) = [line for line in lines if "moe_fx: " in line]
    assert re.search(f"ERROR .*{message}", logged)


def test_a_kernel_that_routes_inside_itself_stops_the_start(models, run_engine):
    folder = models("qwen3_moe")
    entry = {"policy": {"name": "sere", "artifact": str(folder.with_suffix(".moe.safetensors"))}}
    log = run_engine(folder, entry=entry, form="opaque", monolithic=True, fails=True)["log"]
    last = log.strip().splitlines()[-1]
    assert "moe_fx cannot change the routing of 'model.layers.0.mlp.experts': its kernel" in last
    assert "routes inside itself, so no pass can reach the decision: choose another MoE kernel" in last


def test_an_artifact_among_the_weights_stops_the_start(models, run_engine, tmp_path):
    folder = shutil.copytree(models("qwen3_moe"), tmp_path / "model")
    moe_fx.Artifact.load(models("qwen3_moe").with_suffix(".moe.safetensors")).save(folder / "a.moe.safetensors")
    log = run_engine(folder, entry={"policy": {"name": "sere", "artifact": str(folder / "a.moe.safetensors")}}, fails=True)["log"]
    assert "a.moe.safetensors lies in the model's folder" in log.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("entry", "engine", "message"),
    [
        ({"policy": {"name": "sere", "artifact": "/nowhere.safetensors"}}, {}, "/nowhere.safetensors"),
        ({"policy": {"name": "smaller_k", "k": 2}}, {}, "no policy 'smaller_k' runs inside vLLM"),
        ({"polcy": 1}, {}, "has no option 'polcy'"),
        ({"policy": {"name": "sere", "artifact": "ARTIFACT"}}, {"enforce_eager": True}, "leave enforce_eager out"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_stops_the_start_with_one_line(models, run_engine, entry, engine, message):
    folder = models("qwen3_moe")
    text = json.dumps(entry).replace("ARTIFACT", str(folder.with_suffix(".moe.safetensors")))
    log = run_engine(folder, entry=json.loads(text), engine=engine, fails=True)["log"]
    assert re.search(message, log.strip().splitlines()[-1])


def test_a_model_without_experts_starts_with_a_warning(models, run_engine):
    folder = models("qwen3")
    entry = {"policy": {"name": "sere", "artifact": str(folder.with_suffix(".moe.safetensors"))}}
    result = run_engine(folder, entry=entry)
    warnings = [line for line in result["log"].splitlines() if "moe_fx" in line and "WARNING" in line]
    assert len(warnings) == 1
    assert "the model has no mixture-of-experts layer, so the policy does nothing" in warnings[0]


def test_a_pass_of_the_users_own_still_runs(models, run_engine):
    folder = models("qwen3_moe")
    entry = {"policy": {"name": "sere", "artifact": str(folder.with_suffix(".moe.safetensors"))}}
    log = run_engine(folder, entry=entry, own_pass=True)["log"]
    assert log.count("the user's own pass ran on 1 output") == 1
    assert "2 of 2 MoE layers run" in log


def test_two_ranks_route_alike(models, run_engine):
    """Tensor parallelism: the same ids on both ranks, and one rank's tokens."""
    folder = models("qwen3_moe")
    artifact = str(folder.with_suffix(".moe.safetensors"))
    entry = {"policy": [{"name": "beam", "artifact": artifact}, {"name": "sere", "artifact": artifact, "primary": 1}]}
    alone = run_engine(folder, entry=entry)["started"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    two = run_engine(folder, entry=entry, engine={"tensor_parallel_size": 2}, watch=True, environment=environment)
    first, second = two["saw"]
    assert first == second
    assert len(first) > 8
    assert two["started"] == alone


@pytest.mark.parametrize(("processes", "most_steps"), [("0", 2 * 8), ("1", 7 * 8)])
def test_stats_count_what_requests_did(models, run_engine, processes, most_steps):
    """In one process and in several; the warm-up's forward, in which every token is a dummy, does not count."""
    folder = models("qwen3_moe")
    artifact = str(folder.with_suffix(".moe.safetensors"))
    policy = [{"name": "beam", "artifact": artifact}, {"name": "sere", "artifact": artifact, "primary": 1}]
    entry = {"policy": policy, "stats": True}
    result = run_engine(folder, entry=entry, environment={"VLLM_ENABLE_V1_MULTIPROCESSING": processes})
    assert set(result["stats"]) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    for steps, before, active, off in result["stats"].values():
        # two rounds of eight tokens; an engine in another process may begin before it has all seven prompts
        assert 2 * 8 <= steps <= most_steps
        assert 1 <= active < before <= 16
        assert 0 < off < 4 * 24
