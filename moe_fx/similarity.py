"""What calibration sums up at a site, and the similarities that come of it.

Experts' outputs arrive as F ``[E, T, H]``, some tokens at a time.  The metrics are SERE's (arXiv 2602.07616), each with a
diagonal of 1:

* ``frobenius``: ``1 - d / d_max`` with ``d[i, j] = |F_i - F_j|`` over all tokens, d_max its largest value at the site;
* ``cosine``: ``(c + 1) / 2`` with ``c[i, j]`` the mean over tokens of the cosine of F_i[t] and F_j[t];
* ``cka-linear``, ``cka-rbf``: centered kernel alignment ``<K_i, K_j> / (|K_i| |K_j|)`` of the centered kernels between
  tokens, ``K[s, t] = F[s] . F[t]`` or ``exp(-|F[s] - F[t]|^2 / (2 v))`` with v the variance of the squared distances.

Frobenius and cosine are sums over tokens, so streaming changes nothing.  A kernel between all tokens does not fit in memory
(it is as large as the square of their number), so CKA is taken over windows of at most ``WINDOW`` tokens: up to one window
it is the published formula; from the second window on, the mean over windows of the unbiased estimate of each inner
product (HSIC_1, Song et al. 2007; in minibatches, Nguyen et al. 2021), which approaches the published value over all tokens
where a mean of the published formula would stay too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_fx.kernels.reference import frobenius_similarity

WINDOW = 1024  # tokens of a CKA window
_GATHER_BYTES = 2**24  # outputs that wait at a site for a window to fill; larger batches are a window of their own
_SLICE = 2**13  # columns that a Gram matrix takes at a time in float64: 128 experts' then stay in the cache


def gram(outputs: Tensor) -> Tensor:
    """<F_i, F_j> over all tokens, float64 [E, E]."""
    total = torch.zeros(len(outputs), len(outputs), dtype=torch.float64, device=outputs.device)
    for part in outputs.split(max(1, _SLICE // outputs.shape[-1]), dim=1):
        wide = part.double().flatten(1)
        total += wide @ wide.T
    return total


def frobenius(total: Tensor, tokens: int) -> Tensor:
    """From the Gram matrix of the outputs."""
    norms = total.diagonal()
    return frobenius_similarity((norms[:, None] + norms[None, :] - 2 * total).clamp_min(0).sqrt())


def cosine(total: Tensor, tokens: int) -> Tensor:
    """From the Gram matrix of the outputs, each token's divided by its length."""
    return ((total / max(tokens, 1) + 1) / 2).clamp(0, 1).fill_diagonal_(1).float()


def _unit_rows(outputs: Tensor) -> Tensor:
    return outputs / outputs.norm(dim=-1, keepdim=True).clamp_min(1e-8)


def linear_kernel(x: Tensor) -> Tensor:
    """[T, H] -> [T, T]."""
    return x @ x.T


def rbf_kernel(x: Tensor) -> Tensor:
    """[T, H] -> [T, T], with the variance of all squared distances as twice the squared bandwidth's half."""
    squared = x.square().sum(1)
    distances = squared[:, None] + squared[None, :] - 2 * x @ x.T
    variance = distances.var() if distances.numel() > 1 else distances.new_zeros(())
    return torch.where(variance > 1e-8, torch.exp(-distances / (2 * variance)), 1.0)


