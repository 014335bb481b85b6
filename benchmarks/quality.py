"""Train the small language model of ``quality.md`` and lay out its text, for the ``moe-fx`` commands to work on.

    python -m benchmarks.quality                 # 25 minutes on two cores; minutes on a GPU
    python -m benchmarks.quality --quick         # a toy model in seconds: does everything run?

It writes a folder that looks like any model from the hub (config, weights, tokenizer) and three files of documents that
no training step has seen in common: ``calibrate.jsonl`` (training text), ``tune.jsonl`` and ``heldout.jsonl`` (two halves
of the held-out files).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from benchmarks.corpus import SEPARATOR, Corpus, load_corpus, training_windows
from benchmarks.measure import ROOT, available_cores
from benchmarks.models import TINY, Shape
from benchmarks.training import Recipe, train

QUALITY = Shape(vocab=4096, layers=4, hidden=192, intermediate=96, experts=32, top_k=4, heads=4, key_value_heads=2)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how much text is laid out for calibration."""

    shape: Shape
    recipe: Recipe
    calibration_documents: int
    max_train_bytes: int | None = None


FULL = Plan(QUALITY, Recipe(steps=1600, rows=16, warmup_steps=100), calibration_documents=256)
QUICK = Plan(TINY, Recipe(steps=20, rows=4), calibration_documents=16, max_train_bytes=300_000)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else FULL
    console = Console()
    corpus = load_corpus(plan.shape.vocab, plan.max_train_bytes)
    console.print(f"{len(corpus.train):,} tokens of text; training on {plan.recipe.tokens:,}", highlight=False)
    start = time.perf_counter()

    def progress(step: int, loss: float, tokens_per_second: float) -> None:
        if step % 50 == 0 or step == plan.recipe.steps:
            left = (plan.recipe.steps - step) * plan.recipe.rows * plan.recipe.length / tokens_per_second
            console.print(f"step {step}: loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, {left:.0f} s left", highlight=False)

    model = train(plan.shape, plan.recipe, corpus, progress, device=options.device)
    seconds = time.perf_counter() - start
    model.config.use_cache = True
    model.to("cpu").save_pretrained(options.out / "model")  # type: ignore[arg-type]
    tokenizer(corpus, plan.shape).save_pretrained(options.out / "model")
    lay_out_text(corpus, plan, options.out)
    console.print(f"Trained in {seconds:.0f} s on {options.device}; written: {options.out}", highlight=False)
    return 0


def tokenizer(corpus: Corpus, shape: Shape) -> PreTrainedTokenizerFast:
    """The corpus's tokenizer as transformers loads it; every document begins with the separator, as in training."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, model_max_length=1024
    )
    return wrapped


def lay_out_text(corpus: Corpus, plan: Plan, folder: Path) -> None:
    """Three files of documents: windows of the training text, and the held-out files in two halves."""
    generator = torch.Generator().manual_seed(plan.recipe.seed + 1)
    windows = training_windows(corpus.train, plan.calibration_documents, 256, generator)
    # a third into a file stands the code: its beginning is mostly a licence or a docstring
    held_out = [corpus.tokenizer.decode(ids[len(ids) // 3 :].tolist()) for _, ids in sorted(corpus.held_out.items())]
    _write(folder / "calibrate.jsonl", (corpus.tokenizer.decode(row.tolist()) for row in windows))
    _write(folder / "tune.jsonl", held_out[::2])
    _write(folder / "heldout.jsonl", held_out[1::2])


def _write(path: Path, texts: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy model in seconds; its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / ".demo" / "quality", help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="CPU threads (%(default)s)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="where to train (%(default)s)")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}, expected at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
