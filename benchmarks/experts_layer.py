"""The experts of one layer: ``fused_experts`` beside transformers' own under Inductor, with picks moved and switched off.

    python -m benchmarks.experts_layer [--threads 2] [--out FOLDER]

Random weights, four layers of them in turn, which together are larger than any cache.  Every round measures every
configuration once, and a copy of memory, so that a busy moment of the machine slows all of them.  A row is written only
for what first equals the reference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_fx.ops  # noqa: F401  (registers the op)
from benchmarks.measure import RESULTS, available_cores, median_ratio, spread, write_csv
from moe_fx.kernels import reference
from moe_fx.testing import random_routing, random_similarity

Row = dict[str, object]
Say = Callable[[str], None]
Picks = tuple[Tensor, Tensor]

ROUNDS = 16  # a multiple of LAYERS
LARGEST_ERROR = 0.02  # of the size of the result: some roundings to bfloat16
LAYERS = 4
BATCHED_MM_TOKENS = 16  # batched_mm copies the weights of every pick: beyond this it takes seconds
_COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}


@dataclass(frozen=True)
class Shape:
    """One layer of a model, in the field's letters, and the batches to measure."""

    model: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    batches: tuple[int, ...]

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * torch.bfloat16.itemsize

    def describe(self) -> str:
        return f"{self.model} E={self.experts} K={self.top_k} H={self.hidden} I={self.intermediate} bfloat16"


_GPU_BATCHES = (1, 4, 16, 64, 256, 1024, 8192)
SHAPES = {
    "cpu": (Shape("decode_600m", 64, 8, 1024, 512, (1, 4, 16, 32, 64, 512)),),
    "cuda": (
        Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, _GPU_BATCHES),
        Shape("DeepSeek-V2-Lite", 64, 6, 2048, 1408, _GPU_BATCHES),
    ),
}


class WrongResultError(RuntimeError):
    """What was to be timed does not compute what it should: no speed is reported for it."""


@dataclass
class Candidate:
    """One way to compute the layers, the picks of every layer, and the seconds of each round."""

    name: str
    call: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    picks: list[Picks]
    error: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def __call__(self, experts: Sequence[Any], hidden: Tensor, turn: int) -> Tensor:
        weights, ids = self.picks[turn % LAYERS]
        return self.call(experts[turn % LAYERS], hidden, ids, weights)

    def active_experts(self, num_experts: int) -> float:
        return statistics.fmean(int(reference.count_active(ids, num_experts)) for _, ids in self.picks)


def run(say: Say) -> list[Row]:
    """A row for every shape, batch and configuration.

    Raises:
        WrongResultError: a configuration differs from the reference.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    with torch.inference_mode():
        for shape in SHAPES[device]:
            experts = [random_experts(shape, device, seed) for seed in range(LAYERS)]
            for num_tokens in shape.batches:
                say(f"{shape.model}, {num_tokens} tokens")
                rows += measure(shape, experts, num_tokens, device)
    return rows


def random_experts(shape: Shape, device: str, seed: int) -> Qwen3MoeExperts:
    """transformers' module with weights that keep the size of activations."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts, hidden_act="silu"
    )
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    experts.gate_up_proj.normal_(std=shape.hidden**-0.5, generator=generator)
    experts.down_proj.normal_(std=shape.intermediate**-0.5, generator=generator)
    return experts


def routings(shape: Shape, num_tokens: int, device: str) -> dict[str, list[Picks]]:
    """The picks of every layer: all of them, moved by SERE, and with shares of them off as BEAM leaves them."""

    def of_layers(make: Callable[[int], Picks]) -> list[Picks]:
        return [(weights.to(device), ids.to(device)) for weights, ids in map(make, range(LAYERS))]

    def top_k(seed: int, off: float = 0.0) -> Picks:
        weights, ids = random_routing(num_tokens, shape.top_k, shape.experts, seed, off=off)
        return weights / weights.sum(1, keepdim=True), ids

    def sere(seed: int) -> Picks:
        weights, ids = top_k(seed)
        return weights, reference.sere_reroute(ids, random_similarity(shape.experts, seed), 1, 0.0)

    shares = {f"BEAM, {off:.0%} off": of_layers(partial(top_k, off=off)) for off in (0.5, 0.75, 0.9)}
    return {"top-K": of_layers(top_k), "SERE S=1": of_layers(sere), **shares}


def by_transformers(implementation: str) -> Callable[..., Tensor]:
    """transformers' own experts under Inductor."""

    def forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(hidden, ids, weights)

    compiled = torch.compile(forward, dynamic=False)

    def call(experts: Any, *args: Tensor) -> Tensor:
        experts.config._experts_implementation = implementation
        return compiled(experts, *args)

    return call


