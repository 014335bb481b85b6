"""Run benchmarks by name and keep their rows: ``python -m benchmarks.run decode compile``."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, available_cores, write_csv
from benchmarks.registry import BENCHMARKS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    warnings.filterwarnings("ignore", module=r"torch\..*")
    torch.set_num_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for name in options.names:
        start = time.perf_counter()
        with console.status(name) as status:

            def say(what: str, name: str = name, start: float = start) -> None:
                line = f"{name}: {what} ({time.perf_counter() - start:.0f} s)"
                if console.is_terminal:
                    status.update(line)
                else:
                    console.print(line, highlight=False)

            rows = BENCHMARKS[name].load()(say)
        path = options.out / f"{name}.csv"
        write_csv(path, rows)
        console.print(_table(name, rows))
        console.print(f"Written: {path}, in {time.perf_counter() - start:.0f} s", highlight=False)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:10} {benchmark.about}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Benchmarks:\n{listed}",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the .csv files (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    options.names = options.names or list(BENCHMARKS)
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark '{name}': known are {', '.join(BENCHMARKS)}")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}, expected at least 1")
    return options


def _table(name: str, rows: Sequence[dict[str, object]]) -> Table:
    """The rows, without columns that say the same in each."""
    same = {key for key in rows[0] if len(rows) > 1 and len({str(row.get(key)) for row in rows}) == 1}
    shown = [key for key in rows[0] if key not in same]
    table = Table(title=f"{name}: " + ", ".join(f"{key} {rows[0][key]}" for key in sorted(same)), title_justify="left")
    for key in shown:
        table.add_column(key.replace("_", " "), justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in shown))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
