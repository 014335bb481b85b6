"""Measure which tiles and launches ``fused_experts`` should take on this card, and write ``kernels/configs/<card>.json``.

    python -m benchmarks.gpu_tune [--dry-run] [--out FOLDER]

For each layer and batch one thing after the other is varied, and the fastest kept: the launches, the gate-up tile, the
down tile.  What counts is the time under plain top-K times that under SERE with one primary expert, as a table does not
know the policy.  Only a result that equals that of the rules' tiles is a candidate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_layer import LARGEST_ERROR, Layer, batches, shapes
from benchmarks.gpu_measure import Rig, relative_error
from benchmarks.measure import conditions
from moe_fx.kernels import fused_experts, reference
from moe_fx.kernels.fused_experts import Config, Tile

Picks = tuple[Tensor, Tensor, Tensor]  # hidden, weights, ids


def candidates(part: str, best: Config, num_tokens: int) -> Iterator[Config]:
    """Variants of one part of a configuration."""
    if part == "rows":
        yield from (replace(best, BLOCK_T=rows) for rows in (16, 32, 64, 128) if num_tokens > 16)
    elif part == "launches":
        yield replace(best, by_pick=False, sum_in_down=False)
        if num_tokens <= best.BLOCK_T and num_tokens <= 32:
            yield from (replace(best, by_pick=True, sum_in_down=summed) for summed in (False, True))
    else:
        yield from (replace(best, **{part: tile}) for tile in tiles(best.BLOCK_T))


def tiles(rows: int) -> Iterator[Tile]:
    """Slices and steps for tiles of so many rows: narrow and deep where weights are streamed, wide where they are reused."""
    if rows <= 32:
        for width, step in ((16, 128), (32, 128), (32, 256), (64, 64), (64, 128), (128, 64)):
            for warps, stages in ((4, 4), (2, 4)):
                yield Tile(width, step, warps, stages)
    else:
        for width, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
            for stages in (3, 4):
                yield Tile(width, 64, warps, stages)


def picks_of(layer: Layer, num_tokens: int, primary: int | None, rig: Rig) -> list[Picks]:
    """Inputs with plain top-K picks, or with those SERE leaves."""
    found = []
    for hidden in layer.hidden_sets(num_tokens, rig)[: 1 if rig.dry else 8]:
        scores = torch.nn.functional.linear(hidden, layer.router).softmax(-1, dtype=torch.float32)
        values, ids = reference.top_k(scores, layer.shape.top_k)
        if primary is not None:
            ids = reference.sere_reroute(ids, layer.similarity, primary, 0.0)
        found.append((hidden, (values / values.sum(-1, keepdim=True)).to(hidden.dtype), ids))
    return found


def named(layer: Layer) -> fused_experts.Layer:
    """What the table calls the layer."""
    shape = layer.shape
    return fused_experts.Layer(shape.top_k, shape.experts, shape.hidden, shape.intermediate, "bfloat16")


def call(layer: Layer, picks: Picks, config: Config) -> Tensor:
    with mock.patch.object(fused_experts, "choose_config", return_value=config):
        hidden, weights, ids = picks
        return fused_experts.fused_experts(hidden, layer.w_gate_up, layer.w_down, weights, ids)


def seconds_of(layer: Layer, kinds: Sequence[list[Picks]], config: Config, expected: Sequence[Tensor], rig: Rig) -> float:
    """Geometric mean over the kinds of picks; infinite where the tiles do not fit the card or the result differs."""
    medians = []
    for picks, want in zip(kinds, expected, strict=True):
        try:
            if not relative_error(call(layer, picks[0], config), want) <= LARGEST_ERROR:
                rig.say(f"another result: {config}")
                return float("inf")
            medians.append(statistics.median(rig.time([partial(call, layer, p, config) for p in picks])))
        except Exception as error:  # too much shared memory, or too many registers
            rig.say(f"not possible: {config}: {type(error).__name__}")
            return float("inf")
    return statistics.geometric_mean(medians)


def tune(layer: Layer, num_tokens: int, rig: Rig, limit: int | None = None) -> tuple[Config, float, float]:
    """The best configuration, its seconds, and those of the rules' one."""
    best = fused_experts.config_by_rules(num_tokens, named(layer))
    kinds = [picks_of(layer, num_tokens, primary, rig) for primary in (None, 1)]
    expected = [call(layer, picks[0], best) for picks in kinds]
    first = shortest = seconds_of(layer, kinds, best, expected, rig)
    for part in ("rows", "gate_up", "down", "launches"):
        for candidate in list(candidates(part, best, num_tokens))[:limit]:
            seconds = seconds_of(layer, kinds, candidate, expected, rig) if candidate != best else shortest
            if seconds < 0.99 * shortest:
                best, shortest = candidate, seconds
    return best, shortest, first


def run(rig: Rig, out: Path, limit: int | None = None) -> int:
    """Write the table of this card: after every batch, so that what was measured stays.

    ``limit``: of batches, and of candidates for each part.
    """
    rows: list[dict[str, object]] = []
    path = out / f"{rig.device_name.replace(' ', '_')}.json"
    with torch.inference_mode():
        for shape in shapes(rig):
            layer = Layer.random(shape, rig)
            for num_tokens in batches(rig)[:limit]:
                config, seconds, before = tune(layer, num_tokens, rig, limit)
                rows.append({"layer": dataclasses.asdict(named(layer)), "tokens": num_tokens, "config": as_json(config)})
                write(path, rows, rig)
                rig.say(f"{shape.model}, {num_tokens} tokens: {1e6 * seconds:.1f} us, by rules {1e6 * before:.1f}: {config}")
            del layer
    return 0


def as_json(config: Config) -> dict[str, object]:
    tiles_as_lists = {name: list(dataclasses.astuple(getattr(config, name))) for name in ("gate_up", "down")}
    return {**dataclasses.asdict(config), **tiles_as_lists}


def write(path: Path, rows: Sequence[dict[str, object]], rig: Rig) -> None:
    shared = conditions()
    head = {"device": rig.device_name, "commit": shared["commit"], "torch": shared["torch"]}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter: set TRITON_INTERPRET=1")
    parser.add_argument("--out", type=Path, default=fused_experts.CONFIGS, help="folder for the table (%(default)s)")
    options = parser.parse_args(arguments)
    return run(Rig(dry=options.dry_run), options.out, limit=1 if options.dry_run else None)


if __name__ == "__main__":
    raise SystemExit(main())
