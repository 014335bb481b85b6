"""The command ``moe-fx``: inspect, calibrate, eval, tune, train-beam and bench a model."""

from __future__ import annotations

import copy
import csv
import functools
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import moe_fx
from moe_fx import beam, inputs, report
from moe_fx.artifacts import Artifact, ArtifactError, check_writable, write_file
from moe_fx.backend import OptionError, explain, last_report
from moe_fx.calibrate import CalibrationError
from moe_fx.evaluate import EvaluationError, Evaluator, Stepwise, Windows, pareto, rows_of, windows
from moe_fx.inputs import InputError
from moe_fx.pipeline import UnrewrittenError
from moe_fx.policy import BEAM, NAEE, OEA, SERE, Drop, ExFold, Policy, PolicyError, SmallerK, StaticPrune, TopK, TopP, from_config
from moe_fx.tune import Limit, TuneError, tune

_EXPECTED = (InputError, ArtifactError, CalibrationError, EvaluationError, TuneError, PolicyError, OptionError, UnrewrittenError,
             beam.BeamError)  # fmt: skip
_RESAMPLES = 1000  # tell a standard error to 2%; lm-eval's own 100,000 take longer than a small task
_LARGEST_SEED = 2**32 - 1
_READ_ARTIFACTS = (SERE.name, BEAM.name, ExFold.name, StaticPrune.name)
_LINE_SECONDS = 30.0  # between two lines of progress in a log
_STABLE_SPREAD = 0.02  # the standard error of a similarity above which more tokens are advised

app = typer.Typer(help="Know and tune your Mixture-of-Experts model.", no_args_is_help=True, pretty_exceptions_enable=False)


class Metric(StrEnum):
    """Similarity metrics."""

    frobenius = "frobenius"
    cosine = "cosine"
    cka_linear = "cka-linear"
    cka_rbf = "cka-rbf"


Model = Annotated[str, typer.Argument(help="A folder with a model, or the id of one on the hub.")]
Data = Annotated[list[str], typer.Option(help="Text files, .jsonl files with a 'text' in each line, or folders of them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
Device = Annotated[str, typer.Option(help="Where the model runs.")]
DType = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
ArtifactOption = Annotated[Path | None, typer.Option("--artifact", help="The file that 'moe-fx calibrate' wrote.")]
Batch = Annotated[int, typer.Option(min=1, help="Different texts that advance together, one token each a step.")]
Batches = Annotated[list[int] | None, typer.Option("--batch", min=1, help="Texts that advance together; may be given again.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens predicted in one window of a text.")]
Stride = Annotated[int | None, typer.Option(min=1, help="Tokens from one window to the next. Default: the context.")]
Groups = Annotated[int, typer.Option(min=1, help="At most this many groups of texts are decoded.")]
Inner = Annotated[str, typer.Option(help="The compiler behind the backend: eager starts at once, inductor runs faster.")]
LmEval = Annotated[list[str] | None, typer.Option(help="Also run this task of lm-eval, a name or .yaml (extra [eval]).")]
Plot = Annotated[Path | None, typer.Option(help="Draw to this .png.")]


def _command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """A command whose expected errors become one line on stderr and exit code 1, and whose result becomes JSON if asked."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        warnings.filterwarnings("ignore", module=r"(torch|transformers)\..*")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            with _unwrapped(), _named_extra():
                _quiet_transformers()
                places = {key: value.expanduser() for key, value in kwargs.items() if isinstance(value, Path)}
                result = function(*args, **{**kwargs, **places})
        except (*_EXPECTED, OSError) as error:
            if as_json:
                print(json.dumps({"error": str(error), "kind": type(error).__name__}))
            else:
                _say(f"[bold red]error:[/] {_escaped(_in_one_line(str(error)))}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _stderr().print("stopped")
            raise typer.Exit(130) from None
        if as_json:
            print(json.dumps(result))

    return run


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Errors of the backend, as they were before Dynamo wrapped them."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None
    except torch._dynamo.exc.InvalidBackend as error:
        raise InputError(f"there is no such compiler: {error}") from None


@contextmanager
def _named_extra() -> Iterator[None]:
    """What to install where a library that only some commands need is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "matplotlib"):
            raise
        raise InputError(f"this command needs {error.name}: pip install 'moe-fx[cli]'") from None


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check_places(*files: Path | None, plot: Path | None = None) -> None:
    """No long measurement whose result cannot be kept."""
    if plot is not None and plot.suffix not in report.PLOTS:
        raise InputError(f"--plot is {plot}: expected a file name that ends in {' or '.join(report.PLOTS)}")
    for file in (*files, plot):
        if file is not None:
            check_writable(file)


def _in_one_line(text: str) -> str:
    """Without the line breaks of a list of problems."""
    return re.sub(r"\n\s*(- )?", "; ", re.sub(r":\n\s*- ", ": ", text.strip()))


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _stderr() -> Console:
    return Console(stderr=True)


def _say(line: str) -> None:
    """One line to stderr, however long."""
    _stderr().print(line, highlight=False, soft_wrap=True)


def _stdout() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)


