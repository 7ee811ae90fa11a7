"""Take a zeroth-order step: measure losses, write down scalars, apply what follows from them.

    opt = SparseMeZO(model, lr=1e-6, eps=1e-3, sparsity=0.75)
    record = opt.step(lambda: loss_fn(model(x), y))

Works on any torch module; knows nothing of Hydra or transformers.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from smezo_cli.zo.directions.base import PointMover
from smezo_cli.zo.loss_meter import LossMeter
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.parts import Parts
from smezo_cli.zo.self_check import SelfCheck
from smezo_cli.zo.step import (
    Closure,
    NonFiniteLoss,
    StepRecord,
    TakesNote,
    measuring,
    updating,
)
from smezo_cli.zo.targets import check, number
from smezo_cli.zo.updates.base import WeightWriter


class ZeroOrder(Parts):
    """Train by a zeroth-order method, made of parts; see :class:`smezo_cli.zo.parts.Parts`.

    A step measures losses at moved weights, which become scalars; the update is a function of the
    weights, the state, the seed and these scalars. So a recorded step is made again without a
    forward, by :meth:`replay`.
    """

    takes_steps: ClassVar = True
    replays: ClassVar = True  # its steps can be made again from recorded scalars
    compares_losses: ClassVar = True  # so that losses need no gradient, and may be any objective
    measures_pairs: ClassVar = True  # of losses at opposite points, which may run in turns
    shares_steps: ClassVar = True  # ranks may make a step together: it needs losses alone
    # Ranks share the groups of points of a step (query_ranks). There are at least as many as the
    # product of these arguments (of one that is None: as many as the model has), or so many.
    groups_by: ClassVar = "num_queries"
    least_groups: ClassVar = 1
    needs_rows: ClassVar = False  # the loss of each row, see ByRow
    needs_gradient: ClassVar = False  # of the objective, which must be the loss then
    needs_mask: ClassVar = False  # of named entries, which a run makes once and keeps
    score_bytes: ClassVar = 0  # a weight, while that mask is made
    mode = "eval"

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
            NonFiniteLoss, UpdateOverflow: each says what the weights are then.
            MemoryError: in a forward, which leaves the weights as NonFiniteLoss does; or in a
                backward pass (BackwardOutOfMemory) or the update, when some may be moved.
            ValueError: at the first step, by :meth:`self_check`.
        """
        if self._unchecked:
            try:
                self.self_check(closure)
            except BaseException:
                self._unchecked = True  # what a method adds to the check may be what has failed
                raise
        self._begin()
        self.choose_executor(closure)
        self._refresh_thresholds()

        def on_equal_losses() -> None:
            # The loss may be a step function; or the model has taken another path.
            if self._asks_again:
                self.check_reads(closure)
                self._asks_again = False

        def measured() -> None:
            if isinstance(closure, TakesNote):
                closure.measured()

        ask = self.meter(closure, on_equal_losses)
        try:
            with measuring(self.num_steps):
                scalars = self._measure(ask)
                loss = sum(ask.all_losses) / len(ask.all_losses)
                record = self.record(loss, scalars, self.num_steps)
            if self.tail is None:
                measured()
            else:  # at the weights that were probed; raises before it writes
                lr = self.param_groups[0]["lr"]
                self.tail.apply(closure, lr, self.num_steps, measured)
        except NonFiniteLoss:  # of all processes
            self._joined.clear()
            raise
        self._joined.clear()
        with updating(self.num_steps, self.param_groups[0]["lr"]):
            self._apply(scalars)
        return record

    def meter(
        self,
        closure: Closure,
        on_equal_losses: Callable[[], None] = lambda: None,
        eps: float | None = None,
    ) -> LossMeter:
        """Return what measures losses for the next step; at another eps than that of the method."""
        return LossMeter(
            closure,
            self.direction,
            self.executors,
            self.param_groups[0]["eps"] if eps is None else eps,
            self.num_steps,
            on_equal_losses,
            self._joined,
        )

    def _measure(self, ask: LossMeter) -> list[float]:
        scalars = list(self.estimator.measure(ask))
        if self.step_size is None and self.phase is None:
            return scalars
        lr, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        gradient = self._gradient(scalars, self.num_steps).clipped(self.clip_projected_grad)
        if self.step_size is not None:
            factor = self.step_size.measure(ask, gradient, lr, lr * decay)
            scalars.append(factor)
            lr = factor * lr
        if self.phase is not None:
            scalars += self.phase.measure(ask, gradient.move(-lr, lr * decay))
        return scalars

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, lr: float, scalars: Sequence[float]) -> None:
        """Apply a step that was made before, without a forward: the weights get the same bits.

        Args:
            lr: that of the step (the next ones keep it, as after :meth:`set_lr_factor`).
            scalars: what :meth:`step` recorded of it.
        """
        check(len(scalars) == self.num_scalars, f"a step has {self.num_scalars} scalars")
        self._begin()
        self._refresh_thresholds()
        self.param_groups[0]["lr"] = lr
        if self.executors.is_in_place:  # its probes leave rounding errors in the weights
            eps, nothing = self.param_groups[0]["eps"], torch.zeros(())
            self.executors.used.losses(lambda: nothing, self._pair(0, eps))
        self._apply(scalars)

    def _begin(self) -> None:
        """Begin the next step, or begin it again."""
        self.selection.begin(self.targets, self.num_steps, self.seed)
        self.direction.begin(self.num_steps)

    def _refresh_thresholds(self) -> None:
        if self.selection.refreshes_at(self.num_steps):
            self.set_thresholds()

    def _apply(self, scalars: Sequence[float]) -> None:
        """Move the weights by what the scalars of the present step stand for.

        Raises:
            ValueError: weights were restored without the state that belongs to them.
        """
        state, step, group = self.state_of_update, self.num_steps, self.param_groups[0]
        if self.keeps_state and step and not state:
            raise ValueError(f"the moments of step {step} were not restored")
        if self.direction.refreshes_at(step):
            state.carry(self.targets, lambda t, kept: self.direction.carry(t, kept, step))
        writer = WeightWriter(self.direction, state, self.targets, step, group["weight_decay"])
        gradient = self._gradient(scalars, step).clipped(self.clip_projected_grad)
        self.update.apply(writer, gradient, self._factor(scalars) * group["lr"])
        if self.phase is not None:
            self.phase.apply(writer, scalars[-self.phase.num_scalars :])
        self.direction.end()
        torch.clear_autocast_cache()  # of a loop inside of torch.autocast: casts of the old weights
        self.num_steps += 1

    def _gradient(self, scalars: Sequence[float], step: int) -> Gradient:
        """Return the gradient as measured. Clipping comes later, so that a replay clips again."""
        return self.estimator.read(scalars[: self.estimator.num_scalars], step)

    def _factor(self, scalars: Sequence[float]) -> float:
        """Return the factor of lr that was measured; 1 where none is."""
        return 1.0 if self.step_size is None else scalars[self.estimator.num_scalars]

    def record(self, loss: float, scalars: Sequence[float], step: int) -> StepRecord:
        """Return what a step tells of itself, from what is recorded of it.

        Args:
            loss: mean of the losses measured.
            scalars: what was recorded.
            step: number of the step, from 0.
        """
        found = [term.coefficient for term in self._gradient(scalars, step).terms]
        clipped = sum(abs(g) > self.clip_projected_grad for g in found)
        forwards = self.estimator.forwards(step)
        if self.step_size is not None:
            forwards += self.step_size.forwards(self._factor(scalars))
        if self.phase is not None:
            forwards += self.phase.forwards(step)
        forwards += self.tail is not None
        return StepRecord(loss, tuple(found), forwards, clipped, tuple(scalars))

    def _pair(self, query: int, eps: float) -> list[PointMover]:
        """Return what moves the weights to both sides along a query of the next step."""
        self.selection.begin(self.targets, self.num_steps, self.seed)
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

    @torch.inference_mode(False)
    @torch.no_grad()
    def choose_executor(self, closure: Closure) -> dict[str, float]:
        """Take the faster executor that gives the losses of sequential, if the setting is "auto".

        The losses of the present step's first query are measured twice each way; they are the same
        whichever is chosen, and nothing else depends on the choice. An executor that was asked for
        and is not exact is compared with sequential, once.

        Args:
            closure: as for :meth:`step`.

        Returns:
            Seconds of a pair of losses by the name of the executor, of those that could be used.

        Raises:
            ValueError: the executor that was asked for gives other losses, or cannot be used.
        """
        if self.executor != "auto":
            self.executors.check(closure, self._pair(0, self.param_groups[0]["eps"]))
            self.direction.end()
            return {}
        if not self.measures_pairs:
            self.executors.use(self.executors.sequential)
            return {}
        seconds = self.executors.choose(closure, self._pair(0, self.param_groups[0]["eps"]))
        self.direction.end()
        return seconds

    @torch.inference_mode(False)
    @torch.no_grad()
    def self_check(self, closure: Closure) -> int:
        """Check that a probe gives the loss that perturbing the weights in place gives.

        Up to rounding. Parameters are perturbed by kind (module class, parameter name), several at
        once while their copies stay small beside the model; of every parameter it is seen if an
        operation reads it directly. One that only a module around its owner reads is perturbed for
        the whole forward of that module from then on.

        Args:
            closure: as for :meth:`step`.

        Returns:
            The number of kinds checked.

        Raises:
            Unreached: naming all parameters that functional probes cannot perturb.
            ValueError: the closure is random, or gives another loss at each call.
            NonFiniteLoss: a loss is not finite.
        """
        checked = self._self_check()(closure)
        self._unchecked = False  # a check that fails is asked again by the next step
        return checked

    @torch.inference_mode(False)
    @torch.no_grad()
    def check_reads(self, closure: Closure) -> None:
        """Ask again, of another closure, for parameters that are read without their owners.

        The cheap half of :meth:`self_check`: one forward where there are none.

        Raises:
            Unreached: naming them.
            ValueError, NonFiniteLoss: as there.
        """
        try:
            self._self_check().check_reads(closure)
        finally:  # it may be asked within a step, in which some tensors rest
            self.selection.begin(self.targets, self.num_steps, self.seed)

    def _self_check(self) -> SelfCheck:
        for target in self.targets:  # what rests in this step is perturbed in another
            target.rests = False
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
