"""The zeroth-order step: choose coordinates, draw directions, turn losses into coefficients, apply.

    opt = SparseMeZO(model, lr=1e-6, eps=1e-3, sparsity=0.75)
    record = opt.step(lambda: loss_fn(model(x), y))

Works on any torch module; knows nothing of Hydra or transformers.
"""

import fnmatch
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from smezo_cli import masks
from smezo_cli.lockstep import NotInLockstep, Turns, refuse
from smezo_cli.noise import KINDS, stream_key, uniform_at
from smezo_cli.passes import (
    Draw,
    EagerPasses,
    NumbaPasses,
    Numbers,
    Passes,
    Rule,
    as_draws,
    choose_passes,
)
from smezo_cli.probe import FunctionalProbe

Closure = Callable[[], Tensor]

#: Raise it when noise, masks, thresholds or the arithmetic of an update give other bits than
#: before: a trajectory of another version is not replayed.
NUMERICS = 1


class NonFiniteLoss(ArithmeticError):
    """A loss was NaN or infinite; the weights are those before the step."""


@runtime_checkable
class InParts(Protocol):
    """A closure whose loss is a sum of parts that fit into memory one after the other."""

    def __call__(self) -> Tensor: ...
    def parts(self) -> Iterable[Closure]:
        """Closures of the parts; each returns its part of the loss, ()."""


@runtime_checkable
class Shared(Protocol):
    """A closure of a step that several processes make together, each on weights of its own.

    It returns what this process measures; all of them go on with the same joined losses.
    """

    def __call__(self) -> Tensor: ...
    def queries(self, num: int) -> Sequence[int]:
        """Those, of so many, that this process measures."""

    def join(
        self, losses: Mapping[int, tuple[float, float]], num: int
    ) -> Sequence[tuple[float, float]]:
        """The losses of all queries, from those of this process's at theta+ and theta-."""


@dataclass(frozen=True)
class StepRecord:
    """What a step did.

    Attributes:
        loss: mean of the losses measured in the step.
        projected_grad: one directional derivative per query, as measured (empty for first-order
            methods).
        num_forwards: forward passes over the batch.
        clipped: how many of them were cut for the update.
    """

    loss: float
    projected_grad: tuple[float, ...]
    num_forwards: int
    clipped: int = 0


@dataclass
class Target:
    """A perturbed tensor: where it is, its stream's name, its threshold."""

    name: str
    parameter: nn.Parameter
    masked: bool
    h: float = math.inf
    position: int = 0
    _flat: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """The weights themselves, flat; writing to it writes to the model."""
        p, flat = self.parameter, self._flat
        # Made once: passes keep what they need to know of a tensor with the tensor object.
        if flat is None or flat.data_ptr() != p.data_ptr() or flat.dtype != p.dtype:
            flat = self._flat = p.detach().view(-1)
        return flat


