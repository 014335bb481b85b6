"""What a value in an experts region can mean: the words that ``fuse_experts`` thinks in."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx.node import Node

#: The order of rows that stand for picks: "flat" is token by token; a ``sort`` node stands for the order it made.
Order = Node | str


@dataclass(frozen=True)
class Ids:
    """Each pick's expert."""

    order: Order


@dataclass(frozen=True)
class Places:
    """For each row of ``order``, which flat pick it is; ``inverse``: for each flat pick, its row."""

    order: Order
    inverse: bool = False


@dataclass(frozen=True)
class Tokens:
    """Each pick's token."""

    order: Order


@dataclass(frozen=True)
class Counts:
    """Picks per expert; ``ends``: where each expert's rows end when picks are sorted by expert."""

    ends: bool = False


@dataclass(frozen=True)
class PickWeights:
    """Each pick's weight."""

    order: Order


@dataclass(frozen=True)
class Hidden:
    """The experts' input, a row for each token."""

    node: Node


@dataclass(frozen=True)
class OwnMatrix:
    """For each pick, its expert's slice of a parameter stacked by expert."""

    stack: Node
    order: Order


@dataclass(frozen=True)
class Rows:
    """For each pick a row of numbers, given by an expression (see ``_ACTIVATIONS`` for how they are spelt)."""

    order: Order
    expression: tuple


@dataclass(frozen=True)
class Grid:
    """For each token and each expert a row of numbers.

    ``axes`` names the dimensions: T tokens, E experts, F experts and in them tokens, C the columns of the row, 1 nothing.
    """

    axes: str
    expression: tuple


@dataclass(frozen=True)
class Gates:
    """The matrix of weights, zero where an expert was not picked; ``axes`` as in ``Grid``."""

    axes: str


@dataclass(frozen=True)
class Hot:
    """For each pick a row over all experts, zero but for its own, which is 1, or the pick's weight; ``axes``: T, K and E."""

    weighted: bool = False
    axes: str = "TKE"


@dataclass(frozen=True)
class Mask:
    """Which picks are one expert's; ``axes``: TK, KT or N, picks in one row.  Or, by T, which tokens have picked it."""

    expert: int
    axes: str


@dataclass(frozen=True)
class Found:
    """Where a mask is true, in its order: an index for each of its axes."""

    mask: Mask


@dataclass(frozen=True)
class At:
    """Where a mask is true: the tokens (T), the places of picks among their tokens' (K), or those among all picks (N)."""

    mask: Mask
    axis: str


@dataclass(frozen=True)
class StackedBias:
    """A parameter [E, C] laid out to be added to a grid."""

    stack: Node
    axes: str


@dataclass(frozen=True)
class One:
    """One expert's slice of a parameter stacked by expert."""

    stack: Node
    expert: int
    turned: bool = False


@dataclass(frozen=True)
class Own:
    """A parameter of one expert alone: a matrix or a bias.  Which expert's it is, is seen where its result is weighted."""

    node: Node
    turned: bool = False


@dataclass(frozen=True)
class Unstacked:
    """A stack taken apart: a tuple of all experts' slices."""

    stack: Node


@dataclass(frozen=True)
class Lone:
    """A row for each token, made by one expert: by its slices of stacks, or, if that is None, by parameters of its own.

    Or, with ``at``, a row for each place where that mask is true.
    """

    expert: int | None
    expression: tuple
    at: Mask | None = None


@dataclass(frozen=True)
class Picked:
    """One expert's weights: of all picks [T, K], zero but for its own (``weights``), or each token's for it.

    These are a ``row`` [T] or a ``column`` [T, 1]; or, with ``at``, there is one for each place where that mask is true.
    """

    expert: int
    form: str
    at: Mask | None = None


@dataclass(frozen=True)
class Partial:
    """Each token's sum over some experts, each weighted by the token's weight for it.

    Parameters of their own are numbered in the expression, and ``own`` holds them, by expert.  With ``per_pick`` nothing is
    summed or weighted yet: there is a row for each pick, written where it is one of those experts'.
    """

    experts: frozenset[int]
    expression: tuple
    own: tuple[tuple[int, tuple[Node, ...]], ...] = ()
    per_pick: bool = False


@dataclass(frozen=True)
class Reached:
    """What stands in a sum so far at the tokens of a mask, and what is added to it there."""

    sum: Partial | Zero
    at: Mask
    added: Lone | None = None


@dataclass(frozen=True)
class Zero:
    """A tensor of zeros."""


@dataclass(frozen=True)
class Never:
    """A mask that is true nowhere: no id of the router's lies past its experts."""


@dataclass(frozen=True)
class Empty:
    """Memory not yet written."""


@dataclass(frozen=True)
class Enumeration:
    """0, 1, 2, ... as many as there are picks."""


@dataclass(frozen=True)
class Halves:
    """The two parts of rows split down the middle."""

    rows: Rows | Grid | Lone


@dataclass(frozen=True)
class Sorted:
    """What ``sort`` returns of ids: themselves in order, and their places."""

    order: Order


@dataclass(frozen=True)
class Output:
    """Each token's sum over its picks."""

    expression: tuple


#: What carries an expression: an op on numbers is one on these.
Numbers = Rows | Grid | Lone
NUMBERS = (Rows, Grid, Lone)
