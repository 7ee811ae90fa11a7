"""One pass over a tensor: draw, mask, move. The same function serves the probe and the update.

    moved = where(mask(w), w + sum_q a_q z_q - d w, w)

computed in float32, rounded to the output's dtype. A probe has one query, a = +-eps and d = 0; an
update has a_q = -lr * projected_grad_q / q and d = lr * weight_decay. On a CPU Numba compiles the
function to one loop, elsewhere ``torch.compile`` fuses it; without either it runs in chunks that
fit the cache. All give the same bits.
"""

import functools
import itertools
import os
import types
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from smezo_cli import dynamo, noise
from smezo_cli.elementwise import as_f32, as_i32, f32, floor, i32, where
from smezo_cli.masks import RULES

# Counters per eager chunk: on a CPU the temporaries stay in the second-level cache (and below the
# size at which torch splits an operation over threads); a GPU wants few launches.
_CHUNK = {"cpu": 1 << 15}
_CHUNK_ACCELERATOR = 1 << 22
_numbers = itertools.count()  # of what was compiled


# Pairs per thread below which another thread costs more than it saves.
_SHARE = 1 << 16
# Pairs per chunk where Numba's loop reads or writes by way of float32 buffers: few enough for the
# second-level cache, enough for the 10 us of a call.
_BUFFER = 1 << 15


class NoCompiler(RuntimeError):
    """Fused passes were asked for and cannot be had."""


@dataclass(frozen=True)
class Rule:
    """What is fixed for a whole run (and compiled in)."""

    mask: str = "small"  # a key of masks.RULES
    noise: str = "gaussian"  # one of noise.KINDS
    stochastic: bool = False  # stochastic rounding to the output's dtype


class Draw(NamedTuple):
    """What one pass over one tensor needs.

    Attributes:
        keys: int64 (q, 2), one stream a query.
        mask_key: int64 (2,), read by the random mask only.
        round_key: int64 (2,), read by stochastic rounding only.
        h: float32 (), the mask's threshold.
        coefficients: float32 (q,), a_q.
        decay: float32 (), d; None leaves the term out.
    """

    keys: Tensor
    mask_key: Tensor
    round_key: Tensor
    h: Tensor
    coefficients: Tensor
    decay: Tensor | None = None


class Numbers(NamedTuple):
    """A :class:`Draw` as plain numbers, which cost less where they are not sent to a device."""

    keys: tuple[tuple[int, int], ...]
    mask_key: tuple[int, int]
    round_key: tuple[int, int]
    h: float
    coefficients: tuple[float, ...]
    decay: float | None = None

    @classmethod
    def of(cls, draw: "Draw | Numbers") -> "Numbers":
        """The same draw."""
        if isinstance(draw, Numbers):
            return draw
        return cls(
            tuple((a, b) for a, b in draw.keys.tolist()),
            tuple(draw.mask_key.tolist()),
            tuple(draw.round_key.tolist()),
            draw.h.item(),
            tuple(draw.coefficients.tolist()),
            None if draw.decay is None else draw.decay.item(),
        )


def as_draws(numbers: Sequence[Numbers], devices: Sequence[torch.device]) -> list[Draw]:
    """Draws on their devices, of one step: they share coefficients and decay.

    Few tensors are sent, whose parts they are.
    """
    keys = torch.tensor([[*n.keys, n.mask_key, n.round_key] for n in numbers])  # (n, q + 2, 2)
    h = torch.tensor([n.h for n in numbers], dtype=torch.float32)
    a = torch.tensor(numbers[0].coefficients, dtype=torch.float64).to(torch.float32)
    decay = numbers[0].decay
    d = None if decay is None else torch.tensor(decay, dtype=torch.float64).to(torch.float32)
    sent = {
        device: (keys.to(device), h.to(device), a.to(device), None if d is None else d.to(device))
        for device in set(devices)
    }
    draws = []
    for i, device in enumerate(devices):
        k, hs, coefficients, decays = sent[device]
        draws.append(Draw(k[i, :-2], k[i, -2], k[i, -1], hs[i], coefficients, decays))
    return draws


def _round_to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """One of the two neighbours in bfloat16, by chance and without bias; still float32."""
    return as_f32((as_i32(value) + (bits & 0xFFFF)) & -0x10000)


