"""Perturb along noise that is scaled and shifted, weight by weight, by what the method keeps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from smezo_cli.zo.directions.base import Change, DirectionContext
from smezo_cli.zo.directions.dense import Dense, DenseMover, among
from smezo_cli.zo.move import Move
from smezo_cli.zo.passes.choose import Passes
from smezo_cli.zo.selections.masks import takes_all
from smezo_cli.zo.targets import Target, check

#: Takes places of a flat tensor (a slice, or int64) and the sum_q c_q z_q there (float32); returns
#: the sum_q c_q u_q there. With the other sign of all c_q it returns the same with another sign, to
#: the last bit. It may write to the noise that it is given.
Shape = Callable[[slice | Tensor, Tensor], Tensor]


class Shaped(Dense, ABC):
    """Make u(key) = A + B z of noise z, where A and B of a weight follow from the state.

    A probe and the update of its step read the same state: an update writes to a part of the state
    after u was made of it, and to ``State.numbers`` after its pass.

    Args:
        noise: "gaussian" or "rademacher".
    """

    @abstractmethod
    def shape(self, target: Target, step: int, total: float) -> Shape:
        """Return what makes sum_q c_q u_q of sum_q c_q z_q.

        Args:
            target: whose state is read; by :meth:`State.read`, since a probe writes nothing.
            step: that is made.
            total: sum_q c_q.
        """

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`.

        Raises:
            ValueError: a mask leaves weights out.
        """
        rule = context.selection.rule
        check(
            all(takes_all(rule, target.h) for target in context.targets),
            "a direction that follows from a state of each weight takes whole tensors, or entries "
            "by name: a mask does not go with it",
        )
        super().bind(context, num_terms)

    def mover(self, step: int, move: Move) -> "ShapedMover":
        """See :class:`Direction`."""
        # The mover takes the decay off by itself.
        return ShapedMover(self, step, move, self.numbers_of(step, replace(move, decay=0.0)))

    def apply(self, step: int, move: Move) -> None:
        """See :class:`Direction`."""
        self.change(step, move, lambda target: lambda part, along: along)

    def change_one(self, target: Target, mover: DenseMover, change: Change) -> None:
        """See :class:`Dense`: of u, which is made before the change can write to the state."""
        assert isinstance(mover, ShapedMover)
        shape = mover.shape(target)
        super().change_one(target, mover, lambda part, total: change(part, shape(part, total)))


class ShapedMover(DenseMover):
    """Writes copies of tensors moved along u, part by part."""

    _direction: Shaped

    def shape(self, target: Target) -> Shape:
        """Return what makes the move's sum along u of that along z."""
        terms = [t for t in self.move.terms if t.only is None or target.name in t.only]
        total = math.fsum(t.coefficient for t in terms)
        return self._direction.shape(target, self._step, total)

    def write(self, passes: Passes, target: Target, out: Tensor) -> None:
        """See :class:`DenseMover`; rounded to nearest, as only updates round otherwise."""
        start, shape, decay = self.start(target), self.shape(target), self.move.decay
        if not self.moves(target):
            out.copy_(start)
            return
        if target.index is not None:
            moved = self._picked(target, start[target.index], target.index, slice(None))
            if out is not start:
                out.copy_(start)
            out[target.index] = moved
            return

        def use(part: slice, total: Tensor, bits: Tensor | None) -> None:
            torch.add(start[part], _decayed(shape(part, total), start[part], decay), out=out[part])

        self.along(self._direction.probe_passes, target, use)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        target = self._direction.target_of(parameter)
        if not self.moves(target) or target.index is not None:
            super().both(parameter, plus, minus)
            return
        start, shape = self.start(target), self.shape(target)

        def use(part: slice, total: Tensor, bits: Tensor | None) -> None:
            along = shape(part, total)
            torch.add(start[part], along, out=plus[part])
            torch.sub(start[part], along, out=minus[part])

        self.along(self._direction.probe_passes, target, use)

    def moved_rows(self, target: Target, rows: Tensor, picked: Tensor) -> Tensor:
        """See :class:`DenseMover`."""
        if not self.moves(target):
            return picked
        width = target.parameter.numel() // target.parameter.shape[0]
        if target.index is not None:
            place, index = among(target.index, rows, width)
            flat = picked.view(-1)
            named = torch.searchsorted(target.index, index)
            flat[place] = self._picked(target, flat[place], index, named)
            return picked
        index = (rows[:, None] * width + torch.arange(width, device=rows.device)).view(-1)
        return self._picked(target, picked.view(-1), index, index).view(picked.shape)

    def _picked(
        self, target: Target, start: Tensor, index: Tensor, place: slice | Tensor
    ) -> Tensor:
        """Return entries at a flat index moved from ``start``; their state is at ``place``."""
        passes = self._direction.probe_passes
        zero = torch.zeros(len(index), device=index.device)
        numel, numbers = target.parameter.numel(), self.read_by(passes, target)
        total = passes.move_at(zero, index, numel, numbers)
        along = _decayed(self.shape(target)(place, total), start, self.move.decay)
        return (start.float() + along).to(start.dtype)

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """See :class:`smezo_cli.zo.directions.base.PointMover`: the sum of all terms along u."""
        along, shape = torch.empty_like(target.flat, dtype=torch.float32), self.shape(target)

        def use(part: slice, total: Tensor, bits: Tensor | None) -> None:
            along[part] = shape(part, total)

        self.along(self._direction.probe_passes, target, use)
        return along, torch.ones_like(along, dtype=torch.bool)


def _decayed(along: Tensor, start: Tensor, decay: float) -> Tensor:
    """Return a direction less the decay of the weights that it starts from."""
    return along - decay * start.float() if decay else along
