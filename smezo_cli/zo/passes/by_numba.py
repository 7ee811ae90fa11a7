"""Make passes by Numba on a CPU, in the threads of torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo import noise
from smezo_cli.zo.passes.draw import Draw, Numbers, Rule
from smezo_cli.zo.passes.eager import Fold, Use, of_draws, over_chunks
from smezo_cli.zo.rounding import ROUNDINGS

# Pairs per thread below which another thread costs more than it saves.
_SHARE = 1 << 16

# Pairs per chunk where Numba's loop reads or writes by way of float32 buffers: few enough for the
# second-level cache, enough for the 10 us of a call.
_BUFFER = 1 << 15


class NumbaPasses:
    """Make the passes, each as one loop of machine code; weights on a CPU.

    Loops read and write float32, and of bfloat16 the patterns; what else there is (float16, several
    queries, an output of another dtype) goes through float32 buffers.
    """

    name = "numba"
    reads_numbers = True

    def __init__(self, rule: Rule) -> None:
        from smezo_cli.zo.passes import kernels  # imports Numba, which takes a second

        self.rule = rule
        self._kernels = kernels

    def move(self, weight: Tensor, out: Tensor, draw: Draw | Numbers) -> None:
        """See :meth:`EagerPasses.move`."""
        numbers, arrays = Numbers.of(draw), _Arrays.of(weight)
        there = arrays if out is weight else _Arrays.of(out)
        if arrays.dtype != there.dtype or not arrays.is_read or len(numbers.keys) > 1:
            self._move_buffered(weight.detach(), out.detach(), numbers)
            return
        rule, patterns, decay = self.rule, arrays.is_pattern, numbers.decay is not None
        rounding, plain = self._last(numbers, arrays.dtype)
        moved: tuple[Any, ...] = arrays.halves
        if arrays.address == there.address:
            loop = self._kernels.in_place(rule.mask, rule.noise, rounding, decay, patterns)
        else:
            moved = (*arrays.halves, *there.halves)
            loop = self._kernels.whole(rule.mask, rule.noise, rounding, False, decay, patterns)
        self._run(loop, moved, plain)
        if arrays.numel % 2:
            last = slice(arrays.numel - 1, None)
            self._odd(weight.detach()[last], out.detach()[last], arrays.numel // 2, numbers)

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw | Numbers) -> None:
        """See :meth:`EagerPasses.move_both`."""
        numbers = Numbers.of(draw)
        w, p, m = (_Arrays.of(x) for x in (weight, plus, minus))
        if w.dtype == p.dtype == m.dtype and w.is_read and len(numbers.keys) == 1:
            loop = self._kernels.both(self.rule.mask, self.rule.noise, w.is_pattern)
            self._run(loop, (*w.halves, *p.halves, *m.halves), self._last(numbers, w.dtype)[1])
            pairs, odd = w.numel // 2, slice(w.numel - w.numel % 2, None)
            weight, plus, minus = weight.detach()[odd], plus.detach()[odd], minus.detach()[odd]
            if not w.numel % 2:
                return
            self._odd(weight, plus, pairs, numbers)
            self._odd(weight, minus, pairs, _negated(numbers))
        else:
            self._move_buffered(weight.detach(), plus.detach(), numbers)
            self._move_buffered(weight.detach(), minus.detach(), _negated(numbers))

    def along(
        self, weight: Tensor, draw: Draw | Numbers, use: "Use", fold: "Fold | None" = None
    ) -> None:
        """See :meth:`EagerPasses.along`."""
        numbers = Numbers.of(draw)
        pairs, odd = weight.numel() // 2, weight.numel() % 2

        def drawn(part: slice, numbers: Numbers) -> Tensor:
            both = torch.empty(2, part.stop - part.start)
            halves = both.numpy()
            for q, (key, a) in enumerate(zip(numbers.keys, numbers.coefficients, strict=True)):
                self._kernels.direction(self.rule.noise, q > 0)(*halves, part.start, key, a)
            return both

        def one(part: slice) -> None:
            both = of_draws(numbers, lambda n: drawn(part, n), fold)
            bits: tuple[Tensor | None, Tensor | None] = None, None
            if self.rule.stochastic:
                counter = torch.arange(part.start, part.stop)
                bits = noise.rounding_pair(counter, torch.tensor(numbers.round_key))
            use(part if part.start < pairs else slice(2 * pairs, None), both[0], bits[0])
            if part.start < pairs:
                use(slice(pairs + part.start, pairs + part.stop), both[1], bits[1])

        over_chunks(pairs, weight.device, one, _BUFFER)
        if odd:  # the last entry is the first of a pair of its own
            one(slice(pairs, pairs + 1))

    def numbers(self, size: int, draw: Draw | Numbers) -> Tensor:
        """Return the sum_q a_q z_q of a tensor of so many weights: float32, flat.

        Without chunks and threads, which cost more than a few thousand numbers do.
        """
        numbers, found, pairs = Numbers.of(draw), torch.empty(size), size // 2
        flat = found.numpy()
        halves = [(flat[:pairs], flat[pairs : 2 * pairs], 0)]
        if size % 2:  # the last entry is the first of a pair of its own
            halves.append((flat[-1:], torch.empty(1).numpy(), pairs))
        for first, second, start in halves:
            for q, (key, a) in enumerate(zip(numbers.keys, numbers.coefficients, strict=True)):
                self._kernels.direction(self.rule.noise, q > 0)(first, second, start, key, a)
        return found

    def _run(self, loop: Callable[..., None], arrays: tuple[Any, ...], plain: Any) -> None:
        """Run the loop over the halves of arrays, in threads where that pays."""
        pairs = len(arrays[0])
        threads = torch.get_num_threads() if pairs > _SHARE else 1
        if threads == 1:
            loop(*arrays, 0, *plain)
            return
        together = self._kernels.in_threads(loop, len(arrays), arrays[0].dtype.type)
        if together is not None:
            together(arrays, plain, threads)
            return

        def one(part: slice) -> None:
            loop(*(x[part] for x in arrays), part.start, *plain)

        over_chunks(pairs, torch.device("cpu"), one, max(_SHARE, -(-pairs // threads)))

    def _move_buffered(self, weight: Tensor, out: Tensor, numbers: Numbers) -> None:
        pairs = weight.numel() // 2

        def one(part: slice) -> None:
            there = slice(pairs + part.start, pairs + part.stop)
            halves = weight[part], weight[there], out[part], out[there]
            self._buffered(*halves, part.start, numbers)

        over_chunks(pairs, weight.device, one, _BUFFER)
        if weight.numel() % 2:
            last = slice(2 * pairs, None)
            self._odd(weight[last], out[last], pairs, numbers)

    def _odd(self, weight: Tensor, out: Tensor, pairs: int, numbers: Numbers) -> None:
        """Move the last entry of an odd tensor, which is the first of a pair of its own."""
        self._buffered(weight, weight, out, out, pairs, numbers)

    def _buffered(
        self,
        first: Tensor,
        second: Tensor,
        out_first: Tensor,
        out_second: Tensor,
        start: int,
        numbers: Numbers,
    ) -> None:
        """Move a chunk by way of float32."""
        rule, decay = self.rule, numbers.decay is not None
        rounding, plain = self._last(numbers, out_first.dtype)
        more = len(numbers.keys) > 1
        moved = torch.empty(2, first.numel())
        halves = moved.numpy()
        for q, (key, a) in enumerate(self._earlier(numbers)):
            self._kernels.direction(rule.noise, q > 0)(*halves, start, key, a)
        loop = self._kernels.whole(rule.mask, rule.noise, rounding, more, decay)
        loop(first.float().numpy(), second.float().numpy(), *halves, start, *plain)
        out_second.copy_(moved[1])
        out_first.copy_(moved[0])

    def move_at(self, weight: Tensor, index: Tensor, numel: int, draw: Draw | Numbers) -> Tensor:
        """See :func:`move_at`."""
        numbers, rule = Numbers.of(draw), self.rule
        rounding, plain = self._last(numbers, weight.dtype)
        more, decay = len(numbers.keys) > 1, numbers.decay is not None
        loop = self._kernels.picked(rule.mask, rule.noise, rounding, more, decay)
        w, place = weight.detach().reshape(-1), index.reshape(-1).numpy()
        out = torch.empty_like(w)

        def one(part: slice) -> None:
            moved = torch.empty(part.stop - part.start)
            there = moved.numpy(), place[part], numel
            for q, (key, a) in enumerate(self._earlier(numbers)):
                self._kernels.picked_direction(rule.noise, q > 0)(*there, key, a)
            loop(w[part].float().numpy(), *there, *plain)
            out[part] = moved

        over_chunks(w.numel(), w.device, one, _BUFFER)
        return out.view(weight.shape)

    @staticmethod
    def _earlier(numbers: Numbers) -> list[tuple[tuple[int, int], float]]:
        """Return the keys and coefficients of the queries before the last one."""
        return list(zip(numbers.keys[:-1], numbers.coefficients[:-1], strict=True))

    def _last(
        self, numbers: Numbers, dtype: torch.dtype
    ) -> tuple[torch.dtype | None, tuple[Any, ...]]:
        """Return the rounding, and the last query with all else that a loop reads."""
        d = 0.0 if numbers.decay is None else numbers.decay
        rounding = dtype if self.rule.stochastic and dtype in ROUNDINGS else None
        keys = numbers.keys[-1], numbers.coefficients[-1], numbers.mask_key, numbers.round_key
        return rounding, (*keys, numbers.h, d)


def _negated(numbers: Numbers) -> Numbers:
    return numbers._replace(coefficients=tuple(-a for a in numbers.coefficients))


class _Arrays:
    """Hold the two halves of a flat CPU tensor as NumPy sees them; made once a tensor object."""

    __slots__ = ("address", "dtype", "halves", "is_pattern", "is_read", "numel")

    def __init__(self, flat: Tensor) -> None:
        flat = flat.detach()
        self.address, self.numel, self.dtype = flat.data_ptr(), flat.numel(), flat.dtype
        self.is_pattern = self.dtype == torch.bfloat16
        self.is_read = self.is_pattern or self.dtype == torch.float32
        array = flat.view(torch.int16).numpy() if self.is_pattern else flat.numpy()
        pairs = self.numel // 2
        self.halves = array[:pairs], array[pairs : 2 * pairs]

    @classmethod
    def of(cls, flat: Tensor) -> "_Arrays":
        made: _Arrays | None = flat.__dict__.get("_smezo_arrays")
        now = flat.data_ptr(), flat.numel(), flat.dtype
        if made is None or (made.address, made.numel, made.dtype) != now:
            made = flat.__dict__["_smezo_arrays"] = cls(flat)
        return made
