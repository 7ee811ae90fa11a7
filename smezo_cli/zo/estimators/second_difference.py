"""Estimate slope and curvature along a direction from the losses on both sides and between."""

from collections.abc import Sequence

from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Move, Term


class PairAndCentre:
    """Gives projected_grad u, and the curvature beside it, from three losses.

    projected_grad = [L(theta + eps u) - L(theta - eps u)] / (2 eps)
    curvature = |L(theta + eps u) + L(theta - eps u) - 2 L(theta)| / (2 eps^2)
    """

    num_scalars = 2
    num_terms = 1

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 3

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        there = Move((Term(Key(ask.step), ask.eps),))
        (plus, minus), (centre,) = ask.losses([(there, there.negated()), (Move(()),)])
        second = abs(plus + minus - 2 * centre)
        return [(plus - minus) / (2 * ask.eps), second / (2 * ask.eps**2)]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`; ``also["curvature"]`` is the second scalar."""
        slope, curvature = scalars
        return Gradient((Term(Key(step), slope),), also={"curvature": curvature})
