"""Measure the losses that an estimator asks for, in one process or in several."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from smezo_cli.zo.directions.base import Direction, MovesRows
from smezo_cli.zo.directions.dense import Dense, DenseAlone
from smezo_cli.zo.executors.choose import Executors
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.step import ByRow, Closure, NonFiniteLoss, Shared, WithObjectives
from smezo_cli.zo.tangent import TangentMover
from smezo_cli.zo.targets import check

#: Puts together what several processes have measured; see :class:`Shared`.
Join = Callable[[Mapping[int, Sequence[float]], Sequence[int]], list[list[float]]]


class LossMeter:
    """Measures the losses that the estimator asks for in one step; the :class:`Ask` of the step.

    Args:
        closure: computes the loss of the batch.
        direction: of the method.
        executors: run the forwards.
        eps: radius of the probes.
        step: number of the step.
        on_equal_losses: called where the two losses of a pair are the same number.
        joined: answers that several processes came to in an earlier try at this step, which ended
            for want of memory: the others will not measure them again. Receives those of this try.
    """

    def __init__(
        self,
        closure: Closure,
        direction: Direction,
        executors: Executors,
        eps: float,
        step: int,
        on_equal_losses: Callable[[], None],
        joined: list[list[list[float]]] | None = None,
    ) -> None:
        self._closure, self._direction, self._executors = closure, direction, executors
        self.eps, self.step, self._on_equal_losses = eps, step, on_equal_losses
        self._joined = [] if joined is None else joined
        self._num_asked = 0
        #: all losses of the step so far
        self.all_losses: list[float] = []

    def losses(
        self, groups: Sequence[Sequence[Move]], objective: str = "batch"
    ) -> list[list[float]]:
        """See :class:`Ask`.

        Raises:
            TypeError: the closure is of one loss, and another is asked for.
        """
        closure = self._closure
        if objective != "batch":
            if not isinstance(closure, WithObjectives):
                raise TypeError(f"the closure has no of(), which gives the loss {objective!r}")
            closure = closure.of(objective)

        def measure(numbers: Sequence[int]) -> Iterator[list[float]]:
            step, mover = self.step, self._direction.mover
            movers = ([mover(step, move) for move in groups[i]] for i in numbers)
            for found in self._executors.of_groups(closure, movers):
                yield torch.stack([x.detach().double() for x in found]).tolist()

        def alone(losses: list[float]) -> list[float]:
            self._finite(losses)
            if len(losses) == 2 and losses[0] == losses[1]:
                self._on_equal_losses()
            return losses

        if isinstance(closure, Shared):
            sizes = list(map(len, groups))
            found = self._of_all(closure.queries, closure.join, sizes, measure)
        else:
            found = list(map(alone, measure(range(len(groups)))))
        self.all_losses += [loss for losses in found for loss in losses]
        return found

    def _of_all(
        self,
        queries: Callable[[int], Sequence[int]],
        join: Join,
        sizes: Sequence[int],
        measure: Callable[[Sequence[int]], Iterable[list[float]]],
    ) -> list[list[float]]:
        """Return the numbers of all queries, of which this process measures some.

        Args:
            queries: says which, see :class:`Shared`.
            join: puts together what all processes have measured.
            sizes: how many numbers each query has.
            measure: gives those of some queries, one after the other.
        """
        self._num_asked += 1
        if self._num_asked > len(self._joined):
            numbers = queries(len(sizes))
            joined = join(dict(zip(numbers, measure(numbers), strict=True)), sizes)
            for of_query in joined:  # of all, so that every process raises or none
                self._finite(of_query)
            self._joined.append(joined)
        return self._joined[self._num_asked - 1]

    def two_sided(
        self, keys: Sequence[Key], objective: str = "batch", base: str = ""
    ) -> list[float]:
        """See :class:`Ask`."""
        there = [Move((Term(key, self.eps),), base=base) for key in keys]
        pairs = self.losses([(move, move.negated()) for move in there], objective)
        return [(plus - minus) / (2 * self.eps) for plus, minus in pairs]

    def by_row(self, groups: Sequence[Sequence[Move]]) -> list[list[float]]:
        """See :class:`Ask`.

        Raises:
            TypeError: the closure does not tell the losses of rows.
            ValueError: there are more rows, or fewer, than groups.
        """
        closure, direction = self._closure, self._direction
        if not isinstance(closure, ByRow):
            if len(groups) > 1:
                raise TypeError("the closure has no by_row(), which gives the loss of each row")
            return self.losses(groups)
        there_are = f"num_rows={len(groups)}: the batch has {closure.num_rows} rows"
        check(closure.num_rows == len(groups), f"{there_are}: give it that number")
        assert isinstance(direction, MovesRows)
        forwards = list(closure.by_row())
        own = [row for forward in forwards for row in forward.rows]

        def measure(numbers: Sequence[int]) -> Iterator[list[float]]:
            found: dict[int, list[float]] = {row: [] for row in own if numbers}
            for point in range(len(groups[0])) if numbers else ():
                for rows, sequences, losses in forwards:
                    moves = [groups[row][point] for row in sequences]
                    mover = direction.row_mover(self.step, moves)
                    measured = self._executors.one(losses, mover).detach().double().tolist()
                    for row, loss in zip(rows, measured, strict=True):
                        found[row].append(loss)
            return iter(found.values())

        if isinstance(closure, Shared):
            shared, sizes = closure, list(map(len, groups))

            def queries(num: int) -> Sequence[int]:
                return own if shared.queries(1) else []

            found = self._of_all(queries, closure.join_parts, sizes, measure)
        else:
            measured = dict(zip(own, map(self._finite, measure(own)), strict=True))
            found = [measured[row] for row in range(len(groups))]
        self.all_losses += [loss for losses in found for loss in losses]
        if all(loss == losses[0] for losses in found for loss in losses):
            self._on_equal_losses()
        return found

    def derivatives(self, keys: Sequence[Key]) -> list[float]:
        """See :class:`Ask`.

        Raises:
            NoTangent: the model or the loss has no derivative along a direction.
        """
        closure = self._closure

        def measure(numbers: Sequence[int]) -> Iterator[list[float]]:
            for i in numbers:
                assert type(self._direction) is Dense  # z itself is the direction
                mover = self._direction.mover(self.step, Move((Term(keys[i], 1.0),)))
                tangents = TangentMover(DenseAlone(self._direction, mover))
                yield torch.stack(self._executors.derivative(closure, tangents)).tolist()

        if isinstance(closure, Shared):
            found = self._of_all(closure.queries, closure.join_parts, [2] * len(keys), measure)
        else:
            found = list(map(self._finite, measure(range(len(keys)))))
        self.all_losses += [loss for loss, _ in found]
        return [slope for _, slope in found]

    def _finite(self, losses: list[float]) -> list[float]:
        if not all(map(math.isfinite, losses)):
            said = " and ".join(map(str, losses))
            raise NonFiniteLoss(f"loss {said} at step {self.step}")
        return losses
