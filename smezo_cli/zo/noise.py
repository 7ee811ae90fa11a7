"""Draw keyed noise: z at element i of a tensor is a pure function of (key, i).

No generator state exists, so a value is the same on every device, in any order, for any subset of
elements, eager or compiled. The functions below use integer operations, additions and
multiplications alone: a compiler's logarithm, cosine and square root differ from eager ones in the
last bits, these cannot. They are written once, for torch, Numba and Triton (see
:mod:`smezo_cli.zo.elementwise`).

Elements of a tensor of ``numel`` entries share one hash in pairs: with ``pairs = numel // 2``,
element i < pairs and element i + pairs are the cosine and the sine of counter i; an odd last
element is the cosine of counter ``pairs``. The 64 bits of a counter come from a two-round
xor-shift-multiply mixer (constants: "moremur", P. Evensen, 2019) whose key enters by xor before and
between the rounds: an additive key would only shift one stream along another.
"""

import hashlib

from torch import Tensor

from smezo_cli.zo.elementwise import as_f32, as_i32, at_least, f32, i32, where

#: The two words of a stream, see :func:`stream_key`, as a tensor or as numbers.
Words = Tensor | tuple[int, int]
#: Entries of a tensor.
Size = int | Tensor

_M1, _M2 = 0x3C79AC492BA7B653, 0x1C69B3F74AC4AE35
_TWO_LN2 = 1.3862943611198906
# Chebyshev fits made for this file, lowest power first; absolute errors below 2.3e-7, 7e-9, 5e-8.
_LOG = (  # ln(m) in m - 1.5, m in [1, 2)
    0.4054652915209862,
    0.6666661660586787,
    -0.22224539741031643,
    0.09879175163797849,
    -0.04892903467048789,
    0.02596732951264897,
    -0.01741407752424505,
    0.010243828630905992,
)
_SIN = (  # sin(pi v) / v in v**2, |v| <= 1/2
    3.1415926401307077,
    -5.167710083507907,
    2.5500775232149113,
    -0.598291285622484,
    0.07765766030969042,
)
_COS = (  # cos(pi v) in v**2, |v| <= 1/2
    0.9999999532476085,
    -4.93479283061964,
    4.05841135286255,
    -1.3318765680807994,
    0.21968961109786175,
)


def stream_key(*parts: int | str) -> tuple[int, int]:
    """Return two signed 64-bit words that name a stream, e.g. (seed, "z", step, query, name)."""
    raw = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return int.from_bytes(raw[:8], "little", signed=True), int.from_bytes(
        raw[8:], "little", signed=True
    )


def _shift_right(x: Tensor, k: int) -> Tensor:
    """Shift int64 without its sign, which torch's own shift drags along."""
    y = x >> k
    y &= (1 << (64 - k)) - 1
    return y


def hash64(counter: Tensor, key: Words) -> Tensor:
    """Return 64 random bits per counter.

    Args:
        counter: int64, any shape.
        key: int64, shape (2,), on the same device; or two numbers.

    Returns:
        int64 of the counter's shape; all 64 bits are uniform.
    """
    x = counter ^ key[0]
    x ^= _shift_right(x, 27)
    x *= _M1
    x ^= key[1]
    x ^= _shift_right(x, 33)
    x *= _M2
    x ^= _shift_right(x, 27)
    return x


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = x * f32(coefficients[-1])
    y += f32(coefficients[-2])
    for c in coefficients[-3::-1]:
        y *= x
        y += f32(c)
    return y


