"""Hand-written layers with topk, sort and scatter in them: some route tokens to experts, most do not.

``ROUTES`` are found with the given number of picks; ``LEFT_ALONE`` must never be rewritten.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, E, K, I, V = 16, 6, 2, 12, 6  # V: a vocabulary as large as the number of experts, to mislead


class Layer(nn.Module):
    """A router and a stack of two-layer experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, H, I) * H**-0.5)
        self.down = nn.Parameter(torch.randn(E, I, H) * I**-0.5)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, weights) [T, K] of the picks, best first: what the router decides."""
        weights, ids = self.router(x).softmax(-1).topk(K)
        return ids, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.route(x))

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight * expert over the picks, by gathered weights."""
        hidden = F.silu(torch.einsum("th,tkhi->tki", x, self.up[ids]))
        return torch.einsum("tki,tkih,tk->th", hidden, self.down[ids], weights)

    def run_dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """Every expert on every token, weighted by a matrix [T, E]."""
        every = torch.bmm(F.silu(torch.bmm(x.expand(E, *x.shape), self.up)), self.down)
        return torch.einsum("te,eth->th", gates, every)


class SoftmaxThenTopK(Layer):
    """Renormalised in place."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        weights /= weights.sum(-1, keepdim=True)
        return ids, weights


class TopKThenSoftmax(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = torch.topk(self.router(x), K, dim=1, sorted=False)
        return ids, values.softmax(-1)


class SortThenSlice(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, order = torch.sort(self.router(x).sigmoid(), dim=-1, descending=True)
        return order[..., :K], values[..., :K]


class GatheredBiased(Layer):
    """The biased scores choose, the plain scores weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.3 * torch.randn(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).sigmoid()
        ids = (scores + self.bias).topk(K, dim=-1, sorted=False).indices
        weights = scores.gather(-1, ids)
        return ids, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)


class PerExpertScale(Layer):
    """The scale of a pick is looked up by its id and belongs to the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.5 + torch.rand(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return ids, weights * self.scale[ids]


class DenseScatter(Layer):
    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        return self.run_dense(x, torch.zeros(x.shape[0], E).scatter(1, ids, weights))


class DenseScatterInPlace(Layer):
    """Renormalised as a matrix."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        weights, ids = scores.topk(K)
        gates = torch.zeros_like(scores)
        gates.scatter_(-1, ids, weights)
        return self.run_dense(x, gates / gates.sum(-1, keepdim=True))


class InfinityScatter(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = self.router(x).topk(K)
        return ids, values.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        values, ids = logits.topk(K)
        return self.run_dense(x, torch.full_like(logits, float("-inf")).scatter(-1, ids, values).softmax(-1))


class DenseOneHot(Layer):
    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        return self.run_dense(x, (F.one_hot(ids, E).to(weights) * weights.unsqueeze(-1)).sum(1))


class ThreeDimensional(Layer):
    """Batch and sequence stay apart."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, -1, H)
        weights, ids = self.router(x).softmax(-1).topk(K)
        hidden = F.silu(torch.einsum("bsh,bskhi->bski", x, self.up[ids]))
        return torch.einsum("bski,bskih,bsk->bsh", hidden, self.down[ids], weights).flatten(0, 1)


class EveryExpertPicked(Layer):
    """K = E."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(E)
        return ids, weights


class WeightsAfterIds(Layer):
    """The experts begin before the weights are final."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        hidden = F.silu(torch.einsum("th,tkhi->tki", x, self.up[ids]))
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("tki,tkih,tk->th", hidden, self.down[ids], weights)


class CosineRouter(Layer):
    """The router's weight is normalised first."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.linear(x, F.normalize(self.router.weight, dim=-1)).softmax(-1).topk(K)
        return ids, weights


class LoopOverExperts(Layer):
    """Every expert on every token, one after the other, by masks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        return sum(expert(x) * (weights * (ids == e)).sum(-1, keepdim=True) for e, expert in enumerate(self.experts))

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every = torch.stack([expert(x) for expert in self.experts], dim=1)  # [T, E, H]
        return torch.einsum("tkh,tk->th", every.gather(1, ids.unsqueeze(-1).expand(-1, -1, H)), weights)


class EinsumRouter(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.einsum("eh,th->te", self.router.weight, x).softmax(-1).topk(K)
        return ids, weights


class ArgsortThenSlice(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        ids = scores.argsort(-1, descending=True)[:, :K]
        return ids, scores.gather(-1, ids)


class LastOfAscending(Layer):
    """The best picks stand last, the very best at the end."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        ids = scores.argsort(-1)[:, -K:]
        return self.run(x, ids, scores.gather(-1, ids))


class LastOfSorted(LastOfAscending):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).sort(dim=-1)
        return self.run(x, ids[:, E - K :], weights[:, E - K :])


