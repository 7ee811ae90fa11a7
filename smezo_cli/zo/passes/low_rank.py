"""Move a matrix along a product of two thin ones: draw nothing, mask, move.

    moved = where(mask(w), w + left right - d w, w)

The product is a sum of rank-one products, added in the order of their number; every operation
rounds once to float32, so that the bits are the same in torch and in Numba, on every device, in any
parts and threads. No matrix product of a library is: its order of sums is its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smezo_cli.zo import noise
from smezo_cli.zo.passes.draw import Draw, Numbers, Rule
from smezo_cli.zo.passes.eager import blend, over_chunks
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.selections.masks import RULES

# Entries of an eager chunk, whose temporaries stay in the second-level cache of a CPU.
_CHUNK, _CHUNK_ACCELERATOR = 1 << 16, 1 << 23

# Entries of a matrix below which a second thread costs more than it saves.
_SHARE = 1 << 17


#: Gives some rows of a matrix: float32 (rows, n).
RowsOf = Callable[[slice], Tensor]


class Factors(NamedTuple):
    """Hold a matrix (m, n) as a product.

    Attributes:
        left: float32 (m, r), contiguous.
        right: float32 (r, n), contiguous.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the product."""
        return self.left.shape[0], self.right.shape[1]

    def rows(self, rows: slice | Tensor) -> "Factors":
        """Return the product's rows (a part of them, or those of these numbers)."""
        if isinstance(rows, slice):
            return Factors(self.left[rows], self.right)
        return Factors(self.left.index_select(0, rows), self.right)

    def negated(self) -> "Factors":
        """Return the product of the other sign, to the last bit."""
        return Factors(-self.left, self.right)


class Place(NamedTuple):
    """Says where a flat matrix lies in a tensor whose masks and roundings go by flat indices.

    Attributes:
        first: index of its first entry.
        numel: entries of the whole tensor.
    """

    first: int
    numel: int


def product(factors: Factors) -> Tensor:
    """Return left right: float32 (m, n), summed in the order of the rank-one products."""
    left, right = factors
    total = left[:, :1] * right[:1]
    for k in range(1, right.shape[0]):
        total += left[:, k : k + 1] * right[k : k + 1]
    return total


def product_at(factors: Factors, row: Tensor, column: Tensor) -> Tensor:
    """Return entries of left right, picked by row and column (int64, one shape)."""
    left, right = factors
    total = left[row, 0] * right[0, column]
    for k in range(1, right.shape[0]):
        total += left[row, k] * right[k, column]
    return total


class EagerLowRank:
    """Make the passes in plain torch, chunk by chunk of rows.

    Args:
        rule: what is fixed for the run; its noise is not read.
    """

    reads_numbers = False  # but tensors on the device

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def product(self, factors: Factors) -> Tensor:
        """Return left right: float32 (m, n)."""
        return product(factors)

    def move(self, weight: Tensor, out: Tensor, factors: Factors, draw: Draw) -> None:
        """Write the moved ``weight`` to ``out``, both flat (m n); they may be the same."""
        self.add(weight, out, factors.shape, lambda rows: product(factors.rows(rows)), draw)

    def add(
        self, weight: Tensor, out: Tensor, shape: tuple[int, int], rows_of: RowsOf, draw: Draw
    ) -> None:
        """Do as :meth:`move`, along a matrix of this shape that is given rows by rows."""

        def one(rows: slice, part: slice) -> None:
            step = rows_of(rows).view(-1)
            mask, bits = self._mask_and_bits(weight[part], part, weight.numel(), draw)
            out[part] = blend(weight[part], step, mask, bits, draw, out.dtype)

        _over_rows(weight.device, shape, one)

    def move_both(
        self, weight: Tensor, plus: Tensor, minus: Tensor, factors: Factors, draw: Draw
    ) -> None:
        """Write the weight moved by the product and by its negative; rounds to nearest."""

        def one(rows: slice, part: slice) -> None:
            step = product(factors.rows(rows)).view(-1)
            mask, _ = self._mask_and_bits(weight[part], part, weight.numel(), draw)
            plus[part] = blend(weight[part], step, mask, None, draw, plus.dtype)
            minus[part] = blend(weight[part], -step, mask, None, draw, minus.dtype)

        _over_rows(weight.device, factors.shape, one)

    def move_at(
        self, weight: Tensor, index: Tensor, numel: int, factors: Factors, draw: Draw
    ) -> Tensor:
        """Return picked entries moved: equal to the same entries of the whole pass.

        Args:
            weight: the picked entries (k,).
            index: int64 (k,), their flat indices in the whole matrix.
            numel: entries of the whole matrix.
            factors: of the whole matrix.
            draw: what this pass needs.
        """
        width = factors.right.shape[1]
        row = torch.div(index, width, rounding_mode="floor")
        step = product_at(factors, row, index - row * width)
        mask, bits = self._mask_and_bits(weight, index, numel, draw)
        return blend(weight, step, mask, bits, draw, weight.dtype)

    def _mask_and_bits(
        self, weight: Tensor, index: Tensor | slice, numel: int, draw: Draw
    ) -> tuple[Tensor, Tensor | None]:
        """Return which of some entries are perturbed, and what rounds them by chance."""
        rule = self.rule
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=weight.device)
        if rule.mask == "random":
            mask = RULES[rule.mask](noise.uniform_at(index, numel, draw.mask_key), draw.h)
        else:
            mask = RULES[rule.mask](weight.to(torch.float32).abs(), draw.h)
        if not rule.stochastic or weight.dtype not in ROUNDINGS:
            return mask, None
        return mask, noise.rounding_at(index, numel, draw.round_key)


