"""Perturb tensors along a dense direction, one keyed number an element."""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smezo_cli.zo.passes.draw import Draw, Numbers, as_draws
from smezo_cli.zo.targets import Target

if TYPE_CHECKING:
    from smezo_cli.zo.optimizer import ZeroOrder


class Direction:
    """sum_q a_q m z_q at one step for some coefficients a, as probes and updates evaluate it."""

    def __init__(self, owner: "ZeroOrder", numbers: list[Numbers]) -> None:
        self._owner = owner
        self._numbers = numbers
        self._draws: list[Draw] | None = None

    def numbers(self, target: Target) -> Numbers:
        """What a pass over this tensor needs, as plain numbers."""
        return self._numbers[target.position]

    def draw(self, target: Target) -> Draw:
        """The same as tensors on the target's device, made for all targets when first asked for."""
        if self._draws is None:
            devices = [t.parameter.device for t in self._owner.targets]
            self._draws = as_draws(self._numbers, devices)
        return self._draws[target.position]

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        self._owner.move(self._owner.target_of(parameter), out, self)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        self._owner.move_both(self._owner.target_of(parameter), plus, minus, self)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target = self._owner.target_of(parameter)
        width = parameter.numel() // parameter.shape[0]
        picked = parameter.detach().index_select(0, rows).view(-1)
        offsets = torch.arange(width, device=rows.device)
        index = (rows[:, None] * width + offsets).view(-1)
        moved = self._owner.move_at(target, picked, index, self)
        return moved.view(rows.shape[0], *parameter.shape[1:])

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """a z of one query (float32, flat), written out, and the mask (bool)."""
        z, mask = self._owner.kept(target, self)
        return z * self.draw(target).coefficients[0], mask


WORTH_COMPILING = 1_000_000  # weights; fewer are moved some hundred times while Numba starts


def free_memory_bytes() -> int:
    """Return the free memory of this machine in bytes; 0 where it is not known."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
