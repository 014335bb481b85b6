"""Inputs for tests and benchmarks, and how close a result must come.

A case is made from its shape and a seed, so that a failing one can be made again from what the failure prints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

POISON_ID = -7777
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ID_DTYPES = (torch.int64, torch.int32)

_TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """``rtol`` and ``atol`` for two ways to compute the same values in this dtype.  Ids are compared exactly."""
    return _TOLERANCES[dtype]


def poison_(tensor: Tensor) -> Tensor:
    """Fill with what no op may return: NaN, or -7777 where there is no NaN."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor if tensor.dtype == torch.bool else tensor.fill_(POISON_ID)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """While active, ``torch.empty`` and ``torch.empty_like`` return poison, so that an unwritten element is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        return poison_(empty(*args, **kwargs))

    def poisoned_empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return poison_(empty_like(*args, **kwargs))

    with mock.patch.multiple(torch, empty=poisoned_empty, empty_like=poisoned_empty_like):
        yield


def random_routing(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
    off: float = 0.0,
    beyond: float = 0.0,
    duplicates: bool = False,
) -> tuple[Tensor, Tensor]:
    """A routing decision as a softmax router makes it: weights and ids, [T, K], in descending score order.

    Args:
        off: share of the picks that are off (id -1).
        beyond: share of the picks whose id is no expert (E or above).
        duplicates: let a token pick one expert more than once.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator).softmax(-1)
    weights, ids = scores.topk(top_k, dim=-1)
    if duplicates:
        ids = torch.randint(num_experts, (num_tokens, top_k), generator=generator)
    kind = torch.rand(num_tokens, top_k, generator=generator)
    ids = ids.masked_fill(kind < off, -1)
    ids = torch.where(kind >= 1 - beyond, num_experts + ids.clamp(min=0) % 3, ids)
    return weights.to(dtype), ids.to(ids_dtype)


def random_scores(
    num_tokens: int,
    num_experts: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    levels: int | None = None,
    odd: float = 0.0,
) -> Tensor:
    """Normally distributed scores or logits [T, E].

    Args:
        levels: round to this many values between neighbouring integers, so that some tie.
        odd: share of the values that are NaN, infinite, or a zero of either sign.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    if levels is not None:
        scores = (scores * levels).round() / levels
    is_odd = torch.rand(num_tokens, num_experts, generator=generator) < odd
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0], dtype=scores.dtype)
    return torch.where(is_odd, values[torch.randint(5, scores.shape, generator=generator)], scores).to(dtype)


def random_similarity(
    num_experts: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    levels: int | None = None,
    nan: float = 0.0,
) -> Tensor:
    """A table [E, E] of similarities in [-1, 1], not symmetric.

    Args:
        levels: with None all values differ (in float32); otherwise each is one of that many, so that most of them tie.
        nan: share of the values that are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    size = num_experts * num_experts
    if levels is None:
        values = torch.linspace(-1, 1, size)[torch.randperm(size, generator=generator)]
    else:
        values = torch.linspace(-1, 1, levels)[torch.randint(levels, (size,), generator=generator)]
    values = values.masked_fill(torch.rand(size, generator=generator) < nan, float("nan"))
    return values.reshape(num_experts, num_experts).to(dtype)


def random_valid_tokens(num_tokens: int, form: str, seed: int = 0) -> Tensor | None:
    """``valid_tokens`` in each of its forms: ``"none"``, ``"mask"`` (bool [T]), ``"count"`` (one number)."""
    generator = torch.Generator().manual_seed(seed)
    if form == "mask":
        return torch.rand(num_tokens, generator=generator) < 0.6
    if form == "count":
        return torch.randint(num_tokens + 1, (), generator=generator)
    return None
