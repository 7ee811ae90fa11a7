"""Define the interface that every direction implements: u(key) of each tensor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from smezo_cli.zo.move import Move
from smezo_cli.zo.probe import Mover, PairMover
from smezo_cli.zo.selections.base import Selection
from smezo_cli.zo.state import State
from smezo_cli.zo.targets import Target

#: Takes a part of a flat tensor, the sum of its terms there (float32), and returns what is added.
Change = Callable[[slice, Tensor], Tensor]


@dataclass(frozen=True)
class DirectionContext:
    """Says what a direction is made for: the tensors of one optimizer, and how it computes.

    Attributes:
        targets: the trained tensors.
        selection: which of their coordinates are perturbed.
        seed: names the noise.
        is_stochastic: updates are rounded stochastically where weights are narrower than float32.
        backend: "auto", "compiled" or "eager".
        keep_noise: draw once a step and keep it: "auto", True or False.
        is_in_place: the executor moves the weights themselves.
        state: what the method keeps; a direction may read it.
    """

    targets: Sequence[Target]
    selection: Selection
    seed: int
    is_stochastic: bool
    backend: str
    keep_noise: bool | str
    is_in_place: bool
    state: State


class PointMover(PairMover, Protocol):
    """Writes copies of tensors at a point, and knows the move that leads there."""

    move: Move
    only: frozenset[int] | None  # ids of the parameters that it moves; None: all

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """Return the first term written out (float32, flat), and the mask (bool)."""


class Named(Protocol):
    """Computes a pass over a tensor; others know its name alone."""

    @property
    def name(self) -> str:
        """Return its name, such as "numba"."""


class Direction(Protocol):
    """Perturbs tensors along u(key), the same in the probe and in the update."""

    @property
    def passes(self) -> Named:
        """Return what computes a pass over a tensor."""

    @property
    def why_eager(self) -> str:
        """Return why passes are not fused; "" where they are, or that was asked for."""

    def target_of(self, parameter: Tensor) -> Target:
        """Return the target that this parameter is."""

    def masks(self, step: int) -> Iterator[Tensor]:
        """Yield, target by target, which weights a step selects: bool, flat."""

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """Get ready for these tensors, and moves of so many terms."""

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of what is kept from step to step, beside the state."""

    @property
    def has_compiled_passes(self) -> bool:
        """Return whether compiled passes are used where they are asked for."""

    def noise_bytes(self, *, compiles: bool, on_cpu: bool, free: int) -> int:
        """Return the bytes of noise that a step keeps from pass to pass.

        Args:
            compiles: compiled passes are asked for.
            on_cpu: the tensors are on a CPU, wherever they are now.
            free: bytes of free memory there.
        """

    def state_size(self, target: Target) -> int:
        """Return how many numbers a slot of the state holds for a target."""

    def thin_rank(self, target: Target) -> int | None:
        """Return the rank of what is added to a whole matrix; None: it is no product of thin ones.

        Where a mask leaves entries out it is none.
        """

    def refreshes_at(self, step: int) -> bool:
        """Return whether u(key) of this step lie in other subspaces than before."""

    def carry(self, target: Target, kept: Tensor, step: int) -> Tensor:
        """Return a slot's tensor of the subspace before in that of this step."""

    def begin(self, step: int) -> None:
        """Begin a step: forget what was drawn for the one before. May be called again."""

    def end(self) -> None:
        """Drop what was kept for the step."""

    def mover(self, step: int, move: Move) -> PointMover:
        """Return what writes copies of tensors moved by ``move``."""

    def apply(self, step: int, move: Move) -> None:
        """Move the weights themselves, rounded as asked."""

    def change(self, step: int, move: Move, of: Callable[[Target], Change]) -> None:
        """Add to the weights what ``of(target)`` makes of the sum of the terms, part by part.

        The move's decay is taken off, too. Parts are disjoint, fit the cache, and come in any order
        and in several threads.
        """

    def identity(self) -> dict[str, Any]:
        """Return what the direction follows from, as plain JSON."""


@runtime_checkable
class MovesRows(Protocol):
    """Describe a direction that can move each row of a batch to a point of its own."""

    def row_mover(self, step: int, moves: Sequence[Move]) -> Mover:
        """Return what computes the model for sequences, each with the weights moved by its move.

        A single move: it holds for all sequences.
        """
