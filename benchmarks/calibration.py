"""Memory and time of calibrating one layer of Qwen3-30B's shape, and that the result is right."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_fx
from moe_fx.kernels.reference import frobenius_similarity

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 128, 2048, 768, 8
BATCH = 512
TOKENS = int(os.environ.get("CALIBRATION_TOKENS", 51_200))  # fewer for a quick look: time is in proportion
CHECKED = 64  # tokens on which a part of the table is compared with brute force


def run(say: Callable[[str], None]) -> list[dict[str, object]]:
    """A row for the Frobenius metric, with the folds' statistics, in bfloat16."""
    torch.manual_seed(0)
    say("build the layer")
    layer = _layer()
    _check(layer, say)
    torch._dynamo.reset()
    held = _resident_bytes()
    with _watched_memory() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        artifact = moe_fx.calibrate(layer, _batches(TOKENS, say), folds=True, progress=False)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    similarity = next(iter(artifact.sites.values()))["similarity"]
    assert similarity.shape == (EXPERTS, EXPERTS)
    return [{
        "model": f"one layer, E={EXPERTS}, H={HIDDEN}, I={INTERMEDIATE}, K={TOP_K}, bfloat16",
        "metric": "frobenius",
        "tokens": TOKENS,
        "seconds": f"{seconds:.1f}",
        "cpu_seconds": f"{cpu_seconds:.1f}",
        "tokens_per_second": f"{TOKENS / seconds:.1f}",
        "seconds_for_51200_tokens": f"{seconds * 51_200 / TOKENS:.0f}",
        "peak_memory_beyond_model_gb": f"{(peak.bytes - held) / 1e9:.2f}",
        "all_outputs_in_bfloat16_gb": f"{EXPERTS * TOKENS * HIDDEN * 2 / 1e9:.1f}",
    }]  # fmt: skip


def _layer() -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    layer = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return layer.requires_grad_(False)


def _batches(tokens: int, say: Callable[[str], None]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for done in range(0, tokens, BATCH):
        if done % (8 * BATCH) == 0:
            say(f"{done:,} of {tokens:,} tokens")
        yield torch.randn(1, min(BATCH, tokens - done), HIDDEN, generator=generator).to(torch.bfloat16)


def _check(layer: nn.Module, say: Callable[[str], None]) -> None:
    """No figures for a wrong table: eight experts by brute force."""
    say("compare with brute force")
    x = next(iter(_batches(CHECKED, lambda what: None)))
    similarity = next(iter(moe_fx.calibrate(layer, [x], progress=False).sites.values()))["similarity"]
    experts = layer.experts
    ones = torch.zeros(CHECKED, TOP_K, dtype=torch.bfloat16)
    ones[:, 0] = 1
    with torch.no_grad():
        outputs = torch.stack([
            experts(x[0], torch.full((CHECKED, TOP_K), e), ones).double().flatten() for e in range(EXPERTS)  # type: ignore[operator]
        ])  # fmt: skip
    want = frobenius_similarity(torch.cdist(outputs, outputs))
    torch.testing.assert_close(similarity, want, rtol=2e-2, atol=1e-2)


@dataclass
class Peak:
    bytes: int = 0


@contextmanager
def _watched_memory() -> Iterator[Peak]:
    """The largest resident memory of this process while the block runs, sampled 50 times a second."""
    peak, done = Peak(_resident_bytes()), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.bytes = max(peak.bytes, _resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