def _round_to_float16(value: Tensor, bits: Tensor) -> Tensor:
    """As above, for float16."""
    normal = as_f32((as_i32(value) + (bits & 0x1FFF)) & -0x2000)
    # Below 2**-14 float16 has a fixed grid of 2**-24.
    # Fourteen bits of chance beside the ten of a subnormal: the sum is exact in float32.
    chance = f32(i32(bits >> 17)) * f32(2.0**-14)
    grid = floor(value * f32(2.0**24) + chance) * f32(2.0**-24)
    return where(abs(value) < f32(2.0**-14), grid, normal)


#: Stochastic rounding of a float32 by 31 random bits (int32), by the dtype that then holds it.
ROUNDINGS = {torch.bfloat16: _round_to_bfloat16, torch.float16: _round_to_float16}


def _blend(
    weight: Tensor,
    direction: Tensor,
    mask: Tensor,
    bits: Tensor | None,
    draw: Draw,
    dtype: torch.dtype,
) -> Tensor:
    w = weight.to(torch.float32)
    if draw.decay is not None:
        direction = direction - draw.decay * w
    value = w + direction
    if bits is not None and dtype in ROUNDINGS:
        value = ROUNDINGS[dtype](value, bits)
    # where, not + mask * x: an unmasked weight keeps its bits, -0.0 included.
    return torch.where(mask, value.to(dtype), weight.to(dtype))


def _directions(counter: Tensor, rule: Rule, draw: Draw) -> tuple[Tensor, Tensor]:
    """sum_q a_q z_q for both elements of each pair."""
    first, second = noise.pair(counter, draw.keys[0], rule.noise)
    first, second = first * draw.coefficients[0], second * draw.coefficients[0]
    for q in range(1, draw.keys.shape[0]):
        z_first, z_second = noise.pair(counter, draw.keys[q], rule.noise)
        first = first + z_first * draw.coefficients[q]
        second = second + z_second * draw.coefficients[q]
    return first, second


def _masks(
    first: Tensor, second: Tensor, counter: Tensor, rule: Rule, draw: Draw
) -> tuple[Tensor, Tensor]:
    """True where perturbed, for both elements of each pair."""
    is_active = RULES[rule.mask]
    if rule.mask == "random":
        u_first, u_second = noise.uniform_pair(counter, draw.mask_key)
        return is_active(u_first, draw.h), is_active(u_second, draw.h)
    magnitudes = first.to(torch.float32).abs(), second.to(torch.float32).abs()
    return is_active(magnitudes[0], draw.h), is_active(magnitudes[1], draw.h)


def _round_bits(counter: Tensor, rule: Rule, draw: Draw) -> tuple[Tensor | None, Tensor | None]:
    """31 random bits for both elements of each pair, where rounding is stochastic."""
    if not rule.stochastic:
        return None, None
    return noise.rounding_pair(counter, draw.round_key)


def move_pairs(
    first: Tensor,
    second: Tensor,
    out_first: Tensor,
    out_second: Tensor,
    counter: Tensor,
    rule: Rule,
    draw: Draw,
) -> None:
    """The pass over pairs (i, i + pairs), written to the out tensors (which may be the inputs)."""
    directions = _directions(counter, rule, draw)
    active = _masks(first, second, counter, rule, draw)
    bits = _round_bits(counter, rule, draw)
    dtype = out_first.dtype
    moved = _blend(first, directions[0], active[0], bits[0], draw, dtype)
    out_second.copy_(_blend(second, directions[1], active[1], bits[1], draw, dtype))
    out_first.copy_(moved)


def move_pairs_both(
    first: Tensor,
    second: Tensor,
    plus: tuple[Tensor, Tensor],
    minus: tuple[Tensor, Tensor],
    counter: Tensor,
    rule: Rule,
    draw: Draw,
) -> None:
    """As :func:`move_pairs` for the draw and for the one with its coefficients negated.

    Negation is exact, so that these are the bits of two passes; rounds to nearest.
    """
    there = _directions(counter, rule, draw)
    active = _masks(first, second, counter, rule, draw)
    for (out_first, out_second), (a, b) in ((plus, there), (minus, (-there[0], -there[1]))):
        out_second.copy_(_blend(second, b, active[1], None, draw, out_second.dtype))
        out_first.copy_(_blend(first, a, active[0], None, draw, out_first.dtype))


