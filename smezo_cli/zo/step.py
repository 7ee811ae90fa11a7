"""Define what a step takes and gives: the closure of a loss, and the record of a step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

Closure = Callable[[], Tensor]


#: Raise it when noise, masks, thresholds or the arithmetic of an update give other bits than
#: before: a trajectory of another version is not replayed.
NUMERICS = 1


class NonFiniteLoss(ArithmeticError):
    """Say that a loss, or a gradient by backpropagation, was NaN or infinite.

    The weights are those before the step, but for what ``executor=in_place`` leaves of its rounding
    and for those that backpropagation had come to before it met such a gradient.
    """


class UpdateOverflow(NonFiniteLoss):
    """Say that an update was too large for its dtype; some of the weights may be moved."""


@contextmanager
def measuring(step: int) -> Iterator[None]:
    """Raise NonFiniteLoss where the arithmetic of a step fails in plain numbers, as 1 / eps**2."""
    try:
        yield
    except NonFiniteLoss:
        raise
    except ArithmeticError as error:
        raise NonFiniteLoss(f"a number of step {step} is not finite ({error})") from error


@contextmanager
def updating(step: int, lr: float) -> Iterator[None]:
    """Raise UpdateOverflow where an update has a factor that plain numbers or a dtype cannot hold.

    Args:
        step: number of the step, from 0.
        lr: of the update, for the message.
    """
    try:
        yield
    except (RuntimeError, ArithmeticError) as error:
        # What torch says of a factor that a tensor's dtype cannot hold.
        if isinstance(error, RuntimeError) and "without overflow" not in str(error):
            raise
        raise UpdateOverflow(f"the update of step {step} is not finite with lr={lr:g}") from error


@runtime_checkable
class InParts(Protocol):
    """Describe a closure whose loss is a sum of parts that fit into memory one by one."""

    def __call__(self) -> Tensor: ...
    def parts(self) -> Iterable[Closure]:
        """Return closures of the parts; each returns its part of the loss, ()."""


@runtime_checkable
class Shared(Protocol):
    """Describe the closure of a step that several processes make, each on weights of its own.

    It returns what this process measures; all of them go on with the same joined losses.
    """

    def __call__(self) -> Tensor: ...
    def queries(self, num: int) -> Sequence[int]:
        """Return those, of so many, that this process measures."""

    def join(
        self, losses: Mapping[int, Sequence[float]], sizes: Sequence[int]
    ) -> list[list[float]]:
        """Return the losses of all queries, from those of this process; so many losses each."""

    def join_parts(
        self, found: Mapping[int, Sequence[float]], sizes: Sequence[int]
    ) -> list[list[float]]:
        """Do as :meth:`join`, from sums over the parts that :meth:`InParts.parts` gives here."""

    def join_tensor(self, tensor: Tensor) -> Tensor:
        """Return the sum of such a tensor of every process, float32, in the same bits on all."""


class RowForward(NamedTuple):
    """Describe one forward that gives the losses of some rows of a batch.

    Attributes:
        rows: numbers of these rows in the batch.
        sequences: the number of the row that each entry of the model's inputs belongs to, along
            their first dimension. A single number: whatever the model is given is of that row.
        losses: computes the losses: (rows,).
    """

    rows: Sequence[int]
    sequences: Sequence[int]
    losses: Closure


@runtime_checkable
class ByRow(Protocol):
    """Describe a closure that can tell the loss of each row; their mean is its loss.

    Attributes:
        num_rows: rows of the batch, of all processes that share it.
    """

    num_rows: int

    def __call__(self) -> Tensor: ...
    def by_row(self) -> Iterable[RowForward]:
        """Return the forwards that give the losses of all rows, or of those of this process."""


@runtime_checkable
class TakesNote(Protocol):
    """Describe a closure that is told when a step has all its losses, before it writes weights."""

    def __call__(self) -> Tensor: ...
    def measured(self) -> None:
        """Take note that this step asks for no more losses."""


@runtime_checkable
class WithObjectives(Protocol):
    """Describe a closure of several losses, such as that of a batch and that of all rows."""

    def __call__(self) -> Tensor: ...
    def of(self, objective: str) -> Closure:
        """Return the closure of another loss, by the name that a method's ``objectives`` give."""


@dataclass(frozen=True)
class StepRecord:
    """Says what a step did.

    Attributes:
        loss: mean of all losses measured in the step, each counting once, for the log. Of most
            methods these are the losses of the batch at the probes. Some measure at other points,
            or over other rows, and say so in their docstring; the number is then no loss of one
            point, and is to be compared with that of the same method alone.
        projected_grad: the coefficients of the step's directions, as measured, for the log: of
            most methods one directional derivative a query (empty for first-order methods).
        num_forwards: how many losses were measured, by backpropagation too. One is a pass over all
            rows of that loss (the batch, or others, see :class:`WithObjectives`), in however many
            micro-batches. ``smezo plan`` counts the same forwards, and their rows apart.
        clipped: how many projected gradients were cut for the update.
        scalars: what is recorded of the step, from which it can be made again without a forward.
    """

    loss: float
    projected_grad: tuple[float, ...]
    num_forwards: int
    clipped: int = 0
    scalars: tuple[float, ...] = ()

    @property
    def unmoved(self) -> int:
        """Return how many probes moved nothing: queries whose two losses are the same number."""
        return sum(g == 0 for g in self.projected_grad)
