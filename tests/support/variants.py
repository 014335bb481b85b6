"""One capture by Dynamo, compiled by ``moe_sparse`` under several options: capturing takes longer than all the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

import moe_fx
from moe_fx.backend import moe_sparse
from moe_fx.report import Report


class _Variants:
    """A backend that compiles each graph under each of the options, of which ``chosen`` runs."""

    def __init__(self, wanted: Sequence[Mapping[str, Any]]) -> None:
        self.chosen = 0
        self.reports: list[Report] = []
        self._wanted = wanted

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        programs = []
        for options in self._wanted:
            programs.append(moe_sparse(gm, inputs, options=options))
            self.reports.append(moe_fx.last_report())
        return lambda *args: programs[self.chosen](*args)


def run_each(module: nn.Module, wanted: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> list[tuple[Any, Report]]:
    """What a module that is captured whole gives under each of the options, and what was done to it.

    Options are those of ``moe_sparse``; the inner compiler is "eager" where they name none.
    """
    torch._dynamo.reset()
    variants = _Variants([{"inner": "eager", **options} for options in wanted])
    program = torch.compile(module, backend=variants, fullgraph=True)
    results = []
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for variants.chosen in range(len(wanted)):
            results.append((program(*args, **kwargs), variants.reports[variants.chosen]))
    assert len(variants.reports) == len(wanted), "it must be captured once"
    return results
