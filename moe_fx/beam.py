"""Train BEAM's mask routers (arXiv 2605.14438) on any model whose routing is found, and keep them as an artifact.

``attach`` compiles a model with masks that learn; ``Masked`` makes one module of both, for HF's ``Trainer`` or any loop;
``train`` is a loop of its own, with a controller towards a number of picks, distillation, checkpoints and resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fx.artifacts import Artifact, model_identity, read_safetensors, weights_sample, write_safetensors
from moe_fx.backend import last_report
from moe_fx.policy import BEAM
from moe_fx.site import Site, normal_name

FREEZE = ("masks-only", "router", "none")


class BeamError(ValueError):
    """Mask routers cannot be trained as asked; the message says what to do."""


class DivergedError(BeamError):
    """A loss or a gradient was not finite.  ``step`` says where; the last checkpoint is older and good."""

    def __init__(self, step: int, what: str, checkpoint: Path | None) -> None:
        is_kept = checkpoint is not None and checkpoint.is_file()
        kept = f"the last good checkpoint is {checkpoint}" if is_kept else "there is no checkpoint"
        super().__init__(f"step {step}: the {what} is not finite, so training stopped; {kept}: try a lower learning rate or beta")
        self.step = step


# -------------------------------------------------------------------------------------------------- your own loop


@dataclass(frozen=True)
class Attached:
    """A model compiled with mask routers that learn.

    Attributes:
        model: the compiled model; its parameters are those of the model that was given, without the masks.
        policy: gives ``parameters()``, and after each forward ``regularizer()`` and ``picks()``.
        sites: where the masks are.
    """

    model: Callable[..., Any]
    policy: BEAM
    sites: tuple[Site, ...]


def attach(model: nn.Module, inputs: Mapping[str, Any], policy: BEAM | None = None, *, inner: object = "eager") -> Attached:
    """Compile a model with a mask router at every site, and run it once on ``inputs`` so that the masks exist.

    The model's experts must trace: for transformers in float32 on a CPU, ``model.set_experts_implementation("moe_fx")`` (after
    ``import moe_fx.hf``) or ``inner="eager"``.

    Args:
        model: any module with expert routing.
        inputs: keyword arguments of one forward.
        policy: a ``BEAM`` with ``train=True``, to go on from an artifact or with another tau.  Default: masks of zeros.
        inner: the compiler behind the backend, for training itself.

    Raises:
        BeamError: the model has no routing that can be rewritten, or the policy does not train.
    """
    policy = BEAM(train=True) if policy is None else policy
    if not policy.train:
        raise BeamError("this BEAM has train=False: give BEAM(..., train=True), or none")
    looked = _compiled(model, policy, "eager")
    looked(**inputs)
    if not policy.parameters():
        skips = "; ".join(f"'{s.name}': {s.reason}" for s in last_report().skips if s.routing)
        raise BeamError(
            f"no expert routing was found in this {type(model).__name__}, so there is nothing to mask"
            + (f" ({skips})" if skips else "") + ": see 'moe-fx inspect', or moe_fx.explain(model, ...)"
        )  # fmt: skip
    sites = tuple(s for s in last_report().sites if s.name in policy.masks())
    return Attached(looked if inner == "eager" else _compiled(model, policy, inner), policy, sites)


def _compiled(model: nn.Module, policy: BEAM, inner: object) -> Callable[..., Any]:
    options: dict[str, Any] = {"policy": policy, "inner": inner, "strict": True}
    compiled: Callable[..., Any] = torch.compile(model, backend="moe_sparse", options=options)
    return compiled


class Masked(nn.Module):
    """A model and its mask routers as one module, for HF's ``Trainer`` (with ``remove_unused_columns=False``) or any loop.

    Its parameters are the model's and the masks'; what is frozen stays frozen.  Where the model's output has a ``loss``, beta
    times the regularizer is added to it.

    Args:
        attached: from ``attach``.
        model: the model that was attached.
        beta: the regularizer's weight; may be set while training.
    """

    accepts_loss_kwargs = False  # HF's Trainer then divides the whole loss by its accumulation steps, the regularizer too

    def __init__(self, attached: Attached, model: nn.Module, beta: float) -> None:
        super().__init__()
        self.model, self.beta = model, _check_beta(beta)
        self.masks = nn.ParameterDict({_key(site): mask for site, mask in attached.policy.masks().items()})
        self._attached = (attached,)  # in a tuple, or the compiled model would be a second child

    @property
    def policy(self) -> BEAM:
        return self._attached[0].policy

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **others: Any) -> None:
        """The model's own, in the form that traces; HF's Trainer calls it where its arguments ask for it."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise BeamError("reentrant checkpointing does not trace: set gradient_checkpointing_kwargs={'use_reentrant': False}")
        _checkpoint_layers(self.model, gradient_checkpointing_kwargs, **others)

    def gradient_checkpointing_disable(self) -> None:
        """The model's own."""
        self.model.gradient_checkpointing_disable()  # type: ignore[operator]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Masked:
        """As any module's ``to`` and ``half``, but masks stay float32: in fewer bits they would not learn in small steps."""
        before = {key: mask.data for key, mask in self.masks.items()}
        super()._apply(fn, recurse)
        for key, mask in self.masks.items():
            if mask.dtype != before[key].dtype:
                mask.data = before[key].to(mask.device)
                mask.grad = None if mask.grad is None else mask.grad.to(mask.dtype)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, but tied weights are copied for their second name: HF's Trainer saves no two that share memory."""
        held, places = super().state_dict(*args, **kwargs), set()
        for name, tensor in held.items():
            place = (tensor.data_ptr(), tuple(tensor.shape))
            held[name] = tensor.clone() if place in places else tensor
            places.add(place)
        return held

    def forward(self, **inputs: Any) -> Any:
        output = self._attached[0].model(**inputs)
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + self.beta * self.policy.regularizer()
        return output