class NumbaLowRank:
    """Make the passes, each as one loop of machine code; weights on a CPU.

    Loops read and write float32, and of bfloat16 the patterns; float16 goes through float32
    buffers.

    Args:
        rule: what is fixed for the run; its noise is not read.
    """

    reads_numbers = True

    def __init__(self, rule: Rule) -> None:
        from smezo_cli.zo.passes import low_rank_kernels  # imports Numba, which takes a second

        self.rule = rule
        self._kernels = low_rank_kernels

    def product(self, factors: Factors) -> Tensor:
        """See :meth:`EagerLowRank.product`."""
        left, right = factors
        found = torch.empty(left.shape[0], right.shape[1])
        loop = self._kernels.rows_of_product(right.shape[0])
        arrays = left.numpy(), right.numpy(), found.numpy()
        plain = found.numel(), (0, 0), (0, 0), 0.0, 0.0
        self._kernels.run(loop, arrays, plain, _threads(found.numel()))
        return found

    def move(
        self,
        weight: Tensor,
        out: Tensor,
        factors: Factors,
        numbers: Numbers,
        place: Place | None = None,
    ) -> None:
        """See :meth:`EagerLowRank.move`; the matrix may be a part of a tensor."""
        self._by_dtype(weight, [out], factors, numbers, weight.dtype, place)

    def move_both(
        self,
        weight: Tensor,
        plus: Tensor,
        minus: Tensor,
        factors: Factors,
        numbers: Numbers,
        place: Place | None = None,
    ) -> None:
        """See :meth:`EagerLowRank.move_both`; the matrix may be a part of a tensor."""
        self._by_dtype(weight, [plus, minus], factors, numbers, None, place)

    def _by_dtype(
        self,
        weight: Tensor,
        outs: list[Tensor],
        factors: Factors,
        numbers: Numbers,
        rounding: torch.dtype | None,
        place: Place | None,
    ) -> None:
        place = place or Place(0, weight.numel())
        if weight.dtype == torch.float16:
            self._buffered(weight, outs, factors, numbers, rounding, place)
        else:
            if weight.data_ptr() == outs[0].data_ptr():
                outs = []
            threads = _threads(weight.numel())
            self._run(weight, outs, factors, numbers, rounding, place, threads)

    def _run(
        self,
        weight: Tensor,
        outs: list[Tensor],
        factors: Factors,
        numbers: Numbers,
        rounding: torch.dtype | None,
        place: Place,
        threads: int = 1,
    ) -> None:
        """Run the loop over a matrix. Without outs the weight is moved where it is."""
        rule, (left, right) = self.rule, factors
        is_pattern = weight.dtype == torch.bfloat16
        loop = self._kernels.moved_rows(
            rule.mask,
            rounding if rule.stochastic and rounding in ROUNDINGS else None,
            numbers.decay is not None,
            is_pattern,
            len(outs),
            right.shape[0],
        )
        shape = left.shape[0], right.shape[1]
        flat = [x.detach().view(torch.int16) if is_pattern else x.detach() for x in (weight, *outs)]
        matrices = [x.numpy().reshape(shape) for x in flat]
        plain = (
            place.numel,
            numbers.mask_key,
            numbers.round_key,
            numbers.h,
            0.0 if numbers.decay is None else numbers.decay,
        )
        self._kernels.run(loop, (left.numpy(), right.numpy(), *matrices), plain, threads, place[0])

    def _buffered(
        self,
        weight: Tensor,
        outs: list[Tensor],
        factors: Factors,
        numbers: Numbers,
        rounding: torch.dtype | None,
        place: Place,
    ) -> None:
        """Run the loop by way of float32, chunk by chunk of rows."""

        def one(rows: slice, part: slice) -> None:
            wide = weight[part].float()
            moved = [torch.empty_like(wide) for _ in outs]
            here = place._replace(first=place.first + part.start)
            self._run(wide, moved, factors.rows(rows), numbers, rounding, here)
            for out, of_out in zip(outs, moved, strict=True):
                out[part] = of_out

        _over_rows(weight.device, factors.shape, one)


def _threads(entries: int) -> int:
    return torch.get_num_threads() if entries > _SHARE else 1


def _over_rows(
    device: torch.device, shape: tuple[int, int], one: Callable[[slice, slice], None]
) -> None:
    """Call ``one(rows, their flat part)`` for chunks of rows."""
    length, width = shape
    entries = _CHUNK if device.type == "cpu" else _CHUNK_ACCELERATOR

    def whole(rows: slice) -> None:
        one(rows, slice(rows.start * width, rows.stop * width))

    over_chunks(length, device, whole, max(1, entries // width))


LowRankPasses = EagerLowRank | NumbaLowRank
