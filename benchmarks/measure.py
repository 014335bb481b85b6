"""How the benchmarks measure: interleaved medians, the conditions they were taken under, and rows in a CSV file."""

from __future__ import annotations

import csv
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median: the noise of a median in one number."""
    if len(values) < 2:
        return math.nan
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def median_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """How many times faster the candidate is: the median over rounds of baseline / candidate, taken in one round each.

    A round measures everything once, side by side, so that a busy moment of the machine slows both terms of a ratio.
    """
    return statistics.median(b / c for b, c in zip(baseline, candidate, strict=True))


def copy_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second read plus written by a copy of ``megabytes``, far more than a cache holds: the memory roofline."""
    source = torch.rand(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def available_cores() -> int:
    """Cores this process may use.  PyTorch counts the machine's, and too many threads make small models crawl."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_in_a_name() -> str:
    """The GPU's name, or a CPU's instruction set, for the name of a file: ``cpu-avx512``."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return name.lower().replace(" ", "-")


def conditions() -> dict[str, str]:
    """What a reader needs to judge a number: commit, device, cores, versions."""
    return {
        "commit": _commit(),
        "device": _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers")},
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``rows``, each followed by the conditions, to ``path``, in one go."""
    shared = conditions()
    names = list(dict.fromkeys([*(name for row in rows for name in row), *shared]))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)
    partial.replace(path)


def _commit() -> str:
    """The commit, with ``+`` where files differ from it, or ``unknown`` outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
