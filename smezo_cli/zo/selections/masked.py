"""Select every coordinate, or those that a mask by magnitude or at random takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.noise import stream_key, uniform_at
from smezo_cli.zo.selections import masks
from smezo_cli.zo.targets import Target, check, one_of


class Masked:
    """Selects the coordinates of a mask (see :mod:`smezo_cli.zo.selections.masks`).

    Args:
        mask: "none", "small", "large" or "random".
        sparsity: fraction NOT perturbed, in [0, 1).
        refresh_every: refresh thresholds every so many steps; 0 keeps the first ones.
        resample: "run" or "step": when the random mask is drawn anew.
        constant_tensors: "dense" or "frozen": tensors whose magnitudes are all equal.
        dense: globs of parameter names perturbed without a mask.

    Raises:
        ValueError: an argument out of range, or one that would be ignored.
    """

    kept_bytes = 0

    def __init__(
        self,
        mask: str = "small",
        sparsity: float = 0.0,
        refresh_every: int = 0,
        resample: str = "run",
        constant_tensors: str = "dense",
        dense: Sequence[str] = (),
    ) -> None:
        check(0 <= sparsity < 1, f"sparsity={sparsity}: the fraction NOT perturbed, in [0, 1)")
        one_of("mask", mask, ("none", *masks.RULES))
        check(mask != "none" or sparsity == 0, f"sparsity={sparsity} has no effect with mask=none")
        check(refresh_every >= 0, f"mask_refresh_every={refresh_every}: 0 or more")
        one_of("mask_resample", resample, ("run", "step"))
        check(
            resample == "run" or mask == "random",
            f"mask_resample={resample} has no effect with mask={mask}",
        )
        one_of("constant_tensors", constant_tensors, ("dense", "frozen"))
        self.mask, self.sparsity, self.dense = mask, sparsity, tuple(dense)
        self.refresh_every, self.resample = refresh_every, resample
        self.constant_tensors = constant_tensors
        self.rule = "small" if mask == "none" else mask

    def set_thresholds(self, targets: Sequence[Target]) -> None:
        """See :class:`Selection`."""
        for target in targets:
            sparsity = self.sparsity if target.masked else 0.0
            target.h = masks.threshold(target.parameter, self.rule, sparsity, self.constant_tensors)

    def begin(self, targets: Sequence[Target], step: int, seed: int) -> None:
        """See :class:`Selection`: no tensor ever rests."""

    def refreshes_at(self, step: int) -> bool:
        """See :class:`Selection`."""
        return bool(self.refresh_every and step and not step % self.refresh_every)

    def stream(self, step: int) -> tuple[str | int, ...] | None:
        """See :class:`Selection`."""
        if self.rule != "random":
            return None
        return "mask", step if self.resample == "step" else 0

    def active_at(
        self, target: Target, picked: Tensor, index: Tensor, step: int, seed: int
    ) -> Tensor:
        """See :class:`Selection`."""
        value = picked.float().abs()
        if (stream := self.stream(step)) is not None:
            key = torch.tensor(stream_key(seed, *stream, target.name)).to(index.device)
            value = uniform_at(index, target.parameter.numel(), key)
        h = torch.tensor(target.h, dtype=torch.float32, device=value.device)
        return masks.RULES[self.rule](value, h)

    def identity(self) -> dict[str, Any]:
        """See :class:`Selection`."""
        return {
            "mask": self.mask,
            "sparsity": self.sparsity,
            "mask_refresh_every": self.refresh_every,
            "mask_resample": self.resample,
            "constant_tensors": self.constant_tensors,
        }


class Everything(Masked):
    """Selects every coordinate of every tensor.

    Args:
        named: what :meth:`identity` calls its mask; trajectories of MeZO say "small".
    """

    def __init__(self, named: str = "none") -> None:
        super().__init__(named)
