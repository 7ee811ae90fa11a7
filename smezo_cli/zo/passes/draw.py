"""Hold the numbers of a pass: its keys, coefficients and mask, ready for a kernel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Says what is fixed for a whole run (and compiled in)."""

    mask: str = "small"  # a key of masks.RULES
    noise: str = "gaussian"  # one of noise.KINDS
    stochastic: bool = False  # stochastic rounding to the output's dtype


class Draw(NamedTuple):
    """Holds what one pass over one tensor needs.

    Attributes:
        keys: int64 (q, 2), one stream a query.
        mask_key: int64 (2,), read by the random mask only.
        round_key: int64 (2,), read by stochastic rounding only.
        h: float32 (), the mask's threshold.
        coefficients: float32 (q,), a_q.
        decay: float32 (), d; None leaves the term out.
    """

    keys: Tensor
    mask_key: Tensor
    round_key: Tensor
    h: Tensor
    coefficients: Tensor
    decay: Tensor | None = None


class Numbers(NamedTuple):
    """Hold a :class:`Draw` as plain numbers, which cost less where no device gets them."""

    keys: tuple[tuple[int, int], ...]
    mask_key: tuple[int, int]
    round_key: tuple[int, int]
    h: float
    coefficients: tuple[float, ...]
    decay: float | None = None

    @classmethod
    def of(cls, draw: "Draw | Numbers") -> "Numbers":
        """Return the same draw."""
        if isinstance(draw, Numbers):
            return draw
        return cls(
            tuple((a, b) for a, b in draw.keys.tolist()),
            tuple(draw.mask_key.tolist()),
            tuple(draw.round_key.tolist()),
            draw.h.item(),
            tuple(draw.coefficients.tolist()),
            None if draw.decay is None else draw.decay.item(),
        )


class Reader(Protocol):
    """Name passes, and the form in which they read their numbers."""

    reads_numbers: bool  # plain ones; False: tensors on the device


def as_draws(
    numbers: Mapping[int, Numbers], devices: Mapping[int, torch.device]
) -> dict[int, Draw]:
    """Return draws on their devices, by the positions of their tensors.

    Those that share coefficients and decay are parts of a few tensors that are sent.
    """
    alike: dict[tuple[tuple[float, ...], float | None], list[int]] = {}
    for i, n in numbers.items():
        alike.setdefault((n.coefficients, n.decay), []).append(i)
    draws: dict[int, Draw] = {}
    for group in alike.values():
        found = _alike([numbers[i] for i in group], [devices[i] for i in group])
        draws.update(zip(group, found, strict=True))
    return draws


def _alike(numbers: Sequence[Numbers], devices: Sequence[torch.device]) -> list[Draw]:
    keys = torch.tensor([[*n.keys, n.mask_key, n.round_key] for n in numbers])  # (n, q + 2, 2)
    h = torch.tensor([n.h for n in numbers], dtype=torch.float32)
    a = torch.tensor(numbers[0].coefficients, dtype=torch.float64).to(torch.float32)
    decay = numbers[0].decay
    d = None if decay is None else torch.tensor(decay, dtype=torch.float64).to(torch.float32)
    sent = {
        device: (keys.to(device), h.to(device), a.to(device), None if d is None else d.to(device))
        for device in set(devices)
    }
    draws = []
    for i, device in enumerate(devices):
        k, hs, coefficients, decays = sent[device]
        draws.append(Draw(k[i, :-2], k[i, -2], k[i, -1], hs[i], coefficients, decays))
    return draws
