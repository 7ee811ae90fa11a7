"""Keep what the steps of a method need beside the weights: tensors, and plain numbers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.targets import Target

#: Numbers that a tensor of the state has of a target.
Size = Callable[[Target], int]


class State:
    """Holds what the next step depends on beside the weights: slots, copies of them, numbers.

    Args:
        slots: names of float32 tensors, such as "exp_avg"; in files a tensor is called
            ``TARGET/SLOT``.
        size: entries of a slot's tensor of a target.
        copies: names of copies of the weights, in their dtype; in files ``TARGET/COPY``.
        copied: names of the targets that are copied; None: all.
        own_sizes: by name, the entries of slots that have a size of their own. They are in no
            subspace, so new factors leave them as they are.
    """

    def __init__(
        self,
        slots: Sequence[str],
        size: Size,
        copies: Sequence[str] = (),
        copied: Collection[str] | None = None,
        own_sizes: Mapping[str, Size] = MappingProxyType({}),
    ) -> None:
        self.slots, self.copies, self._own_sizes = tuple(slots), tuple(copies), own_sizes
        self._sizes = [own_sizes.get(slot, size) for slot in self.slots]
        self._names = copied
        #: plain JSON that the next step depends on
        self.numbers: dict[str, Any] = {}
        self._tensors: dict[str, tuple[Tensor, ...]] = {}
        self._copied: dict[tuple[str, str], Tensor] = {}

    def __bool__(self) -> bool:
        """Return whether anything is kept yet."""
        return bool(self._tensors or self._copied)

    def of(self, target: Target) -> tuple[Tensor, ...]:
        """Return the target's tensors (flat, float32) in the order of the slots; zeros at first."""
        if target.name not in self._tensors:
            device = target.parameter.device
            self._tensors[target.name] = tuple(
                torch.zeros(size(target), device=device) for size in self._sizes
            )
        return self._tensors[target.name]

    def read(self, target: Target) -> tuple[Tensor, ...]:
        """Do as :meth:`of`, for reading alone: where nothing is kept yet, nothing is made.

        The zeros are then one number, seen as so many.
        """
        if target.name in self._tensors:
            return self._tensors[target.name]
        zero = torch.zeros(1, device=target.parameter.device)
        return tuple(zero.expand(size(target)) for size in self._sizes)

    def carry(self, targets: Sequence[Target], change: Callable[[Target, Tensor], Tensor]) -> None:
        """Replace a slot's tensors by ``change(target, tensor)``, but where it has its own size."""
        for target in targets:
            if target.name in self._tensors:
                kept = zip(self.slots, self._tensors[target.name], strict=True)
                self._tensors[target.name] = tuple(
                    tensor if slot in self._own_sizes else change(target, tensor)
                    for slot, tensor in kept
                )

    def copy_weights(self, name: str, targets: Sequence[Target]) -> None:
        """Keep the present weights under a name of ``copies``, in place of those kept before."""
        assert name in self.copies
        for target in self._copied_of(targets):
            kept = self._copied.get((target.name, name))
            if kept is None:
                self._copied[target.name, name] = target.flat.clone()
            else:
                kept.copy_(target.flat)

    def weights(self, name: str, target: Target) -> Tensor:
        """Return the kept weights of a target, flat."""
        return self._copied[target.name, name]

    def bytes_of(self, targets: Sequence[Target]) -> int:
        """Return the bytes that the tensors take once all are there."""
        slots = 4 * sum(size(target) for size in self._sizes for target in targets)
        copied = [target.parameter for target in self._copied_of(targets)]
        weights = sum(p.numel() * p.element_size() for p in copied)
        return slots + len(self.copies) * weights

    def _copied_of(self, targets: Sequence[Target]) -> list[Target]:
        names = self._names
        return [target for target in targets if names is None or target.name in names]

    def tensors(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return all tensors by their names in files; not copies.

        Where anything is kept, so are the slots of targets that no step has moved yet: zeros.
        """
        for target in targets if self and self.slots else ():
            self.of(target)
        slots = {
            f"{name}/{slot}": tensor
            for i, slot in enumerate(self.slots)
            for name, tensors in self._tensors.items()
            for tensor in [tensors[i]]
        }
        return slots | {f"{name}/{copy}": tensor for (name, copy), tensor in self._copied.items()}

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        targets: Sequence[Target],
        numbers: Mapping[str, Any] | None = None,
    ) -> None:
        """Undo :meth:`tensors`; of an empty mapping nothing is kept afterwards.

        Raises:
            LookupError, ValueError: they are not of these targets.
        """
        self._tensors.clear()
        self._copied.clear()
        self.numbers = dict(numbers or {})
        for target in targets if tensors else ():
            device = target.parameter.device
            own = [tensors[f"{target.name}/{slot}"] for slot in self.slots]
            sizes = [(size(target),) for size in self._sizes]
            if [tuple(x.shape) for x in own] != sizes or any(x.dtype != torch.float32 for x in own):
                raise ValueError(f"{target.name} has other moments")
            if self.slots:
                self._tensors[target.name] = tuple(x.to(device, copy=True) for x in own)
        for target in self._copied_of(targets) if tensors else ():
            device = target.parameter.device
            for name in self.copies:
                kept, flat = tensors[f"{target.name}/{name}"], target.flat
                if kept.shape != flat.shape or kept.dtype != flat.dtype:
                    raise ValueError(f"{target.name} has another {name}")
                self._copied[target.name, name] = kept.to(device, copy=True)
