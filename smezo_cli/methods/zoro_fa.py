"""ZORO-FA: recover a sparse gradient from few random measurements, CoSaMP (arXiv 2501.11616)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo, noise
from smezo_cli.zo.directions.base import DirectionContext
from smezo_cli.zo.directions.dense import Dense, DenseMover
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Move, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.passes.choose import Passes
from smezo_cli.zo.passes.draw import Numbers
from smezo_cli.zo.passes.eager import blend
from smezo_cli.zo.ranges import Count, NotNegative, Positive
from smezo_cli.zo.selections.layers import frozen
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.step import StepRecord
from smezo_cli.zo.targets import Target, check, select
from smezo_cli.zo.updates.base import Update, WeightWriter

MOST_WEIGHTS, MOST_MEASUREMENTS = 100_000, 4_000
_DECODED = "decoded"  # purpose of the key that stands for a decoded gradient
_CHUNK = 1 << 22  # signs drawn, or multiplied, at once
_BITS = 40  # kept of a number that is summed: 4096 such sums are exact in float64


# --- decoding: functions of numbers alone, with the same bits on every machine ------------------


def on_bits(x: Tensor) -> Tensor:
    """Return float64 numbers rounded to 40 bits below the largest of them.

    Sums of 4096 of them, with any signs, are exact, so that no library's order changes a bit.
    """
    top = float(x.abs().max()) if x.numel() else 0.0
    if top == 0.0:
        return x
    grid = math.ldexp(1.0, math.frexp(top)[1] - _BITS)
    return (x / grid).round() * grid


def correlations(signs: Tensor, residual: Tensor) -> Tensor:
    """Return signs^T residual, exactly: signs int8 (m, n), residual of :func:`on_bits` (m,)."""
    total = torch.zeros(signs.shape[1], dtype=torch.float64)
    rows = max(1, _CHUNK // signs.shape[1])
    for start in range(0, len(signs), rows):
        part = slice(start, start + rows)
        total += residual[part] @ signs[part].double()
    return total


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """Return x with gram x = right, by Cholesky, column by column in a fixed order.

    A column that is a combination of those before it gets 0.
    """
    gram, right, size = gram.clone(), right.clone(), len(gram)
    lower, x = torch.zeros_like(gram), torch.zeros_like(right)
    least = 1e-9 * float(gram.diagonal().max()) if size else 0.0
    for k in range(size):
        pivot = float(gram[k, k])
        if pivot <= least:
            continue
        lower[k, k] = root = math.sqrt(pivot)
        lower[k + 1 :, k] = column = gram[k + 1 :, k] / root
        gram[k + 1 :, k + 1 :] -= column[:, None] * column
        x[k] = right[k] / root
        right[k + 1 :] -= column * x[k]
    for k in reversed(range(size)):
        if lower[k, k] > 0:
            x[k] /= lower[k, k]
            x[:k] -= lower[k, :k] * x[k]
    return x


def largest(x: Tensor, count: int) -> Tensor:
    """Return the places of the largest numbers by size, in order; of equal ones the first."""
    return torch.sort(x.abs(), descending=True, stable=True).indices[:count].sort().values


def cosamp(
    signs: Tensor, measured: Tensor, num_entries: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return places and values of a vector g with signs g = measured, as sparse as asked.

    CoSaMP: merge the support with the 2 s columns that correlate most with the residual, solve the
    least squares on it, keep the s largest; so many times. With s at n, the least squares of all.

    Args:
        signs: int8 (m, n), entries +1 and -1.
        measured: float64 (m,).
        num_entries: s.
        iterations: how often.
    """
    measured = residual = on_bits(measured)
    kept, values = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    for _ in range(1 if num_entries >= signs.shape[1] else iterations):
        if not residual.any():
            break
        found = largest(correlations(signs, residual), 2 * num_entries)
        is_merged = torch.zeros(signs.shape[1], dtype=torch.bool)
        is_merged[kept] = is_merged[found] = True
        support = is_merged.nonzero()[:, 0]
        columns = signs[:, support].double()
        values = solve(columns.T @ columns, columns.T @ measured)  # whole numbers; exact sums
        best = largest(values, num_entries)
        kept, values = support[best], on_bits(values[best])
        residual = on_bits(measured - columns[:, best] @ values)
    return kept, values


# --- parts ------------------------------------------------------------------------------------


