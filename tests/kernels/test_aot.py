"""Every Triton kernel compiles for sm_90 without a GPU and spills no register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECTIONS = ("_gate_up_kernel", "_down_kernel")


@pytest.fixture(scope="module")
def report() -> dict:
    # In a process of its own: this one may run the kernels in the interpreter, which cannot compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_compiled(report):
    assert report["missing"] == []
    assert {row["kernel"] for row in report["rows"]} >= {
        "_sere_reroute_kernel",
        "_beam_mask_kernel",
        "_fold_masked_kernel",
        "_topk_sere_kernel",
        "_topk_beam_kernel",
        "_gate_up_kernel",
        "_down_kernel",
    }


def test_weights_are_copied_wide_and_ahead(report):
    """Memory is kept busy by 16-byte copies in flight; gpt-oss's layout and sizes do not allow them everywhere."""
    rows = [row for row in report["rows"] if row["kernel"] in PROJECTIONS and "gpt-oss" not in row["shape"]]
    assert len(rows) > 10
    assert [row for row in rows if not row["wide_copies"]] == []
    # A decode step's programs are short: three on a multiprocessor at a time hide each other's first and last steps.
    decode = [row for row in rows if row["shape"].endswith(("T=1", "T=4", "T=16"))]
    assert all(3 * row["shared_bytes"] <= 227 * 1024 for row in decode)


def test_no_kernel_spills(report, record_property):
    for row in report["rows"]:
        name = f"{row['kernel']} {row['shape']}"
        record_property(name, f"{row['registers']} registers, {row['spilled_bytes']} bytes spilled")
        assert row["spilled_bytes"] == 0, row
        is_projection = row["kernel"] in PROJECTIONS
        assert 0 < row["registers"] <= (255 if is_projection else 128), row
        assert row["shared_bytes"] <= (227 if is_projection else 16) * 1024, row


def test_projections_of_a_large_batch_use_wgmma(report):
    """Hopper's matrix instructions need tiles of 64 rows; a decode step's have fewer."""
    large = [row for row in report["rows"] if row["kernel"] in PROJECTIONS and row["shape"].endswith("T=8192")]
    assert len(large) == 4
    assert all(row["uses_wgmma"] for row in large)
