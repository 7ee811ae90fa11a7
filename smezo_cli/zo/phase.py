"""Define the interface of a phase: what a step measures, and moves, once more after its update."""

from collections.abc import Sequence
from typing import Any, Protocol

from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Move
from smezo_cli.zo.updates.base import WeightWriter


class Phase(Protocol):
    """Measures losses at the weights that the update will leave, and moves these weights then.

    It measures before the update is written, at moves that begin with the update's own: so a step
    that fails has changed nothing, and nothing has to be undone. Its scalars stand behind those of
    the estimator in the record of the step.

    It is for updates that are one move along the gradient (SGD).
    """

    @property
    def num_scalars(self) -> int:
        """Return how many scalars a step records, always."""

    def forwards(self, step: int) -> int:
        """Return how many forwards over the batch a step takes for it."""

    def measure(self, ask: Ask, update: Move) -> list[float]:
        """Return the scalars of the present step; losses are all that it may ask for.

        Args:
            ask: measures losses.
            update: the move that the update is going to make.
        """

    def apply(self, weights: WeightWriter, scalars: Sequence[float]) -> None:
        """Move the weights, which the update has moved already, by what the scalars stand for."""

    def identity(self) -> dict[str, Any]:
        """Return what its moves follow from beside weights, state and scalars, as plain JSON."""
