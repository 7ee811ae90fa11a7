"""Define the interface that every executor implements, and what they do where memory is short."""

import gc
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.step import Closure

#: What a forward raises for which the memory is too small.
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


def release_memory() -> None:
    """Free what a failed forward has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
