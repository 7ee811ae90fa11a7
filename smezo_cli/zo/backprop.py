"""Train some tensors by backpropagation, each updated as soon as its gradient is there."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from smezo_cli.zo.noise import rounding_at, stream_key
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.step import Closure, InParts, NonFiniteLoss, Shared, WithObjectives
from smezo_cli.zo.targets import check

#: Moves the weights of a name against their gradient.
Move = Callable[[str, Tensor, Tensor], None]


class BackwardOutOfMemory(MemoryError):
    """Say that memory was too small for a backward pass; some weights may have moved already."""


class Backprop:
    """Take an SGD step on some parameters by backpropagation, beside a zeroth-order step.

    No gradient of the model's size is kept: a parameter moves when backpropagation has come to it,
    and its gradient is dropped. Where a batch comes in micro-batches, or several processes share
    it, gradients of these parameters add up first. What lies before the first of them keeps no
    activations.

    Args:
        model: owns the parameters.
        parameters: by name; others count as constants.
        objective: the loss that it asks the closure for.
        scale: factor of lr.
        weight_decay: of these parameters.
        seed: names the random bits of stochastic rounding.
        rounding: "nearest" or "stochastic", of weights narrower than float32.
        alone: a module whose own use of its ``weight`` is trained, though others share the tensor:
            the output layer, where the embedding is tied to it.

    Raises:
        ValueError: a parameter is float16, whose range gradients leave without loss scaling.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        objective: str = "batch",
        scale: float = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
        rounding: str = "nearest",
        alone: nn.Module | None = None,
    ) -> None:
        half = [name for name, p in parameters.items() if p.dtype == torch.float16]
        check(
            not half,
            f"{''.join(half[:1])} is float16, which has no room for gradients without loss "
            "scaling: take dtype=bfloat16 or float32",
        )
        self._seed, self._is_stochastic = seed, rounding == "stochastic"
        self._model, self.parameters = model, dict(parameters)
        self.objective, self.scale, self.weight_decay = objective, scale, weight_decay
        self._alone = alone

    def apply(
        self,
        closure: Closure,
        lr: float,
        step: int,
        measured: Callable[[], None] = lambda: None,
    ) -> float:
        """Make the step at the present weights; return the loss.

        Args:
            closure: computes the loss. Of processes that share it those that measure the first
                query compute the gradient, each of its rows; all move by the sum.
            lr: learning rate of the step.
            step: its number; names the bits of stochastic rounding.
            measured: called once the loss is known, before anything is written.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite, and nothing was written; or a gradient is,
                and some weights have moved, unless processes share the step: all of them raise it.
            BackwardOutOfMemory: likewise.
            TypeError: the closure is of one loss, and another is needed.
            ValueError: the loss has no gradient.
        """
        if self.objective != "batch":
            if not isinstance(closure, WithObjectives):
                raise TypeError(f"the closure has no of(), which gives the loss {self.objective!r}")
            closure = closure.of(self.objective)
        parts = list(closure.parts()) if isinstance(closure, InParts) else [closure]
        with self._trained_alone() as leaves, torch.enable_grad():
            move = self._mover(lr, step)
            try:
                if isinstance(closure, Shared):
                    return self._shared(closure, parts, leaves, move, measured)
                if len(parts) == 1:
                    return self._in_place(parts[0], leaves, move, measured)
                return self._added_up(parts, leaves, move, measured)
            finally:
                for leaf in leaves.values():
                    leaf.grad = None

    def _mover(self, lr: float, step: int) -> Move:
        size, decay = lr * self.scale, lr * self.weight_decay

        @torch.no_grad()
        def move(name: str, weight: Tensor, gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                raise NonFiniteLoss(f"the gradient of {name} at step {step} is not finite")
            w = weight.float()
            value = w - (gradient.float() * size + w * decay)
            if self._is_stochastic and weight.dtype in ROUNDINGS:
                key = torch.tensor(stream_key(self._seed, "round tail", step, name))
                index = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
                bits = rounding_at(index, weight.numel(), key.to(weight.device))
                value = ROUNDINGS[weight.dtype](value, bits)
            weight.copy_(value)

        return move

    def _in_place(
        self,
        part: Closure,
        leaves: Mapping[str, Tensor],
        move: Move,
        measured: Callable[[], None],
    ) -> float:
        loss = self._finite(part())
        measured()

        def as_soon_as_known(name: str, leaf: Tensor) -> None:
            assert leaf.grad is not None
            gradient, leaf.grad = leaf.grad, None
            move(name, leaf.detach(), gradient)

        hooks = [
            leaf.register_post_accumulate_grad_hook(partial(as_soon_as_known, name))  # type: ignore[no-untyped-call]  # untyped in torch
            for name, leaf in leaves.items()
        ]
        try:
            self._backward(loss)
        finally:
            for hook in hooks:
                hook.remove()
        return float(loss.detach())

    def _added_up(
        self,
        parts: list[Closure],
        leaves: Mapping[str, Tensor],
        move: Move,
        measured: Callable[[], None],
    ) -> float:
        total = 0.0
        for part in parts:
            loss = self._finite(part())
            self._backward(loss)
            total += float(loss.detach())
        measured()
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                move(name, leaf.detach(), leaf.grad)
        return total

    def _shared(
        self,
        closure: Shared,
        parts: list[Closure],
        leaves: Mapping[str, Tensor],
        move: Move,
        measured: Callable[[], None],
    ) -> float:
        own = 0.0
        is_mine = bool(closure.queries(1))
        for part in parts if is_mine else ():
            loss = part()
            own += float(loss.detach())
            if not math.isfinite(own):
                break  # all processes will know it
            self._backward(self._finite(loss))
        ((total,),) = closure.join_parts({0: [own]} if is_mine else {}, [1])
        self._check_finite(total)
        gradients = self._gradients(closure, leaves)
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                closure.join_parts({0: [math.nan]} if is_mine else {}, [1])  # so the step ends here
                raise NonFiniteLoss(f"the gradient of {name} is not finite")
        measured()
        for name, gradient in gradients.items():
            move(name, leaves[name].detach(), gradient.to(leaves[name].device))
        return total

    @staticmethod
    def _gradients(closure: Shared, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over the processes, of what has a gradient in one of them; drop theirs.

        All processes ask for the same tensors in the same order.
        """
        has = torch.tensor([float(leaf.grad is not None) for leaf in leaves.values()])
        found = {}
        for (name, leaf), count in zip(
            leaves.items(), closure.join_tensor(has).tolist(), strict=True
        ):
            if count:
                own = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                leaf.grad = None
                found[name] = closure.join_tensor(own.detach().float().contiguous())
        return found

    @staticmethod
    def _backward(loss: Tensor) -> None:
        try:
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        except (RuntimeError, MemoryError) as error:
            is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not is_memory and "memory" not in str(error):
                raise
            said = str(error).partition("\n")[0]
            raise BackwardOutOfMemory(
                f"the memory is too small for backpropagation ({said})"
            ) from error

    @staticmethod
    def _check_finite(loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"loss {loss} in a step by backpropagation")

    @classmethod
    def _finite(cls, loss: Tensor) -> Tensor:
        cls._check_finite(float(loss.detach()))
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
