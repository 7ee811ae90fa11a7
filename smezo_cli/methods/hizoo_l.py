"""HiZOO-L: HiZOO with the curvature of a matrix as a product of two vectors (arXiv 2402.15173)."""

import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.base import Change
from smezo_cli.zo.directions.shaped import Shape, Shaped
from smezo_cli.zo.estimators.second_difference import PairAndCentre
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Epsilon, Fraction
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.sums import on_grid
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.base import Update, WeightWriter


def matrix_of(target: Target) -> tuple[int, int] | None:
    """Return the shape of the matrix that a tensor is; None: it keeps a number a weight."""
    shape = target.parameter.shape
    if len(shape) < 2 or not shape.numel() or target.index is not None:
        return None
    return shape[0], shape.numel() // shape[0]


@dataclass(frozen=True)
class Factors:
    """Holds the curvature of a matrix: H_ij = rows_i columns_j, ready to be read in parts.

    Attributes:
        rows: float32 (m,).
        columns: float32 (n,).
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, kept: Tensor, shape: tuple[int, int], least: float) -> "Factors":
        """Make them of what the state keeps: r - 1 and c - 1, with H_ij = r_i c_j / mean(r)."""
        rows, columns = kept[: shape[0]], kept[shape[0] :]
        mean = 1 + float(on_grid(rows).sum()) / shape[0]
        r = (rows + 1).clamp_(min=least).div_(max(mean, least))
        return cls(r, (columns + 1).clamp_(min=least))

    def at(self, part: slice | Tensor) -> Tensor:
        """Return H of a part of the flat matrix, or at flat places."""
        width = len(self.columns)
        if isinstance(part, Tensor):
            return self.rows[part // width] * self.columns[part % width]
        start, stop, _ = part.indices(len(self.rows) * width)
        first, last = start // width, -(-stop // width)
        block = torch.outer(self.rows[first:last], self.columns).view(-1)
        return block[start - first * width : stop - first * width]


@dataclass
class Sums:
    """Adds up the entries of a matrix by rows and by columns, in parts that come in any order.

    Each is rounded to a multiple of 2^-32, so that float64 holds sums of up to 2^21 exactly.
    """

    rows: Tensor
    columns: Tensor
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, part: slice, entries: Tensor) -> None:
        """Add a part of the flat matrix."""
        width = len(self.columns)
        start, stop, _ = part.indices(len(self.rows) * width)
        first, last = start // width, -(-stop // width)
        block = entries.new_zeros((last - first) * width, dtype=torch.float64)
        block[start - first * width : stop - first * width] = on_grid(entries)
        block = block.view(-1, width)
        of_rows, of_columns = block.sum(1), block.sum(0)
        with self.lock:
            self.rows[first:last] += of_rows
            self.columns += of_columns


class ByFactors(Shaped):
    """Perturb along u(key) = z / sqrt(H), with H of a matrix as a product.

    Other tensors have a number a weight.

    Args:
        least: bounds r and c, and the H of a vector, from below.
    """

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def state_size(self, target: Target) -> int:
        """See :class:`Direction`: of a matrix its sides."""
        shape = matrix_of(target)
        return target.num_trained if shape is None else sum(shape)

    def shape(self, target: Target, step: int, total: float) -> Shape:
        """See :class:`Shaped`."""
        (kept,), shape, least = self.state.read(target), matrix_of(target), self.least
        if shape is None:
            return lambda part, z: z.div_((kept[part] + 1).clamp_(min=least).sqrt_())
        factors = Factors.of(kept, shape, least)
        return lambda part, z: z.div_(factors.at(part).sqrt_())


class StepThenFactors(Update):
    """Moves along the u that was probed, and changes H only then.

    Args:
        alpha: weight of a step's curvature.
        least: bounds r and c, and the H of a vector, from below.
    """

    slots = ("excess_curvature",)

    def __init__(self, alpha: float, least: float) -> None:
        self.alpha, self.least = alpha, least

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        (term,) = gradient.terms
        size, curvature = -lr * term.coefficient, gradient.also["curvature"]
        sums: dict[str, Sums] = {}

        def of(target: Target) -> Change:
            (kept,), shape = weights.state.of(target), matrix_of(target)
            if shape is None:

                def change(part: slice, u: Tensor) -> Tensor:
                    h = (kept[part] + 1).clamp_(min=self.least)
                    self._follow(kept[part], (u * u).mul_(h).mul_(h) * curvature)
                    return u.mul_(size)

                return change
            factors = Factors.of(kept, shape, self.least)
            rows, columns = (torch.zeros(n, dtype=torch.float64, device=kept.device) for n in shape)
            added = sums[target.name] = Sums(rows, columns)

            def change_factors(part: slice, u: Tensor) -> Tensor:
                h = factors.at(part)
                added.add(part, (u * u).mul_(h).mul_(h))  # H z^2
                return u.mul_(size)

            return change_factors

        along = Gradient((term._replace(coefficient=1.0),))
        weights.by_part(along, of, decay=lr * weights.weight_decay)
        for target in weights.targets:
            if (found := sums.get(target.name)) is not None:
                (kept,) = weights.state.of(target)
                means = found.rows / len(found.columns), found.columns / len(found.rows)
                self._follow(kept, (torch.cat(means) * curvature).float())

    def _follow(self, kept: Tensor, new: Tensor) -> None:
        """Let what is kept, less 1, follow what a step says of it."""
        kept.add_((new.sub_(1).sub_(kept)).mul_(self.alpha)).clamp_(min=self.least - 1)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"alpha": self.alpha, "least": self.least}


class HiZOOL(ZeroOrder):
    """Keep HiZOO's curvature of a matrix as the means of its rows and of its columns.

    The step is that of :class:`smezo_cli.methods.hizoo.HiZOO`, with z ~ N(0, I):

        u = z / sqrt(H)
        projected_grad = [L(theta + eps u) - L(theta - eps u)] / (2 eps)
        curvature = |L(theta + eps u) + L(theta - eps u) - 2 L(theta)| / (2 eps^2)
        theta <- theta - lr (projected_grad u + weight_decay theta)

    and of a matrix (m, n), with r and c of ones at first:

        H_ij = r_i c_j / mean(r)
        r_i <- max((1 - alpha) r_i + alpha curvature mean_j(H_ij z_ij^2), least)
        c_j <- max((1 - alpha) c_j + alpha curvature mean_i(H_ij z_ij^2), least)

    Tensors of one dimension keep HiZOO's H of each weight; one of more than two dimensions is the
    matrix (shape[0], the others). Three forwards a step, and the logged loss is their mean, that at
    the weights among them. It keeps r - 1 and c - 1 in float32: 4 (m + n) bytes a matrix.

    What the paper's HiZOO-L keeps could not be read, but that its H is of low rank: this form,
    which is that of Adafactor's second moment, is our choice, and so is alpha, HiZOO's. A mean
    over a row is far less noisy than the one z^2 of a weight. Its sums are exact up to 2^21, which
    a column of 128 thousand rows reaches at H = 16; so far neither threads nor machines change
    them, and beyond they are rounded as float64 is.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        alpha: weight of a step's curvature, in [0, 1); 0 is MeZO.
        least: bounds r and c, and the H of a vector, from below.
        common: see :class:`smezo_cli.zo.parts.Common`; projected gradients are clipped in the step,
            the curvature is as it was measured.
    """

    groups_by: ClassVar = ""  # three losses are one slope and one curvature

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: Fraction = 1e-8,
        least: Epsilon = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=ByFactors(least),
            estimator=PairAndCentre(),
            update=StepThenFactors(alpha, least),
            **common,
        )
