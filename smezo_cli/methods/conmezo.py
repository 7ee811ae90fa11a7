"""ConMeZO: probes within a cone around a momentum of the estimates (arXiv 2511.02757)."""

import math
from typing import Any, Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.base import DirectionContext
from smezo_cli.zo.directions.shaped import Shape, Shaped
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Angle, Count, Fraction, Noise, StepsBetween
from smezo_cli.zo.schedule import between
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.sums import squares_in_units
from smezo_cli.zo.targets import Target, check
from smezo_cli.zo.updates.base import Update, WeightWriter


class Cone(Shaped):
    """Perturb along u(key) = sqrt(d) cos(phi) m / |m| + sin(phi) z; as long as there is no m, z.

    d weights are trained, and |m| is the norm of the m of all of them.

    Args:
        phi: the angle.
        noise: "gaussian" or "rademacher".
    """

    def __init__(self, phi: float, noise: str) -> None:
        super().__init__(noise)
        self.phi = phi

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`."""
        super().bind(context, num_terms)
        self._length = math.sqrt(sum(target.num_trained for target in context.targets))

    def shape(self, target: Target, step: int, total: float) -> Shape:
        """See :class:`Shaped`."""
        norm, (m,) = self.state.numbers.get("norm", 0.0), self.state.read(target)
        if not norm:
            return lambda part, z: z
        along, across = total * self._length * math.cos(self.phi) / norm, math.sin(self.phi)
        return lambda part, z: z.mul_(across).add_(m[part] * along)

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return {**super().identity(), "phi": self.phi}


class ConeMomentum(Update):
    """Moves along g, then lets m follow g, and measures |m|.

    Args:
        beta: decay of m after the warm-up.
        beta_start: decay of m before it.
        warmup_from: step at which it begins.
        warmup_to: step at which it ends.
    """

    slots = ("momentum",)

    def __init__(self, beta: float, beta_start: float, warmup_from: int, warmup_to: int) -> None:
        check(
            warmup_from <= warmup_to,
            f"warmup_to={warmup_to}: at least warmup_from, which is {warmup_from}",
        )
        self.beta, self.beta_start = beta, beta_start
        self.warmup_from, self.warmup_to = warmup_from, warmup_to

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        kept, ends = weights.state.numbers, (self.beta_start, self.beta)
        beta = between(*ends, weights.step, self.warmup_from, self.warmup_to)
        num_weights = sum(target.num_trained for target in weights.targets)
        slope = sum(abs(t.coefficient) for t in gradient.terms) / gradient.divisor
        # About the size of an entry of m, or above it.
        size = beta * kept.get("norm", 0.0) / math.sqrt(num_weights) + (1 - beta) * slope
        unit = 2.0 ** max(math.frexp(size)[1] - 14, -112)
        squares: list[int] = []  # of parts, which come in any order

        def change(g: Tensor, m: Tensor) -> Tensor:
            m.mul_(beta).add_(g * (1 - beta))
            squares.append(squares_in_units(m, unit))
            return g * -lr

        weights.elementwise(gradient, change, decay=lr * weights.weight_decay)
        kept["norm"] = math.sqrt(sum(squares)) * unit

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        names = ("beta", "beta_start", "warmup_from", "warmup_to")
        return {name: getattr(self, name) for name in names}


class ConMeZO(ZeroOrder):
    """Probe around a momentum of the estimates, at the angle phi to it.

    One step, for queries q = 1..Q with z_q ~ N(0, I) and d trained weights:

        x_q = sqrt(d) cos(phi) m / |m| + sin(phi) z_q
        projected_grad_q = [L(theta + eps x_q) - L(theta - eps x_q)] / (2 eps)
        g = 1/Q sum_q projected_grad_q x_q
        theta <- theta - lr (g + weight_decay theta)
        m <- beta_t m + (1 - beta_t) g

    beta_t is ``beta_start`` before step ``warmup_from``, ``beta`` from step ``warmup_to`` on, and
    on the straight line in between. x_q is about as long as z_q; while m is 0, as at the first
    step, x_q = z_q. |m| is that of all tensors together: one cone, not one a tensor. The mean of
    the estimate is not the gradient: what lies along m is lengthened d cos(phi)^2 times, the rest
    shortened by sin(phi)^2. Two forwards a query; m takes 4 bytes a weight.

    The released code divides by the norm that m has on average, by a formula, and begins with a
    random m; here the norm is measured in each step, by sums that are exact in any order. Its
    momentum is in the dtype of the weights, its warm-up fixed at steps 200 and 2000.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        phi: angle to the momentum; pi / 2 is MeZO.
        beta: decay of m after the warm-up, in [0, 1).
        beta_start: decay of m before it.
        warmup_from: step at which the warm-up of beta begins.
        warmup_to: step at which it ends.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.

    Raises:
        ValueError: the warm-up ends before it begins.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        phi: Angle = 1.35,
        beta: Fraction = 0.99,
        beta_start: Fraction = 0.1,
        warmup_from: StepsBetween = 200,
        warmup_to: StepsBetween = 2000,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Cone(phi, noise),
            estimator=TwoSided(num_queries),
            update=ConeMomentum(beta, beta_start, warmup_from, warmup_to),
            **common,
        )
