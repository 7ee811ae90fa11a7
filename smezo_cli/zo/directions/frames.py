"""Make orthonormal frames of Gaussian matrices with the same bits on every machine."""

import math

import torch
from torch import Tensor

#: Grids on which float64 holds products exactly, and sums of them up to 2^53 units of the grid
#: squared. GAUSSIAN: of Gaussian numbers, which are below 8, with sums up to 2^21, about the square
#: of the norm of 2^21 of them. UNIT: of entries of orthonormal vectors, with sums up to 2^5.
GAUSSIAN, UNIT = 2.0**16, 2.0**24


def inner(a: Tensor, b: Tensor, grid: float) -> Tensor:
    """Return all inner products of rows of a (r, n) and b (s, n): float64 (r, s).

    Entries are rounded to multiples of 1/grid. Then every product and every sum of them is exact in
    float64, so that the order of the sums, which is a library's own, changes no bit: as long as the
    sums stay below 2^53 / grid^2, so of Gaussian rows up to some 2^21 columns.
    """
    return on_grid(a, grid) @ on_grid(b, grid).T


def on_grid(x: Tensor, grid: float) -> Tensor:
    """Return float64 multiples of 1/grid (a power of two) next to the entries."""
    return (x.double() * grid).round() * (1 / grid)


def orthonormal(rows: Tensor) -> Tensor:
    """Return the orthonormal rows that Gram and Schmidt make of independent ones, float64 (r, n).

    By the Gram matrix and its Cholesky factor, in a fixed order. The factor's diagonal is positive,
    so that of Gaussian rows the frame is uniformly distributed (a QR of LAPACK leaves signs open).

    Args:
        rows: float32 (r, n) with r <= n, entries below 8; rounded to multiples of 2^-16.
    """
    found = on_grid(rows, GAUSSIAN)
    lower = _cholesky(inner(rows, rows, GAUSSIAN).cpu()).to(rows.device)
    for k in range(len(found)):
        found[k] /= lower[k, k]
        found[k + 1 :] -= lower[k + 1 :, k : k + 1] * found[k]
    return found


def _cholesky(gram: Tensor) -> Tensor:
    """Return the lower factor of a matrix (float64, on the CPU), column by column."""
    lower = torch.zeros_like(gram)
    for k in range(len(gram)):
        lower[k, k] = pivot = math.sqrt(gram[k, k])
        lower[k + 1 :, k] = column = gram[k + 1 :, k] / pivot
        gram[k + 1 :, k + 1 :] -= column[:, None] * column
    return lower
