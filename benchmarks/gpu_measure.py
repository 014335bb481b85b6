"""How the GPU benchmarks measure: captured graphs over cold inputs, medians, rows written as they come.

Everything runs on a CPU too, with tiny shapes and no meaning, so that the scripts are tested where there is no GPU.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import conditions, spread

Row = dict[str, object]
Calls = Sequence[Callable[[], object]]

_COPY_BYTES = 2**30
_MIN_REPLAYS, _MAX_REPLAYS, _REPLAY_SECONDS = 11, 51, 0.05


class WrongResultError(RuntimeError):
    """What was to be timed does not compute what it should: no time is reported for it."""


@dataclass
class Rig:
    """The device, and the clock: ``dry`` for a CPU and tiny shapes."""

    dry: bool = False
    start: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @cached_property
    def device_name(self) -> str:
        return "dry-run" if self.dry else torch.cuda.get_device_name()

    def say(self, what: str) -> None:
        print(f"[{time.perf_counter() - self.start:6.1f} s] {what}", flush=True)

    def time(self, calls: Calls) -> list[float]:
        """Seconds of one call, by replay of a graph that makes all ``calls`` one after the other.

        Give as many calls, on as many inputs, as it takes to read more than the cache holds.
        """
        if self.dry:
            return [_host_seconds(calls[:1]) for _ in range(2)]
        for call in [*calls[:1], *calls]:
            call()  # compiles, and makes the handles of libraries
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        seconds = [_replay_seconds(graph) for _ in range(3)][-1]
        replays = min(_MAX_REPLAYS, max(_MIN_REPLAYS, int(_REPLAY_SECONDS / seconds)))
        return [_replay_seconds(graph) / len(calls) for _ in range(replays)]

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second that a large copy reads and writes: the memory roofline."""
        source = torch.rand((2**20 if self.dry else _COPY_BYTES) // 4, device=self.device)
        target = torch.empty_like(source)
        seconds = statistics.median(self.time([lambda: target.copy_(source)] * 2))
        self.say(f"copy bandwidth {2 * source.nbytes / seconds / 1e9:.0f} GB/s")
        return 2 * source.nbytes / seconds

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, seed: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        values = torch.empty(shape, device=self.device, dtype=dtype)
        return values.normal_(std=std, generator=self.generator(seed))


def _host_seconds(calls: Calls) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def microseconds(seconds: Sequence[float]) -> Row:
    """The columns of one measurement."""
    return {"microseconds": round(1e6 * statistics.median(seconds), 2), "spread": round(spread(seconds), 4)}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Size of the difference by the size of what was expected; NaN if either has any."""
    difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    return float(difference)


class Results:
    """Rows of one CSV file, written as they come.  Those of the same commit and device are kept and not measured again.

    Args:
        path: the file.
        keys: the columns that say which measurement a row is.
        rig: gives the device.
    """

    def __init__(self, path: Path, keys: Sequence[str], rig: Rig) -> None:
        self.path, self.keys = path, tuple(keys)
        shared = conditions()
        triton = _triton_version()
        self._shared = {**{k: v for k, v in shared.items() if k != "threads"}, "device": rig.device_name, "triton": triton}
        self.rows: list[Row] = [row for row in self._read() if self._is_current(row)]
        self.new_rows = 0

    def has(self, **key: object) -> bool:
        return any(all(str(row[name]) == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append({**row, **self._shared})
        self.new_rows += 1
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)

    def find(self, **key: object) -> Row | None:
        found = [row for row in self.rows if all(str(row[name]) == str(value) for name, value in key.items())]
        return found[0] if found else None

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _is_current(self, row: Row) -> bool:
        same = ("commit", "device", "torch", "triton")
        return all(row.get(name) == self._shared[name] for name in same) and all(name in row for name in self.keys)


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Short lines, for the end of a log."""
    texts = [[str(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(name), *(len(t[i]) for t in texts)) if texts else len(name) for i, name in enumerate(columns)]
    for line in [list(columns), *texts]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def result_name(part: str, rig: Rig) -> str:
    """``gpu_layer_NVIDIA_H200.csv``."""
    return f"gpu_{part}_{rig.device_name.replace(' ', '_')}.csv"