class Round(NamedTuple):
    """Says what a round of a step supposes: nonzero entries of the gradient, and measurements."""

    num_entries: int
    measurements: int


def rounds_of(
    num_weights: int, num_entries: int, oversampling: float, most: int, num_rounds: int
) -> list[Round]:
    """Return the rounds of a step: entries double while their measurements are affordable.

    Where half of the weights could be nonzero, or 2 n measurements are no more than the entries
    ask for, and there may be 2 n of them, all weights are solved for by least squares.
    """
    found: list[Round] = []
    for j in range(num_rounds):
        s = min(2**j * num_entries, max(1, num_weights // 2))
        needed = max(s + 1, math.ceil(oversampling * s * math.log(num_weights)))
        if (2 * s >= num_weights or needed >= 2 * num_weights) and 2 * num_weights <= most:
            found.append(Round(num_weights, 2 * num_weights))
        elif needed <= most:
            found.append(Round(s, needed))
        elif found:
            found.append(found[-1])
        else:
            raise ValueError(
                f"max_measurements={most}: num_entries={num_entries} of {num_weights:,} weights "
                f"need {needed}; give more, or fewer entries"
            )
    return found


class SignsAndDecoded(Dense):
    """Make u(key) of Rademacher noise; of the decoded gradient of a step it is that vector."""

    def __init__(self) -> None:
        super().__init__("rademacher")

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`."""
        super().bind(context, num_terms)
        self._ordered = sorted(self.targets, key=lambda t: t.name)
        starts, total = {}, 0
        for target in self._ordered:
            starts[target.name] = total
            total += target.parameter.numel()
        self._starts, self._total = starts, total
        self._vector = torch.zeros(0)

    def signs(self, keys: Sequence[Key]) -> Tensor:
        """Return u of each key over all weights, tensors by name: int8 (m, n), on the CPU."""
        out = torch.empty(len(keys), self._total, dtype=torch.int8)
        for target in self._ordered:
            size, start = target.parameter.numel(), self._starts[target.name]
            index, rows = torch.arange(size), max(1, _CHUNK // size)
            for i in range(0, len(keys), rows):
                words = [
                    noise.stream_key(self._seed, k.purpose, k.step, k.query, target.name)
                    for k in keys[i : i + rows]
                ]
                key = torch.tensor(words).T[..., None]
                drawn = noise.draw(index, size, key, self.noise)
                out[i : i + rows, start : start + size] = drawn.to(torch.int8)
        return out

    def hold(self, places: Tensor, values: Tensor) -> None:
        """Let the decoded key of the step stand for this sparse vector."""
        self._vector = torch.zeros(self._total)
        self._vector[places] = values.float()

    def held(self, target: Target) -> Tensor:
        """Return a target's part of the decoded gradient: float32, flat, on its device."""
        start = self._starts[target.name]
        part = self._vector[start : start + target.parameter.numel()]
        return part.to(target.parameter.device)

    def mover(self, step: int, move: Move) -> DenseMover:
        """See :class:`Direction`."""
        if not move.terms or move.terms[0].key.purpose != _DECODED:
            return super().mover(step, move)
        ((_, coefficient, _),) = move.terms
        rounds = self.keys("round", step)
        numbers: list[Numbers | None] = [
            Numbers(((0, 0),), (0, 0), key, math.inf, (coefficient,), move.decay or None)
            for key in rounds
        ]
        return DecodedMover(self, step, move, numbers)

    def rounds_by_chance(self, passes: Passes) -> bool:
        """Say whether these passes, which may be those of the update, round stochastically."""
        return self._rule.stochastic and passes is self.passes

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return {"noise": self.noise}


class DecodedMover(DenseMover):
    """Writes copies of tensors moved along the decoded gradient."""

    _direction: SignsAndDecoded

    def write(self, passes: Passes, target: Target, out: Tensor) -> None:
        """See :class:`DenseMover`."""
        start, draw, along = self.start(target), self.draw(target), self._direction.held(target)
        bits = None
        if self._direction.rounds_by_chance(passes):
            index = torch.arange(along.numel(), device=along.device)
            bits = noise.rounding_at(index, along.numel(), draw.round_key)
        mask = torch.ones_like(along, dtype=torch.bool)
        out.copy_(blend(start, along * draw.coefficients[0], mask, bits, draw, out.dtype))

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        self.whole(parameter, plus)
        self._direction.mover(self._step, self.move.negated()).whole(parameter, minus)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        out = torch.empty_like(parameter)
        self.whole(parameter, out.view(-1))
        return out.index_select(0, rows)

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """See :class:`DenseMover`."""
        along = self._direction.held(target) * self.draw(target).coefficients[0]
        return along, torch.ones_like(along, dtype=torch.bool)


class Facts(NamedTuple):
    """Holds what a step's search for a decrease takes: lr, the decay at lr, the limit of slopes."""

    lr: float
    decay: float
    limit: float


class Rounds:
    """Measures slopes along signs, decodes them, and tries the step; again with more and shorter.

    The scalars are the round that was accepted (their number: none) and the slopes; those that were
    not needed are 0.

    Args:
        direction: of the method.
        rounds: of a step.
        tolerance: a step of length a must lower the loss by a tolerance^2 / 2.
        iterations: of CoSaMP.
        facts: returns those of the present step.
    """

    def __init__(
        self,
        direction: SignsAndDecoded,
        rounds: Sequence[Round],
        tolerance: float,
        iterations: int,
        facts: Callable[[], Facts],
    ) -> None:
        self._direction, self.rounds, self.tolerance = direction, list(rounds), tolerance
        self.iterations, self._facts = iterations, facts
        self.num_scalars = 1 + self.rounds[-1].measurements
        self.num_terms = 2  # of one term, noise would be kept for the step
        self._decoded: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`: if the first round is accepted."""
        return self.rounds[0].measurements + 2

    def forwards_of(self, scalars: Sequence[float]) -> int:
        """Return the forwards of the step that recorded these scalars."""
        tried = min(int(scalars[0]) + 1, len(self.rounds))
        return 1 + self.rounds[tried - 1].measurements + tried

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        lr, decay, limit = self._facts()
        ((here,),) = ask.losses([(Move(()),)])
        slopes: list[float] = []
        for j, now in enumerate(self.rounds):
            missing = [Key(ask.step, q) for q in range(len(slopes), now.measurements)]
            width = self.rounds[0].measurements  # ranks exchange no more losses at once
            for i in range(0, len(missing), width):
                points = [(Move((Term(key, ask.eps),)),) for key in missing[i : i + width]]
                slopes += [(loss - here) / ask.eps for (loss,) in ask.losses(points)]
            scalars = self._padded(j, slopes)
            gradient = self.hold(self.read(scalars, ask.step).clipped(limit), ask.step)
            a = 2.0**-j
            ((there,),) = ask.losses([(gradient.move(-a * lr, a * decay),)])
            if here - there >= a * lr * self.tolerance**2 / 2:
                return scalars
        return self._padded(len(self.rounds), slopes)

    def _padded(self, accepted: int, slopes: Sequence[float]) -> list[float]:
        return [float(accepted), *slopes, *[0.0] * (self.num_scalars - 1 - len(slopes))]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`: the slopes; what they are decoded to is up to :meth:`hold`."""
        j = min(int(scalars[0]), len(self.rounds) - 1)
        count = self.rounds[j].measurements
        terms = (Term(Key(step, q), slope) for q, slope in enumerate(scalars[1 : count + 1]))
        return Gradient(tuple(terms), count, {"round": scalars[0]})

    def hold(self, slopes: Gradient, step: int) -> Gradient:
        """Decode slopes, let the direction hold what is found, and return the gradient along it."""
        asked = (slopes.terms, slopes.also["round"])
        if self._decoded is None or self._decoded[0] != asked:
            j = min(int(slopes.also["round"]), len(self.rounds) - 1)
            signs = self._direction.signs([term.key for term in slopes.terms])
            measured = torch.tensor([t.coefficient for t in slopes.terms], dtype=torch.float64)
            found = cosamp(signs, measured, self.rounds[j].num_entries, self.iterations)
            self._decoded = asked, found
        self._direction.hold(*self._decoded[1])
        return Gradient((Term(Key(step, purpose=_DECODED), 1.0),))


class AcceptedRound(Update):
    """Step by lr 2^-j (g + weight_decay theta) of the round j that was accepted, if any.

    Args:
        rounds: measures and decodes.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        j = int(gradient.also["round"])
        decoded = self._rounds.hold(gradient, weights.step)
        scale = 2.0**-j if j < len(self._rounds.rounds) else 0.0
        weights.move(decoded, -scale * lr, decay=scale * lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        rounds = [list(one) for one in self._rounds.rounds]
        return {"rounds": rounds, "cosamp_iterations": self._rounds.iterations}


class ZoroFA(ZeroOrder):
    """Recover a gradient of few large entries from random signs, with as many as turn out needed.

    One step, for j = 0, 1, .. with s = 2^j num_entries and m = oversampling s ln n signs z_i:

        slope_i = [L(theta + eps z_i) - L(theta)] / eps
        g = CoSaMP(z_i . g = slope_i for i = 1..m, s entries of g)
        theta+ = theta - lr 2^-j (g + weight_decay theta)
        taken, if L(theta) - L(theta+) >= lr 2^-j tolerance^2 / 2; else the next j

    lr is 1 / sigma_0 of the paper. s doubles while m is at most ``max_measurements``, and stays
    then, while steps grow shorter; after ``max_rounds`` the weights stay. Where half of the n
    weights could count, and 2 n measurements may be made, all are solved for by least squares.

    Forwards a step: 1 + m + the rounds tried; the logged loss is the mean of them, those of the
    tried steps among them. Keeps no state: each step begins again at s and lr,
    as the paper's. The slopes and the round are recorded, so a replay decodes again. It does so in
    float64 on the CPU with sums that are exact in any order, and solves by Cholesky in a fixed
    order, so that machines agree to the last bit (no LAPACK).

    Leaves the paper: eps is fixed, and is not the paper's h, which falls with sigma and n below
    what float32 resolves; so the slopes of a round serve in the next ones, which measure only what
    is missing. In place of coordinate differences, least squares of 2 n signs. The released code
    floors h, too; it divides the slopes once more by sqrt(m), so that its gradient is too small by
    that. More than 100,000 weights are refused: signs are for small spaces.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_entries: s of the first round.
        oversampling: of measurements to s ln n.
        max_measurements: signs of a step, at most; a step records so many scalars.
        max_rounds: rounds of a step, at most.
        cosamp_iterations: of the decoding.
        tolerance: norm of the gradient below which a decrease need not be had.
        common: see :class:`smezo_cli.zo.parts.Common`; slopes are clipped before decoding.
            ``executor="in_place"`` cannot measure its points.

    Raises:
        ValueError: more than 100,000 weights are trained, or too few measurements are allowed.
    """

    measures_pairs: ClassVar = False
    groups_by: ClassVar = "num_entries"  # which take more measurements than they are
    estimator: Rounds

    def __init__(
        self,
        model: nn.Module,
        *,
        num_entries: Count = 4,
        oversampling: Positive = 1.0,
        max_measurements: Count = 256,
        max_rounds: Count = 5,
        cosamp_iterations: Count = 4,
        tolerance: NotNegative = 1e-3,
        **common: Unpack[Common],
    ) -> None:
        freeze = common["freeze"] = frozen(model, common)
        num_weights = sum(t.num_trained for t in select(dynamo.original(model), freeze, []))
        check(
            num_weights <= MOST_WEIGHTS,
            f"{num_weights:,} weights are trained, and a sparse gradient is recovered among at "
            f"most {MOST_WEIGHTS:,}: freeze more by method.freeze, or train a small adapter, such "
            'as "method.adapter={kind: lora, r: 1, alpha: 2, targets: [v_proj]}"',
        )
        check(
            max_measurements <= MOST_MEASUREMENTS,
            f"max_measurements={max_measurements}: at most {MOST_MEASUREMENTS}",
        )
        direction = SignsAndDecoded()
        rounds = Rounds(
            direction,
            rounds_of(num_weights, num_entries, oversampling, max_measurements, max_rounds),
            tolerance,
            cosamp_iterations,
            self._facts,
        )
        super().__init__(
            model,
            selection=Everything(),
            direction=direction,
            estimator=rounds,
            update=AcceptedRound(rounds),
            **common,
        )

    def _facts(self) -> Facts:
        group = self.param_groups[0]
        lr = group["lr"]
        return Facts(lr, lr * group["weight_decay"], self.clip_projected_grad)

    def record(self, loss: float, scalars: Sequence[float], step: int) -> StepRecord:
        """See :meth:`ZeroOrder.record`: how many forwards were made follows from the scalars."""
        found = super().record(loss, scalars, step)
        return replace(found, num_forwards=self.estimator.forwards_of(scalars))
