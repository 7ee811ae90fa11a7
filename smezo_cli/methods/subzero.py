"""SubZero: two-sided zeroth-order SGD in a random subspace of each layer (arXiv 2410.08989)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, YesNo
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.sgd import SGD


class SubZero(ZeroOrder):
    """Perturb each matrix W (m, n) along P = s U Z V^T, in frames U, V that stay for T0 steps.

    One step, with Z (r, r) Gaussian at each step and U (m, r), V (n, r) random with orthonormal
    columns at each T0-th:

        projected_grad = [L(W + eps P) - L(W - eps P)] / (2 eps)
        W <- W - lr (projected_grad P + weight_decay W)

    s = sqrt(m n) / r, as in the released code: P is then as long as dense noise, on average, and
    eps and lr mean what they mean to MeZO. A matrix with a side below r has that side as its r.
    Tensors of one dimension are perturbed along dense Gaussian noise. Two forwards a query; nothing
    is kept but U and V, 4 r (m + n) bytes a matrix.

    Frames are those of Gaussian matrices, made by their Gram matrix with signs that leave them
    uniformly distributed (the released code takes what LAPACK's QR leaves), and named by seed and
    interval: the released code makes them at T0-th steps alone, so that a run that is resumed
    between two of them has none. Several queries have a Z each, which the released code refuses.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        refresh_every: T0.
        square: the entries of a matrix are put into the most square one of as many, first: what the
            released code does with the tensors of LoRA and of prefixes.
        num_queries: directions of a step.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 32,
        refresh_every: Count = 1000,
        square: YesNo = False,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Factored("uzv", rank, refresh_every, is_square=square),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )
