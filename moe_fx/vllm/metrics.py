"""Active experts, from the workers that count them to ``stats()`` and to vLLM's own ``/metrics``.

A worker writes its totals into a file of its own, in a directory that the engine's first process makes and names in the
environment; whoever asks reads the files.  Ranks of one tensor-parallel group count the same, so the first of them writes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_fx.stats import SiteStats

DIRECTORY = "MOE_FX_STATS_DIR"
INTERVAL_S = 0.5

_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()


def stats() -> dict[str, SiteStats]:
    """What the layers of this process's engines did since they started, by the engine's name of the layer.

    Empty without ``stats=True``.  Of an engine in other processes it is as of half a second ago.
    """
    for publisher in _publishers:
        publisher.publish()
    means = {}
    for name, (steps, before, active, off) in _totals().items():
        if steps:
            means[name] = SiteStats(steps, before / steps, active / steps, off / steps)
    return means


def _totals() -> dict[str, list[int]]:
    """Totals by layer, summed over data-parallel engines."""
    summed: dict[str, list[int]] = {}
    for file in Path(os.environ.get(DIRECTORY, os.devnull)).glob("*.json"):
        with contextlib.suppress(OSError):  # an engine may have ended meanwhile
            for name, totals in json.loads(file.read_text()).items():
                summed[name] = [a + b for a, b in zip(summed.get(name, [0] * 4), totals, strict=True)]
    return summed


def collect_here() -> None:
    """Make this process able to answer ``stats()`` and, with Prometheus, ``/metrics``, for the engines that it starts."""
    if DIRECTORY in os.environ and Path(os.environ[DIRECTORY]).is_dir():
        _register_collector()
        return
    os.environ[DIRECTORY] = directory = tempfile.mkdtemp(prefix="moe_fx-stats-")
    atexit.register(_remove, directory, os.getpid())
    _register_collector()


def _remove(directory: str, owner: int) -> None:
    """Remove the files with the process that made their directory, not with one forked from it."""
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


class Collector:
    """Gives Prometheus the totals of every layer and their means."""

    def describe(self) -> list[Any]:
        """Nothing: what there is depends on the model."""
        return []

    def collect(self) -> Iterator[Any]:
        """One family for forwards, one for picks switched off, one for mean active experts before and after the policy."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        forwards = CounterMetricFamily("moe_fx:forwards", "Forwards counted in a layer", labels=["layer"])
        off = CounterMetricFamily("moe_fx:picks_off", "Picks that a policy switched off", labels=["layer"])
        labels = ["layer", "routing"]
        active = GaugeMetricFamily("moe_fx:active_experts", "Mean number of experts that a forward reads", labels=labels)
        for name, (steps, before, after, switched_off) in _totals().items():
            forwards.add_metric([name], steps)
            off.add_metric([name], switched_off)
            for routing, total in (("model", before), ("policy", after)):
                active.add_metric([name, routing], total / max(steps, 1))
        yield from (forwards, off, active)


def _register_collector() -> None:
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return
    if not any(isinstance(c, Collector) for c in list(REGISTRY._collector_to_names)):
        REGISTRY.register(Collector())


class Publisher:
    """Writes the totals of a worker's layers to the worker's file, whenever they have changed.

    Args:
        policies: the ``LayerPolicy`` of every layer of the worker.
        name: of the file, different for every worker that writes.
    """

    def __init__(self, policies: list[Any], name: str) -> None:
        self._policies = policies
        self._file = Path(os.environ[DIRECTORY]) / f"{name}.json"
        self._written = ""
        self._lock = threading.Lock()
        self.publish()
        _publishers.add(self)
        threading.Thread(target=self._run, args=(weakref.ref(self),), name="moe_fx-stats", daemon=True).start()

    @staticmethod
    def _run(publisher: weakref.ref[Publisher]) -> None:
        wait = threading.Event().wait
        while (alive := publisher()) is not None:
            try:
                alive.publish()
            except OSError:  # the directory is gone: the first process has ended
                return
            del alive
            wait(INTERVAL_S)

    def publish(self) -> None:
        """Write the totals as they are now.  Waits for the device."""
        import torch

        with self._lock:
            totals = torch.stack([p.totals for p in self._policies]).tolist()
            text = json.dumps({p.layer: t for p, t in zip(self._policies, totals, strict=True)})
            if text != self._written:
                new = self._file.with_suffix(".new")
                new.write_text(text)
                new.replace(self._file)
                self._written = text
