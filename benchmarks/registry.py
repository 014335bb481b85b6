"""What can be measured, by name.  A benchmark takes a function that shows progress and returns rows for a CSV file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lives; its module is imported only when it is run."""

    about: str
    module: str
    function: str

    def load(self) -> Callable[[Callable[[str], None]], list[dict[str, object]]]:
        return getattr(import_module(self.module), self.function)


BENCHMARKS = {
    "decode": Benchmark(
        "decode steps of a 600 M-parameter model: Inductor alone, exact top-K, SERE", "benchmarks.decode", "run"
    ),
    "experts_layer": Benchmark(
        "one layer of experts: transformers' own, moe_sparse, picks moved and off", "benchmarks.experts_layer", "run"
    ),
    "calibration": Benchmark("memory and time of calibrating a layer of Qwen3-30B's shape", "benchmarks.calibration", "run"),
    "compile": Benchmark("share of the passes in the time of a first compilation", "benchmarks.decode", "run_compile"),
    "find_sites": Benchmark("time to find and recognise the sites of 12 to 94 layers", "benchmarks.finding", "run"),
}
