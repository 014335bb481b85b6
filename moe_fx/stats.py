"""How many distinct experts each site runs, counted while compiled graphs run (``options={"stats": True}``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SiteStats:
    """What one site did since the counters were last reset.

    Attributes:
        steps: forwards counted.
        before: mean number of distinct experts of a forward's own top-K picks.
        active: mean number of distinct experts after the policy.
        off: mean number of a forward's picks that were off after the policy.
    """

    steps: int
    before: float
    active: float
    off: float = 0.0


@dataclass(frozen=True)
class Counter:
    """The totals of one site in one compiled graph, each an int64 scalar on the graph's device."""

    steps: Tensor
    before: Tensor
    active: Tensor
    off: Tensor


_COUNTERS: dict[str, list[Counter]] = {}


def new_counter(names: list[str], device: torch.device) -> Counter:
    """A zeroed counter for a site.  Layers that share one graph share one entry, named after all of them."""
    counter = Counter(*(torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)))
    _COUNTERS.setdefault(", ".join(names), []).append(counter)
    return counter


def stats() -> dict[str, SiteStats]:
    """Counts of every site that ran since ``reset_stats``, by site name.  Reading them waits for the device."""
    read = {}
    for name, counters in _COUNTERS.items():
        steps, *totals = (sum(int(getattr(c, f)) for c in counters) for f in ("steps", "before", "active", "off"))
        if steps:
            read[name] = SiteStats(steps, *(total / steps for total in totals))
    return read


def reset_stats() -> None:
    """Set every counter to zero."""
    for counters in _COUNTERS.values():
        for counter in counters:
            for total in (counter.steps, counter.before, counter.active, counter.off):
                total.zero_()
