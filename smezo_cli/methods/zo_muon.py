"""ZO-Muon: steps of equal singular values in a random subspace of each layer (arXiv 2602.17155)."""

import math
from typing import ClassVar, Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.directions.frames import UNIT, inner
from smezo_cli.zo.estimators.one_sided import OneSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common, check_common
from smezo_cli.zo.ranges import Count, StepSize
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.sums import sum_of_squares
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.spectral import Spectral

#: a, b, c of a Newton-Schulz step X <- a X + b (X X^T) X + c (X X^T)^2 X, and how many are made.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def msign(g: Tensor) -> Tensor:
    """Return nearly U V^T of a matrix U S V^T: its singular values become some 0.7 to 1.2.

    By five Newton-Schulz steps from g over its Frobenius norm. Singular values that are below some
    thousandths of that norm stay smaller; a matrix of zeros stays as it is. Products are those of
    :func:`inner`, so that the bits are the same on every machine.

    Args:
        g: float32 (m, n).
    """
    largest = g.abs().max()
    if not largest:
        return g
    x = (g if g.shape[0] <= g.shape[1] else g.T) / largest
    x = x.double() / math.sqrt(sum_of_squares(x))
    for _ in range(_STEPS):
        a = inner(x, x, UNIT)
        x = _A * x + inner(_B * a + _C * inner(a, a, UNIT), x.T, UNIT)
    return (x if g.shape[0] <= g.shape[1] else x.T).float()


class Muon(Spectral):
    """Makes steps of msign(G)."""

    def spectral(self, target: Target, step: int, g: Tensor, *kept: Tensor) -> Tensor:
        """See :class:`Spectral`."""
        return msign(g)


class ZOMuon(ZeroOrder):
    """Move each matrix W (m, n) along P msign(G), G the gradient in a subspace P of its rows.

    One step, with Psi_q (r, n) Gaussian for each query q = 1..Q, and P (m, r) random with
    orthonormal columns, new at each nu-th step:

        projected_grad_q = [L(W + eps P Psi_q) - L(W)] / eps
        G = 1/Q sum_q projected_grad_q Psi_q
        W <- W - lr (P msign(G) + weight_decay W)

    msign(U S V^T) = U V^T, by five Newton-Schulz steps (see :func:`msign`), in float32 or better:
    in the released code they are made in the float16 of the weights. A step so has the length
    sqrt(min(r, n)) lr, whatever the losses. A matrix of fewer than r rows has these as its r.
    Tensors of one dimension are perturbed along dense Gaussian noise and make steps of SGD with
    ``lr_1d``, which is a constant in the released code; it follows the schedule of lr here.

    Forwards a step: Q + 1. Kept is P, 4 r m bytes a matrix, which seed and interval name. The
    released code keeps all Psi of a step; here they are drawn again from their keys. At a refresh
    it draws a P for each query, and lifts the update by the last of them; here all queries of a
    step and its update have one P. Its weight decay leaves out biases and layer norms; here all
    tensors decay, each by its own lr.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r.
        refresh_every: nu.
        num_queries: Q.
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
        refresh_every: Count = 100,
        num_queries: Count = 4,
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
            update=Muon(direction, common["lr"], lr_1d),
            **common,
        )
