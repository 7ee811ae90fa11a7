"""AdaMeZO: Adam whose moments are made again from the last few steps (arXiv 2605.00650)."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, Key, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Decays, Epsilon, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.adam import Adam
from smezo_cli.zo.updates.base import WeightWriter


class TruncatedAdam(Adam):
    """Makes Adam's moments from the projected gradients of the last steps, and keeps only those.

    Args:
        betas: see :class:`Adam`.
        adam_eps: likewise.
        horizon: h, steps that the moments are made of.
    """

    slots = ()

    def __init__(self, betas: Sequence[float], adam_eps: float, horizon: int) -> None:
        super().__init__(betas, adam_eps)
        self.horizon = horizon

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`.

        Raises:
            ValueError: weights were restored without the projected gradients that belong to them.
        """
        kept, num_queries = weights.state.numbers, len(gradient.terms)
        grads = [t.coefficient / gradient.divisor for t in gradient.terms]
        before, step = kept.get("records", []), weights.step
        has_all = before[-1][0] == step - 1 if before else step == 0
        check(has_all, f"the projected gradients before step {step} were not restored")
        kept["records"] = [*before, [step, grads]][-self.horizon :]
        terms = tuple(
            Term(Key(made, query), grad)
            for made, of_step in kept["records"]
            for query, grad in enumerate(of_step)
        )
        ages = range(len(kept["records"]) - 1, -1, -1)
        shares, of_squares = ([beta**age for age in ages] for beta in self.betas)
        size, root = -lr / sum(shares), math.sqrt(sum(of_squares))

        def fold(draws: Iterable[Tensor]) -> Tensor:
            m: Tensor | None = None
            v: Tensor | None = None
            left = iter(draws)
            for share, share_of_square in zip(shares, of_squares, strict=True):
                g = next(left)
                for other in itertools.islice(left, num_queries - 1):
                    g = g + other
                m = g * share if m is None else m.add_(g * share)
                square = g.mul_(g).mul_(share_of_square)
                v = square if v is None else v.add_(square)
            assert m is not None
            assert v is not None
            return m.div_(v.sqrt_().div_(root).add_(self.adam_eps)).mul_(size)

        decay = lr * weights.weight_decay
        weights.by_draws(Gradient(terms), fold, lambda target: lambda step: step, decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {**super().identity(), "horizon": self.horizon}


class AdaMeZO(ZeroOrder):
    """Take Adam's step by moments of the last h estimates, which are drawn again in each step.

    With MeZO's estimate g_t of step t = 1, 2, ... and n = min(t, h), elementwise:

        m = sum_{i=0}^{n-1} beta1^i g_{t-i} / sum_{i=0}^{n-1} beta1^i
        v = sum_{i=0}^{n-1} beta2^i g_{t-i}^2 / sum_{i=0}^{n-1} beta2^i
        theta <- theta - lr (m / [sqrt(v) + adam_eps] + weight_decay theta)

    Of a step it keeps the projected gradients alone, h Q numbers in all, and no tensor: the noise
    of h steps is drawn again part by part, so that the moments are nowhere as large as a tensor.
    Two forwards a query; an update draws h times what MeZO's does.

    The divisors are the bias correction: (1 - beta) sum_i beta^i = 1 - beta^n, which is Adam's
    while t <= h, and stays that of h terms then. As long as h is at least the number of steps, this
    is Adam.

    Where it leaves the released code (shawnnn3di/AdaMeZO):

    * The code has no correction: both sums are taken as they are. At the defaults that makes the
      quotient sum_i beta1^i / sqrt(sum_i beta2^i) = 1.27 times as large.
    * It multiplies the quotient by 100, so that its lr of 1e-7 (README, OPT-1.3B) is 1.27e-5 here.
    * Its first h + 1 steps are those of MeZO, at the same lr without the 100; here the sums are
      shorter at first.
    * It adds 1e-5 to the root of the sum, which would be an adam_eps of 4e-6.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        horizon: h, steps that the moments are made of.
        betas: decay of the moments, each in [0, 1).
        adam_eps: added to the root of the second moment; Adam's own epsilon, not the probe's.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped before they
            are kept. ``keep_noise`` is about the probes alone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        horizon: Count = 10,
        betas: Decays = (0.7, 0.9),
        adam_eps: Epsilon = 1e-8,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=TruncatedAdam(betas, adam_eps, horizon),
            **common,
        )
