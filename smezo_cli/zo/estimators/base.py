"""Define the interface that every estimator implements, and what it may ask for: losses alone."""

from collections.abc import Sequence
from typing import Protocol

from smezo_cli.zo.move import Gradient, Key, Move


class Ask(Protocol):
    """Measures losses for an estimator, and writes nothing."""

    eps: float
    step: int

    def losses(
        self, groups: Sequence[Sequence[Move]], objective: str = "batch"
    ) -> list[list[float]]:
        """Return the loss at each point of each group.

        Points of a group belong together, such as plus and minus of one direction: one process
        measures them, and an executor may run them at once.

        Args:
            groups: the points.
            objective: which loss: "batch", or another one of the method's ``objectives``.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite.
        """

    def two_sided(
        self, keys: Sequence[Key], objective: str = "batch", base: str = ""
    ) -> list[float]:
        """Return [L(theta + eps u) - L(theta - eps u)] / 2 eps along each direction.

        Args:
            keys: name the directions.
            objective: as for :meth:`losses`.
            base: theta; "": the weights, else the copy of them that the state keeps by this name.
        """

    def by_row(self, groups: Sequence[Sequence[Move]]) -> list[list[float]]:
        """Return the loss of each row of the batch at the points of its group, of one size each.

        All rows are measured in one forward a point. Of a closure that does not tell the losses of
        rows the batch counts as one row.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite.
        """

    def derivatives(self, keys: Sequence[Key]) -> list[float]:
        """Return the exact derivative of the batch's loss along each direction, at the weights.

        Raises:
            NonFiniteLoss: a loss or a derivative is NaN or infinite.
        """


class Estimator(Protocol):
    """Turns losses into the scalars of a step, which are recorded, and scalars into a gradient."""

    @property
    def num_scalars(self) -> int:
        """Return how many scalars a step records, always."""

    @property
    def num_terms(self) -> int:
        """Return how many directions a move has at most."""

    def forwards(self, step: int) -> int:
        """Return how many forwards over the batch a step takes."""

    def measure(self, ask: Ask) -> list[float]:
        """Return the scalars of the present step."""

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """Return the gradient that the scalars of a step stand for: arithmetic alone."""
