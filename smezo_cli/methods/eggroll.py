"""EGGROLL: an evolution strategy whose members differ by thin products (arXiv 2511.16652)."""

import math
from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Move, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Epsilon
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.sgd import SGD


class Population:
    """Estimate 1/sqrt(N) sum_p (L_p+ - L_p-) / s E_p, of the losses of N members.

    s is the standard deviation of these losses. Members come in pairs at theta + eps E_p and
    theta - eps E_p. With the fitness -L less its mean and over s this is -sqrt(N) times the mean of
    fitness times E over all members.

    Args:
        num_pairs: N / 2.
        floor: s is at least so much.

    Raises:
        ValueError: there is no pair.
    """

    def __init__(self, num_pairs: int, floor: float) -> None:
        check(num_pairs >= 1, f"num_queries={num_pairs}: must be at least 1")
        self.num_terms, self.num_scalars, self.floor = num_pairs, 2 * num_pairs, floor

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return self.num_scalars

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`; the scalars are the losses of the members, pair by pair."""
        there = [Move((Term(key, ask.eps),)) for key in keys(ask.step, self.num_terms)]
        pairs = ask.losses([(move, move.negated()) for move in there])
        return [loss for pair in pairs for loss in pair]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        size = len(scalars)
        mean = math.fsum(scalars) / size
        spread = math.sqrt(math.fsum((loss - mean) ** 2 for loss in scalars) / size)
        pairs = zip(scalars[::2], scalars[1::2], strict=True)
        scores = [(plus - minus) / max(spread, self.floor) for plus, minus in pairs]
        return Gradient(tuple(map(Term, keys(step, self.num_terms), scores)), math.sqrt(size))


class EGGROLL(ZeroOrder):
    """Move the weights by what members of a population score, each at a thin product from them.

    One step, with A_p (m, r) and B_p (n, r) Gaussian for each pair p of a matrix W (m, n):

        E_p = A_p B_p^T / sqrt(r);  members i = 1..N, two a pair, at W + eps E_p and W - eps E_p
        s_i = (F_i - mean F) / max(std F, floor),  F_i = -L_i the fitness of member i
        W <- W + lr (sqrt(N) 1/N sum_i s_i E_i - weight_decay W),  E_i = E_p or -E_p

    std is that of the N members (of all, not of a sample). sqrt(N) is the released code's: steps
    have one length, some sqrt(2 m n) lr, whatever the losses and N are. Any score will do as the
    loss, such as ``objective=accuracy``; where all members score alike, nothing moves.

    Forwards a step: N = 2 ``num_queries``. Nothing is kept: A and B are drawn again from keys, and
    the sum is applied as one product of rank r N / 2. What is logged as projected_grad of a pair
    is (L_p+ - L_p-) / std.

    The released code trains matrices of adapters and hands the estimate to an optimiser of choice;
    here it is SGD on what ``freeze`` and ``adapter`` leave. Tensors of one dimension have dense
    Gaussian noise, our choice, as are N and the floor. Where r > 1, that E and not A B^T is what
    the sum is of is our reading.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        num_queries: pairs of members, N / 2.
        floor: of the standard deviation of losses, which rounding alone may make.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise,
            ``clip_projected_grad`` cuts (L_p+ - L_p-) / std.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 1,
        num_queries: Count = 8,
        floor: Epsilon = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        self.floor = floor
        super().__init__(
            model,
            selection=Everything(),
            direction=Factored("ab", rank, None),
            estimator=Population(num_queries, floor),
            update=SGD(),
            **common,
        )

    def identity(self) -> dict[str, Any]:
        """See :meth:`Parts.identity`."""
        return {**super().identity(), "floor": self.floor}
