"""Addax: zeroth-order steps on long rows, backpropagation in place on short ones (2410.06441)."""

from collections.abc import Sequence
from typing import ClassVar, Unpack

from torch import nn

from smezo_cli.errors import UserError
from smezo_cli.zo import dynamo
from smezo_cli.zo.backprop import Backprop
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, keys
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Fraction, Noise, Rows
from smezo_cli.zo.selections.layers import frozen
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import select
from smezo_cli.zo.updates.base import Update, WeightWriter


class OnLongRows(TwoSided):
    """Make MeZO's estimate, of the loss over long rows."""

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        return ask.two_sided(keys(ask.step, self.num_scalars), objective="long")


class Scaled(Update):
    """Move as theta <- theta - lr alpha g: the decay is that of the other half of the step.

    Args:
        alpha: share of the zeroth-order gradient.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        weights.move(gradient, -lr * self.alpha)


class Addax(ZeroOrder):
    """Mix MeZO's estimate on long rows with the gradient on short ones, in little memory.

    One step with a batch of long rows and one of short rows (Algorithm 1 of the paper):

        g0 = 1/Q sum_q [L_long(theta + eps z_q) - L_long(theta - eps z_q)] / (2 eps) z_q
        g1 = grad L_short(theta)
        theta <- theta - lr (alpha g0 + (1 - alpha) g1 + weight_decay theta)

    Both are taken at theta. The gradient is never whole in memory: a tensor moves as soon as
    backpropagation has come to it (unless the short rows come in micro-batches, whose gradients add
    up first), and short rows keep few activations. ``long_above=0`` is the
    paper's Addax without the split: both batches come from all rows. Batches of each kind go
    through their rows epoch by epoch, in an order that the seed and the epoch give; the run's own
    batch is not read. It keeps no state. Forwards a step: 2 a query over the long rows, and a
    forward and backward over the short ones. The logged loss is that of the long rows at the
    probes. Its steps cannot be made again from scalars. The
    released code is behind an anonymous link and was not read.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        alpha: share of the zeroth-order gradient, in [0, 1).
        long_above: rows of more tokens are long; 0: no split.
        long_rows: rows of a zeroth-order batch.
        short_rows: rows of a batch for backpropagation.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    replays: ClassVar = False
    needs_gradient: ClassVar = True
    objectives: ClassVar = ("long", "short")

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: Fraction = 1e-3,
        long_above: Rows = 0,
        long_rows: Count = 6,
        short_rows: Count = 4,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        self.long_above = long_above
        self._sizes = {"long": long_rows, "short": short_rows}
        self._orders: dict[tuple[str, int], list[int]] = {}
        plain = dynamo.original(model)
        trained = select(plain, frozen(model, common), [])
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=OnLongRows(num_queries),
            update=Scaled(alpha),
            tail=Backprop(
                plain,
                {target.name: target.parameter for target in trained},
                objective="short",
                scale=1 - alpha,
                seed=common.get("seed", 0),
                rounding=common.get("rounding", "nearest"),
                weight_decay=common.get("weight_decay", 0.0),
            ),
            **common,
        )

    def rows_of(
        self, objective: str, step: int, batch: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[int]:
        """Return the rows of a step's batch of one kind.

        Raises:
            UserError: no row is of this kind.
        """
        rows = [
            i
            for i, length in enumerate(lengths)
            if not self.long_above or (length > self.long_above) == (objective == "long")
        ]
        if not rows:
            bounds = f"{min(lengths)} to {max(lengths)}"
            raise UserError(
                f"method.long_above={self.long_above}: no train row is {objective}; they have "
                f"{bounds} tokens: choose a number between, or 0 for batches of all rows."
            )
        size = self._sizes[objective]
        places = range(step * size, (step + 1) * size)
        return [self._order(objective, rows, i // len(rows))[i % len(rows)] for i in places]

    def _order(self, objective: str, rows: Sequence[int], epoch: int) -> list[int]:
        key = (objective, epoch)
        if key not in self._orders:
            kept = {k: v for k, v in self._orders.items() if k[0] != objective or k[1] >= epoch - 1}
            self._orders = kept
            self._orders[key] = sorted(
                rows, key=lambda i: stream_key(self.seed, objective, epoch, i)
            )
        return self._orders[key]
