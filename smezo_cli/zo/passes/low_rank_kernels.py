"""Compile the low-rank passes by Numba: loops over rows, in the threads of torch.

The arithmetic is that of :mod:`smezo_cli.zo.passes.low_rank`. Sums of many products are kept in the
cache for a few rows and columns, four products at a time, in their order; the last ones are
added where the weight is moved. Without fast-math, LLVM neither contracts nor reorders.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, types  # type: ignore[attr-defined]  # carray is public all the same

from smezo_cli.zo import elementwise, noise
from smezo_cli.zo import rounding as rounding_module
from smezo_cli.zo.passes import openmp
from smezo_cli.zo.passes.kernels import (
    Function,
    Rounding,
    address,
    as_f64,
    as_is,
    compiled,
    inlined,
    narrow,
    wide,
    within,
)
from smezo_cli.zo.selections import masks

_TOGETHER = 4  # products that are added in one go: their numbers stay in registers
_COLUMNS = 1024  # whose sums are kept at once


def _sum(count: int, more: bool) -> Function:
    """Return (what was before, four of left, four of right) -> the first products, added."""
    if more:

        @inlined
        def first_of(before, a, x):
            return before + a * x

    else:

        @inlined
        def first_of(before, a, x):
            return a * x

    if count == 1:

        @inlined
        def total(before, a, b, c, d, x, y, z, u):
            return first_of(before, a, x)

    elif count == 2:

        @inlined
        def total(before, a, b, c, d, x, y, z, u):
            return first_of(before, a, x) + b * y

    elif count == 3:

        @inlined
        def total(before, a, b, c, d, x, y, z, u):
            return first_of(before, a, x) + b * y + c * z

    else:

        @inlined
        def total(before, a, b, c, d, x, y, z, u):
            return first_of(before, a, x) + b * y + c * z + d * u

    return total


def _mask(name: str) -> Function:
    """Return (w, flat index, entries, key, h) -> is it perturbed."""
    is_active, uniform_at, f32 = masks.RULES[name], noise.uniform_at, elementwise.f32
    if name == "random":

        @inlined
        def by_draw(w, index, numel, key, h):
            return is_active(uniform_at(index, numel, key), f32(h))

        return by_draw

    @inlined
    def by_size(w, index, numel, key, h):
        return is_active(abs(w), f32(h))

    return by_size


def _finish(mask: str, rounding: Rounding, decay: bool) -> Function:
    """Return (w, step, flat index, entries, mask_key, round_key, h, d) -> the entry, moved."""
    mask_of, f32, where = _mask(mask), elementwise.f32, elementwise.where
    rounding_at = noise.rounding_at
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
        def to_nearest(w, step, index, numel, mask_key, round_key, h, d):
            return where(mask_of(w, index, numel, mask_key, h), add(w, step, d), w)

        return to_nearest
    rounded = rounding_module.ROUNDINGS[rounding]

    @inlined
    def by_chance(w, step, index, numel, mask_key, round_key, h, d):
        bits = rounding_at(index, numel, round_key)
        moved = rounded(add(w, step, d), bits)
        return where(mask_of(w, index, numel, mask_key, h), moved, w)

    return by_chance


@functools.cache
def _earlier() -> tuple[Function, Function]:
    """Return what begins, and goes on with, the sums of two rows, four products at a time."""
    alone, added = _sum(_TOGETHER, False), _sum(_TOGETHER, True)

    def of(total: Function) -> Function:
        @inlined
        def add(left, right, sums, row, other, k, low, high):
            a, b, c, d = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
            e, f, g, h = left[other, k], left[other, k + 1], left[other, k + 2], left[other, k + 3]
            p, q = right[k, low:high], right[k + 1, low:high]
            r, s = right[k + 2, low:high], right[k + 3, low:high]
            for j in range(high - low):
                x, y, z, u = p[j], q[j], r[j], s[j]
                sums[j] = total(sums[j], a, b, c, d, x, y, z, u)
                # In one array, at a constant distance: the compiler sees that they do not overlap.
                sums[_COLUMNS + j] = total(sums[_COLUMNS + j], e, f, g, h, x, y, z, u)

        return add

    return of(alone), of(added)


def _num_last(rank: int) -> int:
    """Return how many products are left for the end of a sum: 1 to 4."""
    return (rank - 1) % _TOGETHER + 1


def _loop(end: Function, rank: int) -> Function:
    """Return the loop over pairs of rows, parts of columns and products; ``end`` does the last.

    Returns:
        A function of left, right, the matrices (tuple), scratch (float32, twice _COLUMNS), the
        first and the end of its rows, and plain numbers.
    """
    begin, go_on = _earlier()
    count = _num_last(rank)

    @compiled
    def few(left, right, matrices, sums, low, high, plain):
        for row in range(low, high):
            end(left, right, matrices, sums, row, 0, 0, right.shape[1], plain)

    @compiled
    def many(left, right, matrices, sums, low, high, plain):
        columns, last = right.shape[1], right.shape[0] - count
        for row in range(low, high, 2):
            other = min(row + 1, high - 1)
            for start in range(0, columns, _COLUMNS):
                stop = min(start + _COLUMNS, columns)
                begin(left, right, sums, row, other, 0, start, stop)
                for k in range(_TOGETHER, last, _TOGETHER):
                    go_on(left, right, sums, row, other, k, start, stop)
                end(left, right, matrices, sums, row, last, start, stop, plain)
                if other > row:
                    end(left, right, matrices, sums[_COLUMNS:], other, last, start, stop, plain)

    return many if rank > _TOGETHER else few


def _ending(rank: int) -> Function:
    """Return (left, right, sums, row, first product, first column) -> what takes offsets.

    What is left of the sum, as numbers and arrays that stay in registers.
    """
    count = _num_last(rank)
    one, two, three = min(1, count - 1), min(2, count - 1), min(3, count - 1)

    @inlined
    def ready(left, right, row, k, low, high):
        a, b, c, d = left[row, k], left[row, k + one], left[row, k + two], left[row, k + three]
        p, q = right[k, low:high], right[k + one, low:high]
        r, s = right[k + two, low:high], right[k + three, low:high]
        return a, b, c, d, p, q, r, s

    return ready


@functools.cache
def rows_of_product(rank: int) -> Function:
    """Return the loop that writes left right (float32) to its one matrix."""
    return _rows_of_product(_alike(rank))


@functools.cache
def _rows_of_product(rank: int) -> Function:
    total, ready = _sum(_num_last(rank), rank > _TOGETHER), _ending(rank)

    @inlined
    def end(left, right, matrices, sums, row, k, low, high, plain):
        a, b, c, d, p, q, r, s = ready(left, right, row, k, low, high)
        out = matrices[0][row, low:high]
        for j in range(high - low):
            out[j] = total(sums[j], a, b, c, d, p[j], q[j], r[j], s[j])

    return _loop(end, rank)


def moved_rows(
    mask: str, rounding: Rounding, decay: bool, patterns: bool, outs: int, rank: int
) -> Function:
    """Return the loop that moves a matrix of weights along left right.

    Args:
        mask: a key of ``masks.RULES``.
        rounding: how results are rounded before they are cast.
        decay: whether there is weight decay.
        patterns: matrices hold the patterns of bfloat16 as int16, not float32.
        outs: 0 moves the weights where they are, 1 writes moved ones, 2 those moved both ways.
        rank: of the product.

    Returns:
        See :func:`_loop`; the matrices are the weights and the outs.
    """
    return _moved_rows(mask, rounding, decay, patterns, outs, _alike(rank))


def _alike(rank: int) -> int:
    """Return the least rank for which the same loop is compiled."""
    return rank if rank <= _TOGETHER else _TOGETHER + _num_last(rank)


@functools.cache
def _moved_rows(
    mask: str, rounding: Rounding, decay: bool, patterns: bool, outs: int, rank: int
) -> Function:
    total, ready = _sum(_num_last(rank), rank > _TOGETHER), _ending(rank)
    finish = _finish(mask, rounding, decay)
    load, store = (wide, narrow) if patterns else (as_is, as_is)

    @inlined
    def in_place(left, right, matrices, sums, row, k, low, high, plain):
        numel, mask_key, round_key, h, d, first = plain
        a, b, c, e, p, q, r, s = ready(left, right, row, k, low, high)
        w, at = matrices[0][row, low:high], first + row * right.shape[1] + low
        for j in range(high - low):
            step = total(sums[j], a, b, c, e, p[j], q[j], r[j], s[j])
            moved = finish(load(w[j]), step, at + j, numel, mask_key, round_key, h, d)
            w[j] = store(moved)

    @inlined
    def away(left, right, matrices, sums, row, k, low, high, plain):
        numel, mask_key, round_key, h, d, first = plain
        a, b, c, e, p, q, r, s = ready(left, right, row, k, low, high)
        w, at = matrices[0][row, low:high], first + row * right.shape[1] + low
        out = matrices[1][row, low:high]
        for j in range(high - low):
            step = total(sums[j], a, b, c, e, p[j], q[j], r[j], s[j])
            moved = finish(load(w[j]), step, at + j, numel, mask_key, round_key, h, d)
            out[j] = store(moved)

    @inlined
    def both(left, right, matrices, sums, row, k, low, high, plain):
        numel, mask_key, round_key, h, d, first = plain
        a, b, c, e, p, q, r, s = ready(left, right, row, k, low, high)
        w, at = matrices[0][row, low:high], first + row * right.shape[1] + low
        plus, minus = matrices[1][row, low:high], matrices[2][row, low:high]
        for j in range(high - low):
            weight = load(w[j])
            step = total(sums[j], a, b, c, e, p[j], q[j], r[j], s[j])
            there = finish(weight, step, at + j, numel, mask_key, round_key, h, d)
            back = finish(weight, -step, at + j, numel, mask_key, round_key, h, d)
            plus[j], minus[j] = store(there), store(back)

    return _loop((in_place, away, both)[outs], rank)


# --- in torch's own threads -------------------------------------------------------------------

_PLAIN = 14  # int64 words before the addresses of the matrices


def run(
    loop: Function, arrays: tuple[Any, ...], plain: tuple[Any, ...], threads: int, first: int = 0
) -> None:
    """Run a loop over all rows, each thread over a share of them.

    Args:
        loop: of :func:`moved_rows` or :func:`rows_of_product`.
        arrays: left, right and the matrices.
        plain: entries of the whole matrix, mask_key, round_key, h, d.
        threads: how many; one where torch's threads cannot be had.
        first: flat index of the first entry of the first row.
    """
    left, right, *matrices = arrays
    together = None
    if threads > 1:
        together = _in_threads(loop, len(matrices), matrices[0].dtype.type)
    if together is not None:
        together(arrays, plain, threads, first)
        return
    sums = np.empty(2 * _COLUMNS, np.float32)
    loop(left, right, tuple(matrices), sums, 0, left.shape[0], (*plain, first))


@functools.cache
def _in_threads(loop: Function, count: int, item: type) -> Callable[..., None] | None:
    """Return the loop over matrices of one type in torch's threads; None if they are not had.

    See :func:`smezo_cli.zo.passes.kernels.in_threads`.
    """
    runtime = openmp.find()
    if runtime is None:
        return None
    me, all_of_us, entries = runtime.thread, runtime.threads, np.dtype(item).type
    wide_type = np.dtype(np.float32).type

    @within
    def matrix(words, k):
        return carray(address(words[_PLAIN + k]), (words[0], words[1]), entries)

    if count == 1:

        @within
        def all_of(words):
            return (matrix(words, 0),)

    elif count == 2:

        @within
        def all_of(words):
            return (matrix(words, 0), matrix(words, 1))

    else:

        @within
        def all_of(words):
            return (matrix(words, 0), matrix(words, 1), matrix(words, 2))

    @cfunc(types.void(types.CPointer(types.int64)))
    def entry(pointer):
        words = carray(pointer, _PLAIN + count)
        rows, columns, rank = words[0], words[1], words[2]
        k, threads = me(), all_of_us()
        low, high = rows * k // threads // 2 * 2, rows * (k + 1) // threads // 2 * 2
        if k == threads - 1:
            high = rows
        left = carray(address(words[11]), (rows, rank), wide_type)
        right = carray(address(words[12]), (rank, columns), wide_type)
        scratch = carray(address(words[13]), (threads, 2 * _COLUMNS), wide_type)
        mask_key, round_key = (words[5], words[6]), (words[7], words[8])
        h, d = as_f64(words[9]), as_f64(words[10])
        plain = (words[4], mask_key, round_key, h, d, words[3])
        loop(left, right, all_of(words), scratch[k], low, high, plain)

    def run_all(arrays, plain, threads, first):
        left, right, *matrices = arrays
        numel, mask_key, round_key, h, d = plain
        words = np.empty(_PLAIN + count, np.int64)
        words[:5] = left.shape[0], right.shape[1], right.shape[0], first, numel
        words[5:7], words[7:9] = mask_key, round_key
        words.view(np.float64)[9:11] = h, d
        scratch = np.empty((threads, 2 * _COLUMNS), np.float32)
        held = (left, right, scratch, *matrices)
        words[11:] = [array.ctypes.data for array in held]
        runtime.parallel(entry.address, words.ctypes.data, threads, 0)

    return run_all
