"""MEAZO: MeZO over the root of one running mean square, a single number (arXiv 2605.03869)."""

import math
from typing import Any, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Epsilon, Fraction, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.base import Update, WeightWriter


class ByMeanSquare(Update):
    """Divides g by the root of one running mean, of the square of the mean projected gradient.

        v <- beta v + (1 - beta) (1/Q sum_q projected_grad_q)^2
        theta <- theta - lr (g / [sqrt(v / (1 - beta^t)) + least] + weight_decay theta)

    Args:
        beta: decay of v, in [0, 1).
        least: added to the root.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, beta: float, least: float) -> None:
        check(0 <= beta < 1, f"beta={beta}: a number in [0, 1)")
        check(least > 0, f"least={least}: must be above 0")
        self.beta, self.least = beta, least

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        mean = sum(term.coefficient for term in gradient.terms) / gradient.divisor
        kept, t = weights.state.numbers, weights.step + 1
        v = self.beta * (kept["v"] if weights.step else 0.0) + (1 - self.beta) * mean**2
        kept["v"] = v
        root = math.sqrt(v / (1 - self.beta**t)) + self.least
        weights.move(gradient, -lr / root, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"beta": self.beta, "least": self.least}


class MEAZO(ZeroOrder):
    """Let one number do for all weights what Adam's second moment does for each.

    One step, with MeZO's estimate g = 1/Q sum_q projected_grad_q z_q, and t = 1 at first:

        v <- beta v + (1 - beta) (1/Q sum_q projected_grad_q)^2
        theta <- theta - lr (g / [sqrt(v / (1 - beta^t)) + least] + weight_decay theta)

    A weight moves by about lr a step, whatever the size of the loss. Forwards a step: 2 Q. v is all
    that it keeps.

    v begins at 0 and, as in the paper, is corrected for it like that of Adam: else the first step
    would be 1 / sqrt(1 - beta) times as long. Of the paper we have a summary; ``least`` and the
    default of beta are our choice.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        beta: decay of v, in [0, 1).
        least: added to the root of v.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped before they
            enter v.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: Fraction = 0.99,
        least: Epsilon = 1e-8,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=ByMeanSquare(beta, least),
            **common,
        )
