"""One MoE layer on a GPU, routing included: ours under each policy, transformers under Inductor, vLLM's fused MoE.

Every row has the time of the layer (router, scores, selection, policy, experts) and, for ours, of ``fused_experts``
alone on the same picks, and what share of the copy bandwidth the active experts' weights, read once, are of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import moe_fx.ops  # noqa: F401  (registers the ops)
from benchmarks.gpu_measure import (
    Results,
    Rig,
    Row,
    WrongResultError,
    microseconds,
    print_table,
    relative_error,
    result_name,
)
from moe_fx.kernels import reference
from moe_fx.testing import random_similarity

ops = torch.ops.moe_fx
LARGEST_ERROR = 0.02  # of the size of the result: some roundings to bfloat16
CLOSE = 0.02  # of a score: closer than this, two correct programs may pick either
_MOST_SETS, _SET_TOKENS = 16, 4096


@dataclass(frozen=True)
class Shape:
    """One layer of a model, in the field's letters."""

    model: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * torch.bfloat16.itemsize


QWEN3 = Shape("Qwen3-30B-A3B", 128, 8, 2048, 768)
DEEPSEEK = Shape("DeepSeek-V2-Lite", 64, 6, 2048, 1408)
TINY = Shape("tiny", 8, 2, 64, 32)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 8192)


def shapes(rig: Rig) -> tuple[Shape, ...]:
    return (TINY,) if rig.dry else (QWEN3, DEEPSEEK)


def batches(rig: Rig) -> tuple[int, ...]:
    return (1, 3) if rig.dry else TOKENS


