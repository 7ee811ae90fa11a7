"""DiZO: zeroth-order steps, and projections of how far some tensors have gone (2502.03304)."""

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo, noise
from smezo_cli.zo.directions.base import DirectionContext
from smezo_cli.zo.directions.dense import Dense, DenseMover
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, Move
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.passes.draw import Numbers
from smezo_cli.zo.passes.eager import over_chunks
from smezo_cli.zo.ranges import Count, Globs, Noise, NotNegative, Positive, ProjectEvery, Shrink
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.selections.layers import frozen, layer_of
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.sums import sum_of_squares
from smezo_cli.zo.targets import Target, check, select
from smezo_cli.zo.updates.base import WeightWriter
from smezo_cli.zo.updates.sgd import SGD

START = "start"  # the name of the copies of theta_0 in the state

_CHUNK = 1 << 20  # entries whose difference to the start is held at once

_NAMED = 8  # tensors that a refusal names


@dataclass(frozen=True)
class Stretched(Move):
    """Hold a move, and by how much some tensors go on from their start behind it.

    theta' being a tensor moved by the terms: theta' + (middle + reach) (theta' - theta_0).

    Attributes:
        middle: of the tensors that are stretched, by name.
        reach: likewise.
    """

    middle: Mapping[str, float] = field(default_factory=dict)
    reach: Mapping[str, float] = field(default_factory=dict)

    def negated(self) -> "Stretched":
        """Return the point on the other side of the middle."""
        return replace(self, reach={name: -reach for name, reach in self.reach.items()})

    def by(self, target: Target) -> float:
        """Return the sum of both of a tensor; 0 of one that is not stretched."""
        return self.middle.get(target.name, 0.0) + self.reach.get(target.name, 0.0)