class Direction:
    """sum_q a_q m z_q at one step for some coefficients a, as probes and updates evaluate it."""

    def __init__(self, owner: "ZeroOrder", numbers: list[Numbers]) -> None:
        self._owner = owner
        self._numbers = numbers
        self._draws: list[Draw] | None = None

    def numbers(self, target: Target) -> Numbers:
        """What a pass over this tensor needs, as plain numbers."""
        return self._numbers[target.position]

    def draw(self, target: Target) -> Draw:
        """The same as tensors on the target's device, made for all targets when first asked for."""
        if self._draws is None:
            devices = [t.parameter.device for t in self._owner.targets]
            self._draws = as_draws(self._numbers, devices)
        return self._draws[target.position]

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.probe.Mover`."""
        self._owner.move(self._owner.target_of(parameter), out, self)

    def both(self, parameter: Tensor, plus: Tensor, minus: Tensor) -> None:
        """See :class:`smezo_cli.probe.PairMover`."""
        self._owner.move_both(self._owner.target_of(parameter), plus, minus, self)

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.probe.Mover`."""
        target = self._owner.target_of(parameter)
        width = parameter.numel() // parameter.shape[0]
        picked = parameter.detach().index_select(0, rows).view(-1)
        offsets = torch.arange(width, device=rows.device)
        index = (rows[:, None] * width + offsets).view(-1)
        moved = self._owner.move_at(target, picked, index, self)
        return moved.view(rows.shape[0], *parameter.shape[1:])

    def dense(self, target: Target) -> tuple[Tensor, Tensor]:
        """a z of one query (float32, flat), written out, and the mask (bool)."""
        z, mask = self._owner.kept(target, self)
        return z * self.draw(target).coefficients[0], mask


class Executor(Protocol):
    """How a pair of losses is measured; must not change the numbers."""

    name: str

    def losses(self, closure: Closure, plus: Direction, minus: Direction) -> tuple[Tensor, Tensor]:
        """Losses at theta + eps m z and theta - eps m z."""


class Sequential:
    """Scratch copies, module by module; the weights are only read."""

    name = "sequential"

    def __init__(self, probe: FunctionalProbe) -> None:
        self._probe = probe

    def losses(self, closure: Closure, plus: Direction, minus: Direction) -> tuple[Tensor, Tensor]:
        """See :class:`Executor`."""
        with self._probe.at(plus):
            loss_plus = closure()
        with self._probe.at(minus):
            loss_minus = closure()
        return loss_plus, loss_minus


class Lockstep:
    """As sequential, but both forwards run in turns, module by module, with one draw for both.

    They run during the first call of the closure; the second is given what the second forward gave.
    """

    name = "lockstep"

    def __init__(self, model: nn.Module, probe: FunctionalProbe) -> None:
        self._probe, self._turns = probe, Turns(model)

    def losses(self, closure: Closure, plus: Direction, minus: Direction) -> tuple[Tensor, Tensor]:
        """See :class:`Executor`.

        Raises:
            NotInLockstep: the closure or the model does not allow it.
        """
        with self._probe.in_turns(plus, minus, self._turns), self._turns.first():
            loss_plus = closure()
        with self._turns.second():
            loss_minus = closure()
        return loss_plus, loss_minus


class InPlace:
    """The textbook (MeZO, arXiv 2305.17333, Algorithm 1): +eps, -2 eps, +eps, in the weights.

    The mask is taken once, before the first write. Low-precision weights do not come back exactly;
    this is the reference, not the way to train.
    """

    name = "in_place"

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    def losses(self, closure: Closure, plus: Direction, minus: Direction) -> tuple[Tensor, Tensor]:
        """See :class:`Executor`."""
        steps = [plus.dense(target) for target in self._targets]  # (eps m z, m)
        standing = 0.0  # multiples of the step that are in the weights
        try:
            self._add(steps, 1.0)
            standing = 1.0
            loss_plus = closure()
            self._add(steps, -2.0)
            standing = -1.0
            loss_minus = closure()
        finally:
            self._add(steps, -standing)
        return loss_plus, loss_minus

    def _add(self, steps: list[tuple[Tensor, Tensor]], scale: float) -> None:
        for target, (step, mask) in zip(self._targets, steps, strict=True):
            moved = (target.flat.float() + scale * step).to(target.flat.dtype)
            target.flat.copy_(torch.where(mask, moved, target.flat))


class ZeroOrder(torch.optim.Optimizer):
    """Two-sided zeroth-order SGD with keyed noise and an optional mask.

    One step, for queries q = 1..Q with directions z_q ~ N(0, I) and mask m at the current weights:

        projected_grad_q = [L(theta + eps m z_q) - L(theta - eps m z_q)] / (2 eps)
        theta <- theta - lr m (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        lr: step size.
        eps: radius of the probe.
        seed: names the noise; z depends on (seed, step, query, tensor name, index) alone.
        num_queries: Q.
        weight_decay: inside the mask only.
        clip_projected_grad: |projected_grad_q| is cut to it in the update; None never.
        mask: "none", "small", "large" or "random" (see :mod:`smezo_cli.masks`).
        sparsity: fraction NOT perturbed, in [0, 1).
        mask_refresh_every: recompute thresholds every so many steps; 0 keeps the initial ones.
        mask_resample: "run" or "step": when the random mask is drawn anew.
        constant_tensors: "dense" or "frozen": tensors whose magnitudes are all equal.
        freeze: globs of parameter names left as they are.
        dense: globs of parameter names perturbed without a mask.
        noise: "gaussian" or "rademacher".
        rounding: "nearest" or "stochastic": how updates are stored below float32.
        executor: how the two losses of a query are measured. "sequential": one after the other at
            moved copies of the weights, module by module; "lockstep": in turns, with one draw for
            both; "in_place": the textbook's, in the weights. "auto" takes the faster of the first
            two by timing both at the first step, see :meth:`choose_executor`.
        check: ask :meth:`self_check` at the first step; False where that was done already.
        backend: "compiled" (by Numba on a CPU, by torch.compile elsewhere), "eager", or "auto":
            compiled where that works and the weights are many enough to earn it. The numbers are
            the same.
        keep_noise: draw z once a step and keep it (4 bytes a weight and one for the mask). Pays
            where drawing is slow: "auto" does it for eager passes on a CPU with memory to spare.

    Raises:
        ValueError: an argument out of range, a glob that matches nothing, nothing left to train.
    """

    mode = "eval"
    keeps_state = False  # tensors that the next step depends on, beside the weights

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float,
        seed: int = 0,
        num_queries: int = 1,
        weight_decay: float = 0.0,
        clip_projected_grad: float | None = None,
        mask: str = "small",
        sparsity: float = 0.0,
        mask_refresh_every: int = 0,
        mask_resample: str = "run",
        constant_tensors: str = "dense",
        freeze: Iterable[str] = (),
        dense: Iterable[str] = (),
        noise: str = "gaussian",
        rounding: str = "nearest",
        executor: str = "auto",
        backend: str = "auto",
        keep_noise: bool | str = "auto",
        check: bool = True,
    ) -> None:
        _check(lr > 0 and math.isfinite(lr), f"lr={lr}: must be above 0")
        _check(eps > 0 and math.isfinite(eps), f"eps={eps}: must be above 0")
        _check(num_queries >= 1, f"num_queries={num_queries}: must be at least 1")
        _check(weight_decay >= 0, f"weight_decay={weight_decay}: must not be negative")
        clip = clip_projected_grad
        _check(clip is None or clip > 0, f"clip_projected_grad={clip}: must be above 0")
        _check(0 <= sparsity < 1, f"sparsity={sparsity}: the fraction NOT perturbed, in [0, 1)")
        _one_of("mask", mask, ("none", *masks.RULES))
        _check(mask != "none" or sparsity == 0, f"sparsity={sparsity} has no effect with mask=none")
        _check(mask_refresh_every >= 0, f"mask_refresh_every={mask_refresh_every}: 0 or more")
        _one_of("mask_resample", mask_resample, ("run", "step"))
        _check(
            mask_resample == "run" or mask == "random",
            f"mask_resample={mask_resample} has no effect with mask={mask}",
        )
        _one_of("constant_tensors", constant_tensors, ("dense", "frozen"))
        _one_of("noise", noise, KINDS)
        _one_of("rounding", rounding, ("nearest", "stochastic"))
        _one_of("executor", executor, ("auto", "sequential", "lockstep", "in_place"))
        _one_of("keep_noise", keep_noise, ("auto", True, False))
        _one_of("backend", backend, ("auto", "compiled", "eager"))

        self.targets = _select(model, list(freeze), list(dense))
        self._by_id = {id(t.parameter): t for t in self.targets}
        super().__init__(
            [t.parameter for t in self.targets],
            {"lr": lr, "eps": eps, "weight_decay": weight_decay},
        )
        self.lr = lr
        self._unchecked = check
        self.seed = seed
        self.num_queries = num_queries
        self.clip_projected_grad = math.inf if clip is None else clip
        self.mask = mask
        self.sparsity = sparsity
        self.mask_refresh_every = mask_refresh_every
        self.mask_resample = mask_resample
        self.constant_tensors = constant_tensors
        self.num_steps = 0
        rule = "small" if mask == "none" else mask
        self.set_thresholds()

        self._rule = Rule(rule, noise, rounding == "stochastic")
        devices = [t.parameter.device for t in self.targets]
        # Numba's passes are for CPUs alone, torch.compile's for tensors here and there.
        device = next((d for d in devices if d.type != "cpu"), devices[0])
        if backend == "auto" and device.type == "cpu" and self.num_weights < _WORTH_COMPILING:
            backend = "eager"
        self.passes, self.why_eager = choose_passes(self._rule, backend, device)
        # Probes round to nearest; only the stored update may round stochastically.
        self._probe_passes: Passes = self.passes
        if self._rule.stochastic:
            nearest = Rule(rule, noise, False)
            self._probe_passes = type(self.passes)(nearest)
        can_keep = num_queries == 1 and not self._rule.stochastic
        needs = f"num_queries=1 and rounding=nearest, not {num_queries} and {rounding}"
        _check(can_keep or keep_noise is not True, f"keep_noise=true needs {needs}: leave it out")
        if executor == "in_place":
            _check(can_keep, f"executor=in_place needs {needs}: leave it out")
            _check(
                keep_noise is not False,
                "keep_noise=false: executor=in_place updates by the noise and the mask that it "
                "kept; leave keep_noise out",
            )
            keep_noise = True  # its update uses the mask of before the first write
        elif keep_noise == "auto":
            keep_noise = can_keep and self.passes.name == "eager" and device.type == "cpu"
            keep_noise = keep_noise and _free_memory_bytes() > 10 * self.num_weights
        self.keep_noise = bool(keep_noise)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._streams: dict[tuple[str | int, ...], list[tuple[int, int]]] = {}
        self._probe = FunctionalProbe(model, [t.parameter for t in self.targets])
        self._sequential, self._lockstep = Sequential(self._probe), Lockstep(model, self._probe)
        self._executor: Executor = self._sequential
        if executor == "lockstep":
            self._executor = self._lockstep
        elif executor == "in_place":
            self._executor = InPlace(self.targets)
        self._may_choose = executor == "auto"
        #: the name of the one that is used; "auto" until one is chosen
        self.executor = executor

    # --- the step -----------------------------------------------------------------------------

    def set_lr_factor(self, factor: float) -> None:
        """Let the next steps use ``factor * lr``."""
        self.param_groups[0]["lr"] = factor * self.lr

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Closure) -> StepRecord:  # type: ignore[override]  # returns a record
        """One step on the loss that ``closure`` computes; it is called ``2 * num_queries`` times.

        Args:
            closure: returns the loss () of one fixed batch at the model's present weights, without
                any randomness of its own; or its share of it, see :class:`Shared`.

        Returns:
            What was measured.

        Raises:
            NonFiniteLoss: before anything was written.
            OutOfRoom: likewise.
            ValueError: at the first step, by :meth:`self_check`.
        """
        if self._unchecked:
            self.self_check(closure)
        self._streams.clear()  # of the step before
        if self.executor == "auto":
            self.choose_executor(closure)
        self._begin()
        eps = self.param_groups[0]["eps"]
        shared = closure if isinstance(closure, Shared) else None
        queries = range(self.num_queries) if shared is None else shared.queries(self.num_queries)
        measured: dict[int, tuple[float, float]] = {}
        for query in queries:
            plus = self.direction([query], [eps])
            minus = self.direction([query], [-eps])
            try:
                pair = self._executor.losses(closure, plus, minus)
            except NotInLockstep:  # at a later batch, which calls the model in another way
                if not self._may_choose:
                    raise
                self._use(self._sequential)
                pair = self._executor.losses(closure, plus, minus)
            l_plus, l_minus = torch.stack([x.detach().double() for x in pair]).tolist()
            if shared is None:
                self._check_finite(l_plus, l_minus)
            measured[query] = l_plus, l_minus

        pairs = list(measured.values())
        if shared is not None:
            pairs = list(shared.join(measured, self.num_queries))
            for pair_of_losses in pairs:  # of all, so that every process raises or none
                self._check_finite(*pair_of_losses)
        losses = [loss for pair_of_losses in pairs for loss in pair_of_losses]
        projected_grad = [(l_plus - l_minus) / (2 * eps) for l_plus, l_minus in pairs]
        self._end(projected_grad)
        return self.record(sum(losses) / len(losses), projected_grad)

    def _check_finite(self, l_plus: float, l_minus: float) -> None:
        if not (math.isfinite(l_plus) and math.isfinite(l_minus)):
            raise NonFiniteLoss(f"loss {l_plus} and {l_minus} at step {self.num_steps}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, lr: float, projected_grad: Sequence[float]) -> None:
        """Apply a step that was made before, without a forward: the weights get the same bits.

        Args:
            lr: that of the step (the next ones keep it, as after :meth:`set_lr_factor`).
            projected_grad: what :meth:`step` returned of it.
        """
        _check(len(projected_grad) == self.num_queries, "one projected gradient a query")
        self._streams.clear()
        self._begin()
        group = self.param_groups[0]
        group["lr"] = lr
        if isinstance(self._executor, InPlace):  # its probes leave rounding errors in the weights
            eps, nothing = group["eps"], torch.zeros(())
            plus, minus = self.direction([0], [eps]), self.direction([0], [-eps])
            self._executor.losses(lambda: nothing, plus, minus)
        self._end(projected_grad)

    def identity(self) -> dict[str, Any]:
        """What an update follows from, beside weights, lr and projected gradients; plain JSON."""
        tensors = [[t.name, list(t.parameter.shape), str(t.parameter.dtype)] for t in self.targets]
        dense = [t.name for t in self.targets if not t.masked]
        group = self.param_groups[0]
        return {
            "numerics": NUMERICS,
            "seed": self.seed,
            "num_queries": self.num_queries,
            "noise": self._rule.noise,
            "mask": self.mask,
            "sparsity": self.sparsity,
            "mask_refresh_every": self.mask_refresh_every,
            "mask_resample": self.mask_resample,
            "constant_tensors": self.constant_tensors,
            "rounding": "stochastic" if self._rule.stochastic else "nearest",
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "clip_projected_grad": None if math.isinf(limit := self.clip_projected_grad) else limit,
            "in_place": isinstance(self._executor, InPlace),
            "tensors": hashlib.sha256(json.dumps([tensors, dense]).encode()).hexdigest(),
        }

    def _begin(self) -> None:
        self._kept.clear()
        every = self.mask_refresh_every
        if every and self.num_steps and not self.num_steps % every:
            self.set_thresholds()

    def _end(self, projected_grad: Sequence[float]) -> None:
        group = self.param_groups[0]
        lr = group["lr"]
        self.update(self.coefficients(projected_grad, lr), lr * group["weight_decay"])
        self._kept.clear()
        self.num_steps += 1

    def coefficients(self, projected_grad: Sequence[float], lr: float) -> list[float]:
        """a_q = -lr projected_grad_q / Q of an update, from projected gradients as measured.

        Clipping happens here alone, so that recorded values give the same update again.
        """
        limit = self.clip_projected_grad
        return [-lr * max(-limit, min(g, limit)) / self.num_queries for g in projected_grad]

    def record(self, loss: float, projected_grad: Sequence[float]) -> StepRecord:
        """What a step tells of itself, from what is recorded of it."""
        clipped = sum(abs(g) > self.clip_projected_grad for g in projected_grad)
        return StepRecord(loss, tuple(projected_grad), 2 * self.num_queries, clipped)

    @torch.inference_mode(False)
    @torch.no_grad()
    def choose_executor(self, closure: Closure) -> dict[str, float]:
        """Where the executor is "auto", take the faster one that gives the losses of sequential.

        The losses of the present step's first query are measured twice each way; they are the same
        whichever is chosen, and nothing else depends on the choice.

        Args:
            closure: as for :meth:`step`.

        Returns:
            Seconds of a pair of losses by the name of the executor, of those that could be used.
        """
        if self.executor != "auto":
            return {}
        eps = self.param_groups[0]["eps"]
        plus, minus = self.direction([0], [eps]), self.direction([0], [-eps])
        seconds: dict[str, float] = {}
        found: dict[str, tuple[float, ...]] = {}
        with suppress(NotInLockstep):
            for _ in range(2):  # the first may compile, and touches memory for the first time
                for executor in (self._sequential, self._lockstep):
                    start = time.perf_counter()
                    losses = tuple(float(x) for x in executor.losses(closure, plus, minus))
                    spent = time.perf_counter() - start
                    name = executor.name
                    seconds[name] = min(spent, seconds.get(name, math.inf))
                    found[name] = losses
        if "lockstep" in found and found["lockstep"] != found["sequential"]:
            del seconds["lockstep"]
        self._kept.clear()
        fastest = min(seconds, key=lambda name: seconds[name])
        self._use(self._lockstep if fastest == "lockstep" else self._sequential)
        return seconds

    def _use(self, executor: Executor) -> None:
        self._executor, self.executor = executor, executor.name

    def update(self, coefficients: Sequence[float], decay: float = 0.0) -> None:
        """theta <- where(m, theta + sum_q a_q z_q - decay theta, theta), rounded as asked."""
        direction = self.direction(range(len(coefficients)), coefficients, decay)
        for target in self.targets:
            if self.keep_noise:
                self._move_kept(target, target.flat, direction)
            else:
                self._pass(self.passes, target, target.flat, direction)

    def direction(
        self, queries: Sequence[int], coefficients: Sequence[float], decay: float = 0.0
    ) -> Direction:
        """The move along ``sum_q a_q m z_q`` of the present step, less ``decay`` theta."""
        keys = [self._keys("z", self.num_steps, q) for q in queries]
        mask_step = self.num_steps if self.mask_resample == "step" else 0
        none = [(0, 0)] * len(self.targets)
        masks_ = self._keys("mask", mask_step) if self._rule.mask == "random" else none
        rounds = self._keys("round", self.num_steps) if self._rule.stochastic else none
        a, d = tuple(coefficients), decay or None
        z = zip(*keys, strict=True)
        of_targets = zip(self.targets, z, masks_, rounds, strict=True)
        return Direction(
            self, [Numbers(k, mask, rounding, t.h, a, d) for t, k, mask, rounding in of_targets]
        )

    # --- what a pass needs --------------------------------------------------------------------

    def _keys(self, *parts: str | int) -> list[tuple[int, int]]:
        """The streams of a purpose, one a target; several passes of a step ask for the same."""
        if parts not in self._streams:
            self._streams[parts] = [stream_key(self.seed, *parts, t.name) for t in self.targets]
        return self._streams[parts]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: what is trained, and its thresholds, are chosen there.

        Raises:
            ValueError: always, after construction.
        """
        _check(not self.param_groups, "what is trained is fixed: make a new optimizer")
        super().add_param_group(param_group)

    def target_of(self, parameter: Tensor) -> Target:
        """The perturbed tensor that this parameter is."""
        return self._by_id[id(parameter)]

    def move(self, target: Target, out: Tensor, direction: Direction) -> None:
        """Write the moved tensor to ``out`` (flat)."""
        if self.keep_noise:
            self._move_kept(target, out, direction)
        else:
            self._pass(self._probe_passes, target, out, direction)

    def move_both(self, target: Target, plus: Tensor, minus: Tensor, direction: Direction) -> None:
        """Write the tensor moved along the direction and against it, from one draw."""
        passes = self._probe_passes
        if self.keep_noise:
            z, mask = self.kept(target, direction)
            draw, eager = direction.draw(target), EagerPasses(self._rule)
            eager.move_kept(target.flat, plus, z, mask, draw)
            back = draw._replace(coefficients=-draw.coefficients)
            eager.move_kept(target.flat, minus, z, mask, back)
        elif isinstance(passes, NumbaPasses):
            passes.move_both(target.flat, plus, minus, direction.numbers(target))
        else:
            passes.move_both(target.flat, plus, minus, direction.draw(target))

    def move_at(
        self, target: Target, picked: Tensor, index: Tensor, direction: Direction
    ) -> Tensor:
        """Moved copies of some entries (flat ``picked``, at flat ``index``)."""
        passes, numel = self._probe_passes, target.parameter.numel()
        if isinstance(passes, NumbaPasses):
            return passes.move_at(picked, index, numel, direction.numbers(target))
        return passes.move_at(picked, index, numel, direction.draw(target))

    def mask_at(self, parameter: Tensor, picked: Tensor, index: Tensor, step: int) -> Tensor:
        """Which of some entries the mask of a step perturbs: bool (n,).

        Args:
            parameter: one that is trained.
            picked: (n,), what the entries were when the step began.
            index: int64 (n,), where they are in the flat parameter.
            step: from 0; of thresholds that are renewed, the present ones are taken.
        """
        target = self.target_of(parameter)
        mask_step = step if self.mask_resample == "step" else 0
        key = torch.tensor(stream_key(self.seed, "mask", mask_step, target.name))
        value = picked.float().abs()
        if self._rule.mask == "random":
            value = uniform_at(index, parameter.numel(), key.to(index.device))
        h = torch.tensor(target.h, dtype=torch.float32, device=value.device)
        return masks.RULES[self._rule.mask](value, h)

    @torch.inference_mode(False)
    @torch.no_grad()
    def losses_at(self, closure: Closure, query: int) -> tuple[float, float]:
        """Losses at theta + eps m z and theta - eps m z of a query of the next step.

        Always by probes that only read the weights; nothing that a step depends on changes.
        """
        eps = self.param_groups[0]["eps"]
        plus, minus = self.direction([query], [eps]), self.direction([query], [-eps])
        self._kept.clear()
        pair = self._sequential.losses(closure, plus, minus)
        self._kept.clear()
        return float(pair[0]), float(pair[1])

    @staticmethod
    def _pass(passes: Passes, target: Target, out: Tensor, direction: Direction) -> None:
        if isinstance(passes, NumbaPasses):
            passes.move(target.flat, out, direction.numbers(target))
        else:
            passes.move(target.flat, out, direction.draw(target))

    def kept(self, target: Target, direction: Direction) -> tuple[Tensor, Tensor]:
        """z (float32, flat) of the first query and the mask; of the step's start, if kept."""
        eager = EagerPasses(self._rule)
        if not self.keep_noise:
            return eager.noise_and_mask(target.flat, direction.draw(target))
        if target.name not in self._kept:
            self._kept[target.name] = eager.noise_and_mask(target.flat, direction.draw(target))
        return self._kept[target.name]

    def _move_kept(self, target: Target, out: Tensor, direction: Direction) -> None:
        z, mask = self.kept(target, direction)
        draw = direction.draw(target)
        EagerPasses(self._rule).move_kept(target.flat, out, z, mask, draw)

    # --- masks --------------------------------------------------------------------------------

    def set_thresholds(self) -> None:
        """h of every tensor from its present weights (and its active share)."""
        rule = "small" if self.mask == "none" else self.mask
        for target in self.targets:
            sparsity = self.sparsity if target.masked else 0.0
            target.h = masks.threshold(target.parameter, rule, sparsity, self.constant_tensors)

    @torch.no_grad()
    def active_share(self) -> float:
        """Fraction of the trained weights that the present mask perturbs; 1 - realised sparsity."""
        direction, eager = self.direction([0], [0.0]), EagerPasses(self._rule)
        # Not .sum(): it would write the mask out as int64.
        active = sum(
            int(eager.mask_of(t.flat, direction.draw(t)).count_nonzero()) for t in self.targets
        )
        return active / self.num_weights

    @property
    def num_weights(self) -> int:
        """Weights that the method may train."""
        return sum(t.parameter.numel() for t in self.targets)

    # --- state --------------------------------------------------------------------------------

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that the method may write to, by name."""
        return {t.name: t.parameter for t in self.targets}

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain numbers (and no tensors) that the next step depends on, beside the weights."""
        return {"num_steps": self.num_steps, "h": {t.name: t.h.hex() for t in self.targets}}, {}

    def restore(self, numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`snapshot`."""
        self._kept.clear()
        self.num_steps = numbers["num_steps"]
        for target in self.targets:
            target.h = float.fromhex(numbers["h"][target.name])

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`snapshot`, for users of torch's own protocol."""
        return self.snapshot()[0]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.restore(state_dict, {})

    # --- trust --------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def self_check(self, closure: Closure) -> int:
        """Is the functional loss the loss of an exactly saved copy perturbed in place?

        Asked for each kind of (module class, parameter name), so that a parameter which some
        forward reads without its wrapped owner is found before it spoils a run. Of parameters
        that differ in the number of their layer alone the first and the last are asked, so that
        the saved copies stay small beside the model.

        Args:
            closure: as for :meth:`step`.

        Returns:
            The number of kinds checked.

        Raises:
            ValueError: naming the parameters that functional probes cannot perturb.
            NonFiniteLoss: the loss of a perturbed model is not finite.
        """
        self._unchecked = False
        if isinstance(self._executor, InPlace):
            return 0
        kinds = self._kinds()
        for kind, targets in kinds.items():
            parts = checked_together([t.parameter.numel() for t in targets], self.num_weights)
            if not all(self._agrees(targets[part], closure) for part in parts):
                wrong = [t.name for t in targets if not self._agrees([t], closure)] or [kind]
                raise ValueError(
                    f"functional probes do not reach {', '.join(wrong[:5])} ({kind}): "
                    "freeze them (method.freeze), or use method.executor=in_place"
                )
        if self._executor is self._lockstep:
            plus, minus = self.direction([0], [1e-2]), self.direction([0], [-1e-2])
            pairs = [
                executor.losses(closure, plus, minus)
                for executor in (self._sequential, self._lockstep)
            ]
            self._kept.clear()
            if not all(map(torch.equal, *pairs)):
                refuse("its losses differ from those of one forward after the other")
        return len(kinds)

    def _kinds(self) -> dict[str, list[Target]]:
        by_name = {t.name: t for t in self.targets}
        names = {id(t.parameter): t.name for t in self.targets}
        kinds = kinds_to_check(self._probe, names)
        return {kind: [by_name[name] for name in chosen] for kind, chosen in kinds.items()}

    def _agrees(self, targets: list[Target], closure: Closure) -> bool:
        """Are the functional and the exact in-place loss of moving ``targets`` alone equal?"""
        direction = self.direction([0], [max(self.param_groups[0]["eps"], 1e-2)])
        with self._probe.at(direction, only={id(t.parameter) for t in targets}):
            functional = closure()
        saved = [t.flat.clone() for t in targets]
        try:
            for target in targets:
                direction.whole(target.parameter, target.flat)
            in_place = closure()
        finally:
            for target, copy in zip(targets, saved, strict=True):
                target.flat.copy_(copy)
            self._kept.clear()
        if not (torch.isfinite(functional) and torch.isfinite(in_place)):
            raise NonFiniteLoss(f"loss {float(in_place)} at weights moved by eps")
        return torch.equal(functional, in_place)


def kinds_to_check(probe: FunctionalProbe, names: Mapping[int, str]) -> dict[str, list[str]]:
    """Parameters that the self-check moves, by kind: (module class, parameter name) of the owner.

    Of those whose names differ in numbers alone, as those of layers do, the first and the last.

    Args:
        probe: knows the owners.
        names: of the parameters, by their ``id``.
    """
    kinds: dict[str, dict[str, dict[str, None]]] = {}
    for module, own in probe.owners:
        for name in own:
            full = names[id(module._parameters[name])]
            places = kinds.setdefault(f"{type(module).__name__}.{name}", {})
            # A tied parameter counts once.
            places.setdefault(re.sub(r"\d+", "*", full), {})[full] = None
    chosen: dict[str, list[str]] = {}
    for kind, places in kinds.items():
        for alike in map(list, places.values()):
            chosen.setdefault(kind, []).extend([alike[0], *alike[1:][-1:]])
    return chosen


def checked_together(sizes: Sequence[int], num_weights: int) -> list[slice]:
    """Parts of a kind that the self-check moves at once: small beside the model, or one tensor.

    Args:
        sizes: weights of the kind's parameters.
        num_weights: of all.
    """
    parts: list[slice] = []
    left = 0
    for i, size in enumerate(sizes):
        if size > left or not parts:
            parts.append(slice(i, i))
            left = max(num_weights // 50, _ALWAYS_SAVED)
        parts[-1] = slice(parts[-1].start, i + 1)
        left -= size
    return parts


_ALWAYS_SAVED = 1_000_000  # weights; few beside a model that is worth training
_WORTH_COMPILING = 1_000_000  # weights; fewer are moved some hundred times while Numba starts


def _select(model: nn.Module, freeze: list[str], dense: list[str]) -> list[Target]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("no parameter of the model requires gradients, so nothing can be trained")
    for name, parameter in named:
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"parameter {name} is {parameter.dtype}: float32, bfloat16, float16")
    for key, glob in [*(("freeze", g) for g in freeze), *(("dense", g) for g in dense)]:
        if not any(fnmatch.fnmatchcase(name, glob) for name, _ in named):
            raise ValueError(f"{key} {glob!r} matches no trainable parameter, e.g. {named[0][0]!r}")
    targets: list[Target] = []
    for name, parameter in named:
        if any(fnmatch.fnmatchcase(name, glob) for glob in freeze):
            continue
        if not parameter.is_contiguous():
            raise ValueError(f"parameter {name} is not contiguous")
        masked = not any(fnmatch.fnmatchcase(name, glob) for glob in dense)
        targets.append(Target(name, parameter, masked, position=len(targets)))
    if not targets:
        raise ValueError("no parameter is left to train; freeze fewer")
    return targets


def _free_memory_bytes() -> int:
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(key: str, got: str | bool, allowed: Sequence[str | bool]) -> None:
    _check(got in allowed, f"{key}={got}: one of {', '.join(map(str, allowed))}")
