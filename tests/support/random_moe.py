"""Random MoE blocks, each a recipe of spellings, with the same computation in one plain form beside it.

``Block.forward`` spells a block as its recipe says.  ``Gate.decide`` and ``Experts.by_definition`` are its meaning: every
recipe goes through the same few lines there.  What a policy does to a block is defined by what stands between those two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}
FORMS = (
    "gathered", "slots", "pairs", "sorted_pairs", "grouped", "dense_scatter", "dense_one_hot", "dense_infinity", "loop", "where",
    "modules", "columns", "stacked", "stacked_dense", "found", "found_modules", "added_at_found", "written",
)  # fmt: skip
DENSE = ("dense_scatter", "dense_one_hot", "dense_infinity", "columns", "stacked_dense")
#: Experts that are modules of their own.
MODULES = ("modules", "columns", "stacked", "stacked_dense", "found_modules", "written")


@dataclass(frozen=True)
class Recipe:
    """How a block is spelled; printed by hypothesis where an example fails.

    ``groups`` is (number of groups, groups kept, how a group is scored, what fills the others).
    """

    sizes: tuple[int, int, int]  # H, I, E
    picks: int
    leading: tuple[int, ...]
    dtype: torch.dtype
    router: str
    scoring: str
    bias: bool
    groups: tuple[int, int, str, float] | None
    selection: str
    weigh: str
    renormalise: str
    scale: str
    form: str
    activation: str
    gated: bool
    expert_bias: bool
    transposed: bool
    shared: str
    flatten: str
    logits_dtype: torch.dtype | None
    scores_dtype: torch.dtype | None
    weights_dtype: torch.dtype | None
    keeps: tuple[int, int, int, int, int]  # which op that keeps numbers as they are stands at five places
    nested: bool
    seed: int

    def __repr__(self) -> str:
        return "Recipe(" + ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)) + ")"


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of blocks that can be rewritten by every policy."""
    experts = draw(st.sampled_from([2, 3, 4, 6, 8]))
    groups = None
    if experts >= 4 and draw(st.integers(0, 2)) == 0:
        count = draw(st.sampled_from([g for g in (2, 3, 4) if experts % g == 0 and experts // g >= 2]))
        score, fill = draw(st.sampled_from(["top2", "max"])), draw(st.sampled_from([0.0, -math.inf]))
        groups = (count, draw(st.integers(1, count)), score, fill)
    reachable = experts if groups is None or groups[3] == 0 else experts // groups[0] * groups[1]
    picks = draw(st.integers(1, reachable))
    scoring = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "none"]))
    bias = draw(st.booleans())
    form = draw(st.sampled_from(FORMS))
    weigh = draw(st.sampled_from(["values", "gather", "softmax_values", "softmax_gather"]))
    if form == "dense_infinity":
        weigh = "softmax_values"
    positive = weigh.startswith("softmax") or (scoring != "none" and not (weigh == "values" and bias))
    divides = positive and form != "dense_infinity"
    turns = ["topk", "topk", "topk_unsorted", "topk_first_axis", "topk_more"]
    turns += ["sort", "argsort", "negated", "ascending", "turned"] if picks < experts else []
    turns += (["in_turn"] if picks in (2, 3) and not groups else [])
    turns += ["max", "max_keepdim", "argmax"] if picks == 1 else []
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    casts = st.sampled_from([None, None, torch.float32, *([torch.bfloat16] if dtype == torch.bfloat16 else [])])
    rank3 = draw(st.booleans())
    kept = [len(_KEEPS)] * 2 + [len(_KEEPS if form in DENSE else _KEEPS_IDS)] + [len(_KEEPS)] * 2
    token_counts = st.sampled_from([1, 2, 3, 4, 6, 8])
    return Recipe(
        sizes=(draw(st.sampled_from([4, 6, 8])), draw(st.sampled_from([3, 4, 6])), experts),
        picks=picks,
        leading=(draw(st.sampled_from([1, 2, 3])), draw(token_counts)) if rank3 else (draw(token_counts),),
        dtype=dtype,
        router=draw(st.sampled_from(["linear", "linear_bias", "einsum", "einsum_first", "matmul", "matmul_turned", "normed"])),
        scoring=scoring,
        bias=bias,
        groups=groups,
        selection=draw(st.sampled_from(turns)),
        weigh=weigh,
        renormalise=draw(st.sampled_from(["none", "sum", "epsilon", "clamp", "in_place"])) if divides else "none",
        scale="none" if form == "dense_infinity" else draw(st.sampled_from(["none", "one", "constant", "per_expert"])),
        form=form,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        gated=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
        shared=draw(st.sampled_from(["none", "none", "added", "gated"])),
        flatten=draw(st.sampled_from(["first", "ids", "never"])) if rank3 else "first",
        logits_dtype=draw(casts),
        scores_dtype=draw(casts),
        weights_dtype=draw(casts),
        keeps=draw(st.tuples(*[st.integers(0, n - 1) for n in kept])),
        nested=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


#: Ops after which the numbers are the same.
_KEEPS = (
    lambda t: t,
    lambda t: t,
    lambda t: t.contiguous(),
    lambda t: t.clone(),
    lambda t: t.view(t.shape),
    lambda t: t.unsqueeze(-1).squeeze(-1),
    lambda t: t.unsqueeze(0).squeeze(0),
    lambda t: t.flatten().view_as(t),
    lambda t: t.to(t.dtype),
)
_KEEPS_IDS = (*_KEEPS, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: t.int().long())


class Gate(nn.Module):
    """A router."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        hidden, _, experts = recipe.sizes
        self.recipe = recipe
        turned = recipe.router == "matmul_turned"
        self.weight = nn.Parameter(torch.randn((hidden, experts) if turned else (experts, hidden)))
        self.offset = nn.Parameter(0.2 * torch.randn(experts))
        self.correction = nn.Parameter(0.3 * torch.randn(experts))
        self.scale = nn.Parameter(0.5 + torch.rand(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """ids and weights [..., K], as the recipe spells them; the weights are logits where the experts want those."""
        recipe = self.recipe
        scores, choice = self.scores(x)
        values, ids = self.select(_KEEPS[recipe.keeps[1]](choice))
        ids = _KEEPS_IDS[recipe.keeps[2]](ids)
        weights = _KEEPS[recipe.keeps[3]](self.weigh(scores, values, ids))
        if recipe.form != "dense_infinity":
            weights = self.normalise(weights, ids)
        if recipe.weights_dtype is not None:
            weights = weights.to(recipe.weights_dtype)
        return ids, weights

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scores that weigh and those that choose, [..., E]."""
        recipe = self.recipe
        logits = self.logits(x)
        if recipe.logits_dtype is not None:
            logits = logits.to(recipe.logits_dtype)
        scores = {
            "softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid, "none": lambda: logits,
            "sqrtsoftplus": lambda: F.softplus(logits).sqrt(),
        }[recipe.scoring]()  # fmt: skip
        if recipe.scores_dtype is not None:
            scores = scores.to(recipe.scores_dtype)
        scores = _KEEPS[recipe.keeps[0]](scores)
        choice = scores + self.correction if recipe.bias else scores
        return scores, self.only_best_groups(choice) if recipe.groups is not None else choice

    def logits(self, x: Tensor) -> Tensor:
        kind = self.recipe.router
        if kind == "linear":
            return F.linear(x, self.weight)
        if kind == "linear_bias":
            return F.linear(x, self.weight, self.offset)
        if kind == "einsum":
            return torch.einsum("...h,eh->...e", x, self.weight)
        if kind == "einsum_first":
            return torch.einsum("eh,th->te" if x.dim() == 2 else "eh,bsh->bse", self.weight, x)
        if kind == "normed":
            return F.linear(x, F.normalize(self.weight, dim=-1)) * 2
        return x @ (self.weight if kind == "matmul_turned" else self.weight.t())

    def only_best_groups(self, choice: Tensor) -> Tensor:
        count, kept, score, fill = self.recipe.groups or (1, 1, "max", 0.0)
        grouped = choice.unflatten(-1, (count, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1) if score == "top2" else grouped.max(dim=-1).values
        chosen = best.topk(kept, dim=-1, sorted=False).indices
        mask = torch.zeros_like(best).scatter_(-1, chosen, 1).unsqueeze(-1).expand_as(grouped).reshape(choice.shape)
        return choice.masked_fill(~mask.bool(), fill)

    def select(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        k, kind = self.recipe.picks, self.recipe.selection
        if kind == "topk":
            return torch.topk(choice, k, dim=-1)
        if kind == "topk_unsorted":
            return choice.topk(k, dim=choice.dim() - 1, sorted=False)
        if kind == "topk_first_axis":
            values, ids = choice.movedim(-1, 0).topk(k, dim=0)
            return values.movedim(0, -1), ids.movedim(0, -1)
        if kind == "topk_more":
            values, ids = choice.topk(min(k + 1, choice.shape[-1]))
            return values[..., :k], ids[..., :k]
        if kind == "sort":
            values, ids = torch.sort(choice, dim=-1, descending=True)
            return values[..., :k], ids[..., :k]
        if kind in ("argsort", "negated"):
            ids = (choice.argsort(-1, descending=True) if kind == "argsort" else (-choice).argsort(-1))[..., :k]
            return choice.gather(-1, ids), ids
        if kind == "ascending":
            ids = choice.argsort(dim=-1)[..., -k:]
            return choice.gather(-1, ids), ids
        if kind == "turned":
            values, ids = choice.sort(-1)
            return values.flip(-1)[..., :k], ids.flip(-1)[..., :k]
        if kind == "in_turn":
            picked = []
            for _ in range(k):
                picked.append(choice.max(-1, keepdim=True))
                choice = choice.scatter(-1, picked[-1].indices, -math.inf)
            return torch.cat([p.values for p in picked], -1), torch.cat([p.indices for p in picked], -1)
        if kind == "argmax":
            ids = choice.argmax(-1, keepdim=True)
            return choice.gather(-1, ids), ids
        values, ids = choice.max(-1, keepdim=kind == "max_keepdim")
        return (values, ids) if kind == "max_keepdim" else (values.unsqueeze(-1), ids.unsqueeze(-1))

    def weigh(self, scores: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        kind = self.recipe.weigh
        weights = scores.gather(-1, ids) if kind.endswith("gather") else values
        return weights.softmax(-1) if kind.startswith("softmax") and self.recipe.form != "dense_infinity" else weights

    def normalise(self, weights: Tensor, ids: Tensor) -> Tensor:
        recipe = self.recipe
        if recipe.renormalise == "sum":
            weights = weights / weights.sum(-1, keepdim=True)
        elif recipe.renormalise == "epsilon":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        elif recipe.renormalise == "clamp":
            weights = weights / torch.clamp(weights.sum(-1, keepdim=True), min=1e-12)
        elif recipe.renormalise == "in_place":
            weights = weights * 1
            weights /= weights.sum(dim=-1, keepdim=True)
        if recipe.scale in ("one", "constant"):
            weights = weights * (1.0 if recipe.scale == "one" else 1.5)
        return weights * self.scale[ids] if recipe.scale == "per_expert" else weights

    def decide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """ids and weights [T, K] of the picks, best first."""
        scores, choice = (t.flatten(0, -2) for t in self.scores(x))
        ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : self.recipe.picks]
        weights = (scores if self.recipe.weigh.endswith("gather") else choice).gather(-1, ids)
        if self.recipe.weigh.startswith("softmax"):
            weights = weights.softmax(-1)
        weights = self.normalise(weights, ids)
        return ids, weights if self.recipe.weights_dtype is None else weights.to(self.recipe.weights_dtype)

    def is_ambiguous(self, x: Tensor) -> bool:
        """Whether scores tie where it matters which is chosen."""
        best = self.scores(x)[1].sort(-1, descending=True).values[..., : self.recipe.picks + 1]
        return bool((best.diff(dim=-1) == 0).any() or best[..., : self.recipe.picks].isinf().any())


class Experts(nn.Module):
    """A stack of MLPs."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        hidden, width, experts = recipe.sizes
        columns = 2 * width if recipe.gated else width
        up, down = (hidden, columns), (width, hidden)
        up, down = (up[::-1], down[::-1]) if recipe.transposed else (up, down)
        self.up = nn.Parameter(torch.randn(experts, *up) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, *down) * 0.3 * width**-0.5)
        self.up_bias = nn.Parameter(0.3 * torch.randn(experts, columns)) if recipe.expert_bias else None
        self.down_bias = nn.Parameter(0.1 * torch.randn(experts, hidden)) if recipe.expert_bias else None
        if recipe.form == "grouped":
            import transformers.integrations.moe  # noqa: F401  (defines the op that it multiplies by)
        if recipe.form in MODULES:
            pairs = [[nn.Linear(hidden, columns), nn.Linear(width, hidden)] for _ in range(experts)]
            self.mlps = nn.ModuleList(map(nn.ModuleList, pairs))
            del self.up, self.down, self.up_bias, self.down_bias

    def matrices(self) -> tuple[Tensor, Tensor]:
        """[E, H, G] and [E, I, H]."""
        return (self.up.transpose(1, 2), self.down.transpose(1, 2)) if self.recipe.transposed else (self.up, self.down)

    def activate(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.recipe.activation]
        if not self.recipe.gated:
            return activation(x)
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    def one(self, x: Tensor, e: int) -> Tensor:
        """Expert e on every row."""
        if self.recipe.form in MODULES:
            up, down = self.mlps[e]
            return down(self.activate(up(x)))
        up, down = self.matrices()
        up_bias = None if self.up_bias is None else self.up_bias[e]
        down_bias = None if self.down_bias is None else self.down_bias[e]
        return F.linear(self.activate(F.linear(x, up[e].t(), up_bias)), down[e].t(), down_bias)

    def rows(self, x: Tensor, ids: Tensor) -> Tensor:
        """Row r of x [R, H] through expert ids[r]."""
        up, down = self.matrices()
        inner = torch.bmm(x.unsqueeze(1), up[ids]).squeeze(1)
        inner = inner if self.up_bias is None else inner + self.up_bias[ids]
        out = torch.bmm(self.activate(inner).unsqueeze(1), down[ids]).squeeze(1)
        return out if self.down_bias is None else out + self.down_bias[ids]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over the picks, as the recipe spells it: x [..., H], ids and weights [..., K]."""
        return getattr(self, "as_" + self.recipe.form)(x, ids, weights).to(x.dtype)

    def as_gathered(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        up, down = self.matrices()
        inner = torch.einsum("...h,...khg->...kg", x, up[ids])
        inner = inner if self.up_bias is None else inner + self.up_bias[ids]
        out = torch.einsum("...ki,...kih->...kh", self.activate(inner), down[ids])
        out = out if self.down_bias is None else out + self.down_bias[ids]
        return (out * weights.unsqueeze(-1)).sum(-2)

    def as_slots(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """First picks, then second picks, ..."""
        out = torch.zeros_like(x)
        for slot in range(self.recipe.picks):
            out = out + self.rows(x, ids[:, slot]) * weights[:, slot, None]
        return out

    def as_pairs(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        k = self.recipe.picks
        out = self.rows(x.repeat_interleave(k, dim=0), ids.reshape(-1)) * weights.reshape(-1, 1)
        return out.view(-1, k, x.shape[-1]).sum(1)

    def as_sorted_pairs(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        token = order // self.recipe.picks
        out = self.rows(x[token], ids.reshape(-1)[order]) * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, out.to(x.dtype))

    def as_grouped(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Rows sorted by expert, multiplied group by group."""
        k, (up, down) = self.recipe.picks, self.matrices()
        sorted_ids, order = ids.reshape(-1).sort(stable=True)
        ends = torch.histc(sorted_ids.float(), up.shape[0], 0, up.shape[0] - 1).cumsum(0).int()
        inner = _grouped_mm(x[order // k], up, ends)
        inner = inner if self.up_bias is None else inner + self.up_bias[sorted_ids]
        out = _grouped_mm(self.activate(inner), down, ends)
        out = (out if self.down_bias is None else out + self.down_bias[sorted_ids]) * weights.reshape(-1)[order].unsqueeze(-1)
        return out[order.argsort()].view(-1, k, x.shape[-1]).sum(1)

    def every(self, x: Tensor) -> Tensor:
        """[E, T, H]: every expert on every token."""
        up, down = self.matrices()
        inner = torch.bmm(x.expand(up.shape[0], *x.shape), up)
        inner = inner if self.up_bias is None else inner + self.up_bias.unsqueeze(1)
        out = torch.bmm(self.activate(inner), down)
        return out if self.down_bias is None else out + self.down_bias.unsqueeze(1)

    def as_dense_scatter(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = torch.zeros(x.shape[0], self.recipe.sizes[2], dtype=weights.dtype).scatter(1, ids, weights)
        return torch.einsum("te,eth->th", gates.to(x.dtype), self.every(x))

    def as_dense_one_hot(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = (F.one_hot(ids, self.recipe.sizes[2]).to(weights.dtype) * weights.unsqueeze(-1)).sum(1)
        return (self.every(x) * gates.t().unsqueeze(-1)).sum(0)

    def as_dense_infinity(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weights are scores still: their softmax leaves nothing of what was not picked."""
        scores = torch.full((x.shape[0], self.recipe.sizes[2]), -math.inf, dtype=weights.dtype).scatter(-1, ids, weights)
        return torch.einsum("te,eth->th", scores.softmax(-1).to(x.dtype), self.every(x))

    def as_loop(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Expert after expert, by masks."""
        out = torch.zeros_like(x)
        for e in range(self.recipe.sizes[2]):
            out = out + self.one(x, e) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out

    as_modules = as_loop

    def as_where(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.recipe.sizes[2]):
            out = out + self.one(x, e) * torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)
        return out

    def as_found(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Expert after expert, each on the tokens it looks for."""
        out, masks = torch.zeros_like(x), F.one_hot(ids, self.recipe.sizes[2]).permute(2, 1, 0)
        for e in range(self.recipe.sizes[2]):
            places, tokens = torch.where(masks[e])
            out.index_add_(0, tokens, (self.one(x[tokens], e) * weights[tokens, places, None]).to(x.dtype))
        return out

    as_found_modules = as_found

    def as_added_at_found(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.recipe.sizes[2]):
            tokens, places = torch.where(ids == e)
            out[tokens] += (self.one(x[tokens], e) * weights[tokens, places].unsqueeze(-1)).to(x.dtype)
        return out

    def as_written(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The rows of all picks, written expert after expert."""
        rows, flat = x.repeat_interleave(self.recipe.picks, dim=0), ids.reshape(-1)
        out = torch.empty_like(rows)
        for e in range(self.recipe.sizes[2]):
            out[flat == e] = self.one(rows[flat == e], e)
        return (out.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def as_columns(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Expert after expert, by the columns of a matrix."""
        gates = torch.zeros(x.shape[0], self.recipe.sizes[2], dtype=weights.dtype).scatter(1, ids, weights)
        return torch.stack([column.unsqueeze(-1) * self.one(x, e) for e, column in enumerate(gates.unbind(-1))]).sum(0)

    def as_stacked(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The picks' outputs, taken from those of all experts."""
        every = torch.stack([self.one(x, e) for e in range(self.recipe.sizes[2])], dim=1)
        return (every.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1])) * weights.unsqueeze(-1)).sum(1)

    def as_stacked_dense(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = torch.zeros(x.shape[0], self.recipe.sizes[2], dtype=weights.dtype).scatter(1, ids, weights)
        every = torch.stack([self.one(x, e) for e in range(self.recipe.sizes[2])], dim=1)
        return torch.einsum("te,teh->th", gates.to(x.dtype), every)

    def by_definition(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The meaning of every form, in float32: x [T, H], ids and weights [T, K]."""
        rows = []
        for row, picked, weight in zip(x.unsqueeze(1), ids.tolist(), weights.float(), strict=True):
            outputs = torch.cat([self.one(row, e) for e in picked]).float()  # [K, H]
            rows.append(weight @ outputs)
        return torch.stack(rows)


def _grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, stack, offs=ends)


class Block(nn.Module):
    """A router and its experts, perhaps with an expert that all tokens share."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        hidden = recipe.sizes[0]
        self.gate, self.experts = Gate(recipe), Experts(recipe)
        self.shared = nn.Sequential(nn.Linear(hidden, 5), nn.SiLU(), nn.Linear(5, hidden))
        self.shared_gate = nn.Linear(hidden, 1)
        self.to(recipe.dtype).eval().requires_grad_(False)

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.recipe.seed + 1)
        return torch.randn(*self.recipe.leading, self.recipe.sizes[0], generator=generator).to(self.recipe.dtype)

    def forward(self, x: Tensor) -> Tensor:
        recipe, shape = self.recipe, x.shape
        keeps_axes = recipe.flatten == "never" and recipe.form == "gathered"
        rows = x if keeps_axes else x.reshape(-1, shape[-1])
        seen = rows if recipe.flatten == "first" else x
        ids, weights = self.gate(seen) if recipe.nested else self.gate.forward(seen)
        if not keeps_axes:
            ids, weights = ids.reshape(-1, recipe.picks), weights.reshape(-1, recipe.picks)
        out = self.experts(rows, ids, weights) if recipe.nested else self.experts.forward(rows, ids, weights)
        return _KEEPS[recipe.keeps[4]](self.with_shared(rows, out)).view(shape)

    def with_shared(self, rows: Tensor, out: Tensor) -> Tensor:
        if self.recipe.shared == "none":
            return out
        shared = self.shared(rows)
        return out + (shared * self.shared_gate(rows).sigmoid() if self.recipe.shared == "gated" else shared)

    def expected(self, x: Tensor, policy: Any) -> Tensor:
        """The block with ``policy``, a function (hidden, ids, weights) -> (ids, weights), before its experts."""
        rows = x.flatten(0, -2)
        ids, weights = policy(rows, *self.gate.decide(x if self.recipe.flatten != "first" else rows))
        return self.with_shared(rows, self.experts.by_definition(rows, ids, weights).to(x.dtype)).view(x.shape)
