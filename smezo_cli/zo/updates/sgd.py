"""Move the weights along the gradient: one fused pass, nothing kept."""

from typing import Any

from smezo_cli.zo.move import Gradient
from smezo_cli.zo.updates.base import WeightWriter


class SGD:
    """theta <- theta - lr (g + weight_decay theta)."""

    slots: tuple[str, ...] = ()

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        weights.move(gradient, -lr, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {}
