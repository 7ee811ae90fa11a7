"""Measure the losses of a step one forward after the other."""

from torch import Tensor

from smezo_cli.zo.directions.dense import Direction
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.step import Closure


class Sequential:
    """Scratch copies, module by module; the weights are only read."""

    name = "sequential"

    def __init__(self, probe: FunctionalProbe) -> None:
        self._probe = probe

    def losses(self, closure: Closure, plus: Direction, minus: Direction) -> tuple[Tensor, Tensor]:
        """See :class:`Executor`."""
        with self._probe.at(plus):
            loss_plus = closure()
        with self._probe.at(minus):
            loss_minus = closure()
        return loss_plus, loss_minus
