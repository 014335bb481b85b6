"""The compiler that gets the rewritten graph: the options ``inner``, ``inner_options`` and ``mode``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moe_fx.passes.dynamo_form import write_as_dynamo, writes_to_what_is_given
from moe_fx.pipeline import Settings
from moe_fx.policy import BEAM


class OptionError(ValueError):
    """An option of the backend is wrong; the message says what was expected."""


INNER = "the name of a torch.compile backend, or a callable (graph_module, example_inputs) -> callable"
INNER_OPTIONS = "a dict, handed to the inner compiler as its options"
#: The names under which Torch-TensorRT registers itself, when it is imported.
TENSORRT = ("torch_tensorrt", "tensorrt", "aot_torch_tensorrt_aten")

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def inner_compiler(inner: object, inner_options: object, mode: str | None, settings: Settings) -> Compiler:
    """What compiles a rewritten graph.

    Raises:
        OptionError: there is no such compiler, it cannot be used here, or it cannot run what ``settings`` ask for.
    """
    if inner_options is not None and not isinstance(inner_options, Mapping):
        raise OptionError(f"option 'inner_options' is {inner_options!r}, expected {INNER_OPTIONS}")
    kwargs: dict[str, Any] = {} if inner_options is None else {"options": dict(inner_options)}
    if callable(inner):
        return lambda gm, inputs: inner(gm, inputs, **kwargs)
    if not isinstance(inner, str):
        raise OptionError(f"option 'inner' is {inner!r}, expected {INNER}")
    if inner == "inductor":
        # the wrapper torch.compile itself uses, so that mode and options mean what they mean there
        return torch._TorchCompileInductorWrapper(mode, kwargs.get("options"), None)
    if mode not in (None, "default"):
        raise OptionError(f"mode={mode!r} is for the inner compiler 'inductor', and inner is '{inner}'")
    if inner in TENSORRT:
        return _tensorrt(inner, kwargs.get("options", {}), settings)
    known = torch._dynamo.list_backends(exclude_tags=())
    if inner == "moe_sparse" or inner not in known:
        names = ", ".join(sorted({*known, TENSORRT[0]} - {"moe_sparse"}))
        raise OptionError(f"unknown inner compiler '{inner}': expected one of {names}, or a callable")
    backend = torch._dynamo.lookup_backend(inner)
    return lambda gm, inputs: backend(gm, inputs, **kwargs)


# Torch-TensorRT


def _tensorrt(name: str, options: dict[str, Any], settings: Settings) -> Compiler:
    """Torch-TensorRT, with the user's options.

    Our ops have no converter, so that its partitioner leaves them to PyTorch, between engines.  A graph that writes to its
    inputs, as one with a static key/value cache does, is traced by AOTAutograd, which that option stands for: by default
    Torch-TensorRT traces copies of the inputs, and what is written to them is lost.
    """
    _refuse_what_has_no_engine(name, settings)
    module = _import_torch_tensorrt(name)
    options = {**options, "torch_executed_ops": _executed_by_torch(options.get("torch_executed_ops"), module.__version__)}
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)

    def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        traced = {"use_distributed_mode_trace": True} if writes_to_what_is_given(gm) else {}
        write_as_dynamo(gm, inputs)
        return backend(gm, inputs, options={**traced, **options})

    return compile_graph


def _refuse_what_has_no_engine(name: str, settings: Settings) -> None:
    if any(isinstance(p, BEAM) and p.train for p in settings.policies):
        raise OptionError(f"inner '{name}' cannot train BEAM: engines have no backward. Train with 'inductor' or 'aot_eager'")


def _import_torch_tensorrt(name: str) -> Any:
    """Import the package, which registers its backends.  It asks for a GPU when it is imported."""
    release = ".".join(torch.__version__.split(".")[:2])
    install = f"pip install 'torch-tensorrt=={release}.*' (or 'torch-tensorrt-rtx=={release}.*', for TensorRT for RTX)"
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise OptionError(f"inner '{name}' needs the package torch_tensorrt, which is not installed: {install}")
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # it raises all kinds, for a missing GPU, driver or library
        raise OptionError(
            f"inner '{name}' needs the package torch_tensorrt, which is installed but cannot be imported "
            f"({type(error).__name__}: {error}). It wants a CUDA device (found: {torch.cuda.device_count()}), a PyTorch for CUDA "
            f"and of its own release (found: {torch.__version__}), and TensorRT: {install}"
        ) from error


def _executed_by_torch(given: object, version: str) -> set[Any]:
    """The ops that the user keeps out of engines, and those that Torch-TensorRT cannot be asked about.

    Before 2.14 its partitioner dies of an IndexError at a sort that leaves the dimension to its default, with which
    transformers' ``grouped_mm`` experts begin (pytorch/TensorRT issue 3777).
    """
    if given is not None and (isinstance(given, str) or not isinstance(given, (set, frozenset, list, tuple))):
        raise OptionError(
            f"'torch_executed_ops' in inner_options is {given!r}, expected a set of ops or of their names, such as "
            "{torch.ops.aten.topk.default} or {'torch.ops.aten.topk.default'}"
        )
    unreadable = {torch.ops.aten.sort.default} if torch.torch_version.TorchVersion(version) < "2.14" else set()
    return {*(given or ()), *unreadable}
