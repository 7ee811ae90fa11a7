"""Define the interface of a measured step size: a factor of lr, found by losses along the move."""

from typing import Any, Protocol

from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient


class StepSize(Protocol):
    """Chooses a factor of the learning rate once the gradient is known; the factor is recorded.

    It is for updates that move by ``-lr * factor * gradient`` (SGD): a point to try is
    ``gradient.move(-lr * factor, decay)``.
    """

    def measure(self, ask: Ask, gradient: Gradient, lr: float, decay: float) -> float:
        """Return the factor. Losses are all that it may ask for; nothing is written.

        Args:
            ask: measures losses.
            gradient: of the step, clipped.
            lr: learning rate.
            decay: fraction of the weights that a step at ``lr`` takes off.
        """

    def forwards(self, factor: float) -> int:
        """Return how many forwards over the batch it took to find this factor."""

    def identity(self) -> dict[str, Any]:
        """Return the arguments of the step size, as plain JSON."""
