"""Check, before a run relies on it, that probes reach every trained parameter."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from smezo_cli.zo import reached
from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.executors.choose import Executors
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.reached import Losses, Reads, Reference, Rounding, Unreached
from smezo_cli.zo.step import Closure, NonFiniteLoss
from smezo_cli.zo.targets import Target, number
from smezo_cli.zo.turns import refuse


class SelfCheck:
    """Compares losses by probes with losses of an exactly saved copy perturbed in place.

    Codes are left out: moved weights have no place among them, and whatever reads them without
    their layer fails, for they are integers.

    Args:
        model: whose parameters are trained.
        targets: these parameters.
        probe: of the model.
        executors: of the model.
        mover: makes a move of one size along the next step's first direction.
        forget: drops what was kept of that direction.
        eps: radius of the probes.
        step: number of the next step.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        probe: FunctionalProbe,
        executors: Executors,
        mover: Callable[[float], PointMover],
        forget: Callable[[], None],
        eps: float,
        step: int,
    ) -> None:
        self._step = step
        self._model, self._probe = model, probe
        self._targets = [t for t in targets if t.layer is None]
        #: ``id`` of what is checked; None: all that is trained
        self._only = None
        if len(self._targets) < len(targets):
            self._only = {id(t.parameter) for t in self._targets}
        self._executors, self._mover, self._forget, self._eps = executors, mover, forget, eps
        self._num_weights = sum(t.parameter.numel() for t in self._targets)

    def __call__(self, closure: Closure) -> int:
        """Check all kinds of parameters, and lockstep where it is used; return their number.

        Raises:
            Unreached, ValueError, NonFiniteLoss: see :meth:`ZeroOrder.self_check`.
        """
        unmoved = self._probe.at(self._moves_nothing(), self._only)
        self._executors.compiler.find(closure, unmoved)
        with self._executors.compiler():
            base = self._base(closure)
            if self._executors.is_in_place:
                return 0
            wrong, base = self._direct_reads(closure, base)
            kinds = self._kinds()
            for kind, targets in kinds.items():
                asked = [t for t in targets if t.name not in wrong]
                found = self._disagreeing(kind, asked, closure, base)
                wrong |= {t.name: kind for t in found if t.name not in wrong}
            self._refuse(wrong, closure, base)
            if self._executors.used is self._executors.lockstep:
                self._check_lockstep(closure, base)
        return len(kinds)

    def check_reads(self, closure: Closure) -> None:
        """Ask for parameters that are read without their owners: one forward where there are none.

        Raises:
            Unreached, ValueError, NonFiniteLoss: see :meth:`ZeroOrder.check_reads`.
        """
        if self._executors.is_in_place:
            return
        with self._executors.compiler():
            if self._reads(closure).read:
                wrong, base = self._direct_reads(closure, self._base(closure))
                self._refuse(wrong, closure, base)

    def _moves_nothing(self) -> Reads:
        return Reads([t.parameter for t in self._targets])

    def _base(self, closure: Closure) -> Reference:
        """Measure the loss of the weights as they are, twice.

        Raises:
            ValueError: the two differ by more than rounding.
        """
        first = closure().detach()
        devices = {t.parameter.device for t in self._targets}
        states = reached.generators(devices)
        second = closure().detach()
        is_drawn = states != reached.generators(devices)
        one, other = float(first), float(second)
        if not (math.isfinite(one) and math.isfinite(other)):
            raise NonFiniteLoss(f"loss {one} and {other} at step {self._step}")
        eps = torch.finfo(torch.float32).eps
        of_loss = max(eps, torch.finfo(first.dtype).eps) if first.is_floating_point() else eps
        coarsest = max([of_loss, *(torch.finfo(t.parameter.dtype).eps for t in self._targets)])
        rounding = Rounding(coarsest, of_loss, abs(one - other))
        if rounding.is_random(one, other, is_drawn):
            raise ValueError(reached.random_closure(one, other, is_drawn))
        return Reference(one, rounding, is_drawn)

    def _reads(self, closure: Closure) -> Reads:
        """Return what is read past the probe, and the loss of a probe that moves nothing."""
        reads = self._moves_nothing()
        with self._probe.at(reads, self._only), reads:
            reads.loss = number(closure())
        return reads

    def _direct_reads(self, closure: Closure, base: Reference) -> tuple[dict[str, str], Reference]:
        """Names and kinds of those read past their probes, if it matters; and what is known now.

        A module around the owner that reads them holds their moved copies from now on, if that
        helps.
        """
        reads = self._reads(closure)
        known = base.rounding
        noise = max(known.noise, abs(reads.loss - base.unmoved))
        base = base._replace(rounding=Rounding(max(known.eps, reads.eps), known.of_loss, noise))

        def read(targets: Sequence[Target]) -> list[Target]:
            found = self._reads(closure).read
            return [t for t in targets if id(t.parameter) in found]

        def agrees_exactly(targets: Sequence[Target]) -> bool:
            return self._is_reached(targets, closure, base, was_read_directly=True)

        read_past = self._widen_scope(
            [t for t in self._targets if id(t.parameter) in reads.read], read
        )
        sizes = [t.parameter.numel() for t in read_past]
        parts = reached.checked_together(sizes, self._num_weights)
        wrong = [t for part in parts for t in reached.search(read_past[part], agrees_exactly)]
        return {target.name: self._kind_of(target) for target in wrong}, base

    def _widen_scope(
        self, wrong: list[Target], still: Callable[[list[Target]], list[Target]]
    ) -> list[Target]:
        """Perturb each for the whole forward of a module around it; return those unhelped."""
        around = {t.name: iter(reached.enclosing(self._model, t.parameter)) for t in wrong}
        while wrong:
            modules = [next(around[t.name], None) for t in wrong]
            for target, module in zip(wrong, modules, strict=True):
                self._probe.lend(target.parameter, module)
            if not any(module is not None for module in modules):
                break
            wrong = still(wrong)
        return wrong

    def _disagreeing(
        self, kind: str, targets: list[Target], closure: Closure, base: Reference
    ) -> list[Target]:
        """Return parameters of a kind whose functional loss is another than that in place."""

        def agree(asked: Sequence[Target]) -> bool:
            losses = self._losses_of_move(asked, closure, base, 1.0)
            if not all(map(math.isfinite, losses)):
                raise NonFiniteLoss(f"loss {losses.in_place} at weights moved by eps")
            return losses.error <= max(map(base.rounding.tolerance, losses))

        def wrong_of(targets: list[Target]) -> list[Target]:
            sizes = [t.parameter.numel() for t in targets]
            parts = reached.checked_together(sizes, self._num_weights)
            found = [t for part in parts for t in reached.search(targets[part], agree)]
            return [t for t in found if not self._is_reached([t], closure, base)]

        if not wrong_of(targets):
            return []
        names = {id(t.parameter): t.name for t in self._targets}
        by_name = {t.name: t for t in self._targets}
        everyone = [by_name[name] for name in reached.alike(self._probe, names, kind)]
        return self._widen_scope(wrong_of(everyone), wrong_of)

    def _is_reached(
        self,
        targets: Sequence[Target],
        closure: Closure,
        base: Reference,
        was_read_directly: bool = False,
    ) -> bool:
        def ask(scale: float) -> Losses:
            return self._losses_of_move(targets, closure, base, scale)

        return reached.is_reached(ask, base.rounding, was_read_directly)

    def _losses_of_move(
        self, targets: Sequence[Target], closure: Closure, base: Reference, scale: float
    ) -> Losses:
        """Measure losses where these are moved alone, by a multiple of the self-check's step."""
        mover = self._mover(scale * max(self._eps, 1e-2))
        with self._probe.at(mover, only={id(t.parameter) for t in targets}):
            functional = number(closure())
        saved = [t.flat.clone() for t in targets]
        torch.clear_autocast_cache()  # it may hold casts of what is written to
        try:
            for target in targets:
                mover.whole(target.parameter, target.flat)
            in_place = number(closure())
        finally:
            for target, copy in zip(targets, saved, strict=True):
                target.flat.copy_(copy)
            self._forget()
            torch.clear_autocast_cache()
        return Losses(functional, in_place, base.unmoved)

    def _refuse(self, wrong: Mapping[str, str], closure: Closure, base: Reference) -> None:
        """Name what is not reached; a closure whose losses differ by chance is told apart."""
        if not wrong:
            return
        losses = [number(closure()) for _ in range(4)]
        lowest, highest = min(losses), max(losses)
        if base.rounding.is_random(lowest, highest, base.is_drawn):
            raise ValueError(reached.random_closure(lowest, highest, base.is_drawn))
        first, *_ = found = [t for t in self._targets if t.name in wrong]
        hint = reached.fast_path_of(self._model, first.parameter)
        raise Unreached(
            {t.name: wrong[t.name] for t in found}, [t.name for t in self._targets], hint
        )

    def _check_lockstep(self, closure: Closure, base: Reference) -> None:
        movers = [self._mover(1e-2), self._mover(-1e-2)]
        pairs: list[list[Tensor]] = [
            executor.losses(closure, movers)
            for executor in (self._executors.sequential, self._executors.lockstep)
        ]
        self._forget()
        for a, b in zip(*(map(number, pair) for pair in pairs), strict=True):
            if not abs(a - b) <= base.rounding.tolerance(a):
                refuse("its losses differ from those of one forward after the other")

    def _kind_of(self, target: Target) -> str:
        return next(
            f"{type(module).__name__}.{name}"
            for module, own in self._probe.owners
            for name in own
            if module._parameters[name] is target.parameter
        )

    def _kinds(self) -> dict[str, list[Target]]:
        by_name = {t.name: t for t in self._targets}
        names = {id(t.parameter): t.name for t in self._targets}
        kinds = reached.kinds_to_check(self._probe, names, self._num_weights)
        return {kind: [by_name[name] for name in chosen] for kind, chosen in kinds.items()}
