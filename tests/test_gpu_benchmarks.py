"""What ``make gpu`` runs goes through on a CPU, with tiny shapes, so that it cannot rot where there is no GPU."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_measure import Results, Rig, print_table
from moe_fx.kernels import fused_experts

ROOT = Path(__file__).resolve().parents[1]


def dry_run(out: Path, *parts: str) -> str:
    """Some parts in a process of their own, as ``make gpu`` runs them; returns what they print."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--no-gates", "--out", str(out), *parts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts done" in done.stdout
    return done.stdout


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_kernels_are_measured_and_kept(tmp_path):
    dry_run(tmp_path, "kernels", "vllm")
    layer, routing = rows(tmp_path / "gpu_layer_dry-run.csv"), rows(tmp_path / "gpu_routing_dry-run.csv")
    ours = [row for row in layer if row["configuration"].startswith(("TopK", "SERE", "BEAM"))]
    assert len(ours) == 2 * 7
    assert all(float(row["relative_error"]) < 0.02 and float(row["experts_microseconds"]) > 0 for row in ours)
    assert len(routing) == 2 * 6
    assert {"commit", "torch", "triton", "device"} <= set(layer[0])
    again = dry_run(tmp_path, "kernels")
    assert " us" not in again.split("part kernels")[1].split("\nmodel")[0]  # nothing was measured a second time
    assert rows(tmp_path / "gpu_layer_dry-run.csv") == layer


@pytest.mark.slow
def test_the_backend_is_measured(tmp_path):
    dry_run(tmp_path, "backend")
    found = {row["configuration"]: row for row in rows(tmp_path / "gpu_backend_dry-run.csv")}
    assert len(found) == 5
    assert all(float(row["relative_error"]) < 1e-4 for row in found.values())
    active = {name: float(row["active_experts"]) for name, row in found.items()}
    assert active["moe_sparse, SERE S=1"] < active["moe_sparse, TopK"] == active["Inductor alone"]
    assert active["moe_sparse, BEAM 85% off"] < active["moe_sparse, TopK"]


@pytest.mark.slow
def test_tuning_writes_a_table_that_is_read_back(tmp_path, monkeypatch):
    dry_run(tmp_path, "tune", "sanitize", "gates")
    monkeypatch.setattr(fused_experts, "CONFIGS", tmp_path)
    fused_experts.measured_configs.cache_clear()
    ((layer, configs),) = fused_experts.measured_configs("dry-run").items()
    assert layer == fused_experts.Layer(2, 8, 64, 32, "bfloat16")
    assert list(configs) == [1]
    assert fused_experts.choose_config(1, 2, 8, 64, 32, torch.bfloat16, "dry-run") == configs[1]
    assert json.loads((tmp_path / "dry-run.json").read_text())["device"] == "dry-run"


def test_parts_stop_where_the_gates_fail(monkeypatch, capsys, tmp_path):
    done: list[str] = []
    broken: set[str] = set()
    parts = {name: lambda rig, options, name=name: done.append(name) or int(name in broken) for name in gpu.PARTS}
    monkeypatch.setattr(gpu, "PARTS", parts)
    options = gpu.Options(tmp_path, tmp_path, None, gates=True)
    for failing, asked, run, status in (
        ((), ["kernels"], ["gates", "kernels"], 0),
        ((), ["vllm", "tests", "kernels"], ["tests", "kernels", "vllm"], 0),
        (("gates",), ["kernels"], ["gates"], 1),
        (("kernels",), ["tests", "kernels", "backend"], ["tests", "kernels", "backend"], 1),
        ((), ["sanitize"], ["sanitize"], 0),
    ):
        done.clear()
        broken.clear()
        broken.update(failing)
        assert gpu.run_parts(asked, Rig(dry=True), options) == status
        assert done == run
    assert "nothing is measured" in capsys.readouterr().out


def test_rows_of_another_commit_are_measured_again(tmp_path):
    path, rig = tmp_path / "rows.csv", Rig(dry=True)
    first = Results(path, ("tokens",), rig)
    first.add({"tokens": 4, "microseconds": 1.5})
    assert Results(path, ("tokens",), rig).has(tokens=4)
    assert not Results(path, ("tokens",), rig).has(tokens=8)
    path.write_text(path.read_text().replace(str(first.rows[0]["commit"]), "another"))
    assert not Results(path, ("tokens",), rig).has(tokens=4)


def test_tables_are_short_lines(capsys):
    print_table([{"a": 1, "b": "long"}, {"a": 22}], ("a", "b"))
    assert capsys.readouterr().out.splitlines() == ["a   b", "1   long", "22"]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        gpu.main(["kernels"])
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["kernel"])
    assert "unknown part 'kernel'" in capsys.readouterr().err
