"""Define the interface that every selection implements: which coordinates a step changes."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from smezo_cli.zo.targets import Target


class Selection(Protocol):
    """Says which coordinates are perturbed and updated.

    By a threshold and a rule; or by ``Target.index``, entry by entry; and of the tensors those that
    do not rest in the present step (``Target.rests``). Both are set in :meth:`begin`.
    """

    rule: str  # a key of masks.RULES, compiled into the passes
    dense: tuple[str, ...]  # globs of tensors that are perturbed whole
    kept_bytes: int  # of the places that it names one by one; 0 of a rule

    def set_thresholds(self, targets: Sequence[Target]) -> None:
        """Set the threshold of every tensor from its present weights, and what is trained of it."""

    def begin(self, targets: Sequence[Target], step: int, seed: int) -> None:
        """Set which tensors rest in a step. May be called again, and for any step."""

    def refreshes_at(self, step: int) -> bool:
        """Return whether thresholds are refreshed before this step."""

    def stream(self, step: int) -> tuple[str | int, ...] | None:
        """Return the stream that the mask of a step is drawn from; None: it is not random."""

    def active_at(
        self, target: Target, picked: Tensor, index: Tensor, step: int, seed: int
    ) -> Tensor:
        """Return which of some entries (n,) at flat ``index`` a step perturbs: bool (n,)."""

    def identity(self) -> dict[str, Any]:
        """Return what the selection follows from, as plain JSON."""
