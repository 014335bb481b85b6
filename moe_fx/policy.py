"""Policies: what to do at a site.  ``TopK`` leaves the routing as it is, ``SERE`` and ``BEAM`` change it.

The rest are what other papers do instead, to be measured beside SERE (``moe-fx eval --compare``).

A new policy is a frozen dataclass below and an entry in ``POLICIES``; what it does to a graph is in
``passes/reroute.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_fx.artifacts import Artifact
from moe_fx.site import normal_name


class PolicyError(ValueError):
    """A policy cannot be made or applied; the message says what to do."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies: immutable settings, equal when their values are.

    ``name`` is what a configuration calls the policy; ``kind`` is the kind of tensor that it reads from its artifact;
    ``switches_off`` says whether it may leave picks that are off, or change weights; ``needs_order`` whether the best
    picks must come first.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str | None] = None
    switches_off: ClassVar[bool] = False
    needs_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self) is Policy:
            raise PolicyError(f"Policy is only the base: use one of {_class_names()}")

    def describe(self) -> str:
        """For reports, such as ``SERE(primary=2, threshold=0.3)``: no artifact, and nothing that is unset."""
        is_set = {key: value for key, value in self._settings().items() if value not in (None, ()) and value is not False}
        shown = ", ".join(f"{key}={value}" for key, value in is_set.items())
        return f"{type(self).__name__}({shown})" if shown else type(self).__name__

    @property
    def digest(self) -> str:
        """Hex sha256 over the settings and the artifact's tensors: the same in every process, for compile caches."""
        artifact = getattr(self, "artifact", None)
        content = [self.name, self._settings(), None if artifact is None else artifact.digest]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _settings(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if field.name != "artifact"}


@dataclass(frozen=True)
class TopK(Policy):
    """Exact top-K: the routing stays as the model computes it."""

    name: ClassVar[str] = "topk"


class _DefaultInt(int):
    """A default that can be told from the same number given by a user."""


class _DefaultFloat(float):
    """See ``_DefaultInt``."""


@dataclass(frozen=True)
class SERE(Policy):
    """Move secondary picks to the most similar expert that the batch reads anyway (arXiv 2602.07616).

    Args:
        artifact: ``similarity`` per site: an ``Artifact``, or the path of one, which is read at once.  It may be left
            out here, but not where the policy is applied.
        primary: S, at least 1: how many of each token's best picks are primary, and never move.  Default: 2.
        threshold: in [-1, 1].  Above 0, a pick moves only to an expert at least this similar.  Default: 0.
        max_tokens: at least 1: batches of more tokens are left alone.  None: no limit.
        layers: (site, S, threshold) for sites that have settings of their own.  Where this, ``primary`` and ``threshold``
            are all left out, those that ``moe-fx tune`` wrote into the artifact.

    Raises:
        PolicyError: a setting outside its range, or for a site that the artifact lacks, or an artifact without similarity.
        ArtifactError: the file at the path cannot be used.
    """

    name: ClassVar[str] = "sere"
    kind: ClassVar[str | None] = "similarity"
    needs_order: ClassVar[bool] = True

    artifact: Artifact | None = None
    primary: int = _DefaultInt(2)
    threshold: float = _DefaultFloat(0.0)
    max_tokens: int | None = None
    layers: tuple[tuple[str, int, float], ...] = ()

    def __post_init__(self) -> None:
        left_out = isinstance(self.primary, _DefaultInt) and isinstance(self.threshold, _DefaultFloat) and not self.layers
        _set(self, "primary", _count(self, "primary"))
        _set(self, "threshold", _threshold(self, self.threshold))
        _set(self, "max_tokens", None if self.max_tokens is None else _count(self, "max_tokens"))
        _set(self, "artifact", _artifact(self))
        _set(self, "layers", _layers(self, self._tuned() if left_out else self.layers))

    def _tuned(self) -> object:
        """What ``moe-fx tune`` wrote into the artifact, for the sites that it still has; nothing where it never saw it."""
        if self.artifact is None:
            return ()
        tuned = self.artifact.metadata.get("tuned", {})
        if not isinstance(tuned, Mapping):
            return tuned
        return [(site, *settings) for site, settings in tuned.items() if normal_name(site) in self.artifact.sites]

    def at(self, site_name: str) -> tuple[int, float]:
        """S and the threshold at a site."""
        by_site = {site: (primary, threshold) for site, primary, threshold in self.layers}
        return by_site.get(normal_name(site_name), (self.primary, self.threshold))

    def describe(self) -> str:
        """As for every policy; of settings by site only their number."""
        if not self.layers:
            return super().describe()
        limit = "" if self.max_tokens is None else f", max_tokens={self.max_tokens}"
        return f"SERE(tuned for {len(self.layers)} sites{limit})"

    def require_artifact(self) -> Artifact:
        """The artifact.

        Raises:
            PolicyError: there is none.
        """
        if self.artifact is None:
            raise PolicyError(
                "SERE needs an artifact: moe_fx.SERE(moe_fx.calibrate(model, batches)), or the path of a saved one"
            )
        return self.artifact


