"""Decode steps of vLLM's CPU engine on a 624 M-parameter Qwen3-MoE: stock vLLM against SERE and BEAM.

Random bf16 weights and prompts of random tokens.  Every engine runs in a process of its own and sleeps while another is
timed: stock vLLM (our plugin not loaded), vLLM with the plugin and no policy, one with SERE's graph and one with BEAM's.  A
policy's settings are read while a graph runs, so one engine serves all settings of its policy.  A round times every
configuration once, so that a busy moment of the machine slows both terms of a ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import RESULTS, device_in_a_name, median_ratio, spread, write_csv
from benchmarks.models import DECODE_600M

SHAPE = DECODE_600M
BATCHES = (1, 4, 8, 16, 32)
PROMPT_TOKENS, STEPS, ROUNDS = 16, 20, 9
# Mask logits of a random mask router are normal with deviation 1 here, so this share of the picks lies below tau.
BEAM_OFF = {0.50: 0.5, 0.85: 1 / (1 + math.exp(-statistics.NormalDist().inv_cdf(0.85)))}


class WrongResultError(RuntimeError):
    """An engine did not route as the reference does: no speed is reported for it."""


@dataclass
class Candidate:
    """One configuration, and its seconds a step by batch and round."""

    name: str
    engine: str
    policy: dict[str, Any] | None = None
    seconds: dict[int, list[float]] = field(default_factory=dict)
    active_experts: dict[int, float] = field(default_factory=dict)


def candidates(artifact: Path) -> list[Candidate]:
    """Stock vLLM, the baseline, comes first."""
    sere = [Candidate(f"SERE S={s}", "sere", {"name": "sere", "artifact": str(artifact), "primary": s}) for s in (1, 2, 4)]
    beam = [
        Candidate(f"BEAM {off:.0%} off", "beam", {"name": "beam", "artifact": str(artifact), "tau": tau})
        for off, tau in BEAM_OFF.items()
    ]
    return [Candidate("vLLM", "stock"), Candidate("vLLM, plugin without a policy", "plugin"), *sere, *beam]


# ---------------------------------------------------------------------------------------------- an engine's process


def serve(folder: Path, engine: str) -> None:
    """Run one engine: read ``{"batch": n, "policy": ...}`` from standard input, answer with the seconds of a decode step."""
    from vllm import LLM

    artifact = folder / "model.moe.safetensors"
    policies = {"sere": {"name": "sere", "artifact": str(artifact)}, "beam": {"name": "beam", "artifact": str(artifact)}}
    entry = {"moe_fx": {"policy": policies[engine]}} if engine in policies else {}
    llm = LLM(
        str(folder / "model"), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=128, max_num_seqs=max(BATCHES),
        enable_prefix_caching=False, additional_config=entry, seed=0, kv_cache_memory_bytes=2**27,
    )  # fmt: skip
    answer({"ready": engine})
    for line in sys.stdin:
        request = json.loads(line)
        if request["policy"] is not None:
            put_policy(llm, request["policy"])
        watch = watched if request["check"] and request["policy"] is not None else unwatched
        with watch() as active:
            seconds = step_seconds(llm, request["batch"])
        if watch is watched and not active:
            # captured CUDA graphs keep the policy that they were captured with, and call nothing that could be watched
            raise WrongResultError("no routing decision was seen: this benchmark is for the CPU engine")
        answer({"seconds": seconds, "active": statistics.fmean(active) if active else None})


def answer(what: dict[str, object]) -> None:
    """A line for the parent; vLLM writes to the same stream."""
    print("\n@" + json.dumps(what), flush=True)


def put_policy(llm: Any, policy: dict[str, Any]) -> None:
    """Give the running engine's layers other settings of its policy."""
    from moe_fx.vllm import config, layers

    settings = config.parse({"policy": policy})
    llm.collective_rpc(lambda worker: layers.install(worker.model_runner, settings, worker.device))


@contextmanager
def unwatched() -> Iterator[list[int]]:
    yield []


@contextmanager
def watched() -> Iterator[list[int]]:
    """While active, every decision is compared with the reference, and its distinct experts are noted."""
    from moe_fx.kernels import reference
    from moe_fx.vllm import ops

    active: list[int] = []
    route = ops.route

    def checked(layer: Any, weights: Tensor | None, ids: Tensor, hidden: Tensor | None) -> tuple[Tensor | None, Tensor]:
        new_weights, new_ids = route(layer, weights, ids, hidden)
        (policy,), (table,) = layer.policies, layer.tensors
        if policy.name == "sere":
            expected = reference.sere_reroute(ids, table, *layer.sere)
        else:
            off = reference.beam_mask(weights, ids, hidden.float() @ table.T, policy.tau)  # type: ignore[union-attr]
            expected_weights, expected = reference.fold_masked(*off)
            if not torch.equal(expected_weights, new_weights):  # type: ignore[arg-type]
                raise WrongResultError(f"{layer.layer}: weights differ from the reference's")
        if not torch.equal(expected, new_ids):
            raise WrongResultError(f"{layer.layer}: ids differ from the reference's")
        active.append(new_ids.unique().numel())
        return new_weights, new_ids

    with mock.patch.object(ops, "route", checked):
        yield active


