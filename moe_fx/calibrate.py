"""Learn an artifact from the outputs of a model's experts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from moe_fx.artifacts import Artifact


def calibrate(model: nn.Module, batches: Iterable[object], *, metric: str = "frobenius", **options: object) -> Artifact:
    raise NotImplementedError("calibrate is not written yet")
