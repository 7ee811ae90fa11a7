"""Let whole layers of a model rest, others in every step."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to: its name up to the first number in it.

    "" for parameters of no layer, such as embeddings and the last norm.
    """
    found = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    return "" if found is None else found.group()


def place_of(layer: str) -> tuple[str, int]:
    """Return what layers are sorted by: layer 10 comes after layer 2."""
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def layers_of(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Return the targets by layer, sorted by name; those of no layer under ""."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(layer_of(target.name), []).append(target)
    return dict(sorted(found.items()))


class SomeLayers(Everything):
    """Selects all of some layers, drawn anew in every step; tensors of no layer always.

    Args:
        resting: fraction of the layers that rest, in [0, 1): of L layers, ``round(resting * L)``,
            but never all.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, resting: float) -> None:
        super().__init__()
        check(0 <= resting < 1, f"sparsity={resting}: the fraction of layers at rest, in [0, 1)")
        self.resting = resting

    def begin(self, targets: Sequence[Target], step: int, seed: int) -> None:
        """See :class:`Selection`."""
        resting = self._at_rest(targets, step, seed)
        for target in targets:
            target.rests = layer_of(target.name) in resting

    def _at_rest(self, targets: Sequence[Target], step: int, seed: int) -> set[str]:
        layers = [layer for layer in layers_of(targets) if layer]
        # By keyed numbers of the names, so that the order of layers makes no difference.
        drawn = sorted(layers, key=lambda layer: stream_key(seed, "layers", step, layer))
        return set(drawn[: min(round(self.resting * len(drawn)), len(drawn) - 1)])

    def active_at(
        self, target: Target, picked: Tensor, index: Tensor, step: int, seed: int
    ) -> Tensor:
        """See :class:`Selection`; of the step that :meth:`begin` was told of last."""
        return torch.full_like(index, not target.rests, dtype=torch.bool)

    def identity(self) -> dict[str, Any]:
        """See :class:`Selection`."""
        return {**super().identity(), "resting_layers": self.resting}
