"""Threads, hypothesis profiles, the Triton interpreter on machines without a GPU, and the reason GPU tests skip."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# The workers of pytest-xdist share the cores: with more threads than cores, threads wait for one another.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_THREADS = max(1, _CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(_THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))  # of the processes that tests start

# Without a CUDA device the kernels run in Triton's interpreter.  Triton reads this when it is first imported, which no
# test module may do before this line.  Inductor on CPU works with it; ahead-of-time compilation needs a process
# without it.  With a CUDA device the kernels run for real.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=30, derandomize=True, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile("nightly", max_examples=2000, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the Triton kernels run: on the GPU, or on CPU tensors in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
