"""Compile the draws of :mod:`smezo_cli.zo.passes.rounded` by Numba: loops over float32.

Compiled from the same source as the eager ones; here are only the loops around it.
"""

from numba import njit

from smezo_cli.zo import elementwise, noise
from smezo_cli.zo.passes import kernels  # gives the functions below their meaning for numbers
from smezo_cli.zo.rounding import to_levels

assert kernels  # imported for that alone
_gaussian, _uniform, _hash = noise.PAIRS["gaussian"], noise.uniform_pair, noise.hash64
_locate, _f32 = noise.locate, elementwise.f32


@njit(forceinline=True)
def _both(counter, key, chance_key, a, inverse, step):
    """Return c u of both elements of a pair."""
    first, second = _gaussian(_hash(counter, key))
    chance, chance_ = _uniform(counter, chance_key)
    first = to_levels(first, chance, inverse, step)
    second = to_levels(second, chance_, inverse, step)
    return first * _f32(a), second * _f32(a)


@njit(nogil=True)
def pairs(out_first, out_second, start, key, chance_key, a, inverse, step):
    """Write c u of both elements of the pairs from ``start`` on."""
    for i in range(out_first.shape[0]):
        found = _both(start + i, key, chance_key, a, inverse, step)
        out_second[i] = found[1]
        out_first[i] = found[0]


@njit(nogil=True)
def picked(out, index, numel, key, chance_key, a, inverse, step):
    """Write c u at flat positions of a tensor of ``numel`` weights."""
    for i in range(out.shape[0]):
        counter, is_first = _locate(index[i], numel)
        found = _both(counter, key, chance_key, a, inverse, step)
        out[i] = found[0] if is_first else found[1]


@njit(nogil=True)
def chances(out_first, out_second, start, key):
    """Write the uniforms of both elements of the pairs from ``start`` on."""
    for i in range(out_first.shape[0]):
        found = _uniform(start + i, key)
        out_second[i] = found[1]
        out_first[i] = found[0]
