"""Choose how the losses of a step are measured: by timing what gives the same numbers."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo, tangent
from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.executors.base import OUT_OF_MEMORY, Executor, release_memory
from smezo_cli.zo.executors.batched import Batched
from smezo_cli.zo.executors.in_place import InPlace
from smezo_cli.zo.executors.lockstep import Lockstep
from smezo_cli.zo.executors.sequential import Sequential
from smezo_cli.zo.points import NotBatched
from smezo_cli.zo.probe import FunctionalProbe, Mover
from smezo_cli.zo.step import Closure
from smezo_cli.zo.tangent import TangentMover
from smezo_cli.zo.targets import Target, number, one_of
from smezo_cli.zo.turns import NotInLockstep

NAMES = ("auto", "sequential", "lockstep", "in_place", "side_path", "batched")


class Executors:
    """Hold the executors of a model, one of which is in use.

    Args:
        name: one of :data:`NAMES`.
        model: whose losses are measured.
        targets: the trained tensors.
        probe: of the model.

    Raises:
        ValueError: there is no such executor.
    """

    def __init__(
        self, name: str, model: nn.Module, targets: Sequence[Target], probe: FunctionalProbe
    ) -> None:
        one_of("executor", name, NAMES)
        self._probe, self._targets = probe, targets
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
        elif name in ("batched", "side_path"):
            self.used = Batched(model, probe, name)
        self._is_checked = self.used.is_exact

    @property
    def is_in_place(self) -> bool:
        """Say whether the weights themselves are moved."""
        return isinstance(self.used, InPlace)

    def use(self, executor: Executor) -> None:
        """Measure by this executor from now on; scratch that others have made is freed."""
        self.used, self.name = executor, executor.name
        self._probe.drop_scratch()

    def of_groups(
        self, closure: Closure, groups: Iterable[Sequence[PointMover]]
    ) -> Iterator[list[Tensor]]:
        """Yield the losses of each group of points, by the executor in use.

        A group is asked for when it is measured, but for an executor that takes all at once.
        """
        if isinstance(self.used, Batched):
            all_of_them = list(groups)
            movers = [mover for group in all_of_them for mover in group]
            found = iter(self.by(self.used, closure, movers))
            for group in all_of_them:
                yield [next(found) for _ in group]
        else:
            for group in groups:
                yield self.losses(closure, group)

    def losses(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor]:
        """Return the losses by the executor in use, or one that takes its place."""
        if not (self._may_choose and self.used is self.lockstep):
            return self.by(self.used, closure, movers)
        found = self._in_lockstep(closure, movers)
        if found is None:  # at a later batch, of longer rows or one that calls the model otherwise
            self.use(self.sequential)
            found = self.by(self.used, closure, movers)
        return found

    def _in_lockstep(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor] | None:
        """Return the losses by lockstep; None: it cannot be used, or needs too much memory."""
        try:
            return self.by(self.lockstep, closure, movers)
        except NotInLockstep:
            return None
        except OUT_OF_MEMORY:
            pass
        self._probe.drop_scratch()  # not before: the error held tensors
        release_memory()
        return None

    def by(
        self, executor: Executor, closure: Closure, movers: Sequence[PointMover]
    ) -> list[Tensor]:
        """Return the losses by one executor, kept away from the user's compiler."""
        return self.compiler.run(lambda: executor.losses(closure, movers))

    def one(self, closure: Closure, mover: Mover) -> Tensor:
        """Return what a closure gives at one point, by a forward at moved copies."""
        return self.compiler.run(lambda: self.sequential.losses(closure, [mover])[0])

    def derivative(self, closure: Closure, mover: TangentMover) -> tuple[Tensor, Tensor]:
        """Return the loss and its derivative along a direction, see :mod:`smezo_cli.zo.tangent`."""
        return self.compiler.run(lambda: tangent.derivative(closure, mover, self._probe))

    def check(self, closure: Closure, movers: Sequence[PointMover]) -> None:
        """Compare an executor that is not exact with the sequential one, once.

        Losses may differ by 1e-5 of their size where all is computed in float32, else by four
        times the precision of the dtype.

        Raises:
            NotBatched: they differ by more, or the closure or the model does not allow the
                executor.
        """
        if self._is_checked:
            return
        assert isinstance(self.used, Batched)
        found = [number(x) for x in self.by(self.used, closure, movers)]
        expected = [number(x) for x in self.by(self.sequential, closure, movers)]
        dtypes = {target.flat.dtype for target in self._targets if target.flat.is_floating_point()}
        dtypes |= {self.used.points.autocast or torch.float32}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        bound = 1e-5 if eps <= torch.finfo(torch.float32).eps else 4 * eps
        for a, b in zip(found, expected, strict=True):
            if not abs(a - b) <= bound * max(abs(b), 1.0):
                raise NotBatched(
                    f"executor={self.name} gives the loss {a:.9g} where one forward at a point "
                    f"gives {b:.9g}, which is more than rounding: use executor=sequential"
                )
        self._is_checked = True

    def choose(self, closure: Closure, movers: Sequence[PointMover]) -> dict[str, float]:
        """Use the faster executor from now on, of those that give the losses of sequential.

        Each measures twice; lockstep only while it can, and fits into the memory.

        Returns:
            Seconds of a measurement by name, of those that could be used.
        """
        seconds: dict[str, float] = {}
        found: dict[str, list[tuple[float, ...]]] = {"sequential": [], "lockstep": []}

        def note(name: str, start: float, losses: list[Tensor]) -> None:
            found[name].append(tuple(map(number, losses)))
            spent = time.perf_counter() - start
            seconds[name] = min(spent, seconds.get(name, math.inf))

        for _ in range(2):  # the first may compile, and touches memory for the first time
            start = time.perf_counter()
            note("sequential", start, self.by(self.sequential, closure, movers))
            start = time.perf_counter()
            losses = self._in_lockstep(closure, movers)
            if losses is None:
                seconds.pop("lockstep", None)
                break
            note("lockstep", start, losses)
        if "lockstep" in seconds:
            first, second = found["sequential"]
            for a, b, c in zip(first, second, found["lockstep"][-1], strict=True):
                # Where a loss is the same from call to call, no other number will do.
                if not abs(b - c) <= abs(a - b):
                    seconds.pop("lockstep", None)
        fastest = min(seconds, key=lambda name: seconds[name])
        self.use(self.lockstep if fastest == "lockstep" else self.sequential)
        return seconds
