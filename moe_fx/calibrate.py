"""Learn the similarity of a model's experts from data."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from moe_fx import similarity
from moe_fx.apart import compiled_apart
from moe_fx.artifacts import Artifact, model_identity, read_safetensors, weights_sample, write_safetensors

if TYPE_CHECKING:
    from moe_fx.passes.find_sites import Routing
    from moe_fx.passes.fuse_experts import Experts
    from moe_fx.passes.region import Region


class CalibrationError(ValueError):
    """A model or its data cannot be calibrated on; the message says what to do."""


METRICS = tuple(sorted(similarity.METRICS))
_CHUNK_BYTES = 2**28  # outputs of all experts that are held at once, in float32, where the experts were recognised


def calibrate(
    model: nn.Module,
    batches: Iterable[object],
    *,
    metric: str = "frobenius",
    folds: bool = False,
    noise_seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Artifact:
    """Measure how similar the experts of every site are, by running all of them on the same tokens.

    The experts run through the model's own traced graph, so any architecture that ``moe_fx`` detects works.  For
    experts i and j with outputs F_i, F_j ``[tokens, H]`` (weight 1, all tokens of all batches) the metrics are those of
    SERE (arXiv 2602.07616), as ``moe_fx.similarity`` defines them.  Only sums over tokens are kept, so memory does not grow
    with their number; at any time one layer's outputs for one batch are held, and only a quarter of a gigabyte of them
    where the experts were recognised.

    Args:
        model: any module whose experts trace; transformers models with ``grouped_mm`` or ``batched_mm`` experts do.
            It is run in eval mode, without gradients, and left as it was.
        batches: inputs of the model, each a mapping of keyword arguments, a tuple of arguments or one tensor.  Every
            position counts, padding too, so give batches without padding.
        metric: ``"frobenius"``, ``"cosine"``, ``"cka-linear"`` or ``"cka-rbf"``.
        folds: also measure what the baselines ``ExFold`` and ``StaticPrune`` read.
        noise_seed: with a seed, the experts get Gaussian noise of the root mean square of their own input, and the batches
            only lead there: a quick start without data.  The metadata say so.
        checkpoint: a file to go on from where an earlier call with the same arguments was stopped.  It is written as the
            batches pass, and removed at the end; the result is that of an uninterrupted call, bit for bit.
        progress: whether to show a progress bar; None shows one on a terminal.

    Returns:
        An artifact with ``similarity`` [E, E], float32, for every site, ready to ``save``.  ``metadata["spread"]`` is how
        far similarities from half of the tokens differ from those of the other half, halved: their standard error.

    Raises:
        CalibrationError: unknown metric, no batch, no site, experts that do not trace or are seen in some batches only, outputs
            that are not finite, or a checkpoint of something else.
    """
    if metric not in METRICS:
        raise CalibrationError(f"unknown metric '{metric}': expected one of {', '.join(METRICS)}")
    collector = _Collector(metric, folds, noise_seed)
    done = collector.resume(Path(checkpoint), model) if checkpoint is not None else 0
    compiled = compiled_apart(model, collector.compile)
    count = 0
    saved = time.monotonic()
    with _evaluating(model), torch.no_grad():
        for batch in _shown(batches, progress):
            count += 1
            if count <= done:
                continue
            args, kwargs = _arguments(batch)
            seen = collector.tokens()
            with _own_errors():
                compiled(*args, **kwargs)
            collector.require_sites(model)
            collector.check_all_seen(seen)
            if checkpoint is not None and (count == done + 1 or time.monotonic() - saved > _CHECKPOINT_SECONDS):
                collector.save(Path(checkpoint), model, count)
                saved = time.monotonic()
    if count == 0:
        raise CalibrationError("there are no batches to calibrate on: give at least one")
    artifact = collector.artifact(model, count)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return artifact


_CHECKPOINT_SECONDS = 20.0


@dataclass
class _Collector:
    """What is summed up at every site while the model runs."""

    metric: str
    folds: bool
    noise_seed: int | None
    sites: dict[str, similarity.Site] = field(default_factory=dict)
    hidden_sizes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # why a graph could not be looked into

    def compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """A torch.compile backend that runs the graph as it is and watches its experts."""
        from moe_fx.owner import ModuleOwner
        from moe_fx.passes.find_sites import find_sites
        from moe_fx.passes.fuse_experts import Experts, recognise
        from moe_fx.passes.normalize import NormalizeError, normalize
        from moe_fx.passes.region import find_region
        from moe_fx.passes.reroute import has_capacity

        try:
            new = normalize(gm)
        except NormalizeError as error:
            self.unread.append(str(error))
            return gm.forward
        owner = ModuleOwner()
        routings, _ = find_sites(new, owner)
        for routing in routings:
            layers = owner.layers(routing.router.weight, routing.site)
            name, region = layers.names(routing.site.name)[0], find_region(routing)
            if has_capacity(routing):
                raise CalibrationError(
                    f"the experts of site '{name}' have a capacity, which drops tokens when all "
                    "of them go to one expert: raise the capacity for calibration, if the model lets you"
                )
            if layers.shared or routing.experts is None:
                self.problems += layers.names(routing.site.name)
                continue
            if region is None:
                raise CalibrationError(
                    f"the experts' outputs of site '{name}' never come together as one vector per token, so that no expert can "
                    "be told from another: add them up inside the graph, as [T, H] or in the shape of the router's input"
                )
            self.hidden_sizes[name] = routing.router.hidden_size
            experts = recognise(routing, region) if not routing.cut.dense else None
            if isinstance(experts, Experts):
                self._watch_recognised(new, routing, experts, name)
            elif routing.cut.counts:
                raise CalibrationError(
                    f"the experts of site '{name}' count their tokens beside the routing decision, so that they cannot be run "
                    "one by one: let them count with torch.bincount of the ids"
                )
            else:
                self._watch_region(new, routing, region, name)
        new.recompile()
        return new.forward

    def _watch_recognised(self, gm: fx.GraphModule, routing: Routing, experts: Experts, name: str) -> None:
        """Before the experts, run each of them on what they read, a chunk of tokens at a time."""

        def observe(picks: Picks, hidden: Tensor, *parts: Any) -> None:
            num_experts = routing.router.num_experts
            step = max(16, _CHUNK_BYTES // (4 * num_experts * hidden.shape[-1]))
            ids = torch.arange(num_experts, device=hidden.device)
            for start in range(0, hidden.shape[0], self._site(name).rows(step)):
                rows = slice(start, start + self._site(name).rows(step))
                x = self._disturbed(hidden[rows], name)
                one = torch.ones(len(x), 1, device=x.device)
                outputs = [experts.op(*experts.arguments([*parts], x, one, e.expand(len(x), 1).contiguous())) for e in ids]
                self._add(name, outputs, _per_pick(routing, picks), rows)

        with gm.graph.inserting_before(experts.region.output.next):
            parts = experts.parts(gm.graph)
            gm.graph.call_function(observe, (self._picks(routing), experts.hidden, *parts))

    def _watch_region(self, gm: fx.GraphModule, routing: Routing, region: Region, name: str) -> None:
        """After the experts, run a copy of their region with every pick of every token on one expert."""
        from moe_fx.passes.region import extract

        experts = extract(gm, region)
        dense = {e.node for e in routing.cut.dense}
        width = routing.router.hidden_size
        states = [n.op == "call_function" and n.meta["val"].shape[-1:] == (width,) for n in region.inputs]

        def observe(picks: Picks, *read: Tensor) -> None:
            decision, inputs = read[: len(region.replaced)], read[len(region.replaced) :]
            inputs = tuple(
                self._disturbed(x, name) if is_state and x.is_floating_point() else x
                for x, is_state in zip(inputs, states, strict=True)
            )
            outputs = [experts(*forced(decision, e), *inputs).flatten(0, -2) for e in range(routing.router.num_experts)]
            self._add(name, outputs, _per_pick(routing, picks), slice(None))

        def first_pick(weights: Tensor) -> Tensor:
            return torch.ones_like(weights) if routing.selection.k == 1 else _column(weights, 0)  # one may lack its axis

        def forced(decision: tuple[Tensor, ...], expert: int) -> list[Tensor]:
            return [
                _column(d, expert) if n in dense else first_pick(d) if d.is_floating_point() else torch.full_like(d, expert)
                for n, d in zip(region.replaced, decision, strict=True)
            ]

        with gm.graph.inserting_after(region.output):
            gm.graph.call_function(observe, (self._picks(routing), *region.replaced, *region.inputs))

    def _picks(self, routing: Routing) -> tuple[Node | None, Node | None]:
        """The ids and weights of the routing decision, where they are measured."""
        if not self.folds:
            return None, None
        carriers = [e.node for e in (*routing.cut.weights, *routing.cut.dense)]
        return routing.selection.ids, carriers[0] if carriers else None

    def _disturbed(self, hidden: Tensor, name: str) -> Tensor:
        """What the experts read: the model's own hidden states, or noise of the same root mean square."""
        if self.noise_seed is None:
            return hidden
        site = self._site(name)
        seed = int.from_bytes(hashlib.sha256(f"{self.noise_seed} {name} {site.tokens}".encode()).digest()[:7], "big")
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)).to(hidden)
        return noise * hidden.float().square().mean().sqrt().to(hidden)

    def _site(self, name: str) -> similarity.Site:
        return self.sites.setdefault(name, similarity.Site(self.metric))

    def _add(self, name: str, outputs: list[Tensor], picks: Picks, rows: slice) -> None:
        stacked = torch.stack(outputs)
        stacked = stacked.float() if stacked.dtype != torch.float64 else stacked  # [E, T, H]
        if not torch.stack(stacked.aminmax()).isfinite().all():  # one pass over memory, where isfinite takes six
            raise CalibrationError(f"an expert of site '{name}' gives outputs that are not finite on these batches")
        ids, weights = picks
        if ids is not None and weights is not None:
            self._site(name).add_picks(stacked, ids[rows], weights[rows])
        self._site(name).add(stacked)

    def tokens(self) -> dict[str, int]:
        """The tokens that the experts of each site have met."""
        return {name: site.tokens for name, site in self.sites.items()}

    def check_all_seen(self, before: Mapping[str, int]) -> None:
        """Refuse to go on when a site that was watched is no longer: its table would be that of some batches only."""
        for name, tokens in self.tokens().items():
            if tokens == before.get(name):
                raise CalibrationError(
                    f"the experts of site '{name}' were seen in earlier batches and not in this one, whose shape is another: "
                    "give batches of one shape"
                )

    def save(self, file: Path, model: nn.Module, count: int) -> None:
        """Write all sums, so that ``resume`` can go on after ``count`` batches."""
        tensors = {f"{name}/{key}": t for name, site in self.sites.items() for key, t in site.state().items()}
        header = {"key": json.dumps(self._key(model)), "count": str(count)}
        write_safetensors(file, tensors, header)

    def resume(self, file: Path, model: nn.Module) -> int:
        """Read what ``save`` wrote, if the file is there: the number of batches that are done."""
        if not file.is_file():
            return 0
        header, tensors = read_safetensors(file)
        if header.get("key") != json.dumps(self._key(model)):
            raise CalibrationError(
                f"{file} is the checkpoint of another calibration (another model, weights, metric or setting): delete it, or "
                "name another"
            )
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            self._site(name).load(part, tensor)
        return int(header["count"])

    def _key(self, model: nn.Module) -> list[object]:
        return [self.metric, self.folds, self.noise_seed, model_identity(model), weights_sample(model)]

    def require_sites(self, model: nn.Module) -> None:
        """Stop where there is nothing to sum up, or experts that cannot be run one by one."""
        problems = [p for p in dict.fromkeys(self.problems) if p not in self.sites]
        if problems:
            raise CalibrationError(
                f"the experts of site '{problems[0]}'{f' and {len(problems) - 1} more' * (len(problems) > 1)} run outside "
                "the traced graph, as a Python loop over the experts that were picked does: use experts that trace, for example "
                "model.set_experts_implementation('grouped_mm') where the model has them"
            )
        if not self.sites:
            unread = f" (a graph could not be read: {self.unread[0]})" if self.unread else ""
            raise CalibrationError(
                f"no expert routing was found in this {type(model).__name__}{unread}: "
                "see 'moe-fx inspect' or moe_fx.explain(model, ...)"
            )

    def artifact(self, model: nn.Module, batches: int) -> Artifact:
        """What was collected, as an artifact."""
        self.require_sites(model)
        sites = {name: {"similarity": site.similarity(), **site.fold_tables()} for name, site in self.sites.items()}
        spreads = [s for site in self.sites.values() if (s := site.spread()) is not None]
        metadata: dict[str, object] = {
            "metric": self.metric,
            "model": model_identity(model),
            "weights_sample": weights_sample(model),
            "hidden_sizes": self.hidden_sizes,
            "calibration": {"batches": batches, "tokens": max(site.tokens for site in self.sites.values())},
            "distance_scale": {name: scale for name, site in self.sites.items() if (scale := site.distance_scale()) is not None},
            "spread": max(spreads) if spreads else None,
            "created_by": "moe_fx.calibrate",
        }
        if self.noise_seed is not None:
            metadata["calibrated_on"] = f"no data: Gaussian noise of each site's root mean square, seed {self.noise_seed}"
        return Artifact(sites, metadata)


Picks = tuple[Tensor | None, Tensor | None]


def _per_pick(routing: Routing, picks: Picks) -> Picks:
    """Ids and weights [T, K] of a routing decision as the graph holds it."""
    ids, weights = picks
    if ids is None or weights is None:
        return None, None
    ids = ids.reshape(-1, routing.selection.k)
    if routing.cut.dense:
        return ids, weights.reshape(-1, routing.router.num_experts).gather(1, ids.long())
    return ids, weights.reshape(-1, routing.selection.k)


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
def _own_errors() -> Iterator[None]:
    """Our errors, as they were before Dynamo wrapped them."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, CalibrationError):
            raise error.inner_exception from None
        raise


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
