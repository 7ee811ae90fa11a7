"""Estimate the gradient from the losses on both sides of the weights (MeZO, arXiv 2305.17333)."""

from collections.abc import Sequence

from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Term, keys
from smezo_cli.zo.targets import check


class TwoSided:
    """Estimate 1/Q sum_q projected_grad_q u_q, with a key of its own for each query.

        projected_grad_q = [L(theta + eps u_q) - L(theta - eps u_q)] / (2 eps)

    Args:
        num_queries: Q.

    Raises:
        ValueError: there is no query.
    """

    def __init__(self, num_queries: int = 1) -> None:
        check(num_queries >= 1, f"num_queries={num_queries}: must be at least 1")
        self.num_scalars = self.num_terms = num_queries

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 2 * self.num_scalars

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        return ask.two_sided(keys(ask.step, self.num_scalars))

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        terms = tuple(map(Term, keys(step, self.num_scalars), scalars))
        return Gradient(terms, divisor=self.num_scalars)
