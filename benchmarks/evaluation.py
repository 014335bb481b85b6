"""What the demo compares, and how it measures quality and speed in the same run.

Every configuration is compiled for every batch size.  They then take turns on the same held-out texts, a segment of
tokens each, so that a busy moment of the machine falls on all of them; a ratio is always formed within one turn.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3MoeForCausalLM

import moe_fx
from benchmarks.measure import median_ratio
from benchmarks.models import Decoder, compiled, set_top_k

Advance = Callable[[int, str], None]  # (units done, what is being done)

_COUNTED_STEPS = 64  # tokens over which active experts are counted
_SEGMENT_STEPS = 16  # tokens one configuration decodes before the next one's turn


@dataclass
class Configuration:
    """One way to run the model, and what was measured of it.

    Attributes:
        kind: ``"full"``, ``"plain"`` or ``"sere"``.
        policy: None where the model is compiled by Inductor alone.
        active_experts: mean number of distinct experts per layer in one step of the largest batch.
        losses: mean negative log-likelihood of each text, in nats per token, at the largest batch.
        step_seconds: batch -> the median step of each turn.
    """

    name: str
    kind: str
    top_k: int
    policy: moe_fx.Policy | None = None
    active_experts: float = math.nan
    losses: list[float] = field(default_factory=list)
    step_seconds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))

    def tokens_per_second(self, batch: int) -> float:
        return batch / statistics.median(self.step_seconds[batch])

    def speedup(self, baseline: Configuration, batch: int) -> float:
        return median_ratio(baseline.step_seconds[batch], self.step_seconds[batch])

    def loss_increase(self, baseline: Configuration) -> tuple[float, float]:
        """Nats per token above the baseline on the same texts, and the standard error of that over texts."""
        differences = [mine - full for mine, full in zip(self.losses, baseline.losses, strict=True)]
        return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def choose(
    artifact: moe_fx.Artifact,
    full_k: int,
    plain_k: Sequence[int],
    primaries: Sequence[int],
    quantiles: Sequence[float],
) -> list[Configuration]:
    """Full top-K by Inductor alone (the baseline, first); by the backend: full and smaller K, SERE over (S, threshold).

    Smaller K is compiled by the backend too, so that it differs from SERE in its routing alone.
    """
    chosen = [
        Configuration("full, Inductor alone", "full", full_k),
        Configuration("full, moe_sparse", "full", full_k, moe_fx.TopK()),
        *(Configuration(f"plain top-{k}", "plain", k, moe_fx.TopK()) for k in plain_k),
    ]
    for primary in primaries:
        for threshold in [0.0, *similarity_thresholds(artifact, quantiles)]:
            policy = moe_fx.SERE(artifact, primary=primary, threshold=threshold)
            chosen.append(Configuration(f"SERE S={primary}, threshold {threshold:g}", "sere", full_k, policy))
    return chosen


def similarity_thresholds(artifact: moe_fx.Artifact, quantiles: Sequence[float]) -> list[float]:
    """Thresholds at quantiles of the similarities between different experts, rounded to two decimals."""
    tables = [tensors["similarity"] for tensors in artifact.sites.values()]
    different = torch.cat([table[~torch.eye(len(table), dtype=torch.bool)] for table in tables])
    return [round(float(torch.quantile(different, q)), 2) for q in quantiles]


@dataclass(frozen=True)
class Lane:
    """One configuration compiled for one batch size, with its own key/value cache."""

    configuration: Configuration
    batch: int
    decoder: Decoder


def compile_lanes(
    model: Qwen3MoeForCausalLM,
    configurations: Sequence[Configuration],
    batches: Sequence[int],
    tokens: Tensor,
    advance: Advance,
) -> list[Lane]:
    """Compile every configuration for every batch size, with a cache as long as ``tokens`` [largest batch, length]."""
    lanes: list[Lane] = []
    for configuration in configurations:
        variant = sharing_weights(model)
        set_top_k(variant, configuration.top_k)
        for batch in batches:
            advance(len(lanes), f"{configuration.name}, batch {batch}")
            decoder = Decoder(compiled(variant, configuration.policy), variant, batch, tokens.shape[1])
            decoder.advance(tokens[:batch, :2])
            lanes.append(Lane(configuration, batch, decoder))
    advance(len(lanes), "")
    return lanes


def sharing_weights(model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """Another module tree over the same tensors, so that one can run with another K."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def decode(lanes: Sequence[Lane], groups: Sequence[Tensor], advance: Advance) -> None:
    """Teacher-forced decoding of every group [largest batch, length], all lanes taking turns; fills configurations.

    Smaller batches decode the first rows of the first group only: they are for speed.
    """
    largest = max(lane.batch for lane in lanes)
    done = 0
    for index, group in enumerate(groups):
        running = [lane for lane in lanes if index == 0 or lane.batch == largest]
        losses: dict[str, list[Tensor]] = {lane.configuration.name: [] for lane in running if lane.batch == largest}
        for lane in running:
            lane.decoder.rewind()
        for inputs, targets in segments(group):
            for lane in running:
                logits, seconds = lane.decoder.advance(inputs[: lane.batch])
                configuration = lane.configuration
                configuration.step_seconds.setdefault(lane.batch, []).append(statistics.median(seconds))
                if lane.batch == largest:
                    losses[configuration.name].append(cross_entropy(logits.float().mT, targets, reduction="none"))
            done += 1
            advance(done, "")
        for lane in running:
            if lane.batch == largest:
                per_text = torch.cat(losses[lane.configuration.name], dim=1).mean(dim=1)
                lane.configuration.losses.extend(per_text.tolist())


def segments(tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) [rows, up to 16] that follow each other through ``tokens`` [rows, length]."""
    yield from zip(tokens[:, :-1].split(_SEGMENT_STEPS, dim=1), tokens[:, 1:].split(_SEGMENT_STEPS, dim=1), strict=True)


def segment_count(groups: Sequence[Tensor]) -> int:
    return sum(math.ceil((group.shape[1] - 1) / _SEGMENT_STEPS) for group in groups)


def count_active_experts(
    model: Qwen3MoeForCausalLM, configurations: Sequence[Configuration], group: Tensor, advance: Advance
) -> None:
    """Decode the first tokens of a group once more, uncompiled and untimed, and let the backend count experts.

    Counting is left out of what is timed: two small ops a layer are several per cent of a step at batch 1.
    """
    tokens = group[:, :_COUNTED_STEPS]
    counted: dict[str, float] = {}
    for done, configuration in enumerate(configurations):
        advance(done, configuration.name)
        policy = configuration.policy or moe_fx.TopK()
        key = f"{configuration.top_k} {policy.describe()}"
        if key not in counted:
            variant = sharing_weights(model)
            set_top_k(variant, configuration.top_k)
            moe_fx.reset_stats()
            Decoder(compiled(variant, policy, inner="eager", stats=True), variant, *tokens.shape).advance(tokens)
            counted[key] = statistics.fmean(site.active for site in moe_fx.stats().values())
        configuration.active_experts = counted[key]
    advance(len(configurations), "")
