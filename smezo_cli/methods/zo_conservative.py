"""ZO-SGD-Cons: take MeZO's step, none, or the opposite one, by the loss (arXiv 2402.11592)."""

from typing import Any, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, Move
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.sgd import SGD


class LowestOfThree:
    """Takes the factor of lr among 1, 0 and -1 whose loss is lowest, on the batch of the step.

    The points are the weights as SGD would write them, its weight decay and its rounding to
    nearest included, so the loss of the one that is taken is that of the weights after the step.
    Of equal losses the step is taken before none, and none before the opposite one.
    """

    def measure(self, ask: Ask, gradient: Gradient, lr: float, decay: float) -> float:
        """See :class:`StepSize`."""
        there, opposite = gradient.move(-lr, decay), gradient.move(lr, -decay)
        (loss_there, loss_opposite), (loss_here,) = ask.losses([(there, opposite), (Move(()),)])
        losses = {1.0: loss_there, 0.0: loss_here, -1.0: loss_opposite}
        return min(losses, key=lambda factor: losses[factor])  # the first of equal ones

    def forwards(self, factor: float) -> int:
        """See :class:`StepSize`."""
        return 3

    def identity(self) -> dict[str, Any]:
        """See :class:`StepSize`."""
        return {}


class ZOConservative(ZeroOrder):
    """Take MeZO's step only if it lowers the loss of its batch most; else none, or its opposite.

    One step, for queries q = 1..Q with directions z_q ~ N(0, I):

        projected_grad_q = [L(theta + eps z_q) - L(theta - eps z_q)] / (2 eps)
        g = 1/Q sum_q projected_grad_q z_q + weight_decay theta
        theta <- the one of theta - lr g, theta, theta + lr g with the lowest L

    Forwards a step: 2 Q + 3. The logged loss is the mean of them all, so that of the three points
    is in it. Keeps no state; the factor of lr, which is 1, 0 or -1, is recorded
    beside the projected gradients, so a replay needs no forward. Of equal losses theta - lr g is
    taken before theta, and theta before theta + lr g. The released code takes theta + lr g where
    all three are equal, which under an objective such as accuracy is often so, and then climbs.

    The three losses are those of weights rounded to nearest. With ``rounding="stochastic"`` they
    are losses near the weights that a step leaves, not of them.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped before the
            three losses are measured. ``executor="in_place"`` cannot measure them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=SGD(),
            step_size=LowestOfThree(),
            **common,
        )
