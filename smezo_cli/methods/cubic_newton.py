"""Cubic Newton in a few random directions, by differences of losses (arXiv 2410.22357)."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Unpack

from torch import nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Move, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Frame, Noise, Positive
from smezo_cli.zo.selections.layers import frozen
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check, select
from smezo_cli.zo.updates.sgd import SGD

MOST_WEIGHTS, MOST_DIRECTIONS = 100_000, 16

Matrix = list[list[float]]


class SecondDifferences:
    """Measures slopes and curvatures along k directions, and reads the cubic step from them.

    With u_i = z_i / sqrt(d) and h = eps sqrt(d), so that h u_i = eps z_i:

        g_i  = [L(+i) - L(-i)] / 2h,   H_ii = [L(+i) - 2 L(theta) + L(-i)] / h^2
        H_ij = [L(+i+j) - L(+i-j) - L(-i+j) + L(-i-j)] / 4h^2

    The gradient that it reads is -s, where s = argmin g.s + s.H s / 2 + M |s|^3 / 6.

    Args:
        num_queries: k.
        cubic: M.
        num_weights: d.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, num_queries: int, cubic: float, num_weights: int) -> None:
        check(
            1 <= num_queries <= MOST_DIRECTIONS,
            f"num_queries={num_queries}: 1 to {MOST_DIRECTIONS}",
        )
        check(cubic > 0, f"cubic={cubic}: must be above 0")
        self.cubic, self._root = cubic, math.sqrt(num_weights)
        self.num_queries = k = num_queries
        self._pairs = list(combinations(range(k), 2))
        self.num_terms = max(2, k)  # of one term, noise would be kept for the step
        self.num_scalars = 2 * k + len(self._pairs)

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 1 + 2 * self.num_queries + 4 * len(self._pairs)

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`: k slopes, k curvatures, and those of pairs."""
        k, h = self.num_queries, ask.eps * self._root
        axes = keys(ask.step, k)

        def at(*places: tuple[int, int]) -> Move:
            return Move(tuple(Term(axes[i], sign * ask.eps) for i, sign in places))

        groups = [[Move(())], *([at((i, 1)), at((i, -1))] for i in range(k))]
        groups += [
            [at((i, a), (j, b)) for a, b in ((1, 1), (-1, -1), (1, -1), (-1, 1))]
            for i, j in self._pairs
        ]
        (here,), *found = [list(losses) for losses in ask.losses(groups)]
        slopes = [(plus - minus) / (2 * h) for plus, minus in found[:k]]
        own = [(plus - 2 * here + minus) / h**2 for plus, minus in found[:k]]
        mixed = [(pp + mm - pm - mp) / (4 * h**2) for pp, mm, pm, mp in found[k:]]
        return [*slopes, *own, *mixed]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        k = self.num_queries
        hessian = [[0.0] * k for _ in range(k)]
        for i in range(k):
            hessian[i][i] = scalars[k + i]
        for (i, j), value in zip(self._pairs, scalars[2 * k :], strict=True):
            hessian[i][j] = hessian[j][i] = value
        s = cubic_step(scalars[:k], hessian, self.cubic)
        return Gradient(tuple(map(Term, keys(step, k), (-x for x in s))), divisor=self._root)


def cubic_step(gradient: Sequence[float], hessian: Matrix, cubic: float) -> list[float]:
    """Return argmin_s g.s + s.H s / 2 + M |s|^3 / 6, by plain floats: the same on any machine.

    It is s = -(H + a I)^-1 g with a = M |s| / 2 and H + a I not indefinite. |s| falls as a grows,
    so a is found by bisection. Where g has no share along the lowest eigenvector, and that is of
    negative curvature, so much of this vector is added that |s| = 2 a / M.

    Args:
        gradient: g.
        hessian: H, symmetric.
        cubic: M, above 0.
    """
    values, vectors = eigen(hessian)
    shares = [math.fsum(v * x for v, x in zip(u, gradient, strict=True)) for u in vectors]
    lowest = min(values)

    def scaled(a: float) -> list[float]:
        return [-g / (v + a) if g else 0.0 for g, v in zip(shares, values, strict=True)]

    low = max(0.0, -lowest)
    size = math.hypot(*shares)
    # At this a, |s| is at most size / (a - low), which is at most 2 a / M.
    high = low + math.sqrt(size * cubic) + 1e-300
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        is_short = math.hypot(*scaled(middle)) <= 2 * middle / cubic
        low, high = (low, middle) if is_short else (middle, high)
    along = scaled(high)
    missing = (2 * high / cubic) ** 2 - math.fsum(x * x for x in along)
    if lowest < 0 and missing > 1e-9 * (2 * high / cubic) ** 2:
        i = values.index(lowest)
        along[i] += math.copysign(math.sqrt(missing), -shares[i] or 1.0)
    return [
        math.fsum(x * u[i] for x, u in zip(along, vectors, strict=True))
        for i in range(len(gradient))
    ]


def eigen(matrix: Matrix) -> tuple[list[float], Matrix]:
    """Return the eigenvalues and eigenvectors of a symmetric matrix, by Jacobi's rotations.

    In plain floats and a fixed order: those of LAPACK may differ from machine to machine.
    """
    a, k = [list(row) for row in matrix], len(matrix)
    vectors = [[float(i == j) for j in range(k)] for i in range(k)]
    for _ in range(60):  # sweeps; some ten suffice
        size = math.fsum(x * x for row in a for x in row)
        off = math.fsum(a[i][j] ** 2 for i, j in combinations(range(k), 2))
        if off <= 1e-32 * size:
            break
        for i, j in combinations(range(k), 2):
            if a[i][j] == 0.0:
                continue
            ratio = (a[j][j] - a[i][i]) / (2 * a[i][j])
            t = math.copysign(1.0, ratio) / (abs(ratio) + math.hypot(ratio, 1.0))
            c = 1 / math.hypot(t, 1.0)
            s = t * c
            for row in a:
                row[i], row[j] = c * row[i] - s * row[j], s * row[i] + c * row[j]
            a[i], a[j] = (
                [c * x - s * y for x, y in zip(a[i], a[j], strict=True)],
                [s * x + c * y for x, y in zip(a[i], a[j], strict=True)],
            )
            vectors[i], vectors[j] = (
                [c * x - s * y for x, y in zip(vectors[i], vectors[j], strict=True)],
                [s * x + c * y for x, y in zip(vectors[i], vectors[j], strict=True)],
            )
    return [a[i][i] for i in range(k)], vectors


class CubicNewton(ZeroOrder):
    """Make a Newton step with a cubic penalty in k random directions, by differences of losses.

    One step, with u_i = z_i / sqrt(d) for i = 1..k, z_i ~ N(0, I), d trained weights:

        g_i = u_i . grad L,  H_ij = u_i . Hess L u_j     (see :class:`SecondDifferences`)
        s = argmin g.s + s.H s / 2 + M |s|^3 / 6
        theta <- theta + lr (sum_i s_i u_i - weight_decay theta)

    Forwards a step: 1 + 2 k + 2 k (k - 1) = 1 + 2 k^2; the logged loss is their mean. Keeps no
    state. The scalars are g and H, and the step follows from them in plain floats. lr 1 is the
    whole step; M is fixed. The projected gradients of the log are -s_i.

    The paper takes a gradient of n entries and recovers a Hessian of n x n from fewer measurements
    by nuclear-norm minimisation. Here all k (k + 1) / 2 entries of a k x k Hessian are measured, so
    there is nothing to recover, and the rest of the space is left alone until the next draw. Its
    pairs (u_i, v_i) are pairs of the frame; M is a setting, fixed for the run.

    Second differences divide rounding by h^2, with h = eps sqrt(d) the length of the probe: with
    losses in float32 h should be at least 1e-2. In more than 100,000 weights a few directions see
    next to nothing of a Hessian, so that many are refused.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: k, at most 16.
        cubic: M.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; ``clip_projected_grad`` cuts the entries of
            s. ``executor="in_place"`` cannot measure its points.

    Raises:
        ValueError: more than 100,000 weights are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Frame = 4,
        cubic: Positive = 1.0,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        freeze = common["freeze"] = frozen(model, common)
        targets = select(dynamo.original(model), freeze, [])
        num_weights = sum(target.num_trained for target in targets)
        check(
            num_weights <= MOST_WEIGHTS,
            f"{num_weights:,} weights are trained, and second differences are for at most "
            f"{MOST_WEIGHTS:,}: freeze more by method.freeze, or train a small adapter, such as "
            '"method.adapter={kind: lora, r: 1, alpha: 2, targets: [v_proj]}"',
        )
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=SecondDifferences(num_queries, cubic, num_weights),
            update=SGD(),
            **common,
        )
