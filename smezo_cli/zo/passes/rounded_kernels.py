"""Compile the draws of :mod:`smezo_cli.zo.passes.rounded` by Numba, and what moves by them.

Compiled from the same source as the eager ones; here are only the loops around it. Those over codes
take rows of the upper half, each with the row as far below: their entries are pairs, which share
draws.
"""

import numpy as np

from smezo_cli.zo import elementwise, noise
from smezo_cli.zo.passes.kernels import compiled, inlined  # and the meaning for single numbers
from smezo_cli.zo.rounding import to_levels

_gaussian, _uniform, _hash = noise.PAIRS["gaussian"], noise.uniform_pair, noise.hash64
_locate, _f32, _floor = noise.locate, elementwise.f32, elementwise.floor


@inlined
def _both(counter, key, chance_key, a, inverse, step):
    """Return c u of both elements of a pair."""
    first, second = _gaussian(_hash(counter, key))
    chance, chance_ = _uniform(counter, chance_key)
    first = to_levels(first, chance, inverse, step)
    second = to_levels(second, chance_, inverse, step)
    return first * _f32(a), second * _f32(a)


@compiled
def pairs(out_first, out_second, start, key, chance_key, a, inverse, step):
    """Write c u of both elements of the pairs from ``start`` on."""
    for i in range(out_first.shape[0]):
        found = _both(start + i, key, chance_key, a, inverse, step)
        out_second[i] = found[1]
        out_first[i] = found[0]


@compiled
def picked(out, index, numel, key, chance_key, a, inverse, step):
    """Write c u at flat positions of a tensor of ``numel`` weights."""
    for i in range(out.shape[0]):
        counter, is_first = _locate(index[i], numel)
        found = _both(counter, key, chance_key, a, inverse, step)
        out[i] = found[0] if is_first else found[1]


@compiled
def chances(out_first, out_second, start, key):
    """Write the uniforms of both elements of the pairs from ``start`` on."""
    for i in range(out_first.shape[0]):
        found = _uniform(start + i, key)
        out_second[i] = found[1]
        out_first[i] = found[0]


@compiled
def away(first, second, out_first, out_second, start, key, chance_key, a, inverse, step):
    """Write the pairs from ``start`` on, moved by c u."""
    for i in range(first.shape[0]):
        found = _both(start + i, key, chance_key, a, inverse, step)
        out_first[i] = first[i] + found[0]
        out_second[i] = second[i] + found[1]


@compiled
def in_place(first, second, start, key, chance_key, a, inverse, step):
    """Do as :func:`away`, where the weights are: the compiler must know that they are the same."""
    for i in range(first.shape[0]):
        found = _both(start + i, key, chance_key, a, inverse, step)
        first[i] += found[0]
        second[i] += found[1]


@compiled
def both_ways(first, second, p, p_, m, m_, start, key, chance_key, a, inverse, step):
    """Write the pairs from ``start`` on, moved by c u and by its negative."""
    for i in range(first.shape[0]):
        found = _both(start + i, key, chance_key, a, inverse, step)
        w, v = first[i], second[i]
        p[i], p_[i] = w + found[0], v + found[1]
        m[i], m_[i] = w - found[0], v - found[1]


@compiled
def codes_away(codes, scales, group, out, low, high, key, chance_key, a, inverse, step):
    """Write the weights of some rows of codes, and of those below them, moved by c u."""
    half, width = codes.shape[0] // 2, codes.shape[1]
    for row in range(low, high):
        for g in range(scales.shape[1]):
            start, stop = g * group, min(g * group + group, width)
            scale, scale_ = scales[row, g], scales[half + row, g]
            c, c_ = codes[row, start:stop], codes[half + row, start:stop]
            o, o_ = out[row, start:stop], out[half + row, start:stop]
            for j in range(stop - start):
                found = _both(row * width + start + j, key, chance_key, a, inverse, step)
                o[j] = np.float32(c[j]) * scale + found[0]
                o_[j] = np.float32(c_[j]) * scale_ + found[1]


@compiled
def codes_both_ways(
    codes, scales, group, plus, minus, low, high, key, chance_key, a, inverse, step
):
    """Do as :func:`codes_away`, for c u and for its negative."""
    half, width = codes.shape[0] // 2, codes.shape[1]
    for row in range(low, high):
        for g in range(scales.shape[1]):
            start, stop = g * group, min(g * group + group, width)
            scale, scale_ = scales[row, g], scales[half + row, g]
            c, c_ = codes[row, start:stop], codes[half + row, start:stop]
            p, p_ = plus[row, start:stop], plus[half + row, start:stop]
            m, m_ = minus[row, start:stop], minus[half + row, start:stop]
            for j in range(stop - start):
                found = _both(row * width + start + j, key, chance_key, a, inverse, step)
                w, v = np.float32(c[j]) * scale, np.float32(c_[j]) * scale_
                p[j], p_[j] = w + found[0], v + found[1]
                m[j], m_[j] = w - found[0], v - found[1]


@inlined
def _code(code, amount, chance, largest):
    """Return a code moved by an amount of steps, which is rounded by chance."""
    moved = np.float32(code) + _floor(amount + chance)
    return np.int8(min(max(moved, -largest), largest))


@compiled
def codes_in_place(
    codes, scales, group, largest, code_key, low, high, key, chance_key, a, inverse, step
):
    """Move some rows of codes, and those below them, by c u over the scales."""
    half, width, most = codes.shape[0] // 2, codes.shape[1], _f32(largest)
    for row in range(low, high):
        for g in range(scales.shape[1]):
            start, stop = g * group, min(g * group + group, width)
            scale, scale_ = scales[row, g], scales[half + row, g]
            c, c_ = codes[row, start:stop], codes[half + row, start:stop]
            for j in range(stop - start):
                at = row * width + start + j
                found = _both(at, key, chance_key, a, inverse, step)
                chance = _uniform(at, code_key)
                c[j] = _code(c[j], found[0] / scale, chance[0], most)
                c_[j] = _code(c_[j], found[1] / scale_, chance[1], most)
