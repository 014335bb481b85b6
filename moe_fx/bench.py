"""Decode and prefill speed of a model with and without a policy, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_fx.evaluate import Decoder, EvaluationError, compiled_to_the_end, filled_cache, with_cache
from moe_fx.policy import Policy, TopK
from moe_fx.stats import reset_stats, stats

_SEGMENT = 8  # decode steps one configuration runs before the next one's turn


@dataclass
class Timing:
    """One configuration at one batch size.

    Attributes:
        what: ``"decode"``: N tokens a step, one of each of N sequences; ``"prefill"``: one sequence at once.
        turns_ms: the median step of each turn; all configurations take turns.
    """

    what: str
    name: str
    batch: int
    active_experts: float
    turns_ms: list[float] = field(default_factory=list)

    def row(self, baseline: Timing) -> dict[str, object]:
        """With units in the names, and the ratio to the baseline formed turn by turn."""
        low, middle, high = statistics.quantiles(self.turns_ms, n=4)
        ratio = statistics.median(b / c for b, c in zip(baseline.turns_ms, self.turns_ms, strict=True))
        return {
            "what": self.what, "batch": self.batch, "configuration": self.name,
            "active_experts_per_layer": round(self.active_experts, 2), "ms": round(middle, 3),
            "spread": round((high - low) / 2 / middle, 4), "ratio_to_inductor_alone": round(ratio, 3),
        }  # fmt: skip


def bench(
    model: nn.Module,
    configurations: Mapping[str, Sequence[Policy] | None],
    tokens: Tensor,
    *,
    batches: Sequence[int],
    turns: int = 6,
    inner: str = "inductor",
    advance: Callable[[str], None] | None = None,
) -> list[dict[str, object]]:
    """Time a model under several configurations, interleaved.

    Args:
        model: a causal language model of transformers, in eval mode.
        configurations: name -> policies, or None for the inner compiler alone; the first is what ratios are formed with.
        tokens: [rows, length] of real text: at least as many rows as the largest batch, and 16 tokens or more.
        batches: numbers of sequences decoded together.
        turns: turns of 8 steps that each configuration takes.

    Returns:
        A row for each configuration and batch, decode first, then the prefill of ``tokens[:1]``.
    """
    rows: list[dict[str, object]] = []
    say = advance or (lambda what: None)
    with compiled_to_the_end(32 + 2 * len(configurations)), torch.no_grad():
        for batch in batches:
            torch._dynamo.reset()
            lanes = []
            for name, policies in configurations.items():
                say(f"compile {name}, batch {batch}")
                active = _active(model, policies, tokens[:batch])
                lanes.append((_Lane(model, policies, inner, batch, tokens.shape[1]), Timing("decode", name, batch, active)))
            say(f"decode at batch {batch}")
            for turn in range(turns):
                for lane, timing in lanes:
                    timing.turns_ms.append(lane.turn(tokens[:batch], turn))
            rows += [timing.row(lanes[0][1]) for _, timing in lanes]
        counted = {n: _active(model, p, tokens[:1], whole=True) for n, p in configurations.items()}
        torch._dynamo.reset()
        prefills = [(_compiled(model, p, inner), Timing("prefill", n, 1, counted[n])) for n, p in configurations.items()]
        say(f"prefill of {tokens.shape[1]} tokens")
        for turn in range(turns + 1):
            for call, timing in prefills:
                start = time.perf_counter()
                call(input_ids=tokens[:1].to(_device(model)), use_cache=False)
                _wait(model)
                if turn:  # the first one compiles
                    timing.turns_ms.append(1000 * (time.perf_counter() - start))
        rows += [timing.row(prefills[0][1]) for _, timing in prefills]
    return rows


class _Lane:
    """One configuration compiled for one batch size, with a cache of its own."""

    def __init__(self, model: nn.Module, policies: Sequence[Policy] | None, inner: str, batch: int, length: int) -> None:
        self._model = model
        self._call = _compiled(model, policies, inner)
        first = torch.zeros(batch, 1, dtype=torch.int64)
        self._cache = filled_cache(model, first.to(_device(model)), max(length, _SEGMENT))
        self._arguments = with_cache(model, self._cache)
        for _ in range(2):
            self._step(first)
        self._cache.reset()

    def _step(self, column: Tensor) -> None:
        ids = column.to(_device(self._model)).contiguous()
        self._call(input_ids=ids, **self._arguments)
        _wait(self._model)

    def turn(self, tokens: Tensor, turn: int) -> float:
        """The median milliseconds of some steps that follow those of the turn before."""
        start = (turn * _SEGMENT) % max(1, tokens.shape[1] - _SEGMENT)
        if start < _SEGMENT:
            self._cache.reset()
        milliseconds = []
        for step in range(start, start + _SEGMENT):
            began = time.perf_counter()
            self._step(tokens[:, step : step + 1])
            milliseconds.append(1000 * (time.perf_counter() - began))
        return statistics.median(milliseconds)


def _compiled(model: nn.Module, policies: Sequence[Policy] | None, inner: str) -> Callable[..., Any]:
    if policies is None:
        return torch.compile(model, backend=inner, dynamic=False)
    options: dict[str, Any] = {"policy": list(policies), "inner": inner, "strict": True}
    return torch.compile(model, backend="moe_sparse", dynamic=False, options=options)


def _active(model: nn.Module, policies: Sequence[Policy] | None, tokens: Tensor, whole: bool = False) -> float:
    """Mean distinct experts per layer, counted outside what is timed."""
    options: dict[str, Any] = {"policy": list(policies or [TopK()]), "inner": "eager", "stats": True, "strict": True}
    if whole:
        torch._dynamo.reset()
        reset_stats()
        torch.compile(model, backend="moe_sparse", dynamic=False, options=options)(
            input_ids=tokens.to(_device(model)), use_cache=False
        )
    else:
        decoder = Decoder(model, *tokens.shape, backend="moe_sparse", options=options, reset=False)
        reset_stats()
        for _ in decoder.decode(tokens):
            pass
    if not stats():
        raise EvaluationError(f"no expert routing was found in this {type(model).__name__}: see 'moe-fx inspect'")
    return statistics.fmean(site.active for site in stats().values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _wait(model: nn.Module) -> None:
    if _device(model).type == "cuda":
        torch.cuda.synchronize()
