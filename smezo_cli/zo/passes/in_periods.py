"""Move weights along noise that comes again after a period, as machine code by Numba.

Laid out in rows of one period, a tensor is moved along left right: left (rows, queries) holds the
coefficients, the same in every row, and right (queries, period) the noise. So the loops are those
of low rank, which add the queries in their order, as eager passes do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from smezo_cli.zo.passes.by_index import PassesByIndex, Values
from smezo_cli.zo.passes.draw import Draw, Numbers, Rule
from smezo_cli.zo.passes.low_rank import Factors, NumbaLowRank, Place

#: Returns one period of z (float32, contiguous), from the first entry of a tensor on, by its key.
Period = Callable[[tuple[int, int]], Tensor]


class PeriodicPasses(PassesByIndex):
    """Move as :class:`PassesByIndex`, whole passes being loops of machine code; weights on a CPU.

    Args:
        rule: mask and rounding; its noise is not read.
        values: gives z at single places.
        period: gives the same z, a period of it.
    """

    name = "numba"

    def __init__(self, rule: Rule, values: Values, period: Period) -> None:
        super().__init__(rule, values)
        self._period, self._low_rank = period, NumbaLowRank(rule)

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move`."""
        numbers = Numbers.of(draw)
        for part, factors, place in self._parts(weight.numel(), numbers):
            self._low_rank.move(weight[part], out[part], factors, numbers, place)

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move_both`."""
        numbers = Numbers.of(draw)
        for part, factors, place in self._parts(weight.numel(), numbers):
            outs = plus[part], minus[part]
            self._low_rank.move_both(weight[part], *outs, factors, numbers, place)

    def _parts(self, numel: int, numbers: Numbers) -> list[tuple[slice, Factors, Place]]:
        """Return whole periods of a flat tensor, then what is left of it, with its product."""
        right = torch.stack([self._period(key) for key in numbers.keys])
        left = torch.tensor([numbers.coefficients], dtype=torch.float32)
        rows, rest = divmod(numel, right.shape[1])
        whole = numel - rest
        parts = []
        if rows:
            periods = Factors(left.repeat(rows, 1), right)
            parts.append((slice(whole), periods, Place(0, numel)))
        if rest:
            last = Factors(left, right[:, :rest].contiguous())
            parts.append((slice(whole, numel), last, Place(whole, numel)))
        return parts
