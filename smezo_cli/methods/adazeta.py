"""AdaZeta: zeroth-order SGD on tensor-train adapters, with more and more queries a step."""

import math
from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Epochs, Noise, Positive
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.sgd import SGD


class AdaZeta(ZeroOrder):
    """Perturb tensor-train adapters along more directions the longer the training lasts.

    arXiv 2406.18060 (EMNLP 2024). A step of epoch e = 0, 1, 2, ... probes Q directions
    z_q ~ N(0, I), each a number a weight of the cores:

        Q = min(max(int(a e^b), 1), Q_max),  b = ln(Q_E / a) / ln(E)
        projected_grad_q = [L(theta + eps z_q) - L(theta - eps z_q)] / (2 eps)
        theta <- theta - lr (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    So the count would be Q_E at epoch E, but for the limit Q_max. It keeps no state. A step takes
    2 Q forwards: 2 at first, 2 Q_max in the end. It records Q_max numbers, those beyond Q as zeros.

    What is trained are the cores of bottlenecks behind attention and feed-forward of each block,
    of rank 5 (``method.adapter.kind=tensor_train``, see
    :class:`smezo_cli.models.tensor_train.TensorTrain`); norms stay frozen. The class itself
    perturbs whatever requires gradients.

    A step knows its number alone, so the E epochs are laid evenly over ``schedule_steps`` steps:
    step t is of epoch t E // schedule_steps. A run takes its own ``steps``, so that the last epoch
    ends with it. The paper counts real epochs, which these are where E is steps * batch_size /
    task.num_train. The default of E is that number of the released script, 10,000 steps of 16 of
    1000 rows. That a run of any length grows its queries as that one does is our choice: of a run
    of two real epochs no step would have more than one. More ``steps`` are another schedule, and
    so another run, unless schedule_steps is given.

    Where it leaves the released code (yifanycc/AdaZeta):

    * Adapters stand behind attention's last layer and behind the feed-forward's, as the paper has
      them. The code puts them before gate_proj and up_proj of LLaMA and behind down_proj, so none
      is behind attention.
    * The last core of each up matrix begins as zeros, so that training begins at the model itself.
      In the code all cores are normal, and first losses are those of a changed model.
    * Vectors added by down and up are left out: on LLaMA-2-7B they are 4160 of 6360 trained numbers
      of an adapter, and no tensor-train cores. ``method.adapter.bias=true`` trains them, too.
    * The logged loss is the mean of all that were measured, not the last one at theta + eps z; and
      the weights are those before the probes, bit for bit.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: Q_max.
        query_scale: a.
        last_queries: Q_E.
        num_epochs: E, epochs of the schedule.
        schedule_steps: steps that these last.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Count = 15,
        query_scale: Positive = 0.85,
        last_queries: Count = 20,
        num_epochs: Epochs = 160,
        schedule_steps: Count = 10_000,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        self._growing = GrowingQueries(
            num_queries, query_scale, last_queries, num_epochs, schedule_steps
        )
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=self._growing,
            update=SGD(),
            **common,
        )

    def identity(self) -> dict[str, Any]:
        """Return what an update follows from; here the schedule says which scalars count."""
        return super().identity() | self._growing.identity()


class GrowingQueries:
    """Measure projected gradients along as many directions as the epoch of a step asks for.

    Args:
        num_queries: the most.
        scale: a.
        last: what a e^b is at epoch ``num_epochs``.
        num_epochs: at least 2.
        schedule_steps: steps that these last.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, num_queries: int, scale: float, last: int, num_epochs: int, schedule_steps: int
    ) -> None:
        check(num_queries >= 1, f"num_queries={num_queries}: must be at least 1")
        check(scale > 0, f"query_scale={scale}: must be above 0")
        check(last >= scale, f"last_queries={last}: must not be below query_scale={scale}")
        check(num_epochs >= 2, f"num_epochs={num_epochs}: must be at least 2")
        check(schedule_steps >= 1, f"schedule_steps={schedule_steps}: must be at least 1")
        self.num_scalars = self.num_terms = num_queries
        self._scale, self._last = scale, last
        self._num_epochs, self._schedule_steps = num_epochs, schedule_steps
        self._power = math.log(last / scale) / math.log(num_epochs)

    def num_queries(self, step: int) -> int:
        """Return how many directions a step probes."""
        epoch = step * self._num_epochs // self._schedule_steps
        try:
            grown = self._scale * float(epoch) ** self._power
        except OverflowError:
            return self.num_scalars
        return int(min(max(grown, 1.0), self.num_scalars))

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 2 * self.num_queries(step)

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        found = ask.two_sided(keys(ask.step, self.num_queries(ask.step)))
        return [*found, *[0.0] * (self.num_scalars - len(found))]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        count = self.num_queries(step)
        terms = tuple(map(Term, keys(step, count), scalars[:count]))
        return Gradient(terms, divisor=count)

    def identity(self) -> dict[str, Any]:
        """Return what says how many scalars of a step count, as plain JSON."""
        return {
            "query_scale": self._scale,
            "last_queries": self._last,
            "num_epochs": self._num_epochs,
            "schedule_steps": self._schedule_steps,
        }
