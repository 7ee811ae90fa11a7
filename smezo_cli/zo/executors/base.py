"""Define the interface that every executor implements."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.step import Closure


class Executor(Protocol):
    """Measures the losses at some points.

    Attributes:
        name: as settings have it.
        is_exact: the numbers are those of the sequential executor to the last bit; else to
            rounding, which is checked before the first step.
    """

    name: str
    is_exact: bool

    def losses(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor]:
        """Return the loss () with the weights moved by each of the movers."""
