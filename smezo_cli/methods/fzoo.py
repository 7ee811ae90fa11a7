"""FZOO: one-sided steps along signs, divided by the spread of their losses (arXiv 2506.09034)."""

import statistics
from typing import Any, ClassVar, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.one_sided import OneSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common, check_common
from smezo_cli.zo.ranges import Noise, Positive, Several, YesNo
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.base import Update, WeightWriter


class BySpread(Update):
    """Divides the mean of a step's differences by their spread, which has a floor.

        d_i = L(theta + eps u_i) - L(theta),  i = 1..n
        theta <- theta - lr [1/n sum_i d_i u_i / max(sigma, sigma_floor) + weight_decay theta]

    sigma is the population's standard deviation of the d_i, or of these and those of the step
    before.

    Args:
        eps: radius of the probe, by which d_i is eps times a projected gradient.
        sigma_floor: of sigma, in units of the loss.
        reuse_losses: keep the differences, and let them enter the sigma of the next step.
    """

    def __init__(self, eps: float, sigma_floor: float, reuse_losses: bool) -> None:
        check(sigma_floor > 0, f"sigma_floor={sigma_floor}: must be above 0")
        self.eps, self.sigma_floor, self.reuse_losses = eps, sigma_floor, reuse_losses

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        differences = [self.eps * term.coefficient for term in gradient.terms]
        kept = weights.state.numbers
        before = kept["differences"] if self.reuse_losses and weights.step else []
        sigma = statistics.pstdev([*before, *differences])
        if self.reuse_losses:
            kept["differences"] = differences
        scale = self.eps / max(sigma, self.sigma_floor)
        weights.move(gradient, -lr * scale, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"sigma_floor": self.sigma_floor, "reuse_losses": self.reuse_losses}


class FZOO(ZeroOrder):
    """Step along N random sign vectors at once, as far as lr says in units of their losses' spread.

    One step, with u_i of independent signs, i = 1..N:

        l_0 = L(theta),  l_i = L(theta + eps u_i)
        sigma^2 = 1/N sum_i (l_i - 1/N sum_j l_j)^2
        theta <- theta - lr [1/(N max(sigma, sigma_floor)) sum_i (l_i - l_0) u_i
                             + weight_decay theta]

    As sigma is about eps |grad L|, the length of a step depends on lr alone, like that of
    normalised SGD. Forwards a step: N + 1, as one batch where the model and the memory allow it
    (``executor="batched"``). Keeps no state. One-sided differences have a bias of O(eps) where the
    loss is no quadratic.

    sigma is the population's, 1/N, as in the released code; the paper has 1/(N - 1), which at N = 8
    takes 0.94 of the step. Neither has a floor. On a flat loss sigma is then rounding, or nothing
    beside differences that the curvature makes all alike, and a step destroys the weights. Under
    the floor a step is one of SGD, at lr eps / sigma_floor. The floor is a loss, as sigma is. Its
    default, 1e-4, is our choice: at eps 1e-3 a gradient of length 0.1 has that sigma, SmolLM2-135M
    has 0.01 to 0.03 (four steps on 8 rows of Rotten Tomatoes, float32), and a float32 loss is
    rounded to some 1e-7. A floor of 1e-2 would bind in many such steps; with another eps it is to
    be scaled.

    The released code also draws signs that its update cannot draw again, and normalises
    probabilities twice; its reuse of losses never begins.

    ``reuse_losses=True`` is our reading of FZOO-R, which we know from a summary: a step has N / 2
    new directions, over which it is a mean, and sigma is that of N differences l_i - l_0, its own
    and those of the step before, each to the l_0 of its step (losses of two batches differ by more
    than sigma). The first step has its own alone. N / 2 + 1 forwards; N / 2 numbers are kept.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: N, losses that sigma is taken of; at least 2.
        sigma_floor: least sigma, in units of the loss.
        reuse_losses: take half of these losses from the step before; N is then even, at least 4.
        noise: "rademacher" or "gaussian".
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients (l_i - l_0) / eps are
            clipped before sigma is taken. ``executor`` is "batched" unless given.

    Raises:
        ValueError: num_queries does not go with reuse_losses.
    """

    measures_pairs: ClassVar = False
    groups_by: ClassVar = ""  # all differences have one loss in common

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Several = 8,
        sigma_floor: Positive = 1e-4,
        reuse_losses: YesNo = False,
        noise: Noise = "rademacher",
        **common: Unpack[Common],
    ) -> None:
        check_common(type(self).__name__, common)
        check(num_queries >= 2, f"num_queries={num_queries}: one loss has no spread; 2 or more")
        check(
            not reuse_losses or (num_queries >= 4 and num_queries % 2 == 0),
            f"num_queries={num_queries} beside reuse_losses=true, which takes half of the losses "
            "from the step before: give an even number of at least 4",
        )
        common.setdefault("executor", "batched")
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=OneSided(num_queries // 2 if reuse_losses else num_queries),
            update=BySpread(common["eps"], sigma_floor, reuse_losses),
            **common,
        )
