"""Decode steps of a 600 M-parameter Qwen3-MoE: what SERE gains where experts do not fit into a cache.

Random bf16 weights and random tokens, a static key/value cache, Inductor as the inner compiler of everything.  The cache
is short, 64 tokens, because PyTorch's CPU attention is slow for one query: over 256 tokens it takes a fifth of
Inductor's step and two fifths of SERE's.  Quality means nothing here (the demo measures that); active experts, bytes and time do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from transformers import Qwen3MoeForCausalLM

import moe_fx
from benchmarks.measure import copy_bandwidth, median_ratio, spread
from benchmarks.models import DECODE_600M, Decoder, compiled, qwen3_moe, routers
from moe_fx.backend import last_report
from moe_fx.kernels.reference import sere_reroute
from moe_fx.testing import random_similarity, tolerance

Row = dict[str, object]
Say = Callable[[str], None]

SHAPE = DECODE_600M
BATCHES = (1, 4, 16, 32)
PRIMARIES = (1, 2, 4)
_CACHE_TOKENS = 64
_GATE_STEPS = 4
_ROUNDS, _STEPS_PER_ROUND = 15, 4


class WrongResultError(RuntimeError):
    """What was to be timed does not compute what it should: no speed is reported for it."""


@dataclass
class Candidate:
    """One way to compile the model, and its steps' seconds by round."""

    name: str
    policy: moe_fx.Policy | None
    decoder: Decoder
    active_experts: float = 0.0
    relative_error: float = 0.0
    seconds: list[float] = field(default_factory=list)


def run(say: Say) -> list[Row]:
    """A row for every batch size and policy.

    Raises:
        WrongResultError: the equality gate failed.
    """
    model = qwen3_moe(SHAPE, dtype=torch.bfloat16, seed=0)
    artifact = random_artifact(model)
    say("checking the rewritten graphs in float32 against an eager model patched by hand")
    gate_float32(artifact)
    bandwidth = copy_bandwidth()
    rows: list[Row] = []
    for batch in BATCHES:
        say(f"batch {batch}: compiling {2 + len(PRIMARIES)} graphs")
        candidates = compile_candidates(model, artifact, batch)
        say(f"batch {batch}: checking what was compiled")
        gate(model, candidates, batch)
        say(f"batch {batch}: {_ROUNDS} rounds")
        take_turns(candidates, batch)
        rows += [result_row(c, candidates[0], batch, bandwidth) for c in candidates]
    return rows


def run_compile(say: Say) -> list[Row]:
    """What the passes add to the time of a first compilation, with nothing in Inductor's caches."""
    model = qwen3_moe(SHAPE, dtype=torch.bfloat16, seed=0)
    policy = moe_fx.SERE(random_artifact(model), primary=1)
    rows: list[Row] = []
    for batch in (1, 16):
        say(f"batch {batch}: compiling with empty caches")
        torch._dynamo.reset()
        with fresh_cache():
            Decoder(compiled(model, policy), model, batch, _CACHE_TOKENS).advance(random_tokens(batch, 1, seed=0))
        report = last_report()
        rows.append(
            {
                "batch": batch,
                "policy": policy.describe(),
                "model": SHAPE.describe(),
                **{f"{step}_seconds": round(seconds, 3) for step, seconds in report.seconds.items()},
                "backend_seconds": round(report.compile_seconds, 2),
                "share_of_passes": round(report.overhead, 4),
            }
        )
    return rows


def random_artifact(model: Qwen3MoeForCausalLM) -> moe_fx.Artifact:
    """A random symmetric similarity for every layer."""
    halves = {name: random_similarity(SHAPE.experts, seed=index) for index, name in enumerate(routers(model))}
    tables = {name: {"similarity": (half + half.T) / 2} for name, half in halves.items()}
    return moe_fx.Artifact(sites=tables, metadata={"calibrated_on": "nothing: random values"})


def random_tokens(batch: int, steps: int, seed: int) -> Tensor:
    """[batch, steps] token ids."""
    return torch.randint(SHAPE.vocab, (batch, steps), generator=torch.Generator().manual_seed(seed))


def compile_candidates(model: Qwen3MoeForCausalLM, artifact: moe_fx.Artifact, batch: int) -> list[Candidate]:
    """Inductor alone, the baseline, comes first."""
    policies: list[tuple[str, moe_fx.Policy | None]] = [
        ("Inductor alone", None),
        ("moe_sparse, TopK", moe_fx.TopK()),
        *((f"moe_sparse, SERE S={s}", moe_fx.SERE(artifact, primary=s)) for s in PRIMARIES),
    ]
    candidates = []
    for name, policy in policies:
        decoder = Decoder(compiled(model, policy), model, batch, _CACHE_TOKENS)
        decoder.advance(random_tokens(batch, 2, seed=0))
        candidates.append(Candidate(name, policy, decoder))
    return candidates


# -------------------------------------------------------------------------------------------- the equality gate


