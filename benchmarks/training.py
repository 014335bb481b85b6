"""Train the demo's language model: a plain loop, AdamW with a cosine schedule, float32 (the fastest on most CPUs)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_model, save_model
from transformers import Qwen3MoeForCausalLM

from benchmarks.corpus import Corpus, training_windows
from benchmarks.models import Shape, qwen3_moe


@dataclass(frozen=True)
class Recipe:
    """How to train.  One step reads ``rows`` windows of ``length`` tokens."""

    steps: int
    rows: int = 8
    length: int = 128
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    aux_loss: float = 0.01  # the load-balancing loss that keeps all experts in use
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.length

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to one twentieth."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (0.05 + 0.95 * cosine)


Progress = Callable[[int, float, float], None]  # (steps done, loss, tokens per second)


def train(
    shape: Shape, recipe: Recipe, corpus: Corpus, progress: Progress, device: str = "cpu"
) -> Qwen3MoeForCausalLM:
    """A model trained on ``corpus.train``, on ``device``.

    The data and their order are the same every time; threads still add gradients of gathered rows in any order, so the
    last digits of a run are its own (torch's deterministic algorithms made training four times slower).
    """
    model = qwen3_moe(shape, dtype=torch.float32, seed=recipe.seed, aux_loss=recipe.aux_loss).train()
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    start = time.perf_counter()
    smoothed = math.log(shape.vocab)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        tokens = training_windows(corpus.train, recipe.rows, recipe.length, generator).to(device)
        loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smoothed += (loss.item() - smoothed) * max(0.02, 1 / (step + 1))
        progress(step + 1, smoothed, (step + 1) * tokens.numel() / (time.perf_counter() - start))
    return model.eval()


def checkpoint_path(folder: Path, shape: Shape, recipe: Recipe, corpus: Corpus) -> Path:
    """Where this very model is kept: the name is a hash of its shape, its recipe and its text."""
    text = hashlib.sha256(corpus.train.numpy().tobytes()).hexdigest()
    content = json.dumps([asdict(shape), asdict(recipe), text, torch.__version__], sort_keys=True)
    return folder / f"model-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"


def save_checkpoint(model: Qwen3MoeForCausalLM, path: Path) -> None:
    """Write the weights, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_model(model, str(partial))
    partial.replace(path)


def load_checkpoint(path: Path, shape: Shape, recipe: Recipe) -> Qwen3MoeForCausalLM | None:
    """The model kept at ``path``; None where there is none, or where the file is damaged and must be made anew."""
    if not path.is_file():
        return None
    model = qwen3_moe(shape, dtype=torch.float32, seed=recipe.seed, aux_loss=recipe.aux_loss)
    try:
        load_model(model, str(path))
    except (safetensors.SafetensorError, RuntimeError):
        return None
    return model
