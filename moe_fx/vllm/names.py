"""Which of an artifact's sites belongs to which of an engine's MoE layers.

An artifact names the MoE block as transformers does (``model.layers.3.mlp``), vLLM the experts inside it
(``model.layers.3.mlp.experts``), sometimes with another attribute name (``model.layers.3.block_sparse_moe.experts``) or
under another root (``language_model.model.layers.3.mlp.experts``).  What all agree on is the list a block's layer stands
in and its number.
"""

from __future__ import annotations

from collections.abc import Iterable

from moe_fx.artifacts import Artifact
from moe_fx.site import normal_name

#: Modules inside an MoE block that a site may be named after.
_INSIDE = ("experts", "gate", "router", "routed_experts")


def block_name(path: str) -> str:
    """The MoE block's path in normal form: what is inside the block is cut off.

    ``model.layers.3.mlp.experts`` and ``L['self'].model.layers.3.mlp.gate`` become ``model.layers.3.mlp``.
    """
    parts = normal_name(path).split(".")
    while len(parts) > 1 and parts[-1] in _INSIDE:
        parts.pop()
    return ".".join(parts)


def layer_key(path: str) -> str:
    """The list a block's layer stands in, and its number, ``layers.3``; the block's name where it has no number."""
    parts = block_name(path).split(".")
    for i in range(len(parts) - 1, 0, -1):
        if parts[i].isdigit():
            return ".".join(parts[i - 1 : i + 1])
    return ".".join(parts)


def match_sites(layers: Iterable[str], artifact: Artifact) -> tuple[dict[str, str], str | None]:
    """The artifact's site of every layer, and why some layers have none (None where all have one).

    A site with the very name of the block comes first; otherwise the one with the same list and number, if it is alone.
    """
    by_key: dict[str, list[str]] = {}
    for site in artifact.sites:
        by_key.setdefault(layer_key(site), []).append(site)
    exact = {block_name(site): site for site in artifact.sites}
    found: dict[str, str] = {}
    lost: list[str] = []
    for layer in layers:
        same = by_key.get(layer_key(layer), [])
        if block_name(layer) in exact:
            found[layer] = exact[block_name(layer)]
        elif len(same) == 1:
            found[layer] = same[0]
        else:
            lost.append(layer)
    taken = list(found.values())
    doubled = sorted({site for site in taken if taken.count(site) > 1})
    if doubled:
        return found, f"its sites {', '.join(doubled[:3])} each fit several of the engine's layers"
    if lost:
        return found, f"it has {len(artifact.sites)} sites, but none for {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}"
    return found, None