@dataclass(frozen=True, eq=False)
class BEAM(Policy):
    """Switch off the picks that a trained mask router rejects (arXiv 2605.14438).

    Args:
        artifact: ``mask_router`` per site: an ``Artifact``, or the path of one, which is read at once.  None: mask
            routers of zeros, which switch nothing off, to start training from.
        tau: in (0, 1): a pick stays on where the sigmoid of its mask logit reaches it.
        train: whether the mask routers learn.

    Raises:
        PolicyError: a setting outside its range, or an artifact without mask routers.
        ArtifactError: the file at the path cannot be used.
    """

    name: ClassVar[str] = "beam"
    kind: ClassVar[str | None] = "mask_router"
    switches_off: ClassVar[bool] = True

    artifact: Artifact | None = None
    tau: float = 0.5
    train: bool = False

    def __post_init__(self) -> None:
        _set(self, "tau", _number(self, "tau", "strictly between 0 and 1", lambda value: 0 < value < 1))
        if not isinstance(self.train, bool):
            raise PolicyError(f"BEAM's train must be True or False, but got {_show(self.train)}")
        _set(self, "artifact", _artifact(self))
        _set(self, "_masks", {})
        _set(self, "_seen", {})

    def __eq__(self, other: object) -> bool:
        """By value, but a policy that trains is only itself: its masks are state that no two policies share."""
        if not isinstance(other, BEAM) or self.train or other.train:
            return self is other
        return (self.artifact, self.tau) == (other.artifact, other.tau)

    def __hash__(self) -> int:
        return hash((self.artifact, self.tau, self.train))

    def trainable(self, site: str, shape: tuple[int, int], device: torch.device) -> nn.Parameter:
        """The mask router [E, H] that training learns at a site: float32, from the artifact or from zero."""
        masks: dict[str, nn.Parameter] = self._masks  # type: ignore[attr-defined]
        if site in masks and (tuple(masks[site].shape) != shape or masks[site].device != device):
            raise PolicyError(
                f"this BEAM already trains a mask router {list(masks[site].shape)} on {masks[site].device} for site '{site}', "
                f"but the model now has {list(shape)} on {device}: give each model a BEAM(train=True) of its own"
            )
        if site not in masks:
            start = torch.zeros(shape)
            if self.artifact is not None:
                start = self.artifact.tensor(site, "mask_router", *shape).clone()
            masks[site] = nn.Parameter(start.to(device))
        return masks[site]

    def parameters(self) -> list[nn.Parameter]:
        """The mask routers being trained, for an optimiser.  They come into being when the model is first compiled."""
        return list(self._masks.values())  # type: ignore[attr-defined]

    def masks(self) -> dict[str, nn.Parameter]:
        """The mask routers being trained, [E, H] each, by site."""
        return dict(self._masks)  # type: ignore[attr-defined]

    def see(self, logits: Mapping[str, Sequence[Tensor]]) -> None:
        """Take note of the mask logits [T, K] at the picks of a forward: called by the graphs that compute them."""
        # a site that ran twice in one graph has two tensors
        joined = {site: parts[0] if len(parts) == 1 else torch.cat(list(parts)) for site, parts in logits.items()}
        self._seen.update(joined)  # type: ignore[attr-defined]

    def mask_logits(self) -> dict[str, Tensor]:
        """The mask logits of the last forward at its top-K picks, [T, K] float32 by site, with their gradient.

        Raises:
            PolicyError: the policy does not train, or there was no forward yet.
        """
        seen: dict[str, Tensor] = self._seen  # type: ignore[attr-defined]
        if not self.train or not seen:
            why = "there was no forward of a compiled model yet" if self.train else "its train is False"
            raise PolicyError(f"this BEAM has no mask logits, because {why}: they belong to the last forward in training")
        return dict(seen)

    def regularizers(self) -> dict[str, Tensor]:
        """Of the last forward, by site: the mean of sigmoid(mask logit) over the top-K picks, a scalar with its gradient.

        Raises:
            PolicyError: see ``mask_logits``.
        """
        return {site: logits.sigmoid().mean() for site, logits in self.mask_logits().items()}

    def regularizer(self) -> Tensor:
        """Of the last forward: the mean of sigmoid(mask logit) over the top-K picks of all sites, a scalar with its gradient.

        BEAM's loss is that of the language model plus beta times this (arXiv 2605.14438): the L1 norm of the continuous
        masks.  Each forward has its own: with gradient accumulation, add it to the loss of each before its backward.

        Raises:
            PolicyError: see ``mask_logits``.
        """
        logits = list(self.mask_logits().values())
        total = sum(site.sigmoid().sum().to(logits[0].device) for site in logits)
        return total / sum(site.numel() for site in logits)  # type: ignore[return-value]

    def picks(self) -> dict[str, float]:
        """Of the last forward, by site: how many picks of a token are on, on average.  Reading it waits for the device.

        Raises:
            PolicyError: see ``mask_logits``.
        """
        least = math.log(self.tau / (1 - self.tau))
        seen = self.mask_logits()
        return {site: float((x >= least).sum()) / max(1, x.shape[0]) for site, x in seen.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}  # what a forward left cannot be copied with its gradient


