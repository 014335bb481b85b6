"""What the Triton kernels cost on a GPU that is not there: registers, spills, shared memory.

    python -m benchmarks.aot [--json]

Every launcher is called with meta tensors of a few real shapes while its kernels only record their arguments; what was
recorded is compiled ahead of time for sm_90, as a launch would compile it, and ``ptxas -v`` reports.  It must run in a
process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from moe_fx.kernels import beam_mask, fold_masked, fused_experts, sere_reroute, topk_beam, topk_sere

MODULES: tuple[Any, ...] = (beam_mask, fold_masked, fused_experts, sere_reroute, topk_beam, topk_sere)
CAPABILITY = 90  # Hopper: H100, H200
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: the jitted function, its arguments by name, warps and pipeline stages."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one compiled kernel."""

    kernel: str
    shape: str
    constants: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    uses_wgmma: bool
    wide_copies: bool  # whether operands go to shared memory 16 bytes at a time, while others are multiplied


class _Recorder:
    """Stands in for a jitted kernel: keeps the arguments of a launch instead of launching."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            self.launches.append(Launch(self.kernel, arguments, num_warps, num_stages))

        return record


def recorded_launches(module: Any, *args: Any) -> list[Launch]:
    """The kernel launches that the launcher of ``module`` makes for these arguments (meta tensors will do)."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for other in MODULES:  # a launcher may call another module's
            kernels = {name: kernel for name, kernel in vars(other).items() if name.endswith("_kernel")}
            recorders: dict[str, Any] = {name: _Recorder(kernel, launches) for name, kernel in kernels.items()}
            stack.enter_context(mock.patch.multiple(other, **recorders))
        getattr(module, module.__name__.rsplit(".", 1)[-1])(*args)
    return launches


def _source(launch: Launch) -> ASTSource:
    """The launch as Triton's just-in-time compiler would specialise it, with pointers aligned as torch aligns them."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _number(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


def compile_launch(launch: Launch, shape: str) -> Compiled:
    """Compile for sm_90 and ask ptxas for registers and spills."""
    source = _source(launch)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        ptxas = get_ptxas(CAPABILITY).path
        command = [ptxas, "-v", f"-arch=sm_{CAPABILITY}a", str(ptx), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    constants = {name: launch.arguments[name] for name in source.signature if source.signature[name] == "constexpr"}
    return Compiled(
        kernel=launch.kernel.__name__,
        shape=shape,
        constants=" ".join(f"{name}={value}" for name, value in constants.items()),
        num_warps=launch.num_warps,
        registers=_number(r"Used (\d+) registers", report),
        spilled_bytes=_number(r"(\d+) bytes spill", report),
        shared_bytes=compiled.metadata.shared,
        uses_wgmma="wgmma.mma_async" in compiled.asm["ptx"],
        wide_copies="cp.async.cg.shared.global" in compiled.asm["ptx"] and "cp.async.ca" not in compiled.asm["ptx"],
    )


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Shapes of decode steps and of prefill, in the dtypes that models use: name, module, arguments."""
    fp32, bf16, fp16, i64, i32 = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32
    for t, k, e, s, ids, table, valid, threshold in (
        (16, 8, 64, 2, i64, fp32, None, 0.0),
        (64, 8, 128, 2, i32, fp32, _meta((64,), torch.bool), 0.3),
        (16, 4, 60, 2, i64, bf16, _meta((), i64), 0.3),
        (256, 10, 512, 1, i32, fp16, _meta((1,), i32), 0.0),
        (8, 8, 1024, 1, i64, fp32, None, 0.3),
        (8192, 8, 128, 2, i64, fp32, _meta((8192,), torch.bool), 0.3),
        (8192, 10, 512, 2, i32, fp32, None, 0.0),
    ):
        yield f"T={t} K={k} E={e} S={s}", sere_reroute, (_meta((t, k), ids), _meta((e, e), table), s, threshold, valid)
    for t, k, e, ids, weights, logits in (
        (16, 8, 64, i64, fp32, fp32),
        (64, 6, 160, i32, bf16, bf16),
        (8192, 8, 128, i64, fp16, fp32),
    ):
        yield f"T={t} K={k} E={e}", beam_mask, (_meta((t, k), weights), _meta((t, k), ids), _meta((t, e), logits), 0.5)
    for t, k, e, s, scores, valid, threshold in (
        (1, 8, 128, 1, fp32, None, 0.0),
        (16, 8, 128, 2, fp32, None, 0.3),
        (64, 6, 64, 2, fp32, _meta((64,), torch.bool), 0.0),
        (64, 8, 128, 1, bf16, _meta((), i64), 0.0),
        (256, 8, 128, 4, fp32, None, 0.3),
        (64, 10, 512, 1, fp32, None, 0.0),
        (4, 8, 1024, 1, fp16, None, 0.0),
        (8192, 8, 128, 2, fp32, None, 0.0),
    ):
        shape = f"T={t} K={k} E={e} S={s}"
        yield shape, topk_sere, (_meta((t, e), scores), k, _meta((e, e), fp32), s, threshold, valid)
    for t, k, e, scores in ((16, 8, 128, fp32), (64, 6, 64, bf16), (256, 10, 512, fp32), (8192, 8, 128, fp32)):
        yield f"T={t} K={k} E={e}", topk_beam, (_meta((t, e), scores), k, _meta((t, e), fp32), 0.5)
    for t, k, ids, weights in ((16, 8, i64, fp32), (64, 6, i32, bf16), (8192, 8, i64, fp16)):
        yield f"T={t} K={k}", fold_masked, (_meta((t, k), weights), _meta((t, k), ids))
    for name, e, k, h, i in (("Qwen3-30B-A3B", 128, 8, 2048, 768), ("DeepSeek-V2-Lite", 64, 6, 2048, 1408)):
        for t in (1, 16, 64, 512, 8192):
            yield f"{name} T={t}", fused_experts, _experts(t, k, bf16, _meta((e, 2 * i, h), bf16), _meta((e, h, i), bf16))
    for t in (4, 2048):  # gpt-oss: transposed, interleaved, biases, sizes that no block divides
        args = _experts(t, 4, bf16, _meta((32, 2880, 5760), bf16), _meta((32, 2880, 2880), bf16), width=2880)
        biases = _meta((32, 5760), bf16), _meta((32, 2880), bf16)
        yield f"gpt-oss-20b T={t}", fused_experts, (*args, *biases, "swiglu_clamped", "interleaved", True, 1.702, 7.0)
    args = _experts(64, 4, fp32, _meta((16, 512, 256), fp32), _meta((16, 256, 512), fp32))
    yield "ungated fp32 T=64", fused_experts, (*args, None, None, "relu2", "none")


