"""Move the weights along a running mean, or a decaying sum, of gradients."""

from typing import Any

from torch import Tensor

from smezo_cli.zo.move import Gradient
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.base import Update, WeightWriter


class Momentum(Update):
    """Keeps a mean or a sum of gradients: 4 bytes for each number that the direction draws.

        m <- beta m + (1 - beta) g, a mean; or, as torch's SGD has it, m <- beta m + g, a sum
        theta <- theta - lr (m + weight_decay theta)

    Args:
        beta: decay of m, in [0, 1); 0 is SGD.
        of_sum: keep the sum, which goes 1 / (1 - beta) times as far; its beta is then called
            "momentum" in messages and in :meth:`identity`.

    Raises:
        ValueError: an argument out of range.
    """

    slots = ("momentum",)

    def __init__(self, beta: float, *, of_sum: bool = False) -> None:
        self._called = "momentum" if of_sum else "beta"
        check(0 <= beta < 1, f"{self._called}={beta}: a number in [0, 1)")
        self.beta, self.of_sum = float(beta), of_sum

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""

        def change(g: Tensor, m: Tensor) -> Tensor:
            m.mul_(self.beta).add_(g if self.of_sum else g * (1 - self.beta))
            return m * -lr

        weights.elementwise(gradient, change, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {self._called: self.beta}