@contextmanager
def _progress(what: str, total: int | None, as_json: bool) -> Iterator[Callable[[int, str], None]]:
    """A bar on stderr with the time left, or a line now and then where stderr is no terminal."""
    console = _stderr()
    if not as_json and not console.is_terminal:
        yield _logged(what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=as_json) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, now: bar.update(task, completed=done, description=f"{what}: {now}" if now else what)


def _logged(what: str, total: int | None) -> Callable[[int, str], None]:
    start = said = time.monotonic()

    def advance(done: int, now: str) -> None:
        nonlocal said
        moment = time.monotonic()
        if moment - said >= _LINE_SECONDS:
            said = moment
            left = f", {(moment - start) * (total - done) / done:.0f} s left" if total and done else ""
            _say(_escaped(f"{what}{f': {now}' if now else ''}; {done}{f' of {total}' if total else ''}{left}"))

    return advance


# ---------------------------------------------------------------------------------------------------- calibrate


@app.command()
@_command
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The artifact to write, such as model.moe.safetensors.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run through every expert.")] = 51_200,
    metric: Annotated[Metric, typer.Option(help="How similarity is measured.")] = Metric.frobenius,
    length: Annotated[int, typer.Option(min=2, help="Tokens of one text.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Texts in one batch; the product with --length bounds the memory.")] = 4,
    folds: Annotated[bool, typer.Option(help="Also measure what the baselines ExFold and StaticPrune need.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Which texts are drawn.")] = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Measure how similar a model's experts are.  '--data none' uses noise.  Stopped, it goes on where it was."""
    _check_places(out)
    net, tokenizer = inputs.load_model(model, device, dtype)
    no_data = data == ["none"]
    if no_data:
        batches = inputs.random_batches(_vocabulary(net), tokens, length, rows, seed)
    else:
        documents = inputs.tokenized(inputs.read_documents([Path(d) for d in data]), tokenizer)
        batches = inputs.calibration_batches(documents, tokens, length, rows, seed)
    moved = [{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()} for batch in batches]
    read = hashlib.sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in batches)).hexdigest()[:12]
    partial = out.with_name(f"{out.name}.{read}.partial")  # another text or seed begins anew
    with _progress("calibrate", len(moved), as_json) as advance:
        artifact = moe_fx.calibrate(
            net, _counted(moved, advance), metric=metric.value, folds=folds, noise_seed=seed if no_data else None,
            checkpoint=partial, progress=False,
        )  # fmt: skip
    made = {"calibrated_on": data, "seed": seed, "command": "moe-fx " + " ".join(sys.argv[1:])}
    artifact = Artifact(artifact.sites, {**made, **artifact.metadata})
    artifact.save(out)
    spread = artifact.metadata["spread"]
    assert spread is None or isinstance(spread, float)
    if not as_json:
        what = f"{len(artifact.sites)} sites, {metric.value} on {_tokens(artifact):,} tokens"
        _stdout().print(f"Written: {out}: {what}", highlight=False)
        if spread is not None:
            _stdout().print(f"Similarities are known to ± {spread:.4f} (from two halves of the tokens).", highlight=False)
    if spread is None or spread > _STABLE_SPREAD:
        known = "nobody can tell how well" if spread is None else f"only to ± {spread:.3f}"
        _say(f"warning: similarities are known {known}: {_tokens(artifact):,} tokens are too few; give more --tokens")
    return {"artifact": str(out), "sites": list(artifact.sites), "metric": metric.value, "tokens": _tokens(artifact),
            "spread": spread, "digest": artifact.digest}  # fmt: skip


