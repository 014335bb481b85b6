"""Judge policies the way a server decodes: different texts advance together, one token each a step, with a cache.

In one big forward nearly every expert is somebody's first pick, and a policy that depends on the batch would look free.
Here every step is a batch of one token from each of N texts, and the next token is the text's own (teacher-forced), so
that likelihoods of different policies compare token by token.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_fx.backend import last_report
from moe_fx.policy import Policy, TopK
from moe_fx.stats import SiteStats, reset_stats, stats


class EvaluationError(ValueError):
    """A model or its data cannot be evaluated; the message says what to do."""


@dataclass(frozen=True)
class Windows:
    """Texts to decode: ``groups`` of token ids [N, context + 1], each row from another document.

    The first ``skip`` predictions of a row are not scored where the row overlaps the one before it in its document.
    """

    groups: tuple[Tensor, ...]
    skips: tuple[Tensor, ...]  # [N] for each group: predictions at the beginning of each row that are not scored

    @property
    def scored(self) -> int:
        """Predicted tokens that count."""
        return sum(int((g.shape[1] - 1 - s).sum()) for g, s in zip(self.groups, self.skips, strict=True))


def windows(documents: Sequence[Tensor], batch: int, context: int, stride: int, max_groups: int | None = None) -> Windows:
    """Cut documents (token ids, one dimension) into overlapping windows and put ``batch`` different documents in a group.

    A window predicts ``context`` tokens; the next one of its document begins ``stride`` tokens later, and only what it
    predicts beyond the one before is scored.

    Raises:
        EvaluationError: fewer than ``batch`` documents are long enough.
    """
    if not 1 <= stride <= context:
        raise EvaluationError(f"stride is {stride}, expected 1 to the context, {context}")
    long_enough = [d for d in documents if len(d) > context]
    if len(long_enough) < batch:
        longest = max((len(d) for d in documents), default=0)
        raise EvaluationError(
            f"{len(long_enough)} of {len(documents)} documents have more than {context} tokens (the longest has {longest}), but "
            f"{batch} are decoded together: give more or longer documents, or a smaller batch or context"
        )
    rows: list[tuple[int, int, Tensor]] = []
    for number, document in enumerate(long_enough):
        starts = range(0, len(document) - context, stride)
        rows += [(turn, number, document[start : start + context + 1]) for turn, start in enumerate(starts)]
    rows.sort(key=lambda row: row[:2])
    groups: list[Tensor] = []
    skips: list[Tensor] = []
    for first in range(0, len(rows) - batch + 1, batch):
        group = rows[first : first + batch]
        if len({number for _, number, _ in group}) < batch or (max_groups is not None and len(groups) == max_groups):
            break  # the long documents are alone from here on
        groups.append(torch.stack([tokens for _, _, tokens in group]))
        skips.append(torch.tensor([0 if turn == 0 else context - stride for turn, _, _ in group]))
    return Windows(tuple(groups), tuple(skips))


@dataclass
class Evaluation:
    """What one policy does to a model.

    Attributes:
        name: for people.
        policy: what was evaluated.
        batch: N, texts advanced together.
        losses: negative log-likelihood of each text (of each window, where a text has several), nats per token.
        scored: how many tokens of each were scored, which is its weight in a mean; none given: all weigh the same.
        kl: KL divergence of its next-token distribution from the full model's, nats, mean over tokens.
        agreement: share of tokens at which both have the same most likely next token.
        active: site -> mean distinct experts in a step.
        off: mean picks switched off, per site and step.
        step_ms: median milliseconds of a step; only a rough guide, because experts are counted along the way.
        tokens: predicted tokens that were scored.
    """

    name: str
    policy: tuple[Policy, ...]
    batch: int
    losses: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    kl: float = math.nan
    agreement: float = math.nan
    active: dict[str, float] = field(default_factory=dict)
    off: float = 0.0
    step_ms: float = math.nan
    tokens: int = 0

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses, self.scored or None)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def active_experts(self) -> float:
        """Mean distinct experts per layer and step."""
        return statistics.fmean(self.active.values())

    def loss_increase(self, full: Evaluation) -> tuple[float, float]:
        """Nats per token above the full model on the same texts, and the standard error of that over texts."""
        differences = [mine - other for mine, other in zip(self.losses, full.losses, strict=True)]
        mean, count = statistics.fmean(differences, self.scored or None), len(differences)
        weights = self.scored or [1] * count
        variance = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True)) / sum(weights) ** 2
        return mean, math.sqrt(variance * count / (count - 1)) if count > 1 else math.nan


Named = tuple[str, Policy | Sequence[Policy]]


class Evaluator:
    """Decodes the same texts under one policy after another.

    The full model's distributions are kept, scored tokens x vocabulary in float32: 16 texts of 256 tokens with a
    vocabulary of 150,000 take 2.4 GB.

    Args:
        model: a causal language model of transformers, in eval mode.
        texts: what to decode.
        inner: the compiler behind the backend; ``"eager"`` starts at once, ``"inductor"`` is worth it for long texts.
        advance: called with (steps done, what is being done), for a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: Windows,
        *,
        inner: str = "eager",
        advance: Callable[[int, str], None] | None = None,
    ) -> None:
        self.model, self.texts, self._inner = model, texts, inner
        self._advance = advance or (lambda done, what: None)
        self._done = 0
        self._log_probabilities: list[Tensor] = []
        self.full = self._run("full", (TopK(),))

    @property
    def steps(self) -> int:
        """Decode steps of one evaluation."""
        return sum(g.shape[1] - 1 for g in self.texts.groups)

    def evaluate(self, name: str, policy: Policy | Sequence[Policy]) -> Evaluation:
        """Decode all texts under a policy."""
        return self._run(name, (policy,) if isinstance(policy, Policy) else tuple(policy))

    def _run(self, name: str, policy: tuple[Policy, ...]) -> Evaluation:
        is_full = not self._log_probabilities
        result = Evaluation(name, policy, len(self.texts.groups[0]))
        options = {"policy": list(policy), "inner": self._inner, "stats": True, "strict": True}
        decoder = Decoder(self.model, *self.texts.groups[0].shape, backend="moe_sparse", options=options)
        if not last_report().sites:
            raise EvaluationError(f"no expert routing was found in this {type(self.model).__name__}: see 'moe-fx inspect'")
        reset_stats()
        kl, agreed, milliseconds = 0.0, 0, []
        for index, (group, skip) in enumerate(zip(self.texts.groups, self.texts.skips, strict=True)):
            texts = torch.zeros(len(group), dtype=torch.float64)
            for step, (logits, seconds) in enumerate(decoder.decode(group)):
                scored = step >= skip
                now = logits.float().log_softmax(-1).cpu()
                if is_full:
                    self._log_probabilities.append(now)
                full = self._log_probabilities[index * (group.shape[1] - 1) + step]
                texts -= torch.where(scored, now.gather(1, group[:, step + 1 : step + 2].cpu())[:, 0], 0).double()
                kl += float(((full.exp() * (full - now)).sum(-1) * scored).sum())
                agreed += int(((full.argmax(-1) == now.argmax(-1)) & scored).sum())
                milliseconds.append(1000 * seconds)
                self._done += 1
                self._advance(self._done, name)
            counts = group.shape[1] - 1 - skip
            result.losses += (texts / counts).tolist()
            result.scored += counts.tolist()
        if not all(map(math.isfinite, result.losses)):
            raise EvaluationError(
                f"the loss under '{name}' is not finite, because the model's logits are not: its weights are damaged, or "
                f"{next(self.model.parameters()).dtype} is too narrow for it, and another dtype is needed"
            )
        result.tokens = self.texts.scored
        result.kl, result.agreement = kl / result.tokens, agreed / result.tokens
        result.step_ms = statistics.median(milliseconds)
        counted: dict[str, SiteStats] = stats()
        result.active = {site: s.active for site, s in counted.items()}
        result.off = statistics.fmean(s.off for s in counted.values())
        return result


