"""Round float32 values stochastically, to a narrower dtype or to levels, by given chance."""

import torch
from torch import Tensor

from smezo_cli.zo.elementwise import as_f32, as_i32, f32, floor, i32, where


def _round_to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Return one of the two neighbours in bfloat16, by chance and without bias; still float32."""
    return as_f32((as_i32(value) + (bits & 0xFFFF)) & -0x10000)


def _round_to_float16(value: Tensor, bits: Tensor) -> Tensor:
    """Do as above, for float16; below 2**-14 the mean is up to 2**-38 under the value.

    It is 2**-39 on average, and nothing for multiples of 2**-38.
    """
    normal = as_f32((as_i32(value) + (bits & 0x1FFF)) & -0x2000)
    # Below 2**-14 float16 has a fixed grid of 2**-24. The chance comes in steps of 2**-14 of it,
    # which with the ten bits of a subnormal fill a float32: finer parts of the value count as none.
    chance = f32(i32(bits >> 17)) * f32(2.0**-14)
    grid = floor(value * f32(2.0**24) + chance) * f32(2.0**-24)
    return where(abs(value) < f32(2.0**-14), grid, normal)


#: Stochastic rounding of a float32 by 31 random bits (int32), by the dtype that then holds it.
ROUNDINGS = {torch.bfloat16: _round_to_bfloat16, torch.float16: _round_to_float16}


def to_levels(value: Tensor, chance: Tensor, inverse: float, step: float) -> Tensor:
    """Return one of the levels (k + 1/2) step beside a float32, by chance and without bias.

    Args:
        value: float32.
        chance: float32, uniform in [0, 1).
        inverse: 1 / step.
        step: between two levels.
    """
    level = floor(value * f32(inverse) + (chance - f32(0.5)))
    return (level + f32(0.5)) * f32(step)
