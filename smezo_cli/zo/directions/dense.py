"""Perturb tensors along a dense direction: one keyed number of noise for every weight."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.directions.base import Change, DirectionContext
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import KINDS, locate, stream_key
from smezo_cli.zo.passes.choose import Passes, choose_passes
from smezo_cli.zo.passes.draw import Draw, Numbers, Reader, Rule, as_draws
from smezo_cli.zo.passes.eager import EagerPasses, Fold, Use, of_draws, round_bits
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.targets import Target, check, one_of

KEPT = 4 + 1  # bytes a weight of noise that is kept: z in float32, the mask

WORTH_COMPILING = 100_000  # weights; fewer are moved some hundred times while Numba starts


class Dense:
    """Make u(key) of noise z as large as the tensor, drawn again in every pass or kept for a step.

    Args:
        noise: "gaussian" or "rademacher".

    Raises:
        ValueError: another noise.
    """

    has_compiled_passes = True

    def __init__(self, noise: str = "gaussian") -> None:
        one_of("noise", noise, KINDS)
        self.noise = noise

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`.

        Raises:
            ValueError: noise cannot be kept with these arguments, or has to be.
        """
        self.targets, self.selection, self._seed = context.targets, context.selection, context.seed
        self.state = context.state
        self._by_id = {id(t.parameter): t for t in context.targets}
        self._rule = Rule(context.selection.rule, self.noise, context.is_stochastic)
        devices = [t.parameter.device for t in context.targets]
        # Numba's passes are for CPUs alone, the others for tensors here and there.
        device = next((d for d in devices if d.type != "cpu"), devices[0])
        num_weights = sum(t.parameter.numel() for t in context.targets)
        backend = context.backend
        if backend == "auto" and device.type == "cpu" and num_weights < WORTH_COMPILING:
            backend = "eager"
        self.passes, self.why_eager = self._choose_passes(self._rule, backend, device)
        # Probes round to nearest; only the stored update may round stochastically.
        self.probe_passes: Passes = self.passes
        if self._rule.stochastic:
            rule = Rule(self._rule.mask, self.noise, False)
            kind = "eager" if self.passes.name == "eager" else "compiled"
            self.probe_passes = self._choose_passes(rule, kind, device)[0]
        self.keeps = self._whether_to_keep(context, num_terms, num_weights, device)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._streams: dict[tuple[str | int, ...], list[tuple[int, int]]] = {}

    def _choose_passes(self, rule: Rule, backend: str, device: torch.device) -> tuple[Passes, str]:
        return choose_passes(rule, backend, device)

    def _eager(self, rule: Rule) -> EagerPasses:
        """Return the passes that give z and masks themselves."""
        return EagerPasses(rule)

    def _whether_to_keep(
        self, context: DirectionContext, num_terms: int, num_weights: int, device: torch.device
    ) -> bool:
        """Return whether z is drawn once a step and kept."""
        wish, can_keep = context.keep_noise, num_terms == 1 and not context.is_stochastic
        can_keep = can_keep and all(t.index is None for t in context.targets)
        rounding = "stochastic" if context.is_stochastic else "nearest"
        needs = f"num_queries=1 and rounding=nearest, not {num_terms} and {rounding}"
        check(can_keep or wish is not True, f"keep_noise=true needs {needs}: leave it out")
        self._may_keep: bool | None = None  # None: where that pays
        if context.is_in_place:
            check(can_keep, f"executor=in_place needs {needs}: leave it out")
            check(
                wish is not False,
                "keep_noise=false: executor=in_place updates by the noise and the mask that it "
                "kept; leave keep_noise out",
            )
            self._may_keep = True  # its update uses the mask of before the first write
        elif wish != "auto":
            self._may_keep = bool(wish)
        elif not can_keep:
            self._may_keep = False
        is_slow = self.passes.name == "eager" and device.type == "cpu"
        return self._keeps_where(is_slow, free_memory_bytes, num_weights)

    def _keeps_where(self, is_slow: bool, free: Callable[[], int], num_weights: int) -> bool:
        """Return whether z is kept where drawing is slow or not, and so many bytes are free."""
        if self._may_keep is not None:
            return self._may_keep
        return is_slow and free() > 10 * num_weights

    def thin_rank(self, target: Target) -> int | None:
        """See :class:`Direction`: noise is no product."""
        return None

    def noise_bytes(self, *, compiles: bool, on_cpu: bool, free: int) -> int:
        """See :class:`Direction`."""
        return self.noise_bytes_of(self.targets, compiles=compiles, on_cpu=on_cpu, free=free)

    def noise_bytes_of(
        self, targets: Sequence[Target], *, compiles: bool, on_cpu: bool, free: int
    ) -> int:
        """Do as :meth:`noise_bytes`, where only these targets are perturbed along dense noise."""
        is_slow = on_cpu and not (compiles and self.has_compiled_passes)
        num_weights = sum(t.parameter.numel() for t in self.targets)
        if not self._keeps_where(is_slow, lambda: free, num_weights):
            return 0
        return KEPT * sum(t.parameter.numel() for t in targets)

    def begin(self, step: int) -> None:
        """See :class:`Direction`."""
        self._streams.clear()
        self._kept.clear()

    def end(self) -> None:
        """See :class:`Direction`."""
        self._kept.clear()

    kept_bytes = 0

    def state_size(self, target: Target) -> int:
        """See :class:`Direction`: one number for every weight that is trained."""
        return target.num_trained

    def refreshes_at(self, step: int) -> bool:
        """See :class:`Direction`: there is no subspace."""
        return False

    def carry(self, target: Target, kept: Tensor, step: int) -> Tensor:
        """See :class:`Direction`."""
        return kept

    def mover(self, step: int, move: Move) -> "DenseMover":
        """See :class:`Direction`."""
        return DenseMover(self, step, move, self.numbers_of(step, move))

    def numbers_of(self, step: int, move: Move) -> list[Numbers | None]:
        """Return what a pass over each target computes with; None for those that stay."""
        keys = [self.keys(t.key.purpose, t.key.step, t.key.query) for t in move.terms]
        none = [(0, 0)] * len(self.targets)
        stream = self.selection.stream(step)
        masks = none if stream is None else self.keys(*stream)
        rounds = self.keys("round", step) if self._rule.stochastic else none
        decay = move.decay or None
        numbers: list[Numbers | None] = []
        for i, target in enumerate(self.targets):
            own = [
                (streams[i], term.coefficient)
                for streams, term in zip(keys, move.terms, strict=True)
                if term.only is None or target.name in term.only
            ]
            if target.rests or not own:
                numbers.append(None)
                continue
            k, a = zip(*own, strict=True)
            numbers.append(Numbers(k, masks[i], rounds[i], target.h, a, decay))
        return numbers

    def keys(self, *parts: str | int) -> list[tuple[int, int]]:
        """Return the streams of a purpose, a target each; passes of a step ask for the same."""
        if parts not in self._streams:
            self._streams[parts] = [stream_key(self._seed, *parts, t.name) for t in self.targets]
        return self._streams[parts]

    def apply(self, step: int, move: Move) -> None:
        """See :class:`Direction`."""
        mover = self.mover(step, move)
        for target in mover.moved:
            mover.write(self.passes, target, target.flat)

    def change(self, step: int, move: Move, of: Callable[[Target], Change]) -> None:
        """See :class:`Direction`."""
        mover = self.mover(step, move)
        for target in mover.moved:
            self.change_one(target, mover, of(target))

    def change_one(self, target: Target, mover: "DenseMover", change: Change) -> None:
        """Do as :meth:`change`, of one target that the move moves."""
        if target.index is not None:
            self._change_picked(target, mover, change)
            return
        use = _adding(target.flat, change, mover.move.decay, self._mask_of(target, mover))
        mover.along(self.passes, target, use)

    def change_by_draws(
        self, step: int, move: Move, fold: Fold, of: Callable[[Target], Change]
    ) -> None:
        """Do as :meth:`change`, with what ``fold`` makes of the terms in place of their sum.

        Args:
            step: of the update.
            move: whose terms are drawn one by one.
            fold: see :meth:`EagerPasses.along`.
            of: as of :meth:`change`.
        """
        mover = self.mover(step, move)
        for target in mover.moved:
            if target.index is not None:
                self._change_picked(target, mover, of(target), fold)
                continue
            use = _adding(target.flat, of(target), move.decay, self._mask_of(target, mover))
            passes = self.passes
            passes.along(target.flat, mover.read_by(passes, target), use, fold)

    def _change_picked(
        self, target: Target, mover: "DenseMover", change: Change, fold: Fold | None = None
    ) -> None:
        """Do as :meth:`change`, of a target whose trained entries are named one by one."""
        assert target.index is not None
        numel, draw = target.parameter.numel(), mover.draw(target)
        zero = torch.zeros(target.num_trained, device=target.index.device)
        eager = self._eager(Rule(self._rule.mask, self.noise))
        index = target.index

        def drawn(draw: Draw) -> Tensor:
            return eager.move_at(zero, index, numel, draw)

        total = of_draws(draw._replace(decay=None), drawn, fold)
        assert isinstance(total, Tensor)
        bits = None
        if self._rule.stochastic:
            counter, is_first = locate(target.index, numel)
            both = round_bits(counter, self._rule, draw)
            bits = torch.where(is_first, *both)  # type: ignore[arg-type]  # there are, if stochastic
        picked = target.flat[target.index]
        _adding(picked, change, mover.move.decay, None)(slice(None), total, bits)
        target.flat[target.index] = picked

    def _mask_of(self, target: Target, mover: "DenseMover") -> Tensor | None:
        """Return the mask (bool, flat) of a tensor, before it is written to; None: all."""
        if self.selection.stream(0) is None and target.h == float("inf"):
            return None
        if self.keeps:  # of before the writes of executor=in_place
            return self.kept(target, mover)[1]
        return self._eager(self._rule).mask_of(target.flat, mover.draw(target))

    def masks(self, step: int) -> Iterator[Tensor]:
        """See :class:`Direction`."""
        mover, eager = self.mover(step, Move((Term(Key(step), 0.0),))), self._eager(self._rule)
        for target in self.targets:
            if target.rests or target.index is not None:
                mask = torch.zeros_like(target.flat, dtype=torch.bool)
                if target.index is not None and not target.rests:
                    mask[target.index] = True
                yield mask
            else:
                yield eager.mask_of(target.flat, mover.draw(target))

    def kept(self, target: Target, mover: "DenseMover") -> tuple[Tensor, Tensor]:
        """Return z (float32, flat) of the first term and the mask; of the step's start, if kept."""
        eager = self._eager(self._rule)
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

    def __init__(
        self, direction: Dense, step: int, move: Move, numbers: list[Numbers | None]
    ) -> None:
        self._step, self.move = step, move
        self._direction, self._numbers = direction, numbers
        self._draws: dict[int, Draw] | None = None
        #: what writes its copies: rounded to nearest, but for those of an update
        self.passes: Passes = direction.probe_passes
        #: the targets that it moves
        self.moved = [t for t in direction.targets if numbers[t.position] is not None]
        # From other weights than the present ones, every tensor is another.
        is_all = bool(move.base) or len(self.moved) == len(direction.targets)
        self.only = None if is_all else frozenset(id(t.parameter) for t in self.moved)

    def moves(self, target: Target) -> bool:
        """Return whether it moves a target."""
        return self._numbers[target.position] is not None

    def draw(self, target: Target) -> Draw:
        """Return the numbers as tensors on the target's device; made for all when first asked."""
        if self._draws is None:
            devices = {t.position: t.parameter.device for t in self.moved}
            numbers = {i: n for i, n in enumerate(self._numbers) if n is not None}
            self._draws = as_draws(numbers, devices)
        return self._draws[target.position]

    def read_by(self, passes: Reader, target: Target) -> Any:
        """Return the numbers of a target in the form that these passes read."""
        return self._numbers[target.position] if passes.reads_numbers else self.draw(target)

    def start(self, target: Target) -> Tensor:
        """Return the weights that the move starts from, flat."""
        base = self.move.base
        return self._direction.state.weights(base, target) if base else target.flat

    def along(self, passes: Passes, target: Target, use: Use) -> None:
        """Do as :meth:`EagerPasses.along`, by kept noise where it is kept."""
        if self._direction.keeps:
            z, _ = self._direction.kept(target, self)
            EagerPasses.along_kept(z, self.draw(target), use)
        else:
            passes.along(target.flat, self.read_by(passes, target), use)

    def write(self, passes: Passes, target: Target, out: Tensor) -> None:
        """Write the moved tensor to ``out`` (flat), by kept noise where it is kept."""
        start = self.start(target)
        if self._numbers[target.position] is None:
            out.copy_(start)
        elif target.index is not None:
            picked = start[target.index]
            numel, numbers = target.parameter.numel(), self.read_by(passes, target)
            moved = passes.move_at(picked, target.index, numel, numbers)
            if out is not start:
                out.copy_(start)
            out[target.index] = moved
        elif self._direction.keeps:
            z, mask = self._direction.kept(target, self)
            EagerPasses.move_kept(start, out, z, mask, self.draw(target))
        else:
            passes.move(start, out, self.read_by(passes, target))

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        self.write(self.passes, self._direction.target_of(parameter), out)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        direction, passes = self._direction, self.passes
        target = direction.target_of(parameter)
        if self._numbers[target.position] is None or target.index is not None:
            self.write(passes, target, plus)
            direction.mover(self._step, self.move.negated()).write(passes, target, minus)
        elif direction.keeps:
            z, mask = direction.kept(target, self)
            start, draw = self.start(target), self.draw(target)
            EagerPasses.move_kept(start, plus, z, mask, draw)
            back = draw._replace(coefficients=-draw.coefficients)
            EagerPasses.move_kept(start, minus, z, mask, back)
        else:
            passes.move_both(self.start(target), plus, minus, self.read_by(passes, target))

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target = self._direction.target_of(parameter)
        start = self.start(target).view(parameter.shape)
        return self.moved_rows(target, rows, start.index_select(0, rows))

    def moved_rows(self, target: Target, rows: Tensor, picked: Tensor) -> Tensor:
        """Return some rows of a target moved: ``picked`` (r, ...) is what they move from."""
        parameter, passes = target.parameter, self.passes
        numel, width = parameter.numel(), parameter.numel() // parameter.shape[0]
        if self._numbers[target.position] is None:
            return picked
        numbers = self.read_by(passes, target)
        if target.index is not None:
            place, there = among(target.index, rows, width)
            flat = picked.view(-1)
            flat[place] = passes.move_at(flat[place], there, numel, numbers)
            return picked
        offsets = torch.arange(width, device=rows.device)
        index = (rows[:, None] * width + offsets).view(-1)
        moved = passes.move_at(picked.view(-1), index, numel, numbers)
        return moved.view(rows.shape[0], *parameter.shape[1:])

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """Return a z of the first term (float32, flat), written out, and the mask (bool)."""
        z, mask = self._direction.kept(target, self)
        return z * self.draw(target).coefficients[0], mask


