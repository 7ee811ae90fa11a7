"""Move the weights along a running mean of gradients."""

from typing import Any

from torch import Tensor

from smezo_cli.zo.move import Gradient
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.base import Update, WeightWriter


class Momentum(Update):
    """Keeps a mean of gradients: 4 bytes for each number that the direction draws.

        m <- beta m + (1 - beta) g
        theta <- theta - lr (m + weight_decay theta)

    Args:
        beta: decay of the mean, in [0, 1); 0 is SGD.

    Raises:
        ValueError: an argument out of range.
    """

    slots = ("momentum",)

    def __init__(self, beta: float) -> None:
        check(0 <= beta < 1, f"beta={beta}: a number in [0, 1)")
        self.beta = float(beta)

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""

        def change(g: Tensor, m: Tensor) -> Tensor:
            m.mul_(self.beta).add_(g * (1 - self.beta))
            return m * -lr

        weights.elementwise(gradient, change, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"beta": self.beta}
