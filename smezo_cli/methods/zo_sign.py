"""ZO-SGD-Sign: every weight moves by lr against the sign of the estimate (arXiv 2402.11592)."""

import math
from dataclasses import replace
from typing import Any, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise, SignOf
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check, one_of
from smezo_cli.zo.updates.base import Update, WeightWriter


class Sign(Update):
    """Moves the weights against a sign: that of each entry of g, or that of each coefficient.

        elementwise:  theta <- theta - lr (sign(g) + weight_decay theta)
        scalar:       theta <- theta - lr (1/Q sum_q sign(projected_grad_q) z_q
                                           + weight_decay theta)

    The sign of 0 is 0.

    Args:
        sign: "elementwise" or "scalar".

    Raises:
        ValueError: another sign.
    """

    def __init__(self, sign: str) -> None:
        one_of("sign", sign, ("elementwise", "scalar"))
        self.sign = sign

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        decay = lr * weights.weight_decay
        if self.sign == "elementwise":
            weights.elementwise(gradient, lambda g: g.sign().mul_(-lr), decay)
            return
        signs = [t._replace(coefficient=_sign(t.coefficient)) for t in gradient.terms]
        weights.move(replace(gradient, terms=tuple(signs)), -lr, decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"sign": self.sign}


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0


class ZOSign(ZeroOrder):
    """Move every weight by lr against the sign of MeZO's estimate.

    One step, for queries q = 1..Q with directions z_q ~ N(0, I):

        projected_grad_q = [L(theta + eps z_q) - L(theta - eps z_q)] / (2 eps)
        g = 1/Q sum_q projected_grad_q z_q
        theta <- theta - lr (sign(g) + weight_decay theta)

    This is the paper's rule, ``sign="elementwise"``: with several queries the sign of their mean.
    The released code does another thing, ``sign="scalar"``: it multiplies the sign of the projected
    gradient with z, which is a step of Gaussian sizes along z, about as long.

    Forwards a step: 2 Q. Keeps no state.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        sign: "elementwise", of each entry of the estimate; "scalar", of each projected gradient.
        num_queries: Q.
        noise: "gaussian" or "rademacher"; of signs and one query both rules are the same.
        common: see :class:`smezo_cli.zo.parts.Common`; lr is how far a weight moves in a step, so
            in bfloat16 and float16 a small one needs ``rounding="stochastic"``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sign: SignOf = "elementwise",
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        clip = common.get("clip_projected_grad")
        check(
            clip is None or (sign == "elementwise" and num_queries > 1),
            f"clip_projected_grad={clip}: what is cut keeps its sign, which is all that a step of "
            "one query, or sign=scalar, reads: leave it out",
        )
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=Sign(sign),
            **common,
        )
