"""R-AdaZO: Adam's second moment taken of the first one (arXiv 2502.01014)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Decays, Epsilon, Noise, YesNo
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.adam import Adam


class RefinedAdam(Adam):
    """Divides a mean of gradients by the root of a mean of that mean's squares: 8 bytes a weight.

    Elementwise in float32, with t = 1 at first:

        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) m^2
        theta <- theta - lr (m / [sqrt(v / c) + adam_eps] + weight_decay theta)

    with c = 1, or 1 - beta2^t.

    Args:
        betas: see :class:`Adam`.
        adam_eps: likewise.
        correct_v: the second c.
    """

    def __init__(self, betas: Sequence[float], adam_eps: float, *, correct_v: bool) -> None:
        super().__init__(betas, adam_eps)
        self.correct_v = correct_v

    def change(self, t: int, lr: float) -> Callable[..., Tensor]:
        """See :class:`Adam`."""
        (beta1, beta2), adam_eps = self.betas, self.adam_eps
        root = math.sqrt(1 - beta2**t) if self.correct_v else 1.0

        def change(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
            m.mul_(beta1).add_(g * (1 - beta1))
            v.mul_(beta2).add_((m * m).mul_(1 - beta2))
            return (m / v.sqrt().div_(root).add_(adam_eps)).mul_(-lr)

        return change

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return super().identity() | {"correct_v": self.correct_v}


class RAdaZO(ZeroOrder):
    """Keep Adam's moments of MeZO's estimate, the second of the first: its noise is averaged out.

    One step, with MeZO's estimate g = 1/Q sum_q projected_grad_q z_q, elementwise:

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) m^2
        theta <- theta - lr (m / [sqrt(v) + adam_eps] + weight_decay theta)

    MeZO-Adam has g^2 in the place of m^2, which of an estimate is nearly all noise. A mean has a
    square that is 1 - beta1 over 1 + beta1 of it, or 1/19 at beta1 0.9, so at the same lr steps of
    noise are some 4 times as long. Forwards a step: 2 Q. It keeps m and v, 8 bytes a weight: three
    times the weights in float32.

    As in the released code (shuyao95/R-AdaZO) neither moment is corrected for its beginning at 0.
    So the step t = 1, 2, ... is 1 / sqrt(1 - beta2^t) times as long as later ones: at the default
    32 times at first, 10 times at t = 10, and 1.3 times at t = 1000. ``correct_v`` divides v by
    1 - beta2^t, as Adam does, so that every entry of the first step is lr long. The released code
    takes one-sided differences along directions of length 1; here they are MeZO's, whose length
    cancels but for adam_eps.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        betas: decay of the moments, each in [0, 1).
        adam_eps: added to the root of v; not the eps of the probe.
        correct_v: divide v by 1 - beta2^t.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped before the
            moments.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: Decays = (0.9, 0.999),
        adam_eps: Epsilon = 1e-8,
        correct_v: YesNo = False,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=RefinedAdam(betas, adam_eps, correct_v=correct_v),
            **common,
        )