def kernels_of(outputs: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Every expert's kernel between tokens [E, T, T], float64 where that is small."""
    wide = torch.float64 if outputs.shape[0] * outputs.shape[1] ** 2 <= 2**22 else torch.float32
    return torch.stack([kernel(x.to(wide)) for x in outputs])


def hsic(kernels: Tensor) -> Tensor:
    """Inner products of the centered kernels, as published: float64 [E, E]."""
    rows = kernels.mean(2, keepdim=True)
    return gram(kernels - rows - rows.mT + kernels.mean((1, 2), keepdim=True))


def unbiased_hsic(kernels: Tensor) -> Tensor:
    """HSIC_1 of every two kernels [E, T, T], T > 3: float64 [E, E]."""
    t = kernels.shape[1]
    hollow = kernels - torch.diag_embed(kernels.diagonal(dim1=1, dim2=2))
    rows = hollow.sum(2).double()
    sums = rows.sum(1)
    value = gram(hollow) + sums[:, None] * sums[None, :] / ((t - 1) * (t - 2)) - 2 / (t - 2) * rows @ rows.T
    return value / (t * (t - 3))


def alignment(inner: Tensor) -> Tensor:
    """CKA from the inner products of centered kernels."""
    scale = inner.diagonal().clamp_min(0).sqrt()
    return (inner / (scale[:, None] * scale[None, :]).clamp_min(1e-12)).clamp(0, 1).fill_diagonal_(1).float()


#: How the outputs become sums, by metric: rows that are summed, or the kernel between tokens.
METRICS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "frobenius": ("pairs", frobenius),
    "cosine": ("pairs", cosine),
    "cka-linear": ("windows", linear_kernel),
    "cka-rbf": ("windows", rbf_kernel),
}


