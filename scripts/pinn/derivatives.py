"""Derivatives of a function from its values alone, at points around the one that is asked for.

Both ways are stencils: offsets, and for each derivative the weights of the values there.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Jet:
    """A function at n points of D inputs: its value, gradient and second derivatives.

    Sums and products of jets are the jets of sums and products.

    Attributes:
        value: (n,).
        first: (n, D), the gradient.
        second: (n, D), the second derivative along each input; no mixed ones.
    """

    value: Tensor
    first: Tensor
    second: Tensor

    def __add__(self, other: "Jet") -> "Jet":
        return Jet(self.value + other.value, self.first + other.first, self.second + other.second)

    def __mul__(self, other: "Jet") -> "Jet":
        a, b = self.value[:, None], other.value[:, None]
        return Jet(
            self.value * other.value,
            a * other.first + b * self.first,
            a * other.second + 2 * self.first * other.first + b * self.second,
        )

    def __getitem__(self, rows: slice) -> "Jet":
        return Jet(self.value[rows], self.first[rows], self.second[rows])


@dataclass(frozen=True)
class Stencil:
    """Where a function is evaluated around a point, and what its jet is made of.

    Attributes:
        offsets: (m, D), the first is 0.
        weights: (m, 1 + 2 D), of f(x + offset) - f(x): columns for the value less f(x), for the
            gradient and for the second derivatives.
    """

    offsets: Tensor
    weights: Tensor

    def float(self) -> "Stencil":
        """Return it in float32; it is made in float64, and computes in the dtype it has."""
        return Stencil(self.offsets.float(), self.weights.float())

    def around(self, points: Tensor) -> Tensor:
        """Return the points (n m, D) to evaluate for the jet at points (n, D)."""
        return (points[:, None] + self.offsets).flatten(0, 1)

    def jet(self, values: Tensor) -> Jet:
        """Return the jet at n points from the values (n m,) at the points around them."""
        values = values.view(-1, len(self.offsets))
        centre = values[:, :1]
        # Less the centre: large weights of both signs would magnify the rounding of large values.
        moments = (values - centre) @ self.weights
        inputs = self.offsets.shape[1]
        return Jet(centre[:, 0] + moments[:, 0], *moments[:, 1:].split(inputs, dim=1))


def central_differences(inputs: int, step: float) -> Stencil:
    """Return the stencil of 2 D + 1 points, exact for polynomials of degree 2 along each input."""
    unit = torch.eye(inputs, dtype=torch.float64)
    offsets = torch.cat([torch.zeros(1, inputs, dtype=torch.float64), step * unit, -step * unit])
    weights = torch.zeros(len(offsets), 1 + 2 * inputs, dtype=torch.float64)
    plus, minus = weights[1 : 1 + inputs], weights[1 + inputs :]
    plus[:, 1 : 1 + inputs], minus[:, 1 : 1 + inputs] = unit / (2 * step), -unit / (2 * step)
    plus[:, 1 + inputs :] = minus[:, 1 + inputs :] = unit / step**2
    return Stencil(offsets, weights)


def stein(inputs: int, sigma: float, level: int = 3) -> Stencil:
    """Return the stencil of a smoothed function, u(x) = E f(x + sigma z) with z ~ N(0, I).

    By Stein's identity the derivatives of u are means of f, too:

        du/dx_i = E[z_i f(x + sigma z)] / sigma
        d2u/dx_i2 = E[(z_i^2 - 1) f(x + sigma z)] / sigma^2

    The means are sums over a sparse grid, exact for integrands of total degree 2 level - 1.
    """
    nodes, weights = sparse_grid(inputs, level)
    order = nodes.abs().sum(1).argsort(stable=True)  # the node 0 first; every level has it
    nodes, weights = nodes[order], weights[order, None]
    columns = (weights, weights * nodes / sigma, weights * (nodes**2 - 1) / sigma**2)
    return Stencil(sigma * nodes, torch.cat(columns, dim=1))


def sparse_grid(inputs: int, level: int) -> tuple[Tensor, Tensor]:
    """Return Smolyak's rule for means over N(0, I): nodes (m, D) and weights (m,), float64.

    It combines products of Gauss-Hermite rules of l_i nodes along input i:

        sum of (-1)^(level-1-s) binomial(D-1, level-1-s) rule(l_1) x ... x rule(l_D)

    over all l with s = sum (l_i - 1) below ``level``. Weights may be negative.
    """
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in range(1, level + 1)]
    found: dict[tuple[float, ...], float] = defaultdict(float)
    for s in range(max(0, level - inputs), level):
        sign = (-1) ** (level - 1 - s) * math.comb(inputs - 1, level - 1 - s)
        # Which inputs have more than one node, and how many more: s things put on D inputs.
        for places in itertools.combinations_with_replacement(range(inputs), s):
            along = {i: rules[places.count(i)] for i in set(places)}
            axes = [list(zip(*along[i], strict=True)) for i in along]
            for picked in itertools.product(*axes):
                node, weight = [0.0] * inputs, float(sign)
                for i, (x, w) in zip(along, picked, strict=True):
                    node[i] = round(float(x), 12) + 0.0  # equal nodes of several rules meet; no -0
                    weight *= float(w) / math.sqrt(2 * math.pi)
                found[tuple(node)] += weight
    nodes = torch.tensor(list(found), dtype=torch.float64)
    return nodes, torch.tensor(list(found.values()), dtype=torch.float64)
