"""Measure losses as the papers' pseudo-code does: by moving the weights themselves and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.step import Closure
from smezo_cli.zo.targets import Target


class InPlace:
    """Move the weights themselves (MeZO, arXiv 2305.17333, Algorithm 1): +eps, -2 eps, +eps.

    For a dense direction, two sides and one query. The mask is taken once, before the first write.
    Low-precision weights do not come back exactly; this is the reference, not the way to train.

    Args:
        targets: the trained tensors.
    """

    name = "in_place"
    is_exact = True

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    def losses(self, closure: Closure, movers: Sequence[PointMover]) -> list[Tensor]:
        """See :class:`Executor`."""
        plus, _ = movers
        moved = [target for target in self._targets if not target.rests]
        steps = [(target, *plus.dense(target)) for target in moved]  # with eps m z and m
        standing = 0.0  # multiples of the step that are in the weights
        try:
            self._add(steps, 1.0)
            standing = 1.0
            loss_plus = closure()
            self._add(steps, -2.0)
            standing = -1.0
            loss_minus = closure()
        finally:
            self._add(steps, -standing)
        return [loss_plus, loss_minus]

    @staticmethod
    def _add(steps: list[tuple[Target, Tensor, Tensor]], scale: float) -> None:
        for target, step, mask in steps:
            moved = (target.flat.float() + scale * step).to(target.flat.dtype)
            target.flat.copy_(torch.where(mask, moved, target.flat))
        torch.clear_autocast_cache()
