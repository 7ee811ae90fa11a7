"""ZO-AdaMU: probes that mix noise with a momentum, normalised steps (arXiv 2312.15184)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.base import DirectionContext
from smezo_cli.zo.directions.shaped import Shape, Shaped
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, Move, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.passes.draw import Numbers
from smezo_cli.zo.ranges import Decays, Epsilon, StepsBetween
from smezo_cli.zo.schedule import between
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check
from smezo_cli.zo.updates.base import Update, WeightWriter


@dataclass(frozen=True)
class Phases:
    """Says alpha, beta1 and beta2 of each step: the first values, a straight line, the last ones.

    Attributes:
        alpha: first and last value.
        beta1: likewise, above 0.
        beta2: likewise.
        anneal_from: step at which the line begins.
        anneal_to: step at which it ends.
    """

    alpha: Sequence[float]
    beta1: Sequence[float]
    beta2: Sequence[float]
    anneal_from: int
    anneal_to: int

    def __post_init__(self) -> None:
        for name in ("alpha", "beta1", "beta2"):
            pair = getattr(self, name)
            inside = len(pair) == 2 and all(0 < x < 1 for x in pair)
            check(inside, f"{name}={list(pair)}: two numbers above 0 and below 1")
        check(
            self.anneal_from <= self.anneal_to,
            f"anneal_to={self.anneal_to}: at least anneal_from, which is {self.anneal_from}",
        )

    def at(self, step: int) -> tuple[float, float, float]:
        """Return alpha, beta1 and beta2 of a step."""
        alpha, beta1, beta2 = (
            between(first, last, step, self.anneal_from, self.anneal_to)
            for first, last in (self.alpha, self.beta1, self.beta2)
        )
        return alpha, beta1, beta2


class AroundMomentum(Shaped):
    """Perturb along u(key) = beta1 z1 + (1 - beta1) z2, of noise z1 and z2 = m + other noise.

    What is drawn for a term are beta1 z1 and (1 - beta1) (z2 - m).

    Args:
        phases: of alpha and beta1.
    """

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self._phases = phases

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`.

        Raises:
            ValueError: noise should be kept; or as :class:`Shaped` says.
        """
        check(
            context.keep_noise is not True,
            "keep_noise=true keeps one draw of noise, and a probe of this method takes two: leave "
            "it out",
        )
        super().bind(context, 2 * num_terms)

    def numbers_of(self, step: int, move: Move) -> list[Numbers | None]:
        """See :class:`Dense`: two draws a term."""
        alpha, beta1, _ = self._phases.at(step)
        sizes = {"z": beta1 * math.sqrt(alpha), "z around m": (1 - beta1) * math.sqrt(1 - alpha)}
        terms = tuple(
            Term(t.key._replace(purpose=purpose), t.coefficient * size, t.only)
            for t in move.terms
            for purpose, size in sizes.items()
        )
        return super().numbers_of(step, replace(move, terms=terms))

    def shape(self, target: Target, step: int, total: float) -> Shape:
        """See :class:`Shaped`."""
        (m,), (_, beta1, _) = self.state.read(target), self._phases.at(step)
        along = total * (1 - beta1)
        return lambda part, z: z.add_(m[part] * along)


class NormalisedStep(Update):
    """Moves along u over the root of v, and keeps u as the momentum, with the sign of the slope.

    Args:
        phases: of the betas.
        least: added to v.
    """

    slots = ("momentum",)

    def __init__(self, phases: Phases, least: float) -> None:
        self.phases, self.least = phases, least

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        (term,), (_, beta1, beta2) = gradient.terms, self.phases.at(weights.step)
        slope = term.coefficient
        sign = math.copysign(1.0, slope) if slope else 0.0

        def change(drawn: Tensor, m: Tensor) -> Tensor:
            first, second = drawn[0], drawn[1]  # beta1 z1 and (1 - beta1) (z2 - m)
            z2 = (second / (1 - beta1)).add_(m)
            v = (first * first).mul_(beta2 / beta1**2).add_(z2.mul_(z2).mul_(1 - beta2))
            u = first.add_(second).add_(m * (1 - beta1))
            torch.mul(u, sign, out=m)
            return u.div_(v.add_(self.least).sqrt_()).mul_(-lr * slope)

        def change_of(target: Target) -> Callable[..., Tensor]:
            return change

        along = Gradient((term._replace(coefficient=1.0),))
        weights.by_draws(along, one_by_one, change_of, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        of_phases = {name: _plain(value) for name, value in vars(self.phases).items()}
        return {**of_phases, "least": self.least}


def one_by_one(draws: Iterable[Tensor]) -> Tensor:
    """Return the draws of some weights as rows (..., draws, n)."""
    return torch.stack(list(draws), -2)


def _plain(value: Any) -> Any:
    """Return a number, or a list of numbers that may be a sequence of another kind."""
    return value if isinstance(value, int) else [float(x) for x in value]


class ZOAdaMU(ZeroOrder):
    """Probe along noise mixed with a momentum, and divide the step by the root of its squares.

    One step, elementwise, with alpha, beta1 and beta2 of the step and m = 0 at first:

        z1 ~ N(0, sqrt(alpha)),  z2 ~ N(m, sqrt(1 - alpha))
        u = beta1 z1 + (1 - beta1) z2
        projected_grad = [L(theta + eps u) - L(theta - eps u)] / (2 eps)
        v = beta2 z1^2 + (1 - beta2) z2^2
        theta <- theta - lr (projected_grad u / sqrt(v + least) + weight_decay theta)
        m <- sign(projected_grad) u

    The second number of N is a standard deviation. v is made of this step's noise alone, and is not
    kept; it divides the step, not the probe, so that the step is u weight by weight, but not its
    direction: a weight moves by at most some lr |projected_grad|, where Adam moves it by some lr
    whatever the size of the gradient. The paper anneals alpha, beta1 and beta2 in three phases:
    here each has a first value (before ``anneal_from``) and a last one (from ``anneal_to`` on), and
    goes from one to the other on a straight line. Two forwards a step; m takes 4 bytes a weight.

    The released trainer cannot run: it calls a function without an argument that it needs. Its
    probe would mix z1 and z2 by 0.9 and 0.1 while its step mixes them by the annealed beta1, and
    the schedule would go on once a tensor, not once a step. Here probe and step take the same
    noise, the same m and the same values of the step. The phases' values and their line are our
    choice, but for the 0.9.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        alpha: first and last share of the variance that z1 has, both above 0 and below 1.
        beta1: first and last weight of z1 in u; likewise.
        beta2: first and last weight of z1^2 in v; likewise.
        anneal_from: step at which the three begin to change.
        anneal_to: step at which they have their last values.
        least: added to v.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise=True`` does not go with two
            draws.

    Raises:
        ValueError: an argument out of range.
    """

    groups_by: ClassVar = ""  # the momentum is that of one direction

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: Decays = (0.999, 0.9),
        beta1: Decays = (0.999, 0.9),
        beta2: Decays = (0.999, 0.9),
        anneal_from: StepsBetween = 1000,
        anneal_to: StepsBetween = 10_000,
        least: Epsilon = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        phases = Phases(alpha, beta1, beta2, anneal_from, anneal_to)
        super().__init__(
            model,
            selection=Everything(),
            direction=AroundMomentum(phases),
            estimator=TwoSided(),
            update=NormalisedStep(phases, least),
            **common,
        )
