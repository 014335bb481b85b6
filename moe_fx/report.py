"""What a compile did, for people: printed with rich, and plain data for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from io import StringIO

from moe_fx.site import Site, Skip


@dataclass
class Report:
    """What moe_fx found and did in one compiled model.

    Attributes:
        sites: one for each MoE layer, in the order met; a layer seen in several graphs (recompiled for another batch
            size, say) is listed once, as last compiled.
        skips: places that resemble routing and were left alone, each with its reason.
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

    def add_seconds(self, step: str, seconds: float) -> None:
        """Add to the time of a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def __rich__(self) -> object:
        from rich.console import Group

        nothing = "No expert routing was found; the model runs unchanged."
        parts: list[object] = [_site_table(self.sites) if self.sites else nothing]
        if self.skips:
            parts.append(_skip_table(self.skips))
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


def _skip_table(skips: list[Skip]) -> object:
    from rich.table import Table

    table = Table("place", "why it was left alone", title="left alone", title_justify="left")
    for s in skips:
        table.add_row(s.name, s.reason)
    return table