@dataclass(frozen=True)
class Baseline(Policy):
    """Base of the policies of other papers.  What each computes stands in ``kernels/baselines.py``, under ``op``.

    ``tables`` are the kinds of tensor that the op reads, and ``settings`` the fields that follow them in its arguments.
    """

    switches_off: ClassVar[bool] = True
    needs_order: ClassVar[bool] = True
    op: ClassVar[str] = ""
    tables: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if type(self) is Baseline:
            raise PolicyError(f"Baseline is only the base: use one of {_class_names()}")
        for key in self.settings:
            check = _count if isinstance(getattr(type(self), key), int) else _share
            _set(self, key, check(self, key))
        if self.tables:
            _set(self, "artifact", _artifact(self))


@dataclass(frozen=True)
class SmallerK(Baseline):
    """Plain smaller K: only each token's first ``k`` picks, weighted as the model itself would with that K."""

    name: ClassVar[str] = "smaller_k"
    op: ClassVar[str] = "smaller_k"
    settings: ClassVar[tuple[str, ...]] = ("k",)

    k: int = 2


@dataclass(frozen=True)
class Drop(Baseline):
    """SERE's primary experts with every other pick switched off: what SERE's moving is worth, seen from below."""

    name: ClassVar[str] = "drop"
    op: ClassVar[str] = "drop"
    settings: ClassVar[tuple[str, ...]] = ("primary",)

    primary: int = 2


@dataclass(frozen=True)
class TopP(Baseline):
    """Top-p routing (arXiv 2403.07652): each token's best picks until they have the share ``p`` of its weight."""

    name: ClassVar[str] = "top_p"
    op: ClassVar[str] = "top_p"
    settings: ClassVar[tuple[str, ...]] = ("p",)

    p: float = 0.8


