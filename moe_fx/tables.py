"""Artifact tensors looked up while a graph runs, for graphs that several layers share.

Dynamo names the inputs of a graph from the frame it traced.  When a model's graphs break inside the MoE block, that
frame is the block's own forward, every layer runs the same compiled graph, and ``L['self']`` is all the graph knows.
The layer is then found by the identity of its router's weight among the parameters of the root module, which is on
the Python stack both while a graph is compiled and while it runs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType

import torch
from torch import Tensor, nn

from moe_fx.artifacts import Artifact
from moe_fx.site import normal_name


def roots_on_stack() -> list[nn.Module]:
    """Modules that may be the one the user compiled, best first.

    The innermost compiled module on the stack is it; where the user compiled a bound ``forward`` instead, it is the
    outermost module whose forward is running.
    """
    modules, compiled = [], []
    for module, _ in modules_on_stack():
        if isinstance(module, torch._dynamo.OptimizedModule):
            compiled.append(module._orig_mod)
        else:
            modules.append(module)
    return list({id(m): m for m in [*compiled[:1], *modules[-1:], *compiled[1:]]}.values())


def modules_on_stack() -> Iterator[tuple[nn.Module, CodeType]]:
    """Modules whose methods are running, innermost first, and the code that runs: a method's own, or what Dynamo made of it."""
    frame = sys._getframe(1)
    while frame is not None:
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""  # mostly "self"
        module = frame.f_locals.get(first)
        if isinstance(module, nn.Module) and not isinstance(module, torch.fx.GraphModule):
            yield module, frame.f_code
        frame = frame.f_back  # type: ignore[assignment]


def parameter_name(root: nn.Module, tensor: Tensor) -> str | None:
    """The normal-form name of a parameter or buffer of ``root``, by identity of its memory; None if it has none."""
    for name, candidate in tensors(root):
        if candidate is tensor or (candidate.data_ptr() == tensor.data_ptr() and candidate.shape == tensor.shape):
            return normal_name(name)
    return None


def tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


@dataclass(frozen=True)
class _Found:
    """The tensor of one layer, and where the layer's router weight was found."""

    root: weakref.ref[nn.Module]
    path: tuple[str, ...]
    tensor: Tensor

    def still_holds(self, weight: Tensor) -> bool:
        """Whether the weight is where it was: a few dict look-ups, at every run."""
        module = self.root()
        for step in self.path[:-1]:
            module = module._modules.get(step) if module is not None else None
        if module is None:
            return False
        held: Tensor | None = module._parameters.get(self.path[-1], module._buffers.get(self.path[-1]))
        return held is not None and held.data_ptr() == weight.data_ptr()


@dataclass
class SiteTable:
    """Artifact tensors of the layers that share a graph, found by the identity of each layer's router weight.

    Attributes:
        artifact: where the tensors come from.
        kind: ``"similarity"`` or ``"mask_router"``.
        suffix: path of the router's weight below the module that the graph calls ``self``.
        scope: path of the site below that module.
    """

    artifact: Artifact
    kind: str
    suffix: str
    scope: str
    roots: list[weakref.ref[nn.Module]]
    _by_address: dict[int, _Found] = field(default_factory=dict)

    @classmethod
    def of(cls, artifact: Artifact, kind: str, suffix: str, scope: str, roots: list[nn.Module]) -> SiteTable:
        """A table over the layers below the given root modules, which it does not keep alive."""
        return cls(artifact, kind, suffix, scope, [weakref.ref(r) for r in roots])

    def lookup(self, weight: Tensor, shape: list[int]) -> Tensor:
        """The tensor for the layer whose router weight is ``weight``."""
        found = self._by_address.get(weight.data_ptr())
        if found is None or not found.still_holds(weight):  # the layers may have changed places since
            root, path, name = self._resolve(weight)
            hidden_size = shape[1] if self.kind == "mask_router" else None
            tensor = self.artifact.tensor(name, self.kind, shape[0], hidden_size).to(weight.device)
            found = self._by_address[weight.data_ptr()] = _Found(weakref.ref(root), path, tensor)
        return found.tensor

    def _resolve(self, weight: Tensor) -> tuple[nn.Module, tuple[str, ...], str]:
        """The root and the path in it of the parameter with this memory, and the name of its layer's site."""
        roots = [*(r for ref in self.roots if (r := ref()) is not None), *roots_on_stack()]
        candidates = [c for root in roots for c in self._in_root(root, weight)]
        # an artifact's site names tell which of several nested modules the user calls the model
        named = [c for c in candidates if c[2] in self.artifact.sites]
        if len({name for _, _, name in named}) > 1:
            raise RuntimeError(
                f"sites {', '.join(sorted({repr(name) for _, _, name in named}))} share one router weight and one graph, so that "
                "moe_fx cannot tell which is running: use experts that trace (set_experts_implementation('grouped_mm'))"
            )
        for candidate in (*named, *candidates):
            return candidate
        raise RuntimeError(
            "moe_fx cannot tell which layer is running: the router's weight is no parameter of a module on the call "
            "stack. Compile the whole model, with experts that trace (model.set_experts_implementation('grouped_mm'))"
        )

    def _in_root(self, root: nn.Module, weight: Tensor) -> Iterator[tuple[nn.Module, tuple[str, ...], str]]:
        for name, parameter in tensors(root):
            full = normal_name(name)
            if parameter.data_ptr() == weight.data_ptr() and full.endswith(self.suffix):
                prefix = full.removesuffix(self.suffix).strip(".")
                yield root, tuple(name.split(".")), ".".join(p for p in (prefix, self.scope) if p)


#: Tables by a key that is a literal of the graphs reading them.
_TABLES: dict[str, SiteTable] = {}


def register_table(key: str, table: SiteTable) -> None:
    """Make a table readable under ``key`` by ``torch.ops.moe_fx.site_tensor`` for the life of the process."""
    _TABLES[key] = table


def site_tensor(router_weight: Tensor, key: str, shape: list[int]) -> Tensor:
    """A copy of the artifact tensor (float32, of ``shape``) for the layer that owns ``router_weight``."""
    return _TABLES[key].lookup(router_weight, shape).clone()


_library = torch.library.Library("moe_fx", "FRAGMENT")
_library.define(
    "site_tensor(Tensor router_weight, str key, int[] shape) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
for _device in ("CPU", "CUDA"):
    _library.impl("site_tensor", site_tensor, _device)


@torch.library.register_fake("moe_fx::site_tensor", lib=_library)
def _(router_weight: Tensor, key: str, shape: list[int]) -> Tensor:
    return router_weight.new_empty(shape, dtype=torch.float32)
