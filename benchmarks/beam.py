"""Train BEAM's mask routers on the small model of ``benchmarks.quality``: quality against picks, and what each part is for.

    python -m benchmarks.quality          # once: trains the model
    python -m benchmarks.beam             # every configuration below that has no row yet, then the table and the plot
    python -m benchmarks.beam --only beta-0.3 l2-target-2

Each configuration trains the masks alone (``whole-``: the model with them), on text that the model was trained on, and is
judged on held-out files: loss, next-token accuracy and perplexity, with the picks that were really computed counted while it
runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

import moe_fx
import moe_fx.hf
from benchmarks.corpus import load_corpus, training_windows
from benchmarks.measure import RESULTS, ROOT, available_cores, write_csv
from benchmarks.quality import FULL, QUICK
from moe_fx import inputs
from moe_fx.beam import Progress, Recipe, next_token_loss, train
from moe_fx.passes import graph as g
from moe_fx.passes import reroute
from moe_fx.passes.bind import Binder
from moe_fx.passes.find_sites import Routing
from moe_fx.policy import BEAM, Policy, SmallerK, TopK

aten = torch.ops.aten
LENGTH = 128


@dataclass(frozen=True, eq=False)
class SoftBEAM(BEAM):
    """An ablation: weights are multiplied by sigmoid(mask logit) in training, and nothing is ever off."""


def _apply_soft(
    graph: fx.Graph, decision: reroute.Decision, routing: Routing, policy: SoftBEAM, binder: Binder
) -> reroute.Decision:
    at_picks = g.call(graph, aten.gather.default, reroute.mask_logits(graph, routing, policy, binder), 1, decision.ids)
    binder.watch(routing, policy, at_picks)
    mask = g.call(graph, aten.sigmoid.default, at_picks)
    weights = [g.call(graph, aten.mul.Tensor, w, g.call(graph, aten.to.dtype, mask, g.dtype(w))) for w in decision.weights]
    return reroute.Decision(decision.ids, tuple(weights))


reroute._APPLY[SoftBEAM] = _apply_soft


def l2(policy: BEAM) -> Tensor:
    """The mean square of the continuous masks, instead of their mean."""
    logits = list(policy.mask_logits().values())
    return torch.stack([site.sigmoid().square().mean() for site in logits]).mean()


@dataclass(frozen=True)
class Configuration:
    """One trained mask: what differs from the common recipe."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    regularize: Any = BEAM.regularizer
    policy: type[BEAM] = BEAM


WHOLE_MODEL = {"freeze": "none", "model_learning_rate": 3e-4}  # as published: the model learns beside its masks
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
CONFIGURATIONS = [
    *(Configuration(f"beta-{beta:g}", {"beta": beta}) for beta in BETAS),
    Configuration("target-2", {"beta": 0.3, "target_picks": 2.0}),
    Configuration("target-2-distill", {"beta": 0.3, "target_picks": 2.0, "distill": 1.0}),
    Configuration("beta-0", {"beta": 0.0}),
    Configuration("soft-beta-1", {"beta": 1.0}, policy=SoftBEAM),
    Configuration("l2-beta-1", {"beta": 1.0}, regularize=l2),
    Configuration("l2-beta-3", {"beta": 3.0}, regularize=l2),
    Configuration("l2-target-2", {"beta": 0.3, "target_picks": 2.0}, regularize=l2),
    Configuration("whole-beta-1", {"beta": 1.0, **WHOLE_MODEL}),
    Configuration("whole-l2-beta-1", {"beta": 1.0, **WHOLE_MODEL}, regularize=l2),
    Configuration("whole-soft-beta-1", {"beta": 1.0, **WHOLE_MODEL}, policy=SoftBEAM),
]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = _held_out(options)
    for name, policy in [("full", TopK()), *((f"plain top-{k}", SmallerK(k)) for k in (3, 2, 1))]:
        _keep(options.out / f"{name}.json", lambda name=name, policy=policy: _judge(_model(options)[0], name, policy, texts))
    for configuration in CONFIGURATIONS:
        if not options.only or configuration.name in options.only:
            _keep(options.out / f"{configuration.name}.json", lambda c=configuration: _train(c, options, texts, console))
    rows = [_read(options.out / f"{name}.json") for name in _names() if (options.out / f"{name}.json").is_file()]
    compare(rows)
    console.print(table(rows))
    write_csv(RESULTS / f"{options.name}.csv", [{k: v for k, v in r.items() if not isinstance(v, (dict, list))} for r in rows])
    draw(RESULTS / f"{options.name}.png", rows)
    return 0