def _counted(batches: Sequence[dict[str, Any]], advance: Callable[[int, str], None]) -> Iterator[dict[str, Any]]:
    for done, batch in enumerate(batches):
        advance(done, "")
        yield batch


def _tokens(artifact: Artifact) -> int:
    made: Any = artifact.metadata.get("calibration", {})
    return int(made.get("tokens", 0))


def _vocabulary(model: nn.Module) -> int:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


# ------------------------------------------------------------------------------------------------------ inspect


@app.command()
@_command
def inspect(
    model: Model,
    similarity: Annotated[Path | None, typer.Option(help="An artifact to draw and to check against the model.")] = None,
    plot: Plot = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Show a model's routers, what would become of their experts, and what was left alone, with the reason."""
    if plot is not None and similarity is None:
        raise InputError("--plot draws similarities: name the artifact with --similarity")
    _check_places(plot=plot)
    net, _ = inputs.load_model(model, device, dtype)
    tokens = torch.arange(8, device=device)[None] % _vocabulary(net)
    with torch.no_grad():
        # a fresh BEAM keeps every pick, and makes the report say what happens to picks that are switched off
        options: dict[str, Any] = {"policy": BEAM()}
        found = explain(torch.compile(net, backend="moe_sparse", options=options), input_ids=tokens, use_cache=False)
    matches: dict[str, dict[str, float]] = {}
    if similarity is not None:
        artifact = Artifact.load(similarity).validate(net)
        matches = {name: _match_summary(kinds["similarity"]) for name, kinds in artifact.sites.items() if "similarity" in kinds}
        if plot is not None:
            if not matches:
                kinds = ", ".join(artifact.kinds)
                raise InputError(f"{similarity} has only {kinds} and no similarity to draw: name a file of 'moe-fx calibrate'")
            report.draw_similarity(plot, artifact)
    if not as_json:
        _stdout().print("As under a fresh BEAM, which keeps every pick; fused experts skip what a trained one switches off.")
        _stdout().print(found)
        if matches:
            _stdout().print(_match_table(matches))
    sites = [{"site": s.name, "experts": s.num_experts, "top_k": s.top_k, "hidden_size": s.hidden_size, "scoring": s.scoring,
              "off_picks": "skipped" if s.experts == "fused" else s.experts} for s in found.sites]  # fmt: skip
    skips = [{"place": s.name, "reason": s.reason, "routing": s.routing} for s in found.skips]
    return {"sites": sites, "skips": skips, "best_match": matches, "plot": str(plot) if plot else None}


def _match_summary(table: Tensor) -> dict[str, float]:
    best = report.best_match(table)
    return {"lowest": float(best.min()), "median": float(best.median()), "highest": float(best.max())}


def _match_table(matches: dict[str, dict[str, float]]) -> Table:
    table = Table("site", "lowest", "median", "highest", title="similarity of each expert's best match", title_justify="left")
    for name, summary in matches.items():
        table.add_row(name, *(f"{value:.3f}" for value in summary.values()))
    return table


# --------------------------------------------------------------------------------------------------------- eval


@app.command(name="eval")
@_command
def evaluate(
    model: Model,
    data: Data,
    policy: Annotated[list[str] | None, typer.Option(help="name:key=value,... or JSON; may be given several times.")] = None,
    artifact: ArtifactOption = None,
    compare: Annotated[bool, typer.Option(help="SERE beside every baseline, over a range of settings.")] = False,
    batch: Batches = None,
    context: Context = 256,
    stride: Stride = None,
    groups: Groups = 4,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write all rows to this file.")] = None,
    plot: Plot = None,
    lm_eval: LmEval = None,
    inner: Inner = "eager",
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Measure what policies cost, the way a server decodes: different texts together, one token each a step."""
    _check_places(csv_file, plot=plot)
    net, tokenizer = inputs.load_model(model, device, dtype)
    table = None if artifact is None else Artifact.load(artifact).validate(net)
    named = _distinctly_named(policy or [], table, net)
    documents = inputs.tokenized(inputs.read_documents([Path(d) for d in data]), tokenizer)
    task_manager = _load_tasks(lm_eval) if lm_eval else None
    rows: list[dict[str, Any]] = []
    sizes = batch or [16]
    plots = {size: plot if plot is None or len(sizes) == 1 else plot.with_stem(f"{plot.stem}-{size}") for size in sizes}
    for size in sizes:
        texts = windows(documents, size, context, stride or context, groups)
        rows += _evaluate_at(net, texts, named, table if compare else None, compare, inner, plots[size], as_json)
    together = max(sizes)
    tasks = _run_lm_eval(lm_eval, task_manager, net, tokenizer, named, together, inner) if lm_eval else {}
    if tasks and not as_json:
        _stdout().print(_lm_eval_table(tasks, together))
    if csv_file is not None:
        _write_csv(csv_file, rows)
    drawn = [str(place) for place in plots.values() if place is not None]
    return {"rows": rows, "lm_eval": tasks, "csv": str(csv_file) if csv_file else None, "plots": drawn}


def _evaluate_at(
    net: nn.Module,
    texts: Windows,
    named: Sequence[tuple[str, tuple[Policy, ...]]],
    table: Artifact | None,
    compare: bool,
    inner: str,
    plot: Path | None,
    as_json: bool,
) -> list[dict[str, Any]]:
    with _progress("evaluate", None, as_json) as advance:
        evaluator = Evaluator(net, texts, inner=inner, advance=advance)
        chosen = list(named)
        if compare:
            chosen += [(p.describe(), (p,)) for p in comparison(table, *_sizes())]
        found = [evaluator.full, *(evaluator.evaluate(name, policies) for name, policies in chosen)]
    rows = rows_of(found, evaluator.full)
    size = evaluator.full.batch
    title = f"{size} texts together, {texts.scored:,} tokens predicted in windows of {texts.groups[0].shape[1] - 1}"
    if not as_json:
        _stdout().print(report.evaluation_table(rows, title))
    if plot is not None:
        report.draw_pareto(plot, rows[1:] if len(rows) > 1 else rows, [e.name for e in pareto(found[1:])], title)
    return rows


def _sizes() -> tuple[int, int]:
    """K and E of the model that was compiled last."""
    sites = last_report().sites
    return max(s.top_k for s in sites), max(s.num_experts for s in sites)


def comparison(artifact: Artifact | None, top_k: int, num_experts: int) -> list[Policy]:
    """SERE and every baseline over a range of settings; those that need an artifact only where there is one."""
    firsts = [s for s in (1, 2, 3, 4, 6) if s < top_k]
    chosen: list[Policy] = [SmallerK(k) for k in firsts]
    chosen += [Drop(s) for s in firsts] + [OEA(s) for s in firsts]
    chosen += [TopP(p) for p in (0.3, 0.5, 0.7, 0.9)] + [NAEE(r) for r in (0.3, 0.5, 0.7, 0.9)]
    if artifact is not None and "similarity" in artifact.kinds:
        tables = [kinds["similarity"] for kinds in artifact.sites.values() if "similarity" in kinds]
        middle = round(statistics.fmean(float(report.best_match(t).median()) for t in tables), 2)
        chosen += [SERE(artifact, primary=s, threshold=t) for s in firsts for t in (0.0, middle)]
        if "tuned" in artifact.metadata:
            chosen.append(SERE(artifact))
    if artifact is not None and "fold_scale" in artifact.kinds:
        chosen += [ExFold(artifact, s) for s in firsts]
        keeps = [num_experts * quarters // 4 for quarters in (1, 2, 3)]
        chosen += [StaticPrune(artifact, keep) for keep in keeps if keep >= top_k]
    return chosen


def _distinctly_named(texts: Sequence[str], artifact: Artifact | None, net: nn.Module) -> list[tuple[str, tuple[Policy, ...]]]:
    """Each policy under its own description, with the text it was given as where two would be called the same."""
    made = [(text, _policy(text, artifact)) for text in texts]
    for own in (getattr(p, "artifact", None) for _, policies in made for p in policies):
        if own is not None and own is not artifact:
            own.validate(net)  # a policy can name a file of its own
    named = [(" + ".join(p.describe() for p in policies), text, policies) for text, policies in made]
    called = [name for name, _, _ in named]
    return [(f"{name} {text}" if called.count(name) > 1 else name, policies) for name, text, policies in named]


def _policy(text: str, artifact: Artifact | None) -> tuple[Policy, ...]:
    """The policies in ``name:key=value,key=value`` or in JSON; one that reads an artifact gets ``--artifact``."""
    if text.lstrip().startswith(("{", "[")):
        try:
            config = json.loads(text)
        except ValueError as error:
            raise PolicyError(f"policy {text!r} is not JSON: {error}") from None
    else:
        name, _, settings = text.partition(":")
        config = {"name": name.strip()} | dict(_setting(text, part) for part in settings.split(",") if part.strip())
    listed: list[Any] = config if isinstance(config, list) else [config]
    parts: list[Any] = [{"name": p} if isinstance(p, str) else p for p in listed]  # what is neither is refused by from_config
    for part in parts:
        reads = isinstance(part, dict) and str(part.get("name")).lower() in _READ_ARTIFACTS
        if reads and "artifact" not in part:
            if artifact is None:
                raise PolicyError(f"policy '{part['name']}' reads an artifact: name it with --artifact")
            part["artifact"] = artifact
    return from_config(parts)


def _setting(text: str, part: str) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    if not equals:
        raise PolicyError(f"policy {text!r} has '{part}' where key=value is expected, as in sere:primary=2,threshold=0.3")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()


def _load_tasks(tasks: Sequence[str]) -> Any:
    """lm-eval's task manager, after every task was loaded once with its data, so that one that is missing costs no time."""
    try:
        from lm_eval.models import huggingface  # noqa: F401  (needs more than lm-eval brings by itself)
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        lacking = error.name or "lm_eval"
        raise InputError(f"--lm-eval needs the lm-eval library, and {lacking} is missing: pip install 'moe-fx[eval]'") from None
    manager = TaskManager()
    try:
        get_task_dict(list(tasks), manager)
    except (KeyError, ValueError, OSError) as error:
        what = str(error.args[0]) if error.args else type(error).__name__
        raise InputError(
            f"cannot load the lm-eval task {' or '.join(tasks)}: {what}; 'lm-eval ls tasks' lists the names, and a path to a "
            "task's .yaml file is one, too"
        ) from error
    return manager


def _run_lm_eval(
    tasks: list[str],
    manager: Any,
    net: nn.Module,
    tokenizer: Any,
    named: Sequence[tuple[str, tuple[Policy, ...]]],
    batch: int,
    inner: str,
) -> dict[str, Any]:
    """Policy -> task -> metrics."""
    import lm_eval

    results: dict[str, Any] = {}
    for name, policies in [("full", (TopK(),)), *named]:
        stepwise = Stepwise(net, policies, inner=inner)
        language_model = _language_model(stepwise, net, tokenizer, batch)
        with redirect_stdout(sys.stderr):  # stdout is for the result, and lm-eval prints
            found = lm_eval.simple_evaluate(
                model=language_model, tasks=tasks, task_manager=manager, log_samples=False, bootstrap_iters=_RESAMPLES
            )
        results[name] = {} if found is None else found["results"]
    return json.loads(json.dumps(results, default=str))


def _language_model(stepwise: Stepwise, net: nn.Module, tokenizer: Any, batch: int) -> Any:
    """lm-eval's model of transformers, which scores and generates by way of ``stepwise``."""
    from lm_eval.models.huggingface import HFLM

    class StepwiseLM(HFLM):
        @property
        def prefix_token_id(self) -> int:
            prefix = super().prefix_token_id
            if prefix is None:
                raise InputError("lm-eval needs a token that begins texts or one that ends them, and the model's tokenizer has "
                                 "neither: set its bos_token or its eos_token")  # fmt: skip
            return int(prefix)

        def _model_call(self, inps: Tensor, **others: Any) -> Tensor:
            return stepwise.logits(inps)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            with stepwise.generating():
                return super()._model_generate(*args, **kwargs)

    own = copy.deepcopy(tokenizer)  # lm-eval changes it
    if own.pad_token_id is None:  # padding is masked; lm-eval would add a token, for which the model has no embedding
        own.pad_token_id = 0 if own.eos_token_id is None else own.eos_token_id
    return StepwiseLM(pretrained=net, tokenizer=own, batch_size=batch)


def _lm_eval_table(results: dict[str, Any], batch: int) -> Table:
    """A row for every policy, task and metric; lm-eval calls a metric "name,filter" and its error "name_stderr,filter"."""
    table = Table("policy", "task", "metric", "value", "±", title=f"lm-eval, {batch} texts together", title_justify="left")
    for policy, tasks in results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                name, comma, kind = metric.partition(",")
                if comma and not name.endswith("_stderr"):
                    error = metrics.get(f"{name}_stderr,{kind}")
                    shown = f"{error:.4f}" if isinstance(error, float) else ""
                    table.add_row(policy, task, name, f"{value:.4f}" if isinstance(value, float) else str(value), shown)
    return table


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows)
    write_file(path, text.getvalue().encode())


# --------------------------------------------------------------------------------------------------------- tune


@app.command(name="tune")
@_command
def tune_command(
    model: Model,
    data: Data,
    artifact: Annotated[Path, typer.Option(help="The file that 'moe-fx calibrate' wrote; the settings go into it.")],
    max_kl: Annotated[float | None, typer.Option(min=0.0, help="At most this KL divergence to the full model, nats.")] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(help="At most this increase of the perplexity: 1% or 0.01.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write here and leave --artifact as it is.")] = None,
    batch: Batch = 16,
    context: Context = 128,
    stride: Stride = None,
    groups: Groups = 2,
    inner: Inner = "eager",
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Choose SERE's S and threshold for every layer, and write them into the artifact."""
    limit = _limit(max_kl, max_ppl_increase)
    _check_places(out)
    net, tokenizer = inputs.load_model(model, device, dtype)
    table = Artifact.load(artifact).validate(net)
    SERE(table)  # refuses a table without similarities before anything is decoded
    documents = inputs.tokenized(inputs.read_documents([Path(d) for d in data]), tokenizer)
    texts = windows(documents, batch, context, stride or context, groups)
    with _progress("tune", None, as_json) as advance:
        evaluator = Evaluator(net, texts, inner=inner, advance=advance)
        tuned = tune(net, table, texts, limit, evaluator=evaluator)
    target = out or artifact
    tuned.artifact.save(target)
    shown = [tuned.full, *([tuned.best_global] if tuned.best_global else []), tuned.chosen]
    rows = rows_of(shown, tuned.full)
    settings: Any = tuned.artifact.metadata["tuned"]
    if not as_json:
        title = f"{batch} texts together, {texts.scored:,} tokens; limit {limit.nats:.4g} nats per token"
        _stdout().print(report.evaluation_table(rows, title))
        by_site = Table("site", "S", "threshold", title=f"written to {target}: SERE('{target}') uses it", title_justify="left")
        for site, (primary, threshold) in settings.items():
            by_site.add_row(site, str(primary), f"{threshold:g}")
        _stdout().print(by_site)
    return {"artifact": str(target), "tuned": settings, "limit_nats": limit.nats, "rows": rows}


def _limit(max_kl: float | None, max_ppl_increase: str | None) -> Limit:
    if (max_kl is None) == (max_ppl_increase is None):
        raise InputError("say how much quality may go: either --max-kl or --max-ppl-increase")
    if max_ppl_increase is None:
        return Limit(max_kl=max_kl)
    text = max_ppl_increase.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise InputError(f"--max-ppl-increase is '{max_ppl_increase}', expected a share such as 1% or 0.01") from None
    if not 0 < share < math.inf:
        raise InputError(f"--max-ppl-increase is '{max_ppl_increase}', expected more than 0")
    return Limit(max_ppl_increase=share)


# --------------------------------------------------------------------------------------------------- train-beam


class Freeze(StrEnum):
    """What does not learn beside the masks."""

    masks_only = "masks-only"
    router = "router"
    none = "none"


@app.command(name="train-beam")
@_command
def train_beam(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The artifact to write, such as model.moe.safetensors.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    beta: Annotated[float, typer.Option(help="Weight of the regularizer, which switches picks off.")] = 0.1,
    target_picks: Annotated[float | None, typer.Option(help="Steer beta towards this many picks per token.")] = None,
    freeze: Annotated[
        Freeze, typer.Option(help="masks-only: nothing but the masks learns; router: all but the routers; none: everything.")
    ] = Freeze.masks_only,
    distill: Annotated[float, typer.Option(help="Weight of the KL divergence from the full model, beside the loss.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Of the masks.")] = 1e-3,
    model_learning_rate: Annotated[float, typer.Option(help="Of what else learns.")] = 1e-5,
    rows: Annotated[int, typer.Option(min=1, help="Texts in one forward.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Forwards in one step.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of one text.")] = 128,
    held_out: Annotated[int, typer.Option(min=1, help="Texts that are kept out of training, to judge by.")] = 32,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint and evaluation to the next.")] = 50,
    init: Annotated[Path | None, typer.Option(help="An artifact whose masks to start from. Default: zeros.")] = None,
    artifact: ArtifactOption = None,
    model_out: Annotated[Path | None, typer.Option(help="Folder for the model, where more than the masks learns.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, even where there is a checkpoint.")] = False,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")] = False,
    autocast: Annotated[bool, typer.Option("--autocast", help="Forwards in bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="The order of the texts.")] = 0,
    plot: Plot = None,
    inner: Inner = "eager",
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Train masks that switch picks off, and write them as an artifact.  Stopped, it goes on after its last checkpoint.

    --artifact names a calibrated file whose tables go into --out, so that one file serves BEAM and SERE together.
    """
    _check_places(out, plot=plot)
    if freeze is not Freeze.masks_only and model_out is None:
        raise beam.BeamError(f"--freeze {freeze.value} changes the model's own weights: say with --model-out where to keep them")
    if model_out is not None:
        if model_out.exists() and not model_out.is_dir():
            raise InputError(f"--model-out is {model_out}, which is a file: name a folder")
        model_out.mkdir(parents=True, exist_ok=True)
    recipe = beam.Recipe(
        steps=steps, beta=beta, target_picks=target_picks, freeze=freeze.value, distill=distill, learning_rate=learning_rate,
        model_learning_rate=model_learning_rate, rows=rows, accumulate=accumulate, autocast=autocast, seed=seed,
    )  # fmt: skip
    net, tokenizer = inputs.load_model(model, device, dtype)
    _make_trainable(net)
    start, base = (None if path is None else Artifact.load(path).validate(net) for path in (init, artifact))
    texts = _texts_to_train_on(data, tokenizer, length, seed)
    if len(texts) <= held_out + rows:
        raise InputError(f"the data have {len(texts)} texts of {length} tokens, and {held_out} are held out: give more, or a "
                         "smaller --length or --held-out")  # fmt: skip
    checkpoint = out.with_name(out.name + ".checkpoint")
    if fresh:
        checkpoint.unlink(missing_ok=True)
    with _progress("train-beam", steps, as_json) as advance, beam.gradient_checkpointing(net, checkpointing):
        trained = beam.train(
            net, texts[held_out:], recipe, held_out=texts[:held_out], evaluate_every=every, base=base, inner=inner,
            policy=BEAM(start, train=True), checkpoint=checkpoint, checkpoint_every=every,
            advance=lambda now: advance(now.step, _training_state(now)),
        )  # fmt: skip
    made = {"calibrated_on": data, "command": "moe-fx " + " ".join(sys.argv[1:])}
    result = Artifact(trained.artifact.sites, {**trained.artifact.metadata, **made})
    result.save(out)
    if model_out is not None:
        inputs.keep_model(net, tokenizer, model_out)
    if plot is not None:
        report.draw_training(plot, trained.history, trained.full_loss)
    last = trained.history[-1]
    if not as_json:
        _stdout().print(_training_table(trained.history, trained.full_loss))
        _stdout().print(f"Written: {out}; use it as BEAM('{out}'), or: moe-fx eval ... --artifact {out} --policy beam")
    return {"artifact": str(out), "steps": last["step"], "picks": last["picks"], "loss": last["loss"], "beta": last["beta"],
            "held_out_loss": last["held_out"], "held_out_picks": last["held_out_picks"], "full_loss": trained.full_loss,
            "digest": result.digest, "plot": str(plot) if plot else None}  # fmt: skip


def _make_trainable(net: nn.Module) -> None:
    """Off a GPU, the experts that train in one graph: the gradients of others are slow there, or break it."""
    import moe_fx.hf

    if next(net.parameters()).device.type == "cpu" and hasattr(net, "set_experts_implementation"):
        net.set_experts_implementation(moe_fx.hf.NAME)  # type: ignore[operator]


def _texts_to_train_on(data: list[str], tokenizer: Any, length: int, seed: int) -> Tensor:
    """All whole windows of ``length`` tokens, [N, length], in an order drawn by ``seed``."""
    documents = inputs.tokenized(inputs.read_documents([Path(d) for d in data]), tokenizer)
    found = [w for document in documents for w in document.split(length) if len(w) == length]
    if not found:
        raise InputError(f"no text in the data has {length} tokens: give longer texts or a smaller --length")
    return torch.stack(found)[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


def _training_state(now: beam.Progress) -> str:
    by_layer = list(now.picks.values())
    shown = " ".join(f"{picks:.1f}" for picks in by_layer[:8]) + (" ..." if len(by_layer) > 8 else "")
    picks, speed = f"picks {now.mean_picks:.2f} ({shown})", f"{now.tokens_per_second:,.0f} tokens/s"
    return f"loss {now.loss:.3f}, {picks}, beta {now.beta:.3g}, {speed}"


def _training_table(history: Sequence[dict[str, Any]], full_loss: float | None) -> Table:
    title = "held-out texts" + ("" if full_loss is None else f"; the full model's loss is {full_loss:.4f}")
    table = Table("step", "picks per token", "loss", "above full", "beta", title=title, title_justify="left")
    for row in history:
        if row["held_out"] is not None:
            above = "" if full_loss is None else f"{row['held_out'] - full_loss:+.4f}"
            shown = (f"{row['held_out_picks']:.2f}", f"{row['held_out']:.4f}", above, f"{row['beta']:.3g}")
            table.add_row(str(row["step"]), *shown)
    return table


# -------------------------------------------------------------------------------------------------------- bench


@app.command()
@_command
def bench(
    model: Model,
    data: Annotated[list[str] | None, typer.Option(help="Text to decode. Default: random tokens.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="As for eval. Default: what the artifact is for.")] = None,
    artifact: ArtifactOption = None,
    batch: Batches = None,
    length: Annotated[int, typer.Option(min=16, help="Tokens of the cache, and of the prefill.")] = 64,
    turns: Annotated[int, typer.Option(min=2, help="Turns of 8 steps that each configuration takes.")] = 6,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    inner: Inner = "inductor",
    device: Device = "cpu",
    dtype: DType = "auto",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write all rows to this file.")] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Time decoding and prefill with and without a policy, side by side."""
    from moe_fx.bench import bench as measure

    if threads is not None:
        torch.set_num_threads(threads)
    _check_places(csv_file)
    net, tokenizer = inputs.load_model(model, device, dtype)
    table = None if artifact is None else Artifact.load(artifact).validate(net)
    configurations: dict[str, tuple[Policy, ...] | None] = {f"{inner} alone": None, "moe_sparse, TopK": (TopK(),)}
    for name, policies in _distinctly_named(policy or _readers_of(table), table, net):
        configurations[f"moe_sparse, {name}"] = policies
    sizes = batch or [1, 4, 16]
    tokens = _tokens_to_time(data, tokenizer, _vocabulary(net), max(sizes), length)
    with _progress("bench", None, as_json) as advance:
        say = functools.partial(advance, 0)
        rows = measure(net, configurations, tokens, batches=sizes, turns=turns, inner=inner, advance=say)
    if not as_json:
        _stdout().print(_bench_table(rows))
    if csv_file is not None:
        _write_csv(csv_file, rows)
    return {"rows": rows, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def _readers_of(artifact: Artifact | None) -> list[str]:
    """The policies that an artifact was made for, each by its name."""
    return [] if artifact is None else [policy.name for policy in (SERE, BEAM) if policy.kind in artifact.kinds]


def _tokens_to_time(data: list[str] | None, tokenizer: Any, vocabulary: int, rows: int, length: int) -> Tensor:
    if data is None:
        return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    documents = inputs.tokenized(inputs.read_documents([Path(d) for d in data]), tokenizer)
    return windows(documents, rows, length - 1, length - 1, 1).groups[0]


def _bench_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("what", "batch", "configuration", "active experts per layer", "ms per step (spread)", "ratio to the first"):
        table.add_column(heading, justify="left" if heading in ("what", "configuration") else "right")
    for r in rows:
        table.add_row(r["what"], str(r["batch"]), r["configuration"], f"{r['active_experts_per_layer']:.1f}",
                      f"{r['ms']:.1f} ({r['spread']:.0%})", f"{r['ratio_to_inductor_alone']:.2f}x")  # fmt: skip
    return table


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
