"""Measure the loss of a step in micro-batches, and this rank's shard of it.

Sums over micro-batches are rounded to multiples of 2^-32. Adding them up is then exact, so that
neither their order nor who adds them matters: any number of ranks gives the same bits as long as
the rows are cut into the same micro-batches (a forward over other rows rounds in another way).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.machine.out_of_memory import OutOfMemory, detecting_out_of_memory, release_memory
from smezo_cli.scoring.by_row import by_row
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.objectives import loss_weight
from smezo_cli.scoring.parts import by_part
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.backprop import BackwardOutOfMemory
from smezo_cli.zo.points import NotBatched
from smezo_cli.zo.step import Closure, RowForward, StepRecord
from smezo_cli.zo.sums import on_grid

T = TypeVar("T")


class Steps(Protocol):
    """Take steps; see :class:`smezo_cli.methods.base.Method`."""

    def step(self, closure: Closure) -> StepRecord: ...


class Team(Protocol):
    """Divide a step among ranks; see :class:`smezo_cli.run.ranks.Ranks`."""

    @property
    def shares_rows(self) -> bool:
        """Say whether several ranks measure a query, each on rows of its own."""

    def rows(self, num: int) -> slice:
        """Return which of so many rows this rank measures."""

    def queries(self, num: int) -> Sequence[int]:
        """Return which of so many queries this rank measures."""

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Return sums over the ranks."""

    def add_gradient(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, within a step."""

    def measured(self) -> None:
        """Take note that a step has all its losses."""

    def step_made(self) -> None:
        """Take note that a step is made."""


class Batch:
    """Compute the objective of the rows of a step, in micro-batches of at most ``size`` rows.

    That of a mixture is the weighted mean of the objectives of its parts, each a mean over its own
    rows (or tokens); a micro-batch then holds rows of one part.

    Args:
        scorer: computes it.
        rows: of the step, or of this process's part of it.
        objective: its name.
        size: most rows in a micro-batch; None: all.
        weights: of a mixture, by part; those of the parts that have rows here are made to add up
            to 1.
    """

    #: returns the rows of another objective of the step
    rows_of: Callable[[str], Sequence[Candidates]]

    def __init__(
        self,
        scorer: Scorer,
        rows: Sequence[Candidates],
        objective: str,
        size: int | None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._scorer, self._objective, self._weights = scorer, objective, weights
        self._rows = rows
        #: of the whole batch
        self.num_rows = len(rows)
        # What the sum over the rows of a part is multiplied by; None: a single task.
        self._factors: dict[str, float] | None = None
        self._weight = 1
        if weights:
            parts = by_part(rows)
            total = math.fsum(weights[name] for name in parts)
            self._factors = {
                name: weights[name] / total / loss_weight(of_part, objective)
                for name, of_part in parts.items()
            }
        else:
            self._weight = loss_weight(rows, objective)
        self._cut(rows, size)

    def _cut(self, rows: Sequence[Candidates], size: int | None, first: int = 0) -> None:
        self._size = size
        size = size or max(len(rows), 1)  # a rank may have none
        of_parts = by_part(rows) if self._factors is not None else {"": rows}
        self._parts = [
            of_part[i : i + size]
            for of_part in of_parts.values()
            for i in range(0, len(of_part), size)
        ]
        # Numbers in the whole batch of the rows of each micro-batch.
        numbers: Sequence[int] = range(first, first + len(rows))
        if self._factors is not None:
            at = {name: place for place, name in enumerate(of_parts)}
            numbers = sorted(numbers, key=lambda i: at[rows[i - first].part])
        each = iter(numbers)
        self._numbers = [[next(each) for _ in part] for part in self._parts]
        self.largest = max(map(len, self._parts), default=0)

    def of(self, objective: str) -> "Batch":
        """See :class:`smezo_cli.zo.step.WithObjectives`: in micro-batches of the same size."""
        rows = self.rows_of(objective)
        return type(self)(self._scorer, rows, self._objective, self._size, **self._more)

    @property
    def _more(self) -> dict[str, Any]:
        """Return what the constructor takes besides."""
        return {"weights": self._weights}

    @property
    def _is_whole(self) -> bool:
        return (
            self._factors is None
            and len(self._parts) == 1
            and len(self._parts[0]) == len(self._rows)
        )

    def __call__(self) -> Tensor:
        """Return the objective of the rows, ().

        Raises:
            OutOfMemory: the memory is too small for a micro-batch.
        """
        if self._is_whole:
            with detecting_out_of_memory():
                return self._scorer.objective(self._rows, self._objective)
        return self._sum() / self._weight

    def _sum(self) -> Tensor:
        """Return the sum over the micro-batches: float64 (), a multiple of 2^-32."""
        sums = []
        for part in self._parts:
            with detecting_out_of_memory():
                found = self._scorer.objective_sum(part, self._objective).detach().double()
                sums.append(on_grid(found * self._factor(part)))
        if not sums:  # fewer rows than ranks that share them
            return torch.zeros((), dtype=torch.float64, device=self._scorer.forward.device)
        return torch.stack(sums).sum()  # where the model is: nothing waits between the parts

    def _factor(self, part: Sequence[Candidates]) -> float:
        return 1.0 if self._factors is None else self._factors[part[0].part]

    def parts(self) -> Iterator[Closure]:
        """See :class:`smezo_cli.zo.step.InParts`."""
        if self._is_whole:
            yield self._whole
            return
        for part in self._parts:
            yield partial(self._part, part)

    def by_row(self) -> Iterator[RowForward]:
        """See :class:`smezo_cli.zo.step.ByRow`; in micro-batches, each loss on the grid of sums."""
        for part, numbers in zip(self._parts, self._numbers, strict=True):
            factor = self.num_rows * (self._factor(part) / self._weight)
            with detecting_out_of_memory():
                forwards = by_row(self._scorer, part, self._objective)
            for rows, sequences, losses in forwards:
                yield RowForward(
                    [numbers[i] for i in rows],
                    [numbers[i] for i in sequences],
                    partial(self._of_rows, losses, factor),
                )

    @staticmethod
    def _of_rows(losses: Closure, factor: float) -> Tensor:
        with detecting_out_of_memory():
            return on_grid(losses().detach() * factor)

    def _whole(self) -> Tensor:
        with detecting_out_of_memory():
            return self._scorer.objective(self._rows, self._objective)

    def _part(self, part: Sequence[Candidates]) -> Tensor:
        with detecting_out_of_memory():
            total = self._scorer.objective_sum(part, self._objective)
            return total / self._weight if self._factors is None else total * self._factor(part)


class ShardedBatch(Batch):
    """Compute this rank's shard of a step; see :class:`smezo_cli.zo.step.Shared`."""

    def __init__(
        self,
        scorer: Scorer,
        rows: Sequence[Candidates],
        objective: str,
        size: int | None,
        team: Team,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(scorer, rows, objective, size, weights)
        self._team = team
        if team.shares_rows:
            own = team.rows(len(rows))
            self._cut(rows[own], size, own.start)

    def __call__(self) -> Tensor:
        """Return the objective of the rows; if ranks share them, the sum over this rank's, ()."""
        return self._sum() if self._team.shares_rows else super().__call__()

    @property
    def _more(self) -> dict[str, Any]:
        return {**super()._more, "team": self._team}

    def queries(self, num: int) -> Sequence[int]:
        """See :class:`smezo_cli.zo.step.Shared`."""
        return self._team.queries(num)

    def join(
        self, losses: Mapping[int, Sequence[float]], sizes: Sequence[int]
    ) -> list[list[float]]:
        """Return the losses of all queries; a float64 a loss is all that ranks exchange."""
        weight = self._weight if self._team.shares_rows else 1
        return [[total / weight for total in of] for of in self._added(losses, sizes)]

    def join_parts(
        self, found: Mapping[int, Sequence[float]], sizes: Sequence[int]
    ) -> list[list[float]]:
        """See :class:`smezo_cli.zo.step.Shared`; sums of what is rounded to 2^-32 are exact."""
        if self._team.shares_rows:
            rounded = {i: on_grid(torch.tensor(of, dtype=torch.float64)) for i, of in found.items()}
            found = {i: of.tolist() for i, of in rounded.items()}
        return self._added(found, sizes)

    def join_tensor(self, tensor: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.step.Shared`."""
        return self._team.add_gradient(tensor)

    def _added(
        self, found: Mapping[int, Sequence[float]], sizes: Sequence[int]
    ) -> list[list[float]]:
        flat = [x for i, size in enumerate(sizes) for x in found.get(i, [0.0] * size)]
        sums = iter(self._team.add(flat))
        return [[next(sums) for _ in range(size)] for size in sizes]

    def measured(self) -> None:
        """See :class:`smezo_cli.zo.step.TakesNote`."""
        self._team.measured()


@contextmanager
def saying_why_not_batched() -> Iterator[None]:
    """Raise UserError where an executor that is not exact cannot measure a loss."""
    try:
        yield
    except NotBatched as error:
        raise UserError(f"method.{error}.") from error


class Measure:
    """Take the steps of a run, in micro-batches that fit into the memory.

    Args:
        scorer: computes the losses.
        objective: "loss", "accuracy" or "f1".
        size: most rows in a forward; None: all that this process has of a batch, until the memory
            is too small for them.
        team: the ranks that share the steps; None: this process takes them alone.
        halved: receives a line and the new size when micro-batches are made smaller.
        lead: is told of each step before it is taken, and of the step at which dev is evaluated
            next, so that other ranks take it too.
        weights: of the parts of a mixture; None: a single task.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: str,
        size: int | None,
        team: Team | None,
        halved: Callable[[str, int], None],
        lead: Callable[[int, int], None] = lambda step, until: None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.scorer, self.objective, self.size = scorer, objective, size
        self._weights = weights
        self._team, self._halved, self.lead = team, halved, lead

    def batch(self, rows: Sequence[Candidates]) -> Batch:
        """Return the closure over these rows."""
        if self._team is None:
            return Batch(self.scorer, rows, self.objective, self.size, self._weights)
        return ShardedBatch(self.scorer, rows, self.objective, self.size, self._team, self._weights)

    def step(
        self,
        method: Steps,
        rows: Sequence[Candidates],
        of: Callable[[str], Sequence[Candidates]] | None = None,
    ) -> StepRecord:
        """Take one step; halve the micro-batches and repeat while the memory is too small.

        Args:
            method: takes it.
            rows: of the batch.
            of: returns the rows of another objective that the method asks for.

        Raises:
            NonFiniteLoss: before anything was written.
            UserError: a single row is too much.
        """

        def use(batch: Batch) -> StepRecord:
            if of is not None:
                batch.rows_of = of
            try:
                with saying_why_not_batched():
                    return method.step(batch)
            except BackwardOutOfMemory as error:
                raise UserError(
                    f"{error}: lower micro_batch_size or task.max_train_tokens, for method=addax "
                    "method.short_rows, or take dtype=bfloat16; the run goes on from its last "
                    "checkpoint."
                ) from error

        record = self.until_it_fits(use, rows)
        if self._team is not None:
            self._team.step_made()
        return record

    def until_it_fits(self, use: Callable[[Batch], T], rows: Sequence[Candidates]) -> T:
        """Return what ``use`` makes of the closure over the rows, repeated as in :meth:`step`."""
        while True:
            batch = self.batch(rows)
            try:
                return use(batch)
            except OutOfMemory as error:
                if batch.largest == 1:
                    raise UserError(
                        f"the memory is too small for a forward over one row ({error}): lower "
                        "task.max_train_tokens or model.max_length, or take dtype=bfloat16."
                    ) from error
            # The error held tensors, which are free only here.
            self.size = batch.largest // 2
            release_memory()
            self._halved(
                f"  out of memory with {batch.largest} rows at once: "
                f"goes on with micro_batch_size={self.size}",
                self.size,
            )
