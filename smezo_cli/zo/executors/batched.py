"""Measure the losses of several points in one batch; or one by one, without copies of matrices."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.executors.base import OUT_OF_MEMORY, release_memory
from smezo_cli.zo.points import Points
from smezo_cli.zo.probe import FunctionalProbe, moves_nothing
from smezo_cli.zo.step import Closure


class Batched:
    """Runs the forwards of all points of a step as one, as far as the memory allows.

    The numbers are those of other executors up to rounding; see :mod:`smezo_cli.zo.points`.

    Args:
        model: whose forwards they are.
        probe: of the model.
        name: "batched"; or "side_path", for one point at a time.
    """

    is_exact = False

    def __init__(self, model: nn.Module, probe: FunctionalProbe, name: str = "batched") -> None:
        self.name = name
        self.points = Points(model, probe, name)
        #: points at once; fewer once the memory was too small for them
        self.most: float = math.inf if name == "batched" else 1

    def losses(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor]:
        """See :class:`Executor`.

        Raises:
            NotBatched: the closure or the model does not allow it.
        """
        found: list[Tensor] = []
        for here in _alike(movers):
            while here:
                now = here[: int(min(self.most, len(here)))]
                losses = self._at_once(closure, now)
                if losses is None:
                    self.most = (len(now) + 1) // 2
                    release_memory()
                else:
                    found, here = found + losses, here[len(now) :]
        return found

    def _at_once(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor] | None:
        """Return the losses of these points by one forward; None: the memory is too small."""
        try:
            with self.points.first(movers):
                found = [closure()]
            for k in range(1, len(movers)):
                with self.points.later(k):
                    found.append(closure())
        except OUT_OF_MEMORY:
            if len(movers) == 1:
                raise
            return None
        finally:
            self.points.forget()
        return found


def _alike(movers: Sequence[PointMover]) -> Iterator[list[PointMover]]:
    """Yield points next to each other that move the same parameters; the weights go with any."""
    here: list[PointMover] = []
    moving: PointMover | None = None
    for mover in movers:
        if not moves_nothing(mover):
            if moving is not None and moving.only != mover.only:
                yield here
                here = []
            moving = mover
        here.append(mover)
    yield here
