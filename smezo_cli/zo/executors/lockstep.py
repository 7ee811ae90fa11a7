"""Measure both losses of a query in turns, module by module, with one draw for both."""

from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Direction
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.step import Closure
from smezo_cli.zo.turns import Turns


class Lockstep:
    """As sequential, but both forwards run in turns, module by module, with one draw for both.

    They run during the first call of the closure; the second is given what the second forward gave.
    """

    name = "lockstep"

    def __init__(self, model: nn.Module, probe: FunctionalProbe) -> None:
        self._probe, self._turns = probe, Turns(model)

    def losses(self, closure: Closure, plus: Direction, minus: Direction) -> tuple[Tensor, Tensor]:
        """See :class:`Executor`.

        Raises:
            NotInLockstep: the closure or the model does not allow it.
        """
        with self._probe.in_turns(plus, minus, self._turns), self._turns.first():
            loss_plus = closure()
        with self._turns.second():
            loss_minus = closure()
        return loss_plus, loss_minus
