"""KerZOO: two-sided steps at random radii, weighted by a kernel (arXiv 2505.18886)."""

from collections.abc import Sequence
from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Move, Term, keys
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.sgd import SGD


def kernel(r: float) -> float:
    """Return K(r) = 15/4 r (5 - 7 r^2): over r ~ U[-1, 1], E[r K] = 1 and E[r^3 K] = 0."""
    return 15 / 4 * r * (5 - 7 * r * r)


class RandomRadii:
    """Estimate 1/Q sum_q d_q K(r_q) u_q, with a radius of its own for each query.

        d_q = [L(theta + eps r_q u_q) - L(theta - eps r_q u_q)] / (2 eps),  r_q ~ U[-1, 1]

    The d_q are recorded; r_q is drawn again from (seed, "radius", step, query).

    Args:
        num_queries: Q.
        seed: of the run.

    Raises:
        ValueError: there is no query.
    """

    def __init__(self, num_queries: int, seed: int) -> None:
        check(num_queries >= 1, f"num_queries={num_queries}: must be at least 1")
        self.num_scalars = self.num_terms = num_queries
        self._seed = seed

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 2 * self.num_scalars

    def radius(self, key: Key) -> float:
        """Return r of a direction."""
        return stream_key(self._seed, "radius", key.step, key.query)[0] / 2**63

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        eps, own = ask.eps, keys(ask.step, self.num_scalars)
        there = [Move((Term(key, eps * self.radius(key)),)) for key in own]
        pairs = ask.losses([(move, move.negated()) for move in there])
        return [(plus - minus) / (2 * eps) for plus, minus in pairs]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        own = zip(keys(step, self.num_scalars), scalars, strict=True)
        terms = (Term(key, kernel(self.radius(key)) * d) for key, d in own)
        return Gradient(tuple(terms), divisor=self.num_scalars)


class KerZOO(ZeroOrder):
    """Probe at a random radius, weighted so that the bias of O(eps^2) is gone on average.

    One step, for queries q = 1..Q with u_q ~ N(0, I) and r_q ~ U[-1, 1]:

        d_q = [L(theta + eps r_q u_q) - L(theta - eps r_q u_q)] / (2 eps)
        projected_grad_q = K(r_q) d_q,  K(r) = 15/4 r (5 - 7 r^2)
        theta <- theta - lr (1/Q sum_q projected_grad_q u_q + weight_decay theta)

    With E[r K] = 1 and E[r^3 K] = 0 the mean is the gradient up to O(eps^4), while MeZO's has a
    bias of O(eps^2), which at eps 1e-3 is some 1e-6 of it. The price is noise: E[r^2 K^2] = 6.25,
    so an estimate has 6.25 times the second moment of MeZO's. The paper's factor C of K is 1 here,
    as a factor of lr does the same.

    Forwards a step: 2 Q. Keeps no state. No code was released.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped with their
            weight. ``executor="in_place"`` cannot measure at these radii.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=RandomRadii(num_queries, common.get("seed", 0)),
            update=SGD(),
            **common,
        )
