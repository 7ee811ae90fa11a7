"""What a step asks of an executor."""

from typing import Protocol

from torch import Tensor

from smezo_cli.zo.directions.dense import Direction
from smezo_cli.zo.step import Closure


class Executor(Protocol):
    """How a pair of losses is measured; must not change the numbers."""

    name: str

    def losses(self, closure: Closure, plus: Direction, minus: Direction) -> tuple[Tensor, Tensor]:
        """Losses at theta + eps m z and theta - eps m z."""
