"""Routing alone on a GPU: from router logits to weights and rerouted ids, beside plain top-K and the published sequence.

The published SERE rerouter clears a mask of experts, scatters the first picks into it, casts it, and then scans it for
every pick: four launches after those of top-K.  Here each of the first three is torch's own kernel and the last is one
that Inductor makes; so it is a yardstick for a sequence of launches, not that code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_fx.ops  # noqa: F401  (registers the ops)
from benchmarks.gpu_layer import DEEPSEEK, QWEN3, TINY, Shape, batches, compiled
from benchmarks.gpu_measure import Results, Rig, Row, WrongResultError, microseconds, print_table, result_name
from moe_fx.kernels import reference
from moe_fx.testing import random_similarity

ops = torch.ops.moe_fx
Routing = tuple[Tensor, Tensor]  # weights, ids
SETS = 16


def scores_of(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float32)


def weights_of(values: Tensor) -> Tensor:
    return (values / values.sum(-1, keepdim=True)).to(torch.bfloat16)


def top_k(logits: Tensor, similarity: Tensor, mask_logits: Tensor, k: int) -> Routing:
    values, ids = scores_of(logits).topk(k, dim=-1)
    return weights_of(values), ids


def sere(primary: int) -> Callable[..., Routing]:
    def fused(logits: Tensor, similarity: Tensor, mask_logits: Tensor, k: int) -> Routing:
        values, _, ids = ops.topk_sere(scores_of(logits), k, similarity, primary, 0.0)
        return weights_of(values), ids

    return fused


def sere_unfused(logits: Tensor, similarity: Tensor, mask_logits: Tensor, k: int) -> Routing:
    values, ids = scores_of(logits).topk(k, dim=-1)
    return weights_of(values), ops.sere_reroute(ids, similarity, 2, 0.0)


def beam(logits: Tensor, similarity: Tensor, mask_logits: Tensor, k: int) -> Routing:
    values, _, ids = ops.topk_beam(scores_of(logits), k, mask_logits, 0.5)
    return weights_of(values), ids


def scan(ids: Tensor, is_primary: Tensor, similarity: Tensor) -> Tensor:
    """The most similar primary expert of every pick; primary experts are most similar to themselves."""
    rows = similarity[ids].masked_fill(~is_primary, -torch.inf)  # [T, K, E]
    return torch.where(is_primary[ids], ids, rows.argmax(-1))


def published(rig: Rig) -> Callable[..., Routing]:
    """Plain top-K, and then four launches.  S = 2."""
    select, last = compiled(top_k, rig), compiled(scan, rig)

    def call(logits: Tensor, similarity: Tensor, mask_logits: Tensor, k: int) -> Routing:
        weights, ids = select(logits, similarity, mask_logits, k)
        mask = torch.zeros(logits.shape[1], dtype=torch.int32, device=logits.device)
        mask.scatter_(0, ids[:, :2].flatten(), 1)
        return weights, last(ids, mask.bool(), similarity)

    return call


PLAIN, PUBLISHED = "plain top-K", "SERE S=2, published sequence"


def ways(rig: Rig) -> dict[str, Callable[..., Routing]]:
    """Each configuration as a function; the first is the baseline."""
    ours = {"SERE S=1, fused": sere(1), "SERE S=2, fused": sere(2), "SERE S=2, topk then sere_reroute": sere_unfused}
    rest = {name: compiled(function, rig) for name, function in {**ours, "BEAM, fused": beam}.items()}
    return {PLAIN: compiled(top_k, rig), PUBLISHED: published(rig), **rest}


def gate(name: str, got: Routing, logits: Tensor, similarity: Tensor, mask_logits: Tensor, k: int) -> None:
    """Ids equal the reference's, where scores do not tie (then torch's top-K may take either).

    Raises:
        WrongResultError: they do not.
    """
    scores = scores_of(logits)
    ties = (scores.sort(-1).values.diff(dim=-1) == 0).any(1)
    if name.startswith("SERE"):
        primary = 1 if "S=1" in name else 2
        expected = reference.topk_sere(scores, k, similarity, primary, 0.0)[2]
        exact = "fused" in name
        if not exact and bool(ties.any()):
            return  # one other primary expert changes the picks of the whole batch
    else:
        fused = name.startswith("BEAM")
        expected = reference.topk_beam(scores, k, mask_logits if fused else mask_logits.abs(), 0.5)[2]
        exact = fused
    same = (got[1] == expected).all(1)
    if not bool((same if exact else same | ties).all()):
        raise WrongResultError(f"{name}: {int((~same).sum())} of {len(logits)} tokens have other ids than the reference")


def measure(name: str, way: Callable[..., Routing], shape: Shape, num_tokens: int, rig: Rig) -> Row:
    similarity = random_similarity(shape.experts).to(rig.device)
    inputs: list[tuple[Any, ...]] = [
        (
            rig.normal(num_tokens, shape.experts, seed=seed),
            similarity,
            rig.normal(num_tokens, shape.experts, seed=seed + 500, dtype=torch.float32),
            shape.top_k,
        )
        for seed in range(SETS)
    ]
    gate(name, way(*inputs[0]), *inputs[0])
    return microseconds(rig.time([partial(way, *args) for args in inputs]))


def run(rig: Rig, out: Path) -> int:
    """All rows that are not there yet; returns how many failed."""
    results = Results(out / result_name("routing", rig), ("model", "tokens", "configuration"), rig)
    failed = 0
    with torch.inference_mode():
        for shape in (TINY,) if rig.dry else (QWEN3, DEEPSEEK):
            torch._dynamo.reset()
            functions = ways(rig)
            for num_tokens in batches(rig):
                failed += _measure_batch(results, functions, shape, num_tokens, rig)
    columns = ("model", "tokens", "configuration", "microseconds", "above_plain_microseconds", "ratio_to_published")
    print_table(results.rows, columns)
    return failed


def _measure_batch(results: Results, functions: dict[str, Any], shape: Shape, num_tokens: int, rig: Rig) -> int:
    failed = 0
    for name, way in functions.items():
        key = {"model": shape.model, "tokens": num_tokens, "configuration": name}
        if results.has(**key):
            continue
        try:
            row = {**key, **measure(name, way, shape, num_tokens, rig)}
        except Exception as error:  # the other configurations can still be measured
            rig.say(f"FAILED: {shape.model}, {num_tokens} tokens, {name}: {type(error).__name__}: {str(error)[:300]}")
            failed += 1
            continue
        plain, sequence = (results.find(**{**key, "configuration": other}) for other in (PLAIN, PUBLISHED))
        own = float(str(row["microseconds"]))
        row["above_plain_microseconds"] = "" if plain is None else round(own - float(str(plain["microseconds"])), 2)
        row["ratio_to_published"] = "" if sequence is None else round(float(str(sequence["microseconds"])) / own, 2)
        results.add(row)
        rig.say(f"{shape.model}, {num_tokens} tokens, {name}: {own} us")
    return failed

