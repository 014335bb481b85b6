"""Read the rows that ``moe-fx eval --compare --csv`` wrote and say, at equal active experts, what loses how much.

    python -m benchmarks.quality_summary rows.csv

Between two settings of a method its loss is taken to lie on the straight line between them; a method says nothing about
numbers of experts outside its own settings.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One evaluated policy."""

    policy: str
    active: float
    loss: float  # nats per token above the full model
    kl: float

    @property
    def method(self) -> str:
        """Its name without settings; SERE with settings by layer is a method of its own."""
        name = self.policy.split("(")[0]
        return "SERE by layer" if "tuned for" in self.policy else f"{name}, one setting" if name == "SERE" else name


def read(path: Path, batch: int) -> list[Row]:
    """The rows of one batch size, without the full model's."""
    with path.open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if int(r["batch"]) == batch and r["policy"] != "full"]
    return [
        Row(r["policy"], float(r["active_experts_per_layer"]), float(r["loss_above_full"]), float(r["kl_to_full_nats"]))
        for r in rows
    ]


def at(rows: Sequence[Row], active: float, value: str) -> float | None:
    """A method's loss or KL at a number of active experts; None outside its range.

    Of settings that another one of the method beats in both, none counts.
    """
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.active, getattr(r, value))):
        if not front or getattr(row, value) < getattr(front[-1], value):
            front.append(row)
    for left, right in pairwise(front):
        if left.active <= active <= right.active:
            share = (active - left.active) / (right.active - left.active)
            return getattr(left, value) + share * (getattr(right, value) - getattr(left, value))
    nearest = min(front, key=lambda r: abs(r.active - active), default=None)
    return getattr(nearest, value) if nearest is not None and abs(nearest.active - active) < 0.15 else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_summary", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(arguments)
    rows = read(options.csv, options.batch)
    methods = dict.fromkeys(r.method for r in rows)
    anchors = sorted((r for r in rows if r.method in ("SERE by layer", "SmallerK")), key=lambda r: r.active)
    heads = [f"{a.active:.1f} ({'SERE by layer' if a.method != 'SmallerK' else 'top-' + a.policy[-2]})" for a in anchors]
    print("| loss above full / KL at | " + " | ".join(heads) + " |")
    print("| --- |" + " ---: |" * len(anchors))
    for method in methods:
        mine = [r for r in rows if r.method == method]
        cells = [(at(mine, a.active, "loss"), at(mine, a.active, "kl")) for a in anchors]
        shown = [f"{loss:+.4f} / {kl:.4f}" if loss is not None and kl is not None else "-" for loss, kl in cells]
        print(f"| {method} | " + " | ".join(shown) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
