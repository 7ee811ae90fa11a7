"""Perturb matrices along products of thin ones, of which some stay for many steps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.directions.base import Change, DirectionContext
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.directions.products import PRODUCTS, Frames
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.choose import Passes
from smezo_cli.zo.passes.draw import Numbers, Rule, as_draws
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.passes.low_rank import (
    EagerLowRank,
    Factors,
    LowRankPasses,
    NumbaLowRank,
)
from smezo_cli.zo.selections import masks
from smezo_cli.zo.targets import Target, check, one_of


class Factored:
    """Make u(key) of a matrix W (m, n) by lifting a small random core by factors that stay a while.

    * "uv" (LOZO, arXiv 2410.07698): U V^T, both Gaussian. The core is U (m, r).
    * "uzv" (SubZero, arXiv 2410.08989): sqrt(m n) / r U Z V^T, U and V of orthonormal columns, Z
      Gaussian: as long as dense noise on average. The core is Z (r, r), and r at most m and n.
    * "pz" (ZO-Muon, arXiv 2602.17155): P Z, P of orthonormal columns, Z Gaussian. The core is
      Z (r, n), and r at most m.
    * "cp" (TeZO, arXiv 2501.19057): U diag(tau) V^T / sqrt(r), all Gaussian: as long as dense noise
      on average. The core is tau (1, r).
    * "ab" (EGGROLL, arXiv 2511.16652): A B^T / sqrt(r), both Gaussian and in the core: likewise.

    The core is drawn from (seed, "u" or "z", step, query, name), factors from (seed, "v" or "left"
    and "right", step // refresh_every, 0, name), with 0 for good. A move adds cores first, so that
    its cost does not grow with the number of its terms, and an update of cores is one of a
    subspace; but of "ab" it is a product of a rank that grows with the terms.

    A tensor of more than two dimensions is the matrix (shape[0], the others); one of less is
    perturbed along dense noise, as is one of which single entries are trained.

    Args:
        kind: "uv", "uzv", "pz", "cp" or "ab".
        rank: r.
        refresh_every: steps that factors stay for; None, of "cp" and "ab" alone: for good.
        is_square: the entries of a matrix are put into the most square one of as many, first.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, kind: str, rank: int, refresh_every: int | None, *, is_square: bool = False
    ) -> None:
        one_of("kind", kind, tuple(PRODUCTS))
        check(rank >= 1, f"rank={rank}: must be at least 1")
        self.kind, self.rank, self.refresh_every = kind, rank, refresh_every
        self.product = PRODUCTS[kind]
        never = self.product.stays
        allowed = refresh_every is None if never else (refresh_every or 0) >= 1
        words = "None: no factor is renewed" if never else "must be at least 1"
        check(allowed, f"refresh_every={refresh_every}: {words}")
        self.is_square = is_square
        #: what tensors without factors are perturbed along
        self.dense = Dense()

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`.

        Raises:
            ValueError: noise cannot be kept with these arguments.
        """
        self.dense.bind(context, num_terms)
        rule = Rule(context.selection.rule, stochastic=context.is_stochastic)
        kind = NumbaLowRank if self.dense.passes.name == "numba" else EagerLowRank
        self.update_passes: LowRankPasses = kind(rule)
        self.probe_passes: LowRankPasses = kind(replace(rule, stochastic=False))
        self.eager = EagerLowRank(self.probe_passes.rule)
        #: whether the mask of an entry depends on where it is
        self.has_random_mask = context.selection.rule == "random"
        self._interval = -1
        self._factors: dict[str, Frames] = {}
        #: of each tensor, the core that was drawn last in this step, and its key
        self._drawn_last: dict[str, tuple[Key, Tensor]] = {}

    @property
    def passes(self) -> Passes:
        """See :class:`Direction`."""
        return self.dense.passes

    @property
    def why_eager(self) -> str:
        """See :class:`Direction`."""
        return self.dense.why_eager

    # --- sizes --------------------------------------------------------------------------------

    def shape_of(self, target: Target) -> tuple[int, int] | None:
        """Return the shape of the matrix that a tensor is; None: it is perturbed densely."""
        shape = target.parameter.shape
        numel = shape.numel()
        if len(shape) < 2 or not numel or target.index is not None:
            return None
        rows = shape[0]
        if self.is_square:
            rows = next(k for k in range(math.isqrt(numel), 0, -1) if numel % k == 0)
        return rows, numel // rows

    def rank_of(self, target: Target) -> int:
        """Return the rank of a matrix's factors; orthonormal ones have no more than its sides."""
        shape = self.shape_of(target)
        assert shape is not None
        return self.product.rank(shape, self.rank)

    def core_shape(self, target: Target) -> tuple[int, int] | None:
        """Return the shape of a matrix's core; None: it has none."""
        shape = self.shape_of(target)
        return None if shape is None else self.product.core_shape(shape, self.rank_of(target))

    def thin_rank(self, target: Target) -> int | None:
        """See :class:`Direction`."""
        is_itself = self.shape_of(target) == tuple(target.parameter.shape)
        takes_all = masks.takes_all(self.dense.selection.rule, target.h)
        return self.rank_of(target) if is_itself and takes_all else None

    def state_size(self, target: Target) -> int:
        """Return the numbers of a core: what an update keeps so many of."""
        core = self.core_shape(target)
        return target.num_trained if core is None else math.prod(core)

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of the factors, which are kept while they stay."""
        found = 0
        for target in self.dense.targets:
            if (shape := self.shape_of(target)) is not None:
                found += 4 * self.product.num_kept(shape, self.rank_of(target))
        return found

    has_compiled_passes = True

    def noise_bytes(self, *, compiles: bool, on_cpu: bool, free: int) -> int:
        """See :class:`Direction`; of tensors without factors, and a core of the others."""
        dense = [t for t in self.dense.targets if self.shape_of(t) is None]
        kept = self.dense.noise_bytes_of(dense, compiles=compiles, on_cpu=on_cpu, free=free)
        cores = (self.state_size(t) for t in self.dense.targets if self.shape_of(t) is not None)
        return kept + 4 * sum(cores)

    # --- steps --------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """See :class:`Direction`."""
        self.dense.begin(step)
        self._set_interval(self._interval_of(step))
        self._drawn_last.clear()

    def end(self) -> None:
        """See :class:`Direction`."""
        self.dense.end()
        self._drawn_last.clear()

    def _interval_of(self, step: int) -> int:
        return 0 if self.refresh_every is None else step // self.refresh_every

    def _set_interval(self, interval: int) -> None:
        if interval != self._interval:
            self._interval = interval
            self._factors.clear()

    def mover(self, step: int, move: Move) -> "FactoredMover":
        """See :class:`Direction`.

        Raises:
            ValueError: a term is of a step with other factors.
        """
        interval = self._interval_of(step)
        for term in move.terms:
            check(
                self._interval_of(term.key.step) == interval,
                f"a direction of step {term.key.step} has other factors than those of step {step}",
            )
        self._set_interval(interval)
        return FactoredMover(self, step, move)

    def apply(self, step: int, move: Move) -> None:
        """See :class:`Direction`."""
        mover = self.mover(step, move)
        for target in mover.moved:
            if self.shape_of(target) is None:
                mover.noise.write(self.dense.passes, target, target.flat)
            else:
                self._update(target, mover, mover.factors(target))

    def change(self, step: int, move: Move, of: Callable[[Target], Change]) -> None:
        """See :class:`Direction`; of a matrix, what is changed is the core, in one part.

        Raises:
            ValueError: a sum of terms has no core.
        """
        check(
            self.product.adds_cores, f"kind={self.kind}: sums have no core to be changed: use SGD"
        )
        mover = self.mover(step, move)
        for target in mover.moved:
            if self.shape_of(target) is None:
                self.dense.change_one(target, mover.noise, of(target))
            else:
                core = mover.core(target)
                changed = of(target)(slice(0, core.numel()), core)
                self._update(target, mover, self.lifted(target, changed))

    def _update(self, target: Target, mover: "FactoredMover", factors: Factors) -> None:
        """Add a product to the weights."""
        passes, start = self.update_passes, mover.noise.start(target)
        passes.move(start, target.flat, factors, mover.read_by(passes, target))

    def refreshes_at(self, step: int) -> bool:
        """Return whether a step has other factors than the one before it."""
        return step > 0 and self._interval_of(step) != self._interval_of(step - 1)

    def carry(self, target: Target, core: Tensor, step: int) -> Tensor:
        """Return what a kept core of the factors before stands for, as those of this step show it.

        See :meth:`smezo_cli.zo.directions.products.Product.carried`.
        """
        shape, size = self.shape_of(target), self.core_shape(target)
        if shape is None or size is None:
            return core
        interval = self._interval_of(step)
        old, new = self._drawn(target, interval - 1), self._drawn(target, interval)
        return self.product.carried(old, new, core.view(size), shape).view(-1)

    # --- factors and cores --------------------------------------------------------------------

    def factors_of(self, target: Target) -> Frames:
        """Return the factors of the present interval that stay; kept while it lasts."""
        if target.name not in self._factors:
            self._factors[target.name] = self._drawn(target, self._interval)
        return self._factors[target.name]

    def core(self, target: Target, key: Key, draw: Any) -> Tensor:
        """Return the core of a key (float32, flat); kept, as both sides and the update ask for it.

        Args:
            target: whose core it is.
            key: names it.
            draw: of the core, in the form that dense passes read.
        """
        known = self._drawn_last.get(target.name)
        if known is None or known[0] != key:
            device = target.parameter.device
            known = key, self.numbers(draw, self.state_size(target), device)
            self._drawn_last[target.name] = known
        return known[1]

    def _drawn(self, target: Target, interval: int) -> Frames:
        shape, rank = self.shape_of(target), self.rank_of(target)
        assert shape is not None

        def gaussian(purpose: str, columns: int) -> Tensor:
            return self.gaussian(target, Key(interval, 0, purpose), rank, columns)

        return self.product.frames(gaussian, shape, rank)

    def gaussian(self, target: Target, key: Key, *shape: int) -> Tensor:
        """Return float32 numbers of a stream of a target, in this shape."""
        draw, size = self.draw(target, key), math.prod(shape)
        return self.numbers(draw, size, target.parameter.device).view(shape)

    def draw(self, target: Target, key: Key) -> Any:
        """Return the draw of one stream of a target, in the form that dense passes read."""
        step, query, purpose = key
        stream = self.dense.keys(purpose, step, query)[target.position]
        numbers = Numbers((stream,), (0, 0), (0, 0), math.inf, (1.0,))
        if self.dense.probe_passes.reads_numbers:
            return numbers
        return as_draws({0: numbers}, {0: target.parameter.device})[0]

    def numbers(self, draw: Any, size: int, device: torch.device) -> Tensor:
        """Return so many numbers of a draw (float32, flat), in the form that dense passes read."""
        passes = self.dense.probe_passes
        if isinstance(passes, NumbaPasses):
            return passes.numbers(size, draw)
        found = torch.empty(size, device=device)

        def use(part: slice, total: Tensor, bits: Tensor | None) -> None:
            found[part] = total

        passes.along(found, draw, use)
        return found

    def lifted(self, target: Target, core: Tensor, rows: Tensor | None = None) -> Factors:
        """Return the product that a core stands for; of some of its rows, if asked."""
        shape, size = self.shape_of(target), self.core_shape(target)
        assert shape is not None
        assert size is not None
        frames, multiply = self.factors_of(target), self.probe_passes.product
        return self.product.lifted(frames, core.view(size), shape, rows, multiply)

    def target_of(self, parameter: Tensor) -> Target:
        """See :class:`Direction`."""
        return self.dense.target_of(parameter)

    def masks(self, step: int) -> Iterator[Tensor]:
        """See :class:`Direction`."""
        return self.dense.masks(step)

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return {
            **self.dense.identity(),
            "direction": self.kind,
            "rank": self.rank,
            "refresh_every": self.refresh_every,
            "is_square": self.is_square,
        }


class FactoredMover:
    """Writes copies of tensors moved by the terms of one move; see :class:`Factored`."""

    def __init__(self, direction: Factored, step: int, move: Move) -> None:
        self.move = move
        self._direction = direction
        #: moves what has no factors; and knows the masks and what rounds by chance
        self.noise = direction.dense.mover(step, move)
        self.moved, self.only = self.noise.moved, self.noise.only
        self._is_moved = {t.position for t in self.moved}
        self._draws: dict[int, Any] | None = None

    def core(self, target: Target) -> Tensor:
        """Return the sum of the terms' cores (float32, flat)."""
        if self._draws is None:
            self._draws = self._draws_of_cores()
        direction, draw = self._direction, self._draws[target.position]
        if len(terms := self._terms_of(target)) == 1:
            return direction.core(target, terms[0].key, draw) * terms[0].coefficient
        return direction.numbers(draw, direction.state_size(target), target.parameter.device)

    def _terms_of(self, target: Target) -> list[Term]:
        """Return the terms that move a target."""
        return [t for t in self.move.terms if t.only is None or target.name in t.only]

    def _draws_of_cores(self) -> dict[int, Any]:
        """Return the draws of all cores, by positions, in the form that dense passes read.

        Where a core is that of one term it is drawn without its coefficient.
        """
        direction = self._direction
        own = direction.product.core_streams
        numbers: dict[int, Numbers] = {}
        for target in self.moved:
            terms = self._terms_of(target)
            streams = tuple(
                direction.dense.keys(own.get(purpose, purpose), step, query)[target.position]
                for step, query, purpose in (term.key for term in terms)
            )
            a = tuple(term.coefficient for term in terms) if len(terms) > 1 else (1.0,)
            numbers[target.position] = Numbers(streams, (0, 0), (0, 0), math.inf, a)
        if direction.dense.probe_passes.reads_numbers:
            return dict(numbers)
        return dict(as_draws(numbers, {t.position: t.parameter.device for t in self.moved}))

    def _is_factored(self, target: Target) -> bool:
        """Return whether a tensor is moved along a product."""
        is_matrix = self._direction.shape_of(target) is not None
        return is_matrix and target.position in self._is_moved

    def thin(self, parameter: Tensor) -> Factors | None:
        """Return what is added to a matrix as it is, if that is a product of thin ones alone.

        None: it is not moved so, or a mask leaves entries out. A right factor that stays is one
        object for all moves of a step.
        """
        direction, target = self._direction, self._direction.target_of(parameter)
        is_moved = self._is_factored(target) and not target.rests
        if not is_moved or self.move.base or self.move.decay:
            return None
        return None if direction.thin_rank(target) is None else self.factors(target)

    def factors(self, target: Target, rows: Tensor | None = None) -> Factors:
        """Return the sum of the terms as a product; of some of its rows, if asked."""
        direction = self._direction
        if direction.product.adds_cores:
            return direction.lifted(target, self.core(target), rows)
        found = []
        for term in self._terms_of(target):
            core = direction.core(target, term.key, direction.draw(target, term.key))
            one = direction.lifted(target, core, rows)
            found.append(Factors(one.left * term.coefficient, one.right))
        if len(found) == 1:
            return found[0]
        return Factors(torch.cat([x.left for x in found], 1), torch.cat([x.right for x in found]))

    def read_by(self, passes: LowRankPasses, target: Target) -> Any:
        """Return what else a pass needs, in the form that these passes read."""
        return self.noise.read_by(passes, target)

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        target, passes = self._direction.target_of(parameter), self._direction.probe_passes
        if not self._is_factored(target):
            self.noise.whole(parameter, out)
        else:
            numbers, start = self.read_by(passes, target), self.noise.start(target)
            passes.move(start, out, self.factors(target), numbers)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        target, passes = self._direction.target_of(parameter), self._direction.probe_passes
        if not self._is_factored(target):
            self.noise.both(parameter, plus, minus)
        else:
            numbers, start = self.read_by(passes, target), self.noise.start(target)
            passes.move_both(start, plus, minus, self.factors(target), numbers)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        direction = self._direction
        target, passes = direction.target_of(parameter), direction.probe_passes
        shape = direction.shape_of(target)
        if shape is None or not self._is_factored(target):
            return self.noise.rows(parameter, rows)
        picked = self.noise.start(target).view(parameter.shape).index_select(0, rows)
        flat = picked.view(-1)
        if shape[0] == parameter.shape[0] and not direction.has_random_mask:
            moved = torch.empty_like(flat)
            passes.move(flat, moved, self.factors(target, rows), self.read_by(passes, target))
        else:
            numel = parameter.numel()
            width = numel // parameter.shape[0]
            index = (rows[:, None] * width + torch.arange(width, device=rows.device)).view(-1)
            draw, factors = self.noise.draw(target), self.factors(target)
            moved = direction.eager.move_at(flat, index, numel, factors, draw)
        return moved.view_as(picked)

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """Return the terms written out (float32, flat), and the mask (bool)."""
        if not self._is_factored(target):
            return self.noise.dense(target)
        step = self._direction.probe_passes.product(self.factors(target)).view(-1)
        passes = EagerPasses(self._direction.probe_passes.rule)
        return step, passes.mask_of(target.flat, self.noise.draw(target))