def static_cache(model: nn.Module, length: int) -> Any:
    """A key/value cache of ``length`` positions for a model of transformers, every layer as long.

    A cache of a sliding window counts its steps in a Python number, for which Dynamo would compile every step anew; with all
    positions kept, the mask alone makes the window.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
    for place, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            whole = cache.layers[place] = StaticLayer(max_cache_len=length)
            whole.is_sliding = True  # the sliding layers' mask takes its size from here
    return cache


def cache_argument(module: nn.Module | type[nn.Module]) -> str:
    """The argument by which a model of transformers, or one of its layers, takes a cache: it has another name from 5.24 on."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments with which a model decodes into a cache."""
    return {cache_argument(model): cache, "use_cache": True}


def filled_cache(model: nn.Module, first: Tensor, length: int) -> Any:
    """``static_cache`` with the shapes it takes from a first token of each text [N, 1], outside what is compiled.

    Raises:
        EvaluationError: the model does not decode with it.
    """
    try:
        cache = static_cache(model, length)
        model(input_ids=first, **with_cache(model, cache))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(
            f"{type(model).__name__} does not decode with a static key/value cache, which is what serves a batch: {reason}"
        ) from error
    cache.reset()
    return cache


@contextmanager
def compiled_to_the_end(limit: int = 16) -> Iterator[None]:
    """Inside, more compilations of one function than ``limit`` are an error: Dynamo would go on without the policy.

    Raises:
        EvaluationError: a model asks for more, because something in it changes with every step.
    """
    try:
        with torch._dynamo.config.patch(
            recompile_limit=max(limit, torch._dynamo.config.recompile_limit), fail_on_recompile_limit_hit=True
        ):
            yield
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        raise EvaluationError(
            "something in this model changes with every step, so that torch.compile compiles it anew each time, and it cannot be "
            "decoded under a policy with this version of transformers: TORCH_LOGS=recompiles shows what changes"
        ) from None


