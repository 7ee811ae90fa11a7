"""Compile the passes by Numba: loops over float32 arrays in the cache, one thread each.

The arithmetic is that of :mod:`smezo_cli.zo.noise`, :mod:`smezo_cli.zo.selections.masks` and the
rounding of :mod:`smezo_cli.zo.passes.choose`, compiled from the same source; here are only the
loops around it. Importing this module imports Numba, which takes a second.

Without fast-math, LLVM neither contracts nor reorders: the bits are those of eager torch.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]  # carray is public all the same
from numba.core import cgutils
from numba.extending import intrinsic, overload

from smezo_cli.zo import elementwise, noise
from smezo_cli.zo import rounding as rounding_module
from smezo_cli.zo.passes import openmp
from smezo_cli.zo.selections import masks

Function = Callable[..., Any]
Rounding = torch.dtype | None  # a key of passes.ROUNDINGS; None leaves float32 results as they are

# Python calls the loops, and compiled code the rest: ways into each function for Python, for
# compiled code and for C would take 40% of the time in which all is compiled.
_NOT_BY_C: Any = {"no_cfunc_wrapper": True}
_WITHIN: Any = _NOT_BY_C | {"no_cpython_wrapper": True}
compiled = njit(nogil=True, **_NOT_BY_C)
within, inlined = njit(**_WITHIN), njit(forceinline=True, **_WITHIN)

_SHARED: tuple[Function, ...] = (
    noise._shift_right,
    noise._horner,
    noise._radius,
    noise.hash64,
    noise.locate,
    noise.uniform_pair,
    noise.rounding_pair,
    noise.uniform_at,
    noise.rounding_at,
    *noise.PAIRS.values(),
    *masks.RULES.values(),
    *rounding_module.ROUNDINGS.values(),
    rounding_module.to_levels,
)
# What is compiled where a function is called: the function itself, or what the names of
# elementwise.py mean for single numbers.
_COMPILED: dict[Function, Function] = {f: f for f in _SHARED} | {
    elementwise.f32: lambda x: np.float32(x),
    elementwise.i32: lambda x: np.int32(x),
    elementwise.as_i32: lambda x: np.float32(x).view(np.int32),
    elementwise.as_f32: lambda x: np.int32(x).view(np.float32),
    elementwise.at_least: lambda x, low: low if x < low else x,
    elementwise.floor: lambda x: np.floor(x),
    elementwise.where: lambda condition, yes, no: yes if condition else no,
}


def _let(function: Function, scalar: Function) -> None:
    @overload(function, strict=False, jit_options={"forceinline": True} | _NOT_BY_C)
    def choose(*types: Any) -> Function:
        return scalar


for _function, _scalar in _COMPILED.items():
    _let(_function, _scalar)


def _step(kind: str, added: bool) -> Function:
    """Return (counter, key, a, before, before') -> a z of both elements, added to that before."""
    pair, hash64, f32 = noise.PAIRS[kind], noise.hash64, elementwise.f32

    @inlined
    def alone(counter, key, a, before_first, before_second):
        first, second = pair(hash64(counter, key))
        return first * f32(a), second * f32(a)

    @inlined
    def sum_of_both(counter, key, a, before_first, before_second):
        first, second = alone(counter, key, a, before_first, before_second)
        return before_first + first, before_second + second

    return sum_of_both if added else alone


def _mask(name: str) -> Function:
    """Return (w, w', counter, key, h) -> is each perturbed."""
    is_active, uniform_pair, f32 = masks.RULES[name], noise.uniform_pair, elementwise.f32
    if name == "random":

        @inlined
        def by_draw(first, second, counter, key, h):
            u_first, u_second = uniform_pair(counter, key)
            return is_active(u_first, f32(h)), is_active(u_second, f32(h))

        return by_draw

    @inlined
    def by_size(first, second, counter, key, h):
        return is_active(abs(first), f32(h)), is_active(abs(second), f32(h))

    return by_size


def _finish(mask: str, rounding: Rounding, decay: bool) -> Function:
    """Return (w, w', steps, counter, mask_key, round_key, h, d) -> both elements, moved."""
    masks_of, f32, where = _mask(mask), elementwise.f32, elementwise.where
    rounding_pair = noise.rounding_pair
    if decay:

        @inlined
        def add(w, step, d):
            return w + (step - f32(d) * w)

    else:

        @inlined
        def add(w, step, d):
            return w + step

    if rounding is None:

        @inlined
        def to_nearest(first, second, steps, counter, mask_key, round_key, h, d):
            active = masks_of(first, second, counter, mask_key, h)
            return (
                where(active[0], add(first, steps[0], d), first),
                where(active[1], add(second, steps[1], d), second),
            )

        return to_nearest
    rounded = rounding_module.ROUNDINGS[rounding]

    @inlined
    def by_chance(first, second, steps, counter, mask_key, round_key, h, d):
        active = masks_of(first, second, counter, mask_key, h)
        bits = rounding_pair(counter, round_key)
        return (
            where(active[0], rounded(add(first, steps[0], d), bits[0]), first),
            where(active[1], rounded(add(second, steps[1], d), bits[1]), second),
        )

    return by_chance


@inlined
def wide(pattern):
    """Return the float32 of a bfloat16's pattern (int16)."""
    return np.int32(np.int32(pattern) << np.int32(16)).view(np.float32)


@inlined
def narrow(value):
    """Return the pattern (int16) of the nearest bfloat16, ties to even; NaN stays NaN."""
    pattern = np.float32(value).view(np.int32)
    odd = (pattern >> np.int32(16)) & np.int32(1)
    rounded = np.int32(pattern + odd + np.int32(0x7FFF)) >> np.int32(16)
    return np.int16(rounded if value == value else (pattern >> np.int32(16)) | np.int32(0x40))


@inlined
def as_is(value):
    """Return the float32 that it is."""
    return value


@functools.cache
def whole(
    mask: str, kind: str, rounding: Rounding, more: bool, decay: bool, patterns: bool = False
) -> Function:
    """Return the loop over pairs.

    Args:
        mask: a key of ``masks.RULES``.
        kind: a key of ``noise.PAIRS``.
        rounding: how results are rounded before they are cast.
        more: the outputs hold a direction already (of :func:`direction`), which is added.
        decay: whether there is weight decay.
        patterns: the arrays hold the patterns of bfloat16 as int16, not float32; not with ``more``.

    Returns:
        A function of arrays first, second, out_first, out_second, all (n,), the counter of the
        first pair, and plain numbers: one query's key and coefficient, the other fields of a
        :class:`smezo_cli.zo.passes.draw.Draw`.
    """
    step, finish = _step(kind, more), _finish(mask, rounding, decay)
    load, store = (wide, narrow) if patterns else (as_is, as_is)

    @compiled
    def loop(first, second, out_first, out_second, start, key, a, mask_key, round_key, h, d):
        for i in range(first.shape[0]):
            steps = step(start + i, key, a, out_first[i], out_second[i])
            w, v = load(first[i]), load(second[i])
            moved = finish(w, v, steps, start + i, mask_key, round_key, h, d)
            out_second[i] = store(moved[1])
            out_first[i] = store(moved[0])

    return loop


@functools.cache
def in_place(
    mask: str, kind: str, rounding: Rounding, decay: bool, patterns: bool = False
) -> Function:
    """Do as :func:`whole` of one query, but first and second are moved where they are.

    Of arrays that are both read and written the compiler must know that they are the same, else it
    finds that they overlap and takes one element after the other.
    """
    step, finish = _step(kind, False), _finish(mask, rounding, decay)
    load, store = (wide, narrow) if patterns else (as_is, as_is)

    @compiled
    def loop(first, second, start, key, a, mask_key, round_key, h, d):
        for i in range(first.shape[0]):
            steps = step(start + i, key, a, 0, 0)
            w, v = load(first[i]), load(second[i])
            moved = finish(w, v, steps, start + i, mask_key, round_key, h, d)
            second[i] = store(moved[1])
            first[i] = store(moved[0])

    return loop


@functools.cache
def both(mask: str, kind: str, patterns: bool = False) -> Function:
    """Do as :func:`whole` of one query without decay, for coefficients a and -a from one draw.

    Returns:
        A function of arrays first, second, plus_first, plus_second, minus_first, minus_second,
        then as of :func:`whole`.
    """
    step, finish = _step(kind, False), _finish(mask, None, False)
    load, store = (wide, narrow) if patterns else (as_is, as_is)

    @compiled
    def loop(first, second, p, p_, m, m_, start, key, a, mask_key, round_key, h, d):
        for i in range(first.shape[0]):
            there = step(start + i, key, a, 0, 0)
            back = -there[0], -there[1]
            w, v = load(first[i]), load(second[i])
            plus = finish(w, v, there, start + i, mask_key, round_key, h, d)
            minus = finish(w, v, back, start + i, mask_key, round_key, h, d)
            p[i], p_[i] = store(plus[0]), store(plus[1])
            m[i], m_[i] = store(minus[0]), store(minus[1])

    return loop


@functools.cache
def picked(mask: str, kind: str, rounding: Rounding, more: bool, decay: bool) -> Function:
    """Return the loop over entries picked by index; arguments as for :func:`whole`.

    Returns:
        A function of float32 weight and out, int64 index, all (n,), the entries of the whole
        tensor, and numbers as of :func:`whole`.
    """
    step, finish, locate = _step(kind, more), _finish(mask, rounding, decay), noise.locate

    @compiled
    def loop(weight, out, index, numel, key, a, mask_key, round_key, h, d):
        for i in range(weight.shape[0]):
            w, before = weight[i], out[i]
            counter, is_first = locate(index[i], numel)
            steps = step(counter, key, a, before, before)
            moved = finish(w, w, steps, counter, mask_key, round_key, h, d)
            out[i] = moved[0] if is_first else moved[1]

    return loop


@functools.cache
def direction(kind: str, more: bool) -> Function:
    """Return (out_first, out_second, first counter, key, a): a z, written or added to them."""
    step = _step(kind, more)

    @compiled
    def loop(out_first, out_second, start, key, a):
        for i in range(out_first.shape[0]):
            steps = step(start + i, key, a, out_first[i], out_second[i])
            out_second[i] = steps[1]
            out_first[i] = steps[0]

    return loop


@functools.cache
def picked_direction(kind: str, more: bool) -> Function:
    """Return (out, index, numel, key, a): as :func:`direction`, for entries picked by index."""
    step, locate = _step(kind, more), noise.locate

    @compiled
    def loop(out, index, numel, key, a):
        for i in range(out.shape[0]):
            counter, is_first = locate(index[i], numel)
            steps = step(counter, key, a, out[i], out[i])
            out[i] = steps[0] if is_first else steps[1]

    return loop


# --- in torch's own threads -------------------------------------------------------------------


@intrinsic
def address(context, number):
    """Return the pointer that an int64 is."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def as_f64(context, pattern):
    """Return the float64 whose bits an int64 holds."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


_PLAIN = 10  # int64 words before the addresses of the arrays
_ALIGNED = 16  # entries: a cache line, and the vectors of all processors, divide a thread's share


@functools.cache
def in_threads(loop: Function, count: int, item: type) -> Callable[[Any, Any, int], None] | None:
    """Run a loop of :func:`whole`, :func:`in_place` or :func:`both` in the threads of torch.

    Args:
        loop: it.
        count: of arrays that it takes: 2, 4 or 6.
        item: NumPy's type of their entries.

    Returns:
        A function of the arrays (tuple), the plain numbers behind the counter (tuple) and the
        number of threads; None where torch's threads cannot be had, see
        :mod:`smezo_cli.zo.passes.openmp`.
    """
    runtime = openmp.find()
    if runtime is None:
        return None
    size, me, all_of_us = np.dtype(item).itemsize, runtime.thread, runtime.threads
    entries = np.dtype(item).type

    @within
    def part(words, k, low, high):
        return carray(address(words[_PLAIN + k] + low * size), high - low, entries)

    if count == 2:

        @within
        def share(words, low, high, plain):
            first, second = part(words, 0, low, high), part(words, 1, low, high)
            loop(first, second, low, *plain)

    elif count == 4:

        @within
        def share(words, low, high, plain):
            first, second = part(words, 0, low, high), part(words, 1, low, high)
            loop(first, second, part(words, 2, low, high), part(words, 3, low, high), low, *plain)

    else:
        assert count == 6

        @within
        def share(words, low, high, plain):
            first, second = part(words, 0, low, high), part(words, 1, low, high)
            p, p_ = part(words, 2, low, high), part(words, 3, low, high)
            m, m_ = part(words, 4, low, high), part(words, 5, low, high)
            loop(first, second, p, p_, m, m_, low, *plain)

    @cfunc(types.void(types.CPointer(types.int64)))
    def entry(pointer):
        words = carray(pointer, _PLAIN + count)
        length, k, threads = words[0], me(), all_of_us()
        low = length * k // threads // _ALIGNED * _ALIGNED
        high = length * (k + 1) // threads // _ALIGNED * _ALIGNED
        if k == threads - 1:
            high = length
        key, mask_key, round_key = (words[1], words[2]), (words[4], words[5]), (words[6], words[7])
        a, h, d = as_f64(words[3]), as_f64(words[8]), as_f64(words[9])
        share(words, low, high, (key, a, mask_key, round_key, h, d))

    def run(arrays, plain, threads):
        key, a, mask_key, round_key, h, d = plain
        words = np.empty(_PLAIN + count, np.int64)
        words[0] = len(arrays[0])
        words[1:3], words[4:6], words[6:8] = key, mask_key, round_key
        reals = words.view(np.float64)
        reals[3], reals[8], reals[9] = a, h, d
        for k, array in enumerate(arrays):
            words[_PLAIN + k] = array.ctypes.data
        runtime.parallel(entry.address, words.ctypes.data, threads, 0)

    return run