def _radius(bits: Tensor) -> Tensor:
    """Return sqrt(-2 ln u), u = (k + 1/2) / 2**31 of the top 31 bits; float32, at most 6.7."""
    f = f32(i32(_shift_right(bits, 33)))
    f += f32(0.5)
    fb = as_i32(f)
    exponent = fb >> 23
    mantissa = fb & 0x7FFFFF
    mantissa |= 0x3F800000
    # -2 ln u = 2 (31 - e) ln 2 - 2 ln m, for u = m 2**(e - 31)
    t = _horner(as_f32(mantissa) - f32(1.5), _LOG)
    t *= f32(-2.0)
    t += f32(i32(158 - exponent)) * f32(_TWO_LN2)
    t = at_least(t, f32(1e-7))  # the polynomial may fall just below zero where u is 1
    # Inverse square root: a first guess from the exponent, then two Newton steps (5e-6 relative).
    y = as_f32(0x5F3759DF - (as_i32(t) >> 1))
    half = t * f32(0.5)
    y *= f32(1.5) - half * y * y
    y *= f32(1.5) - half * y * y
    y *= t
    return y


def _gaussian_pair(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by Box-Muller: the angle is pi * w, w in [-1, 1) from the low 32 bits."""
    r = _radius(bits)
    b = i32(bits)
    v = f32(b)
    v *= f32(2.0**-31)
    v = f32(0.5) - abs(v)
    v2 = v * v
    cosine = _horner(v2, _SIN)  # cos(pi w) = sin(pi v)
    cosine *= v
    cosine *= r
    sine = _horner(v2, _COS)  # |sin(pi w)| = cos(pi v)
    sine *= r
    return cosine, where(b < 0, -sine, sine)


def _rademacher_pair(bits: Tensor) -> tuple[Tensor, Tensor]:
    return f32(i32((bits & 1) * 2 - 1)), f32(i32(((bits >> 32) & 1) * 2 - 1))


#: What makes two draws of 64 random bits, by the name of the distribution.
PAIRS = {"gaussian": _gaussian_pair, "rademacher": _rademacher_pair}
KINDS = tuple(PAIRS)


def pair(counter: Tensor, key: Words, kind: str) -> tuple[Tensor, Tensor]:
    """Return two independent standard draws per counter.

    Args:
        counter: int64, any shape.
        key: int64, shape (2,).
        kind: "gaussian" or "rademacher".

    Returns:
        Two float32 tensors of the counter's shape.
    """
    return PAIRS[kind](hash64(counter, key))


def uniform_pair(counter: Tensor, key: Words) -> tuple[Tensor, Tensor]:
    """Return two float32 uniforms in [0, 1) per counter, multiples of 2**-24."""
    bits = hash64(counter, key)
    scale = f32(2.0**-24)
    return f32(i32(_shift_right(bits, 40))) * scale, f32(i32(bits & 0xFFFFFF)) * scale


def uniform_at(index: Tensor, numel: int, key: Words) -> Tensor:
    """Return the uniforms at flat indices of a tensor of ``numel`` entries: float32, so shaped."""
    counter, is_first = locate(index, numel)
    first, second = uniform_pair(counter, key)
    return where(is_first, first, second)


def rounding_pair(counter: Tensor, key: Words) -> tuple[Tensor, Tensor]:
    """Return two times 31 random bits per counter: int32, not negative."""
    bits = hash64(counter, key)
    return i32((bits >> 32) & 0x7FFFFFFF), i32(bits & 0x7FFFFFFF)


def rounding_at(index: Tensor, numel: int, key: Tensor) -> Tensor:
    """Return 31 random bits at flat indices of a tensor of ``numel`` entries: int32, from 0."""
    counter, is_first = locate(index, numel)
    first, second = rounding_pair(counter, key)
    return where(is_first, first, second)


def locate(index: Tensor, numel: Size) -> tuple[Tensor, Tensor]:
    """Return the counter of each flat index, and whether the element is the first of its pair.

    Args:
        index: int64 flat indices below ``numel``.
        numel: entries of the whole tensor.

    Returns:
        ``(counter, first)``: int64 and bool tensors of the index's shape.
    """
    pairs = numel // 2
    first = (index < pairs) | (index == 2 * pairs)
    return where(index < pairs, index, index - pairs), first


def draw(index: Tensor, numel: int, key: Tensor, kind: str) -> Tensor:
    """Return z at flat indices of a tensor of ``numel`` entries: float32, the index's shape."""
    counter, is_first = locate(index, numel)
    first, second = pair(counter, key, kind)
    return where(is_first, first, second)
