"""Choose the rows of each step."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.parts import by_part


def batches_of(rows: Sequence[Candidates], batch_size: int, seed: int, order: str) -> "Batches":
    """Return the batches of training rows: in a mixture, those that hold rows of every part."""
    kind = MixedBatches if rows[0].part else Batches
    return kind(rows, batch_size, seed, order)


@runtime_checkable
class ChoosesRows(Protocol):
    """Describe a method whose steps ask for losses of other rows than the batch's, too."""

    def rows_of(
        self, objective: str, step: int, batch: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[int]:
        """Return the numbers of the train rows that an objective's loss is over.

        Args:
            objective: one of the method's ``objectives``.
            step: number of the step, from 0.
            batch: numbers of the rows of the step's batch.
            lengths: tokens of every train row.
        """


class RowsOfStep(NamedTuple):
    """Hold the rows of a step.

    Attributes:
        batch: those of its batch.
        of: returns those of another objective, by its name.
    """

    batch: Sequence[Candidates]
    of: Callable[[str], Sequence[Candidates]]


class Batches:
    """Choose the batch of a step, by (seed, step) alone.

    Permutations of all rows, one for each epoch, are laid end to end and cut into batches.

    Args:
        rows: of the train split.
        batch_size: rows in a batch.
        seed: of the permutations.
        order: "shuffled"; or "stratified", which spreads the rows of each class evenly over the
            epoch: each batch holds them in proportion, within one row (of two classes; within
            more rows if there are many small classes). The mean over an epoch is the same; batches
            differ less (docs/guide/batches.md).
    """

    def __init__(
        self, rows: Sequence[Candidates], batch_size: int, seed: int | str, order: str = "shuffled"
    ) -> None:
        self._rows, self._num_rows = rows, len(rows)
        self._size, self._seed = batch_size, seed
        self._labels = [row.label for row in rows] if order == "stratified" else []
        self._orders: dict[int, list[int]] = {}

    def __call__(self, step: int) -> list[int]:
        """Return the row numbers of the batch."""
        places = range(step * self._size, (step + 1) * self._size)
        return [self._order(i // self._num_rows)[i % self._num_rows] for i in places]

    def rows(self, step: int) -> list[Candidates]:
        """Return the rows of the batch."""
        return [self._rows[i] for i in self(step)]

    def of_step(self, method: object, step: int) -> RowsOfStep:
        """Return the rows of a step of a method, for each of its objectives."""

        def of(objective: str) -> list[Candidates]:
            assert isinstance(method, ChoosesRows), objective
            lengths = [row.width for row in self._rows]
            return [self._rows[i] for i in method.rows_of(objective, step, self(step), lengths)]

        return RowsOfStep(self.rows(step), of)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self._num_rows))
            rng = random.Random(f"{self._seed}/batches/{epoch}")
            rng.shuffle(order)
            if self._labels:
                order = self._stratified(order, rng)
            self._orders = {k: v for k, v in self._orders.items() if k >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]

    def _stratified(self, order: Sequence[int], rng: random.Random) -> list[int]:
        """Sort rows by (k + u) / n: the k-th of the n rows of its class, with one u a class."""
        sizes = Counter(self._labels)
        start = {label: rng.random() for label in sorted(sizes)}
        met, places = Counter[int](), dict[int, float]()
        for i in order:
            label = self._labels[i]
            places[i] = (met[label] + start[label]) / sizes[label]
            met[label] += 1
        return sorted(order, key=places.__getitem__)


class MixedBatches(Batches):
    """Choose the batch of a step from all parts of a mixture, by (seed, step) alone.

    The parts take turns, row by row and on from batch to batch; each goes through its own rows as
    :class:`Batches` does. So a batch holds as many rows of one part as of another, within one.
    """

    def __init__(
        self, rows: Sequence[Candidates], batch_size: int, seed: int | str, order: str = "shuffled"
    ) -> None:
        super().__init__(rows, batch_size, seed)
        numbers: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            numbers.setdefault(row.part, []).append(i)
        self._numbers = list(numbers.values())
        self._parts = [
            Batches(of_part, 1, f"{seed}/{name}", order) for name, of_part in by_part(rows).items()
        ]

    def __call__(self, step: int) -> list[int]:
        """Return the row numbers of the batch, part after part."""
        chosen: list[list[int]] = [[] for _ in self._parts]
        for place in range(step * self._size, (step + 1) * self._size):
            turn, k = divmod(place, len(self._parts))
            chosen[k].append(self._numbers[k][self._parts[k](turn)[0]])
        return [i for of_part in chosen for i in of_part]