class DenseAlone:
    """Writes the direction of a move in place of moved copies: 0 + the terms.

    For a selection that does not hang on the weights.

    Args:
        direction: of the move.
        mover: of the move.
    """

    def __init__(self, direction: Dense, mover: DenseMover) -> None:
        self._direction, self._mover, self.only = direction, mover, mover.only

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target, mover = self._direction.target_of(parameter), self._mover
        out.zero_()
        if not mover.moves(target):
            return
        passes = self._direction.probe_passes
        numbers = mover.read_by(passes, target)
        if target.index is None:
            passes.move(out, out, numbers)
        else:
            numel = target.parameter.numel()
            out[target.index] = passes.move_at(out[target.index], target.index, numel, numbers)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        nothing = parameter.new_zeros(len(rows), *parameter.shape[1:])
        return self._mover.moved_rows(self._direction.target_of(parameter), rows, nothing)


def among(index: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return which entries of some rows are named in an index.

    Args:
        index: int64 (n,), sorted: flat places in the whole tensor.
        rows: int64 (r,), in any order, each once.
        width: entries of a row.

    Returns:
        Their flat places among the rows, and in the whole tensor.
    """
    order = rows.argsort()
    inorder, row = rows[order], index // width
    found = torch.searchsorted(inorder, row).clamp(max=len(rows) - 1)
    named = inorder[found] == row
    return (order[found] * width + index % width)[named], index[named]


def _adding(flat: Tensor, change: Change, decay: float, mask: Tensor | None) -> Use:
    """Return what adds a change to parts of a tensor; each operation rounds once.

    So the bits are the same whatever draws, in whichever parts.
    """
    rounded = ROUNDINGS.get(flat.dtype)

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
