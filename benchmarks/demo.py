"""A real Mixture-of-Experts language model, made faster by the backend, with what it cost in quality.

    python -m benchmarks.demo            # about five minutes on two cores
    python -m benchmarks.demo --quick    # a toy model: does everything run?

It trains a small Qwen3-MoE on the source of Python's standard library, calibrates it, and decodes held-out files with
the full top-K, with plain smaller K, and with SERE, each compiled by Inductor.  Perplexity and speed come from the
same run: 16 files advance together one token at a time with a key/value cache, as a server decodes.  (In one big
forward nearly every expert is some token's first choice, and SERE would look free.)
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

import moe_fx
from benchmarks.corpus import Corpus, held_out_batch, load_corpus, training_windows, unigram_perplexity
from benchmarks.evaluation import (
    Advance,
    Configuration,
    choose,
    compile_lanes,
    count_active_experts,
    decode,
    segment_count,
)
from benchmarks.measure import RESULTS, ROOT, available_cores, conditions, spread, write_csv
from benchmarks.models import DEMO, TINY, Shape
from benchmarks.training import Recipe, checkpoint_path, load_checkpoint, save_checkpoint, train
from moe_fx.backend import last_report


@dataclass(frozen=True)
class Plan:
    """Everything that decides how long the demo takes and what it shows.

    Attributes:
        plain_k: the smaller K that SERE is compared with.
        primaries: S.
        quantiles: of the calibrated similarities, for SERE's thresholds besides 0.
        texts: held-out files, decoded in groups of the largest batch.
        steps: tokens predicted in each.
    """

    name: str
    shape: Shape
    recipe: Recipe
    batches: tuple[int, ...]
    plain_k: tuple[int, ...]
    primaries: tuple[int, ...]
    quantiles: tuple[float, ...]
    texts: int
    steps: int
    calibration_batches: int
    max_train_bytes: int | None = None


FULL = Plan(
    name="demo",
    shape=DEMO,
    recipe=Recipe(steps=700),
    batches=(1, 4, 16),
    plain_k=(4, 2, 1),
    primaries=(1, 2),
    quantiles=(0.5,),
    texts=32,
    steps=128,
    calibration_batches=4,
)
QUICK = Plan(
    name="demo-quick",
    shape=TINY,
    recipe=Recipe(steps=30),
    batches=(16,),
    plain_k=(1,),
    primaries=(1,),
    quantiles=(),
    texts=16,
    steps=16,
    calibration_batches=1,
    max_train_bytes=300_000,
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    _quiet()
    torch.set_num_threads(options.threads)
    plan: Plan = QUICK if options.quick else FULL
    folder = ROOT / ".demo"
    screen = Screen()
    with screen.phase("Read the standard library"):
        corpus = load_corpus(plan.shape.vocab, plan.max_train_bytes)
    screen.say(
        f"{corpus.train_files} files, {len(corpus.train):,} tokens to train on; {len(corpus.held_out)} files held out"
    )
    model = trained(plan, corpus, folder, options.retrain, screen)
    artifact = calibrated(model, plan, corpus, screen)
    artifact.save(folder / f"{plan.name}.moe.safetensors")
    configurations = choose(artifact, plan.shape.top_k, plan.plain_k, plan.primaries, plan.quantiles)
    groups = held_out_groups(plan, corpus)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    measure(model, configurations, groups, plan, screen)
    unigram = unigram_perplexity(corpus, torch.cat(groups)[:, 1:], plan.shape.vocab)
    screen.console.print(results_table(plan, configurations, unigram))
    csv, png = options.out / f"{plan.name}.csv", options.out / f"{plan.name}.png"
    write_csv(csv, results_rows(plan, configurations, unigram))
    draw(png, plan, configurations)
    screen.say(f"Written: {csv} and {png}, in {screen.seconds:.0f} s")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy model in under a minute; its numbers mean nothing")
    parser.add_argument("--retrain", action="store_true", help="train again, even if this model was trained before")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the .csv and the .png (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}, expected at least 1")
    return options


def _quiet() -> None:
    """Dynamo warns about transformers' own version checks once per graph: nothing a reader of the demo can act on."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
    logging.getLogger("torch").setLevel(logging.ERROR)


