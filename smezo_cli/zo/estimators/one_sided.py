"""Estimate the gradient from losses at the weights and on one side of them."""

from collections.abc import Sequence

from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Move, Term, keys
from smezo_cli.zo.targets import check


class OneSided:
    """Estimate 1/l sum_j projected_grad_j z_j, from losses on one side of the weights.

        projected_grad_j = [L(theta + eps z_j) - L(theta)] / eps

    The l + 1 points are one group. The last scalar is L(theta), which the gradient hands on.

    Args:
        num_queries: l.

    Raises:
        ValueError: there is no query.
    """

    def __init__(self, num_queries: int) -> None:
        check(num_queries >= 1, f"num_queries={num_queries}: must be at least 1")
        self.num_terms, self.num_scalars = num_queries, num_queries + 1

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return self.num_scalars

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        there = [Move((Term(key, ask.eps),)) for key in keys(ask.step, self.num_terms)]
        ((here, *losses),) = ask.losses([(Move(()), *there)])
        return [*((loss - here) / ask.eps for loss in losses), here]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`; ``also["loss"]`` is L(theta)."""
        *slopes, here = scalars
        terms = tuple(map(Term, keys(step, self.num_terms), slopes))
        return Gradient(terms, self.num_terms, {"loss": here})
