"""Define the passes as Triton kernels for CUDA and ROCm devices: one program a block of pairs.

The arithmetic is that of :mod:`smezo_cli.zo.noise`, :mod:`smezo_cli.zo.selections.masks` and
:mod:`smezo_cli.zo.rounding`, compiled from the same source; here are only the loads and stores
around it. Importing this module imports Triton.

A bfloat16 is read and written as its pattern (int16). Kernels are to be launched with ``OPTIONS``:
Triton contracts a * b + c by default, which eager code does not.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from smezo_cli.zo import noise, rounding
from smezo_cli.zo.selections import masks

#: How a kernel is launched: each operation rounds once.
OPTIONS = {"enable_fp_fusion": False}
#: Numbers of a draw are parts of larger tensors: where they lie makes no kernel of its own.
_AS_THEY_LIE = ["keys", "coefficients", "mask_key", "round_key", "h", "decay"]

# --- what the names of elementwise.py, and a few of Python, mean for blocks --------------------


@triton.jit
def f32(x):
    """See :mod:`smezo_cli.zo.elementwise`."""
    return tl.cast(x, tl.float32)


@triton.jit
def i32(x):
    """See :mod:`smezo_cli.zo.elementwise`."""
    return tl.cast(x, tl.int32)


@triton.jit
def as_i32(x):
    """See :mod:`smezo_cli.zo.elementwise`."""
    return tl.cast(x, tl.int32, bitcast=True)


@triton.jit
def as_f32(x):
    """See :mod:`smezo_cli.zo.elementwise`."""
    return tl.cast(tl.cast(x, tl.int32), tl.float32, bitcast=True)


@triton.jit
def at_least(x, low):
    """See :mod:`smezo_cli.zo.elementwise`."""
    return tl.where(x < low, low, x)


@triton.jit
def floor(x):
    """See :mod:`smezo_cli.zo.elementwise`."""
    return tl.floor(x)


@triton.jit
def where(condition, yes, no):
    """See :mod:`smezo_cli.zo.elementwise`."""
    return tl.where(condition, yes, no)


@triton.jit
def magnitude(x):
    """Return what Python's ``abs`` does."""
    return tl.abs(x)


@triton.jit
def horner(x, coefficients: tl.constexpr):
    """Compute ``noise._horner``, whose slices of a tuple Triton does not read."""
    y = x * f32(coefficients[-1])
    for k in tl.static_range(2, len(coefficients) + 1):
        if k > 2:
            y = y * x
        y = y + f32(coefficients[-k])
    return y


#: whether Triton interprets the kernels, on tensors of a CPU too, in place of compiling them
IS_INTERPRETED = not isinstance(f32, triton.runtime.JITFunction)

_NAMES: dict[str, Any] = {
    "__name__": __name__,
    "tl": tl,
    "f32": f32,
    "i32": i32,
    "as_i32": as_i32,
    "as_f32": as_f32,
    "at_least": at_least,
    "floor": floor,
    "where": where,
    "abs": magnitude,
    "_horner": horner,
    # annotations, which Triton looks up and does not use
    "Tensor": tl.tensor,
    "Words": tl.tensor,
    "Size": tl.tensor,
}
for _name in ("_M1", "_M2", "_TWO_LN2", "_LOG", "_SIN", "_COS"):
    _value = getattr(noise, _name)
    _NAMES[_name] = _value if IS_INTERPRETED else tl.constexpr(_value)


def _let(function: Callable[..., Any]) -> Any:
    """Return what Triton makes of a function whose names mean those of ``_NAMES``."""
    made = triton.jit(types.FunctionType(function.__code__, _NAMES, function.__name__))
    _NAMES[function.__name__] = made
    return made


_let(noise._shift_right)
_let(noise._radius)
hash64, locate = _let(noise.hash64), _let(noise.locate)
uniform_pair, rounding_pair = _let(noise.uniform_pair), _let(noise.rounding_pair)
#: noise.PAIRS, masks.RULES and rounding.ROUNDINGS for blocks
PAIRS = {kind: _let(pair) for kind, pair in noise.PAIRS.items()}
RULES = {name: _let(rule) for name, rule in masks.RULES.items()}
ROUNDINGS: dict[torch.dtype | None, Any] = {None: None}
ROUNDINGS |= {dtype: _let(rounded) for dtype, rounded in rounding.ROUNDINGS.items()}

