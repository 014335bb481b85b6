"""Artifacts: the per-site tensors a policy needs, and the one safetensors file a model's tensors are kept in.

The file holds one tensor per site and kind, under the key ``<site>/<kind>``.  The kind is what follows the last slash,
so that a module's name may contain slashes.  The safetensors header carries ``moe_fx.format`` (the version of this
layout), ``moe_fx.versions`` (the libraries that made the tensors) and every metadata entry, each as a JSON string.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moe_fx.site import Site, normal_name

FORMAT = 1
_FORMAT_KEY = "moe_fx.format"
_VERSIONS_KEY = "moe_fx.versions"
_RESERVED_PREFIX = "moe_fx."
_SAMPLED = 64  # weights that an artifact remembers of its model
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

# What each kind of tensor looks like, and how a user gets a good one.
_KIND_TO_SHAPE = {
    "similarity": "[E, E]",
    "mask_router": "[E, H]",
    "fold_scale": "[E, E]",
    "fold_gain": "[E, E]",
    "coactivation": "[E, E]",
}
_RECALIBRATE = "recalibrate with 'moe-fx calibrate' or moe_fx.calibrate(model, batches)"
_KIND_TO_REMEDY = {
    **dict.fromkeys(_KIND_TO_SHAPE, _RECALIBRATE),
    "mask_router": "retrain it with 'moe-fx train-beam' or moe_fx.beam",
}


class ArtifactError(ValueError):
    """An artifact cannot be made, read, written or used; the message says what to do."""


class Artifact:
    """Per-site tensors for one model.

    Site names are brought to normal form (``moe_fx.site.normal_name``).  Tensors are copied: float32, on the CPU,
    contiguous, without gradient; treat them as read-only, because the digest is taken once.

    Args:
        sites: site name -> kind -> tensor.  ``similarity`` is [E, E], and similarity[u, v] says how well expert v
            stands in for expert u.  ``mask_router`` is [E, H].  ``fold_scale``, ``fold_gain`` and ``coactivation`` are
            [E, E], as ``moe_fx.kernels.baselines`` describes them.  All values are finite.
        metadata: anything JSON can hold, under string keys.  Entries with a meaning here: ``model`` (from
            ``model_identity``) and ``hidden_sizes`` (site name -> H), both compared by ``validate`` and the second by
            ``tensor`` too; ``tuned`` (site name -> [S, threshold]), which ``SERE`` takes where it is given neither;
            ``metric``, ``calibrated_on`` and ``command`` are kept for people.

    Raises:
        ArtifactError: unknown kind, wrong shape or dtype, NaN or infinity, two names for one site, or metadata that
            JSON cannot hold.

    Two artifacts are equal when their tensors are: metadata and library versions do not count.
    """

    def __init__(
        self, sites: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, object] | None = None
    ) -> None:
        if not isinstance(sites, Mapping) or not sites:
            raise ArtifactError(f"an artifact needs a mapping with at least one site, but got {_show(sites)}")
        self._metadata = MappingProxyType(_check_metadata({} if metadata is None else metadata))
        self._versions: Mapping[str, str] = MappingProxyType(_library_versions())
        checked: dict[str, Mapping[str, Tensor]] = {}
        for given, kinds in sites.items():
            name = _check_name(given)
            if name in checked:
                raise ArtifactError(f"two sites are called '{name}' (one is given as '{given}'): keep one of them")
            checked[name] = MappingProxyType(_check_site(name, kinds))
        self._sites = MappingProxyType(dict(sorted(checked.items())))
        self._hidden_sizes = _check_hidden_sizes(self._metadata.get("hidden_sizes", {}), self._sites)
        self._digest: str | None = None

    @property
    def sites(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Site name -> kind -> tensor, read-only, sorted by name."""
        return self._sites

    @property
    def metadata(self) -> Mapping[str, object]:
        """The metadata as given, after one trip through JSON (so a tuple has become a list)."""
        return self._metadata

    @property
    def versions(self) -> Mapping[str, str]:
        """The library versions the tensors were made with; those in the file, for a loaded artifact."""
        return self._versions

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensor that at least one site has, sorted."""
        return tuple(sorted({kind for kinds in self._sites.values() for kind in kinds}))

    @property
    def digest(self) -> str:
        """Hex sha256 over site names, kinds, shapes and values, whatever the order they were given in."""
        if self._digest is None:
            content = hashlib.sha256()
            for name, kinds in self._sites.items():
                for kind, tensor in kinds.items():
                    content.update(json.dumps([name, kind, list(tensor.shape)]).encode())
                    content.update(tensor.numpy().tobytes())
            self._digest = content.hexdigest()
        return self._digest

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Artifact) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        experts = sorted({_num_experts(kinds) for kinds in self._sites.values()})
        shown = ", ".join([*self.kinds, f"E={'/'.join(map(str, experts))}", f"digest={self.digest[:8]}"])
        return f"Artifact({_count(len(self._sites), 'site')}, {shown})"

    def __deepcopy__(self, memo: dict[int, object]) -> Artifact:
        return self  # nothing in it changes, and the proxies cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        sites = {name: dict(kinds) for name, kinds in self._sites.items()}
        return _rebuild, (sites, dict(self._metadata), dict(self._versions))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read an artifact.

        Raises:
            ArtifactError: the file is missing, cut off, not safetensors, not an artifact, of a newer format, or holds
                tensors that the constructor refuses.
        """
        file = _as_path(path)
        try:
            _check_readable(file)
            versions, metadata = _parse_header_metadata(file, _read_header(file))
            sites = _read_sites(file)
        except OSError as error:
            raise ArtifactError(f"cannot read {file}: {error}") from error
        try:
            return _rebuild(sites, metadata, versions)
        except ArtifactError as error:
            raise ArtifactError(f"{file}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact to ``path`` and return the path.

        The file appears whole or not at all: it is written beside its place and moved there, so a full disk or a kill
        leaves an older file as it was.

        Raises:
            ArtifactError: the path is a directory or a device, its directory is missing, or writing fails.
        """
        file = _as_path(path)
        tensors = {f"{name}/{kind}": tensor for name, kinds in self._sites.items() for kind, tensor in kinds.items()}
        header = {key: json.dumps(value) for key, value in self._metadata.items()}
        header |= {_FORMAT_KEY: json.dumps(FORMAT), _VERSIONS_KEY: json.dumps(dict(self._versions))}
        write_safetensors(file, tensors, header)
        return file

    def tensor(self, site_name: str, kind: str, num_experts: int, hidden_size: int | None = None) -> Tensor:
        """The tensor of one kind at one site, after checking that it fits the router found there.

        Args:
            site_name: any form of the site's name.
            kind: ``"similarity"`` or ``"mask_router"``.
            num_experts: E, the number of experts the router scores.
            hidden_size: H, the width of the router's input, where it is known.

        Raises:
            ArtifactError: the artifact lacks the site or the kind, or E or H differ.
        """
        if kind not in _KIND_TO_SHAPE:
            raise ArtifactError(f"there is no tensor of kind '{kind}': the kinds are {', '.join(_KIND_TO_SHAPE)}")
        name = normal_name(site_name)
        problem = self._missing(name, kind) or self._misfit(name, kind, num_experts, hidden_size)
        if problem is not None:
            raise ArtifactError(f"{problem}: {self._whole(name) or _KIND_TO_REMEDY[kind]}")
        return self._sites[name][kind]

    def validate(self, model_or_sites: nn.Module | Iterable[Site]) -> Artifact:
        """Check that every tensor fits, that no site is missing and that none is left over; return the artifact.

        Given sites (``report.sites``), the check is exact.  Given a model, nothing is traced: each site must be a
        module below which some two-dimensional parameter looks like the router ([E, H]), every other module of the
        same class with such a parameter must be a site too, and the model's class must be the one in
        ``metadata["model"]``, if that is there, unless all names and shapes of its parameters are the same.

        Raises:
            ArtifactError: with all the problems found.
        """
        if isinstance(model_or_sites, nn.Module):
            problems = list(self._problems_with_model(model_or_sites))
            what = f"a model of class {type(_unwrap(model_or_sites)).__name__}"
        else:
            sites = _check_are_sites(model_or_sites)
            problems = list(self._problems_with_sites(sites))
            what = f"the {_count(len(sites), 'site')} given"
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in problems)
            raise ArtifactError(f"the artifact does not fit {what}:{listed}\nTo make one that does, {_RECALIBRATE}.")
        return self

    def _missing(self, name: str, kind: str) -> str | None:
        if name not in self._sites:
            return f"the artifact has no site '{name}' (it has {_some_of(self._sites)})"
        if kind not in self._sites[name]:
            return f"the artifact has no {kind} for site '{name}' (it has {_some_of(self._sites[name])})"
        return None

    def _whole(self, name: str) -> str | None:
        """What to do where a part of the model was compiled that the artifact is of; None if it does not look like that."""
        likely = [site for site in self._sites if not name or site.endswith(f".{name}")]
        if name in self._sites or not likely:
            return None
        return (
            f"if what was compiled is only a part of the model that has '{likely[0]}', compile the whole model, which tells the "
            "part's layers by their names"
        )

    def _misfit(self, name: str, kind: str, num_experts: int, hidden_size: int | None) -> str | None:
        shape = list(self._sites[name][kind].shape)
        if shape[0] != num_experts:
            return f"{kind} for site '{name}' is {shape} but the router has {num_experts} experts"
        expected = self._hidden_size(name)
        if hidden_size is None or expected is None or expected == hidden_size:
            return None
        if kind == "mask_router":
            return f"{kind} for site '{name}' is {shape} but the router's input has width {hidden_size}"
        return f"{kind} for site '{name}' was made at hidden size {expected} but the router's input has {hidden_size}"

    def _hidden_size(self, name: str) -> int | None:
        """H at a site, where the artifact tells: by the shape of a mask router, or by its metadata."""
        kinds = self._sites[name]
        return kinds["mask_router"].shape[1] if "mask_router" in kinds else self._hidden_sizes.get(name)

    def _problems_with_sites(self, sites: Mapping[str, Site]) -> Iterator[str]:
        for name, site in sites.items():
            for kind in self.kinds:
                problem = self._missing(name, kind) or self._misfit(name, kind, site.num_experts, site.hidden_size)
                if problem is not None:
                    yield problem
                if name not in self._sites:
                    break
        for name in self._sites:
            if name not in sites:
                yield f"site '{name}' of the artifact is not among them (they are {_some_of(sites)})"

    def _problems_with_model(self, model: nn.Module) -> Iterator[str]:
        yield from _other_model(self._metadata.get("model"), model)
        yield from _other_revision(self._metadata.get("weights_sample"), model)
        name_to_module = _modules_by_name(model)
        listed = {id(name_to_module[name]) for name in self._sites if name in name_to_module}
        router_names: dict[type, set[str]] = {}
        for name, kinds in self._sites.items():
            if name not in name_to_module:
                yield f"site '{name}' of the artifact is not a module of the model"
                continue
            module = name_to_module[name]
            matrices = _matrices(module)
            routers = self._routers_among(name, matrices)
            if not routers:
                yield self._no_router(name, kinds, matrices)
            yield from (problem for kind in self.kinds if (problem := self._missing(name, kind)) is not None)
            router_names.setdefault(type(module), set()).update(routers)
        for name, module in name_to_module.items():
            # Its class alone does not tell: a decoder layer that routes and one that does not can share a class.
            routers = router_names.get(type(module), set())
            if routers and id(module) not in listed and routers & _matrices(module).keys():
                yield f"the artifact lacks site '{name}', a {type(module).__name__} like the others"

    def _routers_among(self, name: str, matrices: Mapping[str, tuple[int, int]]) -> set[str]:
        num_experts, hidden_size = _num_experts(self._sites[name]), self._hidden_size(name)
        return {m for m, (rows, columns) in matrices.items() if rows == num_experts and hidden_size in (None, columns)}

    def _no_router(self, name: str, kinds: Mapping[str, Tensor], matrices: Mapping[str, tuple[int, int]]) -> str:
        has = " and ".join(f"{kind} {list(tensor.shape)}" for kind, tensor in kinds.items())
        wanted = f"[{_num_experts(kinds)}, {self._hidden_size(name) or 'H'}]"
        there = _some_of({f"{m} {list(shape)}": None for m, shape in matrices.items()}, quote="")
        return f"site '{name}' has {has}, but no parameter there is a router of shape {wanted} (it has {there})"


def model_identity(model: nn.Module) -> dict[str, object]:
    """What tells one model from another without looking at its values, for an artifact's ``metadata["model"]``.

    ``class``: the class's name.  ``num_parameters``: how many numbers it learns.  ``name_or_path``: from its config,
    where there is one.  ``fingerprint``: hex sha256 over the sorted names and shapes of its parameters, so that two
    trainings of one architecture share it and two sizes do not.  Wrappers such as ``torch.compile`` change nothing.
    """
    inner = _unwrap(model)
    parameters = sorted((normal_name(name), list(parameter.shape)) for name, parameter in model.named_parameters())
    config = getattr(inner, "config", None)
    name_or_path = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    identity: dict[str, object] = {
        "class": type(inner).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
    }
    return identity | ({"name_or_path": str(name_or_path)} if name_or_path else {})


def weights_sample(model: nn.Module) -> list[float]:
    """A few of a model's weights, for an artifact's metadata: another training of the same architecture has others."""
    named = sorted(_unwrap(model).named_parameters(), key=lambda named: named[0])  # of matrices: what norms learn hardly moves
    learned = [p for _, p in named if p.is_floating_point() and p.dim() > 1 and p.numel() and not p.is_meta]
    chosen = [learned[i * len(learned) // _SAMPLED] for i in range(_SAMPLED)] if learned else []
    places = [(p, p.numel() * (2 * i + 1) // (2 * _SAMPLED)) for i, p in enumerate(chosen)]
    return [float(f"{float(p.detach()[_unravelled(place, p.shape)]):.6g}") for p, place in places]


def _unravelled(place: int, shape: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        index.append(place % size)
        place //= size
    return tuple(reversed(index))


def _other_revision(recorded: object, model: nn.Module) -> Iterator[str]:
    """A problem if the weights are not those the artifact was made on, other than by rounding to a shorter format."""
    if not isinstance(recorded, list) or not recorded:
        return
    now = weights_sample(model)
    if len(now) == len(recorded) and not all(abs(a - b) <= 0.005 * abs(a) + 1e-6 for a, b in zip(recorded, now, strict=True)):
        yield "it was made on another revision of this model: some of its weights differ"


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        ArtifactError: the path is a directory or a device, its directory is missing, or writing fails.
    """
    import safetensors.torch

    check_writable(file)
    write_file(file, _with_sorted_header(safetensors.torch.save(dict(tensors), metadata=dict(header))))


def write_file(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        ArtifactError: the path is a directory or a device, its directory is missing, or writing fails.
    """
    check_writable(file)
    try:
        _write_atomically(file.resolve(), content)  # links stay links
    except OSError as error:
        raise ArtifactError(f"cannot save to {file}: {error}; what was there before is unchanged") from error


def _with_sorted_header(content: bytes) -> bytes:
    """The same file with its header's entries in order: the library writes them in any, and equal files would differ."""
    length_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length_bytes])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length_bytes :]


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's entries and the tensors of a safetensors file.

    Raises:
        ArtifactError: the file is missing, cut off or not safetensors.
    """
    import safetensors.torch

    try:
        _check_readable(file)
        header = _read_header(file).get("__metadata__", {})
        return dict(header), safetensors.torch.load_file(str(file))
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{file}: {error}") from None


def is_artifact(file: Path) -> bool:
    """Whether a file is an artifact, by its header alone: no tensor is read."""
    try:
        return _FORMAT_KEY in _read_header(file).get("__metadata__", {})
    except (ArtifactError, OSError):
        return False


def _check_name(given: object) -> str:
    if not isinstance(given, str):
        raise ArtifactError(f"a site's name must be a str such as 'model.layers.3.mlp', but got {_show(given)}")
    return normal_name(given)


def _check_site(name: str, kinds: object) -> dict[str, Tensor]:
    if not isinstance(kinds, Mapping) or not kinds:
        raise ArtifactError(
            f"site '{name}' needs a mapping of kind to tensor such as {{'similarity': tensor}}, but got {_show(kinds)}"
        )
    checked = {kind: _check_tensor(name, kind, kinds[kind]) for kind in sorted(kinds, key=str)}
    experts = {kind: tensor.shape[0] for kind, tensor in checked.items()}
    if len(set(experts.values())) > 1:
        came = " and ".join(f"{kind} has {rows}" for kind, rows in experts.items())
        raise ArtifactError(f"site '{name}' must have one number of experts, but {came}: make both from one model")
    return checked


def _check_tensor(name: str, kind: object, tensor: object) -> Tensor:
    if kind not in _KIND_TO_SHAPE:
        raise ArtifactError(
            f"site '{name}' has a tensor of unknown kind {kind!r}: expected one of {', '.join(_KIND_TO_SHAPE)}"
        )
    wanted = f"{kind} for site '{name}' must be a float tensor {_KIND_TO_SHAPE[kind]}"
    remedy = _KIND_TO_REMEDY[kind]
    if not isinstance(tensor, Tensor):
        raise ArtifactError(f"{wanted}, but got {_show(tensor)}: {remedy}")
    shape = list(tensor.shape)
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
        raise ArtifactError(f"{wanted} with values, but got {_show(tensor)}: {remedy}")
    if len(shape) != 2 or 0 in shape or (kind != "mask_router" and shape[0] != shape[1]):
        raise ArtifactError(f"{wanted}, but it is {shape}: {remedy}")
    with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode could not be trained later
        copy = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    bad = int((~copy.isfinite()).sum())
    if bad:
        raise ArtifactError(f"{kind} for site '{name}' has {bad} of {copy.numel()} values NaN or infinite: {remedy}")
    return copy


def _check_metadata(metadata: object) -> dict[str, object]:
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise ArtifactError(f"metadata must be a mapping with str keys, but got {_show(metadata)}")
    for key in metadata:
        if key.startswith(_RESERVED_PREFIX):
            raise ArtifactError(f"metadata key '{key}' is reserved: choose one that does not start with 'moe_fx.'")
    return {key: _through_json(key, value) for key, value in metadata.items()}


def _through_json(key: str, value: object) -> object:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"metadata '{key}' must be something JSON can hold: {error}") from None


def _check_hidden_sizes(given: object, sites: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    if not isinstance(given, Mapping) or not all(isinstance(size, int) for size in given.values()):
        raise ArtifactError(f"metadata 'hidden_sizes' must map site names to integers, but got {_show(given)}")
    sizes = {_check_name(name): size for name, size in given.items()}
    for name, size in sizes.items():
        if "mask_router" in sites.get(name, {}) and (came := list(sites[name]["mask_router"].shape))[1] != size:
            raise ArtifactError(f"site '{name}' has hidden size {size} in the metadata but a mask_router {came}")
    return sizes


def _check_are_sites(given: Iterable[Site]) -> dict[str, Site]:
    """Name -> site; one site may come several times, once per graph."""
    sites = list(given) if isinstance(given, Iterable) else [given]
    wrong = [site for site in sites if not isinstance(site, Site)]
    if wrong:
        raise ArtifactError(f"validate needs a torch.nn.Module or moe_fx.Site objects, but got {_show(wrong[0])}")
    return {normal_name(site.name): site for site in sites}


def _as_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ArtifactError(f"an artifact's path must be a str or a path, but got {_show(path)}")
    return Path(path).expanduser()


def _check_readable(file: Path) -> None:
    if not file.exists():
        raise ArtifactError(f"there is no artifact {file}: check the path, or make one: {_RECALIBRATE}")
    if file.is_dir():
        raise ArtifactError(f"{file} is a directory: name the artifact's file in it, such as model.moe.safetensors")
    if not file.is_file():
        raise ArtifactError(f"{file} is not a regular file: name an artifact's file")


def check_writable(file: Path) -> None:
    """Say what is wrong with a place for a file, before the work whose result is to be kept there.

    Raises:
        ArtifactError: it is a directory or a device, or its directory is missing.
    """
    if file.exists() and not file.is_file():
        raise ArtifactError(f"cannot save to {file}: it is not a regular file; name a file to write")
    if not file.resolve().parent.is_dir():
        raise ArtifactError(f"cannot save to {file}: there is no directory {file.resolve().parent}; create it first")


def _read_header(file: Path) -> dict[str, Any]:
    """The safetensors header: 8 bytes of length, then JSON.

    The library checks it too, but its errors do not tell a file that was cut off from one of another format.
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length_bytes = int.from_bytes(stream.read(8), "little")
        text = stream.read(min(length_bytes, _MAX_HEADER_BYTES))
    if size_bytes > 8 and (length_bytes > _MAX_HEADER_BYTES or not text.startswith(b"{")):
        raise ArtifactError(f"{file} is not a safetensors file (and nothing else is read): {_RECALIBRATE}")
    if size_bytes < 8 + length_bytes or not text:
        raise _cut_off(file)
    try:
        header = json.loads(text)
        end_bytes = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file} has a damaged safetensors header ({error}): {_RECALIBRATE}") from None
    if isinstance(end_bytes, int) and size_bytes < 8 + length_bytes + end_bytes:
        raise _cut_off(file)
    return header


