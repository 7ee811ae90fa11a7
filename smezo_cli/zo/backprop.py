"""Train some tensors by backpropagation, each updated as soon as its gradient is there."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smezo_cli.zo.step import Closure, InParts, NonFiniteLoss, WithObjectives


class Backprop:
    """One SGD step on some parameters by backpropagation, beside a zeroth-order step.

    No gradient of the model's size is kept: a parameter moves when backpropagation has come to it,
    and its gradient is dropped. Where a batch comes in micro-batches, gradients of these parameters
    add up first. What lies before the first of them keeps no activations.

    Args:
        model: owns the parameters.
        parameters: by name; others count as constants.
        objective: the loss that it asks the closure for.
        scale: factor of lr.
        weight_decay: of these parameters.
        alone: a module whose own use of its ``weight`` is trained, though others share the tensor:
            the output layer, where the embedding is tied to it.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        objective: str = "batch",
        scale: float = 1.0,
        weight_decay: float = 0.0,
        alone: nn.Module | None = None,
    ) -> None:
        self._model, self.parameters = model, dict(parameters)
        self.objective, self.scale, self.weight_decay = objective, scale, weight_decay
        self._alone = alone

    def apply(self, closure: Closure, lr: float) -> float:
        """Make the step at the present weights; return the loss.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; nothing was written.
            TypeError: the closure is of one loss, and another is needed.
            ValueError: the loss has no gradient.
        """
        if self.objective != "batch":
            if not isinstance(closure, WithObjectives):
                raise TypeError(f"the closure has no of(), which gives the loss {self.objective!r}")
            closure = closure.of(self.objective)
        parts = list(closure.parts()) if isinstance(closure, InParts) else [closure]
        with self._trained_alone() as leaves, torch.enable_grad():
            move = self._mover(lr)
            if len(parts) == 1:
                return self._in_place(parts[0], leaves, move)
            return self._added_up(parts, leaves, move)

    def _mover(self, lr: float) -> Callable[[Tensor, Tensor], None]:
        step, decay = lr * self.scale, lr * self.weight_decay

        @torch.no_grad()
        def move(weight: Tensor, gradient: Tensor) -> None:
            w = weight.float()
            weight.copy_(w - (gradient.float() * step + w * decay))

        return move

    def _in_place(
        self,
        part: Closure,
        leaves: Mapping[str, Tensor],
        move: Callable[[Tensor, Tensor], None],
    ) -> float:
        loss = self._finite(part())

        def as_soon_as_known(leaf: Tensor) -> None:
            assert leaf.grad is not None
            gradient, leaf.grad = leaf.grad, None
            move(leaf.detach(), gradient)

        hooks = [
            leaf.register_post_accumulate_grad_hook(as_soon_as_known)  # type: ignore[no-untyped-call]  # untyped in torch
            for leaf in leaves.values()
        ]
        try:
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        finally:
            for hook in hooks:
                hook.remove()
        return float(loss.detach())

    def _added_up(
        self,
        parts: list[Closure],
        leaves: Mapping[str, Tensor],
        move: Callable[[Tensor, Tensor], None],
    ) -> float:
        total = 0.0
        try:
            for part in parts:
                loss = self._finite(part())
                loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
                total += float(loss.detach())
            for leaf in leaves.values():
                if leaf.grad is not None:
                    move(leaf.detach(), leaf.grad)
        finally:
            for leaf in leaves.values():
                leaf.grad = None
        return total

    @staticmethod
    def _finite(loss: Tensor) -> Tensor:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLoss(f"loss {value} in a step by backpropagation")
        if not loss.requires_grad:
            raise ValueError("the loss has no gradient, which this method takes of some weights")
        return loss

    @contextmanager
    def _trained_alone(self) -> Iterator[dict[str, Tensor]]:
        """Let these parameters alone ask for gradients; give the tensors that stand for them."""
        mine = {id(p): name for name, p in self.parameters.items()}
        asked = [(p, p.requires_grad) for p in self._model.parameters()]
        leaves: dict[str, Tensor] = {name: p for name, p in self.parameters.items()}
        kept = None if self._alone is None else self._alone._parameters["weight"]
        try:
            for p, _ in asked:
                p.requires_grad_(id(p) in mine and p is not kept)
            if self._alone is not None and kept is not None and id(kept) in mine:
                leaf = nn.Parameter(kept.detach())  # the same weights, for this use of them
                self._alone._parameters["weight"] = leaf
                leaves[mine[id(kept)]] = leaf
            yield leaves
        finally:
            if self._alone is not None:
                self._alone._parameters["weight"] = kept
            for p, was in asked:
                p.requires_grad_(was)