class Screen:
    """Phases with a progress bar each, on a terminal; one line per phase where output goes to a file."""

    def __init__(self) -> None:
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=140)  # a file has no width of its own
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.perf_counter() - self._start

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def phase(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Show a bar while the phase runs, and how long it took when it ends."""
        start = time.perf_counter()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=total, detail="")
            detail = ""

            def advance(done: int, what: str) -> None:
                nonlocal detail
                detail = what
                progress.update(task, completed=done, detail=what)

            yield advance
        self.say(f"{title}: {time.perf_counter() - start:.0f} s{f' ({detail})' if detail else ''}")


# -------------------------------------------------------------------------------------------------- the phases


def trained(plan: Plan, corpus: Corpus, folder: Path, retrain: bool, screen: Screen) -> Qwen3MoeForCausalLM:
    """The trained model, from the checkpoint of an earlier run where there is one."""
    path = checkpoint_path(folder, plan.shape, plan.recipe, corpus)
    if not retrain and (model := load_checkpoint(path, plan.shape, plan.recipe)) is not None:
        screen.say(f"Training skipped: this model was trained before ({path.name} in .demo/); --retrain trains it anew")
        return model
    title = f"Train a Qwen3-MoE ({plan.shape.describe()}) on {plan.recipe.tokens:,} tokens"
    with screen.phase(title, total=plan.recipe.steps) as advance:

        def progress(step: int, loss: float, tokens_per_second: float) -> None:
            advance(step, f"loss {loss:.2f}, {tokens_per_second:,.0f} tokens/s")

        model = train(plan.shape, plan.recipe, corpus, progress)
    save_checkpoint(model, path)
    return model


def calibrated(model: Qwen3MoeForCausalLM, plan: Plan, corpus: Corpus, screen: Screen) -> moe_fx.Artifact:
    """How alike the experts are, on windows of the training text."""
    generator = torch.Generator().manual_seed(plan.recipe.seed + 1)
    with screen.phase("Calibrate", total=plan.calibration_batches) as advance:

        def batches() -> Iterator[dict[str, Tensor]]:
            for done in range(plan.calibration_batches):
                yield {"input_ids": training_windows(corpus.train, 8, 128, generator)}
                advance(done + 1, "")

        return moe_fx.calibrate(model, batches(), progress=False)


def held_out_groups(plan: Plan, corpus: Corpus) -> list[Tensor]:
    """Groups of held-out files, ``[largest batch, steps + 1]`` tokens each."""
    rows = max(plan.batches)
    return [held_out_batch(corpus, rows, plan.steps + 1, skip=group) for group in range(plan.texts // rows)]


def measure(
    model: Qwen3MoeForCausalLM,
    configurations: Sequence[Configuration],
    groups: Sequence[Tensor],
    plan: Plan,
    screen: Screen,
) -> None:
    """Compile everything, decode everything, and show what the backend found in the model."""
    with screen.phase("Compile", total=len(configurations) * len(plan.batches)) as advance:
        lanes = compile_lanes(model, configurations, plan.batches, groups[0], advance)
    screen.console.print(last_report())
    with screen.phase("Count active experts", total=len(configurations)) as advance:
        count_active_experts(model, configurations, groups[0], advance)
    with screen.phase("Decode held-out files in turns", total=segment_count(groups)) as advance:
        decode(lanes, groups, advance)


# -------------------------------------------------------------------------------------------------- the results


def results_table(plan: Plan, configurations: Sequence[Configuration], unigram: float) -> Table:
    """Everything on one screen; speed as a ratio to the first row, measured in turns with it."""
    baseline = configurations[0]
    rows = max(plan.batches)
    table = Table(
        title=f"{rows} held-out files decoded together; Qwen3-MoE, {plan.shape.describe()}, bfloat16",
        caption=_caption(plan, unigram),
        caption_justify="left",
    )
    table.add_column("configuration")
    table.add_column("active experts\nper layer", justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("loss above full\nnats/token", justify="right")
    for batch in plan.batches:
        table.add_column(f"tokens/s\nbatch {batch}", justify="right")
    for configuration in configurations:
        increase, error = configuration.loss_increase(baseline)
        table.add_row(
            configuration.name,
            f"{configuration.active_experts:.1f}",
            f"{configuration.perplexity:.1f}",
            "-" if configuration is baseline else f"{increase:+.3f} ± {error:.3f}",
            *(_speed(configuration, baseline, batch) for batch in plan.batches),
            end_section=_is_last_of_kind(configuration, configurations),
        )
    return table


def _speed(configuration: Configuration, baseline: Configuration, batch: int) -> str:
    return f"{configuration.tokens_per_second(batch):,.0f}  {configuration.speedup(baseline, batch):.2f}x"


def _is_last_of_kind(configuration: Configuration, configurations: Sequence[Configuration]) -> bool:
    return configuration is [c for c in configurations if c.kind == configuration.kind][-1]


def _caption(plan: Plan, unigram: float) -> str:
    taken = conditions()
    return (
        f"{plan.texts} texts x {plan.steps} tokens, teacher-forced with a key/value cache; ± is the standard error over texts. "
        f"Knowing only word frequencies gives perplexity {unigram:.0f}.\n"
        f"{taken['device']}, {taken['threads']} threads, torch {taken['torch']}, transformers {taken['transformers']}"
    )


def results_rows(plan: Plan, configurations: Sequence[Configuration], unigram: float) -> list[dict[str, object]]:
    """The table as rows of a CSV file, with units in the names."""
    return [_results_row(plan, c, configurations[0], unigram) for c in configurations]


def _results_row(plan: Plan, c: Configuration, baseline: Configuration, unigram: float) -> dict[str, object]:
    increase, error = c.loss_increase(baseline)
    row: dict[str, object] = {
        "configuration": c.name,
        "kind": c.kind,
        "top_k": c.top_k,
        "primary": getattr(c.policy, "primary", ""),
        "threshold": getattr(c.policy, "threshold", ""),
        "active_experts_per_layer": f"{c.active_experts:.2f}",
        "perplexity": f"{c.perplexity:.3f}",
        "loss_increase_nats_per_token": f"{increase:.5f}",
        "loss_increase_standard_error": f"{error:.5f}",
    }
    for batch in plan.batches:
        row[f"tokens_per_second_batch_{batch}"] = f"{c.tokens_per_second(batch):.1f}"
        row[f"ratio_to_inductor_batch_{batch}"] = f"{c.speedup(baseline, batch):.3f}"
        row[f"step_spread_batch_{batch}"] = f"{spread(c.step_seconds[batch]):.3f}"
    return row | {
        "unigram_perplexity": f"{unigram:.1f}",
        "model": f"qwen3_moe {plan.shape.describe()} bfloat16",
        "trained_tokens": plan.recipe.tokens,
        "texts": plan.texts,
        "tokens_per_text": plan.steps,
    }


def draw(path: Path, plan: Plan, configurations: Sequence[Configuration]) -> None:
    """Quality against what it costs: active experts, and decode speed at the largest batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batch = max(plan.batches)
    baseline = configurations[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for label, group, style in _series(configurations):
        perplexity = [c.perplexity for c in group]
        left.plot([c.active_experts for c in group], perplexity, label=label, **style)
        right.plot([c.speedup(baseline, batch) for c in group], perplexity, label=label, **style)
        for axes, x in ((left, lambda c: c.active_experts), (right, lambda c: c.speedup(baseline, batch))):
            for c in group:
                axes.annotate(_short(c), (x(c), c.perplexity), (5, 5), textcoords="offset points", fontsize=8)
    left.set_xlabel(f"distinct experts read per layer and step, of {plan.shape.experts} (fewer is cheaper)")
    left.set_ylabel("perplexity of held-out text (lower is better)")
    right.set_xlabel(f"decode speed at batch {batch}, times Inductor alone (more is better)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.suptitle(f"SERE against plain smaller K: Qwen3-MoE, {plan.shape.describe()}, {batch} texts decoded together")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _series(configurations: Sequence[Configuration]) -> Iterator[tuple[str, list[Configuration], dict[str, Any]]]:
    """(label, its points in order of active experts, matplotlib style): plain K, then SERE by S."""
    full = configurations[0]
    plain = [full, *(c for c in configurations if c.kind == "plain")]
    yield "plain top-K", plain, {"marker": "o", "color": "0.35", "linestyle": "--"}
    by_primary: dict[int, list[Configuration]] = {}
    for c in configurations:
        if isinstance(c.policy, moe_fx.SERE):
            by_primary.setdefault(c.policy.primary, []).append(c)
    for index, (primary, group) in enumerate(sorted(by_primary.items())):
        group.sort(key=lambda c: c.active_experts)
        yield f"SERE, S={primary}", group, {"marker": "sD^v"[index % 4], "color": f"C{index}", "linestyle": "-"}


def _short(configuration: Configuration) -> str:
    policy = configuration.policy
    return f"≥{policy.threshold:g}" if isinstance(policy, moe_fx.SERE) else f"K={configuration.top_k}"


if __name__ == "__main__":
    raise SystemExit(main())