def _cut_off(file: Path) -> ArtifactError:
    return ArtifactError(f"{file} is cut off: copy it again, or {_RECALIBRATE}")


def _parse_header_metadata(file: Path, header: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, object]]:
    """The library versions and the user's metadata, of a format that this version knows."""
    entries = header.get("__metadata__")
    if not isinstance(entries, dict) or _FORMAT_KEY not in entries:
        raise ArtifactError(
            f"{file} is a safetensors file but not a moe_fx artifact (no '{_FORMAT_KEY}' in its header; model weights, "
            f"perhaps): {_RECALIBRATE}"
        )
    try:
        version = int(entries.pop(_FORMAT_KEY))
        # Of a newer format nothing but its number can be trusted.
        values = {key: json.loads(text) for key, text in entries.items()} if 1 <= version <= FORMAT else {}
        versions = {str(library): str(number) for library, number in values.pop(_VERSIONS_KEY, {}).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file} has damaged metadata ({error}): {_RECALIBRATE}") from None
    if version > FORMAT:
        raise ArtifactError(f"{file} has format {version}, this moe_fx reads format {FORMAT}: upgrade moe_fx")
    if version < 1:
        raise ArtifactError(f"{file} has format {version}, which does not exist: {_RECALIBRATE}")
    return versions, {key: value for key, value in values.items() if not key.startswith(_RESERVED_PREFIX)}