def by_op(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.ops.moe_fx.fused_experts(hidden, experts.gate_up_proj, experts.down_proj, weights, ids)


def measure(shape: Shape, experts: Sequence[Any], num_tokens: int, device: str) -> list[Row]:
    """Gate, then time in turns.  The first candidate is the baseline."""
    torch._dynamo.reset()
    picks = routings(shape, num_tokens, device)
    candidates = [Candidate("transformers grouped_mm, Inductor", by_transformers("grouped_mm"), picks["top-K"])]
    if num_tokens <= BATCHED_MM_TOKENS:
        candidates += [Candidate("transformers batched_mm, Inductor", by_transformers("batched_mm"), picks["top-K"])]
    candidates += [Candidate(f"fused_experts, {name}", by_op, routing) for name, routing in picks.items()]
    hidden = torch.randn(num_tokens, shape.hidden, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    gate(candidates, experts, hidden)
    copies = take_turns(candidates, experts, hidden, device)
    return [result_row(c, candidates, shape, num_tokens, copies) for c in candidates]


def gate(candidates: Sequence[Candidate], experts: Sequence[Any], hidden: Tensor) -> None:
    """Refuse to time wrong results."""
    for candidate in candidates:
        for turn, layer in enumerate(experts):
            weights, ids = candidate.picks[turn]
            expected = reference.fused_experts(hidden, layer.gate_up_proj, layer.down_proj, weights, ids).double()
            got = candidate(experts, hidden, turn).double()
            difference = float((got - expected).norm() / expected.norm().clamp(min=1e-9))
            candidate.error = max(candidate.error, difference)
        if not candidate.error <= LARGEST_ERROR:
            raise WrongResultError(
                f"{candidate.name} at {len(hidden)} tokens differs from the reference by {candidate.error:.4f} of its "
                f"size, more than {LARGEST_ERROR}"
            )


def seconds_of(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def repeated(call: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU a captured graph: what a launch costs on the host is not what is measured here."""
    if device == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def take_turns(candidates: Sequence[Candidate], experts: Sequence[Any], hidden: Tensor, device: str) -> list[float]:
    """Time every candidate once a round; returns a copy's bytes per second by round."""
    source = torch.rand(_COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    calls = [[repeated(partial(c, experts, hidden, turn), device) for turn in range(LAYERS)] for c in candidates]
    copies = []
    for turn in range(-LAYERS, ROUNDS):
        copy_seconds = seconds_of(lambda: target.copy_(source), device)
        # Neighbours take different layers: no one finds in the cache what the one before has read.
        seconds = [seconds_of(ways[(turn + index) % LAYERS], device) for index, ways in enumerate(calls)]
        if turn >= 0:  # the rounds before warm up
            copies.append(2 * _COPY_BYTES[device] / copy_seconds)
            for candidate, value in zip(candidates, seconds, strict=True):
                candidate.seconds.append(value)
    return copies


def result_row(
    candidate: Candidate, candidates: Sequence[Candidate], shape: Shape, num_tokens: int, copies: Sequence[float]
) -> Row:
    full = next(c for c in candidates if c.name == "fused_experts, top-K")
    seconds, bandwidth = statistics.median(candidate.seconds), statistics.median(copies)
    active = candidate.active_experts(shape.experts)
    expert_bytes = active * shape.expert_bytes
    return {
        "tokens": num_tokens,
        "configuration": candidate.name,
        "layer": shape.describe(),
        "active_experts": round(active, 1),
        "milliseconds": round(1e3 * seconds, 3),
        "spread": round(spread(candidate.seconds), 3),
        "ratio_to_grouped_mm": round(median_ratio(candidates[0].seconds, candidate.seconds), 3),
        "ratio_to_fused_top_k": round(median_ratio(full.seconds, candidate.seconds), 3),
        "relative_error": round(candidate.error, 5),
        "expert_megabytes": round(expert_bytes / 1e6, 1),
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "share_of_copy_bandwidth": round(expert_bytes / seconds / bandwidth, 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the .csv file (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=200)
    with console.status("starting") as status:
        rows = run(status.update)
    device = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    path = options.out / f"experts_layer_{device}.csv"
    write_csv(path, rows)
    shown = ("tokens", "configuration", "milliseconds", "ratio_to_grouped_mm", "ratio_to_fused_top_k", "share_of_copy_bandwidth")
    for row in rows:
        console.print("  ".join(f"{row[name]!s:>{36 if name == 'configuration' else 8}}" for name in shown), highlight=False)
    console.print(f"({', '.join(shown)})\nWritten: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
