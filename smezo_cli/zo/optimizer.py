"""The zeroth-order step: choose coordinates, draw directions, turn losses into coefficients, apply.

    opt = SparseMeZO(model, lr=1e-6, eps=1e-3, sparsity=0.75)
    record = opt.step(lambda: loss_fn(model(x), y))

Works on any torch module; knows nothing of Hydra or transformers.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo import self_check as reach
from smezo_cli.zo.directions.dense import WORTH_COMPILING, Direction, free_memory_bytes
from smezo_cli.zo.executors.base import Executor
from smezo_cli.zo.executors.in_place import InPlace
from smezo_cli.zo.executors.lockstep import Lockstep
from smezo_cli.zo.executors.sequential import Sequential
from smezo_cli.zo.noise import KINDS, stream_key, uniform_at
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.choose import Passes, choose_passes
from smezo_cli.zo.passes.draw import Numbers, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.selections import masks
from smezo_cli.zo.self_check import Base, Losses, Reads, Rounding, Unreached
from smezo_cli.zo.step import NUMERICS, Closure, NonFiniteLoss, Shared, StepRecord
from smezo_cli.zo.targets import Target, _check, number, one_of, select
from smezo_cli.zo.turns import NotInLockstep, refuse


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
        mask: "none", "small", "large" or "random" (see :mod:`smezo_cli.zo.selections.masks`).
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
        one_of("mask", mask, ("none", *masks.RULES))
        _check(mask != "none" or sparsity == 0, f"sparsity={sparsity} has no effect with mask=none")
        _check(mask_refresh_every >= 0, f"mask_refresh_every={mask_refresh_every}: 0 or more")
        one_of("mask_resample", mask_resample, ("run", "step"))
        _check(
            mask_resample == "run" or mask == "random",
            f"mask_resample={mask_resample} has no effect with mask={mask}",
        )
        one_of("constant_tensors", constant_tensors, ("dense", "frozen"))
        one_of("noise", noise, KINDS)
        one_of("rounding", rounding, ("nearest", "stochastic"))
        one_of("executor", executor, ("auto", "sequential", "lockstep", "in_place"))
        one_of("keep_noise", keep_noise, ("auto", True, False))
        one_of("backend", backend, ("auto", "compiled", "eager"))

        model = dynamo.original(model)
        self.targets = select(model, list(freeze), list(dense))
        self._by_id = {id(t.parameter): t for t in self.targets}
        super().__init__(
            [t.parameter for t in self.targets],
            {"lr": lr, "eps": eps, "weight_decay": weight_decay},
        )
        self.lr = lr
        self._unchecked = self._asks_again = check
        self._model, self._is_compiled = model, dynamo.is_compiled(model)
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
        if backend == "auto" and device.type == "cpu" and self.num_weights < WORTH_COMPILING:
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
            keep_noise = keep_noise and free_memory_bytes() > 10 * self.num_weights
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
            OutOfMemory: likewise.
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
                pair = self._measured(self._executor, closure, plus, minus)
            except NotInLockstep:  # at a later batch, which calls the model in another way
                if not self._may_choose:
                    raise
                self._use(self._sequential)
                pair = self._measured(self._executor, closure, plus, minus)
            l_plus, l_minus = torch.stack([x.detach().double() for x in pair]).tolist()
            if shared is None:
                self._check_finite(l_plus, l_minus)
                if l_plus == l_minus and self._asks_again:
                    # The loss may be a step function; or the model has taken another path.
                    self._asks_again = False
                    self.check_reads(closure)
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

    def _measured(
        self, executor: Executor, closure: Closure, plus: Direction, minus: Direction
    ) -> tuple[Tensor, Tensor]:
        """The losses of a query, without the user's compiler."""
        try:
            with self._uncompiled():
                return executor.losses(closure, plus, minus)
        except Exception as error:
            if self._is_compiled or not dynamo.is_its_error(error):
                raise
        self._is_compiled = True
        with self._uncompiled():
            return executor.losses(closure, plus, minus)

    def _uncompiled(self) -> AbstractContextManager[None]:
        return dynamo.kept_out() if self._is_compiled else nullcontext()

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
        torch.clear_autocast_cache()  # of a loop inside of torch.autocast: casts of the old weights
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
        found: dict[str, list[tuple[float, ...]]] = {}
        with suppress(NotInLockstep):
            for _ in range(2):  # the first may compile, and touches memory for the first time
                for executor in (self._sequential, self._lockstep):
                    start = time.perf_counter()
                    pair = self._measured(executor, closure, plus, minus)
                    losses = tuple(map(number, pair))
                    spent = time.perf_counter() - start
                    name = executor.name
                    seconds[name] = min(spent, seconds.get(name, math.inf))
                    found.setdefault(name, []).append(losses)
        if "lockstep" in found:
            first, second = found["sequential"][0], found["sequential"][-1]
            for a, b, c in zip(first, second, found["lockstep"][-1], strict=True):
                # Where a loss is the same from call to call, no other number will do.
                if not abs(b - c) <= abs(a - b):
                    seconds.pop("lockstep", None)
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
        pair = self._measured(self._sequential, closure, plus, minus)
        self._kept.clear()
        return number(pair[0]), number(pair[1])

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

        Asked for each kind of (module class, parameter name), together where the saved copies stay
        small beside the model, so that a parameter which some forward reads without its wrapped
        owner is found before it spoils a run; of all parameters an operation that reads them so is
        seen. One that a module around its owner reads is moved for the whole forward of that
        module from then on. "Is" means: but for what rounding does to a loss.

        Args:
            closure: as for :meth:`step`.

        Returns:
            The number of kinds checked.

        Raises:
            Unreached: naming all parameters that functional probes cannot perturb.
            ValueError: the closure is random, or gives another loss at each call.
            NonFiniteLoss: a loss is not finite.
        """
        self._unchecked = False
        self._find_compiled(closure)
        with self._uncompiled():
            base = self._base(closure)
            if isinstance(self._executor, InPlace):
                return 0
            wrong, base = self._read_past(closure, base)
            kinds = self._kinds()
            for kind, targets in kinds.items():
                asked = [t for t in targets if t.name not in wrong]
                found = self._unlike(kind, asked, closure, base)
                wrong |= {t.name: kind for t in found if t.name not in wrong}
            self._refuse(wrong, closure, base)
            if self._executor is self._lockstep:
                self._check_lockstep(closure, base)
        return len(kinds)

    @torch.inference_mode(False)
    @torch.no_grad()
    def check_reads(self, closure: Closure) -> None:
        """Ask again, of another closure, for parameters that are read without their owners.

        The cheap half of :meth:`self_check`: one forward where there are none.

        Raises:
            Unreached: naming them.
            ValueError, NonFiniteLoss: as there.
        """
        if isinstance(self._executor, InPlace):
            return
        with self._uncompiled():
            if self._reads(closure).read:
                wrong, base = self._read_past(closure, self._base(closure))
                self._refuse(wrong, closure, base)

    def _find_compiled(self, closure: Closure) -> None:
        """Does the closure call compiled code with this model inside?"""
        self._is_compiled = self._is_compiled or dynamo.is_compiled(self._model)
        if self._is_compiled or not dynamo.is_imported():
            return
        try:
            closure()
        except Exception as error:
            if not dynamo.is_its_error(error):
                raise
            self._is_compiled = True
            return
        with self._probe.at(Reads([t.parameter for t in self.targets])):
            self._is_compiled = dynamo.recompiles(closure)

    def _base(self, closure: Closure) -> Base:
        """The loss of the weights as they are, twice.

        Raises:
            ValueError: the two differ by more than rounding.
        """
        first = closure().detach()
        devices = {t.parameter.device for t in self.targets}
        states = reach.generators(devices)
        second = closure().detach()
        is_drawn = states != reach.generators(devices)
        one, other = float(first), float(second)
        self._check_finite(one, other)
        eps = torch.finfo(torch.float32).eps
        of_loss = max(eps, torch.finfo(first.dtype).eps) if first.is_floating_point() else eps
        coarsest = max(of_loss, *(torch.finfo(t.parameter.dtype).eps for t in self.targets))
        rounding = Rounding(coarsest, of_loss, abs(one - other))
        if rounding.is_random(one, other, is_drawn):
            raise ValueError(reach.random_closure(one, other, is_drawn))
        return Base(one, rounding, is_drawn)

    def _reads(self, closure: Closure) -> Reads:
        """What is read past the probe, and the loss of a probe that moves nothing."""
        reads = Reads([t.parameter for t in self.targets])
        with self._probe.at(reads), reads:
            reads.loss = number(closure())
        return reads

    def _read_past(self, closure: Closure, base: Base) -> tuple[dict[str, str], Base]:
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

        def harmless(targets: Sequence[Target]) -> bool:
            return self._is_reached(targets, closure, base, is_read=True)

        read_past = self._lend([t for t in self.targets if id(t.parameter) in reads.read], read)
        parts = reach.checked_together([t.parameter.numel() for t in read_past], self.num_weights)
        wrong = [t for part in parts for t in reach.search(read_past[part], harmless)]
        return {target.name: self._kind_of(target) for target in wrong}, base

    def _lend(
        self, wrong: list[Target], still: Callable[[list[Target]], list[Target]]
    ) -> list[Target]:
        """Those that no module around their owners reaches, by trying one after the other."""
        around = {t.name: iter(reach.enclosing(self._model, t.parameter)) for t in wrong}
        while wrong:
            modules = [next(around[t.name], None) for t in wrong]
            for target, module in zip(wrong, modules, strict=True):
                self._probe.lend(target.parameter, module)
            if not any(module is not None for module in modules):
                break
            wrong = still(wrong)
        return wrong

    def _unlike(
        self, kind: str, targets: list[Target], closure: Closure, base: Base
    ) -> list[Target]:
        """Parameters of a kind whose functional loss is another than that in place."""

        def agree(asked: Sequence[Target]) -> bool:
            losses = self._losses_of_move(asked, closure, base, 1.0)
            if not all(map(math.isfinite, losses)):
                raise NonFiniteLoss(f"loss {losses.in_place} at weights moved by eps")
            return losses.error <= max(map(base.rounding.of, losses))

        def wrong_of(targets: list[Target]) -> list[Target]:
            sizes = [t.parameter.numel() for t in targets]
            parts = reach.checked_together(sizes, self.num_weights)
            found = [t for part in parts for t in reach.search(targets[part], agree)]
            return [t for t in found if not self._is_reached([t], closure, base)]

        if not wrong_of(targets):
            return []
        names = {id(t.parameter): t.name for t in self.targets}
        by_name = {t.name: t for t in self.targets}
        everyone = [by_name[name] for name in reach.alike(self._probe, names, kind)]
        return self._lend(wrong_of(everyone), wrong_of)

    def _is_reached(
        self, targets: Sequence[Target], closure: Closure, base: Base, is_read: bool = False
    ) -> bool:
        def ask(scale: float) -> Losses:
            return self._losses_of_move(targets, closure, base, scale)

        return reach.is_reached(ask, base.rounding, is_read)

    def _losses_of_move(
        self, targets: Sequence[Target], closure: Closure, base: Base, scale: float
    ) -> Losses:
        """Losses where these are moved alone, by a multiple of the self-check's step."""
        size = scale * max(self.param_groups[0]["eps"], 1e-2)
        direction = self.direction([0], [size])
        with self._probe.at(direction, only={id(t.parameter) for t in targets}):
            functional = number(closure())
        saved = [t.flat.clone() for t in targets]
        torch.clear_autocast_cache()  # it may hold casts of what is written to
        try:
            for target in targets:
                direction.whole(target.parameter, target.flat)
            in_place = number(closure())
        finally:
            for target, copy in zip(targets, saved, strict=True):
                target.flat.copy_(copy)
            self._kept.clear()
            torch.clear_autocast_cache()
        return Losses(functional, in_place, base.unmoved)

    def _refuse(self, wrong: Mapping[str, str], closure: Closure, base: Base) -> None:
        """Name what is not reached; a closure whose losses differ by chance is told apart."""
        if not wrong:
            return
        losses = [number(closure()) for _ in range(4)]
        lowest, highest = min(losses), max(losses)
        if base.rounding.is_random(lowest, highest, base.is_drawn):
            raise ValueError(reach.random_closure(lowest, highest, base.is_drawn))
        first, *_ = found = [t for t in self.targets if t.name in wrong]
        hint = reach.fast_path_of(self._model, first.parameter)
        raise Unreached(
            {t.name: wrong[t.name] for t in found}, [t.name for t in self.targets], hint
        )

    def _check_lockstep(self, closure: Closure, base: Base) -> None:
        plus, minus = self.direction([0], [1e-2]), self.direction([0], [-1e-2])
        pairs = [
            map(number, executor.losses(closure, plus, minus))
            for executor in (self._sequential, self._lockstep)
        ]
        self._kept.clear()
        for a, b in zip(*pairs, strict=True):
            if not abs(a - b) <= base.rounding.of(a):
                refuse("its losses differ from those of one forward after the other")

    def _kind_of(self, target: Target) -> str:
        return next(
            f"{type(module).__name__}.{name}"
            for module, own in self._probe.owners
            for name in own
            if module._parameters[name] is target.parameter
        )

    def _kinds(self) -> dict[str, list[Target]]:
        by_name = {t.name: t for t in self.targets}
        names = {id(t.parameter): t.name for t in self.targets}
        kinds = reach.kinds_to_check(self._probe, names, self.num_weights)
        return {kind: [by_name[name] for name in chosen] for kind, chosen in kinds.items()}