@dataclass
class Site:
    """The sums of one site.  ``state`` and ``load`` carry them through a file without loss."""

    metric: str
    tokens: int = 0
    halves: list[Tensor] = field(default_factory=list)  # sums over the even and over the odd tokens (or windows)
    half_tokens: list[int] = field(default_factory=lambda: [0, 0])
    first_window: Tensor | None = None
    windows: int = 0
    waiting: list[Tensor] = field(default_factory=list)
    folds: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, step: int) -> int:
        """How many tokens to give at a time, where as many as ``step`` fit in memory."""
        return min(step, WINDOW)

    def add(self, outputs: Tensor) -> None:
        """Take in the outputs of some tokens, [E, T, H]."""
        self.tokens += outputs.shape[1]
        if METRICS[self.metric][0] == "windows":
            self._wait(outputs)
            return
        rows = _unit_rows(outputs) if self.metric == "cosine" else outputs
        for half in (0, 1):
            self._sum(half, gram(rows[:, half::2]), rows[:, half::2].shape[1])

    def _sum(self, half: int, value: Tensor, tokens: int) -> None:
        if not self.halves:
            self.halves = [torch.zeros_like(value, device="cpu") for _ in (0, 1)]
        self.halves[half] = self.halves[half] + value.cpu()
        self.half_tokens[half] += tokens

    def _wait(self, outputs: Tensor) -> None:
        """Gather small batches into a window; a large batch becomes one or several by itself."""
        self.waiting.append(outputs)
        waiting_bytes = sum(w.numel() * w.element_size() for w in self.waiting)
        if waiting_bytes > _GATHER_BYTES or sum(w.shape[1] for w in self.waiting) >= WINDOW:
            self._close_windows()

    def _close_windows(self) -> None:
        together = torch.cat(self.waiting, dim=1)
        self.waiting = []
        for outputs in together.split(WINDOW, dim=1):
            if outputs.shape[1] < 4 and self.windows:  # too few for an estimate without bias
                continue
            kernels = kernels_of(outputs, METRICS[self.metric][1])
            if self.windows == 0:
                self.first_window = hsic(kernels).cpu()
            if outputs.shape[1] >= 4:
                self._sum(self.windows % 2, unbiased_hsic(kernels) * outputs.shape[1], outputs.shape[1])
            self.windows += 1

    def similarity(self) -> Tensor:
        """The similarity of every two experts, float32 [E, E]."""
        kind, finish = METRICS[self.metric]
        if kind == "pairs":
            return finish(self.halves[0] + self.halves[1], self.tokens)
        if self.waiting:
            self._close_windows()
        assert self.first_window is not None
        return alignment(self.first_window if self.windows == 1 else self.halves[0] + self.halves[1])

    def spread(self) -> float | None:
        """The standard error of a similarity, from how two halves of the tokens differ; None where they are too few."""
        kind, finish = METRICS[self.metric]
        if min(self.half_tokens) == 0 or (kind == "windows" and self.windows < 2):
            return None
        ways = [finish(h, n) if kind == "pairs" else alignment(h) for h, n in zip(self.halves, self.half_tokens, strict=True)]
        error = float((ways[0] - ways[1]).square().mean().sqrt()) / 2
        return error if math.isfinite(error) else None

    def distance_scale(self) -> float | None:
        """The largest distance between two experts, as the root of its mean square over tokens; Frobenius only."""
        if self.metric != "frobenius":
            return None
        total = self.halves[0] + self.halves[1]
        norms = total.diagonal()
        return float(((norms[:, None] + norms[None, :] - 2 * total).max().clamp_min(0) / self.tokens).sqrt())

    def add_picks(self, outputs: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Take in what the baselines learn from: the outputs of each token's own picks.

        For every two picks u, v of a token with weight w of u: the sums of ``w <u, v>``, ``w |v|^2`` and ``w |u|^2``, and
        how often the two meet.
        """
        num_experts = outputs.shape[0]
        on = (ids >= 0) & (ids < num_experts)
        safe = torch.where(on, ids, 0).long()
        w = torch.where(on, weights.double(), 0)  # [T, K]
        own = outputs[safe, torch.arange(len(ids), device=ids.device)[:, None]].double()  # [T, K, H]
        inner = own @ own.mT  # [T, K, K]
        squares = inner.diagonal(dim1=1, dim2=2)
        both = (on[:, :, None] & on[:, None, :]).double()
        place = (safe[:, :, None] * num_experts + safe[:, None, :]).flatten()
        sums = {
            "inner": w[:, :, None] * inner * both,
            "target": w[:, :, None] * squares[:, None, :] * both,
            "source": w[:, :, None] * squares[:, :, None] * both,
            "met": both,
        }
        for key, values in sums.items():
            total = torch.zeros(num_experts**2, dtype=torch.float64, device=ids.device)
            total = total.index_add(0, place, values.flatten()).reshape(num_experts, num_experts).cpu()
            self.folds[key] = self.folds[key] + total if key in self.folds else total

    def fold_tables(self) -> dict[str, Tensor]:
        """``fold_scale``, ``fold_gain`` and ``coactivation``, float32 [E, E]; nothing where no picks were given.

        lambda is the mean of ``w |v|^2`` over one meeting: a pair that met once is halved.
        """
        if not self.folds:
            return {}
        inner, target, source, met = (self.folds[key] for key in ("inner", "target", "source", "met"))
        penalty = target.sum() / met.sum().clamp_min(1)
        scale = inner / (target + penalty).clamp_min(1e-30)
        left = source - 2 * scale * inner + scale.square() * target  # what the fold does not explain
        gain = torch.where(met > 0, 1 - left / source.clamp_min(1e-30), 0)
        return {"fold_scale": scale.float(), "fold_gain": gain.float(), "coactivation": (met / max(self.tokens, 1)).float()}

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        numbers = torch.tensor([self.tokens, *self.half_tokens, self.windows])
        parts: dict[str, Tensor] = {"numbers": numbers} | {f"fold {k}": v for k, v in self.folds.items()}
        parts |= {f"half {i}": h for i, h in enumerate(self.halves)}
        parts |= {f"waiting {i}": w.cpu().contiguous() for i, w in enumerate(self.waiting)}
        return parts if self.first_window is None else {**parts, "first window": self.first_window}

    def load(self, part: str, tensor: Tensor) -> None:
        """One entry of ``state``; numbered ones come in any order."""
        kind, _, which = part.partition(" ")
        if kind == "numbers":
            self.tokens, *self.half_tokens, self.windows = tensor.tolist()
        elif kind == "fold":
            self.folds[which] = tensor
        elif kind == "first":
            self.first_window = tensor
        else:
            group = self.halves if kind == "half" else self.waiting
            group.extend([torch.empty(0)] * (int(which) + 1 - len(group)))
            group[int(which)] = tensor
