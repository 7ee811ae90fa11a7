"""QuZO: zeroth-order steps on weights that are integers (arXiv 2502.12346)."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo, noise
from smezo_cli.zo.directions.base import Change, DirectionContext
from smezo_cli.zo.directions.dense import WORTH_COMPILING
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Move
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.passes.rounded import NumbaDraws, Pair, Stream, choose_draws, over_halves
from smezo_cli.zo.quantised import QuantisedLinear, quantise
from smezo_cli.zo.ranges import Count, PerturbBits, WeightBits
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check
from smezo_cli.zo.updates.sgd import SGD

#: No draw of :mod:`smezo_cli.zo.noise` is larger (6.6604...), so that none is cut off.
RANGE = 6.75

# Purposes of the streams (seed, purpose, step, query, name), beside that of z.
OF_PROBE, OF_UPDATE = "round u1", "round u2"  # round z to u_1 and to u_2
OF_CODES, OF_DECAY = "round codes", "round decay"  # round what is added to the codes


class QuZO(ZeroOrder):
    """Train linear layers as integer codes of 8 or 4 bits; no float copy of the weights is kept.

    One step (the paper's Q-RGE2), for queries q = 1..Q with directions z_q ~ N(0, I), of which
    u_q1 = Q_SR(z_q) and u_q2 = Q_SR(z_q) are two stochastic roundings, independent given z_q:

        projected_grad_q = [L(W + eps u_q1) - L(W - eps u_q1)] / (2 eps)
        codes <- codes - sum_q Q_SR(lr/Q projected_grad_q u_q2 / scales)

    As E[Q_SR(x)] = x, E[u_q2 u_q1^T] = I and the estimate has no bias (up to eps); one rounding for
    both would lengthen it by the variance of the rounding. 2 Q forwards a step; no state.

    W = codes x scales is written out layer by layer, in the dtype that the layer had, plus
    eps u_q1; nothing else is held of it. Codes are held of the layers that
    :func:`smezo_cli.zo.quantised.linear_layers` names; all other tensors (embeddings, norms,
    biases, the output layer) stay as they are and are trained along the same u_q1 and u_q2, without
    the grid. ``freeze`` leaves any of both alone.

    All chance is keyed, by (seed, purpose, step, query, name): the official code cannot be read,
    and another one seeds the global generator anew in its quantiser, so that the z of the update is
    not the z of the probe.

    Where this leaves the paper: u has 2^perturb_bits levels at odd multiples of half a step over a
    fixed range that holds every z, so that every probe moves every weight, and a level depends on
    no other weight of the tensor; products are computed in floating point; scales are symmetric,
    one for ``group_size`` columns of a row, and stay those of the model as it came.

    Args:
        model: any module; its linear layers are changed in place, see
            :func:`smezo_cli.zo.quantised.quantise`. Parameters with ``requires_grad`` are trained.
        weight_bits: 8 or 4, of a code.
        group_size: columns that share a scale.
        perturb_bits: of u.
        num_queries: Q.
        common: see :class:`smezo_cli.zo.parts.Common`. Codes that would leave their range stay at
            its end; weight decay is rounded into the codes stochastically, too.

    Raises:
        ValueError: an argument that does not go with codes.
    """

    holds_codes: ClassVar = True
    moves_codes: ClassVar = True

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_bits: WeightBits = 8,
        group_size: Count = 128,
        perturb_bits: PerturbBits = 8,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        direction = RoundedPair(perturb_bits)
        _check_goes_with_codes(common)
        model = dynamo.original(model)
        quantise(model, weight_bits, group_size)
        self._form = {"weight_bits": weight_bits, "group_size": group_size}
        super().__init__(
            model,
            selection=Everything(),
            direction=direction,
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )

    @property
    def num_weights(self) -> int:
        """Return how many weights the method trains; a byte may hold two."""
        return sum(map(num_weights, self.targets))

    @property
    def layers(self) -> dict[str, QuantisedLinear]:
        """Return the layer that holds the codes of a trained tensor, by the tensor's name."""
        return {t.name: t.layer for t in self.targets if t.layer is not None}

    def identity(self) -> dict[str, Any]:
        """See :meth:`Parts.identity`."""
        return {**super().identity(), **self._form}


def _check_goes_with_codes(common: Common) -> None:
    """Raise ValueError for an argument that asks for weights that can be moved themselves."""
    check(
        common.get("executor") != "in_place",
        "executor=in_place moves the weights themselves by eps, and codes have no place between "
        "two of them: use executor=auto, sequential or lockstep",
    )
    check(
        common.get("keep_noise") is not True,
        "keep_noise=true keeps one z, and the probe and the update go along two roundings of it: "
        "leave it out",
    )


def num_weights(target: Target) -> int:
    """Return the weights of a target; of codes of 4 bits, two a byte."""
    return target.parameter.numel() if target.layer is None else target.layer.num_weights


class RoundedPair:
    """Make u(key): u_1 = Q_SR(z) in a probe, u_2 = Q_SR(z) in an update, z ~ N(0, I).

    Args:
        perturb_bits: of u, which has 2^perturb_bits levels (k + 1/2) step in [-RANGE, RANGE].
    """

    has_compiled_passes = True

    def __init__(self, perturb_bits: int) -> None:
        check(2 <= perturb_bits <= 8, f"perturb_bits={perturb_bits}: from 2 to 8")
        self.perturb_bits = perturb_bits
        self.step = 2 * RANGE / (2**perturb_bits - 1)

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`."""
        self.targets, self._seed = context.targets, context.seed
        self.is_stochastic = context.is_stochastic
        self._by_id = {id(t.parameter): t for t in context.targets}
        self._streams: dict[tuple[str | int, ...], list[tuple[int, int]]] = {}
        devices = [t.parameter.device for t in context.targets]
        device = next((d for d in devices if d.type != "cpu"), devices[0])
        backend = context.backend
        if backend == "auto" and sum(map(num_weights, self.targets)) < WORTH_COMPILING:
            backend = "eager"
        self.passes, self.why_eager = choose_draws(self.step, backend, device)

    kept_bytes = 0

    def noise_bytes(self, *, compiles: bool, on_cpu: bool, free: int) -> int:
        """See :class:`Direction`: the probe and the update draw anew."""
        return 0

    def state_size(self, target: Target) -> int:
        """See :class:`Direction`."""
        return num_weights(target)

    def thin_rank(self, target: Target) -> int | None:
        """See :class:`Direction`: codes are moved as they are."""
        return None

    def refreshes_at(self, step: int) -> bool:
        """See :class:`Direction`: there is no subspace."""
        return False

    def carry(self, target: Target, kept: Tensor, step: int) -> Tensor:
        """See :class:`Direction`."""
        return kept

    def begin(self, step: int) -> None:
        """See :class:`Direction`."""
        self._streams.clear()

    def end(self) -> None:
        """See :class:`Direction`."""

    def mover(self, step: int, move: Move) -> "RoundedMover":
        """See :class:`Direction`."""
        return RoundedMover(self, step, move)

    def apply(self, step: int, move: Move) -> None:
        """See :class:`Direction`; along u_2."""
        mover = self.mover(step, move)
        for target in self.targets:
            mover.update(target)

    def change(self, step: int, move: Move, of: Callable[[Target], Change]) -> None:
        """Refuse what is no sum of terms: each of them is rounded into the codes by itself.

        Raises:
            ValueError: always.
        """
        raise ValueError("codes are moved by sums of directions alone: use the update SGD")

    def masks(self, step: int) -> Iterator[Tensor]:
        """See :class:`Direction`; every weight."""
        for target in self.targets:
            device = target.parameter.device
            yield torch.ones(num_weights(target), dtype=torch.bool, device=device)

    def target_of(self, parameter: Tensor) -> Target:
        """See :class:`Direction`."""
        return self._by_id[id(parameter)]

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return {"noise": "gaussian", "perturb_bits": self.perturb_bits}

    def stream(self, target: Target, *parts: str | int) -> tuple[int, int]:
        """Return the stream (seed, *parts, name of the target)."""
        if parts not in self._streams:
            self._streams[parts] = [stream_key(self._seed, *parts, t.name) for t in self.targets]
        return self._streams[parts][target.position]


class RoundedMover:
    """Writes copies of tensors moved along u_1, and moves tensors and codes along u_2.

    Args:
        direction: that it is of.
        step: number of the step.
        move: in which keys name z; of all targets, from the present weights.

    Raises:
        ValueError: it is of some targets, or from a copy of the weights.
    """

    only = None  # it moves all

    def __init__(self, direction: RoundedPair, step: int, move: Move) -> None:
        is_whole = not move.base and all(term.only is None for term in move.terms)
        check(is_whole, "codes are moved all at once, and from where they are")
        self.move = move
        self._direction, self._step, self._draws = direction, step, direction.passes

    def streams(self, target: Target, purpose: str) -> list[Stream]:
        """Return what each term draws of a target, rounded by the streams of a purpose."""
        stream = self._direction.stream
        return [
            Stream(
                stream(target, term.key.purpose, term.key.step, term.key.query),
                stream(target, purpose, term.key.step, term.key.query),
                term.coefficient,
            )
            for term in self.move.terms
        ]

    def _sum(self, start: int, stop: int, device: torch.device, streams: list[Stream]) -> Pair:
        """Return the sum of the terms for both elements of these pairs: float32."""
        first, second = self._draws.pair(start, stop, device, streams[0])
        for stream in streams[1:]:
            more = self._draws.pair(start, stop, device, stream)
            first, second = first.add_(more[0]), second.add_(more[1])
        return first, second

    def _base(self, target: Target, out: Tensor) -> Tensor:
        """Return the weights, flat: the target's own, or those of codes, written to ``out``."""
        if target.layer is None:
            return target.flat
        target.layer.write(out)
        return out

    def _fused(self, target: Target, dtype: torch.dtype) -> NumbaDraws | None:
        """Return what moves a target in one loop, whose numbers have this dtype; None: nothing."""
        layer, draws = target.layer, self._draws
        is_plain = layer is None or (layer.bits == 8 and layer.out_features % 2 == 0)
        is_plain = is_plain and dtype == torch.float32 and len(self.move.terms) == 1
        return draws if is_plain and isinstance(draws, NumbaDraws) else None

    def _write(self, draws: NumbaDraws, target: Target, *outs: Tensor) -> None:
        (stream,), layer = self.streams(target, OF_PROBE), target.layer
        if layer is None:
            draws.move(target.flat, outs, stream)
        else:
            codes, scales = layer.weight.detach(), layer.scales.detach()
            draws.write_codes(codes, scales, layer.group_size, outs, stream)

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target = self._direction.target_of(parameter)
        if (draws := self._fused(target, out.dtype)) is not None:
            self._write(draws, target, out)
            return
        base, streams = self._base(target, out), self.streams(target, OF_PROBE)

        def one(first: slice, second: slice, start: int, stop: int) -> None:
            there = self._sum(start, stop, out.device, streams)
            moved = base[first].float() + there[0]  # read before the other is written: odd ends
            out[second] = (base[second].float() + there[1]).to(out.dtype)
            out[first] = moved.to(out.dtype)

        over_halves(out.numel(), out.device, one)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        target = self._direction.target_of(parameter)
        if (draws := self._fused(target, plus.dtype)) is not None:
            self._write(draws, target, plus, minus)
            return
        base, streams = self._base(target, plus), self.streams(target, OF_PROBE)

        def one(first: slice, second: slice, start: int, stop: int) -> None:
            there = self._sum(start, stop, plus.device, streams)
            # Copies: of codes the weights lie in ``plus``.
            a, b = (base[part].to(torch.float32, copy=True) for part in (first, second))
            for out, (u, v) in ((plus, there), (minus, (-there[0], -there[1]))):
                out[second] = (b + v).to(out.dtype)
                out[first] = (a + u).to(out.dtype)

        over_halves(plus.numel(), plus.device, one)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target = self._direction.target_of(parameter)
        if target.layer is not None:
            picked = target.layer.rows(rows)
        else:
            picked = parameter.detach().index_select(0, rows)
        numel = num_weights(target)
        width = picked[0].numel() if len(rows) else 1
        index = (rows[:, None] * width + torch.arange(width, device=rows.device)).view(-1)
        total = self._at(index, numel, self.streams(target, OF_PROBE))
        return (picked.float().view(-1) + total).to(picked.dtype).view(picked.shape)

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """See :class:`smezo_cli.zo.directions.base.PointMover`."""
        numel, device = num_weights(target), target.parameter.device
        index = torch.arange(numel, device=device)
        u = self._at(index, numel, self.streams(target, OF_PROBE)[:1])
        return u, torch.ones(numel, dtype=torch.bool, device=device)

    def _at(self, index: Tensor, numel: int, streams: list[Stream]) -> Tensor:
        """Return the sum of the terms at flat positions: float32."""
        total = self._draws.at(index, numel, streams[0])
        for stream in streams[1:]:
            total += self._draws.at(index, numel, stream)
        return total

    def update(self, target: Target) -> None:
        """Move the weights or codes of a target along u_2."""
        streams, layer, term = self.streams(target, OF_UPDATE), target.layer, self.move.terms[0]
        dtype = target.flat.dtype if layer is None else torch.float32
        draws = None if self.move.decay else self._fused(target, dtype)
        if layer is None:
            if draws is None:
                self._update_weights(target, streams)
            else:
                draws.move(target.flat, [target.flat], streams[0])
        elif draws is None:
            self._update_codes(target, layer, streams)
        else:
            key = self._direction.stream(target, OF_CODES, term.key.step, term.key.query)
            codes, scales = layer.weight.detach(), layer.scales.detach()
            draws.move_codes(codes, scales, layer.group_size, layer.largest, streams[0], key)

    def _update_weights(self, target: Target, streams: list[Stream]) -> None:
        flat, decay = target.flat, self.move.decay
        rounding = ROUNDINGS.get(flat.dtype) if self._direction.is_stochastic else None
        key = self._direction.stream(target, "round", self._step)

        def one(first: slice, second: slice, start: int, stop: int) -> None:
            there = self._sum(start, stop, flat.device, streams)
            moved = []
            for part, u in zip((first, second), there, strict=True):
                w = flat[part].float()
                moved.append(w + (u - decay * w if decay else u))
            if rounding is not None:
                counter = torch.arange(start, stop, device=flat.device)
                bits = noise.rounding_pair(counter, key)
                moved = [rounding(w, b) for w, b in zip(moved, bits, strict=True)]
            flat[second] = moved[1].to(flat.dtype)
            flat[first] = moved[0].to(flat.dtype)

        over_halves(flat.numel(), flat.device, one)

    def _update_codes(self, target: Target, layer: QuantisedLinear, streams: list[Stream]) -> None:
        """Round each term, and the decay, by itself to whole codes; the sum is then cut."""
        stream, decay, device = self._direction.stream, self.move.decay, target.flat.device
        terms = self.move.terms
        keys = [stream(target, OF_CODES, t.key.step, t.key.query) for t in terms]
        keys += [stream(target, OF_DECAY, self._step)] if decay else []
        width, numel, half = layer.in_features, layer.num_weights, layer.out_features // 2

        def add(rows: slice, of_terms: list[Tensor], chances: list[Tensor]) -> None:
            codes = layer.codes(rows).float()
            scales, moved = layer.scale_of(rows), codes.clone()
            amounts = [u.view(-1, width) / scales for u in of_terms]
            amounts += [codes * -decay] if decay else []
            for amount, chance in zip(amounts, chances, strict=True):
                moved += (amount + chance.view(-1, width)).floor_()
            moved = moved.clamp_(-layer.largest, layer.largest)
            layer.store(rows, moved.to(torch.int8))

        def pairs(first: slice) -> None:
            """Yield rows of the first half, with those as far below: they share draws."""
            span = first.start * width, first.stop * width, device
            u = [self._draws.pair(*span, s) for s in streams]
            chances = [self._draws.chances(*span, key) for key in keys]
            for k, rows in enumerate((first, slice(half + first.start, half + first.stop))):
                add(rows, [both[k] for both in u], [both[k] for both in chances])

        def alone(rows: slice) -> None:
            index = torch.arange(rows.start * width, rows.stop * width, device=device)
            u = [self._draws.at(index, numel, s) for s in streams]
            add(rows, u, [noise.uniform_at(index, numel, key) for key in keys])

        if layer.out_features % 2:
            layer.by_rows(alone, layer.out_features)
        else:
            layer.by_rows(pairs, half)
