"""Everything that needs a GPU, in parts: ``make gpu``, or ``python -m benchmarks.gpu [PART ...]``.

Equality comes first: no part measures anything where the tests of the kernels fail.  Rows are written as they come, and a
second run on the same commit and card measures only what is not there yet.  ``--dry-run`` goes through the same steps on
a CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_measure import Rig
from benchmarks.measure import RESULTS, ROOT

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
_SANITIZER_SECONDS = 150


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    out: Path
    configs: Path
    layers: int | None
    gates: bool


Part = Callable[[Rig, Options], int]


def run_process(command: Sequence[str], rig: Rig, seconds: int | None = None, **environment: str) -> int:
    """A process of its own in the repository; returns its exit status."""
    rig.say(" ".join(command[:6]) + (" ..." if len(command) > 6 else ""))
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        rig.say(f"stopped after {seconds} s: {command[0]}")
        return 1
    return done.returncode


def gates(rig: Rig, options: Options) -> int:
    """The tests that need a GPU."""
    return _pytest(rig, "-m", "gpu")


def tests(rig: Rig, options: Options) -> int:
    """The tests that need a GPU, and the kernels' property tests, which run on the card where there is one."""
    return gates(rig, options) or _pytest(rig, "-m", "not gpu", "tests/kernels", "-k", "by_triton or tile")


def _pytest(rig: Rig, *arguments: str) -> int:
    if rig.dry:
        return run_process([sys.executable, "-m", "pytest", "-q", "--collect-only", *arguments], rig)
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if _has("xdist") else []
    return run_process([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *arguments], rig)


def tune(rig: Rig, options: Options) -> int:
    """Measure the tiles of ``fused_experts`` and write the card's table."""
    if rig.dry:
        arguments = ["--dry-run", "--out", str(options.out)]
        return run_process([sys.executable, "-m", "benchmarks.gpu_tune", *arguments], rig, TRITON_INTERPRET="1")
    from benchmarks import gpu_tune

    return gpu_tune.run(rig, options.configs)


def kernels(rig: Rig, options: Options) -> int:
    """Tables of routing alone and of one layer."""
    from benchmarks import gpu_layer, gpu_routing

    return gpu_routing.run(rig, options.out) + gpu_layer.run(rig, options.out)


def backend(rig: Rig, options: Options) -> int:
    """A decode step end to end."""
    from benchmarks import gpu_backend

    return gpu_backend.run(rig, options.out, options.layers)


def vllm(rig: Rig, options: Options) -> int:
    """vLLM end to end, by a benchmark of its own."""
    for module in ("vllm", "benchmarks.vllm_decode"):
        if not _has(module):
            rig.say(f"vllm: skipped, as there is no module {module}")
            return 0
    return run_process([sys.executable, "-m", "benchmarks.vllm_decode"], rig) if not rig.dry else 0


def sanitize(rig: Rig, options: Options) -> int:
    """Every kernel under compute-sanitizer."""
    script = ["-m", "benchmarks.gpu_sanitize"]
    if rig.dry:
        return run_process([sys.executable, *script, "--dry-run"], rig, TRITON_INTERPRET="1")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        rig.say("sanitize: skipped, as compute-sanitizer is not on the PATH")
        return 0
    if run_process([sys.executable, *script], rig, _SANITIZER_SECONDS):  # also compiles, so that the tools need not wait
        return 1
    failed = 0
    for name in SANITIZER_TOOLS:
        # Only our own kernels: torch's random numbers and fills are not what is checked here.
        command = [tool, "--tool", name, "--kernel-regex", "kns=_kernel", "--error-exitcode", "9", "--print-limit", "20"]
        status = run_process([*command, sys.executable, *script], rig, _SANITIZER_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        rig.say(f"{name}: {'clean' if status == 0 else f'exit status {status}'}")
        failed += status != 0
    return failed


#: In the order in which they run.  The default leaves out what a card needs once.
PARTS: dict[str, Part] = {
    "gates": gates, "tests": tests, "tune": tune, "kernels": kernels, "backend": backend, "vllm": vllm, "sanitize": sanitize,
}  # fmt: skip
DEFAULT = ("tests", "kernels", "backend", "vllm")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def main(arguments: Sequence[str] | None = None) -> int:
    listed = "\n".join(f"  {name:10} {(part.__doc__ or '').splitlines()[0]}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\nParts:\n{listed}",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(DEFAULT)}; 'all' is every part")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the .csv files (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers of the model of part backend (default: 48)")
    parser.add_argument("--no-gates", action="store_true", help="do not run the tests before part kernels or backend")
    options = parser.parse_args(arguments)
    parts = list(PARTS) if options.parts == ["all"] else options.parts or list(DEFAULT)
    for name in parts:
        if name not in PARTS:
            parser.error(f"unknown part '{name}': known are {', '.join(PARTS)}, all")
    import torch

    rig = Rig(dry=options.dry_run)
    if not rig.dry and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --dry-run goes through the steps without one")
    if rig.dry:
        torch.set_num_threads(2)
    rig.say(f"{rig.device_name}, torch {torch.__version__}: {' '.join(parts)}")
    from moe_fx.kernels.fused_experts import CONFIGS

    return run_parts(parts, rig, Options(options.out, CONFIGS, options.layers, not options.no_gates))


def run_parts(parts: Sequence[str], rig: Rig, options: Options) -> int:
    """In order; tests before the first part that measures, and nothing after them if they fail."""
    ordered = [name for name in PARTS if name in parts]
    if options.gates and not {"gates", "tests", "sanitize"}.intersection(ordered):
        ordered.insert(0, "gates")
    failed: list[str] = []
    for name in ordered:
        rig.say(f"part {name}")
        if PARTS[name](rig, options):
            failed.append(name)
            if name in ("gates", "tests"):
                rig.say("the tests failed: nothing is measured")
                break
    rig.say(f"failed: {', '.join(failed)}" if failed else "all parts done")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
