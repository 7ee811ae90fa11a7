"""Move matrices along matrices whose singular values are alike, made of a gradient's core."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.base import Update, WeightWriter


class Spectral(Update):
    """Moves a matrix by a step that is made of its core G as a whole, others by a lr of their own.

        W <- W - lr (P spectral(G) + weight_decay W), where P G is what G stands for
        w <- w - lr_1d (g + weight_decay w), where there are no factors: of one dimension

    Args:
        direction: of the method, of kind "pz".
        lr: of the method, as it begins.
        lr_1d: follows the schedule of lr.
    """

    def __init__(self, direction: Factored, lr: float, lr_1d: float) -> None:
        self.direction, self._share = direction, lr_1d / lr

    @abstractmethod
    def spectral(self, target: Target, step: int, g: Tensor, *kept: Tensor) -> Tensor:
        """Return the step of a core's gradient g (r, n); may write to it, and to the flat state."""

    def smoothed(self, step: int, g: Tensor, *kept: Tensor) -> Tensor:
        """Return what a tensor of one dimension moves against: g, if nothing is kept."""
        return g

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        shapes = {t.name: self.direction.core_shape(t) for t in weights.targets}
        step, lr_1d = weights.step, lr * self._share

        def of_matrix(target: Target) -> Callable[..., Tensor]:
            shape = shapes[target.name]
            assert shape is not None

            def change(g: Tensor, *kept: Tensor) -> Tensor:
                return self.spectral(target, step, g.view(shape), *kept).reshape(-1) * -lr

            return change

        def of_others(target: Target) -> Callable[..., Tensor]:
            return lambda g, *kept: self.smoothed(step, g, *kept) * -lr_1d

        matrices = frozenset(name for name, shape in shapes.items() if shape is not None)
        others = frozenset(shapes) - matrices
        weights.by_target(gradient.on(matrices), of_matrix, lr * weights.weight_decay)
        weights.by_target(gradient.on(others), of_others, lr_1d * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"lr_1d_over_lr": self._share}
