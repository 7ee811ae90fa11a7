"""LOZO-M: LOZO with a momentum that is as small as its directions (arXiv 2410.07698)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Fraction
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.momentum import Momentum


class LOZOM(ZeroOrder):
    """Move each matrix W (m, n) along N V^T, with N (m, r) a running mean.

    One step, with U and V as of :class:`smezo_cli.methods.lozo.LOZO`:

        projected_grad = [L(W + eps U V^T) - L(W - eps U V^T)] / (2 eps)
        N <- beta N + (1 - beta) projected_grad U
        W <- W - lr (N V^T + weight_decay W)

    At each nu-th step, where V is new, N <- N V_old^T V / n comes first: what it stood for, as
    the new V shows it. Tensors of one dimension have dense noise, and a mean of their own size.
    Two forwards a query; kept are N and V, 4 r (m + n) bytes a matrix.

    The lr is that of the printed grid, as for LOZO. In the released code the U of a refresh,
    which was not the one probed, also entered N; here it is the probed one.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        refresh_every: nu.
        beta: decay of the mean, in [0, 1); 0 is LOZO.
        num_queries: directions of a step.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 2,
        refresh_every: Count = 50,
        beta: Fraction = 0.9,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Factored("uv", rank, refresh_every),
            estimator=TwoSided(num_queries),
            update=Momentum(beta),
            **common,
        )