# --- parts of the kernels -----------------------------------------------------------------------


@triton.jit
def words(key):
    """Return the two words of the stream that lies at an address."""
    return tl.load(key), tl.load(key + 1)


@triton.jit
def block(size: tl.constexpr):
    """Return the counters of this program."""
    return tl.cast(tl.program_id(0), tl.int64) * size + tl.arange(0, size)


@triton.jit
def places(counter, pairs, is_odd: tl.constexpr):
    """Return where the elements of each pair lie; an odd last one begins a pair of its own."""
    if is_odd:
        return tl.where(counter == pairs, 2 * pairs, counter), counter + pairs
    else:
        return counter, counter + pairs


@triton.jit
def wide(found):
    """Return the float32 of a weight as it was read."""
    if found.dtype == tl.int16:
        return as_f32(tl.cast(found, tl.int32) << 16)
    else:
        return f32(found)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Return the nearest number of a weight's dtype, ties to even; NaN stays NaN."""
    if dtype == tl.int16:
        pattern = as_i32(value)
        rounded = (pattern + ((pattern >> 16) & 1) + 0x7FFF) >> 16
        return tl.cast(tl.where(value == value, rounded, (pattern >> 16) | 0x40), tl.int16)
    else:
        return tl.cast(value, dtype)


@triton.jit
def sum_of_draws(counter, keys, coefficients, queries, draws: tl.constexpr):
    """Return sum_q a_q z_q for both elements of each pair."""
    first, second = draws(hash64(counter, words(keys)))
    a = tl.load(coefficients)
    first = first * a
    second = second * a
    for q in range(1, queries):
        z, z_ = draws(hash64(counter, words(keys + 2 * q)))
        a = tl.load(coefficients + q)
        first = first + z * a
        second = second + z_ * a
    return first, second


@triton.jit
def masks_of(first, second, counter, key, h, is_active: tl.constexpr, by_chance: tl.constexpr):
    """Say whether both elements of each pair are perturbed."""
    if by_chance:
        u, u_ = uniform_pair(counter, words(key))
        return is_active(u, h), is_active(u_, h)
    else:
        return is_active(tl.abs(wide(first)), h), is_active(tl.abs(wide(second)), h)


@triton.jit
def blend(
    found,
    direction,
    active,
    bits,
    d,
    decays: tl.constexpr,
    rounded: tl.constexpr,
    dtype: tl.constexpr,
):
    """See :func:`smezo_cli.zo.passes.eager.blend`."""
    w = wide(found)
    if decays:
        direction = direction - d * w
    value = w + direction
    if rounded is not None:
        value = rounded(value, bits)
    if found.dtype == dtype:
        return tl.where(active, narrow(value, dtype), found)
    else:
        return tl.where(active, narrow(value, dtype), narrow(w, dtype))


@triton.jit
def pair_of(weight, pairs, is_odd: tl.constexpr, size: tl.constexpr):
    """Return a program's counters, where their pairs lie, which are there, and their weights."""
    counter, pairs = block(size), tl.cast(pairs, tl.int64)
    first, second = places(counter, pairs, is_odd)
    has_first, has_second = counter < pairs + is_odd, counter < pairs
    w, w_ = tl.load(weight + first, mask=has_first), tl.load(weight + second, mask=has_second)
    return counter, first, second, has_first, has_second, w, w_


# --- kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=_AS_THEY_LIE)
def move(
    weight,
    out,
    pairs,
    keys,
    coefficients,
    mask_key,
    round_key,
    h,
    decay,
    queries,
    is_odd: tl.constexpr,
    draws: tl.constexpr,
    is_active: tl.constexpr,
    by_chance: tl.constexpr,
    decays: tl.constexpr,
    rounded: tl.constexpr,
    size: tl.constexpr,
):
    """Move pairs of weights along a draw; ``out`` may be the weight."""
    counter, first, second, has_first, has_second, w, w_ = pair_of(weight, pairs, is_odd, size)
    step, step_ = sum_of_draws(counter, keys, coefficients, queries, draws)
    active, active_ = masks_of(w, w_, counter, mask_key, tl.load(h), is_active, by_chance)
    bits, bits_ = rounding_pair(counter, words(round_key))
    d = tl.load(decay)
    moved = blend(w, step, active, bits, d, decays, rounded, out.dtype.element_ty)
    moved_ = blend(w_, step_, active_, bits_, d, decays, rounded, out.dtype.element_ty)
    tl.store(out + first, moved, mask=has_first)
    tl.store(out + second, moved_, mask=has_second)


