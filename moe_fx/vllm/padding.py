"""Which rows of a batch are tokens: an engine pads batches and runs dummy ones, and those rows must not vote.

vLLM's forward context carries a mask of padding rows, in memory that stays in one place, so that a captured CUDA graph
reads the present values.  The older of two model runners of vLLM 0.26 sets none; there a counter on the device is written
before each forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

_CACHED = "moe_fx_valid_tokens"
_counters: dict[torch.device, Tensor] = {}  # [1] int64: real tokens of the forward that runs, where there is no mask


def valid_tokens(num_rows: int, device: torch.device) -> Tensor | None:
    """``valid_tokens`` of ``sere_reroute`` for the forward that is running; None where every row is a token."""
    context = get_forward_context()
    is_padding = context.is_padding
    if is_padding is None:
        return _counters.get(device)
    if device.type != "cpu":
        return ~is_padding[:num_rows]  # made anew in each layer: captured graphs do not keep each other's results
    known = context.additional_kwargs
    if _CACHED not in known:
        known[_CACHED] = ~is_padding[:num_rows] if bool(is_padding[:num_rows].any()) else None
    return known[_CACHED]


def count_real_tokens(runner: Any, device: torch.device) -> None:
    """Have a model runner that makes no mask write the number of its real tokens before each forward."""
    counter = _counters.setdefault(device, torch.zeros(1, dtype=torch.int64, device=device))
    execute_model, dummy_run = runner.execute_model, runner._dummy_run

    def execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        counter.fill_(scheduler_output.total_num_scheduled_tokens)
        return execute_model(scheduler_output, *args, **kwargs)

    def dummy(num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        counter.fill_(num_tokens if kwargs.get("is_profile") else 0)
        return dummy_run(num_tokens, *args, **kwargs)

    runner.execute_model, runner._dummy_run = execute, dummy


def makes_mask(runner: Any) -> bool:
    """Whether a model runner puts a mask of padding rows into the forward context."""
    return hasattr(runner, "_prepare_padding_mask") or hasattr(getattr(runner, "input_buffers", None), "is_padding")
