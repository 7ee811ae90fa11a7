"""Block-wise ZO-SGD: a projected gradient for each block of the model (arXiv 2402.11592)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Unpack

from torch import nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Move, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise
from smezo_cli.zo.selections.layers import frozen, layers_of, place_of
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check, select
from smezo_cli.zo.updates.sgd import SGD


class EachBlock:
    """Estimate 1/Q sum_q sum_b projected_grad_qb u_qb, where u_qb is zero outside of block b.

        projected_grad_qb = [L(theta + eps u_qb) - L(theta - eps u_qb)] / (2 eps)

    A query has one key for all blocks: the noise of a tensor is named by the tensor, so blocks of
    equal shapes have different noise, and the u_qb of all blocks together are MeZO's z_q.

    Args:
        blocks: names of the tensors of each block.
        num_queries: Q.

    Raises:
        ValueError: there is no query.
    """

    def __init__(self, blocks: Sequence[frozenset[str]], num_queries: int = 1) -> None:
        check(num_queries >= 1, f"num_queries={num_queries}: must be at least 1")
        self.blocks, self.num_queries = tuple(blocks), num_queries
        self.num_scalars = len(blocks) * num_queries
        self.num_terms = num_queries  # of any one tensor

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 2 * self.num_scalars

    def _terms(self, step: int, coefficients: Sequence[float]) -> tuple[Term, ...]:
        own = keys(step, self.num_queries)
        whats = [(key, block) for key in own for block in self.blocks]
        pairs = zip(whats, coefficients, strict=True)
        return tuple(Term(key, coefficient, block) for (key, block), coefficient in pairs)

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        there = [Move((term,)) for term in self._terms(ask.step, [ask.eps] * self.num_scalars)]
        losses = ask.losses([(move, move.negated()) for move in there])
        return [(plus - minus) / (2 * ask.eps) for plus, minus in losses]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        return Gradient(self._terms(step, scalars), divisor=self.num_queries)


def blocks_of(targets: Sequence[Target], num_blocks: int | None) -> list[frozenset[str]]:
    """Return the names of the tensors of each block.

    Args:
        targets: the trained tensors.
        num_blocks: how many blocks of neighbouring layers there are; None: each layer is a block.
            Tensors of no layer, such as embeddings, are a block more.

    Raises:
        ValueError: there are more blocks than layers.
    """
    layers = layers_of(targets)
    rest = layers.pop("", [])
    numbered = sorted(layers, key=place_of)
    count = len(numbered) if num_blocks is None else num_blocks
    check(
        count <= len(numbered),
        f"num_blocks={count}: {len(numbered)} trained layers have a number in their names, such as "
        "model.layers.3, and a block is one or more of them; leave num_blocks out",
    )
    ends = [i * len(numbered) // count for i in range(count + 1)] if count else []
    groups = [numbered[start:end] for start, end in pairwise(ends)]
    blocks = [[target for layer in group for target in layers[layer]] for group in groups]
    return [frozenset(t.name for t in block) for block in [rest, *blocks] if block]


class ZOBlock(ZeroOrder):
    """Measure a projected gradient for each block of the model, and move all blocks at once.

    One step, for queries q = 1..Q and blocks b = 1..B, with z_qb ~ N(0, I) on block b alone:

        projected_grad_qb = [L(theta + eps z_qb) - L(theta - eps z_qb)] / (2 eps)
        theta <- theta - lr (1/Q sum_q sum_b projected_grad_qb z_qb + weight_decay theta)

    A block is a layer: all tensors whose names begin with the same number, such as model.layers.3.
    With ``num_blocks`` it is a group of neighbouring layers, and the groups are about equally many
    layers long. Tensors of no layer (embeddings, the last norm, the head) are one block more.

    Forwards a step: 2 Q B; Q B scalars are recorded. Keeps no state.

    The released code draws the noise of every block from one seed, so blocks of equal shapes are
    probed along the same numbers; here every tensor has noise of its own. By default it moves a
    block before it probes the next one; here all blocks are probed at the same weights, which is
    its other mode. Its embeddings and its last norm are a block each.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_blocks: groups of layers; None: each layer is a block.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; the projected gradient of each block is
            clipped by itself. ``executor="in_place"`` moves all tensors, so it does not go with it.

    Raises:
        ValueError: there are more blocks than layers.
    """

    groups_by: ClassVar = "num_queries num_blocks"
    estimator: EachBlock

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: Count | None = None,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        freeze = common["freeze"] = frozen(model, common)
        blocks = blocks_of(select(dynamo.original(model), freeze, []), num_blocks)
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=EachBlock(blocks, num_queries),
            update=SGD(),
            **common,
        )

    @property
    def num_groups(self) -> int:
        """Return how many groups of points ranks can share in a step."""
        return self.estimator.num_scalars
