"""State what the loop asks of a method."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeGuard

from torch import Tensor, nn

from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.step import Closure, StepRecord


class Method(Protocol):
    """State what the loop asks of a method; see :mod:`smezo_cli.methods`."""

    takes_steps: ClassVar[bool]
    replays: ClassVar[bool]  # its steps can be made again from what is recorded of them
    compares_losses: ClassVar[bool]  # so that no gradient is needed, and any metric may be lowered
    mode: str  # "eval" (dropout off) or "train"

    @property
    def keeps_state(self) -> bool:
        """Return whether the next step depends on tensors beside the weights."""

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """Return the tensors that it may write to, by name."""

    @property
    def num_weights(self) -> int:
        """Return how many weights are in them."""

    def set_lr_factor(self, factor: float) -> None:
        """Let the next steps use ``factor`` times the lr given."""

    def step(self, closure: Closure) -> StepRecord:
        """Make one update."""

    def active_share(self) -> float:
        """Return the fraction of the weights that the present mask perturbs."""

    def self_check(self, closure: Closure) -> int:
        """Refuse what cannot work; return the number of checks made."""

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return plain numbers and tensors that the next step depends on, beside the weights."""

    def restore(self, numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`snapshot`."""


def compares_losses(method: object) -> TypeGuard[ZeroOrder]:
    """Return whether a method's steps come from losses at moved weights, without a gradient."""
    return bool(getattr(method, "compares_losses", False))


def replays(method: object) -> TypeGuard[ZeroOrder]:
    """Return whether a method's steps can be made again from what is recorded of them."""
    return bool(getattr(method, "replays", False))
