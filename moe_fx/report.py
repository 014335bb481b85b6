"""What a compile did and what an evaluation found, for people: tables by rich and plots by matplotlib."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_fx.artifacts import Artifact, write_file
from moe_fx.site import Site, Skip

PLOTS = (".png", ".svg", ".pdf")  # what plots may be written as


@dataclass
class Report:
    """What moe_fx found and did in one compiled model.

    Attributes:
        sites: one for each MoE layer, in the order met; a layer seen in several graphs (recompiled for another batch
            size, say) is listed once, as last compiled.
        skips: places that resemble routing and were left alone, each with its reason; a skip that bears the name of a site
            says why the site's experts are not fused, while its routing is treated as ``policy`` says.  A site that a
            policy refuses is a skip with ``routing`` set and not among ``sites``.
        graphs: graphs compiled.
        ops_before, ops_after: how often each op occurs over all graphs, before and after the rewrite.
        seconds: seconds spent in each step of the pipeline, summed over graphs.
        compile_seconds: seconds in this backend in all, the inner compiler included.
    """

    sites: list[Site] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    graphs: int = 0
    ops_before: Counter[str] = field(default_factory=Counter)
    ops_after: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: float = 0.0

    @property
    def overhead(self) -> float:
        """Share of the backend's time that was spent outside the inner compiler, 0 to 1."""
        return sum(self.seconds.values()) / self.compile_seconds if self.compile_seconds else 0.0

    def add(self, sites: list[Site], skips: list[Skip]) -> None:
        """Record what was found in one more graph."""
        by_name = {s.name: s for s in self.sites}
        by_name.update((s.name, s) for s in sites)
        self.sites = list(by_name.values())
        self.skips += [s for s in skips if s not in self.skips]

    def mentions(self, name: str) -> bool:
        """Whether a site or a skip has this name, or stands inside of it."""
        names = [*(site.name for site in self.sites), *(skip.name for skip in self.skips)]
        return any(found == name or not name or found.startswith(f"{name}.") for found in names)

    def add_seconds(self, step: str, seconds: float) -> None:
        """Add to the time of a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def __rich__(self) -> object:
        from rich.console import Group

        refused = any(s.routing for s in self.skips)
        nothing = f"No expert routing {'could be rewritten' if refused else 'was found'}; the model runs unchanged."
        parts: list[object] = [_site_table(self.sites) if self.sites else nothing]
        names = {s.name for s in self.sites}
        unfused = [s for s in self.skips if s.name in names and not s.routing]
        if unfused:
            parts.append(_skip_table(unfused, "experts that stay as they are", "site", "why they are not fused"))
        if len(unfused) < len(self.skips):
            left = [s for s in self.skips if s not in unfused]
            parts.append(_skip_table(left, "left alone", "place", "why it was left alone"))
        parts.append(self._summary())
        return Group(*parts)  # type: ignore[arg-type]

    def _summary(self) -> str:
        changed = {op: self.ops_after[op] - self.ops_before[op] for op in sorted({*self.ops_before, *self.ops_after})}
        ours = ", ".join(f"{op} {n:+d}" for op, n in changed.items() if n)
        lines = [f"{self.graphs} graph{'s' * (self.graphs != 1)}; ops changed: {ours or 'none'}"]
        if self.seconds:
            steps = ", ".join(f"{step} {1000 * s:.0f} ms" for step, s in self.seconds.items())
            lines.append(f"{steps}: {self.overhead:.1%} of {self.compile_seconds:.1f} s of compilation")
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        out = StringIO()
        Console(file=out, width=120).print(self)
        return out.getvalue().rstrip()


def _site_table(sites: list[Site]) -> object:
    from rich.table import Table

    table = Table(title=f"{len(sites)} site{'s' * (len(sites) != 1)}", title_justify="left")
    for heading in ("site", "experts E", "top-K", "hidden H", "scoring", "experts region", "policy"):
        table.add_column(heading, justify="right" if heading.split()[-1] in ("E", "top-K", "H") else "left")
    for s in sites:
        table.add_row(
            s.name or "(root)", str(s.num_experts), str(s.top_k), str(s.hidden_size), s.scoring, s.experts, s.policy
        )
    return table


def _skip_table(skips: list[Skip], title: str, where: str, why: str) -> object:
    from rich.table import Table

    table = Table(where, why, title=title, title_justify="left")
    for s in skips:
        table.add_row(s.name or "(root)", s.reason)
    return table


def evaluation_table(rows: Sequence[Mapping[str, object]], title: str) -> object:
    """The rows of ``moe_fx.evaluate.rows_of`` for people."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = {
        "policy": "policy",
        "active_experts_per_layer": "active experts\nper layer",
        "perplexity": "perplexity",
        "loss_above_full": "loss above full\nnats/token",
        "kl_to_full_nats": "KL to full\nnats",
        "top1_agreement": "top-1\nagreement",
        "picks_off_per_layer_and_step": "picks off",
        "step_ms": "ms/step",
    }
    for key, heading in columns.items():
        table.add_column(heading, justify="left" if key == "policy" else "right")
    for row in rows:
        table.add_row(*(_cell(key, row) for key in columns))
    return table


