"""Trace a model apart from every other compilation of it, to look at its graphs.

Dynamo keeps what it compiled with the code object of a function, for all models of a class, and limits its number.  Looked at
through that, a second model shows nothing new, and each look leaves less room for the user's own compilations.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
_LIMIT = 2**20  # compilations of one function: where a model's graphs break, its own functions count those of the user, too


def compiled_apart(model: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """A model compiled as if nothing had been compiled before, and without effect on what is compiled later.

    Where Dynamo splits the model, its parts are compiled in place: before torch 2.13 they count against the
    ``recompile_limit`` of the functions they belong to.

    Args:
        model: a module, a function, or either compiled: then what was compiled.
        backend: a function made for this call; Dynamo takes equal backends for one.
    """
    target, _ = uncompiled(model)
    settings: dict[str, Any] = {"backend": backend}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    program: Any = torch.compile(_copied(target), **settings)
    root = getattr(target, "__self__", target)
    if isinstance(root, nn.Module):  # a compiled module on the stack tells ``moe_fx.tables`` which model is running
        module: Any = torch.compile(root, **settings)
        module.forward = program
        program = module

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_LIMIT, accumulated_recompile_limit=_LIMIT):
            return program(*args, **kwargs)

    return call


def _copied(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``target`` and whose code object is nobody else's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def uncompiled(model: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    """What ``torch.compile`` was given, and its compiler: of a compiled module or function, of a module whose ``forward`` was
    replaced by a compiled one, and of one compiled in place by ``Module.compile``.  Of any other: itself and None."""
    inside = [vars(model).get("forward"), vars(model).get("_compiled_call_impl")] if isinstance(model, nn.Module) else []
    candidates: list[Any] = [model, *inside]
    for compiled in candidates:
        context = _context(compiled)
        if context is not None:
            given: Any = compiled._orig_mod if isinstance(compiled, nn.Module) else compiled._torchdynamo_orig_callable
            return uncompiled(given)[0], torch._dynamo.eval_frame.innermost_backend(context.callback)
    return model, None


def _context(compiled: Any) -> Any:
    """The context that ``torch.compile`` made for a module or a function; None where it made none."""
    if isinstance(compiled, torch._dynamo.OptimizedModule):
        return compiled.dynamo_ctx
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        return None
    held = [cell.cell_contents for cell in getattr(compiled, "__closure__", None) or ()]
    return next((c for c in held if isinstance(c, torch._dynamo.eval_frame._TorchDynamoContext)), None)
