"""Spell alike what tensors, Numba's scalars and Triton's blocks spell in ways of their own.

A function made of these, of operators and of Python numbers is evaluated by torch on tensors, fused
by ``torch.compile``, compiled for single numbers by Numba (:mod:`smezo_cli.zo.passes.kernels` gives
these names their second meaning) and for blocks of them by Triton (their third:
:mod:`smezo_cli.zo.passes.triton_kernels`): one source, the same bits. Python's floats are 64 bits
wide to Numba, so a constant beside a float32 is written ``f32(0.5)``; integers may widen on the
way, for ``i32`` and ``as_f32`` keep the low 32 bits. Triton takes -x for 0 - x: negate only what is
never 0.
"""

from typing import overload

import torch
from torch import Tensor


@overload
def f32(x: Tensor) -> Tensor: ...
@overload
def f32(x: float) -> float: ...
def f32(x: Tensor | float) -> Tensor | float:
    """Return the value as float32; a constant takes the dtype of what it meets."""
    return x.to(torch.float32) if isinstance(x, Tensor) else x


def i32(x: Tensor) -> Tensor:
    """Return the low 32 bits of an integer."""
    return x.to(torch.int32)


def as_i32(x: Tensor) -> Tensor:
    """Return the pattern of a float32."""
    return x.view(torch.int32)


def as_f32(x: Tensor) -> Tensor:
    """Return the float32 of an int32 pattern."""
    return x.view(torch.float32)


def at_least(x: Tensor, low: float) -> Tensor:
    """Return ``low`` where x is below it, else x; may write to x."""
    return x.clamp_min_(low)


def floor(x: Tensor) -> Tensor:
    """Return the largest whole number not above x, in x's dtype."""
    return x.floor()


def where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return ``yes`` or ``no``, both being evaluated."""
    return torch.where(condition, yes, no)
