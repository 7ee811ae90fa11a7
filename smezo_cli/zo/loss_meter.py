"""Measure the losses that an estimator asks for, in one process or in several."""

import math
from collections.abc import Callable, Sequence

import torch

from smezo_cli.zo.directions.base import Direction
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.executors.choose import Executors
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.step import Closure, NonFiniteLoss, Shared, WithObjectives
from smezo_cli.zo.tangent import TangentMover


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
        shared = closure if isinstance(closure, Shared) else None
        if shared is not None and self._num_asked < len(self._joined):
            return self._taken(self._joined[self._num_asked])
        numbers = range(len(groups)) if shared is None else shared.queries(len(groups))
        measured: dict[int, list[float]] = {}
        asked = ([self._direction.mover(self.step, move) for move in groups[i]] for i in numbers)
        for i, found in zip(numbers, self._executors.of_groups(closure, asked), strict=True):
            losses = torch.stack([x.detach().double() for x in found]).tolist()
            if shared is None:
                self._check_finite(losses)
                if len(losses) == 2 and losses[0] == losses[1]:
                    self._on_equal_losses()
            measured[i] = losses
        joined = list(measured.values())
        if shared is not None:
            joined = shared.join(measured, list(map(len, groups)))
            for losses in joined:  # of all, so that every process raises or none
                self._check_finite(losses)
            self._joined.append(joined)
        return self._taken(joined)

    def _taken(self, found: list[list[float]]) -> list[list[float]]:
        self._num_asked += 1
        self.all_losses += [loss for losses in found for loss in losses]
        return found

    def two_sided(
        self, keys: Sequence[Key], objective: str = "batch", base: str = ""
    ) -> list[float]:
        """See :class:`Ask`."""
        there = [Move((Term(key, self.eps),), base=base) for key in keys]
        pairs = self.losses([(move, move.negated()) for move in there], objective)
        return [(plus - minus) / (2 * self.eps) for plus, minus in pairs]

    def derivatives(self, keys: Sequence[Key]) -> list[float]:
        """See :class:`Ask`.

        Raises:
            NoTangent: the model or the loss has no derivative along a direction.
        """
        found = []
        for key in keys:
            assert isinstance(self._direction, Dense)
            mover = self._direction.mover(self.step, Move((Term(key, 1.0),)))
            tangents = TangentMover(self._direction.write_alone(mover), mover)
            pair = self._executors.derivative(self._closure, tangents)
            loss, slope = torch.stack(pair).tolist()
            self._check_finite([loss, slope])
            self.all_losses.append(loss)
            found.append(slope)
        return found

    def _check_finite(self, losses: Sequence[float]) -> None:
        if not all(map(math.isfinite, losses)):
            said = " and ".join(map(str, losses))
            raise NonFiniteLoss(f"loss {said} at step {self.step}")
