"""ZO-SGD-MMT: torch's SGD with momentum on MeZO's estimate (arXiv 2402.11592)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Fraction, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.momentum import Momentum


class ZOMomentum(ZeroOrder):
    """Keep a decaying sum of MeZO's estimates, and move the weights along it: 4 bytes a weight.

    One step, for queries q = 1..Q with directions z_q ~ N(0, I):

        projected_grad_q = [L(theta + eps z_q) - L(theta - eps z_q)] / (2 eps)
        m <- momentum m + 1/Q sum_q projected_grad_q z_q, with m = 0 at first
        theta <- theta - lr (m + weight_decay theta)

    The sum is that of ``torch.optim.SGD``, which the released code gives the estimate to: at
    momentum 0.9 the same lr goes ten times as far as without. Weight decay is apart from the sum,
    as everywhere in smezo; torch's SGD has it inside, and the released code sets none.

    Forwards a step: 2 Q.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        momentum: decay of the sum, in [0, 1).
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped before the
            sum.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: Fraction = 0.9,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=Momentum(momentum, of_sum=True),
            **common,
        )