def move_at(weight: Tensor, index: Tensor, numel: int | Tensor, rule: Rule, draw: Draw) -> Tensor:
    """The pass over entries picked by flat index: equal to the same entries of the whole pass.

    Args:
        weight: the picked entries, any shape.
        index: int64, their flat indices in the whole tensor, the same shape.
        numel: entries of the whole tensor.
        rule: what is fixed for the run.
        draw: what this pass needs.

    Returns:
        The moved entries in the weight's dtype and shape.
    """
    counter, is_first = noise.locate(index, numel)
    directions = _directions(counter, rule, draw)
    active = _masks(weight, weight, counter, rule, draw)
    bits = _round_bits(counter, rule, draw)
    own_bits = None
    if bits[0] is not None and bits[1] is not None:
        own_bits = torch.where(is_first, bits[0], bits[1])
    direction = torch.where(is_first, directions[0], directions[1])
    mask = torch.where(is_first, active[0], active[1])
    return _blend(weight, direction, mask, own_bits, draw, weight.dtype)


class EagerPasses:
    """The passes in plain torch, chunk by chunk."""

    name = "eager"

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        """Write the moved ``weight`` to ``out`` (both flat, equally long; may be the same)."""

        def one(first: slice, second: slice, counter: Tensor) -> None:
            move_pairs(
                weight[first], weight[second], out[first], out[second], counter, self.rule, draw
            )

        _over_pairs(weight, one)

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw) -> None:
        """Write the weight moved by the draw and by its negative, from one draw (no decay)."""

        def one(first: slice, second: slice, counter: Tensor) -> None:
            outs = (plus[first], plus[second]), (minus[first], minus[second])
            move_pairs_both(weight[first], weight[second], *outs, counter, self.rule, draw)

        _over_pairs(weight, one)

    def move_at(self, weight: Tensor, index: Tensor, numel: int, draw: Draw) -> Tensor:
        """See :func:`move_at`."""
        return move_at(weight, index, numel, self.rule, draw)

    def noise_and_mask(self, weight: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """z of the first query (float32) and the mask (bool), as long as the flat weight."""
        z = torch.empty_like(weight, dtype=torch.float32)
        mask = torch.empty_like(weight, dtype=torch.bool)

        def one(first: slice, second: slice, counter: Tensor) -> None:
            z[second], last = noise.pair(counter, draw.keys[0], self.rule.noise)[::-1]
            z[first] = last
            active = _masks(weight[first], weight[second], counter, self.rule, draw)
            mask[second], mask[first] = active[1], active[0]

        _over_pairs(weight, one)
        return z, mask

    def mask_of(self, weight: Tensor, draw: Draw) -> Tensor:
        """The mask (bool) of a flat weight."""
        mask = torch.empty_like(weight, dtype=torch.bool)

        def one(first: slice, second: slice, counter: Tensor) -> None:
            active = _masks(weight[first], weight[second], counter, self.rule, draw)
            mask[second], mask[first] = active[1], active[0]

        _over_pairs(weight, one)
        return mask

    def along(self, weight: Tensor, draw: Draw, use: "Use") -> None:
        """Call ``use`` for the parts of a flat tensor, each with its sum_q a_q z_q.

        Parts are disjoint, come in any order and in several threads, and fit the cache, so that an
        update that is more than a sum needs no memory of the tensor's size.
        """

        def one(first: slice, second: slice, counter: Tensor) -> None:
            directions = _directions(counter, self.rule, draw)
            bits = _round_bits(counter, self.rule, draw)
            use(first, directions[0], bits[0])
            if second != first:  # an odd last entry is both
                use(second, directions[1], bits[1])

        _over_pairs(weight, one)

    def move_kept(self, weight: Tensor, out: Tensor, z: Tensor, mask: Tensor, draw: Draw) -> None:
        """As :meth:`move`, from a kept z (one query, round to nearest)."""

        def one(part: slice) -> None:
            direction = z[part] * draw.coefficients[0]
            out[part] = _blend(weight[part], direction, mask[part], None, draw, out.dtype)

        _over_chunks(weight.numel(), weight.device, one)

    @staticmethod
    def along_kept(z: Tensor, draw: Draw, use: "Use") -> None:
        """As :meth:`along`, from a kept z (one query, round to nearest)."""

        def one(part: slice) -> None:
            use(part, z[part] * draw.coefficients[0], None)

        _over_chunks(z.numel(), z.device, one)


def _over_chunks(
    length: int, device: torch.device, one: Callable[[slice], None], chunk: int | None = None
) -> None:
    """Call ``one`` for slices of [0, length), on a CPU in as many threads as torch has.

    Chunks are too small for torch's own threads, and its operators release the interpreter.
    """
    chunk = chunk or _CHUNK.get(device.type, _CHUNK_ACCELERATOR)
    parts = [slice(i, min(i + chunk, length)) for i in range(0, length, chunk)]
    threads = min(torch.get_num_threads(), len(parts)) if device.type == "cpu" else 1

    def share(k: int) -> None:
        with torch.no_grad():  # the flag is a thread's own
            for part in parts[k::threads]:
                one(part)

    if threads > 1:
        others = [_pool(threads - 1).submit(share, k) for k in range(1, threads)]
        share(0)
        for other in others:
            other.result()
    else:
        for part in parts:
            one(part)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="smezo")