def gate_float32(artifact: moe_fx.Artifact) -> None:
    """In float32, where rounding changes no routing decision, SERE equals an eager model patched with the reference.

    Raises:
        WrongResultError: it does not.
    """
    model = qwen3_moe(SHAPE, dtype=torch.float32, seed=0)
    for batch, primary in product(BATCHES, PRIMARIES):
        policy = moe_fx.SERE(artifact, primary=primary)
        tokens = random_tokens(batch, 2, seed=1)
        with patched_by_hand(model, policy):
            expected, _ = Decoder(model, model, batch, _CACHE_TOKENS).advance(tokens)
        got, _ = Decoder(compiled(model, policy, inner="eager"), model, batch, _CACHE_TOKENS).advance(tokens)
        if not equal(got, expected):
            raise WrongResultError(
                f"{policy.describe()} at batch {batch} differs from the eager model patched by hand by "
                f"{relative_error(got, expected):.2e} of its size in float32"
            )


def gate(model: Qwen3MoeForCausalLM, candidates: Sequence[Candidate], batch: int) -> None:
    """What is to be timed, in bf16: near the eager model, patched by hand for SERE.  Also counts the active experts.

    Near, because two correct programs round differently in bf16, which now and then changes a close routing decision,
    and with it the primary experts of a whole batch.  Exact top-K may differ from eager twice as much as Inductor's own
    result does; SERE must be much nearer to the model patched by hand than to exact top-K.

    Raises:
        WrongResultError: it is not so.
    """
    tokens = random_tokens(batch, _GATE_STEPS, seed=1)
    baseline, rounding = torch.empty(0), 0.0
    for candidate in candidates:
        with patched_by_hand(model, candidate.policy) as counts:
            expected, _ = Decoder(model, model, batch, _CACHE_TOKENS).advance(tokens)
        candidate.decoder.rewind()
        got, _ = candidate.decoder.advance(tokens)
        candidate.active_experts = statistics.fmean(counts)
        candidate.relative_error = relative_error(got, expected)
        if candidate.policy is None:
            baseline, rounding = got, candidate.relative_error
            continue
        exact = isinstance(candidate.policy, moe_fx.TopK)
        allowed = 2 * rounding if exact else 0.5 * relative_error(got, baseline)
        if candidate.relative_error > allowed:
            raise WrongResultError(
                f"{candidate.name} at batch {batch} differs from the eager model by {candidate.relative_error:.4f} of "
                f"its size, and {allowed:.4f} is allowed"
            )


@contextmanager
def patched_by_hand(model: Qwen3MoeForCausalLM, policy: moe_fx.Policy | None) -> Iterator[list[int]]:
    """The eager model with every router's picks put through the reference; yields the experts counted per layer and step."""
    counts: list[int] = []

    def hook(name: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def reroute(module: object, args: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, ids = output
            if isinstance(policy, moe_fx.SERE):
                similarity = policy.require_artifact().sites[name]["similarity"]
                ids = sere_reroute(ids, similarity, policy.primary, policy.threshold)
            counts.append(ids.unique().numel())
            return logits, weights, ids

        return reroute

    handles = [router.register_forward_hook(hook(name)) for name, router in routers(model).items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def equal(got: Tensor, expected: Tensor) -> bool:
    """Within the tolerance of their dtype."""
    allowed = tolerance(expected.dtype)
    return torch.allclose(got, expected, rtol=allowed["rtol"], atol=allowed["atol"])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Size of the difference by the size of what was expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# -------------------------------------------------------------------------------------------------- timing


def take_turns(candidates: Sequence[Candidate], batch: int) -> None:
    """Every round times every candidate on the same new tokens; the median step stands for a round."""
    for candidate in candidates:
        candidate.decoder.rewind()
    for index in range(_ROUNDS):
        tokens = random_tokens(batch, _STEPS_PER_ROUND, seed=100 + index)
        for candidate in candidates:
            _, seconds = candidate.decoder.advance(tokens)
            candidate.seconds.append(statistics.median(seconds))


def result_row(candidate: Candidate, baseline: Candidate, batch: int, bandwidth: float) -> Row:
    """One row, with the bytes of the experts that a step reads and their share of what the memory could deliver."""
    seconds = statistics.median(candidate.seconds)
    expert_bytes = candidate.active_experts * SHAPE.layers * SHAPE.expert_parameters * torch.bfloat16.itemsize
    return {
        "batch": batch,
        "configuration": candidate.name,
        "model": f"qwen3_moe {SHAPE.describe()} bfloat16",
        "active_experts_per_layer": round(candidate.active_experts, 2),
        "step_ms": round(1e3 * seconds, 3),
        "step_spread": round(spread(candidate.seconds), 3),
        "tokens_per_second": round(batch / seconds, 1),
        "ratio_to_inductor": round(median_ratio(baseline.seconds, candidate.seconds), 3),
        "relative_error_to_eager": round(candidate.relative_error, 5),
        "expert_megabytes_per_step": round(expert_bytes / 1e6, 1),
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "share_of_copy_bandwidth": round(expert_bytes / seconds / bandwidth, 3),
    }
