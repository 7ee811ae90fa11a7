"""What the steps of a method keep beside the weights: float32 tensors, as many as it has slots."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from smezo_cli.zo.targets import Target


class State:
    """The tensors that the next step depends on, by slot and by target.

    Args:
        slots: their names, such as "exp_avg"; in files a tensor is called ``TARGET/SLOT``.
        size: returns how many numbers a tensor of a target has.
    """

    def __init__(self, slots: Sequence[str], size: Callable[[Target], int]) -> None:
        self.slots, self._size = tuple(slots), size
        self._tensors: dict[str, tuple[Tensor, ...]] = {}

    def __bool__(self) -> bool:
        """Return whether anything is kept yet."""
        return bool(self._tensors)

    def of(self, target: Target) -> tuple[Tensor, ...]:
        """Return the target's tensors (flat, float32) in the order of the slots; zeros at first."""
        if target.name not in self._tensors:
            self._tensors[target.name] = tuple(
                torch.zeros(self._size(target), device=target.flat.device) for _ in self.slots
            )
        return self._tensors[target.name]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in files; not copies."""
        return {
            f"{name}/{slot}": tensor
            for i, slot in enumerate(self.slots)
            for name, tensors in self._tensors.items()
            for tensor in [tensors[i]]
        }

    def restore(self, tensors: Mapping[str, Tensor], targets: Sequence[Target]) -> None:
        """Undo :meth:`tensors`; of an empty mapping nothing is kept afterwards.

        Raises:
            LookupError, ValueError: they are not of these targets.
        """
        self._tensors.clear()
        for target in targets if tensors and self.slots else ():
            size, device = self._size(target), target.flat.device
            own = [tensors[f"{target.name}/{slot}"] for slot in self.slots]
            if any(x.shape != (size,) or x.dtype != torch.float32 for x in own):
                raise ValueError(f"{target.name} has other moments")
            self._tensors[target.name] = tuple(x.to(device, copy=True) for x in own)
