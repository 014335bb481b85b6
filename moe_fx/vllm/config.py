"""The ``moe_fx`` entry of vLLM's ``additional_config``: what it may hold, and how it reaches vLLM's compiler.

    {"moe_fx": {"policy": {"name": "sere", "artifact": "model.moe.safetensors", "primary": 2}, "stats": false}}
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe_fx import __version__
from moe_fx.artifacts import is_artifact
from moe_fx.passes import graph
from moe_fx.policy import BEAM, SERE, Policy, TopK, from_config
from moe_fx.vllm import metrics

KEY = "moe_fx"
OLDEST, NEWEST = (0, 26), (0, 33)  # the minor versions of vLLM whose sources this package was written against
PASS_KEY = "post_grad_custom_post_pass"
SERVED = (SERE, BEAM, TopK)  # the other policies are there to be compared with, outside an engine

#: Every key of the entry and what it may be.  The last two are added by ``prepare``.
OPTIONS = {
    "policy": "a policy, a dict such as {'name': 'sere', 'artifact': 'model.moe.safetensors', 'primary': 2}, or a list of those",
    "stats": "true or false: whether to count active experts while the engine runs",
    "digest": "set by moe_fx itself: of policies and artifacts",
    "source": "set by moe_fx itself: of the code that rewrites graphs",
}


class VllmError(RuntimeError):
    """moe_fx cannot do in vLLM what was asked for; the message says why and what to do."""


@dataclass(frozen=True)
class EngineSettings:
    """What the user asked for: policies in the order in which they apply, and whether active experts are counted."""

    policies: tuple[Policy, ...]
    stats: bool

    @property
    def changes_nothing(self) -> bool:
        """Whether the routing is left alone and not even looked at."""
        return not self.stats and all(isinstance(p, TopK) for p in self.policies)

    @property
    def switches_off(self) -> bool:
        """Whether a policy can leave picks that are off."""
        return any(isinstance(p, BEAM) for p in self.policies)

    @property
    def digest(self) -> str:
        """Hex sha256 over the policies and their artifacts."""
        return hashlib.sha256(json.dumps([p.digest for p in self.policies]).encode()).hexdigest()

    def without_artifacts(self) -> tuple[Policy, ...]:
        """The policies' settings alone, small enough to travel to every process."""
        artifact: dict[str, Any] = {"artifact": None}
        return tuple(replace(p, **artifact) if _has_artifact(p) else p for p in self.policies)


def _has_artifact(policy: Policy) -> bool:
    return any(field.name == "artifact" for field in fields(policy))


def source_digest() -> str:
    """Hex sha256 over the source of all that rewrites graphs here."""
    content = hashlib.sha256()
    for module in (__file__, graph.__file__):
        for file in sorted(Path(module).parent.glob("*.py")):
            content.update(file.read_bytes())
    return content.hexdigest()


def entry_of(vllm_config: Any) -> dict[str, Any] | None:
    """Our entry in a ``VllmConfig``; None where there is none, or where ``additional_config`` is no dict.

    Raises:
        VllmError: it stands under the package's name, ``moe-fx``, or another spelling that would be ignored in silence.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        return None
    for key in additional:
        if key != KEY and str(key).strip().lower().replace("-", "_") == KEY:
            raise VllmError(f"additional_config has an entry '{key}': write it '{KEY}'")
    return additional.get(KEY)


def parse(entry: object) -> EngineSettings:
    """Read our entry.

    Raises:
        VllmError: it is no mapping, has an unknown key, names a policy that is not served, or ``stats`` is no bool.
        PolicyError, ArtifactError: the policy or its artifact cannot be used.
    """
    if not isinstance(entry, Mapping):
        raise VllmError(f"additional_config['{KEY}'] is {entry!r}, expected a mapping such as {{'policy': {{'name': 'sere'}}}}")
    for key in entry:
        if key not in OPTIONS:
            near = difflib.get_close_matches(str(key), OPTIONS, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise VllmError(f"additional_config['{KEY}'] has no option '{key}'{hint}: it has policy, stats")
    stats = entry.get("stats", False)
    if not isinstance(stats, bool):
        raise VllmError(f"additional_config['{KEY}']['stats'] is {stats!r}, expected {OPTIONS['stats']}")
    given = entry.get("policy")
    for part in given if isinstance(given, (list, tuple)) else [given]:
        _check_served(part)
    policies = from_config(given)
    for policy in policies:
        if isinstance(policy, BEAM) and policy.train:
            raise VllmError("BEAM(train=True) cannot train inside vLLM: train with torch.compile, then serve with train=False")
        if _has_artifact(policy) and getattr(policy, "artifact", None) is None and not isinstance(policy, TopK):
            raise VllmError(f"policy '{policy.name}' needs an artifact inside vLLM: add 'artifact': 'model.moe.safetensors'")
    return EngineSettings(policies, stats)


def _check_served(part: object) -> None:
    """Raises VllmError for one part of ``policy`` that names no policy of ``SERVED``."""
    name = part.get("name") if isinstance(part, Mapping) else getattr(part, "name", part)
    served = [policy.name for policy in SERVED]
    if part is None or (isinstance(name, str) and name.lower() in served):
        return
    near = difflib.get_close_matches(str(name).lower(), served, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise VllmError(f"no policy {name!r} runs inside vLLM{hint}: it is 'sere', 'beam', a list of both, or 'topk'")


def is_supported() -> bool:
    """Whether the installed vLLM is inside the supported range."""
    parts = importlib.import_module("vllm").__version__.split(".")[:2]
    return all(p.isdigit() for p in parts) and OLDEST <= tuple(int(p) for p in parts) <= NEWEST


def check_version() -> None:
    """Raises VllmError where the installed vLLM is outside the supported range."""
    if not is_supported():
        version = importlib.import_module("vllm").__version__
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise VllmError(
            f"moe_fx {__version__} supports vLLM {low} to {high}, but vLLM {version} is installed: install one of "
            f"those, or remove '{KEY}' from additional_config"
        )


def engine_args(policy: object = None, *, stats: bool = False) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM`` and ``AsyncEngineArgs`` that apply a policy: ``LLM(model, **engine_args(policy=...))``.

    Args:
        policy: what ``torch.compile``'s option ``policy`` takes.  vLLM's processes read artifacts from files, so an artifact
            is written to the user's cache directory, under a name that is the same at the next start.
        stats: whether active experts are counted; read them with ``moe_fx.vllm.stats()`` or on vLLM's ``/metrics``.

    Raises:
        VllmError, PolicyError, ArtifactError: it cannot be used inside vLLM.
    """
    settings = parse({"policy": policy, "stats": stats})
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and KEY not in allowed.split(",") and not settings.changes_nothing:
        raise VllmError(f"VLLM_PLUGINS is '{allowed}', so vLLM will not load moe_fx: add '{KEY}' to it")
    entry = {"policy": [_as_config(p) for p in settings.policies], "stats": settings.stats}
    return {"additional_config": {KEY: entry}}