def step_seconds(llm: Any, batch: int) -> float:
    """The median time of a step that decodes one token for each of ``batch`` sequences."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0.0, max_tokens=STEPS + 2, ignore_eos=True, detokenize=False)
    tokens = torch.randint(SHAPE.vocab, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch))
    for number, prompt in enumerate(tokens.tolist()):
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": prompt}, sampling)
    engine.step()  # the prompts
    seconds = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:-1])


# ------------------------------------------------------------------------------------------------------- the parent


class Engine:
    """A process that runs ``serve``."""

    def __init__(self, folder: Path, name: str) -> None:
        vllm_settings = {"ENABLE_V1_MULTIPROCESSING": "0", "LOGGING_LEVEL": "WARNING"}
        environment = os.environ | {f"VLLM_{key}": value for key, value in vllm_settings.items()}
        environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        if name == "stock":
            environment["VLLM_PLUGINS"] = "none"
        command = [sys.executable, "-m", "benchmarks.vllm_decode", "--serve", name, "--folder", str(folder)]
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.answer()

    def ask(self, batch: int, policy: dict[str, Any] | None, check: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"batch": batch, "policy": policy, "check": check}) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"an engine ended: see {self._log.name}\n" + "".join(Path(self._log.name).read_text()[-3000:]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def save_model(folder: Path) -> None:
    """The random model, and an artifact with random similarities and mask routers."""
    import moe_fx
    from benchmarks.models import qwen3_moe
    from moe_fx.testing import random_similarity

    model = qwen3_moe(SHAPE, dtype=torch.bfloat16, seed=0)
    model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for layer in range(SHAPE.layers):
        half = random_similarity(SHAPE.experts, seed=layer)
        masks = torch.randn(SHAPE.experts, SHAPE.hidden, generator=generator) / SHAPE.hidden**0.5
        sites[f"model.layers.{layer}.mlp"] = {"similarity": (half + half.T) / 2, "mask_router": masks}
    moe_fx.Artifact(sites, {"calibrated_on": "nothing: random values"}).save(folder / "model.moe.safetensors")


def run(folder: Path, rounds: int, batches: tuple[int, ...]) -> list[dict[str, object]]:
    """A row for every batch and configuration.

    Raises:
        RuntimeError: an engine ended, which it also does with ``WrongResultError``.
    """
    save_model(folder)
    listed = candidates(folder / "model.moe.safetensors")
    engines: dict[str, Engine] = {}
    try:
        for candidate in listed:
            if candidate.engine not in engines:
                print(f"starting {candidate.engine}", flush=True)
                engines[candidate.engine] = Engine(folder, candidate.engine)
        for batch in batches:
            for c in listed:
                c.active_experts[batch] = engines[c.engine].ask(batch, c.policy, check=True)["active"]
            for number in range(rounds):
                order = listed if number % 2 == 0 else listed[::-1]
                for c in order:
                    c.seconds.setdefault(batch, []).append(engines[c.engine].ask(batch, c.policy)["seconds"])
            for c in listed:
                print(batch, c.name, f"{median_ratio(listed[0].seconds[batch], c.seconds[batch]):.2f}x", flush=True)
    finally:
        for engine in engines.values():
            engine.close()
    return [row(c, listed[0], batch) for batch in batches for c in listed]


def row(candidate: Candidate, stock: Candidate, batch: int) -> dict[str, object]:
    seconds = candidate.seconds[batch]
    return {
        "batch": batch,
        "configuration": candidate.name,
        "model": SHAPE.describe(),
        "active_experts_per_layer": round(candidate.active_experts[batch], 2) if candidate.active_experts[batch] else "",
        "step_ms": round(1e3 * statistics.median(seconds), 3),
        "step_spread": round(spread(seconds), 3),
        "tokens_per_second": round(batch / statistics.median(seconds), 1),
        "ratio_to_vllm": round(median_ratio(stock.seconds[batch], seconds), 3),
        "rounds": len(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_decode", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / f"vllm_decode_{device_in_a_name()}.csv", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="%(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="%(default)s")
    parser.add_argument("--folder", type=Path, help="where the model and the engines' logs go (default: a temporary folder)")
    parser.add_argument("--serve", metavar="ENGINE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.folder, options.serve)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(options.out, run(folder, options.rounds, tuple(options.batches)))
    print(f"Written: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