@dataclass(frozen=True)
class NAEE(Baseline):
    """Dynamic skipping (arXiv 2402.14800): a pick is off where its weight is below ``ratio`` times the first pick's."""

    name: ClassVar[str] = "naee"
    op: ClassVar[str] = "naee_skip"
    settings: ClassVar[tuple[str, ...]] = ("ratio",)

    ratio: float = 0.5


@dataclass(frozen=True)
class OEA(Baseline):
    """Opportunistic expert activation (arXiv 2511.02237): the first ``primary`` picks, and K in all of what others read."""

    name: ClassVar[str] = "oea"
    op: ClassVar[str] = "drop"
    settings: ClassVar[tuple[str, ...]] = ("primary",)

    primary: int = 2


@dataclass(frozen=True)
class ExFold(Baseline):
    """A calibrated scalar fold (arXiv 2608.24938) of every other pick into SERE's primary experts."""

    name: ClassVar[str] = "exfold"
    kind: ClassVar[str | None] = "fold_scale"
    op: ClassVar[str] = "exfold"
    tables: ClassVar[tuple[str, ...]] = ("fold_scale", "fold_gain")
    settings: ClassVar[tuple[str, ...]] = ("primary",)

    artifact: Artifact | None = None
    primary: int = 2


@dataclass(frozen=True)
class StaticPrune(Baseline):
    """Static pruning by frequency: only the ``keep`` experts of each site that were picked most often."""

    name: ClassVar[str] = "static_prune"
    kind: ClassVar[str | None] = "coactivation"
    op: ClassVar[str] = "prune"
    tables: ClassVar[tuple[str, ...]] = ("coactivation",)
    settings: ClassVar[tuple[str, ...]] = ("keep",)

    artifact: Artifact | None = None
    keep: int = 16


# What a configuration can name.
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (TopK, SERE, BEAM, SmallerK, Drop, TopP, NAEE, OEA, ExFold, StaticPrune)
}


def from_config(config: object) -> tuple[Policy, ...]:
    """The policies that a configuration asks for, in the order in which they apply; never empty.

    Args:
        config: None (exact top-K), a ``Policy``, a name such as ``"topk"``, a mapping such as ``{"name": "sere",
            "artifact": "model.moe.safetensors", "primary": 2}``, or a list of these, to apply one after the other.

    Raises:
        PolicyError: an unknown name or key, a bad value, or policies that do not go together.
        ArtifactError: an artifact's file cannot be used.
    """
    if config is None:
        return (TopK(),)
    parts = config if isinstance(config, (list, tuple)) else [config]
    policies = [policy for policy in map(_from_part, parts) if not isinstance(policy, TopK)]
    _check_composition(policies)
    return tuple(policies) or (TopK(),)


def _from_part(part: object) -> Policy:
    if isinstance(part, Policy):
        return part
    if isinstance(part, str):
        return _class_named(part)()
    if isinstance(part, Mapping):
        return _from_mapping(part)
    hint = f": write {part.__name__}(...)" if isinstance(part, type) else ""
    raise PolicyError(
        f"a policy must be one of {_class_names()}, a name, or a mapping with a 'name', but got {_show(part)}{hint}"
    )


def _from_mapping(part: Mapping[Any, Any]) -> Policy:
    if "name" not in part:
        raise PolicyError(f"a policy's mapping needs a 'name', one of {_listed(POLICIES)}, but got {_show(dict(part))}")
    policy_class = _class_named(part["name"])
    settings = {key: value for key, value in part.items() if key != "name"}
    allowed = [field.name for field in dataclasses.fields(policy_class)]
    for key in settings:
        if key not in allowed:
            raise PolicyError(
                f"policy '{policy_class.name}' has no setting {key!r}{_did_you_mean(key, allowed)}: "
                f"it has {_listed(allowed) if allowed else 'none'}"
            )
    return policy_class(**settings)


def _class_named(name: object) -> type[Policy]:
    policy_class = POLICIES.get(name.lower()) if isinstance(name, str) else None
    if policy_class is None:
        hint = _did_you_mean(name, POLICIES)
        raise PolicyError(f"unknown policy {name!r}{hint}: the policies are {_listed(POLICIES)}")
    return policy_class


