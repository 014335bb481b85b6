"""Every Triton kernel once, at sizes that no block divides, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu_sanitize

With ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` every tensor is an allocation of its own, so that reading beyond one is seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_measure import Rig
from moe_fx.kernels import beam_mask, fold_masked, fused_experts, reference, sere_reroute, topk_beam, topk_sere
from moe_fx.testing import random_routing, random_scores, random_similarity, random_valid_tokens, tolerance


def moved(value: Any, rig: Rig) -> Any:
    return value.to(rig.device) if isinstance(value, Tensor) else value


def check(name: str, module: Any, rig: Rig, *args: Any) -> None:
    """Run an op and compare, so that a run under the sanitizer is of a kernel that works."""
    args = tuple(moved(arg, rig) for arg in args)
    got, expected = (getattr(m, name)(*args) for m in (module, reference))
    pairs = [(got, expected)] if isinstance(got, Tensor) else list(zip(got, expected, strict=True))
    for one, other in pairs:
        allowed = tolerance(other.dtype) if other.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(one, other, **allowed, equal_nan=True)
    rig.say(f"{name} [{args[0].shape[0]}, ...]")


def experts(num_tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (num_tokens, 72), (10, 88, 72), (10, 56, 44), (10, 88), (10, 56)
    hidden, w_gate_up, w_down, *biases = ((torch.randn(s, generator=generator) * 0.2).to(dtype) for s in shapes)
    return (hidden, w_gate_up, w_down, *random_routing(num_tokens, 3, 10, off=0.3, duplicates=True), *biases)


def run(rig: Rig) -> int:
    """All ops at a small and at a large batch, and the three ways to launch ``fused_experts``."""
    for num_tokens in (5,) if rig.dry else (5, 700):
        weights, ids = random_routing(num_tokens, 3, 10, off=0.3)
        similarity, valid = random_similarity(10), random_valid_tokens(num_tokens, "mask")
        scores, logits = random_scores(num_tokens, 10), random_scores(num_tokens, 10, 1)
        check("sere_reroute", sere_reroute, rig, ids, similarity, 1, 0.1, valid)
        check("beam_mask", beam_mask, rig, weights, ids, logits, 0.5)
        check("fold_masked", fold_masked, rig, weights, ids)
        check("topk_sere", topk_sere, rig, scores, 3, similarity, 1, 0.1, valid)
        check("topk_beam", topk_beam, rig, scores, 3, logits, 0.5)
        for dtype in (torch.bfloat16, torch.float32):
            check("fused_experts", fused_experts, rig, *experts(num_tokens, dtype))
    layer = fused_experts.Layer(3, 10, 72, 44, "bfloat16")
    rules = fused_experts.config_by_rules(5, layer)
    for launches in ({"by_pick": False}, {"by_pick": True}, {"by_pick": True, "sum_in_down": True}):
        with mock.patch.object(fused_experts, "choose_config", _always(replace(rules, **launches))):
            check("fused_experts", fused_experts, rig, *experts(5, torch.bfloat16))
    return 0


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter: set TRITON_INTERPRET=1")
    return run(Rig(dry=parser.parse_args(arguments).dry_run))


if __name__ == "__main__":
    raise SystemExit(main())
