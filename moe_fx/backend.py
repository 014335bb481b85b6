"""The torch.compile backend: ``torch.compile(model, backend="moe_sparse", options={...})``."""

from __future__ import annotations

import difflib
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_fx.apart import compiled_apart, uncompiled
from moe_fx.inner import INNER, INNER_OPTIONS, OptionError, inner_compiler
from moe_fx.owner import routers_with_lists
from moe_fx.passes.bind import watched_outputs
from moe_fx.pipeline import UNCOMPILED, Settings, run
from moe_fx.policy import BEAM, Policy, from_config
from moe_fx.report import Report
from moe_fx.site import Skip
from moe_fx.tables import roots_on_stack

#: Every key of ``options`` and what it may be.
OPTIONS = {
    "policy": "a policy, a dict such as {'name': 'sere', 'artifact': 'model.moe.safetensors', 'primary': 2}, or a list of those",
    "inner": INNER,
    "inner_options": INNER_OPTIONS,
    "mode": "torch.compile's mode for the Inductor inner compiler (torch.compile takes its own mode only without options)",
    "strict": "True or False: whether a real router that cannot be rewritten is an error",
    "fuse_experts": "True or False: whether experts that are recognised run as one op (default: on CPU only)",
    "fuse_routing": "True or False: whether a top-K and the policy behind it run as one op (default: on CUDA only)",
    "stats": "True or False: whether to count active experts while the model runs (read them with moe_fx.stats())",
}


