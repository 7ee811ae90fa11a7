"""The rows of a step as a process measures them: in micro-batches, and its share among ranks.

Sums over parts of a batch are rounded to multiples of 2^-32. Adding them up is then exact, so that
neither their order nor who adds them matters: any number of ranks gives the same bits as long as
the rows are cut into the same parts (a forward over other rows rounds in another way).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.machine.out_of_memory import OutOfRoom, in_room, make_room
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.objectives import loss_weight
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.step import Closure, StepRecord

T = TypeVar("T")

_GRID = 2.0**32  # sums of up to 2^21 are exact in float64


class Steps(Protocol):
    """Takes steps; see :class:`smezo_cli.methods.base.Method`."""

    def step(self, closure: Closure) -> StepRecord: ...


class Team(Protocol):
    """The ranks that make a step together; see :class:`smezo_cli.run.ranks.Ranks`."""

    @property
    def shares_rows(self) -> bool:
        """More than one rank measures a query, each on rows of its own."""

    def rows(self, num: int) -> slice:
        """Those, of so many, that this rank measures."""

    def queries(self, num: int) -> Sequence[int]:
        """Those, of so many, that this rank measures."""

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the ranks."""


class Batch:
    """A closure over the rows of a step, in parts of at most ``size`` rows."""

    def __init__(
        self, scorer: Scorer, rows: Sequence[Candidates], objective: str, size: int | None
    ) -> None:
        self._scorer, self._objective = scorer, objective
        self._weight = loss_weight(rows, objective)
        self._rows = rows
        self._cut(rows, size)

    def _cut(self, rows: Sequence[Candidates], size: int | None) -> None:
        size = size or len(rows)
        self._parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        self.largest = len(self._parts[0])

    @property
    def _is_whole(self) -> bool:
        return len(self._parts) == 1 and len(self._parts[0]) == len(self._rows)

    def __call__(self) -> Tensor:
        """The objective of the rows, ().

        Raises:
            OutOfRoom: the memory is too small for a part.
        """
        if self._is_whole:
            with in_room():
                return self._scorer.objective(self._rows, self._objective)
        return self._sum() / self._weight

    def _sum(self) -> Tensor:
        """Of the parts: float64 (), a multiple of 2^-32."""
        sums = []
        for part in self._parts:
            with in_room():
                found = self._scorer.objective_sum(part, self._objective)
                sums.append((found.detach().double() * _GRID).round() / _GRID)
        return torch.stack(sums).sum()  # where the model is: nothing waits between the parts

    def parts(self) -> Iterator[Closure]:
        """See :class:`smezo_cli.zo.step.InParts`."""
        if self._is_whole:
            yield partial(self._scorer.objective, self._rows, self._objective)
            return
        for part in self._parts:
            yield partial(self._part, part)

    def _part(self, part: Sequence[Candidates]) -> Tensor:
        return self._scorer.objective_sum(part, self._objective) / self._weight


class SharedBatch(Batch):
    """The share of a rank; see :class:`smezo_cli.zo.step.Shared`."""

    def __init__(
        self,
        scorer: Scorer,
        rows: Sequence[Candidates],
        objective: str,
        size: int | None,
        team: Team,
    ) -> None:
        super().__init__(scorer, rows, objective, size)
        self._team = team
        if team.shares_rows:
            self._cut(rows[team.rows(len(rows))], size)

    def __call__(self) -> Tensor:
        """The objective of the rows, or where they are shared the sum of this rank's, ()."""
        return self._sum() if self._team.shares_rows else super().__call__()

    def queries(self, num: int) -> Sequence[int]:
        """See :class:`smezo_cli.zo.step.Shared`."""
        return self._team.queries(num)

    def join(
        self, losses: Mapping[int, tuple[float, float]], num: int
    ) -> Sequence[tuple[float, float]]:
        """See :class:`Shared`; two float64 a query are all that goes over the wire."""
        flat = [loss for query in range(num) for loss in losses.get(query, (0.0, 0.0))]
        weight = self._weight if self._team.shares_rows else 1
        sums = [total / weight for total in self._team.add(flat)]
        return list(zip(sums[::2], sums[1::2], strict=True))


class Measure:
    """Takes the steps of a run, in parts that the memory has room for.

    Args:
        scorer: computes the losses.
        objective: "loss", "accuracy" or "f1".
        size: most rows in a forward; None: all that this process has of a batch, until the memory
            is too small for them.
        team: the ranks that share the steps; None: this process makes them alone.
        halved: receives a line and the new size where the parts are made smaller.
        lead: is told of each step before it is taken, and of the step at which dev is evaluated
            next, for the ranks that take it too.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: str,
        size: int | None,
        team: Team | None,
        halved: Callable[[str, int], None],
        lead: Callable[[int, int], None] = lambda step, until: None,
    ) -> None:
        self.scorer, self.objective, self.size = scorer, objective, size
        self._team, self._halved, self.lead = team, halved, lead

    def batch(self, rows: Sequence[Candidates]) -> Batch:
        """The closure of these rows."""
        if self._team is None:
            return Batch(self.scorer, rows, self.objective, self.size)
        return SharedBatch(self.scorer, rows, self.objective, self.size, self._team)

    def step(self, method: Steps, rows: Sequence[Candidates]) -> StepRecord:
        """One step, again with parts of half the size as long as the memory is too small.

        Raises:
            NonFiniteLoss: before anything was written.
            UserError: a single row is too much.
        """
        return self.with_room(lambda batch: method.step(batch), rows)

    def with_room(self, use: Callable[[Batch], T], rows: Sequence[Candidates]) -> T:
        """What ``use`` makes of the rows' closure; see :meth:`step`."""
        while True:
            batch = self.batch(rows)
            try:
                return use(batch)
            except OutOfRoom as error:
                if batch.largest == 1:
                    raise UserError(
                        f"the memory is too small for a forward over one row ({error}): lower "
                        "task.max_train_tokens or model.max_length, or take dtype=bfloat16."
                    ) from error
            # Only here are the tensors free that the error held.
            self.size = batch.largest // 2
            make_room()
            self._halved(
                f"  out of memory with {batch.largest} rows at once: "
                f"goes on with micro_batch_size={self.size}",
                self.size,
            )
