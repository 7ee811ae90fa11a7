"""The zeroth-order step: measure losses, write down scalars, apply what follows from them.

    opt = SparseMeZO(model, lr=1e-6, eps=1e-3, sparsity=0.75)
    record = opt.step(lambda: loss_fn(model(x), y))

Works on any torch module; knows nothing of Hydra or transformers.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.asked import Asked
from smezo_cli.zo.directions.base import Bound
from smezo_cli.zo.directions.dense import Dense, DenseMover
from smezo_cli.zo.estimators.base import Estimator
from smezo_cli.zo.executors.choose import Executors
from smezo_cli.zo.move import Gradient, Key, Move, Term
from smezo_cli.zo.passes.choose import Passes
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.selections.base import Selection
from smezo_cli.zo.self_check import SelfCheck
from smezo_cli.zo.state import State
from smezo_cli.zo.step import NUMERICS, Closure, StepRecord
from smezo_cli.zo.targets import check, number, one_of, select
from smezo_cli.zo.updates.base import Do, Update


class Common(TypedDict, total=False):
    """Arguments that every zeroth-order method takes.

    lr: step size.
    eps: radius of the probe.
    seed: names the noise; z depends on (seed, step, query, tensor name, index) alone.
    weight_decay: on what is selected only.
    clip_projected_grad: a projected gradient is cut to it in the update; None never.
    freeze: globs of parameter names left as they are.
    rounding: "nearest" or "stochastic": how updates are stored below float32.
    executor: how the losses of a query are measured. "sequential": one after the other at moved
        copies of the weights, module by module; "lockstep": in turns, with one draw for both;
        "in_place": the textbook's, in the weights. "auto" takes the faster of the first two by
        timing both at the first step, see :meth:`ZeroOrder.choose_executor`.
    backend: "compiled" (by Numba on a CPU, by torch.compile elsewhere), "eager", or "auto":
        compiled where that works and the weights are many enough to earn it. The numbers are the
        same.
    keep_noise: draw z once a step and keep it (4 bytes a weight and one for the mask). Pays where
        drawing is slow: "auto" does it for eager passes on a CPU with memory to spare.
    check: ask :meth:`ZeroOrder.self_check` at the first step; False where that was done already.
    """

    lr: Required[float]
    eps: Required[float]
    seed: int
    weight_decay: float
    clip_projected_grad: float | None
    freeze: Iterable[str]
    rounding: str
    executor: str
    backend: str
    keep_noise: bool | str
    check: bool


DEFAULTS: Mapping[str, Any] = {
    "seed": 0,
    "weight_decay": 0.0,
    "clip_projected_grad": None,
    "freeze": (),
    "rounding": "nearest",
    "executor": "auto",
    "backend": "auto",
    "keep_noise": "auto",
    "check": True,
}


class ZeroOrder(torch.optim.Optimizer):
    """A zeroth-order method, made of parts.

    A step measures losses at moved weights, which become scalars; the update is a function of the
    weights, the state, the seed and these scalars. So a recorded step is made again without a
    forward, by :meth:`replay`.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        selection: which coordinates are perturbed and updated.
        direction: what u(key) is.
        estimator: losses to scalars, scalars to a gradient.
        update: a gradient to moved weights.
        common: see :class:`Common`.

    Raises:
        TypeError: an argument is missing or unknown.
        ValueError: an argument out of range, a glob that matches nothing, nothing left to train.
    """

    takes_steps: ClassVar = True
    replays: ClassVar = True  # its steps can be made again from recorded scalars
    compares_losses: ClassVar = True  # so that losses need no gradient, and may be any objective
    mode = "eval"
    # Trajectories say which method made them; those of the first three methods have no such key.
    names_itself: ClassVar = True

    def __init__(
        self,
        model: nn.Module,
        *,
        selection: Selection,
        direction: Dense,
        estimator: Estimator,
        update: Update,
        **common: Unpack[Common],
    ) -> None:
        given: dict[str, Any] = {**DEFAULTS, **common}
        _check_common(type(self).__name__, given)
        lr, eps, clip = given["lr"], given["eps"], given["clip_projected_grad"]
        model = dynamo.original(model)
        self.targets = select(model, list(given["freeze"]), list(selection.dense))
        super().__init__(
            [t.parameter for t in self.targets],
            {"lr": lr, "eps": eps, "weight_decay": given["weight_decay"]},
        )
        self.lr, self.seed = lr, given["seed"]
        self.clip_projected_grad = math.inf if clip is None else clip
        self.num_steps = 0
        self.selection, self.direction, self.estimator = selection, direction, estimator
        self.update, self.state_of_update = update, State(update.slots)
        self.set_thresholds()
        self._probe = FunctionalProbe(model, [t.parameter for t in self.targets])
        self.executors = Executors(given["executor"], model, self.targets, self._probe)
        self._rounding = given["rounding"]
        direction.bind(
            Bound(
                targets=self.targets,
                selection=selection,
                seed=self.seed,
                is_stochastic=self._rounding == "stochastic",
                backend=given["backend"],
                keep_noise=given["keep_noise"],
                is_in_place=self.executors.is_in_place,
            ),
            estimator.num_terms,
        )
        self._model = model
        self._unchecked = self._asks_again = given["check"]

    # --- the step -----------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Closure) -> StepRecord:  # type: ignore[override]  # returns a record
        """Make one step on the loss that ``closure`` computes.

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
        self.direction.begin(self.num_steps)
        self.choose_executor(closure)
        self._begin()

        def on_equal() -> None:
            # The loss may be a step function; or the model has taken another path.
            if self._asks_again:
                self._asks_again = False
                self.check_reads(closure)

        eps = self.param_groups[0]["eps"]
        ask = Asked(closure, self.direction, self.executors, eps, self.num_steps, on_equal)
        scalars = self.estimator.measure(ask)
        record = self.record(sum(ask.heard) / len(ask.heard), scalars)
        self._apply(scalars)
        return record

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, lr: float, scalars: Sequence[float]) -> None:
        """Apply a step that was made before, without a forward: the weights get the same bits.

        Args:
            lr: that of the step (the next ones keep it, as after :meth:`set_lr_factor`).
            scalars: what :meth:`step` recorded of it.
        """
        check(len(scalars) == self.estimator.num_scalars, "one projected gradient a query")
        self.direction.begin(self.num_steps)
        self._begin()
        self.param_groups[0]["lr"] = lr
        if self.executors.is_in_place:  # its probes leave rounding errors in the weights
            eps, nothing = self.param_groups[0]["eps"], torch.zeros(())
            self.executors.used.losses(lambda: nothing, self._pair(0, eps))
        self._apply(scalars)

    def _begin(self) -> None:
        if self.selection.is_due(self.num_steps):
            self.set_thresholds()

    def _apply(self, scalars: Sequence[float]) -> None:
        """Move the weights by what the scalars of the present step stand for.

        Raises:
            ValueError: weights were restored without the state that belongs to them.
        """
        if self.update.slots and self.num_steps and not self.state_of_update:
            raise ValueError(f"the moments of step {self.num_steps} were not restored")
        group = self.param_groups[0]
        do = Do(self.direction, self.state_of_update, self.num_steps, group["weight_decay"])
        gradient = self._gradient(scalars).clipped(self.clip_projected_grad)
        self.update.apply(do, gradient, group["lr"])
        self.direction.end()
        torch.clear_autocast_cache()  # of a loop inside of torch.autocast: casts of the old weights
        self.num_steps += 1

    def _gradient(self, scalars: Sequence[float]) -> Gradient:
        """The gradient as measured. Clipping comes later, so that a replay clips again."""
        return self.estimator.read(scalars, self.num_steps)

    def record(self, loss: float, scalars: Sequence[float]) -> StepRecord:
        """Return what a step tells of itself, from what is recorded of it.

        Args:
            loss: mean of the losses measured.
            scalars: of the next step.
        """
        found = [c for _, c in self._gradient(scalars).terms]
        clipped = sum(abs(g) > self.clip_projected_grad for g in found)
        return StepRecord(loss, tuple(found), self.estimator.forwards(self.num_steps), clipped)

    def mover(self, queries: Sequence[int], coefficients: Sequence[float]) -> DenseMover:
        """Return what moves weights along ``sum_q a_q m u_q`` of the next step."""
        keys = [Key(self.num_steps, query) for query in queries]
        move = Move(tuple(map(Term, keys, coefficients)))
        return self.direction.mover(self.num_steps, move)

    def _pair(self, query: int, eps: float) -> list[DenseMover]:
        return [self.mover([query], [eps]), self.mover([query], [-eps])]

    @torch.inference_mode(False)
    @torch.no_grad()
    def losses_at(self, closure: Closure, query: int) -> tuple[float, float]:
        """Return the losses at theta + eps m u and theta - eps m u of a query of the next step.

        Always by probes that only read the weights; nothing that a step depends on changes.
        """
        pair = self._pair(query, self.param_groups[0]["eps"])
        self.direction.end()
        plus, minus = self.executors.by(self.executors.sequential, closure, pair)
        self.direction.end()
        return number(plus), number(minus)

    # --- what is asked about it -----------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return what an update follows from, beside weights, lr and scalars; plain JSON."""
        tensors = [[t.name, list(t.parameter.shape), str(t.parameter.dtype)] for t in self.targets]
        dense = [t.name for t in self.targets if not t.masked]
        group = self.param_groups[0]
        names = {"method": type(self).__name__} if self.names_itself else {}
        limit = self.clip_projected_grad
        return {
            **names,
            "numerics": NUMERICS,
            "seed": self.seed,
            "num_queries": self.estimator.num_scalars,
            **self.direction.identity(),
            **self.selection.identity(),
            "rounding": self._rounding,
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "clip_projected_grad": None if math.isinf(limit) else limit,
            "in_place": self.executors.is_in_place,
            "tensors": hashlib.sha256(json.dumps([tensors, dense]).encode()).hexdigest(),
            **self.update.identity(),
        }

    @property
    def num_scalars(self) -> int:
        """How many scalars a step records."""
        return self.estimator.num_scalars

    @property
    def num_weights(self) -> int:
        """Weights that the method may train."""
        return sum(t.parameter.numel() for t in self.targets)

    @property
    def keeps_state(self) -> bool:
        """Whether the next step depends on tensors beside the weights."""
        return bool(self.update.slots)

    @property
    def state_bytes(self) -> int:
        """Bytes of these tensors."""
        return 4 * len(self.update.slots) * self.num_weights

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that the method may write to, by name."""
        return {t.name: t.parameter for t in self.targets}

    @property
    def passes(self) -> Passes:
        """What computes a pass over a tensor."""
        return self.direction.passes

    @property
    def why_eager(self) -> str:
        """Why passes are not fused; "" where they are, or that was asked for."""
        return self.direction.why_eager

    @property
    def executor(self) -> str:
        """The name of the executor in use; "auto" until one is chosen."""
        return self.executors.name

    @torch.no_grad()
    def active_share(self) -> float:
        """Return the fraction of the trained weights that the present mask perturbs."""
        mover = self.mover([0], [0.0])
        # Not .sum(): it would write the mask out as int64.
        active = sum(int(self.direction.mask(t, mover).count_nonzero()) for t in self.targets)
        return active / self.num_weights

    def mask_at(self, parameter: Tensor, picked: Tensor, index: Tensor, step: int) -> Tensor:
        """Return which of some entries the mask of a step perturbs: bool (n,).

        Args:
            parameter: one that is trained.
            picked: (n,), what the entries were when the step began.
            index: int64 (n,), where they are in the flat parameter.
            step: from 0; of thresholds that are renewed, the present ones are taken.
        """
        target = self.direction.target_of(parameter)
        return self.selection.active_at(target, picked, index, step, self.seed)

    # --- what changes it ------------------------------------------------------------------------

    def set_lr_factor(self, factor: float) -> None:
        """Let the next steps use ``factor * lr``."""
        self.param_groups[0]["lr"] = factor * self.lr

    def set_thresholds(self) -> None:
        """Set the masks' thresholds from the present weights."""
        self.selection.set_thresholds(self.targets)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: what is trained, and its thresholds, are chosen there.

        Raises:
            ValueError: always, after construction.
        """
        check(not self.param_groups, "what is trained is fixed: make a new optimizer")
        super().add_param_group(param_group)

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
        seconds = self.executors.choose(closure, self._pair(0, self.param_groups[0]["eps"]))
        self.direction.end()
        return seconds

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return plain numbers and tensors that the next step depends on, beside the weights.

        The tensors are the method's own, not copies.
        """
        numbers = {"num_steps": self.num_steps, "h": {t.name: t.h.hex() for t in self.targets}}
        return numbers, self.state_of_update.tensors()

    def restore(self, numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`snapshot`; without tensors a method that keeps some can step at step 0 alone.

        Raises:
            LookupError, ValueError: they are not of these weights.
        """
        self.direction.end()
        self.num_steps = numbers["num_steps"]
        for target in self.targets:
            target.h = float.fromhex(numbers["h"][target.name])
        self.state_of_update.restore(tensors, self.targets)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`snapshot`, with copies of the tensors, for users of torch's own protocol."""
        numbers, tensors = self.snapshot()
        if not self.keeps_state:
            return numbers
        return numbers | {"moments": {name: tensor.clone() for name, tensor in tensors.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.restore(state_dict, state_dict.get("moments", {}))

    # --- trust ----------------------------------------------------------------------------------

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
        return self._self_check()(closure)

    @torch.inference_mode(False)
    @torch.no_grad()
    def check_reads(self, closure: Closure) -> None:
        """Ask again, of another closure, for parameters that are read without their owners.

        The cheap half of :meth:`self_check`: one forward where there are none.

        Raises:
            Unreached: naming them.
            ValueError, NonFiniteLoss: as there.
        """
        self._self_check().check_reads(closure)

    def _self_check(self) -> SelfCheck:
        return SelfCheck(
            self._model,
            self.targets,
            self._probe,
            self.executors,
            lambda size: self.mover([0], [size]),
            self.direction.end,
            self.param_groups[0]["eps"],
            self.num_steps,
        )


def _check_common(name: str, given: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for arguments of :class:`Common` that cannot be taken."""
    for key in ("lr", "eps"):
        if key not in given:
            raise TypeError(f"{name} needs {key}=")
    if unknown := given.keys() - Common.__annotations__.keys():
        raise TypeError(f"{name} takes no {sorted(unknown)[0]}=")
    lr, eps, decay = given["lr"], given["eps"], given["weight_decay"]
    check(lr > 0 and math.isfinite(lr), f"lr={lr}: must be above 0")
    check(eps > 0 and math.isfinite(eps), f"eps={eps}: must be above 0")
    check(decay >= 0, f"weight_decay={decay}: must not be negative")
    clip = given["clip_projected_grad"]
    check(clip is None or clip > 0, f"clip_projected_grad={clip}: must be above 0")
    one_of("rounding", given["rounding"], ("nearest", "stochastic"))
    one_of("keep_noise", given["keep_noise"], ("auto", True, False))
    one_of("backend", given["backend"], ("auto", "compiled", "eager"))
