"""Learn the similarity of a model's experts from data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from moe_fx.artifacts import Artifact, model_identity

if TYPE_CHECKING:
    from moe_fx.passes.find_sites import Routing
    from moe_fx.passes.region import Region


class CalibrationError(ValueError):
    """A model or its data cannot be calibrated on; the message says what to do."""


METRICS = ("frobenius",)


def calibrate(
    model: nn.Module,
    batches: Iterable[object],
    *,
    metric: str = "frobenius",
    progress: bool | None = None,
) -> Artifact:
    """Measure how similar the experts of every site are, by running all of them on the same tokens.

    The experts run through the model's own traced graph, so any architecture that ``moe_fx`` detects works.  For
    experts i and j with outputs F_i, F_j ``[tokens, H]`` (weight 1, all tokens of all batches),
    ``similarity = 1 - d/d_max`` where ``d = |F_i - F_j|`` is the Frobenius norm and d_max its largest value at the
    site (SERE, arXiv 2602.07616).  Only distances are kept, so memory does not grow with the number of tokens.

    Args:
        model: any module whose experts trace; transformers models with ``grouped_mm`` or ``batched_mm`` experts do.
            It is run in eval mode, without gradients, and left as it was.
        batches: inputs of the model, each a mapping of keyword arguments, a tuple of arguments or one tensor.  Every
            position counts, padding too, so give batches without padding.
        metric: ``"frobenius"``.
        progress: whether to show a progress bar; None shows one on a terminal.

    Returns:
        An artifact with ``similarity`` [E, E], float32, for every site, ready to ``save``.

    Raises:
        CalibrationError: unknown metric, no batch, no site, experts that do not trace, or outputs that are not finite.
    """
    if metric not in METRICS:
        raise CalibrationError(f"unknown metric '{metric}': expected one of {', '.join(METRICS)}")
    collector = _Collector()
    compiled = torch.compile(getattr(model, "_orig_mod", model), backend=collector.compile)
    count = 0
    with _evaluating(model), torch.no_grad():
        for batch in _shown(batches, progress):
            args, kwargs = _arguments(batch)
            compiled(*args, **kwargs)
            count += 1
    if count == 0:
        raise CalibrationError("there are no batches to calibrate on: give at least one")
    return collector.artifact(model, metric, count)


@dataclass
class _Collector:
    """Squared distances between the outputs of every two experts, by site."""

    squared: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    hidden_sizes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def compile(self, gm: fx.GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
        """A torch.compile backend that runs the graph as it is and watches its experts."""
        from moe_fx.owner import ModuleOwner
        from moe_fx.passes.find_sites import find_sites
        from moe_fx.passes.normalize import NormalizeError, normalize
        from moe_fx.passes.region import find_region
        from moe_fx.passes.reroute import has_capacity

        try:
            new = normalize(gm)
        except NormalizeError:
            return gm.forward
        owner = ModuleOwner()
        routings, _ = find_sites(new, owner)
        for routing in routings:
            layers = owner.layers(routing.router.weight, routing.site)
            region = find_region(routing)
            if has_capacity(routing):
                raise CalibrationError(
                    f"the experts of site '{layers.names(routing.site.name)[0]}' have a capacity, which drops tokens when all "
                    "of them go to one expert: raise the capacity for calibration, if the model lets you"
                )
            if layers.shared or region is None:
                self.problems += layers.names(routing.site.name)
            else:
                self._watch(new, routing, region, layers.names(routing.site.name)[0])
        new.recompile()
        return new.forward

    def _watch(self, gm: fx.GraphModule, routing: Routing, region: Region, name: str) -> None:
        """After the experts, call ``observe`` with what they read."""
        from moe_fx.passes.region import extract

        experts = extract(gm, region)
        self.hidden_sizes[name] = routing.router.hidden_size
        dense = {e.node for e in routing.cut.dense}

        def observe(*read: Tensor) -> None:
            decision, inputs = read[: len(region.replaced)], read[len(region.replaced) :]
            self._add(name, routing.router.num_experts, lambda e: experts(*forced(decision, e), *inputs))

        def forced(decision: tuple[Tensor, ...], expert: int) -> list[Tensor]:
            return [
                _column(d, expert) if n in dense else _column(d, 0) if d.is_floating_point() else torch.full_like(d, expert)
                for n, d in zip(region.replaced, decision, strict=True)
            ]

        with gm.graph.inserting_after(region.output):
            gm.graph.call_function(observe, (*region.replaced, *region.inputs))

    def _add(self, name: str, num_experts: int, run: Callable[[int], Tensor]) -> None:
        outputs = torch.stack([run(e).float().flatten(0, -2) for e in range(num_experts)])  # [E, T, H]
        if not outputs.isfinite().all():
            raise CalibrationError(f"an expert of site '{name}' gives outputs that are not finite on these batches")
        flat = outputs.flatten(1).double()
        gram = flat @ flat.T
        norms = gram.diagonal()
        squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0).cpu()
        self.squared[name] = self.squared.get(name, 0) + squared
        self.tokens[name] = self.tokens.get(name, 0) + outputs.shape[1]

    def artifact(self, model: nn.Module, metric: str, batches: int) -> Artifact:
        """What was collected, as an artifact."""
        from moe_fx.kernels.reference import frobenius_similarity

        problems = [p for p in dict.fromkeys(self.problems) if p not in self.squared]
        if problems:
            raise CalibrationError(
                f"the experts of site '{problems[0]}'{f' and {len(problems) - 1} more' * (len(problems) > 1)} run outside "
                "the traced graph: use experts that trace, for example model.set_experts_implementation('grouped_mm')"
            )
        if not self.squared:
            raise CalibrationError("no expert routing was found in this model: see moe_fx.explain(model, ...)")
        sites = {name: {"similarity": frobenius_similarity(s.sqrt()).float()} for name, s in self.squared.items()}
        metadata = {
            "metric": metric,
            "model": model_identity(model),
            "hidden_sizes": self.hidden_sizes,
            "calibration": {"batches": batches, "tokens": max(self.tokens.values())},
            "created_by": "moe_fx.calibrate",
        }
        return Artifact(sites, metadata)


def _column(like: Tensor, index: int) -> Tensor:
    """Zeros with a column of ones: weight 1 for one pick, or for one expert of a dense matrix."""
    forced = torch.zeros_like(like)
    forced[..., index] = 1
    return forced


def _arguments(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise CalibrationError(
        f"a batch is a {type(batch).__name__}, expected a mapping of keyword arguments, a tuple of arguments or a tensor"
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _shown(batches: Iterable[object], progress: bool | None) -> Iterable[object]:
    if not (sys.stderr.isatty() if progress is None else progress):
        return batches
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    return track(batches, "calibrating", total=total, console=Console(stderr=True))