def _key(site: str) -> str:
    return site.replace(".", "/") or "root"  # a parameter's name holds no dot


def artifact_of(
    policy: BEAM, model: nn.Module, metadata: Mapping[str, object] | None = None, base: Artifact | None = None
) -> Artifact:
    """The masks of a policy as an ordinary artifact, for ``BEAM(artifact)``.

    Args:
        policy: what was trained.
        model: on what; the artifact remembers which model that was.
        metadata: more to remember.
        base: an artifact whose other tables go along, so that one file serves ``[BEAM(file), SERE(file)]``.
    """
    tables = {} if base is None else {site: dict(kinds) for site, kinds in base.sites.items()}
    masks = {site: mask.detach() for site, mask in policy.masks().items()}
    sites = {site: {**tables.get(site, {}), "mask_router": mask} for site, mask in masks.items()}
    made: dict[str, object] = {
        "model": model_identity(model),
        "weights_sample": weights_sample(model),
        "hidden_sizes": {site: mask.shape[1] for site, mask in masks.items()},
    }
    return Artifact(sites, {**({} if base is None else base.metadata), **made, **(metadata or {})})


# ------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Recipe:
    """How to train.  All but ``steps`` must be the same where a run is resumed.

    Attributes:
        steps: optimiser steps.
        beta: the regularizer's weight, at least 0; with ``target_picks`` only where it starts.
        target_picks: mean picks per token and layer to steer to, above 0 and at most K.  None: beta stays.
        freeze: ``"masks-only"``: nothing but the masks learns; ``"router"``: all but the model's own routers;
            ``"none"``: everything.
        learning_rate: of the masks.
        model_learning_rate: of what else learns.
        distill: weight of the KL divergence from the full model, as it was before training, beside the loss.
        rows: texts in a forward.
        accumulate: forwards in a step.
        warmup: steps in which the learning rates rise.
        autocast: run forwards in bfloat16 autocast.
        seed: the order of the texts, and dropout.
        tau: see ``BEAM``.
    """

    steps: int
    beta: float = 0.1
    target_picks: float | None = None
    freeze: str = "masks-only"
    learning_rate: float = 1e-3
    model_learning_rate: float = 1e-5
    distill: float = 0.0
    rows: int = 8
    accumulate: int = 1
    warmup: int = 10
    autocast: bool = False
    seed: int = 0
    tau: float = 0.5

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        if self.freeze not in FREEZE:
            raise BeamError(f"freeze is '{self.freeze}', expected one of {', '.join(FREEZE)}")
        for name in ("steps", "rows", "accumulate"):
            if getattr(self, name) < 1:
                raise BeamError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.distill < math.inf:
            raise BeamError(f"distill is {self.distill}, expected a weight of at least 0")
        for name in ("learning_rate", "model_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BeamError(f"{name.replace('_', ' ')} is {getattr(self, name)}, expected a number of at least 0")
        if self.target_picks is not None and not self.target_picks > 0:
            raise BeamError(f"target picks is {self.target_picks}, expected more than 0 and at most K")


def _check_beta(beta: float) -> float:
    if not 0 <= beta < math.inf:
        raise BeamError(f"beta is {beta}, expected a number of at least 0: it weighs the masks that are to become small")
    return beta


@dataclass
class Controller:
    """Steers beta so that the mean picks come to a target.

    The logarithm of beta integrates the relative error; a proportional part answers at once, so that it need not overshoot.
    """

    beta: float
    target: float | None
    integral_gain: float = 0.03
    proportional_gain: float = 2.0
    smoothed: float | None = None

    def next(self, picks: float) -> float:
        """The beta of the next step, after one with so many mean picks."""
        if self.target is None:
            return self.beta
        self.smoothed = picks if self.smoothed is None else 0.7 * self.smoothed + 0.3 * picks
        error = max(-1.0, min(1.0, (self.smoothed - self.target) / self.target))
        self.beta = min(1e3, max(1e-4, self.beta * math.exp(self.integral_gain * error)))
        return self.beta * math.exp(self.proportional_gain * error)


@dataclass
class Progress:
    """Where training is, after a step or an evaluation.

    Attributes:
        step: steps done.
        loss: the language model's loss, nats per token.
        picks: mean picks per token, by site.
        beta: the regularizer's weight in this step.
        tokens_per_second: since this process began to train.
        held_out: loss of the texts that are held out, where this step was evaluated, in nats per token.
        held_out_picks: mean picks per token on them.
    """

    step: int
    loss: float
    picks: dict[str, float]
    beta: float
    tokens_per_second: float
    held_out: float | None = None
    held_out_picks: float | None = None

    @property
    def mean_picks(self) -> float:
        return sum(self.picks.values()) / len(self.picks)

    def row(self) -> dict[str, Any]:
        """What a checkpoint and a plot keep: all but the speed."""
        return {key: value for key, value in asdict(self).items() if key != "tokens_per_second"}


@dataclass
class Trained:
    """What training gave.

    Attributes:
        artifact: the masks.
        policy: the masks, still able to learn.
        sites: where they are.
        history: a row for each step, as ``Progress.row``.
        full_loss: loss of the held-out texts under the full model, nats per token; None where none are held out.
    """

    artifact: Artifact
    policy: BEAM
    sites: tuple[Site, ...]
    history: list[dict[str, Any]]
    full_loss: float | None = None


Regularize = Callable[[BEAM], Tensor]


def train(
    model: nn.Module,
    tokens: Tensor,
    recipe: Recipe,
    *,
    held_out: Tensor | None = None,
    evaluate_every: int = 50,
    policy: BEAM | None = None,
    base: Artifact | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    regularize: Regularize = BEAM.regularizer,
    inner: object = "eager",
    advance: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train the mask routers of a causal language model of transformers.

    A run with the same model, tokens and recipe that finds its checkpoint goes on after it, and ends where a run that was
    never interrupted ends.

    Args:
        model: where it should run; its gradients are set as the recipe freezes it.
        tokens: [N, length] token ids; each step reads the next rows of a new order in each epoch.
        recipe: how.
        held_out: [M, length] token ids to evaluate on, at the start, every ``evaluate_every`` steps, and at the end.
        policy: a ``BEAM`` with ``train=True`` to start from.  Default: masks of zeros.
        base: an artifact whose other tables go into the result.
        checkpoint: a file to keep the state in, every ``checkpoint_every`` steps and at the end.
        regularize: what beta multiplies, of the policy after a forward.
        inner: the compiler behind the backend.
        advance: called after every step.

    Raises:
        BeamError: the model has no routing, the target is above K, the tokens are too few, or the checkpoint is another run's.
        DivergedError: a loss or a gradient is not finite; the checkpoint is as it was.
    """
    if tokens.dim() != 2 or len(tokens) < recipe.rows:
        raise BeamError(f"tokens are {list(tokens.shape)}, expected [at least {recipe.rows} rows, length]: give more text")
    run = _Run(model, tokens, recipe, held_out, policy or BEAM(tau=recipe.tau, train=True), regularize, inner)
    full_loss = run.full_loss()
    if checkpoint is not None and checkpoint.is_file():
        run.load(checkpoint)
    start, first = time.perf_counter(), run.step
    while run.step < recipe.steps:
        try:
            progress = run.advance()
        except _NotFiniteError as error:
            raise DivergedError(run.step + 1, str(error), checkpoint) from None
        done, last = run.step, run.step == recipe.steps
        progress.tokens_per_second = (done - first) * run.tokens_per_step / (time.perf_counter() - start)
        if held_out is not None and (done % evaluate_every == 0 or last):
            progress.held_out, progress.held_out_picks = run.evaluate()
            run.history[-1] = progress.row()
        advance(progress)
        if checkpoint is not None and (done % checkpoint_every == 0 or last):
            run.save(checkpoint)
    made = {"beam": {**asdict(recipe), "picks": run.history[-1]["picks"] if run.history else {}}}
    return Trained(artifact_of(run.policy, model, made, base), run.policy, run.sites, run.history, full_loss)


class _NotFiniteError(ArithmeticError):
    """The message names what is not finite."""


@dataclass
class _Run:
    """One training run: everything that changes from step to step."""

    model: nn.Module
    tokens: Tensor
    recipe: Recipe
    held_out: Tensor | None
    policy: BEAM
    regularize: Regularize
    inner: object
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch._dynamo.reset()  # forwards of one class share a limited number of compilations
        self._device = next(self.model.parameters()).device
        self.model.requires_grad_(self.recipe.freeze != "masks-only")
        attached = attach(self.model, self._inputs(self.tokens[: self.recipe.rows]), self.policy, inner=self.inner)
        self.compiled, self.sites = attached.model, attached.sites
        self._check_target()
        self._teacher = self._make_teacher()
        if self.recipe.freeze == "router":
            for router in _routers(self.model, self.sites):
                router.requires_grad_(False)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._learned = {f"mask/{site}": mask for site, mask in self.policy.masks().items()}
        self._learned |= {f"model/{name}": parameter for name, parameter in trained.items()}
        groups: list[dict[str, Any]] = [{"params": self.policy.parameters(), "lr": self.recipe.learning_rate}]
        if trained:
            groups.append({"params": list(trained.values()), "lr": self.recipe.model_learning_rate})
        self._rates = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
        self._controller = Controller(self.recipe.beta, self.recipe.target_picks)
        self._beta = self.recipe.beta
        self._orders: dict[int, Tensor] = {}

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.rows * self.recipe.accumulate * self.tokens.shape[1]

    def _check_target(self) -> None:
        mean_k = sum(s.top_k for s in self.sites) / len(self.sites)
        target = self.recipe.target_picks
        if target is not None and target > mean_k:
            raise BeamError(f"target picks is {target:g}, but the model picks K = {mean_k:g} experts for a token: ask for fewer")

    def _make_teacher(self) -> nn.Module | None:
        """The full model: itself, without the masks, while none of its weights change; else a copy."""
        if self.recipe.distill == 0:
            return None
        if self.recipe.freeze == "masks-only":
            return self.model
        import copy

        return copy.deepcopy(self.model).requires_grad_(False)

    def _inputs(self, rows: Tensor) -> dict[str, Any]:
        return {"input_ids": rows.to(self._device), "use_cache": False}

    def _rows(self, forward: int) -> Tensor:
        """The texts of one forward: the next ones in an order that is drawn anew for each epoch."""
        first = forward * self.recipe.rows
        return self.tokens[[self._place(first + i) for i in range(self.recipe.rows)]]

    def _place(self, position: int) -> int:
        epoch, place = divmod(position, len(self.tokens))
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            self._orders[epoch] = torch.randperm(len(self.tokens), generator=generator)
        return int(self._orders[epoch][place])

    def advance(self) -> Progress:
        """One optimiser step."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)  # dropout is the same after a resume
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * min(1.0, (self.step + 1) / max(1, recipe.warmup))
        self._optimizer.zero_grad()
        loss, picks = 0.0, dict.fromkeys(self.policy.masks(), 0.0)
        for turn in range(recipe.accumulate):
            part = self._forward(self._rows(self.step * recipe.accumulate + turn))
            loss += part / recipe.accumulate
            picks = {site: picks[site] + now / recipe.accumulate for site, now in self.policy.picks().items()}
        norm = float(nn.utils.clip_grad_norm_(list(self._learned.values()), 1.0))
        if not math.isfinite(norm):
            raise _NotFiniteError("gradient")
        self._optimizer.step()
        self.step += 1
        progress = Progress(self.step, loss, picks, self._beta, 0.0)
        self._beta = self._controller.next(progress.mean_picks)
        self.history.append(progress.row())
        return progress

    def _forward(self, rows: Tensor) -> float:
        """Forward and backward of one batch; the language model's loss."""
        inputs = self._inputs(rows)
        with self._autocast():
            logits = self.compiled(**inputs).logits
        loss = next_token_loss(logits, inputs["input_ids"])
        total = loss + self._beta * self.regularize(self.policy)
        if self._teacher is not None:
            with torch.no_grad(), self._autocast():
                full = self._teacher(**inputs).logits
            total = total + self.recipe.distill * divergence(full, logits)
        value = float(total.detach())
        if not math.isfinite(value):
            raise _NotFiniteError("loss")
        (total / self.recipe.accumulate).backward()
        return float(loss.detach())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.recipe.autocast)

    def full_loss(self) -> float | None:
        """Loss of the held-out texts under the model as it is, without masks."""
        return None if self.held_out is None else self._held_out_loss(self.model)[0]

    def evaluate(self) -> tuple[float, float]:
        """Loss of the held-out texts with the masks, and the mean picks."""
        return self._held_out_loss(self.compiled, self.policy)

    @torch.no_grad()
    def _held_out_loss(self, model: Callable[..., Any], policy: BEAM | None = None) -> tuple[float, float]:
        assert self.held_out is not None
        losses, picks = [], []
        for rows in self.held_out.split(self.recipe.rows):
            inputs = self._inputs(rows)
            with self._autocast():
                logits = model(**inputs).logits
            losses += [float(next_token_loss(logits, inputs["input_ids"]))] * len(rows)
            counted = policy.picks() if policy is not None else {}
            picks += [sum(counted.values()) / max(1, len(counted))] * len(rows)
        return sum(losses) / len(losses), sum(picks) / len(picks)

    # --------------------------------------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this run's.  More steps may be asked for."""
        recipe = {key: value for key, value in asdict(self.recipe).items() if key != "steps"}
        read = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        return {"recipe": recipe, "tokens": read, "model": model_identity(self.model)["fingerprint"]}

    def save(self, path: Path) -> None:
        """Write all that a later process needs: masks, what else learned, Adam's moments, beta and the history."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self._learned.items()}
        for name, parameter in self._learned.items():
            moments = self._optimizer.state.get(parameter, {})  # none where nothing flows back
            tensors |= {f"adam/{name}/{key}": moments[key].detach().cpu().contiguous() for key in _MOMENTS if key in moments}
        state = {"step": self.step, "beta": self._beta, "controller": asdict(self._controller), "history": self.history}
        sample = weights_sample(self.model) if self.recipe.freeze == "masks-only" else None
        content = {"identity": self._identity(), "weights": sample, "state": state}
        write_safetensors(path, tensors, {_HEADER: json.dumps(content)})

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            BeamError: it is no checkpoint of this command, or one of another model, text or recipe.
        """
        header, tensors = read_safetensors(path)
        if _HEADER not in header:
            raise BeamError(f"{path} is no checkpoint of train-beam: move it away, or name another")
        content = json.loads(header[_HEADER])
        other = _differences(content["identity"], json.loads(json.dumps(self._identity())))
        if content["weights"] is not None and content["weights"] != weights_sample(self.model):
            other = list(dict.fromkeys(["model", *other]))
        if other:
            what = ", another ".join(other)
            raise BeamError(f"{path} is the checkpoint of a run with another {what}: delete it to begin anew, or name another")
        with torch.no_grad():
            for name, parameter in self._learned.items():
                parameter.copy_(tensors[name])
                moments = {key: tensors[f"adam/{name}/{key}"].clone() for key in _MOMENTS if f"adam/{name}/{key}" in tensors}
                if moments:
                    on_device = {key: m if key == "step" else m.to(parameter.device) for key, m in moments.items()}
                    self._optimizer.state[parameter] = on_device
        state = content["state"]
        self.step, self._beta, self.history = state["step"], state["beta"], state["history"]
        self._controller = Controller(**state["controller"])


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two runs differ, in words."""
    whole = [word for key, word in (("model", "model"), ("tokens", "text")) if then.get(key) != now[key]]
    old = then.get("recipe", {})
    changed = [key for key, value in now["recipe"].items() if old.get(key) != value]
    return [*whole, *(f"{key.replace('_', ' ')} ({old.get(key)}, now {now['recipe'][key]})" for key in changed)]


_HEADER = "moe_fx.train_beam"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, nats: logits [B, L, V], tokens [B, L]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def divergence(full: Tensor, masked: Tensor) -> Tensor:
    """Mean KL divergence of next-token distributions from the full model's, nats: logits [B, L, V] each."""
    target = full.flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(masked.flatten(0, 1).float().log_softmax(-1), target, reduction="batchmean", log_target=True)


def _routers(model: nn.Module, sites: Sequence[Site]) -> Iterator[nn.Module]:
    """The module at or below each site that owns a matrix [E, H]."""
    for site in sites:
        inside = [m for name, m in model.named_modules() if f"{normal_name(name)}.".startswith(f"{site.name}.") or not site.name]
        shape = (site.num_experts, site.hidden_size)
        yield from (m for m in inside if any(tuple(p.shape) == shape for p in m.parameters(recurse=False)))


@contextmanager
def gradient_checkpointing(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """While active, a model of transformers recomputes its layers in the backward, for less memory.

    Raises:
        BeamError: the model cannot.
    """
    if not enabled:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise BeamError(f"{type(model).__name__} does not support gradient checkpointing: train without it")
    hooked: Any = model
    configs = [hooked.config, hooked.config.get_text_config(decoder=True)]
    was_training, made_caches = model.training, [getattr(config, "use_cache", True) for config in configs]
    _checkpoint_layers(model.train())
    try:
        yield
    finally:
        hooked.gradient_checkpointing_disable()
        model.train(was_training)
        for config, made_cache in zip(configs, made_caches, strict=True):
            config.use_cache = made_cache


def _checkpoint_layers(model: Any, settings: Mapping[str, Any] | None = None, **others: Any) -> None:
    """Let a model of transformers recompute its layers in the backward, in the form that traces.

    That needs no input with a gradient; transformers gives one to a frozen model's embeddings, in a way that does not trace.
    Nor does the warning trace that such a model makes no cache, so the model is told to make none.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={**(settings or {}), "use_reentrant": False}, **others)
    model.disable_input_require_grads()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.use_cache = False
