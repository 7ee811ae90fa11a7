"""LOZO: two-sided zeroth-order SGD along lazy low-rank directions (arXiv 2410.07698)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.sgd import SGD


class LOZO(ZeroOrder):
    """Perturb each matrix W (m, n) along U V^T, where V stays for nu steps.

    One step, with U (m, r) Gaussian at each step and V (n, r) Gaussian at each nu-th:

        projected_grad = [L(W + eps U V^T) - L(W - eps U V^T)] / (2 eps)
        W <- W - lr (projected_grad U V^T + weight_decay W)

    Several queries have a U each, and their mean is taken. Tensors of one dimension are perturbed
    along dense Gaussian noise. Two forwards a query; nothing is kept but V, 4 r n bytes a matrix.

    The paper divides the update by r, and prints lr / r as its lr; the released code does not
    divide either, so lr here is the printed one. At a refresh the released code updates along a
    U that was not probed (it draws V and U for the probe, and U alone, from the same state, for the
    update); here it is the probed one.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r. It scales the probe, too: U V^T is sqrt(m n r) long.
        refresh_every: nu.
        num_queries: directions of a step.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 2,
        refresh_every: Count = 50,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Factored("uv", rank, refresh_every),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )
