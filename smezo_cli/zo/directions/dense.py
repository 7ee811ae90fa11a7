"""Perturb tensors along a dense direction: one keyed number of noise for every weight."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.directions.base import Change, DirectionContext
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import KINDS, stream_key
from smezo_cli.zo.passes.choose import Passes, choose_passes
from smezo_cli.zo.passes.draw import Draw, Numbers, Reader, Rule, as_draws
from smezo_cli.zo.passes.eager import EagerPasses, Use
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.targets import Target, check, one_of

WORTH_COMPILING = 1_000_000  # weights; fewer are moved some hundred times while Numba starts


class Dense:
    """u(key) is noise z as large as the tensor, drawn again in every pass or kept for a step.

    Args:
        noise: "gaussian" or "rademacher".

    Raises:
        ValueError: another noise.
    """

    def __init__(self, noise: str = "gaussian") -> None:
        one_of("noise", noise, KINDS)
        self.noise = noise

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`.

        Raises:
            ValueError: noise cannot be kept with these arguments, or has to be.
        """
        self.targets, self.selection, self._seed = context.targets, context.selection, context.seed
        self._by_id = {id(t.parameter): t for t in context.targets}
        self._rule = Rule(context.selection.rule, self.noise, context.is_stochastic)
        devices = [t.parameter.device for t in context.targets]
        # Numba's passes are for CPUs alone, torch.compile's for tensors here and there.
        device = next((d for d in devices if d.type != "cpu"), devices[0])
        num_weights = sum(t.parameter.numel() for t in context.targets)
        backend = context.backend
        if backend == "auto" and device.type == "cpu" and num_weights < WORTH_COMPILING:
            backend = "eager"
        self.passes, self.why_eager = choose_passes(self._rule, backend, device)
        # Probes round to nearest; only the stored update may round stochastically.
        self.probe_passes: Passes = self.passes
        if self._rule.stochastic:
            self.probe_passes = type(self.passes)(Rule(self._rule.mask, self.noise, False))
        self.keeps = self._whether_to_keep(context, num_terms, num_weights, device)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._streams: dict[tuple[str | int, ...], list[tuple[int, int]]] = {}

    def _whether_to_keep(
        self, context: DirectionContext, num_terms: int, num_weights: int, device: torch.device
    ) -> bool:
        """Return whether z is drawn once a step and kept."""
        wish, can_keep = context.keep_noise, num_terms == 1 and not context.is_stochastic
        rounding = "stochastic" if context.is_stochastic else "nearest"
        needs = f"num_queries=1 and rounding=nearest, not {num_terms} and {rounding}"
        check(can_keep or wish is not True, f"keep_noise=true needs {needs}: leave it out")
        if context.is_in_place:
            check(can_keep, f"executor=in_place needs {needs}: leave it out")
            check(
                wish is not False,
                "keep_noise=false: executor=in_place updates by the noise and the mask that it "
                "kept; leave keep_noise out",
            )
            return True  # its update uses the mask of before the first write
        if wish != "auto":
            return bool(wish)
        is_slow_to_draw = self.passes.name == "eager" and device.type == "cpu"
        return can_keep and is_slow_to_draw and free_memory_bytes() > 10 * num_weights

    kept_bytes = 0

    def state_size(self, target: Target) -> int:
        """See :class:`Direction`: a number a weight."""
        return target.parameter.numel()

    def refreshes_at(self, step: int) -> bool:
        """See :class:`Direction`."""
        return False

    def carry(self, target: Target, kept: Tensor, step: int) -> Tensor:
        """See :class:`Direction`."""
        return kept

    def begin(self, step: int) -> None:
        """See :class:`Direction`."""
        self._streams.clear()
        self._kept.clear()

    def end(self) -> None:
        """See :class:`Direction`."""
        self._kept.clear()

    def mover(self, step: int, move: Move) -> "DenseMover":
        """See :class:`Direction`."""
        keys = [self._keys(key.purpose, key.step, key.query) for key, _ in move.terms]
        none = [(0, 0)] * len(self.targets)
        stream = self.selection.stream(step)
        masks = none if stream is None else self._keys(*stream)
        rounds = self._keys("round", step) if self._rule.stochastic else none
        a, d = tuple(c for _, c in move.terms), move.decay or None
        of_targets = zip(self.targets, zip(*keys, strict=True), masks, rounds, strict=True)
        numbers = [Numbers(k, mask, bits, t.h, a, d) for t, k, mask, bits in of_targets]
        return DenseMover(self, move, numbers)

    def _keys(self, *parts: str | int) -> list[tuple[int, int]]:
        """The streams of a purpose, one a target; several passes of a step ask for the same."""
        if parts not in self._streams:
            self._streams[parts] = [stream_key(self._seed, *parts, t.name) for t in self.targets]
        return self._streams[parts]

    def apply(self, step: int, move: Move) -> None:
        """See :class:`Direction`."""
        mover = self.mover(step, move)
        for target in self.targets:
            mover.write(self.passes, target, target.flat)

    def change(self, step: int, move: Move, of: Callable[[Target], Change]) -> None:
        """See :class:`Direction`."""
        mover = self.mover(step, move)
        for target in self.targets:
            self.change_one(target, mover, of(target))

    def change_one(self, target: Target, mover: "DenseMover", change: Change) -> None:
        """As :meth:`change`, for one target."""
        use = _adding(target, change, mover.move.decay, self._mask_of(target, mover))
        if self.keeps:
            z, _ = self.kept(target, mover)
            EagerPasses.along_kept(z, mover.draw(target), use)
        else:
            self.passes.along(target.flat, mover.read_by(self.passes, target), use)

    def _mask_of(self, target: Target, mover: "DenseMover") -> Tensor | None:
        """The mask of a whole tensor (bool, flat), before it is written to; None: all is active."""
        if self.selection.stream(0) is None and target.h == float("inf"):
            return None
        return EagerPasses(self._rule).mask_of(target.flat, mover.draw(target))

    def masks(self, step: int) -> Iterator[Tensor]:
        """See :class:`Direction`."""
        mover, eager = self.mover(step, Move((Term(Key(step), 0.0),))), EagerPasses(self._rule)
        for target in self.targets:
            yield eager.mask_of(target.flat, mover.draw(target))

    def kept(self, target: Target, mover: "DenseMover") -> tuple[Tensor, Tensor]:
        """Return z (float32, flat) of the first term and the mask; of the step's start, if kept."""
        eager = EagerPasses(self._rule)
        if not self.keeps:
            return eager.noise_and_mask(target.flat, mover.draw(target))
        if target.name not in self._kept:
            self._kept[target.name] = eager.noise_and_mask(target.flat, mover.draw(target))
        return self._kept[target.name]

    def target_of(self, parameter: Tensor) -> Target:
        """Return the target that this parameter is."""
        return self._by_id[id(parameter)]

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return {"noise": self.noise}


class DenseMover:
    """Writes copies of tensors moved by the terms of one move, as probes and updates need them."""

    def __init__(self, direction: Dense, move: Move, numbers: list[Numbers]) -> None:
        self.move = move
        self._direction, self._numbers = direction, numbers
        self._draws: list[Draw] | None = None

    def draw(self, target: Target) -> Draw:
        """Return the numbers as tensors on the target's device; made for all when first asked."""
        if self._draws is None:
            devices = [t.parameter.device for t in self._direction.targets]
            self._draws = as_draws(self._numbers, devices)
        return self._draws[target.position]

    def read_by(self, passes: Reader, target: Target) -> Any:
        """Return the numbers of a target in the form that these passes read."""
        return self._numbers[target.position] if passes.reads_numbers else self.draw(target)

    def write(self, passes: Passes, target: Target, out: Tensor) -> None:
        """Write the moved tensor to ``out`` (flat), by kept noise where it is kept."""
        if self._direction.keeps:
            z, mask = self._direction.kept(target, self)
            EagerPasses.move_kept(target.flat, out, z, mask, self.draw(target))
        else:
            passes.move(target.flat, out, self.read_by(passes, target))

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        self.write(self._direction.probe_passes, self._direction.target_of(parameter), out)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        direction, passes = self._direction, self._direction.probe_passes
        target = direction.target_of(parameter)
        if direction.keeps:
            z, mask = direction.kept(target, self)
            draw = self.draw(target)
            EagerPasses.move_kept(target.flat, plus, z, mask, draw)
            back = draw._replace(coefficients=-draw.coefficients)
            EagerPasses.move_kept(target.flat, minus, z, mask, back)
        else:
            passes.move_both(target.flat, plus, minus, self.read_by(passes, target))

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target, passes = self._direction.target_of(parameter), self._direction.probe_passes
        width = parameter.numel() // parameter.shape[0]
        picked = parameter.detach().index_select(0, rows).view(-1)
        offsets = torch.arange(width, device=rows.device)
        index = (rows[:, None] * width + offsets).view(-1)
        numel = parameter.numel()
        moved = passes.move_at(picked, index, numel, self.read_by(passes, target))
        return moved.view(rows.shape[0], *parameter.shape[1:])

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """Return a z of the first term (float32, flat), written out, and the mask (bool)."""
        z, mask = self._direction.kept(target, self)
        return z * self.draw(target).coefficients[0], mask


def _adding(target: Target, change: Change, decay: float, mask: Tensor | None) -> Use:
    """Return what adds a change to parts of a tensor; each operation rounds once.

    So the bits are the same whatever draws, in whichever parts.
    """
    flat, rounded = target.flat, ROUNDINGS.get(target.flat.dtype)

    def use(part: slice, total: Tensor, bits: Tensor | None) -> None:
        move = change(part, total)
        w = flat[part].float()
        if decay:
            move -= decay * w
        value = w + move
        if bits is not None and rounded is not None:
            value = rounded(value, bits)
        if mask is not None:
            value = torch.where(mask[part], value.to(flat.dtype), flat[part])
        flat[part] = value

    return use


def free_memory_bytes() -> int:
    """Return the free memory of this machine in bytes; 0 where it is not known."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
