"""MeZO: dense two-sided zeroth-order SGD (arXiv 2305.17333, Algorithm 1)."""

from typing import ClassVar, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.sgd import SGD


class MeZO(ZeroOrder):
    """Perturb every weight that is trained.

    One step, for queries q = 1..Q with directions z_q ~ N(0, I):

        projected_grad_q = [L(theta + eps z_q) - L(theta - eps z_q)] / (2 eps)
        theta <- theta - lr (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    names_itself: ClassVar = False

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
            selection=Everything(named="small"),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )
