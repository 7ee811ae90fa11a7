"""Put the parts of a zeroth-order method together for the tensors of one model."""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.backprop import Backprop
from smezo_cli.zo.directions.base import Direction, DirectionContext, Named, PointMover
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Estimator
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.executors.choose import Executors
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.phase import Phase
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.ranges import (
    ExecutorName,
    Globs,
    KeepNoise,
    Layers,
    Limit,
    NotNegative,
    Radius,
    RoundingMode,
    StepSize,
)
from smezo_cli.zo.selections.base import Selection
from smezo_cli.zo.selections.layers import frozen
from smezo_cli.zo.state import State
from smezo_cli.zo.step import NUMERICS
from smezo_cli.zo.step_sizes.base import StepSize as MeasuredStepSize
from smezo_cli.zo.targets import check, one_of, select
from smezo_cli.zo.updates.base import Update


class Common(TypedDict, total=False):
    """Names the arguments that every zeroth-order method takes.

    lr: step size.
    eps: radius of the probe.
    seed: names the noise; z depends on (seed, step, query, tensor name, index) alone.
    weight_decay: on what is selected only.
    clip_projected_grad: a projected gradient is cut to it in the update; None never.
    freeze: globs of parameter names left as they are.
    layers: numbers of the blocks that are trained, all else being frozen: one, a list, or a range
        such as "16-29" with both ends; None: nothing is frozen by it.
    rounding: "nearest" or "stochastic": how updates are stored below float32.
    executor: how the losses of a query are measured. "sequential": one after the other at moved
        copies of the weights, module by module; "lockstep": in turns, with one draw for both;
        "in_place": the textbook's, in the weights; "batched": all points of a step as one batch,
        and "side_path": one after the other, both without copies of matrices that are moved along
        thin products, and equal to the others up to rounding. "auto" takes the faster of the first
        two by timing both at the first step, see :meth:`ZeroOrder.choose_executor`.
    backend: "compiled" (by Numba on a CPU, by Triton on a CUDA device), "eager", or "auto":
        compiled where that works and the weights are many enough to earn it. The numbers are the
        same.
    keep_noise: draw z once a step and keep it (4 bytes a weight and one for the mask). Pays where
        drawing is slow: "auto" does it for eager passes on a CPU with memory to spare.
    check: ask :meth:`ZeroOrder.self_check` at the first step; False where that was done already.
    """

    lr: Required[StepSize]
    eps: Required[Radius]
    seed: int
    weight_decay: NotNegative
    clip_projected_grad: Limit | None
    freeze: Globs
    layers: Layers | None
    rounding: RoundingMode
    executor: ExecutorName
    backend: str
    keep_noise: KeepNoise
    check: bool


DEFAULTS: Mapping[str, Any] = {
    "seed": 0,
    "weight_decay": 0.0,
    "clip_projected_grad": None,
    "freeze": (),
    "layers": None,
    "rounding": "nearest",
    "executor": "auto",
    "backend": "auto",
    "keep_noise": "auto",
    "check": True,
}


