"""Choose how the losses of a step are measured: by timing what gives the same numbers."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor, nn

from smezo_cli.zo import dynamo, tangent
from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.executors.base import Executor
from smezo_cli.zo.executors.in_place import InPlace
from smezo_cli.zo.executors.lockstep import Lockstep
from smezo_cli.zo.executors.sequential import Sequential
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.step import Closure
from smezo_cli.zo.tangent import TangentMover
from smezo_cli.zo.targets import Target, number, one_of
from smezo_cli.zo.turns import NotInLockstep


class Executors:
    """The executors of a model, one of which is in use.

    Args:
        name: "auto", "sequential", "lockstep" or "in_place".
        model: whose losses are measured.
        targets: the trained tensors.
        probe: of the model.

    Raises:
        ValueError: there is no such executor.
    """

    def __init__(
        self, name: str, model: nn.Module, targets: Sequence[Target], probe: FunctionalProbe
    ) -> None:
        one_of("executor", name, ("auto", "sequential", "lockstep", "in_place"))
        self._probe = probe
        self.sequential, self.lockstep = Sequential(probe), Lockstep(model, probe)
        self.compiler = dynamo.KeptOut(model)
        self._may_choose = name == "auto"
        #: the name of the one in use; "auto" until one is chosen
        self.name = name
        self.used: Executor = self.sequential
        if name == "lockstep":
            self.used = self.lockstep
        elif name == "in_place":
            self.used = InPlace(targets)

    @property
    def is_in_place(self) -> bool:
        """Whether the weights themselves are moved."""
        return isinstance(self.used, InPlace)

    def use(self, executor: Executor) -> None:
        """Measure by this executor from now on."""
        self.used, self.name = executor, executor.name

    def losses(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor]:
        """Return the losses by the executor in use, or one that takes its place."""
        try:
            return self.by(self.used, closure, movers)
        except NotInLockstep:  # at a later batch, which calls the model in another way
            if not self._may_choose:
                raise
        self.use(self.sequential)
        return self.by(self.used, closure, movers)

    def by(
        self, executor: Executor, closure: Closure, movers: Sequence[PointMover]
    ) -> list[Tensor]:
        """Return the losses by one executor, kept away from the user's compiler."""
        return self.compiler.run(lambda: executor.losses(closure, movers))

    def derivative(self, closure: Closure, mover: TangentMover) -> tuple[Tensor, Tensor]:
        """Return the loss and its derivative along a direction, see :mod:`smezo_cli.zo.tangent`."""
        return self.compiler.run(lambda: tangent.derivative(closure, mover, self._probe))

    def choose(self, closure: Closure, movers: Sequence[PointMover]) -> dict[str, float]:
        """Use the faster executor from now on, of those that give the losses of sequential.

        Each measures twice.

        Returns:
            Seconds of a measurement by name, of those that could be used.
        """
        seconds: dict[str, float] = {}
        found: dict[str, list[tuple[float, ...]]] = {}
        with suppress(NotInLockstep):
            for _ in range(2):  # the first may compile, and touches memory for the first time
                for executor in (self.sequential, self.lockstep):
                    start = time.perf_counter()
                    losses = tuple(map(number, self.by(executor, closure, movers)))
                    spent = time.perf_counter() - start
                    name = executor.name
                    seconds[name] = min(spent, seconds.get(name, math.inf))
                    found.setdefault(name, []).append(losses)
        if "lockstep" in found:
            first, second = found["sequential"][0], found["sequential"][-1]
            for a, b, c in zip(first, second, found["lockstep"][-1], strict=True):
                # Where a loss is the same from call to call, no other number will do.
                if not abs(b - c) <= abs(a - b):
                    seconds.pop("lockstep", None)
        fastest = min(seconds, key=lambda name: seconds[name])
        self.use(self.lockstep if fastest == "lockstep" else self.sequential)
        return seconds