class AscendingTurned(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        ids = scores.argsort(-1).flip(-1)[:, :K]
        return ids, scores.gather(-1, ids)


class LastTurned(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.sort(self.router(x).softmax(-1))
        return ids[:, -K:].flip(-1), weights[:, -K:].flip(-1)


class DescendingTurned(Layer):
    """The worst: an order turned round."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        ids = scores.argsort(-1, descending=True).flip(-1)[:, :K]
        return ids, scores.gather(-1, ids)


class EveryOther(Layer):
    """The best pick and the third."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        ids = scores.argsort(-1, descending=True)[:, : 2 * K : 2]
        return ids, scores.gather(-1, ids)


class LastOfTurned(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        ids = scores.argsort(-1).flip(-1)[:, -K:]
        return ids, scores.gather(-1, ids)


class SmallestNegated(Layer):
    """The k smallest of negated scores are the k best."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        ids = (-scores).argsort(-1)[:, :K]
        return ids, scores.gather(-1, ids)


class NormedLogits(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(E)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.norm(self.router(x)).softmax(-1).topk(K)
        return ids, weights


class MaxInTurn(Layer):
    """The second best is the best once the first is out."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x)
        first = scores.max(-1, keepdim=True)
        second = scores.scatter(-1, first.indices, float("-inf")).max(-1, keepdim=True)
        chances = [scores.softmax(-1).gather(-1, best.indices) for best in (first, second)]
        return torch.cat([first.indices, second.indices], dim=-1), torch.cat(chances, dim=-1)


class BestOnly(Layer):
    """One pick, with no axis for it; batch and sequence stay apart."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).max(-1, keepdim=True)
        return ids, weights

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, -1, H)
        weights, ids = self.router(x).softmax(-1).max(-1)
        hidden = F.silu(torch.einsum("bsh,bshi->bsi", x, self.up[ids]))
        return (torch.einsum("bsi,bsih->bsh", hidden, self.down[ids]) * weights.unsqueeze(-1)).flatten(0, 1)


class BestAsMatrix(BestOnly):
    """The one pick as a row over all experts."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        ids = scores.argmax(-1)
        weights = scores.gather(-1, ids.unsqueeze(-1))
        return self.run_dense(x, torch.zeros_like(scores).scatter(-1, ids.unsqueeze(-1), weights))


class CountedGroups(Layer):
    """Rows sorted by expert, in groups as large as a matrix of ones says."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.flatten().sort(stable=True).indices
        sizes = self.sizes(x, ids)
        expert = torch.repeat_interleave(torch.arange(E), sizes, output_size=ids.numel())
        rows = torch.bmm(F.silu(torch.bmm(x[order // K].unsqueeze(1), self.up[expert])), self.down[expert]).squeeze(1)
        return torch.zeros_like(x).index_add(0, order // K, rows * weights.flatten()[order].unsqueeze(-1))

    def sizes(self, x: Tensor, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.zeros(x.shape[0], E).scatter(1, ids, 1).long().sum(0)
        return torch.bincount(ids.flatten(), minlength=E)  # right also where a token has an expert twice


class SortedIds(Layer):
    """Of a sort only the ids are read."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        _, order = torch.sort(scores, dim=-1, descending=True)
        ids = order[:, :K]
        return ids, scores.gather(-1, ids)


class ReshapedOnTheWay(Layer):
    """The weights go through another shape before they are renormalised."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        weights = weights.flatten().view_as(ids)
        return ids, weights / weights.unsqueeze(0).squeeze(0).sum(-1, keepdim=True)


class IdsLaidOutLikeWeights(Layer):
    """The ids take the shape of weights that are made after them."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        weights = weights / weights.sum(-1, keepdim=True)
        return ids.flatten().view_as(weights), weights


class EveryExpertAsMatrix(Layer):
    """K = E, so that picks and a matrix over the experts have one shape."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(E)
        return ids, weights

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        return self.run_dense(x, torch.zeros(x.shape[0], E).scatter(1, ids, weights))


class FlatMatrix(Layer):
    """Batch and sequence are apart where experts are picked, and together in the matrix of weights."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x.view(2, -1, H)).softmax(-1).topk(K)
        return self.run_dense(x, torch.zeros(x.shape[0], E).scatter(1, ids.view(-1, K), weights.view(-1, K)))


class TransposedRouter(Layer):
    """Experts stand before tokens."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (self.router.weight @ x.T).softmax(0).topk(K, dim=0)
        return ids.T, weights.T


class TransposedEinsum(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.einsum("eh,th->et", self.router.weight, x).sigmoid().topk(K, dim=0, sorted=False)
        return ids.T.contiguous(), weights.T.contiguous()


class ChannelsFirst(Layer):
    """Experts stand between batch and sequence."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x.view(2, -1, H)).transpose(1, 2).softmax(1).topk(K, dim=1)
        return self.run(x, ids.transpose(1, 2).reshape(-1, K), weights.transpose(1, 2).reshape(-1, K))


class TransposedBest(BestOnly):
    """One pick, from experts that stand before tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).T.softmax(0).max(0)
        return self.run(x, ids.unsqueeze(1), weights.unsqueeze(1))


class MatrixByColumns(LoopOverExperts):
    """The matrix of weights is made first, and each column of it weighs an expert's output."""

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.zeros(x.shape[0], E)
        ids, weights = self.route(x)
        gates = gates.scatter(1, ids, weights)
        return sum(gates[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class MatrixUnbound(LoopOverExperts):
    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        columns = torch.zeros(x.shape[0], E).scatter(1, ids, weights).unbind(-1)
        shared = x * 1
        return sum(column.unsqueeze(-1) * expert(shared) for column, expert in zip(columns, self.experts, strict=True))


class MatrixAtPicked(LoopOverExperts):
    """The ids say for which tokens an expert counts, and a matrix says how much."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        gates, out = torch.zeros(x.shape[0], E).scatter(1, ids, weights), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + torch.where((ids == e).any(-1, keepdim=True), gates[:, e : e + 1] * expert(x), 0.0)
        return out


class MatrixInLastLayer(Layer):
    """The matrix of weights stands in one product with the experts' last layer."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        hidden = F.silu(torch.einsum("th,ehi->tei", x, self.up))
        return torch.einsum("tei,eih,te->th", hidden, self.down, gates)


class StackedOutputs(LoopOverExperts):
    """All experts run, and the picks' outputs are taken from theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.route(x))


class Normalized(Layer):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return ids, F.normalize(weights, p=1, dim=-1)


class MatrixNormalized(Normalized):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.run_dense(x, F.normalize(torch.zeros(x.shape[0], E).scatter(1, ids, weights), p=1, dim=-1))


class RootsOfMatrix(Layer):
    """Each number of the matrix is replaced by its root."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return ids, weights.sqrt()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.run_dense(x, torch.zeros(x.shape[0], E).scatter(1, ids, weights).sqrt())


class StackedOutputsTaken(LoopOverExperts):
    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (torch.take_along_dim(every, ids.unsqueeze(-1), dim=1) * weights.unsqueeze(-1)).sum(1)


class StackedOutputsIndexed(LoopOverExperts):
    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        every = torch.stack([expert(x) for expert in self.experts])
        return (every[ids, torch.arange(x.shape[0]).unsqueeze(1)] * weights.unsqueeze(-1)).sum(1)


class MatrixOfLengthOne(Layer):
    """Each token's row of the matrix is divided by its length."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return ids, weights / weights.norm(dim=-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        return self.run_dense(x, gates / gates.norm(dim=-1, keepdim=True))


class MaskedLogits(Layer):
    """What was not picked is masked before the softmax."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = self.router(x).topk(K)
        return ids, values.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        out = torch.ones_like(logits, dtype=torch.bool).scatter(-1, logits.topk(K).indices, False)
        return self.run_dense(x, logits.masked_fill(out, float("-inf")).softmax(-1))


class MaskedLogitsWhere(MaskedLogits):
    """The mask says what stays, and the fill is a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        stays = torch.zeros_like(logits).scatter(-1, logits.topk(K).indices, 1.0) > 0
        return self.run_dense(x, torch.where(stays, logits, torch.tensor(torch.finfo(torch.float32).min)).softmax(-1))


class MaskedScores(Layer):
    """One-hot masks of the picks, added up, times the scores."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        gates = scores * F.one_hot(scores.topk(K).indices, E).sum(dim=1)
        return self.run_dense(x, gates / gates.sum(-1, keepdim=True))


class PutAtPlaces(Layer):
    """Weights looked up and put down by row and column."""

    def forward(self, x: Tensor) -> Tensor:
        scores, rows = self.router(x).softmax(-1), torch.arange(x.shape[0])[:, None]
        ids = scores.topk(K).indices
        gates = torch.zeros_like(scores)
        gates[rows, ids] = scores[rows, ids]
        return self.run_dense(x, gates)


class FloatIds(Layer):
    """The ids travel as floats."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        return self.run(x, ids.float().long(), weights)


class RowsOfMatrices(Layer):
    """The experts' matrices are looked up as rows of a table."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        up, down = (F.embedding(ids, w.flatten(1)).view(*ids.shape, *w.shape[1:]) for w in (self.up, self.down))
        return torch.einsum("tki,tkih,tk->th", F.silu(torch.einsum("th,tkhi->tki", x, up)), down, weights)


class SelectsMore(Layer):
    """More are selected than are used."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = self.router(x).softmax(-1).topk(K + 2)
        return ids[:, :K], values[:, :K]


class NormalisedFlat(Layer):
    """Batch and sequence are apart where experts are picked, and together where weights are normalised."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x.view(2, -1, H)).softmax(-1).topk(K)
        weights = weights.flatten(0, 1)
        return self.run(x, ids.flatten(0, 1), weights / weights.sum(-1, keepdim=True))


class DoubleRouter(Layer):
    """Scored in double precision by the first half of a wider projection."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E + 5, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.double(), self.router.weight.double())[:, :E]
        weights, ids = logits.softmax(-1).topk(K)
        return ids, weights.to(x)


class TwoOpinions(Layer):
    """The mean of two routers decides, and its temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(H, E)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = (0.5 * (self.router(x) + self.other(x))).topk(K, sorted=False)
        return ids, (values / self.temperature.exp()).softmax(-1)


class InOrderOfIds(Layer):
    """A token's picks are brought into the order of their ids."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, order = ids.sort(-1)
        return super().run(x, ids, weights.gather(-1, order))


class Capacity(Layer):
    """GShard: what overflows an expert's capacity is dropped, so an off pick must not take a place."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hot = F.one_hot(ids, E)  # [T, K, E]
        place = (hot.flatten(0, 1).cumsum(0).view_as(hot) * hot).sum(-1) - 1
        return super().run(x, ids, weights * (place < 3))


ROUTES: dict[type[Layer], int] = {
    SoftmaxThenTopK: K, TopKThenSoftmax: K, SortThenSlice: K, GatheredBiased: K, PerExpertScale: K, DenseScatter: K,
    DenseScatterInPlace: K, InfinityScatter: K, DenseOneHot: K, ThreeDimensional: K, EveryExpertPicked: E,
    WeightsAfterIds: K, CosineRouter: K, LoopOverExperts: K, Capacity: K,
    EinsumRouter: K, ArgsortThenSlice: K, LastOfAscending: K, LastOfSorted: K, AscendingTurned: K, LastTurned: K,
    SmallestNegated: K, NormedLogits: K, CountedGroups: K, MaxInTurn: 2, BestOnly: 1,
    BestAsMatrix: 1, SortedIds: K, ReshapedOnTheWay: K, EveryExpertAsMatrix: E, FlatMatrix: K,
    IdsLaidOutLikeWeights: K, TransposedRouter: K, TransposedEinsum: K, ChannelsFirst: K, TransposedBest: 1,
    MatrixByColumns: K, MatrixUnbound: K, StackedOutputs: K, StackedOutputsIndexed: K, MaskedLogits: K, MaskedLogitsWhere: K,
    MaskedScores: K, PutAtPlaces: K, FloatIds: K, RowsOfMatrices: K, SelectsMore: K, NormalisedFlat: K, DoubleRouter: K,
    TwoOpinions: K, InOrderOfIds: K, MatrixAtPicked: K, MatrixInLastLayer: K,
    MatrixOfLengthOne: K, StackedOutputsTaken: K, RootsOfMatrix: K, Normalized: K, MatrixNormalized: K,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ left alone


class Sampler(Layer):
    """Top-k sampling over a vocabulary, then the embedding of the winners."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return (self.embedding(ids) * weights.unsqueeze(-1)).sum(1)


class Indexer(Layer):
    """Sparse attention: every position picks positions."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x) @ self.router(x).T
        ids = scores.topk(K, dim=-1).indices
        mask = torch.full_like(scores, float("-inf")).scatter(-1, ids, 0.0)
        return (scores + mask).softmax(-1) @ x


class ExpertChoice(Layer):
    """Experts pick tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weights, tokens = self.router(x).softmax(-1).T.topk(3)
        y = torch.bmm(F.silu(torch.bmm(x[tokens], self.up)), self.down) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens.flatten(), y.flatten(0, 1))


class ExpertChoiceDown(Layer):
    """Experts pick tokens, along the first axis."""

    def forward(self, x: Tensor) -> Tensor:
        weights, tokens = (w.T for w in self.router(x).softmax(-1).topk(3, dim=0))
        y = torch.bmm(F.silu(torch.bmm(x[tokens], self.up)), self.down) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens.flatten(), y.flatten(0, 1))


class GatheredTransposed(Layer):
    """The weights are looked up by ids that stand before the tokens."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).T.softmax(0)
        ids = scores.topk(K, dim=0).indices
        return ids.T, scores.gather(0, ids).T


class NucleusRouting(Layer):
    """As many experts as it takes to reach a probability: no fixed K."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities, order = self.router(x).softmax(-1).sort(dim=-1, descending=True)
        kept = probabilities * ((probabilities.cumsum(-1) - probabilities) < 0.6)
        return self.run_dense(x, torch.zeros_like(probabilities).scatter(-1, order, kept))


class GroupOnly(Layer):
    """Two groups of three experts; the best group runs whole.  Nothing picks single experts."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        groups = scores.view(-1, 2, 3).amax(-1).topk(1).indices
        mask = torch.zeros(x.shape[0], 2).scatter(1, groups, 1.0)
        return self.run_dense(x, scores * mask.repeat_interleave(3, dim=-1))


class SmallestPicks(Layer):
    """largest=False: the picks are the worst experts, in an order that SERE does not mean."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, largest=False)
        return self.run(x, ids, weights)


class ShiftedIds(Layer):
    """Ids are changed by arithmetic before they select, so the router's experts are not the ones that run."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return (ids + 1) % E, weights


class Median(Layer):
    """A sort that is not about routing."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.router(x).sort(dim=-1, descending=True).values[..., E // 2, None]


class OneHotScores(Layer):
    """The weights are looked up by the ids through a one-hot product, so they would change with the ids."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        ids = scores.topk(K).indices
        return ids, (F.one_hot(ids, E) * scores.unsqueeze(1)).sum(-1)


class MaskedIds(Layer):
    """Padding is switched off after the selection, and must not vote for primary experts."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return ids.masked_fill((x[:, :1] < 0), 0), weights


class PromptPool(Layer):
    """Prompts [E, ., H] picked by similarity: nothing goes through them."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return x + torch.einsum("tkih,tk->th", self.down[ids], weights)


class KWinners(Layer):
    """A sparse activation: the k largest units of a hidden layer stay, then a product with a stack of as many rows."""

    def forward(self, x: Tensor) -> Tensor:
        values, ids = self.router(x).topk(K)
        sparse = torch.zeros(x.shape[0], E).scatter(1, ids, values)
        return torch.einsum("te,eih->th", sparse, self.down)


class ClassCounts(Layer):
    """Predictions counted class by class."""

    def forward(self, x: Tensor) -> Tensor:
        ids = self.router(x).topk(K).indices
        return torch.stack([(ids == c).sum() for c in range(E)]).float()


class ClassMeans(Layer):
    """A prototype for each class, of the tokens that may belong to it, and one layer for them all."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        masks = [(weights * (ids == c)).sum(-1, keepdim=True) for c in range(E)]
        return torch.stack([F.silu((x * mask).sum(0) @ self.up[0]) @ self.down[0] for mask in masks])


class NegatedDistance(Layer):
    """Scores that are no linear map."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (-torch.cdist(x, self.router.weight)).softmax(-1).topk(K)
        return ids, weights


class ProductKeys(Layer):
    """Experts 2 x 3, a row and a column for each pick: the ids of no selection are those of the experts."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self.router(x)[:, :2].topk(2), self.router(x)[:, 2:5].topk(2)
        scores = (rows.values.unsqueeze(-1) + columns.values.unsqueeze(-2)).flatten(1)
        candidates = (rows.indices.unsqueeze(-1) * 3 + columns.indices.unsqueeze(-2)).flatten(1)
        weights, best = scores.topk(K)
        return candidates.gather(-1, best), weights.softmax(-1)


class MasksInTurn(Layer):
    """Two argmax whose picks never stand in one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        first = F.one_hot(scores.argmax(-1), E)
        second = F.one_hot(scores.masked_fill(first.bool(), float("-inf")).argmax(-1), E)
        return self.run_dense(x, scores * (first + second))


class Heads(Layer):
    """What a vocabulary's likeliest words look up, and matrices [E, ., .] that every token goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)

    def looked_up(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return (self.embedding(ids) * weights.unsqueeze(-1)).sum(1)

    def heads(self, x: Tensor) -> Tensor:
        return self.run_dense(x, torch.full((x.shape[0], E), 1 / E))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x + self.looked_up(x))


class HeadsBeside(Heads):
    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x) + self.looked_up(x)


class HeadsGated(Heads):
    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x) * self.looked_up(x).sigmoid()


class HeadsOverPrompts(Heads):
    """Stacked prompts are looked up and added to the tokens before the heads."""

    def looked_up(self, x: Tensor) -> Tensor:
        return self.down[self.router(x).topk(K).indices].mean((1, 2))


class HeadsGatedByMemory(Heads):
    """Tokens are written to the slots that they pick."""

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.zeros(V, H).index_add(0, self.router(x).argmax(-1), x)
        return self.heads(x) * ((x @ memory.T).softmax(-1) @ memory).sigmoid()


class HeadsScaledByLoad(Heads):
    """A soft mixture, scaled by how evenly the tokens' favourites are spread."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        load = F.one_hot(scores.topk(K).indices, E).sum(1).float().mean(0)
        return self.run_dense(x, scores) * (load * scores.mean(0)).sum()


class SortedBuckets(Heads):
    """Tokens in the order of their buckets, smoothed with their neighbours; then heads."""

    def forward(self, x: Tensor) -> Tensor:
        order = self.router(x).argmax(-1).argsort(stable=True)
        rows = x[order]
        return self.heads((rows + rows.roll(1, 0))[order.argsort()])


class OneHotLookUp(Heads):
    """A table read by a product."""

    def forward(self, x: Tensor) -> Tensor:
        hot = F.one_hot(self.router(x).topk(K).indices, V).to(x)
        return torch.einsum("tkv,vh->th", hot, self.embedding.weight)


class OneHotCounts(Layer):
    """Predictions counted all at once."""

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(self.router(x).topk(K).indices, E).sum((0, 1)).float()


class LastVisitors(Layer):
    """The ids also say where each expert's last token is kept: two picks of one expert would overwrite each other."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        visitors = torch.zeros(E, H).index_copy(0, ids[:, 0], x)
        return self.run(x, ids, weights) + visitors.sum(0)


class ReachTheKth(Layer):
    """Scores that reach the k-th best stay: more than k where some are equal."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        gates = scores * (scores >= scores.topk(K).values[..., -1:])
        return self.run_dense(x, gates / gates.sum(-1, keepdim=True))


class BelowTheKth(Layer):
    """The rest is masked before the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        bound = logits.kthvalue(E - K + 1, dim=-1, keepdim=True).values
        return self.run_dense(x, logits.masked_fill(logits < bound, float("-inf")).softmax(-1))


class EqualToBest(Layer):
    """The best expert, or several equals."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        return self.run_dense(x, torch.where(scores == scores.amax(-1, keepdim=True), scores, 0.0))


class ReachTheKthUnit(Layer):
    """A sparse activation: units that reach the k-th best stay, then a product with a stack of as many rows."""

    def forward(self, x: Tensor) -> Tensor:
        units = self.router(x)
        sparse = torch.where(units >= units.topk(K).values[:, -1:], units, 0.0)
        return torch.einsum("te,eih->th", sparse, self.down)


class DropsBest(Layer):
    """The best pick is left out."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = self.router(x).softmax(-1).topk(K + 1)
        return ids[:, 1:], values[:, 1:]


class PushedDown(Layer):
    """What was not picked is pushed down by a large number: a mask that says which scores count, and no weights."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        stays = torch.zeros_like(logits).scatter(-1, logits.topk(K).indices, 1.0)
        return self.run_dense(x, (logits + (1 - stays) * -1e9).softmax(-1))


class Boosted(Layer):
    """A soft mixture, in which what was picked counts twice."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        return self.run_dense(x, scores * (1 + torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0)))


class WithoutBest(Layer):
    """The picks are what is not used."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        return self.run_dense(x, scores.masked_fill(torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0) > 0, 0.0))


class ChannelGroups(Layer):
    """Columns of a matrix of weights, each times a group of channels of one projection: no experts."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        units = x @ self.up[0]
        return torch.cat([gates[:, e : e + 1] * units[:, 2 * e : 2 * e + 2] for e in range(E)], dim=-1)


class StackOfScales(Layer):
    """As many outputs as there are choices, all of one layer."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        every = torch.stack([F.silu(x @ self.up[0]) * (e + 1) for e in range(E)], dim=1)
        return torch.einsum("te,teh->th", torch.zeros(x.shape[0], E).scatter(1, ids, weights), every)


class RowsOfTheRouter(Layer):
    """The weights are made once more, from the router's rows that the ids say."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.router(x).topk(K).indices
        return ids, torch.einsum("th,tkh->tk", x, self.router.weight[ids]).softmax(-1)


class RankOneExperts(Layer):
    """The first half of every expert is one row of a product for all, of which the picks' entries are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(H, E, bias=False)
        self.second = nn.Parameter(torch.randn(E, 1, H))

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        inner = self.first(x).gather(1, ids).unsqueeze(-1)
        return torch.einsum("tkr,tkrh,tk->th", inner, self.second[ids], weights)


class ChosenAgain(Layer):
    """More are chosen than are used: which of them, a bias says."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, candidates = self.router(x).softmax(-1).topk(K + 2)
        weights, places = (values + self.bias[candidates]).topk(K)
        return candidates.gather(1, places), weights


class ReplacedIds(Layer):
    """Padding goes to one expert."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return torch.where(x[:, :1] < 0, torch.zeros_like(ids), ids), weights


class FirstReplaced(Layer):
    """Some tokens' first pick is another."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return torch.stack([torch.where(x[:, 0] < 0, 0, ids[:, 0]), ids[:, 1]], dim=1), weights


class WrittenInOrder(Layer):
    """The weights are put down expert by expert: of two picks on one expert the second is written over the first."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        gates = torch.zeros(E, x.shape[0])
        gates[ids.flatten()[order], order // K] = weights.flatten()[order]
        return self.run_dense(x, gates.T)


class LargestWeight(Layer):
    """The largest of a token's weights on an expert counts, not their sum."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        masks = [(weights * (ids == e)).max(-1, keepdim=True).values for e in range(E)]
        return sum(mask * (F.silu(x @ self.up[e]) @ self.down[e]) for e, mask in enumerate(masks))


class FirstPlace(Layer):
    """The weight of the first place at which an expert stands."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            here = ids == e
            weight = weights.gather(1, here.int().argmax(-1, keepdim=True)) * here.any(-1, keepdim=True)
            out = out + weight * (F.silu(x @ self.up[e]) @ self.down[e])
        return out


class PickedOnce(Layer):
    """Experts that were picked once count, and those that were picked twice do not."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hot = F.one_hot(ids, E)
        return self.run_dense(x, (hot * weights.unsqueeze(-1)).sum(1) * (hot.sum(1) == 1))


class InputTimesPicks(LoopOverExperts):
    """Experts see 0 where they were not picked, and would see the double where they were picked twice."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        masks = [ids == e for e in range(E)]
        inputs = [x * mask.sum(-1, keepdim=True) for mask in masks]
        outputs = [expert(i) for expert, i in zip(self.experts, inputs, strict=True)]
        return sum((weights * mask).sum(-1, keepdim=True) * y for mask, y in zip(masks, outputs, strict=True))


class SquashedOutputs(Layer):
    """Every expert's weighed output is squashed by itself."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        columns = torch.zeros(x.shape[0], E).scatter(1, ids, weights).T.unsqueeze(-1)
        return torch.tanh(columns * torch.bmm(F.silu(torch.bmm(x.expand(E, *x.shape), self.up)), self.down)).sum(0)


class LargestOutput(Layer):
    """Of all experts' weighed outputs the largest numbers count."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        columns = torch.zeros(x.shape[0], E).scatter(1, ids, weights).T.unsqueeze(-1)
        return (columns * torch.bmm(F.silu(torch.bmm(x.expand(E, *x.shape), self.up)), self.down)).amax(0)


class SquashedInTurn(LoopOverExperts):
    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        masks = [(weights * (ids == e)).sum(-1, keepdim=True) for e in range(E)]
        return sum(torch.tanh(mask * expert(x)) for mask, expert in zip(masks, self.experts, strict=True))


class ChunkMemory(Layer):
    """Chunks of a memory are looked up and attended to: their rows are keys and values, and no layer of an expert."""

    def forward(self, x: Tensor) -> Tensor:
        chunks = self.down[self.router(x).topk(K).indices].flatten(1, 2)
        return x + torch.einsum("tc,tch->th", torch.einsum("th,tch->tc", x, chunks).softmax(-1), chunks)


class ProjectedMemory(ChunkMemory):
    """The chunks' keys are projected first."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        chunks = self.down[self.router(x).topk(K).indices].flatten(1, 2)
        return torch.einsum("tc,tch->th", torch.einsum("th,tch->tc", x, self.key(chunks)).softmax(-1), chunks)


LEFT_ALONE: tuple[type[Layer], ...] = (
    Sampler, Indexer, ExpertChoice, NucleusRouting, GroupOnly, SmallestPicks, ShiftedIds, Median,
    OneHotScores, MaskedIds, PromptPool, KWinners, ClassCounts, NegatedDistance, DescendingTurned, LastOfTurned, EveryOther,
    ProductKeys, MasksInTurn,
    Heads, HeadsBeside, HeadsGated, HeadsOverPrompts, HeadsGatedByMemory, HeadsScaledByLoad, SortedBuckets, OneHotLookUp,
    OneHotCounts, LastVisitors, ReachTheKth, BelowTheKth, EqualToBest, ReachTheKthUnit, ExpertChoiceDown,
    GatheredTransposed, DropsBest, PushedDown, Boosted, WithoutBest, ChannelGroups, StackOfScales,
    RowsOfTheRouter, RankOneExperts, ChosenAgain, ReplacedIds, FirstReplaced, WrittenInOrder, LargestWeight, FirstPlace,
    PickedOnce, InputTimesPicks, ChunkMemory, ClassMeans, SquashedOutputs,
    LargestOutput, SquashedInTurn, ProjectedMemory,
)  # fmt: skip
