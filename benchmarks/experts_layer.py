"""One layer of experts: transformers' own under Inductor, the same through moe_sparse, and ``fused_experts`` by itself.

    python -m benchmarks.experts_layer [--threads 2] [--tokens 1 4 16] [--out FOLDER]

Random weights, four layers of them in turn.  Every round measures every configuration once, and a copy of memory, so that
a busy moment of the machine slows all of them; before each, memory is read, so that none finds its weights in the cache or
waits for what the one before has written.  "layer" rows are whole layers with their router, compiled.  "fused_experts" rows
are the op alone, with the router's picks, and with picks moved and switched off.  A row is written only for what first
equals the reference.
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
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_fx.ops  # noqa: F401  (registers the op)
from benchmarks.measure import RESULTS, available_cores, device_in_a_name, median_ratio, spread, write_csv
from moe_fx.kernels import reference
from moe_fx.testing import random_similarity

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
    "cpu": (Shape("decode_600m", 64, 8, 1024, 512, (1, 2, 4, 8, 16, 24, 32, 48, 64, 512)),),
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


def run(say: Say, tokens: Sequence[int] = ()) -> list[Row]:
    """A row for every shape, batch (or those of so many ``tokens`` only) and configuration.

    Raises:
        WrongResultError: a configuration differs from the reference.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    with torch.inference_mode():
        for shape in SHAPES[device]:
            experts = [random_layer(shape, device, seed) for seed in range(LAYERS)]
            for num_tokens in tokens or shape.batches:
                say(f"{shape.model}, {num_tokens} tokens")
                rows += measure(shape, experts, num_tokens, device)
    return rows


def random_layer(shape: Shape, device: str, seed: int) -> Qwen3MoeSparseMoeBlock:
    """transformers' module with weights that keep the size of activations."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts, hidden_act="silu",
        num_experts_per_tok=shape.top_k, norm_topk_prob=True,
    )  # fmt: skip
    with torch.device(device):
        layer = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for weight in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    return layer


def routings(shape: Shape, layers: Sequence[Any], hidden: Tensor) -> dict[str, list[Picks]]:
    """The picks of every layer: its router's, the same moved by SERE, and with shares of them off as BEAM leaves them."""
    top_k = [layer.gate(hidden)[1:] for layer in layers]

    def off(share: float) -> list[Picks]:
        generator = torch.Generator().manual_seed(0)
        kept = [torch.rand(ids.shape, generator=generator).to(ids.device) >= share for _, ids in top_k]
        return [(weights, ids.masked_fill(~on, -1)) for (weights, ids), on in zip(top_k, kept, strict=True)]

    def sere(seed: int) -> Picks:
        weights, ids = top_k[seed]
        similarity = random_similarity(shape.experts, seed).to(ids.device)
        return weights, reference.sere_reroute(ids, similarity, 1, 0.0)

    shares = {f"BEAM, {share:.0%} off": off(share) for share in (0.5, 0.75, 0.9)}
    return {"top-K": top_k, "SERE S=1": [sere(seed) for seed in range(LAYERS)], **shares}


def by_layer(backend: str, implementation: str) -> Callable[..., Tensor]:
    """The whole layer, its experts as transformers implements them, compiled by a backend."""

    def forward(layer: Any, hidden: Tensor) -> Tensor:
        return layer(hidden)

    compiled = torch.compile(forward, dynamic=False, backend=backend)

    def call(layer: Any, hidden: Tensor, *_: Tensor) -> Tensor:
        layer.experts.config._experts_implementation = implementation
        return compiled(layer, hidden[None])[0]

    return call


def by_op(layer: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    experts = layer.experts
    return torch.ops.moe_fx.fused_experts(hidden, experts.gate_up_proj, experts.down_proj, weights, ids)


def measure(shape: Shape, experts: Sequence[Any], num_tokens: int, device: str) -> list[Row]:
    """Gate, then time in turns.  The first candidate is the baseline."""
    torch._dynamo.reset()
    hidden = torch.randn(num_tokens, shape.hidden, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    picks = routings(shape, experts, hidden)
    candidates = [Candidate("layer, grouped_mm, Inductor", by_layer("inductor", "grouped_mm"), picks["top-K"])]
    if num_tokens <= BATCHED_MM_TOKENS:
        candidates += [Candidate("layer, batched_mm, Inductor", by_layer("inductor", "batched_mm"), picks["top-K"])]
    candidates += [Candidate("layer, moe_sparse", by_layer("moe_sparse", "grouped_mm"), picks["top-K"])]
    candidates += [Candidate(f"fused_experts, {name}", by_op, routing) for name, routing in picks.items()]
    gate(candidates, experts, hidden)
    copies = take_turns(candidates, experts, hidden, device)
    return [result_row(c, candidates, shape, num_tokens, copies) for c in candidates]


def gate(candidates: Sequence[Candidate], experts: Sequence[Any], hidden: Tensor) -> None:
    """Refuse to time wrong results."""
    for candidate in candidates:
        for turn, layer in enumerate(experts):
            weights, ids = candidate.picks[turn]
            parameters = layer.experts.gate_up_proj, layer.experts.down_proj
            expected = reference.fused_experts(hidden, *parameters, weights, ids).double()
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
        seconds = []
        for index, ways in enumerate(calls):
            source.sum()
            seconds.append(seconds_of(ways[(turn + index) % LAYERS], device))
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
        "share_of_fused_top_k_time": round(1 / median_ratio(full.seconds, candidate.seconds), 3),
        "relative_error": round(candidate.error, 5),
        "expert_megabytes": round(expert_bytes / 1e6, 1),
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "share_of_copy_bandwidth": round(expert_bytes / seconds / bandwidth, 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the .csv file (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="CPU threads (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="only these batches (default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=200)
    with console.status("starting") as status:
        rows = run(status.update, options.tokens)
    path = options.out / f"experts_layer_{device_in_a_name()}.csv"
    write_csv(path, rows)
    ratios = "ratio_to_grouped_mm", "share_of_fused_top_k_time", "share_of_copy_bandwidth"
    shown = ("tokens", "configuration", "milliseconds", *ratios)
    for row in rows:
        console.print("  ".join(f"{row[name]!s:>{36 if name == 'configuration' else 8}}" for name in shown), highlight=False)
    console.print(f"({', '.join(shown)})\nWritten: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
