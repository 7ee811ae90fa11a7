"""Train some layers of a model alone, or let others rest in every step."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.ranges import BlockNumbers
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check, literal, trainable


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


def frozen(model: nn.Module, arguments: Mapping[str, Any], *, codes: bool = False) -> list[str]:
    """Return the globs of what ``freeze`` and ``layers`` of a method leave as it is.

    Args:
        model: whose tensors may be trained.
        arguments: of the method, see :class:`smezo_cli.zo.parts.Common`.
        codes: codes of layers may be trained, too.

    Raises:
        ValueError: ``layers`` names a block that is not there.
    """
    globs = list(arguments.get("freeze", ()))
    if (layers := arguments.get("layers")) is None:
        return globs
    try:
        chosen = BlockNumbers()(layers)
    except ValueError:
        raise ValueError(f"layers={layers}: must be {BlockNumbers.words}") from None
    if isinstance(chosen, str):
        raise ValueError(
            f"layers={chosen}: zo/outliers.py finds which one that is: give its number"
        )
    there = {name: layer_of(name) for name, *_ in trainable(dynamo.original(model), codes=codes)}
    numbers = {name: place_of(layer)[1] for name, layer in there.items() if layer}
    check(bool(numbers), f"layers={layers}: no tensor that may be trained is of a numbered block")
    missing = sorted(set(chosen) - set(numbers.values()))
    first, last = min(numbers.values()), max(numbers.values())
    check(
        not missing,
        f"layers has block {missing[0] if missing else ''}, and tensors that may be trained are of "
        f"blocks {first} to {last}: name some of these",
    )
    outside = [literal(name) for name in there if numbers.get(name) not in chosen]
    return list(dict.fromkeys([*globs, *outside]))


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
