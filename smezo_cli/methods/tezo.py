"""TeZO: two-sided zeroth-order SGD in the span of r fixed rank-one matrices (arXiv 2501.19057)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.sgd import SGD


class TeZO(ZeroOrder):
    """Perturb each matrix W (m, n) along Z = U diag(tau) V^T / sqrt(r), in factors drawn once.

    One step, with tau (r) Gaussian at each step, and U (m, r) and V (n, r) Gaussian for the run:

        projected_grad = [L(W + eps Z) - L(W - eps Z)] / (2 eps)
        W <- W - lr (projected_grad Z + weight_decay W)

    Of a matrix only r numbers are new in a step. So all that a run adds to it lies in the span of
    the r matrices u_s v_s^T, whatever the loss is: with a small r much of a gradient is out of
    reach, and a weight decay moves it out of that span alone. Several queries have a tau each, and
    their mean is taken. Tensors of one dimension are perturbed along dense Gaussian noise. Two
    forwards a query; kept are U and V, 4 r (m + n) bytes a matrix.

    1 / sqrt(r) is our choice: Z is as long as dense noise on average, over U and V too, so that eps
    and lr mean what they mean to MeZO. The paper takes an r of its own for each layer, by its
    spectrum; here there is one r. No code was released.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        num_queries: directions of a step.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 32,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Factored("cp", rank, None),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )
