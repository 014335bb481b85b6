"""What detection finds: a ``Site`` is one MoE layer's routing decision, a ``Skip`` is a place that was left alone."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One MoE layer's routing decision in one graph.

    Attributes:
        name: module path of the MoE block in normal form (see ``normal_name``), for example ``model.layers.3.mlp``.
        num_experts: E, the number of experts the router scores.
        top_k: K, experts chosen per token.
        hidden_size: H, the width of the router's input.
        scoring: how scores become picks and weights, for example ``softmax -> topk -> renormalise``.
        experts: ``"fused"``, ``"folded"`` or ``"untouched"``: what happens to picks that a policy switches off.
        policy: what was applied here, for example ``"TopK"`` or ``"SERE(primary=2, threshold=0.3)"``.
    """

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    scoring: str
    experts: str = "untouched"
    policy: str = "TopK"


@dataclass(frozen=True)
class Skip:
    """A place that looked like routing and was left alone.

    Attributes:
        name: where, as a module path (or the node's name where the graph does not tell a path).
        reason: why it was left, and what a user can do about it where something can be done.
        routing: True where it is believed to be real expert routing, so that ``strict`` makes it an error.
    """

    name: str
    reason: str
    routing: bool = False


@dataclass(frozen=True)
class Layers:
    """The layers that run one graph.

    Attributes:
        prefixes: path, in the root module, of the module each layer's graph calls ``self``; ``("",)`` for a graph of
            the root itself.
        shared: whether the graph belongs to a part of the root, so that it must find out at run time which layer it is.
    """

    prefixes: tuple[str, ...] = ("",)
    shared: bool = False

    def names(self, path: str) -> list[str]:
        """Full names of what the graph calls ``path``, one for each layer."""
        return [".".join(p for p in (prefix, path) if p) for prefix in self.prefixes]


# Attribute names by which wrappers (torch.compile, checkpointing, FSDP, DataParallel) hold the module they wrap.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"})
_GETATTR_STEP = re.compile(r"""getattr\(([^()]*), (?:'([^']*)'|"([^"]*)")\)""")
_GUARD_STEP = re.compile(r"""\._(?:modules|parameters|buffers)\[(?:'([^']*)'|"([^"]*)")\]""")
_INDEX_STEP = re.compile(r"""\[(?:'([^']*)'|"([^"]*)"|(\d+))\]""")
# a method under a decorator is a function of *args, the first of which is the module
_ROOT = re.compile(r"^(?:L\['args'\]\[0\]|[LG]\['[^']+'\](?:\.__closure__\[\d+\]\.cell_contents|\.__self__)*)")


def normal_name(path: str) -> str:
    """The normal form of a module path: dots only, no root expression, no wrapper modules.

    ``L['self']._modules['model']._modules['layers']._modules['3'].mlp`` and ``_orig_mod.model.layers.3.mlp`` both
    become ``model.layers.3.mlp``; the root module itself becomes ``""``.  A wrapper's segment is dropped wherever it
    stands, so that the normal form of a parent is always the parent of the normal form.
    """
    while (plain := _GETATTR_STEP.sub(_dotted, path)) != path:  # innermost first
        path = plain
    path = _INDEX_STEP.sub(_dotted, _GUARD_STEP.sub(_dotted, _ROOT.sub("", path)))
    return ".".join(segment for segment in path.split(".") if segment and segment not in _WRAPPERS)


def _dotted(step: re.Match[str]) -> str:
    """The step's groups that matched, joined by dots; a step below something starts with one."""
    joined = ".".join(group for group in step.groups() if group is not None)
    return joined if step.re is _GETATTR_STEP else "." + joined
