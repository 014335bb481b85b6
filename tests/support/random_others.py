"""Random blocks that select, sort, gather and scatter, and route nothing to experts.

Each has scores, a choice among them and a use of it.  Many dimensions are as large as each other, and stacks of matrices
[E, ., .] that serve everybody stand beside, before and behind them, to mislead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

USES = (
    "embed", "embed_weighted", "codebook", "codebook_nearest", "prompts", "k_winners", "k_winners_einsum", "k_winners_stack",
    "token_gather",
    "attention_mask", "synthesizer", "knn_attention", "expert_choice", "expert_choice_dense", "depth", "pool", "group_pick",
    "group_pick_stack", "nucleus", "sampler", "beam_step", "class_counts", "labels", "median", "threshold", "rank", "shuffle",
    "hash", "position_bias", "head_scores", "retrieval", "memory_write", "ids_out", "soft_stack", "lsh",
    "soft_boost", "pushed_down", "without_picks", "channel_groups", "scaled_stack", "threshold_stack", "expert_choice_turned",
)  # fmt: skip


@dataclass(frozen=True)
class Other:
    """How a block is made; printed by hypothesis where an example fails."""

    use: str
    select: str
    scores: str
    choices: int  # how many there are to choose from
    k: int
    tokens: int
    hidden: int
    decoy: str  # where a stack of matrices, one for each choice, stands that every token goes through
    seed: int

    def build(self) -> Block:
        torch.manual_seed(self.seed)
        return Block(self)


@st.composite
def others(draw: st.DrawFn) -> Other:
    choices = draw(st.sampled_from([4, 6, 8]))
    return Other(
        use=draw(st.sampled_from(USES)),
        select=draw(st.sampled_from(["topk", "topk_unsorted", "sort", "argsort", "argmax", "max"])),
        scores=draw(st.sampled_from(["logits", "softmax", "sigmoid", "biased"])),
        choices=choices,
        k=draw(st.integers(1, 3)),
        tokens=draw(st.sampled_from([choices, choices, 3, 12])),
        hidden=draw(st.sampled_from([choices, 8, 10])),
        decoy=draw(st.sampled_from(["none", "none", "before", "beside", "behind", "on_result", "gated"])),
        seed=draw(st.integers(0, 99)),
    )


class Block(nn.Module):
    """x [T, H] -> [T, H] (or whatever the use gives)."""

    def __init__(self, other: Other) -> None:
        super().__init__()
        n, h, width = other.choices, other.hidden, 5
        self.other = other
        self.router = nn.Linear(h, n)
        self.to_tokens = nn.Linear(h, other.tokens)
        self.query, self.key, self.value = (nn.Linear(h, h) for _ in range(3))
        self.table = nn.Embedding(n, h)
        self.bias = nn.Parameter(0.3 * torch.randn(n))
        self.up = nn.Parameter(torch.randn(n, h, width) * h**-0.5)
        self.down = nn.Parameter(torch.randn(n, width, h) * width**-0.5)
        if other.use == "ids_out":  # ids that leave a block which holds as many stacked matrices may well route
            self.up = self.down = None
        self.register_buffer("fixed_ids", torch.randint(n, (other.tokens,)))

    def inputs(self) -> Tensor:
        return torch.randn(self.other.tokens, self.other.hidden, generator=torch.Generator().manual_seed(self.other.seed + 1))

    def forward(self, x: Tensor) -> object:
        decoy = self.other.decoy if self.up is not None else "none"
        if decoy == "before":
            x = x + self.mixture(x)
        out = getattr(self, "use_" + self.other.use)(x)
        if decoy == "beside":
            beside = self.mixture(x)
            return out + (beside if out.shape == x.shape else beside.mean()) if isinstance(out, Tensor) else (*out, beside)
        if decoy == "behind" and isinstance(out, Tensor) and out.shape == x.shape:
            return self.mixture(out)
        if decoy == "on_result" and isinstance(out, Tensor) and out.shape == x.shape:
            return x + self.mixture(x + out)
        if decoy == "gated" and isinstance(out, Tensor) and out.shape == x.shape:
            return self.mixture(x) * out.sigmoid()
        return out

    def mixture(self, x: Tensor) -> Tensor:
        """Every matrix on every token, all of the same weight: heads."""
        if self.other.seed % 2:
            return torch.bmm(F.gelu(torch.bmm(x.expand(self.other.choices, *x.shape), self.up)), self.down).mean(0)
        return torch.einsum("etw,ewh->th", F.silu(torch.einsum("th,ehw->etw", x, self.up)), self.down)

    def scored(self, scores: Tensor) -> Tensor:
        kind = self.other.scores
        if kind == "softmax":
            return scores.softmax(-1)
        if kind == "sigmoid":
            return scores.sigmoid()
        return scores + self.bias if kind == "biased" and scores.shape[-1] == self.other.choices else scores

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Values and ids [..., k] along the last axis."""
        kind, k = self.other.select, min(self.other.k, scores.shape[-1])
        if kind in ("topk", "topk_unsorted"):
            return tuple(scores.topk(k, dim=-1, sorted=kind == "topk"))  # type: ignore[return-value]
        if kind == "sort":
            values, ids = scores.sort(dim=-1, descending=True)
            return values[..., :k], ids[..., :k]
        if kind == "argsort":
            ids = scores.argsort(dim=-1, descending=True)[..., :k]
            return scores.gather(-1, ids), ids
        if kind == "argmax":
            ids = scores.argmax(-1, keepdim=True)
            return scores.gather(-1, ids), ids
        return tuple(scores.max(-1, keepdim=True))  # type: ignore[return-value]

    def picks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.select(self.scored(self.router(x)))

    # what a choice is used for

    def use_embed(self, x: Tensor) -> Tensor:
        return x + self.table(self.picks(x)[1]).mean(1)

    def use_embed_weighted(self, x: Tensor) -> Tensor:
        values, ids = self.picks(x)
        return (self.table(ids) * values.unsqueeze(-1)).sum(1)

    def use_codebook(self, x: Tensor) -> Tensor:
        """Straight through: the codes of the likeliest entries."""
        codes = F.embedding(self.picks(x)[1], self.table.weight).sum(1)
        return x + (codes - x).detach()

    def use_codebook_nearest(self, x: Tensor) -> Tensor:
        codes = self.table.weight
        distances = x.square().sum(-1, keepdim=True) - 2 * x @ codes.t() + codes.square().sum(-1)
        return codes[self.select(-distances)[1]].mean(1)

    def use_prompts(self, x: Tensor) -> Tensor:
        """Stacks looked up, and nothing goes through them."""
        values, ids = self.picks(x)
        return x + (self.down[ids] * values[..., None, None]).sum((1, 2))

    def use_k_winners(self, x: Tensor) -> Tensor:
        values, ids = self.picks(x)
        return torch.zeros(x.shape[0], self.other.choices).scatter(1, ids, values) @ self.table.weight

    def use_k_winners_einsum(self, x: Tensor) -> Tensor:
        hot = F.one_hot(self.picks(x)[1], self.other.choices).to(x.dtype)
        return torch.einsum("tke,eh->th", hot, self.table.weight)

    def use_k_winners_stack(self, x: Tensor) -> Tensor:
        values, ids = self.picks(x)
        return torch.einsum("te,ewh->th", torch.zeros(x.shape[0], self.other.choices).scatter(1, ids, values), self.down)

    def use_token_gather(self, x: Tensor) -> Tensor:
        """Every token picks tokens, by a learned map of as many outputs."""
        values, ids = self.select(self.to_tokens(x).softmax(-1))
        return (x[ids] * values.unsqueeze(-1)).sum(1)

    def use_attention_mask(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).t()
        mask = torch.full_like(scores, -math.inf).scatter(-1, self.select(scores)[1], 0.0)
        return (scores + mask).softmax(-1) @ self.value(x)

    def use_synthesizer(self, x: Tensor) -> Tensor:
        """Attention whose pattern is a linear map of each token, kept where it is largest."""
        scores = self.to_tokens(x)
        values, ids = self.select(scores)
        return torch.full_like(scores, -math.inf).scatter(-1, ids, values).softmax(-1) @ self.value(x)

    def use_knn_attention(self, x: Tensor) -> Tensor:
        """Over the nearest tokens only."""
        values, ids = self.select(self.query(x) @ self.key(x).t())
        return torch.einsum("tk,tkh->th", values.softmax(-1), self.value(x)[ids])

    def use_expert_choice(self, x: Tensor) -> Tensor:
        weights, tokens = self.select(self.router(x).softmax(-1).t())
        out = torch.bmm(F.silu(torch.bmm(x[tokens], self.up)), self.down) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens.flatten(), out.flatten(0, 1))

    def use_expert_choice_dense(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        weights, tokens = scores.topk(min(self.other.k, x.shape[0]), dim=0)
        gates = torch.zeros_like(scores).scatter(0, tokens, weights)
        every = torch.einsum("etw,ewh->eth", F.silu(torch.einsum("th,ehw->etw", x, self.up)), self.down)
        return torch.einsum("te,eth->th", gates, every)

    def use_depth(self, x: Tensor) -> Tensor:
        """Mixture of depths: a few tokens go through the layer."""
        weights, tokens = self.select(self.router(x)[:, 0].unsqueeze(0))
        return x.index_add(0, tokens[0], self.value(x[tokens[0]]) * weights[0].sigmoid().unsqueeze(-1))

    def use_pool(self, x: Tensor) -> Tensor:
        """The largest of each feature over the tokens."""
        return self.select(self.value(x).t())[0].mean(-1) + x

    def use_group_pick(self, x: Tensor) -> Tensor:
        scores = self.scored(self.router(x))
        groups = self.select(scores.view(x.shape[0], 2, -1).amax(-1))[1][:, :1]
        mask = torch.zeros(x.shape[0], 2).scatter(1, groups, 1.0).repeat_interleave(self.other.choices // 2, -1)
        return (scores * mask) @ self.table.weight

    def use_group_pick_stack(self, x: Tensor) -> Tensor:
        """The best half of the experts runs whole: nothing picks single experts."""
        scores = self.router(x).softmax(-1)
        groups = self.select(scores.view(x.shape[0], 2, -1).sum(-1))[1][:, :1]
        mask = torch.zeros(x.shape[0], 2).scatter(1, groups, 1.0).repeat_interleave(self.other.choices // 2, -1)
        every = torch.einsum("etw,ewh->eth", F.silu(torch.einsum("th,ehw->etw", x, self.up)), self.down)
        return torch.einsum("te,eth->th", scores * mask, every)

    def use_nucleus(self, x: Tensor) -> Tensor:
        """As many as it takes."""
        chances, order = self.router(x).softmax(-1).sort(dim=-1, descending=True)
        kept = chances * ((chances.cumsum(-1) - chances) < 0.7)
        gates = torch.zeros_like(kept).scatter(-1, order, kept)
        every = torch.einsum("etw,ewh->eth", F.silu(torch.einsum("th,ehw->etw", x, self.up)), self.down)
        return torch.einsum("te,eth->th", gates, every)

    def use_sampler(self, x: Tensor) -> Tensor:
        """A place among the likeliest, by fixed chances; then the token's embedding."""
        values, ids = self.picks(x)
        place = (values.softmax(-1).cumsum(-1) < 0.5).sum(-1, keepdim=True).clamp(max=ids.shape[-1] - 1)
        return self.table(ids.gather(-1, place).squeeze(-1))

    def use_beam_step(self, x: Tensor) -> object:
        """Beams (tokens) times words, flattened."""
        n = self.other.choices
        values, flat = self.select(self.router(x).log_softmax(-1).view(1, -1))
        return x[flat[0] // n] + self.table(flat[0] % n), values

    def use_class_counts(self, x: Tensor) -> Tensor:
        return F.one_hot(self.picks(x)[1], self.other.choices).sum((0, 1)).float()

    def use_labels(self, x: Tensor) -> Tensor:
        """How often the prediction is right."""
        return (self.picks(x)[1] == self.fixed_ids.unsqueeze(-1)).any(-1).float().mean()

    def use_median(self, x: Tensor) -> Tensor:
        return x - self.router(x).sort(dim=-1).values[:, self.other.choices // 2, None]

    def use_threshold(self, x: Tensor) -> Tensor:
        """What is smaller than the k-th largest is cut off: a sparse activation."""
        units = self.scored(self.router(x))
        return units.masked_fill(units < self.select(units)[0][..., -1:], 0.0) @ self.table.weight

    def use_rank(self, x: Tensor) -> Tensor:
        """Each unit's place among its row's."""
        return self.router(x).argsort(-1).argsort(-1).float() @ self.table.weight

    def use_shuffle(self, x: Tensor) -> Tensor:
        """Tokens in the order of a score, and back."""
        order = self.router(x)[:, 0].argsort()
        return self.value(x[order])[order.argsort()]

    def use_hash(self, x: Tensor) -> Tensor:
        """Experts by a fixed table of tokens."""
        ids = self.fixed_ids
        return torch.einsum("tw,twh->th", F.silu(torch.einsum("th,thw->tw", x, self.up[ids])), self.down[ids])

    def use_position_bias(self, x: Tensor) -> Tensor:
        return x + self.bias[self.picks(x)[1]].sum(-1, keepdim=True)

    def use_head_scores(self, x: Tensor) -> Tensor:
        """A softmax by hand takes the largest score off first."""
        scores = self.router(x)
        shifted = (scores - scores.max(-1, keepdim=True).values).exp()
        return (shifted / shifted.sum(-1, keepdim=True)) @ self.table.weight

    def use_retrieval(self, x: Tensor) -> Tensor:
        """Documents [N, H] by their keys, read by a linear layer."""
        values, ids = self.select(F.normalize(x, dim=-1) @ F.normalize(self.table.weight, dim=-1).t())
        return self.value((self.table(ids) * values.softmax(-1).unsqueeze(-1)).sum(1))

    def use_memory_write(self, x: Tensor) -> Tensor:
        """Tokens are added to the slots they pick, which all tokens then read."""
        ids = self.picks(x)[1][:, 0]
        memory = torch.zeros(self.other.choices, x.shape[-1]).index_add(0, ids, x)
        return (x @ memory.t()).softmax(-1) @ memory

    def use_ids_out(self, x: Tensor) -> object:
        return self.picks(x)

    def use_soft_stack(self, x: Tensor) -> Tensor:
        """A soft mixture; the likeliest is only counted."""
        scores = self.router(x).softmax(-1)
        load = F.one_hot(scores.argmax(-1), self.other.choices).float().mean(0)
        every = torch.einsum("etw,ewh->eth", F.silu(torch.einsum("th,ehw->etw", x, self.up)), self.down)
        return torch.einsum("te,eth->th", scores, every) * (load * scores.mean(0)).sum()

    def use_lsh(self, x: Tensor) -> Tensor:
        """Tokens sorted by bucket, and attention among neighbours."""
        order = self.picks(x)[1][:, 0].argsort(stable=True)
        rows = x[order]
        return (rows + rows.roll(1, 0))[order.argsort()]

    def every(self, x: Tensor) -> Tensor:
        return torch.einsum("etw,ewh->eth", F.silu(torch.einsum("th,ehw->etw", x, self.up)), self.down)

    def use_soft_boost(self, x: Tensor) -> Tensor:
        """A soft mixture in which the picks count twice."""
        scores = self.router(x).softmax(-1)
        picked = torch.zeros_like(scores).scatter(-1, self.select(scores)[1], 1.0)
        return torch.einsum("te,eth->th", scores * (1 + picked), self.every(x))

    def use_pushed_down(self, x: Tensor) -> Tensor:
        """The picks say which scores count, by a large number."""
        scores = self.router(x)
        picked = torch.zeros_like(scores).scatter(-1, self.select(scores)[1], 1.0)
        return torch.einsum("te,eth->th", (scores - 1e9 * (1 - picked)).softmax(-1), self.every(x))

    def use_without_picks(self, x: Tensor) -> Tensor:
        """A soft mixture of all but the picks."""
        scores = self.router(x).softmax(-1)
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, self.select(scores)[1], True)
        return torch.einsum("te,eth->th", scores.masked_fill(picked, 0.0), self.every(x))

    def use_channel_groups(self, x: Tensor) -> Tensor:
        """Columns of the picks' weights, each times some channels of one map."""
        values, ids = self.picks(x)
        gates = torch.zeros(x.shape[0], self.other.choices).scatter(1, ids, values)
        channels = self.value(x)
        return torch.cat([gates[:, e : e + 1] * channels[:, e % x.shape[1]].unsqueeze(-1) for e in range(self.other.choices)], -1)

    def use_scaled_stack(self, x: Tensor) -> Tensor:
        """As many outputs as choices, all of one map."""
        values, ids = self.picks(x)
        gates = torch.zeros(x.shape[0], self.other.choices).scatter(1, ids, values)
        return torch.einsum("te,teh->th", gates, torch.stack([self.value(x) * (e + 1) for e in range(self.other.choices)], 1))

    def use_threshold_stack(self, x: Tensor) -> Tensor:
        """All experts whose score reaches the k-th best."""
        scores = self.router(x).softmax(-1)
        return torch.einsum("te,eth->th", scores * (scores >= self.select(scores)[0][:, -1:]), self.every(x))

    def use_expert_choice_turned(self, x: Tensor) -> Tensor:
        """Scores that stand before tokens, of which each expert picks some."""
        scores = (self.router.weight @ x.t()).softmax(0)
        weights, tokens = self.select(scores)
        out = torch.bmm(F.silu(torch.bmm(x[tokens], self.up)), self.down) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens.flatten(), out.flatten(0, 1))
