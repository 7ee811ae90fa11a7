"""Make weights of all scales, on which passes of several makes are compared."""

import torch
from torch import Tensor


def weight_of(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return ordinary weights, zeros of both signs, denormal and large ones: flat."""
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    weight[::7] = 0.0
    weight[1::11] = -0.0
    weight[2::13] *= 2.0**-24  # denormal in float16
    weight[3::17] *= 2.0**-140  # denormal in float32
    weight[4::19] *= 1e4
    return weight.to(dtype)
