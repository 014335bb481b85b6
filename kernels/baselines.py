"""The routing decisions of other published methods, to be compared with SERE under the same conditions.

Plain torch without data-dependent shapes, so that each function is specification, CPU kernel and CUDA kernel in one.
Shapes and dtypes are those of ``reference.py``: ``topk_weights`` and ``topk_ids`` [T, K], the best pick first; an off
pick has id -1 and weight 0.  Ids outside [0, E) are no experts: they stay as they are and count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _switched(topk_weights: Tensor, topk_ids: Tensor, on: Tensor, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Only the picks that are ``on`` [T, K]; with ``renormalise`` each token's weights keep their sum."""
    weights = torch.where(on, topk_weights, 0)
    if renormalise:
        wide = torch.promote_types(weights.dtype, torch.float32)
        total, left = topk_weights.to(wide).sum(-1, keepdim=True), weights.to(wide).sum(-1, keepdim=True)
        weights = (weights * torch.where(left == 0, 1, total / torch.where(left == 0, 1, left))).to(topk_weights.dtype)
    return weights, torch.where(on, topk_ids, -1)


def _first_picks(topk_ids: Tensor, primary: int, num_experts: int) -> Tensor:
    """Which experts are among some token's first picks, bool [E]."""
    first = topk_ids[:, :primary]
    is_expert = (first >= 0) & (first < num_experts)
    chosen = torch.zeros(num_experts + 1, dtype=torch.bool, device=topk_ids.device)
    return chosen.index_fill(0, torch.where(is_expert, first, num_experts).flatten().long(), True)[:num_experts]


def _looked_up(per_expert: Tensor, topk_ids: Tensor, otherwise: bool) -> Tensor:
    """An entry of ``per_expert`` [E] for each pick; ``otherwise`` where the id is no expert."""
    is_expert = (topk_ids >= 0) & (topk_ids < per_expert.shape[0])
    found = per_expert[torch.where(is_expert, topk_ids, 0).long()]
    return torch.where(is_expert, found, torch.full_like(found, otherwise))


def smaller_k(topk_weights: Tensor, topk_ids: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Plain smaller K: the first ``k`` picks, weighted as the model would with that K."""
    on = (torch.arange(topk_ids.shape[1], device=topk_ids.device) < k).expand_as(topk_ids)
    return _switched(topk_weights, topk_ids, on & (topk_ids >= 0), renormalise)


def drop(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, primary: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """SERE's primary experts (arXiv 2602.07616), with every other pick off instead of moved."""
    kept = _looked_up(_first_picks(topk_ids, primary, num_experts), topk_ids, True)
    return _switched(topk_weights, topk_ids, kept & (topk_ids >= 0), renormalise)


def top_p(topk_weights: Tensor, topk_ids: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Top-p routing (arXiv 2403.07652) among the K picks: the shortest run of best picks with the share p of the weight.

    The weights are not renormalised.
    """
    wide = topk_weights.to(torch.promote_types(topk_weights.dtype, torch.float32))
    before = wide.cumsum(-1) - wide  # the weight of the picks before this one
    on = before < p * wide.sum(-1, keepdim=True)
    on[:, :1] = True
    return _switched(topk_weights, topk_ids, on & (topk_ids >= 0), renormalise=False)


def naee_skip(topk_weights: Tensor, topk_ids: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """NAEE's dynamic skipping (arXiv 2402.14800): a pick is off where its weight is below ``ratio`` times the first pick's.

    Published for K = 2 with renormalised weights; here for any K, and each token's weights keep their sum.
    """
    wide = topk_weights.to(torch.promote_types(topk_weights.dtype, torch.float32))
    return _switched(topk_weights, topk_ids, (wide >= ratio * wide[:, :1]) & (topk_ids >= 0), renormalise=True)


def exfold(
    topk_weights: Tensor, topk_ids: Tensor, fold_scale: Tensor, fold_gain: Tensor, primary: int
) -> tuple[Tensor, Tensor]:
    """ExFold's calibrated scalar fold (arXiv 2608.24938) into SERE's primary experts.

        u not primary  ->  v = argmax over primary p of fold_gain[u, p], with its weight times fold_scale[u, v]

    ``fold_scale`` [E, E] is s[u, v] = sum w <u, v> / (sum w |v|^2 + lambda) over the tokens that picked both, and
    ``fold_gain`` [E, E] the share of u's output that s v explains there.  A pick that no primary expert explains is off.
    The paper keeps a pool of fixed size; here the primary experts stay, so that both methods read the same experts.
    """
    num_experts = fold_scale.shape[0]
    kept = _first_picks(topk_ids, primary, num_experts)
    gain, target = fold_gain.masked_fill(~kept, -torch.inf).max(dim=1)  # [E]
    scale = torch.where(gain > 0, fold_scale.gather(1, target[:, None])[:, 0], 0)
    is_expert = (topk_ids >= 0) & (topk_ids < num_experts)
    moves = is_expert & ~_looked_up(kept, topk_ids, True)
    safe = torch.where(is_expert, topk_ids, 0).long()
    on = (topk_ids >= 0) & ~(moves & (scale[safe] == 0))
    weights = torch.where(moves, topk_weights * scale[safe].to(topk_weights.dtype), topk_weights)
    return _switched(weights, torch.where(moves, target[safe].to(topk_ids.dtype), topk_ids), on, renormalise=False)


def prune(
    topk_weights: Tensor, topk_ids: Tensor, coactivation: Tensor, keep: int, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """Static pruning by frequency: the picks outside the ``keep`` experts that were picked most often are off.

    ``coactivation`` [E, E] has each expert's share of the tokens on its diagonal.
    """
    kept = _looked_up(_most_frequent(coactivation, keep), topk_ids, True)
    return _switched(topk_weights, topk_ids, kept & (topk_ids >= 0), renormalise)


def _most_frequent(coactivation: Tensor, keep: int) -> Tensor:
    order = coactivation.diagonal().argsort(descending=True, stable=True)
    return torch.zeros(len(order), dtype=torch.bool, device=order.device).index_fill(0, order[:keep], True)


def only_frequent(scores: Tensor, coactivation: Tensor, keep: int, fill: float) -> Tensor:
    """Selection scores [..., E] from which only the ``keep`` most frequent experts can be selected."""
    return torch.where(_most_frequent(coactivation, keep), scores, fill)


def only_first_picks(scores: Tensor, primary: int, fill: float) -> Tensor:
    """OEA (arXiv 2511.02237): selection scores [..., E] from which only experts that some token ranks first can be selected.

    Each token is sure of its first ``primary`` experts and takes the rest of its K, by rank, from those that the batch
    reads anyway.  What is selected beyond those (where they are fewer than K) is switched off by ``drop``, and the weights
    are renormalised over what is left.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    first = rows.topk(min(primary, rows.shape[1]), dim=-1).indices
    return torch.where(_first_picks(first, primary, rows.shape[1]), scores, fill)