@triton.jit(do_not_specialize_on_alignment=_AS_THEY_LIE)
def move_both(
    weight,
    plus,
    minus,
    pairs,
    keys,
    coefficients,
    mask_key,
    h,
    decay,
    queries,
    is_odd: tl.constexpr,
    draws: tl.constexpr,
    is_active: tl.constexpr,
    by_chance: tl.constexpr,
    decays: tl.constexpr,
    size: tl.constexpr,
):
    """Move pairs of weights along a draw, and along the one with its coefficients negated."""
    counter, first, second, has_first, has_second, w, w_ = pair_of(weight, pairs, is_odd, size)
    step, step_ = sum_of_draws(counter, keys, coefficients, queries, draws)
    active, active_ = masks_of(w, w_, counter, mask_key, tl.load(h), is_active, by_chance)
    d = tl.load(decay)
    p = blend(w, step, active, 0, d, decays, None, plus.dtype.element_ty)
    p_ = blend(w_, step_, active_, 0, d, decays, None, plus.dtype.element_ty)
    # Times -1, not -step: Triton takes that for 0 - step, which is 0 where step is 0.
    m = blend(w, step * -1.0, active, 0, d, decays, None, minus.dtype.element_ty)
    m_ = blend(w_, step_ * -1.0, active_, 0, d, decays, None, minus.dtype.element_ty)
    tl.store(plus + first, p, mask=has_first)
    tl.store(plus + second, p_, mask=has_second)
    tl.store(minus + first, m, mask=has_first)
    tl.store(minus + second, m_, mask=has_second)


@triton.jit(do_not_specialize=["numel"], do_not_specialize_on_alignment=_AS_THEY_LIE)
def move_at(
    weight,
    out,
    index,
    count,
    numel,
    keys,
    coefficients,
    mask_key,
    round_key,
    h,
    decay,
    queries,
    draws: tl.constexpr,
    is_active: tl.constexpr,
    by_chance: tl.constexpr,
    decays: tl.constexpr,
    rounded: tl.constexpr,
    size: tl.constexpr,
):
    """Move entries picked by index, whose whole tensor has ``numel``."""
    place = block(size)
    is_there = place < count
    counter, is_first = locate(tl.load(index + place, mask=is_there), tl.cast(numel, tl.int64))
    w = tl.load(weight + place, mask=is_there)
    step, step_ = sum_of_draws(counter, keys, coefficients, queries, draws)
    active, active_ = masks_of(w, w, counter, mask_key, tl.load(h), is_active, by_chance)
    bits, bits_ = rounding_pair(counter, words(round_key))
    step, active = tl.where(is_first, step, step_), tl.where(is_first, active, active_)
    bits, d = tl.where(is_first, bits, bits_), tl.load(decay)
    moved = blend(w, step, active, bits, d, decays, rounded, out.dtype.element_ty)
    tl.store(out + place, moved, mask=is_there)


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=_AS_THEY_LIE)
def along(
    first,
    second,
    bits,
    bits_,
    start,
    count,
    keys,
    coefficients,
    round_key,
    queries,
    draws: tl.constexpr,
    is_stochastic: tl.constexpr,
    size: tl.constexpr,
):
    """Return sum_q a_q z_q of ``count`` pairs from ``start`` on, and what rounds them by chance."""
    place = block(size)
    is_there, counter = place < count, place + start
    step, step_ = sum_of_draws(counter, keys, coefficients, queries, draws)
    tl.store(first + place, step, mask=is_there)
    tl.store(second + place, step_, mask=is_there)
    if is_stochastic:
        chance, chance_ = rounding_pair(counter, words(round_key))
        tl.store(bits + place, chance, mask=is_there)
        tl.store(bits_ + place, chance_, mask=is_there)
