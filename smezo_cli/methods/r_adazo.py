"""R-AdaZO: Adam's second moment taken of the first one (arXiv 2502.01014)."""

import math
from collections.abc import Callable
from typing import Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Decays, Epsilon, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.adam import Adam


class RefinedAdam(Adam):
    """Divides a mean of gradients by the root of a mean of that mean's squares: 8 bytes a weight.

    Elementwise in float32, with t = 1 at first:

        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) m^2
        theta <- theta - lr (m / [sqrt(v / (1 - beta2^t)) + adam_eps] + weight_decay theta)
    """

    def change(self, t: int, lr: float) -> Callable[..., Tensor]:
        """See :class:`Adam`."""
        (beta1, beta2), adam_eps = self.betas, self.adam_eps
        root = math.sqrt(1 - beta2**t)

        def change(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
            m.mul_(beta1).add_(g * (1 - beta1))
            v.mul_(beta2).add_((m * m).mul_(1 - beta2))
            return (m / v.sqrt().div_(root).add_(adam_eps)).mul_(-lr)

        return change


class RAdaZO(ZeroOrder):
    """Keep Adam's moments of MeZO's estimate, the second of the first: its noise is averaged out.

    One step, with MeZO's estimate g = 1/Q sum_q projected_grad_q z_q, elementwise, t = 1 at first:

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) m^2
        theta <- theta - lr (m / [sqrt(v / (1 - beta2^t)) + adam_eps] + weight_decay theta)

    MeZO-Adam has g^2 in the place of m^2, which of an estimate is nearly all noise. A mean has a
    square that is 1 - beta1 over 1 + beta1 of it, or 1/19 at beta1 0.9, so at the same lr steps of
    noise are some 4 times as long. Forwards a step: 2 Q. It keeps m and v, 8 bytes a weight: three
    times the weights in float32.

    Of the paper we have a summary of the rule. That v is corrected for its beginning at 0 as in
    Adam, and m is not, is our choice: both v and the step are of the same m, so the first step is
    lr long in every entry; with neither it would be 1 / sqrt(1 - beta2) times that, 31 at the
    default.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        betas: decay of the moments, each in [0, 1).
        adam_eps: added to the root of v; not the eps of the probe.
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
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=RefinedAdam(betas, adam_eps),
            **common,
        )