def moe_sparse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its MoE routing rewritten.  Registered as ``backend="moe_sparse"``.

    Args:
        gm: the graph Dynamo captured.
        example_inputs: its inputs.
        options: see ``OPTIONS``; none of them is needed.  Without a policy the routing stays exact top-K.
        mode: torch.compile's mode, for the Inductor inner compiler.

    Raises:
        OptionError, PolicyError, ArtifactError: what the user asked for is wrong, or does not fit this model.
        UnrewrittenError: with ``strict``, a router was left alone.
    """
    settings, inner = _parse(options or {}, mode)
    return _compile(gm, example_inputs, settings, inner, _report_for(options))


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, inner: Callable[..., Any], report: Report
) -> Callable[..., Any]:
    start = time.perf_counter()
    new = run(gm, settings, report)
    watched = watched_outputs(new)
    compiled = inner(new, list(example_inputs))
    report.compile_seconds += time.perf_counter() - start
    return _watching(compiled, watched) if watched else compiled


def _watching(compiled: Callable[..., Any], watched: Sequence[tuple[BEAM, str]]) -> Callable[..., Any]:
    """A compiled graph whose last outputs go to the policies that train, instead of to the caller."""

    def call(*args: Any) -> Any:
        outputs = compiled(*args)
        own, logits = outputs[: -len(watched)], outputs[-len(watched) :]
        seen: dict[BEAM, dict[str, list[Tensor]]] = {}
        for (policy, site), at_picks in zip(watched, logits, strict=True):
            seen.setdefault(policy, {}).setdefault(site, []).append(at_picks)
        for policy, by_site in seen.items():
            policy.see(by_site)
        return own

    return call


def _parse(options: Mapping[str, Any], mode: str | None) -> tuple[Settings, Callable[..., Any]]:
    for key in options:
        if key not in OPTIONS:
            near = difflib.get_close_matches(str(key), OPTIONS, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise OptionError(f"unknown option '{key}' for backend moe_sparse{hint}: known are {', '.join(OPTIONS)}")
    for key in ("strict", "stats", "fuse_experts", "fuse_routing"):
        if key in options and not isinstance(options[key], bool):
            raise OptionError(f"option '{key}' is {options[key]!r}, expected {OPTIONS[key]}")
    flags = {"strict": options.get("strict", False), "stats": options.get("stats", False)}
    fuse: dict[str, Any] = {"fuse": options.get("fuse_experts"), "fuse_routing": options.get("fuse_routing")}
    inline = options.get("inner", "inductor") == "inductor"
    settings = Settings(_policies(options.get("policy")), **flags, **fuse, inline=inline)
    inner = inner_compiler(options.get("inner", "inductor"), options.get("inner_options"), options.get("mode", mode), settings)
    return settings, inner


def _policies(config: object) -> tuple[Policy, ...]:
    policies = from_config(config)
    # a policy written as a dict is made anew for every graph, and nobody could reach its parameters
    given = config if isinstance(config, (list, tuple)) else (config,)
    if any(isinstance(p, BEAM) and p.train and p not in given for p in policies):
        raise OptionError("a BEAM that trains must be an object, so that its parameters() can be given to an optimiser")
    return policies


# ------------------------------------------------------------------------------------------------------ reports


class _Latest:
    """The report that is being filled, and the compile it belongs to."""

    report: Report = Report()
    options: object = None
    root: weakref.ref[nn.Module] | None = None


def _report_for(options: Mapping[str, Any] | None) -> Report:
    """The report of the model being compiled: all graphs of one model and one set of options go into one."""
    roots = roots_on_stack()
    root = roots[0] if roots else None
    last = _Latest.root() if _Latest.root is not None else None
    if root is None or last is not root or _Latest.options is not options:
        _Latest.report = Report()
        _Latest.options = options
        _Latest.root = weakref.ref(root) if root is not None else None
    return _Latest.report


def _forget() -> None:
    """Called by ``torch._dynamo.reset``: what is compiled next belongs to a new report."""
    _Latest.root = None


moe_sparse.reset = _forget  # type: ignore[attr-defined]


def last_report() -> Report:
    """The report of the most recent compile by this backend in this process; empty before the first."""
    return _Latest.report


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Run ``model(*args, **kwargs)`` once and report its sites, its skips and what a policy would rewrite.

    Nothing is compiled beyond tracing, and what was compiled before stays.  For a model already compiled with
    ``backend="moe_sparse"``, by whichever of torch.compile's ways, its own options apply; for any other, exact top-K.

    Raises:
        What the model itself raises on these arguments, and what ``moe_sparse`` raises.
    """
    settings, inner = _parse({**_options_of(model), "inner": "eager"}, None)
    report = Report()
    before = _given_up()
    compiled_apart(model, lambda gm, inputs: _compile(gm, inputs, settings, inner, report))(*args, **kwargs)
    given_up = [*(_given_up() - before)]
    if not report.graphs:
        report.add([], [Skip("", _NOTHING_CAPTURED)])
    elif given_up:
        root = uncompiled(model)[0]
        routers = [name for name, _ in routers_with_lists(root)] if isinstance(root, nn.Module) else []
        report.add([], [Skip(name, UNCOMPILED, routing=True) for name in routers if not report.mentions(name)])
        if not report.sites and not report.skips:
            report.add([], [Skip("", _GAVE_UP.format(", ".join(given_up)))])
    _Latest.report = report
    _forget()
    return report


_NOTHING_CAPTURED = (
    "Dynamo captured no graph, so nothing could be found: a graph break inside a loop makes it give up the whole function; "
    "torch.compile(..., fullgraph=True) shows where, or captures it"
)


_GAVE_UP = (
    "Dynamo gave up whole functions because of a graph break inside a loop, and what these route was not seen: {}; "
    "torch.compile(..., fullgraph=True) may capture them"
)


def _given_up() -> Counter[str]:
    """The functions that Dynamo has given up so far, as it names them, and how often."""
    why = torch._dynamo.utils.counters["unimplemented"]
    return Counter(place for text, times in why.items() for place in re.findall(r"frame skipped: (.*?\))", text) * times)


def _options_of(model: Callable[..., Any]) -> dict[str, Any]:
    """The options a model was given, if this backend compiled it, without those of the inner compiler."""
    compiler = uncompiled(model)[1]
    if not isinstance(compiler, torch._TorchCompileWrapper) or compiler.compiler_name != "moe_sparse":
        return {}
    options = compiler.kwargs.get("options") or {}
    return {key: value for key, value in options.items() if key not in ("inner_options", "mode")}
