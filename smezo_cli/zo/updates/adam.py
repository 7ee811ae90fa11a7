"""Move the weights by Adam's moments of the gradient (arXiv 1412.6980), with decoupled decay."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from smezo_cli.zo.move import Gradient
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.base import Update, WeightWriter


class Adam(Update):
    """Divides a mean of gradients by the root of a mean of their squares: 8 bytes a weight.

    Elementwise in float32, with t = 1 at first:

        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        theta <- theta - lr [m / (1 - beta1^t)] / [sqrt(v / (1 - beta2^t)) + adam_eps]
                 - lr weight_decay theta

    Args:
        betas: decay of m and of v, each in [0, 1).
        adam_eps: added to the root of v.

    Raises:
        ValueError: an argument out of range.
    """

    slots: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, betas: Sequence[float], adam_eps: float) -> None:
        check(
            len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            f"betas={list(betas)}: two numbers in [0, 1)",
        )
        check(adam_eps > 0 and math.isfinite(adam_eps), f"adam_eps={adam_eps}: must be above 0")
        self.betas, self.adam_eps = (float(betas[0]), float(betas[1])), adam_eps

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        change = self.change(weights.step + 1, lr)
        weights.elementwise(gradient, change, decay=lr * weights.weight_decay)

    def change(self, t: int, lr: float) -> Callable[..., Tensor]:
        """Return what a step of ``lr`` makes of g and its moments, which hold t gradients then."""

        def change(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
            self.enter(g, m, v)
            return self.step(m, v, lr, t)

        return change

    def enter(self, g: Tensor, m: Tensor, v: Tensor) -> None:
        """Let a gradient enter both moments."""
        beta1, beta2 = self.betas
        m.mul_(beta1).add_(g * (1 - beta1))
        v.mul_(beta2).add_((g * g).mul_(1 - beta2))

    def step(self, m: Tensor, v: Tensor, lr: float, t: int) -> Tensor:
        """Return what both moments, of t gradients, add to the weights."""
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**t)
        return (m / v.sqrt().div_(root).add_(self.adam_eps)).mul_(-lr / (1 - beta1**t))

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"betas": list(self.betas), "adam_eps": self.adam_eps}