@dataclass
class Layer:
    """Weights, and what each policy needs.  Hidden states end in a 1, by which a mask router has a bias."""

    shape: Shape
    router: Tensor  # [E, H]
    w_gate_up: Tensor  # [E, 2 I, H]
    w_down: Tensor  # [E, H, I]
    similarity: Tensor  # [E, E]
    mask_router: Tensor  # [E, H], float32

    @classmethod
    def random(cls, shape: Shape, rig: Rig) -> Layer:
        e, h, i = shape.experts, shape.hidden, shape.intermediate
        mask_router = rig.normal(e, h, seed=4, std=h**-0.5, dtype=torch.float32)
        mask_router[:, -1] = 0
        return cls(
            shape,
            rig.normal(e, h, seed=1, std=h**-0.5),
            rig.normal(e, 2 * i, h, seed=2, std=h**-0.5),
            rig.normal(e, h, i, seed=3, std=i**-0.5),
            random_similarity(e).to(rig.device),
            mask_router,
        )

    def hidden_sets(self, num_tokens: int, rig: Rig) -> list[Tensor]:
        """Inputs that pick different experts, so many that together they read more than a cache holds."""
        count = max(2, min(_MOST_SETS, _SET_TOKENS // num_tokens))
        sets = [rig.normal(num_tokens, self.shape.hidden, seed=100 + index) for index in range(count)]
        for hidden in sets:
            hidden[:, -1] = 1
        return sets

    def with_share_off(self, share: float, rig: Rig) -> Tensor:
        """The mask router with a bias such that this share of picks is off."""
        hidden = self.hidden_sets(256, rig)[0]
        ids = functional.linear(hidden, self.router).topk(self.shape.top_k, dim=-1).indices
        logits = functional.linear(hidden.float(), self.mask_router).gather(1, ids)
        biased = self.mask_router.clone()
        biased[:, -1] = -logits.quantile(share)
        return biased


@dataclass(frozen=True)
class Policy:
    """What happens between the scores and the experts."""

    name: str
    kind: str
    primary: int = 0
    off: float = 0.0


POLICIES = (
    Policy("TopK", "topk"),
    *(Policy(f"SERE S={s}", "sere", primary=s) for s in (1, 2, 4)),
    *(Policy(f"BEAM {off:.0%} off", "beam", off=off) for off in (0.5, 0.75, 0.9)),
)


@dataclass(frozen=True)
class Decided:
    """What a layer returns: its output, and the decision behind it."""

    out: Tensor
    logits: Tensor
    weights: Tensor
    ids: Tensor


def our_layer(policy: Policy, top_k: int) -> Callable[..., tuple[Tensor, ...]]:
    """The graph that the backend makes of a softmax router under a policy, with the experts fused."""

    def forward(
        hidden: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, similarity: Tensor, mask_router: Tensor
    ) -> tuple[Tensor, ...]:
        logits = functional.linear(hidden, router)
        scores = logits.softmax(-1, dtype=torch.float32)
        if policy.kind == "sere":
            values, _, ids = ops.topk_sere(scores, top_k, similarity, policy.primary, 0.0)
        elif policy.kind == "beam":
            values, _, ids = ops.topk_beam(scores, top_k, functional.linear(hidden.float(), mask_router), 0.5)
        else:
            values, ids = scores.topk(top_k, dim=-1)
        weights = (values / values.sum(-1, keepdim=True)).to(hidden.dtype)
        return ops.fused_experts(hidden, w_gate_up, w_down, weights, ids), logits, weights, ids

    return forward


def compiled(function: Callable[..., Any], rig: Rig) -> Callable[..., Any]:
    """By Inductor, once for all batches; two programs, as one token is a case of its own."""
    return function if rig.dry else torch.compile(function, dynamic=True, fullgraph=True)


def expected_ids(policy: Policy, layer: Layer, hidden: Tensor, mask_router: Tensor, logits: Tensor) -> Tensor:
    scores = logits.softmax(-1, dtype=torch.float32)
    if policy.kind == "sere":
        return reference.topk_sere(scores, layer.shape.top_k, layer.similarity, policy.primary, 0.0)[2]
    if policy.kind == "beam":
        mask_logits = functional.linear(hidden.float(), mask_router)
        return reference.topk_beam(scores, layer.shape.top_k, mask_logits, 0.5)[2]
    return reference.top_k(scores, layer.shape.top_k)[1]


def gate_ours(policy: Policy, layer: Layer, hidden: Tensor, mask_router: Tensor, got: Decided) -> float:
    """The error of ours; picks are compared one by one, with top-K's where no other expert is as good."""
    expected = expected_ids(policy, layer, hidden, mask_router, got.logits)
    same = (got.ids == expected).all(1)
    if policy.kind == "topk":
        same |= ~is_clear(got.logits, layer.shape.top_k)
    wrong = int((~same).sum())
    # A mask logit within a rounding of the cut may fall to either side of it.
    if wrong > (len(hidden) // 100 if policy.kind == "beam" else 0):
        raise WrongResultError(f"{policy.name}: {wrong} of {len(hidden)} tokens have other picks than the reference")
    out = reference.fused_experts(hidden, layer.w_gate_up, layer.w_down, got.weights, got.ids)
    return check_error(policy.name, relative_error(got.out, out))


def check_error(name: str, error: float) -> float:
    if not error <= LARGEST_ERROR:
        raise WrongResultError(f"{name} differs from the reference by {error:.4f} of its size, more than {LARGEST_ERROR}")
    return error


def is_clear(logits: Tensor, top_k: int) -> Tensor:
    """Whether the K best are that by a margin that no rounding bridges, bool [T]."""
    if top_k == logits.shape[1]:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    best = logits.float().topk(top_k + 1, dim=-1).values
    return best[:, -2] - best[:, -1] > CLOSE


def measure_ours(policy: Policy, layer: Layer, num_tokens: int, call: Callable[..., Any], rig: Rig) -> Row:
    """Gate and time one policy at one batch."""
    mask_router = layer.with_share_off(policy.off, rig) if policy.kind == "beam" else layer.mask_router
    rest = layer.router, layer.w_gate_up, layer.w_down, layer.similarity, mask_router
    sets = layer.hidden_sets(num_tokens, rig)
    decided = [Decided(*call(hidden, *rest)) for hidden in sets]
    error = gate_ours(policy, layer, sets[0], mask_router, decided[0])
    active = statistics.fmean(int(reference.count_active(d.ids, layer.shape.experts)) for d in decided)
    whole = rig.time([partial(call, hidden, *rest) for hidden in sets])
    picks = list(zip(sets, decided, strict=True))
    experts = [partial(ops.fused_experts, h, layer.w_gate_up, layer.w_down, d.weights, d.ids) for h, d in picks]
    alone = rig.time(experts)
    return row_of(policy.name, layer.shape, num_tokens, whole, rig, error, active) | {
        "experts_microseconds": microseconds(alone)["microseconds"],
        "experts_share_of_copy": share(active, layer.shape, statistics.median(alone), rig),
    }


def share(active: float, shape: Shape, seconds: float, rig: Rig) -> float:
    return round(active * shape.expert_bytes / seconds / rig.copy_bandwidth, 3)


def row_of(
    name: str, shape: Shape, num_tokens: int, seconds: list[float], rig: Rig, error: float, active: float
) -> Row:
    return {
        "model": shape.model,
        "tokens": num_tokens,
        "configuration": name,
        **microseconds(seconds),
        "active_experts": round(active, 1),
        "share_of_copy": share(active, shape, statistics.median(seconds), rig),
        "copy_gigabytes_per_second": round(rig.copy_bandwidth / 1e9),
        "relative_error": round(error, 5),
    }


def transformers_layer(layer: Layer, rig: Rig) -> Callable[[Tensor], Tensor]:
    """transformers' block with its ``grouped_mm`` experts, which is what Inductor compiles best, on the same weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = layer.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16).requires_grad_(False).eval()
    block.gate.weight = torch.nn.Parameter(layer.router, requires_grad=False)
    block.experts.gate_up_proj = torch.nn.Parameter(layer.w_gate_up, requires_grad=False)
    block.experts.down_proj = torch.nn.Parameter(layer.w_down, requires_grad=False)
    run = compiled(lambda x: block(x), rig)

    def call(hidden: Tensor) -> Tensor:
        out = run(hidden[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    return call


def vllm_layer(layer: Layer, rig: Rig) -> Callable[[Tensor], Tensor]:
    """vLLM's Triton fused MoE, with its own routing kernel.

    Raises:
        Exception: of whatever kind, where vLLM is not there or does not have it under these names.
    """
    from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk

    top_k = layer.shape.top_k

    def call(hidden: Tensor) -> Tensor:
        logits = functional.linear(hidden, layer.router)
        weights, ids, *_ = fused_topk(hidden, logits, top_k, renormalize=True)
        return fused_experts(hidden, layer.w_gate_up, layer.w_down, weights, ids)

    return call


BASELINES: dict[str, Callable[[Layer, Rig], Callable[[Tensor], Tensor]]] = {
    "transformers grouped_mm, Inductor": transformers_layer,
    "vLLM fused MoE": vllm_layer,
}


def measure_baseline(name: str, layer: Layer, num_tokens: int, call: Callable[[Tensor], Tensor], rig: Rig) -> Row:
    """Gate, on the tokens whose picks leave no choice, and time."""
    sets = layer.hidden_sets(num_tokens, rig)
    logits = functional.linear(sets[0], layer.router)
    values, ids = reference.top_k(logits.softmax(-1, dtype=torch.float32), layer.shape.top_k)
    weights = (values / values.sum(-1, keepdim=True)).to(torch.bfloat16)
    expected = reference.fused_experts(sets[0], layer.w_gate_up, layer.w_down, weights, ids)
    clear = is_clear(logits, layer.shape.top_k)
    error = check_error(name, relative_error(call(sets[0])[clear], expected[clear]))
    picked = [functional.linear(h, layer.router).topk(layer.shape.top_k, dim=-1).indices for h in sets]
    active = statistics.fmean(int(reference.count_active(ids, layer.shape.experts)) for ids in picked)
    seconds = rig.time([partial(call, hidden) for hidden in sets])
    return row_of(name, layer.shape, num_tokens, seconds, rig, error, active)


def run(rig: Rig, out: Path) -> int:
    """All rows that are not there yet; returns how many of ours failed or were wrong."""
    results = Results(out / result_name("layer", rig), ("model", "tokens", "configuration"), rig)
    wrong = 0
    with torch.inference_mode():
        for shape in shapes(rig):
            torch._dynamo.reset()
            layer = Layer.random(shape, rig)
            ways: dict[str, Callable[[int], Row]] = {}
            for name, make in BASELINES.items():
                try:
                    call = make(layer, rig)
                except Exception as error:
                    rig.say(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}")
                    continue
                ways[name] = partial(measure_baseline, name, layer, call=call, rig=rig)
            for policy in POLICIES:
                ours = compiled(our_layer(policy, shape.top_k), rig)
                ways[policy.name] = partial(measure_ours, policy, layer, call=ours, rig=rig)
            for num_tokens in batches(rig):
                wrong += _measure_batch(results, ways, shape, num_tokens, rig)
            del layer, ways
    report(results.rows)
    return wrong


def _measure_batch(results: Results, ways: dict[str, Callable[[int], Row]], shape: Shape, num_tokens: int, rig: Rig) -> int:
    wrong = 0
    for name, measure in ways.items():
        key = {"model": shape.model, "tokens": num_tokens, "configuration": name}
        if results.has(**key):
            continue
        try:
            row = measure(num_tokens)
        except Exception as error:  # the other configurations can still be measured
            rig.say(f"FAILED: {shape.model}, {num_tokens} tokens, {name}: {type(error).__name__}: {str(error)[:300]}")
            wrong += name not in BASELINES
            continue
        for column, other in (("ratio_to_grouped_mm", "transformers grouped_mm, Inductor"), ("ratio_to_vllm", "vLLM fused MoE")):
            base = results.find(**{**key, "configuration": other})
            ratio = float(str(base["microseconds"])) / float(str(row["microseconds"])) if base is not None else None
            row[column] = "" if ratio is None else round(ratio, 3)
        results.add(row)
        rig.say(f"{shape.model}, {num_tokens} tokens, {name}: {row['microseconds']} us, {row['share_of_copy']} of copy")
    return wrong


def report(rows: list[Row]) -> None:
    columns = ("model", "tokens", "configuration", "microseconds", "share_of_copy", "experts_microseconds",
               "experts_share_of_copy", "ratio_to_grouped_mm", "ratio_to_vllm")  # fmt: skip
    print_table(rows, columns)
