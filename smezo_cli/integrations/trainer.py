"""Train by any zeroth-order method of smezo in transformers' Trainer, or a class made from it.

trainer = ZeroOrderTrainer(
    model=model,
    args=TrainingArguments(..., learning_rate=1e-6),
    train_dataset=rows,
    method=SparseMeZO,
    method_arguments={"eps": 1e-3, "sparsity": 0.75},
)
trainer.train()
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.step import Closure, StepRecord

#: Settings of TrainingArguments that a step without gradients has no use for, and what to do.
_WITHOUT_USE: Mapping[str, str] = {
    "optim": "the method is the optimizer",
    "optim_args": "give method_arguments",
    "adam_beta1": "give method_arguments, such as betas of MeZOAdam",
    "adam_beta2": "give method_arguments, such as betas of MeZOAdam",
    "adam_epsilon": "give method_arguments, such as adam_eps of MeZOAdam",
    "max_grad_norm": "give method_arguments={'clip_projected_grad': ...}",
    "fp16": "it scales gradients, and there are none: load the model in float16, or take bf16=True",
    "neftune_noise_alpha": "losses are computed in eval mode, where it adds nothing",
}

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ZeroOrderMixin(_Base):
    """Makes the steps of a Trainer those of a zeroth-order method.

    Put it before a class made from Trainer: ``class Mine(ZeroOrderMixin, SFTTrainer)``. The lr
    and its schedule, weight decay and seed are those of TrainingArguments; its micro-batches
    (``gradient_accumulation_steps``) are parts of one loss. All losses are computed in eval mode,
    without dropout, as the two losses of a step must differ by the probe alone. Checkpoints have
    the method's state in ``optimizer.pt``, so that a run that goes on makes the same steps.

    Logs have ``projected_grad`` of the last step in place of ``grad_norm``; ``loss`` is the mean
    of the losses that a step measured, at its probes.

    Args:
        args: of the Trainer that it is put before.
        method: class of smezo_cli.methods.
        method_arguments: its keyword arguments but lr, seed and weight_decay; ``eps`` is needed.
        kwargs: of the Trainer.

    Raises:
        ValueError: a setting that would have no effect; a method that needs more than the loss of
            a batch; several processes or GPUs.
    """

    def __init__(
        self,
        *args: Any,
        method: type[ZeroOrder],
        method_arguments: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        _check_method(method, method_arguments)
        self._method, self._method_arguments = method, dict(method_arguments)
        self._parts: list[Closure] = []
        self.record: StepRecord | None = None  # of the last step
        super().__init__(*args, **kwargs)
        _check_arguments(self.args)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError("optimizers: the method is the optimizer; leave it out")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the method for the model; see Trainer."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None  # a Trainer has refused that
            self.method = self._method(
                trained,
                lr=self.args.learning_rate,
                seed=self.args.seed,
                weight_decay=self.args.weight_decay,
                **self._method_arguments,
            )
            self.optimizer = _Made(self.method)
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Keep a micro-batch; with the last one of a step, make the step and return its loss."""
        prepared = self._prepare_inputs(inputs)
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:  # as the Trainer finds it out
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = by_model or self.compute_loss_func is not None
        count = 1 if is_scaled else self.current_gradient_accumulation_steps

        def part() -> Tensor:
            with self.compute_loss_context_manager():
                # A copy: a Trainer with a loss of its own takes the labels out of what it is given.
                given = copy.copy(prepared)
                loss = self.compute_loss(model, given, num_items_in_batch=num_items_in_batch)
            assert isinstance(loss, Tensor)
            return loss / count

        self._parts.append(part)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.eval()
        parts, self._parts = self._parts, []
        self.record = self.method.step(_Sum(parts))
        return torch.tensor(self.record.loss, device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Clip nothing: there are no gradients; ``clip_projected_grad`` is the method's own."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Return None: there are no gradients."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the projected gradient of the last step beside its loss."""
        if "loss" in logs and self.record is not None and self.record.projected_grad:
            logs["projected_grad"] = self.record.projected_grad[0]
        super().log(logs, *args, **kwargs)


class ZeroOrderTrainer(ZeroOrderMixin, Trainer):
    """transformers' Trainer, whose steps are those of a zeroth-order method."""


class _Sum:
    """Returns the sum of the losses of micro-batches, and them one by one."""

    def __init__(self, parts: list[Closure]) -> None:
        self._parts = parts

    def __call__(self) -> Tensor:
        losses = [part() for part in self._parts]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def parts(self) -> Iterator[Closure]:
        """See :class:`smezo_cli.zo.step.InParts`."""
        return iter(self._parts)


class _Made(torch.optim.Optimizer):
    """Shows a method to schedulers and checkpoints; the steps are made before it is asked.

    Args:
        method: whose groups, with the lr, and whose state it shows.
    """

    def __init__(self, method: ZeroOrder) -> None:
        super().__init__(list(method.trained.values()), {"lr": method.lr})
        self.param_groups = method.param_groups
        self._made = method

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Do nothing: ``training_step`` has made the step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on beside the weights, and the present lr."""
        return {"method": self._made.state_dict(), "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._made.load_state_dict(state_dict["method"])
        self.param_groups[0]["lr"] = state_dict["lr"]  # schedulers change it after each step


def _check_method(method: type[ZeroOrder], arguments: Mapping[str, Any]) -> None:
    if not (isinstance(method, type) and issubclass(method, ZeroOrder)):
        raise ValueError(
            f"method={method!r}: must be a class of smezo_cli.methods that makes zeroth-order "
            "steps, such as smezo_cli.methods.mezo.MeZO"
        )
    name = method.__name__
    if method.objectives != ("batch",):
        others = ", ".join(what for what in method.objectives if what != "batch")
        raise ValueError(
            f"method={name} needs other losses than that of the batch ({others}), which a Trainer "
            "does not have: use smezo train"
        )
    if method.needs_rows:
        raise ValueError(
            f"method={name} needs the loss of each row, which a Trainer does not have: use smezo "
            "train"
        )
    if method.holds_codes:
        raise ValueError(
            f"method={name} makes integers of the weights, which a Trainer's checkpoints do not "
            "know: use smezo train"
        )
    if method.needs_mask:
        raise ValueError(f"method={name} needs a mask, which smezo train makes: use that")
    for key, where in (
        ("lr", "learning_rate"),
        ("weight_decay", "weight_decay"),
        ("seed", "seed"),
    ):
        if key in arguments:
            raise ValueError(f"method_arguments: give {key} as TrainingArguments({where}=...)")


def _check_arguments(args: TrainingArguments) -> None:
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        same = not value or value == field.default or str(value) == str(field.default)
        same = same or getattr(value, "value", value) == field.default  # of an enumeration
        if field.name in _WITHOUT_USE and not same:
            raise ValueError(
                f"{field.name}={value} has no effect on zeroth-order steps: leave it out; "
                f"{_WITHOUT_USE[field.name]}"
            )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"{max(args.world_size, args.n_gpu)} processes or GPUs: a zeroth-order step in a "
            "Trainer takes one; torchrun with smezo train shares a step (docs/guide/ranks.md), and "
            "CUDA_VISIBLE_DEVICES=0 leaves one GPU"
        )
