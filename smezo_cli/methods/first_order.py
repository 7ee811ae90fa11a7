"""Train by backpropagation with any optimizer of ``torch.optim``: baselines that need memory."""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smezo_cli.machine.out_of_memory import detecting_out_of_memory
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.ranges import Globs, Positive
from smezo_cli.zo.step import Closure, InParts, NonFiniteLoss, StepRecord, updating


class FirstOrder:
    """Makes one forward, one backward and one step of a torch optimizer.

    Args:
        model: parameters with ``requires_grad`` are trained.
        optimizer: makes the optimizer from the parameters: ``partial(torch.optim.AdamW, lr=1e-5)``.
        seed: with the step, keys the dropout of models that have one.
        freeze: globs of parameter names left as they are.
        max_grad_norm: longer gradients are shortened to it; None never.

    Raises:
        ValueError: a glob matches nothing, or nothing is left to train.
    """

    takes_steps: ClassVar = True
    replays: ClassVar = False
    compares_losses: ClassVar = False
    mode = "train"
    keeps_state = True

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[..., torch.optim.Optimizer],
        seed: int = 0,
        freeze: Globs = (),
        max_grad_norm: Positive | None = None,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for glob in (freeze := list(freeze)):
            if not any(fnmatch.fnmatchcase(name, glob) for name, _ in named):
                raise ValueError(
                    f"freeze {glob!r} matches no trainable parameter, e.g. {named[0][0]!r}"
                )
        self.trained = {
            name: p
            for name, p in named
            if not any(fnmatch.fnmatchcase(name, glob) for glob in freeze)
        }
        if not self.trained:
            raise ValueError("no parameter is left to train; freeze fewer")
        self._frozen = [p for name, p in named if name not in self.trained]
        self._optimizer = optimizer(list(self.trained.values()))
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer LBFGS evaluates the loss by itself; choose another")
        self._lrs = [group["lr"] for group in self._optimizer.param_groups]
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.num_steps = 0

    @property
    def num_weights(self) -> int:
        """Return how many weights the method trains."""
        return sum(p.numel() for p in self.trained.values())

    def set_lr_factor(self, factor: float) -> None:
        """Let the next steps use ``factor`` times the optimizer's lr."""
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = factor * lr

    def step(self, closure: Closure) -> StepRecord:
        """Make one step; ``closure``, or each of its parts, is called once, with gradients.

        The gradients of parts are added up, each as soon as it is there.

        Raises:
            NonFiniteLoss: before anything was written.
            UpdateOverflow: some of the weights may be moved.
            OutOfMemory: before anything was written.
        """
        devices = {p.device for p in self.trained.values() if p.device.type != "cpu"}
        self._optimizer.zero_grad(set_to_none=True)
        for p in self._frozen:
            p.requires_grad_(False)
        try:
            with torch.random.fork_rng(sorted(devices, key=str)), torch.enable_grad():
                key, _ = stream_key(self.seed, "dropout", self.num_steps)
                torch.manual_seed(key & (2**63 - 1))
                value = 0.0
                for part in closure.parts() if isinstance(closure, InParts) else (closure,):
                    with detecting_out_of_memory():
                        loss = part()
                        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
                    value += float(loss.detach())
        finally:
            for p in self._frozen:
                p.requires_grad_(True)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"loss {value} at step {self.num_steps}")
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(f"gradient norm {float(norm)} at step {self.num_steps}")
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self.max_grad_norm, norm)
        with updating(self.num_steps, self._optimizer.param_groups[0]["lr"]):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return StepRecord(value, (), 1)

    def active_share(self) -> float:
        """Return 1: every weight is trained."""
        return 1.0

    def self_check(self, closure: Closure) -> int:
        """Check nothing: there are no probes."""
        return 0

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return plain numbers and tensors that the next step depends on, beside the weights."""
        tensors, numbers = {}, {}
        names = list(self.trained)
        for index, entry in self._optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{names[index]}/{key}"] = value.clone()
                elif value is not None:
                    numbers[f"{names[index]}/{key}"] = value
        return {"num_steps": self.num_steps, "optimizer": numbers}, tensors

    def restore(self, numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`snapshot`.

        Raises:
            LookupError, ValueError: they are not of these weights.
        """
        self.num_steps = numbers["num_steps"]
        index = {name: i for i, name in enumerate(self.trained)}
        state: dict[int, dict[str, Any]] = {}
        for path, value in {**numbers["optimizer"], **tensors}.items():
            name, _, key = path.rpartition("/")
            state.setdefault(index[name], {})[key] = value
            sizes = (1, self.trained[name].numel())
            if isinstance(value, Tensor) and value.numel() not in sizes:
                raise ValueError(f"{path} has {value.numel()} numbers")
        if len({frozenset(entry) for entry in state.values()}) > 1:
            raise ValueError("tensors have unlike entries")
        saved = self._optimizer.state_dict()
        saved["state"] = state
        self._optimizer.load_state_dict(saved)
