"""BF-SSD: descent in a random subspace, with a line search of two fidelities (arXiv 2505.00162)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.estimators.one_sided import OneSided
from smezo_cli.zo.move import Gradient, Move
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise, NotNegative, Positive, Shrink
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.sgd import SGD


class TwoFidelities:
    """Search backwards on a cheap stand-in of the batch's loss until Armijo's condition holds.

    With phi(a) the loss at a times the step of SGD, and low(a) the loss there of fewer rows:

        phi~(a) = rho low(a) + r(a),  r piecewise linear through phi - rho low at 0, 1/K, .., 1
        a <- 1, beta, beta^2, ..  until  phi~(a) <= phi~(0) - c a lr sum_j projected_grad_j^2 / l

    The last sum is the slope of the loss along the step: each difference is a slope itself. After
    ``max_tries`` factors the step is not taken (factor 0). A low loss is measured once a point.

    Args:
        beta: of the next factor to the one before.
        armijo: c.
        max_tries: factors tried.
        rho: weight of the low fidelity.
        high_points: K, points beside theta at which the loss of the batch is measured.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, beta: float, armijo: float, max_tries: int, rho: float, high_points: int
    ) -> None:
        check(0 < beta < 1, f"beta={beta}: must be above 0 and below 1")
        check(armijo >= 0, f"armijo={armijo}: must not be negative")
        check(rho > 0, f"rho={rho}: must be above 0")
        check(max_tries >= 1, f"max_tries={max_tries}: must be at least 1")
        check(high_points >= 1, f"high_points={high_points}: must be at least 1")
        self.beta, self.armijo, self.max_tries = beta, armijo, max_tries
        self.rho, self.high_points = rho, high_points
        self._points = [k / high_points for k in range(1, high_points + 1)]
        self._factors = [beta**k for k in range(max_tries)]

    def measure(self, ask: Ask, gradient: Gradient, lr: float, decay: float) -> float:
        """See :class:`StepSize`."""
        slope = sum(t.coefficient**2 for t in gradient.terms) / gradient.divisor

        def at(factor: float) -> Move:
            return gradient.move(-lr * factor, decay * factor)

        here, there = Move(()), [at(point) for point in self._points]
        high = [gradient.also["loss"], *(x for (x,) in ask.losses([(m,) for m in there]))]
        found = [x for (x,) in ask.losses([(m,) for m in (here, *there)], "low")]
        low = dict(zip((0.0, *self._points), found, strict=True))
        known = {a: phi - self.rho * low[a] for a, phi in zip(low, high, strict=True)}
        for factor in self._factors:
            if factor not in low:
                ((low[factor],),) = ask.losses([(at(factor),)], "low")
            surrogate = self.rho * low[factor] + interpolated(known, factor)
            if surrogate <= high[0] - self.armijo * factor * lr * slope:
                return factor
        return 0.0

    def forwards(self, factor: float) -> int:
        """See :class:`StepSize`; of both fidelities."""
        tried = self._factors[: self._factors.index(factor) + 1] if factor else self._factors
        return 2 * self.high_points + 1 + sum(a not in self._points for a in tried)

    def identity(self) -> dict[str, Any]:
        """See :class:`StepSize`: the factor is recorded, so no update follows from the search."""
        return {}


def interpolated(known: Mapping[float, float], place: float) -> float:
    """Return the value at a place of the line through its two neighbours among known places."""
    if place in known:
        return known[place]
    below = max(a for a in known if a < place)
    above = min(a for a in known if a > place)
    share = (place - below) / (above - below)
    return (1 - share) * known[below] + share * known[above]


class BFSSD(ZeroOrder):
    """Step along the gradient's image in l random directions, as far as a cheap search allows.

    One step, with directions z_1..z_l of independent entries:

        projected_grad_j = [L(theta + eps z_j) - L(theta)] / eps
        g = 1/l sum_j projected_grad_j z_j
        theta <- theta - a lr (g + weight_decay theta),  a <= 1 from a line search

    The search backtracks on rho times the loss of ``low_rows`` rows of the batch, corrected by what
    the loss of the batch is at ``high_points`` points of the step (see :class:`TwoFidelities`);
    where no factor passes, the weights stay. lr is the longest step. All losses of a step are of
    one batch, or the search would chase noise.

    Forwards a step: l + 1 of the batch, high_points of the batch again, high_points + 1 of the low
    rows, and one of the low rows for each factor tried that is not among these points. Low ones
    count as forwards in num_forwards. Keeps no state; the factor is recorded, so a replay needs no
    forward. The logged loss is the mean of all of these: at the weights, at the probes and along
    the search, of the batch and of the low rows.

    The paper's directions are a Haar frame scaled to E[P P^T] = I: the Q of a QR of d x l Gaussian
    numbers. Of a whole model that takes l d numbers at once and O(d l^2) operations, while
    independent columns z_j / sqrt(l) have the same E[P P^T] = I, are orthogonal up to sqrt(l / d),
    and are drawn again from their keys; eps here is the paper's h / sqrt(l). Armijo's decrease is
    that of the slope along -g, which is sum_j projected_grad_j^2 / l, not |g|^2, which is d / l
    times as much. No code was released; rho, K and the bound on the tries are our choice.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: l.
        beta: the next factor tried is beta times the one before.
        armijo: c, the share of the slope's decrease that a step must give.
        max_tries: factors tried before the step is left out.
        rho: weight of the low fidelity.
        high_points: points of the step at which the loss of the batch corrects the low one.
        low_rows: rows of the low fidelity, spread evenly over the batch; all, if it has no more.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped before the
            search. ``executor="in_place"`` cannot measure its points.
    """

    objectives: ClassVar = ("batch", "low")
    measures_pairs: ClassVar = False
    groups_by: ClassVar = ""  # all differences have one loss in common

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Count = 8,
        beta: Shrink = 0.5,
        armijo: NotNegative = 1e-4,
        max_tries: Count = 10,
        rho: Positive = 1.0,
        high_points: Count = 1,
        low_rows: Count = 4,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        self.low_rows = low_rows
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=OneSided(num_queries),
            update=SGD(),
            step_size=TwoFidelities(beta, armijo, max_tries, rho, high_points),
            **common,
        )

    def rows_of(
        self, objective: str, step: int, batch: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[int]:
        """Return the rows of the low fidelity; in a mixture they are of all parts, where it can."""
        count = min(self.low_rows, len(batch))
        return [batch[i * len(batch) // count] for i in range(count)]