def _over_pairs(weight: Tensor, one: Callable[[slice, slice, Tensor], None]) -> None:
    """Call ``one(first, second, counter)`` for chunks of pairs.

    An odd last entry comes as both the first and the second of its pair: write ``second`` first.
    """
    pairs, device = weight.numel() // 2, weight.device

    def whole(part: slice) -> None:
        counter = torch.arange(part.start, part.stop, dtype=torch.int64, device=device)
        one(part, slice(pairs + part.start, pairs + part.stop), counter)

    _over_chunks(pairs, device, whole)
    if weight.numel() % 2:
        last = slice(2 * pairs, 2 * pairs + 1)
        one(last, last, torch.tensor([pairs], dtype=torch.int64, device=device))


class CompiledPasses:
    """The same passes, each one fused loop (C++ on a CPU, Triton on a GPU)."""

    name = "compiled"

    def __init__(self, rule: Rule) -> None:
        # Triton contracts a * b + c by default, which eager code does not.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
        self.rule = rule
        self._eager = EagerPasses(rule)

        def whole(a: Tensor, b: Tensor, out_a: Tensor, out_b: Tensor, *draw: Tensor | None) -> None:
            counter = torch.arange(a.shape[0], dtype=torch.int64, device=a.device)
            move_pairs(a, b, out_a, out_b, counter, rule, Draw(*draw))  # type: ignore[arg-type]  # spread

        def both(a: Tensor, b: Tensor, *rest: Tensor | None) -> None:
            counter = torch.arange(a.shape[0], dtype=torch.int64, device=a.device)
            p, p_, m, m_, *draw = rest
            plus, minus = (p, p_), (m, m_)
            move_pairs_both(a, b, plus, minus, counter, rule, Draw(*draw))  # type: ignore[arg-type]  # spread

        def picked(weight: Tensor, index: Tensor, numel: Tensor, *draw: Tensor | None) -> Tensor:
            return move_at(weight, index, numel, rule, Draw(*draw))  # type: ignore[arg-type]  # spread

        self._whole = _compile(whole)  # type: ignore[arg-type]  # a closure is a FunctionType
        self._both = _compile(both)  # type: ignore[arg-type]  # likewise
        self._picked = _compile(picked)  # type: ignore[arg-type]  # likewise

        def directions(counter: Tensor, *draw: Tensor | None) -> Tensor:
            return torch.stack(_directions(counter, rule, Draw(*draw)))  # type: ignore[arg-type]  # spread

        self._directions = _compile(directions)  # type: ignore[arg-type]  # likewise

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move`."""
        pairs = weight.numel() // 2
        if pairs < 64:  # too short for a loop of its own shape
            self._eager.move(weight, out, draw)
            return
        self._whole(*_halves(weight, pairs), *_halves(out, pairs), *draw)
        if weight.numel() % 2:
            last, counter = slice(2 * pairs, None), torch.tensor([pairs], device=weight.device)
            move_pairs(weight[last], weight[last], out[last], out[last], counter, self.rule, draw)

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move_both`."""
        pairs = weight.numel() // 2
        if pairs < 64:
            self._eager.move_both(weight, plus, minus, draw)
            return
        self._both(*(half for x in (weight, plus, minus) for half in _halves(x, pairs)), *draw)
        if weight.numel() % 2:
            last, counter = slice(2 * pairs, None), torch.tensor([pairs], device=weight.device)
            outs = (plus[last], plus[last]), (minus[last], minus[last])
            move_pairs_both(weight[last], weight[last], *outs, counter, self.rule, draw)

    def along(self, weight: Tensor, draw: Draw, use: "Use") -> None:
        """See :meth:`EagerPasses.along`."""
        pairs = weight.numel() // 2
        if pairs < 64:
            self._eager.along(weight, draw, use)
            return

        def one(part: slice) -> None:
            counter = torch.arange(part.start, part.stop, device=weight.device)
            first, second = self._directions(counter, *draw)
            bits = _round_bits(counter, self.rule, draw)
            use(part, first, bits[0])
            use(slice(pairs + part.start, pairs + part.stop), second, bits[1])

        _over_chunks(pairs, weight.device, one)
        if weight.numel() % 2:
            counter = torch.tensor([pairs], device=weight.device)
            bits = _round_bits(counter, self.rule, draw)
            use(slice(2 * pairs, None), _directions(counter, self.rule, draw)[0], bits[0])

    def move_at(self, weight: Tensor, index: Tensor, numel: int, draw: Draw) -> Tensor:
        """See :func:`move_at`."""
        if weight.numel() < 128:
            return move_at(weight, index, numel, self.rule, draw)
        size = torch.tensor(numel, dtype=torch.int64, device=weight.device)
        moved: Tensor = self._picked(weight.reshape(-1), index.reshape(-1), size, *draw)
        return moved.view(weight.shape)


class NumbaPasses:
    """The same passes, each one loop of machine code; weights on a CPU.

    Loops read and write float32, and of bfloat16 the patterns; what else there is (float16, several
    queries, an output of another dtype) goes through float32 buffers.
    """

    name = "numba"

    def __init__(self, rule: Rule) -> None:
        from smezo_cli import kernels  # imports Numba, which takes a second

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

    def along(self, weight: Tensor, draw: Draw | Numbers, use: "Use") -> None:
        """See :meth:`EagerPasses.along`."""
        numbers = Numbers.of(draw)
        pairs, odd = weight.numel() // 2, weight.numel() % 2
        queries = list(zip(numbers.keys, numbers.coefficients, strict=True))

        def one(part: slice) -> None:
            both = torch.empty(2, part.stop - part.start)
            halves = both.numpy()
            for q, (key, a) in enumerate(queries):
                self._kernels.direction(self.rule.noise, q > 0)(*halves, part.start, key, a)
            bits: tuple[Tensor | None, Tensor | None] = None, None
            if self.rule.stochastic:
                counter = torch.arange(part.start, part.stop)
                bits = noise.rounding_pair(counter, torch.tensor(numbers.round_key))
            use(part if part.start < pairs else slice(2 * pairs, None), both[0], bits[0])
            if part.start < pairs:
                use(slice(pairs + part.start, pairs + part.stop), both[1], bits[1])

        _over_chunks(pairs, weight.device, one, _BUFFER)
        if odd:  # the last entry is the first of a pair of its own
            one(slice(pairs, pairs + 1))

    def _run(self, loop: Callable[..., None], arrays: tuple[Any, ...], plain: Any) -> None:
        """The loop over the halves of arrays, in threads where that pays."""
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

        _over_chunks(pairs, torch.device("cpu"), one, max(_SHARE, -(-pairs // threads)))

    def _move_buffered(self, weight: Tensor, out: Tensor, numbers: Numbers) -> None:
        pairs = weight.numel() // 2

        def one(part: slice) -> None:
            there = slice(pairs + part.start, pairs + part.stop)
            halves = weight[part], weight[there], out[part], out[there]
            self._buffered(*halves, part.start, numbers)

        _over_chunks(pairs, weight.device, one, _BUFFER)
        if weight.numel() % 2:
            last = slice(2 * pairs, None)
            self._odd(weight[last], out[last], pairs, numbers)

    def _odd(self, weight: Tensor, out: Tensor, pairs: int, numbers: Numbers) -> None:
        """The last entry of an odd tensor is the first of a pair of its own."""
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
        """A chunk by way of float32."""
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

        _over_chunks(w.numel(), w.device, one, _BUFFER)
        return out.view(weight.shape)

    @staticmethod
    def _earlier(numbers: Numbers) -> list[tuple[tuple[int, int], float]]:
        """Keys and coefficients of the queries before the last one."""
        return list(zip(numbers.keys[:-1], numbers.coefficients[:-1], strict=True))

    def _last(
        self, numbers: Numbers, dtype: torch.dtype
    ) -> tuple[torch.dtype | None, tuple[Any, ...]]:
        """The rounding, and the last query with all else that a loop reads."""
        d = 0.0 if numbers.decay is None else numbers.decay
        rounding = dtype if self.rule.stochastic and dtype in ROUNDINGS else None
        keys = numbers.keys[-1], numbers.coefficients[-1], numbers.mask_key, numbers.round_key
        return rounding, (*keys, numbers.h, d)


def _negated(numbers: Numbers) -> Numbers:
    return numbers._replace(coefficients=tuple(-a for a in numbers.coefficients))


class _Arrays:
    """The two halves of a flat CPU tensor as NumPy sees them; made once a tensor object."""

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


Passes = EagerPasses | CompiledPasses | NumbaPasses
#: Takes a part of a flat tensor, sum_q a_q z_q there (float32), and what rounds it by chance.
Use = Callable[[slice, Tensor, Tensor | None], None]


def _halves(flat: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Two views that the compiler takes for separate storages, so that both may be written."""
    flat = flat.detach()
    with torch.cuda.device_of(flat):  # type: ignore[no-untyped-call]  # a no-op on a CPU
        return from_dlpack(flat[:pairs]), from_dlpack(flat[pairs : 2 * pairs])


