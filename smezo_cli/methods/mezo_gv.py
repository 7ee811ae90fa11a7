"""MeZO-GV: two-sided steps along the best of some directions less the worst (arXiv 2601.04710)."""

from collections.abc import Sequence
from typing import ClassVar, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Move, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Candidates, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.sgd import SGD


class BestLessWorst:
    """Estimates along v = z_best - z_worst of some candidates, by two sides.

        projected_grad = [L(theta + eps v) - L(theta - eps v)] / (2 eps)

    The scalars are projected_grad and the numbers of the best and the worst, so that a replay knows
    v. Of equal losses the first is the best and the last the worst, which thus differ.

    Args:
        num_candidates: K.

    Raises:
        ValueError: there are too few for their choice to matter.
    """

    num_scalars = 3
    num_terms = 2

    def __init__(self, num_candidates: int) -> None:
        check(num_candidates >= 3, f"num_candidates={num_candidates}: must be at least 3")
        self.num_candidates = num_candidates

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return self.num_candidates + 2

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        numbers = range(self.num_candidates)
        there = [Move((Term(Key(ask.step, k), ask.eps),)) for k in numbers]
        losses = [loss for (loss,) in ask.losses([(move,) for move in there])]
        best = min(numbers, key=lambda k: (losses[k], k))
        worst = max(numbers, key=lambda k: (losses[k], k))
        along = Gradient(_contrast(ask.step, best, worst, 1.0)).move(ask.eps)
        ((plus, minus),) = ask.losses([(along, along.negated())])
        return [(plus - minus) / (2 * ask.eps), float(best), float(worst)]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        projected_grad, best, worst = scalars
        return Gradient(_contrast(step, int(best), int(worst), projected_grad))


def _contrast(step: int, best: int, worst: int, size: float) -> tuple[Term, Term]:
    """Return ``size`` times v."""
    return Term(Key(step, best), size), Term(Key(step, worst), -size)


class MeZOGV(ZeroOrder):
    """Step along the difference of two random directions: where the loss falls most, and least.

    One step, with candidates z_k ~ N(0, I), k = 1..K:

        best, worst = the k of the least and of the greatest L(theta + eps z_k)
        v = z_best - z_worst
        projected_grad = [L(theta + eps v) - L(theta - eps v)] / (2 eps)
        theta <- theta - lr (projected_grad v + weight_decay theta)

    v is as it is in the paper: |v|^2 = 2 d, so a probe is sqrt(2) times as far off as MeZO's. The
    mean of the estimate is E[R^2] times the gradient, R being the range of K standard normal
    numbers: 3.65 times at K = 3, 5.01 at 4, 8.8 at 8. So lr counts that many times. Of two
    candidates v would be z_1 - z_2 but for a sign, which a two-sided estimate does not see: MeZO
    with two losses to no use. So K is at least 3.

    Forwards a step: K + 2, of which the logged loss is the mean. Keeps no state: which candidates
    were taken is recorded beside the projected gradient. The logged projected gradient has both
    terms of it, one with the other sign.

    The released code probes candidates by one stream of noise over all tensors, but makes v of a
    stream that begins anew at each tensor, so that v is what was probed in the first tensor alone.
    Here both are the same draws. It also keeps its best direction as a candidate of the next step,
    so that its first step has other forwards than all later ones; that is not in the paper's rule
    as we know it, and is left out.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_candidates: K.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; ``executor="in_place"`` cannot measure its
            points.
    """

    groups_by: ClassVar = "num_candidates"

    def __init__(
        self,
        model: nn.Module,
        *,
        num_candidates: Candidates = 4,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=BestLessWorst(num_candidates),
            update=SGD(),
            **common,
        )