def _experts(t: int, k: int, dtype: torch.dtype, *weights: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """The first five arguments of fused_experts."""
    hidden = _meta((t, width or weights[0].shape[2]), dtype)
    return hidden, *weights, _meta((t, k), torch.float32), _meta((t, k), torch.int64)


def _all_launches() -> Iterator[tuple[str, Launch]]:
    for shape, module, args in _calls():
        yield from ((shape, launch) for launch in recorded_launches(module, *args))
    weights = _meta((128, 1536, 2048), torch.bfloat16), _meta((128, 2048, 768), torch.bfloat16)
    for launches in ("four", "two"):  # what the rules do not choose for a small batch, and a table may
        rules = fused_experts.config_by_rules(4, fused_experts.Layer(8, 128, 2048, 768, "bfloat16"))
        config = dataclasses.replace(rules, by_pick=launches == "two", sum_in_down=launches == "two")
        with mock.patch.object(fused_experts, "choose_config", return_value=config):
            for launch in recorded_launches(fused_experts, *_experts(4, 8, torch.bfloat16, *weights)):
                yield f"Qwen3-30B-A3B in {launches} launches T=4", launch


def aot_report(show_progress: bool = False) -> list[Compiled]:
    """Compile every kernel of ``moe_fx.kernels`` for sm_90 at representative shapes and dtypes."""
    launches = list(_all_launches())
    shown = track(launches, "compiling", transient=True) if show_progress else launches
    return [compile_launch(launch, shape) for shape, launch in shown]


def kernels_without_report(report: list[Compiled]) -> set[str]:
    """Kernels that exist in ``kernels/`` and were not compiled: the shapes above do not reach them."""
    folder = Path(sere_reroute.__file__ or "").parent
    sources = [file.read_text() for file in folder.glob("*.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)}
    return kernels - {row.kernel for row in report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args()
    report = aot_report(show_progress=not arguments.json)
    if arguments.json:
        rows = [dataclasses.asdict(row) for row in report]
        print(json.dumps({"rows": rows, "missing": sorted(kernels_without_report(report))}))
        return
    table = Table(title=f"Triton {triton.__version__} for sm_{CAPABILITY}, ahead of time")
    for column in dataclasses.fields(Compiled):
        table.add_column(column.name.replace("_", " "), justify="right" if column.type == "int" else "left")
    for row in report:
        table.add_row(*map(str, dataclasses.astuple(row)))
    Console().print(table)


if __name__ == "__main__":
    main()