def _as_config(policy: Policy) -> dict[str, Any]:
    """A policy as JSON, its artifact as the absolute path of a file."""
    config: dict[str, Any] = {"name": policy.name}
    config |= {f.name: getattr(policy, f.name) for f in fields(policy)}
    artifact = config.get("artifact")
    if artifact is not None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_fx"
        folder.mkdir(parents=True, exist_ok=True)
        config["artifact"] = str(artifact.save(folder / f"{artifact.digest[:32]}.moe.safetensors").resolve())
    return config


def prepare(vllm_config: Any) -> EngineSettings | None:
    """Put our pass into a ``VllmConfig``, behind any pass that is there.  Does it once; None where nothing is asked for.

    Digests of all that the rewritten graph depends on go into ``additional_config``, which is part of the key under which
    vLLM keeps compiled graphs.

    Raises:
        VllmError, PolicyError, ArtifactError: what was asked for cannot be had.
    """
    entry = entry_of(vllm_config)
    if entry is None:
        return None
    check_version()
    settings = parse(entry)
    if settings.changes_nothing:
        return None
    digest = settings.digest
    if entry.get("digest") not in (None, digest):
        raise VllmError("the policy's artifact changed while the engine was starting: start it again")
    _check_travels(entry)
    _check_compiles(vllm_config)
    _check_place(vllm_config)
    if settings.stats:
        metrics.collect_here()
    from moe_fx.vllm.graph_pass import RoutingPass

    compilation, source = vllm_config.compilation_config, source_digest()
    found = compilation.inductor_compile_config.get(PASS_KEY)
    if not isinstance(found, RoutingPass) or found.digest != digest + source:
        # a caller's own CompilationConfig may have served another engine, with another policy
        before = found.before if isinstance(found, RoutingPass) else found
        ours = RoutingPass(digest + source, settings.without_artifacts(), before)
        compilation.inductor_compile_config = {**compilation.inductor_compile_config, PASS_KEY: ours}
    # copies: the dicts may be the caller's own
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: {**entry, "digest": digest, "source": source}}
    return settings


def _check_travels(entry: Mapping[str, Any]) -> None:
    """Raises VllmError for an entry that vLLM cannot hash, because it holds policies that are no dicts."""
    try:
        json.dumps(entry)
    except TypeError:
        raise VllmError(
            f"additional_config['{KEY}'] holds objects, but it must be JSON: write policies as dicts, or have "
            "moe_fx.vllm.engine_args(policy=...) do it"
        ) from None


def _check_compiles(vllm_config: Any) -> None:
    """Raises VllmError where vLLM would run the model, or decode with it, without compiling it, so that no pass would see it."""
    compilation = vllm_config.compilation_config
    if vllm_config.model_config is not None and vllm_config.model_config.enforce_eager:
        raise VllmError("moe_fx rewrites compiled graphs, and enforce_eager compiles none: leave enforce_eager out")
    if getattr(compilation.mode, "name", None) in ("NONE", "STOCK_TORCH_COMPILE") or compilation.backend not in ("", "inductor"):
        raise VllmError(
            f"moe_fx rewrites graphs that vLLM compiles with Inductor, but the compilation mode is {compilation.mode!r} and the "
            f"backend '{compilation.backend}': leave both at their defaults (on a CPU vLLM does not compile with LoRA)"
        )
    # from vLLM 0.33 on; both run some decode steps of DeepSeek-V4 elsewhere, and the warm-up's in the compiled graph
    decode = vllm_config.additional_config.get("decode_backend", "auto")
    if decode != "auto":
        raise VllmError(f"moe_fx rewrites compiled graphs, and decode_backend '{decode}' decodes without one: leave it out")
    if getattr(getattr(vllm_config, "kernel_config", None), "monokernel", False):
        raise VllmError("moe_fx rewrites compiled graphs, and --monokernel decodes without one: leave it out")


def _check_place(vllm_config: Any) -> None:
    """Raises VllmError where vLLM would take an artifact for a file of the model's weights, and then fail in words of its own."""
    model = Path(vllm_config.model_config.model) if vllm_config.model_config is not None else None
    if model is None or not model.is_dir() or (model / "model.safetensors.index.json").exists():
        return
    for file in sorted(model.glob("*.safetensors")):
        if is_artifact(file):
            raise VllmError(
                f"the artifact {file} lies in the model's folder, where vLLM takes every .safetensors file for weights: move it "
                "to another folder"
            )
