"""Add up numbers exactly, so that neither their order nor the machine changes the sum."""

import torch
from torch import Tensor

_GRID = 2.0**32


def on_grid(numbers: Tensor) -> Tensor:
    """Return numbers rounded to multiples of 2^-32, in float64: their sums are exact up to 2^21."""
    return (numbers.double() * _GRID).round() / _GRID


def sum_of_squares(flat: Tensor) -> float:
    """Return the sum of the squares of a tensor, each rounded to a multiple of 2^-32.

    Whole numbers are added, so the sum is the same in any order, on any device, up to 2^31.
    """
    total = 0
    for part in torch.split(flat.detach(), 1 << 20):
        squares = part.double().square_().mul_(_GRID).round_()
        total += int(squares.to(torch.int64).sum())
    return total / _GRID


def squares_in_units(flat: Tensor, unit: float) -> int:
    """Return the sum of the squares of float32 numbers, each rounded to whole units, in units^2.

    Whole numbers are added, so the sum is the same in any order, on any device, up to 2^53.

    Args:
        flat: (n,).
        unit: a power of two, at least 2^-112.
    """
    whole = (flat.detach() * (1 / unit)).round_().double()
    return int(whole.dot(whole))
