"""MOPI: ZO-Muon with momentum, and power iteration for Newton-Schulz steps (arXiv 2605.09034)."""

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
from smezo_cli.zo.sums import sum_of_squares
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.spectral import Spectral


def leading(matrix: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Return about U_k V_k^T of the k largest singular values of a matrix; of zeros: zeros.

    By subspace iteration V <- orth(M^T U), U <- orth(M V). All k singular values of what is
    returned are 1, wherever the iteration stands, and <M, U V^T> is positive.

    Args:
        matrix: M, float32 (r, n).
        start: float32 (k, r), Gaussian: what U^T begins from; k at most r and n.
        iterations: of the two halves together.
    """
    largest = matrix.abs().max()
    if not largest:
        return matrix
    scaled = matrix / largest
    m = scaled.double() / math.sqrt(sum_of_squares(scaled))
    u, v = orthonormal(start), m
    for _ in range(iterations):
        v = _rows(inner(u, m.T, UNIT))
        u = _rows(inner(v, m, UNIT))
    return inner(u.T, v.T, UNIT).float()


def _rows(rows: Tensor) -> Tensor:
    """Return the orthonormal rows that Gram and Schmidt make of some, which scales do not change.

    Entries of at most 4 are far from the grid that :func:`orthonormal` rounds them to.
    """
    return orthonormal(rows * (4 / rows.abs().amax(1, keepdim=True)))


class PowerIteration(Spectral):
    """Keeps a mean M of gradients' cores, and makes steps of its leading singular vectors.

    Args:
        direction: see :class:`Spectral`.
        lr: likewise.
        lr_1d: likewise.
        beta: decay of M.
        steps_rank: k.
        iterations: of a step.
    """

    slots = ("momentum",)

    def __init__(
        self,
        direction: Factored,
        lr: float,
        lr_1d: float,
        beta: float,
        steps_rank: int,
        iterations: int,
    ) -> None:
        super().__init__(direction, lr, lr_1d)
        self.beta, self.steps_rank, self.iterations = beta, steps_rank, iterations

    def spectral(self, target: Target, step: int, g: Tensor, *kept: Tensor) -> Tensor:
        """See :class:`Spectral`."""
        mean = self.smoothed(g, *kept)
        k = min(self.steps_rank, *mean.shape)
        start = self.direction.gaussian(target, Key(step, 0, "power"), k, mean.shape[0])
        return leading(mean, start, self.iterations)

    def smoothed(self, g: Tensor, *kept: Tensor) -> Tensor:
        """See :class:`Spectral`: the mean, which g enters."""
        (mean,) = kept
        return mean.mul_(self.beta).add_(g * (1 - self.beta))

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        own = {"beta": self.beta, "steps_rank": self.steps_rank, "iterations": self.iterations}
        return super().identity() | own


class MOPI(ZeroOrder):
    """Move each matrix W (m, n) along P U_k V_k^T, by the leading singular vectors of a mean.

    One step, with Psi_q (r, n), P (m, r) and G as of :class:`smezo_cli.methods.zo_muon.ZOMuon`:

        G = 1/Q sum_q [L(W + eps P Psi_q) - L(W)] / eps Psi_q
        M <- beta M + (1 - beta) G
        U from k Gaussian columns;  twice or so: V <- orth(M^T U), U <- orth(M V)
        W <- W - lr (P U V^T + weight_decay W)

    so that a step is sqrt(k) lr long, whatever the losses. Where ZO-Muon's msign is 15 products of
    matrices of r rows, these are 2 an iteration and one more, of matrices of k rows. At each nu-th
    step, where P is new, M <- P_new^T P_old M comes first. Tensors of one dimension have a mean of
    their own size, and make steps of SGD along it with ``lr_1d``. Forwards a step: Q + 1. Kept are
    P and M, 4 r (m + n) bytes a matrix.

    What we know of the paper is Q, nu, the momentum, and power iteration of rank k in place of
    Newton-Schulz. All else is our choice: that M is a mean and is carried over to a new P, that it
    is in the subspace, k and the iterations, that they begin from Gaussian columns which are drawn
    anew in each step (so that nothing else is kept), orth by Gram and Schmidt, and the step sizes,
    which are those of ZO-Muon.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        refresh_every: nu.
        num_queries: Q.
        beta: decay of M, in [0, 1).
        steps_rank: k; of a matrix, at most r and n.
        iterations: of the two halves.
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
        beta: Fraction = 0.9,
        steps_rank: Count = 16,
        iterations: Count = 2,
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
            update=PowerIteration(direction, common["lr"], lr_1d, beta, steps_rank, iterations),
            **common,
        )
