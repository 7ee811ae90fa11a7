"""TeZO-m: TeZO along a running mean of its steps, r numbers a matrix (arXiv 2501.19057)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Fraction
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.momentum import Momentum


class TeZOM(ZeroOrder):
    """Move each matrix W (m, n) along U diag(mu) V^T / sqrt(r), with mu (r) a running mean.

    One step, with U, V, tau and projected_grad as of :class:`smezo_cli.methods.tezo.TeZO`:

        mu <- beta mu + (1 - beta) projected_grad tau
        W <- W - lr (U diag(mu) V^T / sqrt(r) + weight_decay W)

    As U and V stay, this is exactly TeZO with a mean of whole matrices. Tensors of one dimension
    have dense noise, and a mean of their own size. Two forwards a query; kept are mu, U and V,
    4 r (m + n + 1) bytes a matrix. That it is a mean, not a sum, and its decay are our choice.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        beta: decay of the mean, in [0, 1); 0 is TeZO.
        num_queries: directions of a step.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 32,
        beta: Fraction = 0.9,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Factored("cp", rank, None),
            estimator=TwoSided(num_queries),
            update=Momentum(beta),
            **common,
        )
