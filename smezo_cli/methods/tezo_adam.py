"""TeZO-Adam: Adam on TeZO's steps, with moments of r numbers a matrix (arXiv 2501.19057)."""

from collections.abc import Callable, Sequence
from typing import Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.base import Change
from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, Move
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.passes.low_rank import EagerLowRank, Factors, RowsOf
from smezo_cli.zo.ranges import Count, Decays, Epsilon
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.adam import Adam
from smezo_cli.zo.updates.base import WeightWriter


class ByRows(Factored):
    """Makes updates that are no product of thin matrices, some rows of a matrix at a time."""

    def change_rows(
        self,
        step: int,
        move: Move,
        of: Callable[[Target], Change],
        rows_of: Callable[[Target, Tensor], RowsOf],
    ) -> None:
        """Do as :meth:`change`, but ask for what is added to a matrix rows by rows.

        Args:
            step: number of the step.
            move: whose terms are summed.
            of: as there, of a tensor without factors.
            rows_of: of a matrix, takes the sum of the terms' cores.
        """
        mover, eager = self.mover(step, move), EagerLowRank(self.update_passes.rule)
        for target in mover.moved:
            if (shape := self.shape_of(target)) is None:
                self.dense.change_one(target, mover.noise, of(target))
            else:
                rows = rows_of(target, mover.core(target))
                eager.add(target.flat, target.flat, shape, rows, mover.noise.draw(target))

    def squared(self, target: Target, core: Tensor) -> Factors:
        """Return the product that a core stands for in squared factors: sum_s U_is^2 V_js^2 v_s."""
        left, right = self.factors_of(target)
        return Factors(left * left * core, right * right)


class TauAdam(Adam):
    """Keeps moments of cores, and divides entry by entry what they stand for.

    Args:
        direction: of the method.
        betas: see :class:`Adam`.
        adam_eps: likewise.
    """

    def __init__(self, direction: ByRows, betas: Sequence[float], adam_eps: float) -> None:
        super().__init__(betas, adam_eps)
        self._direction = direction

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        state, number, direction = weights.state, weights.step, self._direction
        multiply = direction.probe_passes.product

        def of(target: Target) -> Change:
            m, v = state.of(target)

            def change(part: slice, g: Tensor) -> Tensor:
                self.enter(g, m[part], v[part])
                return self.step(m[part], v[part], lr, number + 1)

            return change

        def rows_of(target: Target, g: Tensor) -> RowsOf:
            m, v = state.of(target)
            self.enter(g, m, v)
            mean, square = direction.lifted(target, m), direction.squared(target, v)

            def rows(rows: slice) -> Tensor:
                both = multiply(mean.rows(rows)), multiply(square.rows(rows))
                return self.step(*both, lr, number + 1)

            return rows

        direction.change_rows(number, gradient.move(1.0, lr * weights.weight_decay), of, rows_of)


class TeZOAdam(ZeroOrder):
    """Divide TeZO's mean by the root of a mean square, both kept as r numbers a matrix.

    One step t = 1, 2, ..., with U, V, tau and projected_grad as of
    :class:`smezo_cli.methods.tezo.TeZO`, and U over sqrt(r):

        g = projected_grad tau
        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        M_ij = sum_s U_is V_js m_s / (1 - beta1^t);  S_ij = sum_s U_is^2 V_js^2 v_s / (1 - beta2^t)
        W <- W - lr (M / (sqrt(S) + adam_eps) + weight_decay W)

    S is the mean square of the entries of the estimate but for products of two of its r parts,
    which are 0 on average. M and S are made some rows at a time and never kept. A step by
    M / sqrt(S) is no product, so that it leaves the span of TeZO's steps. Tensors of one dimension
    have dense noise and Adam's own moments. Two forwards a query; kept are m, v, U and V,
    4 r (m + n + 2) bytes a matrix, where MeZO-Adam keeps 8 m n.

    The divisions by 1 - beta^t are our choice, as in Adam; so is r, of which the paper takes one
    for each layer. No code was released.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        betas: decay of the moments, each in [0, 1).
        adam_eps: added to the root of the second moment; Adam's own epsilon, not the probe's.
        num_queries: directions of a step.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise. Of
            the first step's moves of a matrix lr is about the root mean square; none is above
            sqrt(r) lr.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 32,
        betas: Decays = (0.9, 0.999),
        adam_eps: Epsilon = 1e-8,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        direction = ByRows("cp", rank, None)
        super().__init__(
            model,
            selection=Everything(),
            direction=direction,
            estimator=TwoSided(num_queries),
            update=TauAdam(direction, betas, adam_eps),
            **common,
        )