def _names() -> list[str]:
    return ["full", *(f"plain top-{k}" for k in (3, 2, 1)), *(c.name for c in CONFIGURATIONS)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beam", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".demo" / "quality", help="of benchmarks.quality (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / ".demo" / "beam", help="folder for masks and rows (%(default)s)")
    parser.add_argument("--name", default="beam", help="of the .csv and the .png in benchmarks/results (%(default)s)")
    parser.add_argument("--only", nargs="*", help="names of configurations to train; 'none': only show what is there")
    parser.add_argument("--quick", action="store_true", help="on the toy model of benchmarks.quality --quick")
    parser.add_argument("--steps", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help=f"texts of {LENGTH} tokens in a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(%(default)s)")
    parser.add_argument("--texts", type=int, default=96, help=f"held-out windows of {LENGTH} tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="CPU threads (%(default)s)")
    return parser.parse_args(arguments)


def _keep(path: Path, make: Any) -> None:
    """Make a row, unless an earlier run made it."""
    if not path.is_file():
        path.write_text(json.dumps(make()), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return row


def _model(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    model, tokenizer = inputs.load_model(str(options.model / "model"))
    model.set_experts_implementation("moe_fx")  # type: ignore[operator]  # trains in one graph
    return model, tokenizer


def _training_text(options: argparse.Namespace, count: int) -> Tensor:
    """Windows of the text that the model itself was trained on, [count, LENGTH]."""
    plan = QUICK if options.quick else FULL
    corpus = load_corpus(plan.shape.vocab, plan.max_train_bytes)
    return training_windows(corpus.train, count, LENGTH, torch.Generator().manual_seed(7))


def _held_out(options: argparse.Namespace) -> Tensor:
    """Windows spread evenly over the held-out files, [texts, LENGTH]."""
    documents = inputs.tokenized(inputs.read_documents([options.model / "heldout.jsonl"]), _model(options)[1])
    windows = [w for document in documents for w in document.split(LENGTH) if len(w) == LENGTH]
    return torch.stack(windows[:: max(1, len(windows) // options.texts)][: options.texts])


def _train(configuration: Configuration, options: argparse.Namespace, texts: Tensor, console: Console) -> dict[str, Any]:
    model, _ = _model(options)
    recipe = Recipe(steps=options.steps, rows=options.rows, learning_rate=options.learning_rate, **configuration.changes)
    start = time.perf_counter()

    def show(now: Progress) -> None:
        if now.step % 20 == 0:
            state = f"loss {now.loss:.3f}, picks {now.mean_picks:.2f}, beta {now.beta:.3g}, {now.tokens_per_second:,.0f} tokens/s"
            console.print(f"{configuration.name} step {now.step}: {state}", highlight=False)

    policy, text = configuration.policy(train=True), _training_text(options, recipe.steps * recipe.rows)
    trained = train(model, text, recipe, policy=policy, regularize=configuration.regularize, advance=show)
    trained.artifact.save(options.out / f"{configuration.name}.moe.safetensors")
    row = _judge(model, configuration.name, BEAM(trained.artifact), texts)
    if configuration.policy is SoftBEAM:
        row["loss_with_soft_masks"] = _judge(model, "", SoftBEAM(trained.artifact, train=True), texts)["loss"]
    settings = {"steps": recipe.steps, "learning_rate": recipe.learning_rate, "last_beta": trained.history[-1]["beta"]}
    size = {"trained_tokens": recipe.steps * recipe.rows * LENGTH, "seconds": time.perf_counter() - start}
    return row | configuration.changes | settings | size | {"history": trained.history}


@torch.no_grad()
def _judge(model: nn.Module, name: str, policy: Policy, texts: Tensor) -> dict[str, Any]:
    """Loss, accuracy, and the picks that were computed, counted by the compiled graphs."""
    torch._dynamo.reset()
    config: Any = model.config
    options: dict[str, Any] = {"policy": policy, "inner": "eager", "stats": True, "strict": True}
    compiled = torch.compile(model, backend="moe_sparse", options=options, dynamic=False)
    moe_fx.reset_stats()
    losses, right = [], 0
    for rows in texts.split(8):
        logits = compiled(input_ids=rows, use_cache=False).logits
        losses += [float(next_token_loss(logits[i : i + 1], rows[i : i + 1])) for i in range(len(rows))]
        right += int((logits[:, :-1].argmax(-1) == rows[:, 1:]).sum())
    loss = sum(losses) / len(losses)
    tokens = texts.numel()
    picks = {site: config.num_experts_per_tok - s.off * s.steps / tokens for site, s in moe_fx.stats().items()}
    mean = sum(picks.values()) / len(picks)
    flops = 6 * config.hidden_size * config.moe_intermediate_size  # of one pick: three matrices, a product and a sum each
    return {"configuration": name, "picks": mean, "expert_mflops_per_token_and_layer": mean * flops / 1e6, "loss": loss,
            "perplexity": float(torch.tensor(loss).exp()), "accuracy": right / (tokens - len(texts)), "texts": len(texts),
            "picks_by_site": picks, "losses": losses}  # fmt: skip


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row what it has of the full model's quality."""
    full = rows[0]
    for row in rows:
        difference = torch.tensor(row["losses"], dtype=torch.float64) - torch.tensor(full["losses"], dtype=torch.float64)
        row["loss_above_full"] = float(difference.mean())
        row["loss_above_full_standard_error"] = float(difference.std() / len(difference) ** 0.5)
        row["share_of_accuracy"] = row["accuracy"] / full["accuracy"]
        row["share_of_perplexity"] = full["perplexity"] / row["perplexity"]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    trained_tokens = max(r.get("trained_tokens", 0) for r in rows)
    shown = Table(title=f"masks trained on {trained_tokens:,} tokens; {rows[0]['texts']} held-out windows of {LENGTH}")
    for heading in ("configuration", "picks per token", "expert MFLOPs\nper token, layer", "loss above full\nnats/token",
                    "perplexity", "accuracy", "of the full\naccuracy", "of the full\nperplexity"):  # fmt: skip
        shown.add_column(heading, justify="left" if heading == "configuration" else "right")
    for r in rows:
        shown.add_row(r["configuration"], f"{r['picks']:.2f}", f"{r['expert_mflops_per_token_and_layer']:.3f}",
                      f"{r['loss_above_full']:+.4f} ± {r['loss_above_full_standard_error']:.4f}", f"{r['perplexity']:.2f}",
                      f"{r['accuracy']:.2%}", f"{r['share_of_accuracy']:.1%}", f"{r['share_of_perplexity']:.1%}")  # fmt: skip
    return shown


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Held-out loss against picks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    series = {
        "BEAM, fixed beta": [r for r in rows if r["configuration"].startswith("beta-")],
        "BEAM, towards 2 picks": [r for r in rows if r["configuration"].startswith("target-")],
        "L2 instead of L1": [r for r in rows if r["configuration"].startswith("l2-")],
        "soft in training, hard after": [r for r in rows if r["configuration"].startswith("soft-")],
        "the whole model trained": [r for r in rows if r["configuration"].startswith("whole-")],
        "plain smaller K": [r for r in rows if r["configuration"].startswith(("plain", "full"))],
    }
    for (label, group), marker in zip(series.items(), "os^xPD", strict=True):
        if not group:
            continue
        group.sort(key=lambda r: r["picks"])
        line = "-" if label in ("BEAM, fixed beta", "plain smaller K") else ""
        axes.plot([r["picks"] for r in group], [r["loss_above_full"] for r in group], line + marker, label=label)
        for r in group:
            place = (r["picks"], r["loss_above_full"])
            axes.annotate(r["configuration"], place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("mean picks per token and layer that are computed")
    axes.set_ylabel("held-out loss above the full model, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
