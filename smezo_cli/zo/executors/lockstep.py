"""Measure both losses of a direction in turns, module by module, with one draw for both."""

from collections.abc import Sequence

from torch import Tensor, nn

from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.executors.sequential import Sequential
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.step import Closure
from smezo_cli.zo.turns import Turns


class Lockstep:
    """Run two forwards at opposite points in turns, with one draw for both.

    They run during the first call of the closure; the second is given what the second forward gave.
    Points that are not a pair of opposites are measured one after the other.

    Args:
        model: whose modules take turns.
        probe: of the model.
    """

    name = "lockstep"
    is_exact = True

    def __init__(self, model: nn.Module, probe: FunctionalProbe) -> None:
        self._probe, self._turns = probe, Turns(model)
        self._sequential = Sequential(probe)

    def losses(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor]:
        """See :class:`Executor`.

        Raises:
            NotInLockstep: the closure or the model does not allow it.
        """
        if len(movers) != 2 or movers[1].move != movers[0].move.negated():
            return self._sequential.losses(closure, movers)
        plus, minus = movers
        with self._probe.in_turns(plus, minus, self._turns), self._turns.first():
            loss_plus = closure()
        with self._turns.second():
            loss_minus = closure()
        return [loss_plus, loss_minus]
