"""HELENE: annealed momentum over a bounded diagonal curvature (arXiv 2411.10696)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Epsilon, Fraction, Noise, NotNegative, Positive
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.sums import sum_of_squares
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.base import Update, WeightWriter


class AnnealedCurvature(Update):
    """Divide an annealed mean of gradients by a curvature that is bounded from below.

    Args:
        beta1: decay of the mean m.
        beta2: decay of the curvature h.
        anneal_steps: T; the weight of a new gradient falls from 1 to beta1 over some T steps.
        curvature_every: steps between two updates of h.
        curvature_rows: B, rows that a loss is the mean of.
        gamma: factor of the curvature.
        bound: factor of the bounds.
        least: added to the divisor.
    """

    slots = ("mean", "curvature")

    def __init__(
        self,
        beta1: float,
        beta2: float,
        anneal_steps: float,
        curvature_every: int,
        curvature_rows: float,
        gamma: float,
        bound: float,
        least: float,
    ) -> None:
        self.beta1, self.beta2, self.anneal_steps = beta1, beta2, anneal_steps
        self.curvature_every, self.curvature_rows = curvature_every, curvature_rows
        self.gamma, self.bound, self.least = gamma, bound, least

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        beta1, beta2 = self.beta1, self.beta2
        new = beta1 + (1 - beta1) * math.exp(-weights.step / self.anneal_steps)
        is_due = weights.step % self.curvature_every == 0
        kept = weights.state.numbers
        if "bounds" not in kept:
            kept["bounds"] = self._bounds(weights.targets)

        def change_of(target: Target) -> Callable[..., Tensor]:
            bound = kept["bounds"][target.name]

            def change(g: Tensor, m: Tensor, h: Tensor) -> Tensor:
                m.mul_(beta1).add_(g * new)
                if is_due:
                    h.mul_(beta2).add_((g * g).mul_((1 - beta2) * self.curvature_rows))
                divisor = torch.clamp(h, min=bound).mul_(self.gamma).add_(self.least)
                return (m / divisor).mul_(-lr)

            return change

        weights.by_target(gradient, change_of, decay=lr * weights.weight_decay)

    def _bounds(self, targets: Sequence[Target]) -> dict[str, float]:
        """Return R / (2 sqrt(d)) of each tensor's d weights of norm R, by name, from 1e-8 up.

        A tensor of zeros, such as LoRA's B, has that of all tensors together.
        """
        squares = {t.name: sum_of_squares(t.flat) for t in targets}
        numbers = {t.name: t.parameter.numel() for t in targets}
        whole = math.fsum(squares.values()) / sum(numbers.values())
        sizes = {n: math.sqrt(s / numbers[n] if s else whole) for n, s in squares.items()}
        return {name: max(self.bound * size / 2, 1e-8) for name, size in sizes.items()}

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        names = "beta1 beta2 anneal_steps curvature_every curvature_rows gamma bound least"
        return {name: getattr(self, name) for name in names.split()}


class Helene(ZeroOrder):
    """Keep a mean of MeZO's estimates and, of their squares, a curvature that is not too small.

    With MeZO's estimate g at step t = 0, 1, ..., elementwise:

        a_t = beta1 + (1 - beta1) exp(-t / anneal_steps)
        m <- beta1 m + a_t g
        every curvature_every steps: h <- beta2 h + (1 - beta2) curvature_rows g^2
        theta <- theta - lr m / (gamma max(h, bound_i) + least) - lr weight_decay theta

    The curvature is the Gauss-Newton-Bartlett estimate with true labels, taken from the two-sided
    estimate rather than from a gradient. bound_i of tensor i is ``bound`` times R_i / (2 sqrt(d_i))
    with the norm R_i of its d_i weights at the first step (of a tensor of zeros: of all weights).
    It keeps m and h: 8 bytes a weight. Forwards a step: 2 a query.

    h of a weight tends to curvature_rows p^2, p being the projected gradient, and has come to the
    share 1 - beta2^(1 + t // curvature_every) of it at step t. So at a constant lr and the defaults
    the steps of a typical weight fall a hundredfold in some 1,000 steps, to about
    2 lr / (curvature_rows |p|), where those of MeZO are lr |p|; of weights whose first draws were
    near 0 they fall from more.

    No code was released. What the notes on the paper do not settle is our choice: that the bound is
    of each tensor and its factor 1, that h begins at 0 and is not corrected for it, and T.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        beta1: decay of m, in [0, 1).
        beta2: decay of h, in [0, 1).
        anneal_steps: T, steps over which the weight of a new gradient falls from 1 towards beta1.
        curvature_every: k, steps between two updates of h.
        curvature_rows: B, rows of a batch, of which the loss is the mean.
        gamma: factor of the curvature.
        bound: factor of the bounds of h from below; 0: 1e-8 bounds it.
        least: added to the divisor.
        num_queries: directions in a step.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta1: Fraction = 0.9,
        beta2: Fraction = 0.99,
        anneal_steps: Positive = 1000.0,
        curvature_every: Count = 10,
        curvature_rows: Positive = 16.0,
        gamma: Positive = 1.0,
        bound: NotNegative = 1.0,
        least: Epsilon = 1e-8,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=AnnealedCurvature(
                beta1, beta2, anneal_steps, curvature_every, curvature_rows, gamma, bound, least
            ),
            **common,
        )
