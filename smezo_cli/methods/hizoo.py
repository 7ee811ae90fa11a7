"""HiZOO: probes and steps scaled by a diagonal curvature (arXiv 2402.15173)."""

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.shaped import Shape, Shaped
from smezo_cli.zo.estimators.second_difference import PairAndCentre
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Epsilon, Fraction
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.base import Update, WeightWriter


def curvature_of(excess: Tensor, least: float) -> Tensor:
    """Return H >= least, of which the state holds H - 1: it is 1 at first."""
    return (excess + 1).clamp_(min=least)


class ByCurvature(Shaped):
    """Perturb along u(key) = z / sqrt(H).

    Args:
        least: bounds H from below.
    """

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def shape(self, target: Target, step: int, total: float) -> Shape:
        """See :class:`Shaped`."""
        (excess,) = self.state.read(target)
        return lambda part, z: z.div_(curvature_of(excess[part], self.least).sqrt_())


class StepThenCurvature(Update):
    """Moves along the u that was probed, and changes H only then.

    Args:
        alpha: weight of a step's curvature.
        least: bounds H from below.
    """

    slots = ("excess_curvature",)

    def __init__(self, alpha: float, least: float) -> None:
        self.alpha, self.least = alpha, least

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        (term,) = gradient.terms
        size, curvature = -lr * term.coefficient, gradient.also["curvature"]

        def change(u: Tensor, excess: Tensor) -> Tensor:
            h = curvature_of(excess, self.least)
            new = (u * u).mul_(h).mul_(curvature).sub_(1).mul_(h)  # curvature H z^2 - H
            excess.add_(new.mul_(self.alpha)).clamp_(min=self.least - 1)
            return u.mul_(size)

        along = Gradient((term._replace(coefficient=1.0),))
        weights.elementwise(along, change, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"alpha": self.alpha, "least": self.least}


class HiZOO(ZeroOrder):
    """Divide probe and step by the root of a curvature that the losses themselves tell.

    H is the diagonal curvature (the paper writes Sigma for its inverse), 1 at first. One step, with
    z ~ N(0, I), elementwise:

        u = z / sqrt(H)
        projected_grad = [L(theta + eps u) - L(theta - eps u)] / (2 eps)
        curvature = |L(theta + eps u) + L(theta - eps u) - 2 L(theta)| / (2 eps^2)
        theta <- theta - lr (projected_grad u + weight_decay theta)
        H <- max((1 - alpha) H + alpha curvature H z^2, least)

    Three forwards a step, and the logged loss is their mean, that at the weights among them. It
    keeps H - 1 in float32: 4 bytes a weight. Near 1 that holds what alpha 1e-8 adds, where H itself
    would round it away. At this alpha and eps 1e-3 a step changes H by some 5e-3 times the second
    difference of its losses, so that for long these are all but MeZO's steps.

    The paper and its code change H first and step along z / sqrt(H) of the new H, which is not the
    direction whose slope was measured. Here the H that was probed with is that of the step. The
    released code keeps H in the dtype of the weights, where float16 takes 1 - 1e-8 for 1; it makes
    a fourth forward for its log; and nothing bounds H: ``least`` is that of another
    implementation that needed it.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        alpha: weight of a step's curvature, in [0, 1); 0 is MeZO.
        least: bounds H from below.
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped in the step,
            the curvature is as it was measured.
    """

    groups_by: ClassVar = ""  # three losses are one slope and one curvature

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: Fraction = 1e-8,
        least: Epsilon = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=ByCurvature(least),
            estimator=PairAndCentre(),
            update=StepThenCurvature(alpha, least),
            **common,
        )