def _cell(key: str, row: Mapping[str, object]) -> str:
    value = row[key]
    if key == "loss_above_full":
        error = row.get("loss_above_full_standard_error")
        return f"{value:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
    formats = {"active_experts_per_layer": ".1f", "perplexity": ".2f", "kl_to_full_nats": ".4f", "top1_agreement": ".1%",
               "picks_off_per_layer_and_step": ".1f", "step_ms": ".1f"}  # fmt: skip
    return format(value, formats[key]) if key in formats else str(value)


def draw_pareto(path: Path, rows: Sequence[Mapping[str, Any]], front: Sequence[str], title: str) -> None:
    """Quality against active experts, one mark for each policy; a line joins those that no other beats in both."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    kinds = dict.fromkeys(str(r["policy"]).split("(")[0] for r in rows)
    for kind in kinds:
        mine = [r for r in rows if str(r["policy"]).split("(")[0] == kind]
        xs, ys = [r["active_experts_per_layer"] for r in mine], [r["kl_to_full_nats"] for r in mine]
        axes.plot(xs, ys, "o", label=kind)
        for r, x, y in zip(mine, xs, ys, strict=True):
            axes.annotate(str(r["policy"]).partition("(")[2].rstrip(")"), (x, y), (4, 4), textcoords="offset points", fontsize=7)
    best = sorted((r["active_experts_per_layer"], r["kl_to_full_nats"]) for r in rows if r["policy"] in front)
    axes.plot([x for x, _ in best], [y for _, y in best], "-", color="grey", linewidth=1, zorder=0, label="no other is better")
    axes.set_xlabel("distinct experts read per layer and step (fewer is cheaper)")
    axes.set_ylabel("KL divergence to the full model, nats per token (less is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title)
    _save(figure, path)


def draw_training(path: Path, history: Sequence[Mapping[str, Any]], full_loss: float | None) -> None:
    """Picks of each layer as training goes on, and held-out loss against picks."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for site in history[-1]["picks"]:
        left.plot([row["step"] for row in history], [row["picks"][site] for row in history], label=site, linewidth=1)
    left.set_xlabel("step")
    left.set_ylabel("picks per token that are on")
    if len(history[-1]["picks"]) <= 12:
        left.legend(fontsize=7)
    judged = [row for row in history if row["held_out"] is not None]
    right.plot([row["held_out_picks"] for row in judged], [row["held_out"] for row in judged], "o-")
    for row in judged:
        right.annotate(str(row["step"]), (row["held_out_picks"], row["held_out"]), (4, 4), textcoords="offset points", fontsize=7)
    if full_loss is not None:
        right.axhline(full_loss, linestyle="--", color="grey", label="full model")
        right.legend()
    right.set_xlabel("mean picks per token (numbers are steps)")
    right.set_ylabel("held-out loss, nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_similarity(path: Path, artifact: Artifact) -> None:
    """A heat map of each layer's similarities, and how similar each expert's best match is: critical experts have none."""
    plt = _pyplot()
    tables = {name: kinds["similarity"] for name, kinds in artifact.sites.items() if "similarity" in kinds}
    columns = min(4, len(tables) + 1)
    rows = -(-(len(tables) + 1) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    panels = list(grid.flat)
    lowest = min(float(t.min()) for t in tables.values())
    image = None
    for axes, (name, table) in zip(panels, tables.items(), strict=False):
        image = axes.imshow(table.numpy(), vmin=lowest, vmax=1, cmap="viridis")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    last = panels[len(tables)]
    last.boxplot([best_match(t).tolist() for t in tables.values()], tick_labels=range(len(tables)))
    last.set_title("best match of each expert, by layer", fontsize=8)
    last.set_ylabel("similarity")
    for axes in panels[len(tables) + 1 :]:
        axes.axis("off")
    if image is not None:
        figure.colorbar(image, ax=panels[: len(tables)], shrink=0.6)
    _save(figure, path)


def best_match(similarity: Tensor) -> Tensor:
    """How similar each expert's most similar other expert is, [E]."""
    return similarity.clone().fill_diagonal_(-math.inf).max(dim=1).values


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    drawn = BytesIO()
    figure.savefig(drawn, dpi=130, format=path.suffix.removeprefix("."))
    _pyplot().close(figure)
    write_file(path, drawn.getvalue())
