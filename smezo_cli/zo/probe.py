"""Compute losses at perturbed weights without writing to the weights.

Every module that directly owns perturbed parameters computes, while its forward runs, with a
scratch copy moved along the direction, dropped right afterwards (Sparse-MeZO's memory-efficient
form S-MeZO-EI, arXiv 2402.15751). Memory stays that of inference plus the scratch of one module.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smezo_cli.zo.turns import Turns, refuse


class Mover(Protocol):
    """Writes moved copies of parameters; see :class:`smezo_cli.zo.directions.dense.DenseMover`."""

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """Write the moved parameter to ``out`` (flat, of its dtype; of codes, of the layer's)."""

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """Moved copy of some rows (int64 (r,)) of a parameter: (r, ...)."""


class PairMover(Mover, Protocol):
    """Describe a mover that can write the copy moved the other way, too."""

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """Write the parameter moved and moved back (both flat, of its dtype), from one draw."""


def moves_nothing(mover: object) -> bool:
    """Return whether a mover moves nothing: its point is the weights themselves."""
    return getattr(mover, "only", None) == frozenset()


@contextmanager
def only_rows(module: nn.Module, rows: Tensor) -> Iterator[None]:
    """Let a linear layer compute only these output rows: the logits of the label words.

    Inside, ``module(x)`` gives (..., len(rows)), with or without a probe, and gradients flow to the
    whole weight.

    Args:
        module: owns ``weight`` (out, in) and perhaps ``bias`` (out,).
        rows: int64 (r,).
    """
    rows = rows.to(module.get_parameter("weight").device)
    inner = module.forward
    held = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if getattr(inner, "is_probe", False):
            return inner(*args, only_rows=rows, **kwargs)
        kept = {k: p for k, p in module._parameters.items() if p is not None}
        try:
            for name, parameter in kept.items():
                module._parameters[name] = parameter.index_select(0, rows)  # type: ignore[assignment]  # a plain tensor serves as the weight
            return inner(*args, **kwargs)
        finally:
            module._parameters.update(kept)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        _restore(module, held)


class FunctionalProbe:
    """Wraps the owners of the perturbed parameters of a model.

    Args:
        model: any module.
        parameters: the perturbed ones, by identity; shared (tied) ones are moved alike everywhere.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        wanted = {id(p) for p in parameters}
        #: (module, names of its own perturbed parameters)
        self.owners: list[tuple[nn.Module, list[str]]] = [
            (module, names)
            for module in model.modules()
            if (
                names := [
                    name
                    for name, p in module._parameters.items()
                    if p is not None and id(p) in wanted
                ]
            )
        ]
        #: shape and dtype of moved copies, where they are not those of the parameter: of codes
        self._forms: dict[int, tuple[torch.Size, torch.dtype]] = {
            id(module._parameters[name]): form
            for module, names in self.owners
            for name, form in getattr(module, "moved_as", {}).items()
            if name in names
        }
        self._scratch: dict[tuple[int, int, int, torch.dtype, torch.device], Tensor] = {}
        #: parts of the scratch, flat and in shape, by (depth, slot, side, id of the parameter)
        self._parts: dict[tuple[int, int, int, int], tuple[nn.Parameter, Tensor, Tensor]] = {}
        self._addresses: set[int] = set()
        self._depth = 0
        self._mover: Mover | None = None
        #: the forwards of the modules that are wrapped just now, where they are not their class's
        self._held: Mapping[nn.Module, Any] = {}
        self._pair: tuple[PairMover, PairMover, Turns] | None = None
        self._ready: tuple[nn.Module, int] | None = (
            None  # whose scratch is drawn, and for which side
        )
        #: the forward that each owner had when it was wrapped, and the wrapped one
        self._wrapped: dict[nn.Module, tuple[Any, Callable[..., Any]]] = {}
        #: of a parameter, by its ``id``: the module in whose forward every owner holds the copy
        self._lent: dict[int, nn.Module] = {}
        self._places = self._placed()

    def lend(self, parameter: nn.Parameter, module: nn.Module | None) -> None:
        """Have the moved copy in place for the whole forward of a module that contains its owners.

        For a parameter that this module's forward reads by itself (Mamba's ``self.dt_proj.weight``)
        without calling the owner.

        Args:
            parameter: one of the perturbed ones.
            module: None undoes it.
        """
        self._wrapped.clear()
        if module is None:
            self._lent.pop(id(parameter), None)
        else:
            self._lent[id(parameter)] = module
        self._places = self._placed()

    def _placed(self) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
        """Return the (owner, name) that the forward of each wrapped module moves."""
        places = {module: [(module, name) for name in own] for module, own in self.owners}
        for module, own in self.owners if self._lent else ():
            for name in own:
                lent = self._lent.get(id(module._parameters[name]))
                if lent is not None and lent is not module:
                    places.setdefault(lent, []).append((module, name))
        return places

    @contextmanager
    def at(self, mover: Mover, only: set[int] | None = None) -> Iterator[None]:
        """Inside, the model computes with the perturbed parameters moved by ``mover``.

        Args:
            mover: writes the moved copies.
            only: ``id`` of the parameters to move; None: all that the mover moves.
        """
        places = self._places
        only = getattr(mover, "only", None) if only is None else only
        held = {module: module.__dict__.get("forward") for module in places}
        before, self._mover = (self._mover, self._held), mover
        self._held = held
        for module, moved in places.items():
            if only is None:
                made = self._wrapped.get(module)
                if made is None or made[0] is not held[module]:
                    made = self._wrapped[module] = held[module], self._wrap(module, moved)
                module.__dict__["forward"] = made[1]
            elif some := [(m, n) for m, n in moved if id(m._parameters[n]) in only]:
                module.__dict__["forward"] = self._wrap(module, some)
        try:
            yield
        finally:
            self._mover, self._held = before
            for module, forward in held.items():
                _restore(module, forward)

    def moved(self) -> list[tuple[nn.Module, list[str]]]:
        """Return the modules that are wrapped just now, and which parameters each one moves."""
        only = getattr(self._mover, "only", None)

        def own(module: nn.Module, places: list[tuple[nn.Module, str]]) -> list[str]:
            names = [name for owner, name in places if owner is module]
            return [n for n in names if only is None or id(module._parameters[n]) in only]

        return [
            (module, own(module, places))
            for module, places in self._places.items()
            if getattr(module.__dict__.get("forward"), "is_probe", False)
        ]

    def plain_forward(self, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """Return what computes x W^T + b of a wrapped module by its weights as they are.

        None: as far as can be seen it computes something else. A forward of another make says that
        it does by an attribute ``is_linear``.
        """
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            return None
        held = self._held.get(module)
        if held is None:
            return MethodType(nn.Linear.forward, module)
        return held if getattr(held, "is_linear", False) else None

    @contextmanager
    def pointed_at(self, mover: Mover) -> Iterator[None]:
        """Inside, within :meth:`at`, the same parameters are moved by another mover."""
        before, self._mover = self._mover, mover
        try:
            yield
        finally:
            self._mover = before

    def drop_scratch(self) -> None:
        """Free the scratch, outside of any probe; the next one makes what it needs."""
        self._scratch.clear()
        self._parts.clear()
        self._addresses.clear()

    @contextmanager
    def in_turns(self, plus: PairMover, minus: PairMover, turns: Turns) -> Iterator[None]:
        """Do as :meth:`at` for the two forwards of ``turns``, with one draw for both.

        Args:
            plus: moves for side 0, and writes for both.
            minus: moves for side 1 what is not moved whole.
            turns: says whose turn it is.
        """
        self._pair, self._ready = (plus, minus, turns), None
        try:
            with self.at(plus):
                yield
        finally:
            self._pair = self._ready = None

    def _wrap(
        self, module: nn.Module, places: Sequence[tuple[nn.Module, str]]
    ) -> Callable[..., Any]:
        inner = module.forward
        by_rows = looks_up_rows(module)
        parameters = module._parameters
        # (where it is held, name, the parameter)
        held = [(owner._parameters, name, owner._parameters[name]) for owner, name in places]

        def forward(*args: Any, only_rows: Tensor | None = None, **kwargs: Any) -> Any:
            mover, kept = self._mover, dict(parameters)
            assert mover is not None
            # Of those that are not in place already: in a forward that is entered again, or lent.
            still = [
                (slot, *place) for slot, place in enumerate(held) if place[0][place[1]] is place[2]
            ]
            if (not still or moves_nothing(mover)) and only_rows is None:
                return inner(*args, **kwargs)
            own = {name: p for _, where, name, p in still if where is parameters}
            # A mover may compute a layer by itself, such as one with other weights for each row.
            if (through := getattr(mover, "through", None)) is not None:
                found = through(module, own, inner, args, kwargs, only_rows)
                if found is not None:
                    return found
            turns, side = None, 0
            if self._pair is not None:
                turns = self._pair[2]
                if not turns.is_running:
                    refuse(f"the closure calls a {type(module).__name__} of the model by itself")
                side = turns.side
                mover = self._pair[1] if side else self._pair[0]
            lent = [place for place in still if place[1] is not parameters]
            by_row = by_rows and len(args) == 1 and not kwargs and "weight" in own and not lent
            is_first = False
            self._depth += 1
            try:
                if by_row:
                    padding = module.padding_idx
                    # Of a model on several devices what moves them is in the inner forward.
                    rows, args = renumbered(args[0].to(own["weight"].device))  # type: ignore[union-attr]  # owners have it
                    module.padding_idx = None  # type: ignore[assignment]  # a position of the old numbering
                    parameters["weight"] = mover.rows(own["weight"], rows)  # type: ignore[assignment,arg-type]  # owners have it
                elif only_rows is not None:
                    parameters.update(
                        {
                            name: mover.rows(p, only_rows)  # type: ignore[misc]  # likewise
                            if name in own
                            else p.index_select(0, only_rows)
                            for name, p in kept.items()
                            if p is not None
                        }
                    )
                    for slot, where, name, p in lent:
                        where[name] = self._whole(slot, p, mover)  # type: ignore[arg-type,assignment]  # likewise
                elif turns is not None and self._depth == 1:
                    is_first = self._ready is None or self._ready != (module, side)
                    for slot, where, name, p in still:
                        where[name] = self._drawn(slot, p, side, is_first)  # type: ignore[arg-type,assignment]  # likewise
                    self._ready = (module, 1 - side) if is_first else None
                else:
                    for slot, where, name, p in still:
                        where[name] = self._whole(slot, p, mover)  # type: ignore[arg-type,assignment]  # likewise
                # What a module returns may be its parameter, in scratch that the next one reuses.
                value = _apart(inner(*args, **kwargs), self._addresses)
            finally:
                self._depth -= 1
                parameters.update(kept)
                for _, where, name, p in still:
                    where[name] = p
                if by_row:
                    module.padding_idx = padding
            if is_first and turns is not None:
                turns.give_turn()  # while the weights and the noise are in the cache
            return value

        forward.is_probe = True  # type: ignore[attr-defined]  # read by only_rows
        return forward

    def _whole(self, slot: int, parameter: nn.Parameter, mover: Mover) -> Tensor:
        """Return a moved copy in this nesting depth's scratch, which the next module reuses."""
        _, flat, shaped = self._part(slot, 0, parameter)
        mover.whole(parameter, flat)
        # A mover may place something else that is made from what it has written, such as a dual.
        placed = getattr(mover, "placed", None)
        return shaped if placed is None else placed(parameter, shaped)

    def _drawn(self, slot: int, parameter: nn.Parameter, side: int, draw: bool) -> Tensor:
        """Return the copy of one side; the side that comes first draws that of the other, too."""
        assert self._pair is not None
        if draw:
            plus, minus = (self._part(slot, k, parameter)[1] for k in (0, 1))
            self._pair[0].both(parameter, plus, minus)
        return self._part(slot, side, parameter)[2]

    def _part(
        self, slot: int, side: int, parameter: nn.Parameter
    ) -> tuple[nn.Parameter, Tensor, Tensor]:
        """Return a part of the scratch of this depth, flat and in shape."""
        key, device = (self._depth, slot, side, id(parameter)), parameter.device
        part = self._parts.get(key)
        shape, dtype = self._forms.get(id(parameter), (parameter.shape, parameter.dtype))
        if part and part[2].shape == shape and (part[2].dtype, part[2].device) == (dtype, device):
            return part
        size, place = shape.numel(), (self._depth, slot, side, dtype, device)
        buffer = self._scratch.get(place)
        with torch.inference_mode(False), torch.no_grad():  # a later step may write to them
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device=device)
                self._scratch[place] = buffer
                self._parts.clear()  # some lay in the one that was too small
                self._addresses = {b.untyped_storage().data_ptr() for b in self._scratch.values()}
            flat = buffer[:size]
            # torch multiplies by a weight that asks for a gradient in another way, whether or not
            # there will be one. As a view it is not among the casts that autocast keeps.
            shaped = flat.view(shape).requires_grad_(parameter.requires_grad)
        part = self._parts[key] = parameter, flat, shaped
        return part


def _apart(value: Any, buffers: set[int]) -> Any:
    """Return the value, its tensors copied where they lie in one of the buffers."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().data_ptr() in buffers else value
    if type(value) in (tuple, list):
        return type(value)(_apart(item, buffers) for item in value)
    if type(value) is dict:
        return {key: _apart(item, buffers) for key, item in value.items()}
    return value


def _restore(module: nn.Module, held: Any) -> None:
    if held is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = held


def looks_up_rows(module: nn.Module) -> bool:
    """Return an embedding whose forward takes nothing but the ids, which may be renumbered.

    Subclasses that scale the result (Gemma) qualify; those that compute the ids (OPT's positions)
    do not, and are moved whole.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    parameters = list(inspect.signature(type(module).forward).parameters)
    return len(parameters) == 2 and parameters[1] in ("input", "input_ids")


def renumbered(ids: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    """Return the rows that ids look up (int64, sorted), and the ids as places there.

    Args:
        ids: int64 or int32, any shape. Others are left for what looks up to refuse.
    """
    rows, renumbered = torch.unique(ids, return_inverse=True)
    if rows.dtype == torch.int32:
        rows = rows.long()  # a row times its width may be more than it holds
    return rows, (renumbered,)
