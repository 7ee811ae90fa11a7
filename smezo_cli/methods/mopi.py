"""MOPI: ZO-Muon by streaming power iteration in place of Newton-Schulz steps (arXiv 2605.09034)."""

import math
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.directions.frames import UNIT, inner, orthonormal
from smezo_cli.zo.estimators.one_sided import OneSided
from smezo_cli.zo.move import Key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common, check_common
from smezo_cli.zo.ranges import Count, Fraction, StepSize
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.sums import on_grid, sum_of_squares
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.spectral import Spectral


def swept(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return U V^T of a matrix M after one sweep of power iteration, and the new V^T.

        V <- orth(M^T M V);  U: the columns of M V, each over its length

    Of zeros: zeros, and V as it was. Sweeps of one M end at its leading singular vectors; wherever
    they stand, U V^T is sqrt(k) long, and <M, U V^T> is positive.

    Args:
        matrix: M, float32 (r, n).
        right: V^T before the sweep, orthonormal rows (k, n); k at most r and n.
    """
    largest = matrix.abs().max()
    if not largest:
        return matrix, right
    scaled = matrix / largest
    m = scaled.double() / math.sqrt(sum_of_squares(scaled))
    # orth(M^T M V) is orth(M^T orth(M V)), whose rows are less alike when they are rounded.
    left = _orthonormal(inner(right, m, UNIT))
    right = _orthonormal(inner(left, m.T, UNIT))
    left = _of_length_1(inner(right, m, UNIT))
    return inner(left.T, right.T, UNIT).float(), right.float()


def _orthonormal(rows: Tensor) -> Tensor:
    """Return the orthonormal rows that Gram and Schmidt make of some, which scales do not change.

    Entries of at most 4 are far from the grid that :func:`orthonormal` rounds them to.
    """
    return orthonormal(rows * (4 / rows.abs().amax(1, keepdim=True)))


def _of_length_1(rows: Tensor) -> Tensor:
    """Return rows over their lengths, with the same bits on every machine."""
    rows = rows / rows.abs().amax(1, keepdim=True)
    return rows / on_grid(rows.square()).sum(1, keepdim=True).sqrt()


class PowerIteration(Spectral):
    """Keeps a mean M of gradients' cores and V, and makes steps of U V^T.

    Args:
        direction: see :class:`Spectral`.
        lr: likewise.
        lr_1d: likewise.
        beta: decay of M.
        steps_rank: k.
    """

    slots = ("momentum", "right")

    def __init__(
        self, direction: Factored, lr: float, lr_1d: float, beta: float, steps_rank: int
    ) -> None:
        super().__init__(direction, lr, lr_1d)
        self.beta, self.steps_rank = beta, steps_rank
        self.own_sizes = {"right": lambda target: math.prod(self._shape_of_right(target))}

    def _shape_of_right(self, target: Target) -> tuple[int, int]:
        """Return k and n of a matrix; a tensor without a core has no V."""
        core = self.direction.core_shape(target)
        return (0, 0) if core is None else (min(self.steps_rank, *core), core[1])

    def spectral(self, target: Target, step: int, g: Tensor, *kept: Tensor) -> Tensor:
        """See :class:`Spectral`."""
        mean = self.smoothed(step, g.view(-1), *kept).view_as(g)
        right = kept[1].view(self._shape_of_right(target))
        if step == 0 or self.direction.refreshes_at(step):
            drawn = self.direction.gaussian(target, Key(step, 0, "power"), *right.shape)
            right.copy_(orthonormal(drawn))
        found, after = swept(mean, right)
        right.copy_(after)
        return found

    def smoothed(self, step: int, g: Tensor, *kept: Tensor) -> Tensor:
        """See :class:`Spectral`: the mean, which g enters; the first g is all of it."""
        mean = kept[0]
        return mean.mul_(self.beta).add_(g * (1 - self.beta)) if step else mean.copy_(g)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        own = {"beta": self.beta, "steps_rank": self.steps_rank}
        return super().identity() | own


class MOPI(ZeroOrder):
    """Move each matrix W (m, n) along P U V^T, where power iteration follows singular vectors.

    One step, with Psi_q (r, n), P (m, r) and G as of :class:`smezo_cli.methods.zo_muon.ZOMuon`:

        G = 1/Q sum_q [L(W + eps P Psi_q) - L(W)] / eps Psi_q
        M <- beta M + (1 - beta) G, with M = G at first
        V <- orth(M^T M V);  U: the k columns of M V, each over its length
        W <- W - lr (P U V^T + weight_decay W)

    so that a step is sqrt(k) lr long, whatever the losses. V (n, k) goes on from step to step, one
    sweep each, and begins again at random columns with each new P, so at every nu-th step. Where
    ZO-Muon's msign is 15 products of matrices of r rows, a sweep is four of matrices of k rows.
    Tensors of one dimension have a mean of their own size, and make steps of SGD along it with
    ``lr_1d``. Forwards a step: Q + 1. Kept are P, M and V, 4 (r m + r n + k n) bytes a matrix.

    At beta 0, the released script's, M is G itself: the steps of a published command are those of
    single estimates, and V alone remembers others. orth is that of Gram and Schmidt.

    Where it leaves the released code (MOFA-LAB/ZO-MOPI):

    * With a new P, M <- P_new^T P_old M comes first, so that M goes on standing for the same
      matrix: so a description of the paper has it. The code leaves M as it was in the
      coordinates of the old P. At beta 0 it makes no difference.
    * Where M is 0 there is no step, and V stays.
    * U, V and M are in float32 or better; there they are kept in the float16 of the weights.
    * Weight decay is of every tensor; there it leaves out biases and layer norms, and the line for
      tensors of one dimension has no effect. ``lr_1d`` follows the schedule of lr; there it is
      constant.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        refresh_every: nu.
        num_queries: Q.
        beta: decay of M, in [0, 1).
        steps_rank: k; of a matrix, at most r and n.
        lr_1d: step size of tensors of one dimension.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise. What
            ``clip_projected_grad`` cuts changes the weights of queries in G, not the
            length of the step.
    """

    measures_pairs: ClassVar = False
    groups_by: ClassVar = ""  # all differences have one loss in common

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 64,
        refresh_every: Count = 500,
        num_queries: Count = 8,
        beta: Fraction = 0.0,
        steps_rank: Count = 32,
        lr_1d: StepSize = 1e-7,
        **common: Unpack[Common],
    ) -> None:
        check_common(type(self).__name__, common)
        direction = Factored("pz", rank, refresh_every)
        super().__init__(
            model,
            selection=Everything(),
            direction=direction,
            estimator=OneSided(num_queries),
            update=PowerIteration(direction, common["lr"], lr_1d, beta, steps_rank),
            **common,
        )