def _check_composition(policies: Sequence[Policy]) -> None:
    names = [policy.name for policy in policies]
    for name in names:
        if names.count(name) > 1:
            raise PolicyError(f"policy '{name}' is given {names.count(name)} times: give it once")
    baselines = [policy.name for policy in policies if isinstance(policy, Baseline)]
    if baselines and len(policies) > 1:
        raise PolicyError(f"policy '{baselines[0]}' is there to be compared with: give it alone")
    if SERE.name in names and BEAM.name in names and names.index(SERE.name) < names.index(BEAM.name):
        raise PolicyError(
            "SERE comes before BEAM, but SERE must see which picks are off, or it moves them and counts them as "
            "primary: write [BEAM(...), SERE(...)]"
        )


def _artifact(policy: Policy) -> Artifact | None:
    """The policy's artifact, read from its file if it is a path, and sure to hold what the policy reads."""
    given: object = getattr(policy, "artifact")  # noqa: B009  (not every policy has one)
    who = type(policy).__name__
    if given is None:
        return None
    if not isinstance(given, (Artifact, str, os.PathLike)):
        raise PolicyError(f"{who}'s artifact must be a moe_fx.Artifact, a path or None, but got {_show(given)}")
    artifact = given if isinstance(given, Artifact) else Artifact.load(given)
    if policy.kind not in artifact.kinds:
        remedy = "'moe-fx train-beam'" if policy.kind == BEAM.kind else "'moe-fx calibrate'"
        raise PolicyError(
            f"{who} reads {policy.kind} from its artifact, but it has only {_listed(artifact.kinds)}: make one with {remedy}"
        )
    return artifact


def _count(policy: Policy, key: str) -> int:
    return _whole(policy, key, getattr(policy, key))


def _whole(policy: Policy, key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise PolicyError(f"{type(policy).__name__}'s {key} must be an integer of at least 1, but got {_show(value)}")
    return int(value)


def _number(policy: Policy, key: str, allowed: str, is_allowed: Callable[[Any], bool]) -> float:
    return _checked(policy, key, getattr(policy, key), allowed, is_allowed)


def _checked(policy: Policy, key: str, value: object, allowed: str, is_allowed: Callable[[Any], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not is_allowed(value):  # NaN is in no range
        raise PolicyError(f"{type(policy).__name__}'s {key} must be a number {allowed}, but got {_show(value)}")
    return float(value) + 0.0  # -0.0 becomes 0.0, so that equal settings have equal digests


def _share(policy: Policy, key: str) -> float:
    return _number(policy, key, "in [0, 1]", lambda value: 0 <= value <= 1)


def _threshold(policy: Policy, value: object) -> float:
    return _checked(policy, "threshold", value, "in [-1, 1]", lambda number: -1 <= number <= 1)


def _layers(policy: SERE, given: object) -> tuple[tuple[str, int, float], ...]:
    """(site, S, threshold) of every site given, by the site's normal name."""
    layers = []
    for entry in () if given is None else given if isinstance(given, (list, tuple)) else (given,):
        if not isinstance(entry, (list, tuple)) or len(entry) != 3 or not isinstance(entry[0], str):
            raise PolicyError(f"SERE's layers must be (site, S, threshold) each, but got {_show(entry)}")
        site = normal_name(entry[0])
        if policy.artifact is not None and site not in policy.artifact.sites:
            hint = _did_you_mean(site, policy.artifact.sites)
            raise PolicyError(f"SERE's layers have settings for '{site}', but the artifact has no such site{hint}")
        layers.append((site, _whole(policy, "primary", entry[1]), _threshold(policy, entry[2])))
    return tuple(layers)


def _set(policy: Policy, key: str, value: object) -> None:
    object.__setattr__(policy, key, value)  # the way into a frozen dataclass from its own __post_init__


def _did_you_mean(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _class_names() -> str:
    return ", ".join(f"moe_fx.{policy.__name__}" for policy in POLICIES.values())


def _show(value: object) -> str:
    return f"{value!r:.80} ({type(value).__name__})"
