"""Select entries one by one: a static mask that is given as places in each tensor."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check, literal, select


class Named(Everything):
    """Selects the entries at given places, the same ones at every step.

    Where a layer called NAME holds its weights as codes around those of the mask, the places of
    "NAME.weight" stand for the parameter "NAME.kept", all of whose entries are trained.

    Args:
        index: int64 (n,), sorted: flat places in each tensor, by its name; None: every entry.
    """

    def __init__(self, index: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.index = index
        self.kept_bytes = torch.int64.itemsize * sum(map(len, (index or {}).values()))

    def set_thresholds(self, targets: Sequence[Target]) -> None:
        """See :class:`Selection`.

        Raises:
            ValueError: there are no places of a tensor, or one is no place of it.
        """
        super().set_thresholds(targets)
        for target in targets if self.index is not None else ():
            assert self.index is not None
            places = self.index.get(_in_mask(target.name, self.index))
            check(places is not None, f"the mask has no entries of {target.name}")
            assert places is not None
            if target.name not in self.index:
                numel, count = target.parameter.numel(), len(places)
                check(numel == count, f"{target.name} keeps {numel} weights, the mask {count}")
                continue
            if not places.is_meta:  # of a plan they are so many, and have no values
                check_places(target.name, places, target.parameter.numel())
            target.index = places.to(target.parameter.device, torch.int64)

    def identity(self) -> dict[str, Any]:
        """See :class:`Selection`."""
        return {"mask": "none" if self.index is None else "named", "index": digest(self.index)}


def digest(index: Mapping[str, Tensor] | None) -> str | None:
    """Return the SHA-256 of the places, in whatever integers they are held; None of no mask."""
    if index is None:
        return None
    found = hashlib.sha256()
    for name in sorted(index):
        places = index[name].to("cpu", torch.int64)
        found.update(f"{name} {len(places)}\n".encode() + places.numpy().tobytes())
    return found.hexdigest()


def check_places(name: str, places: Tensor, numel: int) -> None:
    """Raise ValueError unless these are places in a tensor of so many entries, in order."""
    is_whole = places.dtype in (torch.int32, torch.int64) and places.dim() == 1 and len(places) > 0
    check(is_whole, f"the places of {name} are no list of whole numbers")
    ascend = bool((places[1:] > places[:-1]).all())
    check(ascend, f"the places of {name} are not in order, or one stands twice")
    inside = int(places[0]) >= 0 and int(places[-1]) < numel
    check(inside, f"{name} has {numel} entries, and a place is outside of it")


def _in_mask(name: str, index: Mapping[str, Tensor]) -> str:
    """Return the name by which a mask knows a parameter."""
    stem, dot, own = name.rpartition(".")
    is_kept = own == "kept" and name not in index
    return f"{stem}{dot}weight" if is_kept else name


def beside(
    model: nn.Module, index: Mapping[str, Tensor] | None, freeze: Iterable[str]
) -> list[str]:
    """Return the globs of what is frozen beside a mask: those given, and tensors without entries.

    Raises:
        ValueError: the mask has entries of a tensor that is not trained.
    """
    globs = list(freeze)
    if index is None:
        return globs
    trained = [target.name for target in select(dynamo.original(model), globs, [])]
    if unknown := sorted(index.keys() - {_in_mask(name, index) for name in trained}):
        raise ValueError(f"the mask has entries of {unknown[0]}, which is not trained")
    return [*globs, *(literal(name) for name in trained if _in_mask(name, index) not in index)]
