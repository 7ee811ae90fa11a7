"""Measure the derivative of a loss along a direction exactly, by forward-mode differentiation."""

import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from smezo_cli.zo.probe import FunctionalProbe, Mover
from smezo_cli.zo.step import Closure, InParts
from smezo_cli.zo.sums import on_grid


class NoTangent(ValueError):
    """Say that a loss, or an operation of the model, has no derivative along a direction."""


class Alone(Mover, Protocol):
    """Writes directions, and says which parameters have one: by their ids; None: all."""

    only: frozenset[int] | None


class TangentMover:
    """Gives each parameter together with its direction, in the place of a moved copy.

    Args:
        alone: writes the direction of a parameter where others write moved weights.
    """

    def __init__(self, alone: Alone) -> None:
        self._alone, self.only = alone, alone.only

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`: writes the direction alone."""
        self._alone.whole(parameter, out)

    def placed(self, parameter: Tensor, written: Tensor) -> Tensor:
        """Return the parameter with the direction as its tangent, to compute with."""
        return _dual(parameter.detach(), written.detach())

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        tangent = self._alone.rows(parameter, rows)
        return _dual(parameter.detach().index_select(0, rows), tangent)


def derivative(
    closure: Closure, mover: TangentMover, probe: FunctionalProbe
) -> tuple[Tensor, Tensor]:
    """Return the loss () at the weights and its derivative () along a direction.

    One forward that carries tangents beside the values: activations take twice the memory, and of
    the direction one module's tensors are held at a time. Attention is computed by its formula,
    since fused kernels have no tangents. Of several parts both are rounded to multiples of 2^-32,
    so that their sums are exact, whoever adds them.

    Raises:
        NoTangent: an operation or the loss has none.
    """
    parts = list(closure.parts()) if isinstance(closure, InParts) else [closure]
    found = []
    with warnings.catch_warnings():
        # torch compiles its own formulas for tangents in a way that it calls deprecated.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        for part in parts:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), probe.at(mover):
                try:
                    loss, tangent = forward_ad.unpack_dual(part())  # type: ignore[no-untyped-call]  # untyped in torch
                except (NotImplementedError, RuntimeError) as error:
                    if "forward AD" not in str(error) and "forward mode" not in str(error):
                        raise
                    said = str(error).strip().splitlines()[0]
                    raise NoTangent(f"a layer has no forward-mode derivative ({said})") from error
                if tangent is None:
                    raise NoTangent("the loss does not depend on the weights by way of derivatives")
                found.append((loss.detach().double(), tangent.detach().double()))
    if not found:  # fewer rows than processes that share them
        nothing = torch.zeros((), dtype=torch.float64)
        return nothing, nothing
    losses, tangents = (torch.stack(of) for of in zip(*found, strict=True))
    if len(found) == 1:
        return losses[0], tangents[0]
    return on_grid(losses).sum(), on_grid(tangents).sum()


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    made: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]  # untyped in torch
    return made