def _compile(function: types.FunctionType) -> Callable[..., Tensor]:
    """``torch.compile`` for each device that the first argument comes from."""
    made: dict[torch.device, Callable[..., Tensor]] = {}

    def compiled(*tensors: Tensor | None) -> Tensor:
        assert tensors[0] is not None
        device = tensors[0].device
        with dynamo.allowed():
            if device not in made:
                made[device] = _compile_alone(function)
            return made[device](*tensors)

    return compiled


def _compile_alone(function: types.FunctionType) -> Callable[..., Tensor]:
    """``torch.compile`` under a code object of its own: recompilations are limited per object."""
    own = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    compiled: Callable[..., Tensor] = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled


def _switches() -> str:
    """Say which settings of the compilers are in the environment: one may be why they fail."""
    prefixes = ("NUMBA_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_")
    # The folder of what is compiled is torch's own to set, and turns nothing off.
    names = sorted(
        name for name in os.environ if name.startswith(prefixes) and not name.endswith("_CACHE_DIR")
    )
    return f" (set in the environment: {', '.join(names)})" if names else ""


def choose_passes(rule: Rule, backend: str, device: torch.device) -> tuple[Passes, str]:
    """Fused passes where they work (Numba's on a CPU, torch.compile's elsewhere), else eager ones.

    Args:
        rule: what is fixed for the run.
        backend: "auto", "compiled" or "eager".
        device: where the weights lie.

    Returns:
        The passes, and why they are eager ("" when that was asked for or they are fused).

    Raises:
        NoCompiler: "compiled" was asked for and does not work here.
    """
    if backend == "eager":
        return EagerPasses(rule), ""
    kind: type[Passes] = CompiledPasses
    missing = "no working compiler (g++ and Python's headers are needed)"
    switches: tuple[str, ...] = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
    if device.type == "cpu":
        kind, missing, switches = NumbaPasses, "Numba does not work here", ("NUMBA_DISABLE_JIT",)
    off = [name for name in switches if os.environ.get(name, "0") not in ("", "0")]
    if off:
        why = f"the compiler is off as long as {off[0]}={os.environ[off[0]]} is set"
        if backend == "compiled":
            raise NoCompiler(why)
        return EagerPasses(rule), why
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            passes = kind(rule)
            sample = torch.ones(257, device=device)
            key = torch.zeros(2, dtype=torch.int64, device=device)
            scalar = torch.zeros((), device=device)
            draw = Draw(key[None], key, key, scalar, scalar[None])
            passes.move(sample, torch.empty_like(sample), draw)
    except Exception as error:  # whatever a missing or broken tool chain raises
        why = f"{missing}: {_first_line(error)}{_switches()}"
        if backend == "compiled":
            raise NoCompiler(why) from error
        return EagerPasses(rule), why
    return passes, ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