class FromStart(Dense):
    """Dense noise, and movers that stretch how far some tensors are from their start.

    Args:
        noise: "gaussian" or "rademacher".
        names: of these tensors.
    """

    def __init__(self, noise: str, names: frozenset[str]) -> None:
        super().__init__(noise)
        self.names = names

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`."""
        super().bind(context, num_terms)
        self.seed, self._is_stochastic = context.seed, context.is_stochastic
        self.projected = [target for target in context.targets if target.name in self.names]

    def mover(self, step: int, move: Move) -> DenseMover:
        """See :class:`Direction`."""
        if isinstance(move, Stretched):
            return StretchedMover(self, step, move, self.numbers_of(step, move))
        return super().mover(step, move)

    def start_of(self, target: Target) -> Tensor:
        """Return theta_0 of a tensor, flat."""
        return self.state.weights(START, target)

    def lengths(self, step: int, update: Move) -> dict[str, float]:
        """Return |theta - theta_0| of each tensor after an update that is still to be made."""
        mover, found = self.mover(step, update), {}
        for target in self.projected:
            moved = torch.empty_like(target.flat)
            mover.write(self.passes, target, moved)
            found[target.name] = distance(moved, self.start_of(target))
        return found

    def stretch(self, target: Target, by: float, step: int) -> None:
        """Set theta <- theta + by (theta - theta_0), rounded as updates are, by its own chance."""
        flat, start = target.flat, self.start_of(target)
        rounding = ROUNDINGS.get(flat.dtype) if self._is_stochastic else None
        key = torch.tensor(stream_key(self.seed, "round stretch", step, target.name))
        key = key.to(flat.device)

        def one(part: slice) -> None:
            value = stretched(flat[part], start[part], by)
            if rounding is not None:
                index = torch.arange(part.start, part.stop, device=flat.device)
                value = rounding(value, noise.rounding_at(index, flat.numel(), key))
            flat[part] = value.to(flat.dtype)

        over_chunks(flat.numel(), flat.device, one)


class StretchedMover(DenseMover):
    """Writes copies of tensors as an update will leave them, stretched; the weights are only read.

    Args:
        direction: that it is of.
        step: number of the step.
        move: the update and what follows it.
        numbers: of the update.
    """

    def __init__(
        self, direction: FromStart, step: int, move: Stretched, numbers: list[Numbers | None]
    ) -> None:
        super().__init__(direction, step, move, numbers)
        self._from_start, self._there = direction, move
        self.passes = direction.passes  # whose rounding the update has

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target = self._updated(parameter, out)
        self._write(target, out, self._there, out)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        target = self._updated(parameter, plus)
        self._write(target, plus, self._there.negated(), minus)
        self._write(target, plus, self._there, plus)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        moved, target = super().rows(parameter, rows), self._from_start.target_of(parameter)
        if not (by := self._there.by(target)):
            return moved
        start = self._from_start.start_of(target).view(parameter.shape)
        return stretched(moved, start.index_select(0, rows), by).to(moved.dtype)

    def _updated(self, parameter: Tensor, out: Tensor) -> Target:
        """Write what the update makes of a tensor, with its own rounding; return the target."""
        target = self._from_start.target_of(parameter)
        self.write(self.passes, target, out)
        return target

    def _write(self, target: Target, moved: Tensor, there: Stretched, out: Tensor) -> None:
        if not (by := there.by(target)):
            if out is not moved:
                out.copy_(moved)
            return
        start = self._from_start.start_of(target)

        def one(part: slice) -> None:
            out[part] = stretched(moved[part], start[part], by).to(out.dtype)

        over_chunks(out.numel(), out.device, one)


def stretched(moved: Tensor, start: Tensor, by: float) -> Tensor:
    """Return moved + by (moved - start) in float32."""
    moved = moved.float()
    return (moved - start.float()).mul_(by).add_(moved)


def distance(moved: Tensor, start: Tensor) -> float:
    """Return |moved - start| of flat tensors, the same on every machine.

    A sum of squares of numbers of size 1 is exact, see :mod:`smezo_cli.zo.sums`; so the entries are
    scaled by a power of two.
    """

    def differences() -> Iterator[Tensor]:
        for i in range(0, moved.numel(), _CHUNK):
            part = slice(i, i + _CHUNK)
            yield moved[part].float() - start[part].float()

    largest = max(float(part.abs().max()) for part in differences())
    scale = 2.0 ** math.frexp(largest)[1]
    return scale * math.sqrt(math.fsum(sum_of_squares(p.double() / scale) for p in differences()))


class KeepingStart(SGD):
    """SGD, with copies of some tensors as they were before the first step.

    Args:
        names: of these tensors.
    """

    copies = (START,)

    def __init__(self, names: frozenset[str]) -> None:
        self.copied = names

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        if weights.step == 0:
            weights.copy_weights(START)
        super().apply(weights, gradient, lr)


class Projection:
    """Find, by two-sided steps on one number a tensor, how far from the start each is to be.

    See :class:`DiZO` for the rule. A step records the slopes of the inner steps, from which the
    numbers follow; of a step without a projection they are zeros.

    Args:
        direction: moves the tensors.
        every: kappa.
        inner_steps: of a projection.
        eps: eps_p.
        lr: s.
        bound: tau.
    """

    def __init__(
        self,
        direction: FromStart,
        every: int,
        inner_steps: int,
        eps: float,
        lr: float,
        bound: float,
    ) -> None:
        check(every >= 2, f"project_every={every}: a whole number of at least 2")
        check(inner_steps >= 1, f"project_steps={inner_steps}: must be at least 1")
        check(eps > 0, f"project_eps={eps}: must be above 0")
        check(lr >= 0, f"project_lr={lr}: must not be negative")
        check(0 < bound < 1, f"project_bound={bound}: a number in (0, 1)")
        self._direction, self.every, self.num_scalars = direction, every, inner_steps
        self.eps, self.lr, self.bound = eps, lr, bound

    def is_due(self, step: int) -> bool:
        """Return whether a step ends with a projection: every so many steps."""
        return (step + 1) % self.every == 0

    def forwards(self, step: int) -> int:
        """See :class:`Phase`."""
        return 2 * self.num_scalars if self.is_due(step) else 0

    def measure(self, ask: Ask, update: Move) -> list[float]:
        """See :class:`Phase`."""
        slopes: list[float] = []
        if not self.is_due(ask.step):
            return [0.0] * self.num_scalars
        lengths = self._direction.lengths(ask.step, update)
        draws = self._draws(ask.step, lengths)
        for z in draws:
            middle = self._changes(slopes, draws)
            # gamma +- eps_p z, over |Delta|; a tensor that has not moved has nothing to stretch
            reach = {name: self.eps * z[name] / (lengths[name] or 1.0) for name in lengths}
            there = Stretched(update.terms, update.decay, middle=middle, reach=reach)
            ((plus, minus),) = ask.losses([(there, there.negated())])
            slopes.append((plus - minus) / (2 * self.eps))
        return slopes

    def apply(self, weights: WeightWriter, scalars: Sequence[float]) -> None:
        """See :class:`Phase`."""
        direction, step = self._direction, weights.step
        if not self.is_due(step):
            return
        lengths = {t.name: distance(t.flat, direction.start_of(t)) for t in direction.projected}
        changes = self._changes(scalars, self._draws(step, lengths))
        for target in direction.projected:
            if by := changes[target.name]:
                direction.stretch(target, by, step)

    def _draws(self, step: int, lengths: Mapping[str, float]) -> list[dict[str, float]]:
        """Return the z of each inner step, cut so that eps_p z is at most tau |Delta|, by name."""
        seed, names = self._direction.seed, list(lengths)
        found = []
        for inner in range(self.num_scalars):
            keys = [stream_key(seed, "gamma", step, inner, name) for name in names]
            first = torch.zeros(len(names), dtype=torch.int64)
            drawn = noise.draw(first, 1, torch.tensor(keys).T, "gaussian").tolist()
            bounds = [self.bound * lengths[name] / self.eps for name in names]
            cut = [max(-b, min(z, b)) for z, b in zip(drawn, bounds, strict=True)]
            found.append(dict(zip(names, cut, strict=True)))
        return found

    def _changes(
        self, slopes: Sequence[float], draws: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """Return gamma / |Delta| - 1 of each tensor after so many inner steps."""
        changes = dict.fromkeys(draws[0], 0.0)
        for slope, z in zip(slopes, draws, strict=False):
            for name, change in changes.items():
                moved = change - self.lr * slope * z[name]  # both sides over |Delta|
                changes[name] = max(-self.bound, min(moved, self.bound))
        return changes

    def identity(self) -> dict[str, Any]:
        """See :class:`Phase`."""
        return {
            "project": sorted(self._direction.names),
            "project_every": self.every,
            "project_steps": self.num_scalars,
            "project_eps": self.eps,
            "project_lr": self.lr,
            "project_bound": self.bound,
        }


def projected(targets: Sequence[Target], globs: Iterable[str]) -> frozenset[str]:
    """Return the names of the tensors that some globs match.

    Raises:
        ValueError: a glob matches none of the trained tensors.
    """
    found: set[str] = set()
    names = [target.name for target in targets]
    for glob in globs:
        matched = fnmatch.filter(names, glob)
        if not matched:
            first = next((layer for name in names if (layer := layer_of(name))), "")
            there = [name for name in names if layer_of(name) == first]
            more = ", ..." if len(there) > _NAMED else ""
            raise ValueError(
                f"project {glob!r} matches no trained tensor; there are {', '.join(there[:_NAMED])}"
                f"{more}: give globs of the tensors whose distance from the start is projected"
            )
        found.update(matched)
    check(bool(found), "project=[] names no tensor; give globs, or use method=mezo")
    return frozenset(found)


class DiZO(ZeroOrder):
    """Take MeZO's steps, and now and then set how far some tensors are from where they began.

    A step is MeZO's, for queries q = 1..Q with z_q ~ N(0, I):

        projected_grad_q = [L(theta + eps z_q) - L(theta - eps z_q)] / (2 eps)
        theta <- theta - lr (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    Every ``project_every`` steps a projection follows on the same batch. With Delta_l =
    theta_l - theta_0l of each projected tensor l, gamma_l = |Delta_l| at first, L taken at
    theta_l = theta_0l + gamma_l Delta_l / |Delta_l|, and ``project_steps`` times:

        z_l ~ N(0, 1), cut to project_bound |Delta_l| / project_eps in size
        g = [L(gamma + project_eps z) - L(gamma - project_eps z)] / (2 project_eps)
        gamma_l <- gamma_l - project_lr |Delta_l| g z_l,
                   cut to between (1 - project_bound) |Delta_l| and (1 + project_bound) |Delta_l|

    and at last theta_l <- theta_0l + gamma_l Delta_l / |Delta_l|. One g is of all tensors, z_l of
    each. Where project_bound |Delta_l| is below project_eps, as in short runs at a small lr, z_l is
    little more than a sign.

    Kept: the start weights of the projected tensors, in their dtype (2 bytes a weight of them, or
    4); the files of the model are not read again, as a run may begin with weights that are in no
    file, such as those of an adapter. A step records the slopes g, so that a replay needs no
    forward. Forwards a step: 2 Q, and 2 project_steps more with a projection. The logged loss is
    the mean of all of these.

    The released code finds the tensors by names of OPT and takes keys and values; the text of the
    paper is said to take queries and values: give ``project`` for these. It writes each probe of a
    projection to the weights and undoes it by a division, which rounds 20 times in float16; here
    the weights are only read until all is measured, and theta_l + (gamma_l / |Delta_l| - 1) Delta_l
    is written once. Its embedding stays untrained, here only by ``freeze``. That a
    projection comes behind the last of ``project_every`` steps, has the step's batch and the bound
    of each tensor's own |Delta_l|, is our reading.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        project: globs of the trained tensors that are projected.
        project_every: steps from one projection to the next.
        project_steps: inner steps of a projection.
        project_eps: how far a probe moves gamma.
        project_lr: step size of gamma, as a share of |Delta_l|.
        project_bound: share of |Delta_l| by which a projection may change it, in (0, 1).
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.

    Raises:
        ValueError: a glob of ``project`` matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        project: Globs = ("*k_proj*", "*v_proj*"),
        project_every: ProjectEvery = 50,
        project_steps: Count = 10,
        project_eps: Positive = 0.1,
        project_lr: NotNegative = 2.0,
        project_bound: Shrink = 0.2,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        freeze = common["freeze"] = frozen(model, common)
        names = projected(select(dynamo.original(model), freeze, []), project)
        direction = FromStart(noise, names)
        super().__init__(
            model,
            selection=Everything(),
            direction=direction,
            estimator=TwoSided(num_queries),
            update=KeepingStart(names),
            phase=Projection(
                direction, project_every, project_steps, project_eps, project_lr, project_bound
            ),
            **common,
        )
        self._names = names

    @property
    def remark(self) -> str:
        """Return how many tensors are projected, and what their start weights take."""
        return f"projects {len(self._names)} tensors, whose start takes {self.state_bytes:,} bytes"
