"""Perturb each row of a batch along one base direction, under random signs of its own (GRZO)."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smezo_cli.zo.directions.base import Change, DirectionContext, Named
from smezo_cli.zo.directions.dense import Dense, DenseAlone, DenseMover
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.probe import looks_up_rows, renumbered
from smezo_cli.zo.targets import Target, check

#: Purposes of the streams (seed, purpose, step, 0, name) of signs: entry (i, j) is that of row i.
OUT, IN = "signs out", "signs in"
_GRID = 2.0**-40  # of coefficients, of the largest: sums of thousands are exact in float64


def kinds_of(model: nn.Module) -> dict[int, str]:
    """Return how modules compute with other weights for each row, by their ``id``.

    "linear", "lookup", "torch norm", or "norm" of another library, which multiplies by its weight
    along the last dimension. Not of a module that shares a parameter with one that has no kind.
    """
    owned = {m: [p for p in m._parameters.values() if p is not None] for m in model.modules()}
    kinds = {m: kind for m, own in owned.items() if own and (kind := _kind_of(m, own))}
    while True:
        others = {id(p) for m, own in owned.items() if m not in kinds for p in own}
        left = {m: k for m, k in kinds.items() if not any(id(p) in others for p in owned[m])}
        if len(left) == len(kinds):
            return {id(m): kind for m, kind in kinds.items()}
        kinds = left


def _kind_of(module: nn.Module, own: Sequence[Tensor]) -> str:
    if isinstance(module, nn.Linear):
        return "linear" if type(module).forward is nn.Linear.forward else ""
    if looks_up_rows(module):
        return "lookup"
    if type(module).__name__.endswith("Norm") and all(p.dim() == 1 for p in own):
        if not type(module).__module__.startswith("torch."):
            return "norm"
        return "torch norm" if type(module) in (nn.LayerNorm, nn.RMSNorm) else ""
    return ""


class SignedNoise:
    """Perturb row i of a batch along Z_i = U * (r_i s_i^T): one Gaussian U, under the row's signs.

    U is that of MeZO, of the stream (seed, "z", step, 0, name); signs are hashes of their places.

    * The weight (m, n) of a linear layer, and the table (m, n) of an embedding: r_i (m), s_i (n).
    * Its bias, and the weight and bias of a norm: r_i alone.
    * Any other tensor: Z_i = U. So are those of a module that shares one with a module of none of
      these kinds; a table tied to a linear layer has the signs that both would have.

    Args:
        model: owns the tensors.
        num_rows: B; of each there are so many signs.
    """

    has_compiled_passes = True
    kept_bytes = 0

    def __init__(self, model: nn.Module, num_rows: int) -> None:
        self.num_rows = num_rows
        #: U
        self.dense = Dense()
        self.noise = self.dense.noise
        self._kinds = kinds_of(model)
        signed = [p for m in model.modules() if id(m) in self._kinds for p in m.parameters(False)]
        self._signed = {id(p) for p in signed}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`: U is one term, however many rows there are."""
        self.dense.bind(context, 1)
        self._seed = context.seed

    @property
    def passes(self) -> Named:
        """See :class:`Direction`."""
        return self.dense.passes

    @property
    def why_eager(self) -> str:
        """See :class:`Direction`."""
        return self.dense.why_eager

    def kind_of(self, module: nn.Module) -> str:
        """Return how a module computes with other weights for each row; "": it does not."""
        return self._kinds.get(id(module), "")

    def is_signed(self, target: Target) -> bool:
        """Return whether a tensor has signs of its own for each row."""
        return id(target.parameter) in self._signed

    def noise_bytes(self, *, compiles: bool, on_cpu: bool, free: int) -> int:
        """See :class:`Direction`."""
        return self.dense.noise_bytes(compiles=compiles, on_cpu=on_cpu, free=free)

    def state_size(self, target: Target) -> int:
        """See :class:`Direction`."""
        return self.dense.state_size(target)

    def thin_rank(self, target: Target) -> int | None:
        """See :class:`Direction`: noise under signs is no product."""
        return None

    def refreshes_at(self, step: int) -> bool:
        """See :class:`Direction`: there is no subspace."""
        return False

    def carry(self, target: Target, kept: Tensor, step: int) -> Tensor:
        """See :class:`Direction`."""
        return kept

    def begin(self, step: int) -> None:
        """See :class:`Direction`."""
        self.dense.begin(step)

    def end(self) -> None:
        """See :class:`Direction`."""
        self.dense.end()

    def mover(self, step: int, move: Move) -> "SignedMover":
        """See :class:`Direction`."""
        return SignedMover(self, step, [move], by_row=False)

    def row_mover(self, step: int, moves: Sequence[Move]) -> "SignedMover":
        """See :class:`MovesRows`."""
        return SignedMover(self, step, moves, by_row=True)

    def apply(self, step: int, move: Move) -> None:
        """See :class:`Direction`."""
        self.change(step, move, lambda target: lambda part, total: total)

    def change(self, step: int, move: Move, of: Callable[[Target], Change]) -> None:
        """See :class:`Direction`; sum_i c_i Z_i = U * (sum_i c_i r_i s_i^T)."""
        mover = self.mover(step, move)
        for target in mover.moved:
            self.dense.change_one(target, mover.base, self._under_signs(target, move, of(target)))

    def _under_signs(self, target: Target, move: Move, change: Change) -> Change:
        factor = self.factor(target, move)
        return lambda part, base: change(part, base * factor(part))

    @staticmethod
    def base_of(move: Move) -> Move:
        """Return the move along U of the step that the terms of a move are of."""
        steps = {term.key.step for term in move.terms}
        terms = tuple(Term(Key(step), 1.0) for step in steps)
        check(len(terms) <= 1, "rows move along directions of one step")
        return Move(terms, move.decay, move.base)

    def factor(self, target: Target, move: Move) -> Callable[[slice], Tensor | float]:
        """Return what gives the factor of U in parts of a flat tensor, summed over the terms.

        Coefficients are rounded to a grid on which sums in float64 are exact, in any order.
        """
        c = torch.zeros(self.num_rows, dtype=torch.float64)
        for term in move.terms:
            c[term.key.query] += term.coefficient
        grid = _GRID * 2.0 ** math.ceil(math.log2(float(c.abs().max()) or 1.0))
        c = (c / grid).round().mul_(grid).to(target.parameter.device)
        if not self.is_signed(target):
            total = float(c.sum())
            return lambda part: total
        shape, step = target.parameter.shape, move.terms[0].key.step
        out = self.signs(target, OUT, step, shape[0]).double()
        if len(shape) == 1:
            flat = (c @ out).float()
            return lambda part: flat[part]
        left, right = out.T * c, self.signs(target, IN, step, shape[1]).double()

        def of_matrix(part: slice) -> Tensor:
            start, stop, _ = part.indices(shape.numel())
            first, last = start // shape[1], -(-stop // shape[1])
            found, skipped = left[first:last] @ right, start - first * shape[1]
            return found.view(-1)[skipped : skipped + stop - start].float()

        return of_matrix

    def signs(self, target: Target, purpose: str, step: int, size: int) -> Tensor:
        """Return the signs of all rows along a side of a tensor: float32 (B, size)."""
        index = torch.arange(self.num_rows * size, device=target.parameter.device)
        return self.signs_at(target, purpose, step, size, index).view(self.num_rows, size)

    def signs_at(self, target: Target, purpose: str, step: int, size: int, index: Tensor) -> Tensor:
        """Return the signs at places row * size + entry (int64, any shape): float32, so shaped."""
        key = torch.tensor(stream_key(self._seed, purpose, step, 0, target.name))
        return draw(index, self.num_rows * size, key.to(index.device), "rademacher")

    def masks(self, step: int) -> Iterator[Tensor]:
        """See :class:`Direction`."""
        return self.dense.masks(step)

    def target_of(self, parameter: Tensor) -> Target:
        """See :class:`Direction`."""
        return self.dense.target_of(parameter)

    def scratch(self, parameter: Tensor) -> Tensor:
        """Return a flat buffer of a parameter's size, which the next module reuses."""
        numel, place = parameter.numel(), (parameter.dtype, parameter.device)
        if place not in self._scratch or self._scratch[place].numel() < numel:
            self._scratch[place] = torch.empty(numel, dtype=place[0], device=place[1])
        return self._scratch[place][:numel]

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`; another class of a layer may be known, or not, elsewhere."""
        signed = sorted(t.name for t in self.dense.targets if self.is_signed(t))
        names = hashlib.sha256(json.dumps(signed).encode()).hexdigest()
        about = {"direction": "signed rows", "num_rows": self.num_rows, "signed": names}
        return self.dense.identity() | about


class SignedMover:
    """Writes copies moved along Z_i, and computes layers whose rows are moved along Z_i each.

    Args:
        direction: what Z_i is.
        step: number of the step.
        moves: of each sequence of the model's batch, of one term; a single one: of all.
        by_row: layers whose tensors have signs are computed by the base and the signs, without a
            moved copy; a single move may else have any number of terms.
    """

    def __init__(
        self, direction: SignedNoise, step: int, moves: Sequence[Move], *, by_row: bool
    ) -> None:
        self.move, self._moves = moves[0], moves
        self._direction = direction
        #: U, once
        self.base: DenseMover = direction.dense.mover(step, direction.base_of(self.move))
        self.moved, self.only = self.base.moved, self.base.only
        self._is_by_row = by_row
        terms = [term for move in moves for term in move.terms] if by_row else []
        check(not by_row or len(terms) == len(moves), "a row is moved by one term")
        self._step = terms[0].key.step if terms else step
        self._rows = torch.tensor([term.key.query for term in terms], dtype=torch.int64)
        self._coefficients = torch.tensor([term.coefficient for term in terms])

    # --- copies -------------------------------------------------------------------------------

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`.

        Raises:
            ValueError: rows are to be moved apart, and something else than the layer reads it.
        """
        self._write(parameter, (out, 1.0))

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.PairMover`."""
        self._write(parameter, (plus, 1.0), (minus, -1.0))

    def _write(self, parameter: Tensor, *outs: tuple[Tensor, float]) -> None:
        target = self._target_of_all_rows(parameter)
        start = self.base.start(target)
        if not self.base.moves(target):
            for out, _ in outs:
                out.copy_(start)
            return
        factor = self._direction.factor(target, self.move)

        def use(part: slice, base: Tensor, bits: Tensor | None) -> None:
            step, w = base * factor(part), start[part].float()
            for out, sign in outs:
                out[part] = w + step * sign

        dense = self._direction.dense
        if dense.keeps:
            z, _ = dense.kept(target, self.base)
            EagerPasses.along_kept(z, self.base.draw(target), use)
        else:
            passes = dense.probe_passes
            passes.along(start, self.base.read_by(passes, target), use)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        out = torch.empty_like(parameter)
        self.whole(parameter, out.view(-1))
        return out.index_select(0, rows)

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """Return the terms written out (float32, flat), and the mask (bool)."""
        z, mask = self._direction.dense.kept(target, self.base)
        return z * self._direction.factor(target, self.move)(slice(0, z.numel())), mask

    def _target_of_all_rows(self, parameter: Tensor) -> Target:
        target = self._direction.target_of(parameter)
        check(
            len(self._moves) == 1 or not self._direction.is_signed(target),
            f"{target.name} has other values for each row, and something else than its layer "
            f'reads it: leave it out by freeze=["{target.name}"]',
        )
        return target

    # --- layers -------------------------------------------------------------------------------

    def through(
        self,
        module: nn.Module,
        moved: Mapping[str, Tensor],
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        only_rows: Tensor | None,
    ) -> Tensor | None:
        """Return what a module gives where each row has its own weights; None: all have the same.

        Args:
            module: whose forward it is.
            moved: its own parameters that are to be moved, by name.
            inner: the forward, by the parameters that the module holds.
            args: of the call.
            kwargs: likewise.
            only_rows: the rows of a linear layer's weight that are to be computed.
        """
        kind = self._direction.kind_of(module) if self._is_by_row else ""
        if not kind or len(args) != 1 or kwargs:
            return None
        x, own = args[0], self._targets(moved)
        if kind == "linear":
            return self._linear(module, inner, x, own, only_rows)
        if kind == "lookup":
            return self._lookup(module, inner, x, own["weight"]) if own else None
        return self._norm(module, inner, x, own, is_torch=kind == "torch norm")

    def _targets(self, moved: Mapping[str, Tensor]) -> dict[str, Target]:
        targets = {name: self._direction.target_of(p) for name, p in moved.items()}
        return {name: target for name, target in targets.items() if self.base.moves(target)}

    def _linear(
        self,
        module: nn.Module,
        inner: Callable[..., Any],
        x: Tensor,
        own: dict[str, Target],
        only_rows: Tensor | None,
    ) -> Tensor:
        """Return x W^T + b + c r_i * ((x * s_i) U^T) + c t_i * U_b."""
        held = dict(module._parameters)
        try:
            for name, p in held.items() if only_rows is not None else ():
                if p is not None:
                    module._parameters[name] = p.index_select(0, only_rows)  # type: ignore[assignment,arg-type]  # a plain tensor serves as the weight
            y: Tensor = inner(x)
        finally:
            module._parameters.update(held)
        if (weight := own.get("weight")) is not None:
            u = self._base_of(weight, only_rows)
            out, into = self._signs(weight, OUT, only_rows), self._signs(weight, IN)
            x = x.to(u.device)
            z = F.linear(x * self._aligned(into, x), u.to(x.dtype)).to(y.dtype)
            y = torch.addcmul(y, z, self._aligned(self._times(out), z))
        if (bias := own.get("bias")) is not None:
            step = self._times(self._signs(bias, OUT, only_rows)) * self._base_of(bias, only_rows)
            y = y + self._aligned(step, y)
        return y

    def _lookup(
        self, module: nn.Module, inner: Callable[..., Any], ids: Tensor, table: Target
    ) -> Tensor | None:
        """Look up W + c U * (r_i s_i^T), in a table of the entries that are asked for."""
        weight = table.parameter
        ids = ids.to(weight.device)
        rows = self._rows.to(ids.device).view(-1, *[1] * (ids.dim() - 1))
        check(
            len(rows) == 1 or ids.shape[0] in (1, len(rows)),
            _unknown(module, ids, len(self._rows)),
        )
        index = rows * weight.shape[0] + ids
        picked = ids.expand_as(index)
        distinct, (place,) = renumbered(picked)
        u = self._base_rows(weight, distinct)[place].float()
        direction, step = self._direction, self._step
        signs = direction.signs_at(table, OUT, step, weight.shape[0], index)
        c = self._coefficients.to(ids.device).view(rows.shape)
        signs = (signs * c)[..., None] * self._aligned(self._signs(table, IN), u)
        moved = weight.detach()[picked].float().addcmul_(u, signs).to(weight.dtype)
        held, padding = module._parameters["weight"], module.padding_idx
        try:
            module._parameters["weight"] = moved.view(-1, moved.shape[-1])  # type: ignore[assignment]  # a plain tensor serves as the weight
            module.padding_idx = None  # type: ignore[assignment]  # a position of the old numbering
            places = torch.arange(picked.numel(), device=ids.device)
            found: Tensor = inner(places.view(picked.shape))
        finally:
            module._parameters["weight"], module.padding_idx = held, padding
        return found

    def _norm(
        self,
        module: nn.Module,
        inner: Callable[..., Any],
        x: Tensor,
        own: dict[str, Target],
        *,
        is_torch: bool,
    ) -> Tensor:
        """Return what a norm gives whose weight and bias are those of each row."""
        steps = {
            name: self._aligned(self._times(self._signs(t, OUT)) * self._base_of(t), x)
            for name, t in own.items()
        }
        if is_torch:
            found: Tensor = inner(x)
            if "weight" in steps:
                by = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
                normed = by(x, module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]  # both have them
                found = found + (normed * steps["weight"]).to(found.dtype)
            return found + steps["bias"].to(found.dtype) if "bias" in steps else found
        held = dict(module._parameters)
        try:
            for name, step in steps.items():
                p = held[name]
                module._parameters[name] = (p + step).to(p.dtype)  # type: ignore[assignment,operator,union-attr]  # a plain tensor serves as the weight
            value: Tensor = inner(x)
        finally:
            module._parameters.update(held)
        return value

    def _base_of(self, target: Target, rows: Tensor | None = None) -> Tensor:
        """Return U of a target, or some of its rows, in its dtype."""
        parameter, dense = target.parameter, self._direction.dense
        if rows is not None:
            return self._base_rows(parameter, rows)
        out = self._direction.scratch(parameter)
        if dense.keeps:
            out.copy_(dense.kept(target, self.base)[0])
        else:
            DenseAlone(dense, self.base).whole(parameter, out)
        return out.view(parameter.shape)

    def _base_rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        return DenseAlone(self._direction.dense, self.base).rows(parameter, rows)

    def _signs(self, target: Target, purpose: str, only: Tensor | None = None) -> Tensor:
        """Return the signs of each sequence along a side of a tensor: (sequences, size)."""
        size = target.parameter.shape[0 if purpose == OUT else 1]
        found = self._direction.signs(target, purpose, self._step, size)
        found = found[self._rows.to(found.device)]
        return found if only is None else found[:, only]

    def _times(self, signs: Tensor) -> Tensor:
        """Return signs (sequences, size) times the coefficient of their move."""
        return signs * self._coefficients.to(signs.device)[:, None]

    def _aligned(self, of_sequences: Tensor, like: Tensor) -> Tensor:
        """Return what each sequence has (sequences, size) so that it broadcasts with a tensor.

        Its first dimension goes over sequences, or over the tokens of one after the other.

        Raises:
            ValueError: it does neither.
        """
        num, size = of_sequences.shape
        of_sequences = of_sequences.to(like.dtype)
        if num == 1 or (like.dim() == 2 and like.shape[0] == num):
            return of_sequences
        if like.dim() > 2 and like.shape[0] in (1, num):
            return of_sequences.view(num, *[1] * (like.dim() - 2), size)
        check(like.dim() == 2 and like.shape[0] % num == 0, _unknown(None, like, num))
        return of_sequences.repeat_interleave(like.shape[0] // num, 0)


def _unknown(module: nn.Module | None, x: Tensor, num: int) -> str:
    of = "layer" if module is None else type(module).__name__
    return (
        f"the model's {of} is given a tensor of shape {list(x.shape)}, whose entries cannot be "
        f"told apart as those of {num} rows of a batch: choose another method, such as method=mezo"
    )
