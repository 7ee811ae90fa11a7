"""Make passes for noise of any function of (index, key), in plain torch, chunk by chunk."""

from collections.abc import Callable

import torch
from torch import Tensor

from smezo_cli.zo import noise
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import (
    EagerPasses,
    Fold,
    Use,
    blend,
    of_draws,
    over_chunks,
    round_bits,
)
from smezo_cli.zo.selections.masks import RULES

#: Returns z (float32) at flat places (int64) of a tensor, from a key: two int64 numbers.
Values = Callable[[Tensor, Tensor], Tensor]


class PassesByIndex(EagerPasses):
    """Make the passes of :class:`EagerPasses` with z from a function in place of the keyed hash.

    Args:
        rule: mask and rounding; its noise is not read.
        values: gives z.
    """

    def __init__(self, rule: Rule, values: Values) -> None:
        super().__init__(rule)
        self._values = values

    def _sum(self, index: Tensor, draw: Draw) -> Tensor:
        total = self._values(index, draw.keys[0]) * draw.coefficients[0]
        for q in range(1, draw.keys.shape[0]):
            total = total + self._values(index, draw.keys[q]) * draw.coefficients[q]
        return total

    def _mask(self, weight: Tensor, index: Tensor, numel: int, draw: Draw) -> Tensor:
        value = weight.float().abs()
        if self.rule.mask == "random":
            value = noise.uniform_at(index, numel, draw.mask_key)
        return RULES[self.rule.mask](value, draw.h)

    def _bits(self, index: Tensor, numel: int, draw: Draw) -> Tensor | None:
        counter, is_first = noise.locate(index, numel)
        first, second = round_bits(counter, self.rule, draw)
        return None if first is None or second is None else torch.where(is_first, first, second)

    def move_at(self, weight: Tensor, index: Tensor, numel: int, draw: Draw) -> Tensor:
        """See :func:`smezo_cli.zo.passes.eager.move_at`."""
        mask, bits = self._mask(weight, index, numel, draw), self._bits(index, numel, draw)
        return blend(weight, self._sum(index, draw), mask, bits, draw, weight.dtype)

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move`."""
        numel = weight.numel()

        def one(part: slice) -> None:
            index = torch.arange(part.start, part.stop, device=weight.device)
            out[part] = self.move_at(weight[part], index, numel, draw)

        over_chunks(numel, weight.device, one)

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move_both`."""
        self.move(weight, plus, draw)
        self.move(weight, minus, draw._replace(coefficients=-draw.coefficients))

    def along(self, weight: Tensor, draw: Draw, use: Use, fold: Fold | None = None) -> None:
        """See :meth:`EagerPasses.along`."""
        numel = weight.numel()

        def one(part: slice) -> None:
            index = torch.arange(part.start, part.stop, device=weight.device)
            total = of_draws(draw, lambda d: self._sum(index, d), fold)
            assert isinstance(total, Tensor)
            use(part, total, self._bits(index, numel, draw))

        over_chunks(numel, weight.device, one)

    def noise_and_mask(self, weight: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """See :meth:`EagerPasses.noise_and_mask`."""
        numel = weight.numel()
        z = torch.empty_like(weight, dtype=torch.float32)
        mask = torch.empty_like(weight, dtype=torch.bool)

        def one(part: slice) -> None:
            index = torch.arange(part.start, part.stop, device=weight.device)
            z[part] = self._values(index, draw.keys[0])
            mask[part] = self._mask(weight[part], index, numel, draw)

        over_chunks(numel, weight.device, one)
        return z, mask