class Decoder:
    """A compiled model with a static key/value cache for N texts.

    torch.compile is reset first, unless ``reset`` is False: policies share one forward function, whose compilations Dynamo
    limits in number.

    Raises:
        EvaluationError: the model does not take a static cache, or cannot be compiled for one.
    """

    def __init__(self, model: nn.Module, rows: int, length: int, *, reset: bool = True, **compile_settings: Any) -> None:
        if reset:
            torch._dynamo.reset()
        self._model: Any = getattr(model, "_orig_mod", model)
        self._device = next(self._model.parameters()).device
        self._compiled = torch.compile(self._model, **compile_settings)
        first = torch.zeros(rows, 1, dtype=torch.int64)
        with torch.no_grad():
            self._cache = filled_cache(self._model, first.to(self._device), length)
            self._arguments = with_cache(self._model, self._cache)
            with compiled_to_the_end():
                self._step(first)

    def decode(self, tokens: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Feed ``tokens`` [N, length] column by column, all but the last: the logits [N, V] after each, and seconds."""
        self._cache.reset()
        for column in tokens[:, :-1].split(1, dim=1):
            with torch.no_grad(), compiled_to_the_end():
                start = time.perf_counter()
                logits = self._step(column)
                seconds = time.perf_counter() - start
            yield logits, seconds

    def _step(self, column: Tensor) -> Tensor:
        ids = column.to(self._device).contiguous()
        logits: Tensor = self._compiled(input_ids=ids, **self._arguments).logits[:, -1]
        return logits


class Stepwise:
    """A model under a policy for a library that scores and continues texts, such as lm-eval, decoding as a server does.

    Such a library scores a batch of texts in one forward.  ``logits`` is for that place and decodes them together instead,
    one token each a step, because a policy that depends on the batch would look free in one big forward.  A text shorter
    than the longest of its batch goes on with padding, whose experts count among those in use: batch texts of like length.

    Args:
        model: a causal language model of transformers, in eval mode.
        policy: what its routers do.
        inner: the compiler behind the backend.
    """

    def __init__(self, model: nn.Module, policy: Sequence[Policy], *, inner: str = "eager") -> None:
        self._model: Any = model
        options = {"policy": list(policy), "inner": inner, "strict": True}
        self._settings: dict[str, Any] = {"backend": "moe_sparse", "options": options}
        self._decoder: Decoder | None = None
        self._rows = self._length = 0
        torch._dynamo.reset()
        self._call = torch.compile(self._model._call_impl, **self._settings)

    def logits(self, tokens: Tensor) -> Tensor:
        """Token ids [N, T] -> the logits after each of them, [N, T, V]."""
        rows, length = tokens.shape
        if self._decoder is None or rows != self._rows or length > self._length:
            self._decoder = Decoder(self._model, rows, length, **self._settings)
            self._rows, self._length = rows, length
        fed = torch.nn.functional.pad(tokens, (0, 1))  # a decoder does not feed the last column
        return torch.stack([logits.clone() for logits, _ in self._decoder.decode(fed)], dim=1)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, the model's own ``generate`` runs under the policy: it calls the model, and never a compiled copy of it.

        Where Dynamo meets more shapes than it would compile it raises, instead of going on without the policy.
        """
        self._model._compiled_call_impl = self._call
        try:
            with compiled_to_the_end(64):
                yield
        finally:
            self._model._compiled_call_impl = None


def pareto(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that no other beats in both active experts and KL divergence, by active experts."""
    best: list[Evaluation] = []
    for evaluation in sorted(evaluations, key=lambda e: (e.active_experts, e.kl)):
        if not best or evaluation.kl < best[-1].kl:
            best.append(evaluation)
    return best


def rows_of(evaluations: Sequence[Evaluation], full: Evaluation) -> list[dict[str, object]]:
    """One row each, with units in the names: for a table, a CSV file or JSON."""
    rows: list[dict[str, object]] = []
    for e in evaluations:
        increase, error = e.loss_increase(full)
        rows.append({
            "policy": e.name,
            "batch": e.batch,
            "active_experts_per_layer": round(e.active_experts, 3),
            "perplexity": round(e.perplexity, 4),
            "loss_nats_per_token": round(e.loss, 6),
            "loss_above_full": round(increase, 6),
            "loss_above_full_standard_error": round(error, 6) if math.isfinite(error) else None,
            "kl_to_full_nats": round(e.kl, 6),
            "top1_agreement": round(e.agreement, 5),
            "picks_off_per_layer_and_step": round(e.off, 3),
            "step_ms": round(e.step_ms, 3),
            "scored_tokens": e.tokens,
            "active_experts_by_site": {site: round(active, 3) for site, active in e.active.items()},
        })  # fmt: skip
    return rows