def _read_sites(file: Path) -> dict[str, dict[str, Tensor]]:
    import safetensors

    sites: dict[str, dict[str, Tensor]] = {}
    try:
        with safetensors.safe_open(str(file), framework="pt", device="cpu") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping: it cannot be iterated)
                name, slash, kind = key.rpartition("/")
                if not slash:
                    raise ArtifactError(f"{file} has a tensor '{key}': expected '<site>/<kind>'; {_RECALIBRATE}")
                sites.setdefault(name, {})[kind] = opened.get_tensor(key)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{file} is damaged ({error}): {_RECALIBRATE}") from None
    return sites


def _write_atomically(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".moe_fx-{uuid.uuid4().hex}.tmp")
    with _removed_on_failure(temporary):
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)


@contextmanager
def _removed_on_failure(file: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _rebuild(sites: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, object], versions: dict) -> Artifact:
    artifact = Artifact(sites, metadata)
    artifact._versions = MappingProxyType(versions)
    return artifact


def _modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Normal name -> module.  A wrapper and what it wraps share a name: the wrapped module, which comes later, wins."""
    return {normal_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def _unwrap(model: nn.Module) -> nn.Module:
    return _modules_by_name(model)[""]


def _matrices(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> shape of every two-dimensional parameter below a module."""
    named = ((normal_name(name), parameter.shape) for name, parameter in module.named_parameters())
    return {name: (shape[0], shape[1]) for name, shape in named if len(shape) == 2}


def _other_model(recorded: object, model: nn.Module) -> Iterator[str]:
    """A problem if the artifact was made on a model of another class.

    The fingerprint alone must not decide: a resized vocabulary or an attached adapter changes it, and the artifact
    stays good.
    """
    if not isinstance(recorded, Mapping) or "class" not in recorded:
        return
    if recorded["class"] in {base.__name__ for base in type(_unwrap(model)).__mro__}:
        return
    identity = model_identity(model)
    if recorded.get("fingerprint") != identity["fingerprint"]:
        yield f"it was made on another model, a {recorded['class']}, and this is a {identity['class']}"


def _num_experts(kinds: Mapping[str, Tensor]) -> int:
    return next(iter(kinds.values())).shape[0]


def _library_versions() -> dict[str, str]:
    from moe_fx import __version__

    return {"moe_fx": __version__, "torch": str(torch.__version__)}


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return f"{value!r:.80} ({type(value).__name__})"


def _some_of(names: Iterable[str], most: int = 3, quote: str = "'") -> str:
    listed = list(names)
    shown = ", ".join(f"{quote}{name}{quote}" for name in listed[:most]) or "none"
    return shown + (f" and {len(listed) - most} more, {len(listed)} in all" if len(listed) > most else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
