"""Move the weights along the gradient: one fused pass, nothing kept."""

from smezo_cli.zo.move import Gradient
from smezo_cli.zo.updates.base import Update, WeightWriter


class SGD(Update):
    """Step against the gradient: theta <- theta - lr (g + weight_decay theta)."""

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        weights.move(gradient, -lr, decay=lr * weights.weight_decay)
