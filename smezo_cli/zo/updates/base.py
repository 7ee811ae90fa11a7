"""Define what every update gives, and the writes that an update may make."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from smezo_cli.zo.directions.base import Change, Direction
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.passes.eager import Fold
from smezo_cli.zo.state import Size, State
from smezo_cli.zo.targets import Target


class WeightWriter:
    """Moves the weights for an update, along the directions that were probed.

    Args:
        direction: of the method.
        state: what the method keeps between steps.
        targets: the trained tensors.
        step: number of the present step, from 0.
        weight_decay: of the method; its product with the lr is a move's ``decay``.
    """

    def __init__(
        self,
        direction: Direction,
        state: State,
        targets: Sequence[Target],
        step: int,
        weight_decay: float,
    ) -> None:
        self._direction, self.state, self.targets = direction, state, targets
        self.step, self.weight_decay = step, weight_decay

    def move(self, gradient: Gradient, scale: float, decay: float = 0.0) -> None:
        """Set theta <- theta + scale g - decay theta, in one pass, on what is selected."""
        self._direction.apply(self.step, gradient.move(scale, decay))

    def copy_weights(self, name: str) -> None:
        """Keep the present weights under a name of the update's ``copies``."""
        self.state.copy_weights(name, self.targets)

    def elementwise(
        self, gradient: Gradient, change: Callable[..., Tensor], decay: float = 0.0
    ) -> None:
        """Set theta <- theta + change(g, *state) - decay theta, by parts, on what is selected.

        Along directions of low rank g, the state and the change are small: they are combined in
        the coordinates of the subspace, and what is added to the weights is lifted from there.

        Args:
            gradient: g; it is drawn again part by part, so that no memory of the model's size is
                needed but the state.
            change: takes g (float32) and the same part of each of the state's tensors, in the order
                of the update's ``slots``; returns what is added to the weights. It may write to the
                state, and to g. Each torch operation rounds once, so the bits are the same however
                the tensor is cut.
            decay: of the weights.
        """
        self.by_target(gradient, lambda target: change, decay)

    def by_target(
        self,
        gradient: Gradient,
        change_of: Callable[[Target], Callable[..., Tensor]],
        decay: float = 0.0,
    ) -> None:
        """Do as :meth:`elementwise`, where the change differs from target to target.

        Args:
            gradient: as there.
            change_of: returns the change of a target.
            decay: as there.
        """
        self.by_part(gradient, self._with_slots(change_of), decay)

    def by_part(
        self, gradient: Gradient, of: Callable[[Target], Change], decay: float = 0.0
    ) -> None:
        """Do as :meth:`by_target`, where a change reads and writes its state by itself."""
        self._direction.change(self.step, gradient.move(1.0, decay), of)

    def by_draws(
        self,
        gradient: Gradient,
        fold: Fold,
        change_of: Callable[[Target], Callable[..., Tensor]],
        decay: float = 0.0,
    ) -> None:
        """Do as :meth:`by_target`, with what ``fold`` makes of the terms in place of g.

        Along dense noise alone.

        Args:
            gradient: whose terms are drawn one by one, as noise.
            fold: see :meth:`smezo_cli.zo.passes.eager.EagerPasses.along`.
            change_of: as there.
            decay: as there.
        """
        assert isinstance(self._direction, Dense)
        of = self._with_slots(change_of)
        self._direction.change_by_draws(self.step, gradient.move(1.0, decay), fold, of)

    def _with_slots(
        self, change_of: Callable[[Target], Callable[..., Tensor]]
    ) -> Callable[[Target], Change]:
        def of(target: Target) -> Change:
            tensors, change = self.state.of(target), change_of(target)
            return lambda part, g: change(g, *(tensor[part] for tensor in tensors))

        return of


class Update(ABC):
    """Moves the weights by the gradient of a step."""

    slots: tuple[str, ...] = ()  # names of what it keeps: float32, one number a trained weight each
    own_sizes: Mapping[str, Size] = MappingProxyType({})  # of slots of other sizes, by name
    copies: tuple[str, ...] = ()  # names of copies of the weights that it keeps
    copied: frozenset[str] | None = None  # names of the tensors that are copied; None: all

    @abstractmethod
    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """Move the weights."""

    def identity(self) -> dict[str, Any]:
        """Return the arguments of the update, as plain JSON."""
        return {}