class Parts(torch.optim.Optimizer):
    """Combines the parts of a method for a model and holds its state; ZeroOrder adds the step.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        selection: which coordinates are perturbed and updated.
        direction: what u(key) is.
        estimator: losses to scalars, scalars to a gradient.
        update: a gradient to moved weights.
        step_size: chooses a factor of lr by losses along the step; None: the factor is 1.
        tail: trains some tensors by backpropagation in the same step; None: none.
        phase: measures and moves once more after the update; None: nothing does.
        common: see :class:`Common`.

    Raises:
        TypeError: an argument is missing or unknown.
        ValueError: an argument out of range, a glob that matches nothing, nothing left to train.
    """

    objectives: ClassVar[tuple[str, ...]] = ("batch",)  # the losses that its steps ask for

    # Trajectories say which method made them. The first three methods' say nothing, as they did
    # before there were others: a new method leaves this as it is.
    names_itself: ClassVar = True
    holds_codes: ClassVar = False  # a run makes linear layers QuantisedLinear before its method
    moves_codes: ClassVar = False  # those of QuantisedLinear; else they stay as they are

    def __init__(
        self,
        model: nn.Module,
        *,
        selection: Selection,
        direction: Direction,
        estimator: Estimator,
        update: Update,
        step_size: MeasuredStepSize | None = None,
        tail: Backprop | None = None,
        phase: Phase | None = None,
        **common: Unpack[Common],
    ) -> None:
        check_common(type(self).__name__, common)
        given: dict[str, Any] = {**DEFAULTS, **common}
        lr, eps, clip = given["lr"], given["eps"], given["clip_projected_grad"]
        model = dynamo.original(model)
        freeze = frozen(model, given, codes=self.moves_codes)
        self.targets = select(model, freeze, list(selection.dense), codes=self.moves_codes)
        super().__init__(
            [t.parameter for t in self.targets],
            {"lr": lr, "eps": eps, "weight_decay": given["weight_decay"]},
        )
        self.lr, self.seed = lr, given["seed"]
        self.clip_projected_grad = math.inf if clip is None else clip
        self.num_steps = 0
        self.selection, self.direction, self.estimator = selection, direction, estimator
        self.update, self.step_size, self.tail, self.phase = update, step_size, tail, phase
        kept = update.slots, direction.state_size, update.copies, update.copied, update.own_sizes
        self.state_of_update = State(*kept)
        self.set_thresholds()
        self._probe = FunctionalProbe(model, [t.parameter for t in self.targets])
        self.executors = Executors(given["executor"], model, self.targets, self._probe)
        self._check_in_place()
        self._rounding = given["rounding"]
        direction.bind(
            DirectionContext(
                targets=self.targets,
                selection=selection,
                seed=self.seed,
                is_stochastic=self._rounding == "stochastic",
                backend=given["backend"],
                keep_noise=given["keep_noise"],
                is_in_place=self.executors.is_in_place,
                state=self.state_of_update,
            ),
            estimator.num_terms,
        )
        self._model = model
        self._joined: list[list[list[float]]] = []  # see LossMeter
        self._unchecked = self._asks_again = given["check"]  # by the self-check

    def _check_in_place(self) -> None:
        """Raise ValueError where the textbook's executor cannot measure what is asked of it."""
        is_pair = isinstance(self.estimator, TwoSided) and type(self.direction) is Dense
        whole = all(target.index is None for target in self.targets)
        whole = whole and self.step_size is None and self.phase is None
        check(
            not self.executors.is_in_place or (is_pair and whole),
            "executor=in_place measures two points along one dense direction alone, so it does not "
            "go with this method: leave it out",
        )

    def identity(self) -> dict[str, Any]:
        """Return all that determines an update but weights, lr and scalars, as plain JSON."""
        tensors = [[t.name, list(t.parameter.shape), str(t.parameter.dtype)] for t in self.targets]
        dense = [t.name for t in self.targets if not t.masked]
        group = self.param_groups[0]
        names = {"method": type(self).__name__} if self.names_itself else {}
        limit = self.clip_projected_grad
        return {
            **names,
            "numerics": NUMERICS,
            "seed": self.seed,
            "num_scalars" if self.names_itself else "num_queries": self.num_scalars,
            **self.direction.identity(),
            **self.selection.identity(),
            "rounding": self._rounding,
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "clip_projected_grad": None if math.isinf(limit) else limit,
            "in_place": self.executors.is_in_place,
            "tensors": hashlib.sha256(json.dumps([tensors, dense]).encode()).hexdigest(),
            **self.update.identity(),
            **({} if self.step_size is None else self.step_size.identity()),
            **({} if self.phase is None else self.phase.identity()),
        }

    @property
    def remark(self) -> str:
        """Return what a user should know of the method here, as words after "method"; or ""."""
        return ""

    @property
    def num_scalars(self) -> int:
        """Return how many scalars a step records."""
        more = 0 if self.phase is None else self.phase.num_scalars
        return self.estimator.num_scalars + (self.step_size is not None) + more

    def forwards(self, step: int) -> int:
        """Return how many forwards over the batch a step takes, if a step size is found at once."""
        measured = 0 if self.step_size is None else self.step_size.forwards(1.0)
        more = 0 if self.phase is None else self.phase.forwards(step)
        return self.estimator.forwards(step) + measured + more + (self.tail is not None)

    def exchanged(self, step: int) -> int:
        """Return how many numbers processes that share a step exchange at once, at most."""
        return self.forwards(step)

    @property
    def num_weights(self) -> int:
        """Return how many weights the method may train."""
        return sum(p.numel() for p in self.trained.values())

    @property
    def keeps_state(self) -> bool:
        """Return whether the next step depends on tensors beside the weights."""
        return bool(self.update.slots or self.update.copies)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of these tensors, and of what the direction keeps from step to step."""
        return self.state_of_update.bytes_of(self.targets) + self.direction.kept_bytes

    @property
    def mask_bytes(self) -> int:
        """Return the bytes of a mask that names its entries one by one, beside the state's."""
        return self.selection.kept_bytes

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the tensors that the method may write to, by name."""
        own = {t.name: t.parameter for t in self.targets}
        return own if self.tail is None else own | self.tail.parameters

    @property
    def passes(self) -> Named:
        """Return what computes a pass over a tensor."""
        return self.direction.passes

    @property
    def why_eager(self) -> str:
        """Return why passes are not fused; "" where they are, or that was asked for."""
        return self.direction.why_eager

    @property
    def executor(self) -> str:
        """Return the name of the executor in use; "auto" until one is chosen."""
        return self.executors.name

    @torch.no_grad()
    def active_share(self) -> float:
        """Return the fraction of the trained weights that the present mask perturbs."""
        self.selection.begin(self.targets, self.num_steps, self.seed)
        # Not .sum(): it would write the mask out as int64.
        active = sum(int(m.count_nonzero()) for m in self.direction.masks(self.num_steps))
        if self.tail is not None:
            own = {id(t.parameter) for t in self.targets}
            others = [p for p in self.tail.parameters.values() if id(p) not in own]
            active += sum(p.numel() for p in others)
        return active / self.num_weights

    def mask_at(self, parameter: Tensor, picked: Tensor, index: Tensor, step: int) -> Tensor:
        """Return which of some entries the mask of a step perturbs: bool (n,).

        Args:
            parameter: one that is trained.
            picked: (n,), what the entries were when the step began.
            index: int64 (n,), where they are in the flat parameter.
            step: from 0; of thresholds that are refreshed, the present ones are taken.
        """
        if self.tail is not None and any(parameter is p for p in self.tail.parameters.values()):
            return torch.ones_like(index, dtype=torch.bool)
        target = self.direction.target_of(parameter)
        if target.index is not None:
            return torch.isin(index, target.index)
        self.selection.begin(self.targets, step, self.seed)
        return self.selection.active_at(target, picked, index, step, self.seed)

    def mover(self, queries: Sequence[int], coefficients: Sequence[float]) -> PointMover:
        """Return what moves weights along ``sum_q a_q m u_q`` of the next step."""
        keys = [Key(self.num_steps, query) for query in queries]
        move = Move(tuple(map(Term, keys, coefficients)))
        return self.direction.mover(self.num_steps, move)

    def set_lr_factor(self, factor: float) -> None:
        """Let the next steps use ``factor * lr``."""
        self.param_groups[0]["lr"] = factor * self.lr

    def set_thresholds(self) -> None:
        """Set the masks' thresholds from the present weights."""
        self.selection.set_thresholds(self.targets)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the constructor chooses what is trained, and its thresholds.

        Raises:
            ValueError: always, after construction.
        """
        check(not self.param_groups, "what is trained is fixed: make a new optimizer")
        super().add_param_group(param_group)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return plain numbers and tensors that the next step depends on, beside the weights.

        The tensors are the method's own, not copies.
        """
        numbers = {"num_steps": self.num_steps, "h": {t.name: t.h.hex() for t in self.targets}}
        if self.state_of_update.numbers:
            numbers["state"] = copy.deepcopy(self.state_of_update.numbers)
        return numbers, self.state_of_update.tensors(self.targets)

    def restore(self, numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`snapshot`; without tensors a method that keeps some can step at step 0 alone.

        Raises:
            LookupError, ValueError: they are not of these weights.
        """
        self.direction.end()
        self._joined.clear()
        self.num_steps = numbers["num_steps"]
        for target in self.targets:
            target.h = float.fromhex(numbers["h"][target.name])
        self.state_of_update.restore(tensors, self.targets, numbers.get("state"))

    def state_dict(self) -> dict[str, Any]:
        """Do as :meth:`snapshot`, with copies of the tensors, for users of torch's own protocol."""
        numbers, tensors = self.snapshot()
        if not self.keeps_state:
            return numbers
        return numbers | {"moments": {name: tensor.clone() for name, tensor in tensors.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.restore(state_dict, state_dict.get("moments", {}))


def check_common(name: str, common: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for arguments of :class:`Common` that cannot be taken.

    A method that computes with some before it is put together asks this first.

    Args:
        name: of the method's class.
        common: as given, without defaults.
    """
    given = {**DEFAULTS, **common}
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
