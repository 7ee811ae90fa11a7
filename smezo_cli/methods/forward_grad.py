"""Forward gradients: the exact derivative along one random direction (arXiv 2402.11592)."""

from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch
from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.step import Closure
from smezo_cli.zo.tangent import NoTangent
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.sgd import SGD


class Derivatives:
    """Estimate 1/Q sum_q (grad L . z_q) z_q, each derivative exact.

    Args:
        num_queries: Q.

    Raises:
        ValueError: there is no query.
    """

    def __init__(self, num_queries: int = 1) -> None:
        check(num_queries >= 1, f"num_queries={num_queries}: must be at least 1")
        self.num_scalars = self.num_terms = num_queries

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return self.num_scalars

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        return ask.derivatives(keys(ask.step, self.num_scalars))

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        terms = tuple(map(Term, keys(step, self.num_scalars), scalars))
        return Gradient(terms, divisor=self.num_scalars)


class ForwardGrad(ZeroOrder):
    """Take the derivative of the loss along a random direction exactly, without backpropagation.

    One step, for queries q = 1..Q with directions z_q ~ N(0, I):

        d_q = (grad L(theta)) . z_q            (forward-mode differentiation, one forward)
        theta <- theta - lr (1/Q sum_q d_q z_q + weight_decay theta)

    It keeps no state. One forward a query, which carries tangents: it costs some three to four
    plain ones, and activations take twice the memory. ``eps`` is that of the self-check alone:
    nothing is probed at a distance. The released code draws tangents of all weights at once; here
    they are drawn module by module. Layers without a forward-mode derivative are refused, and so
    are objectives that are no function of the weights with derivatives.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    measures_pairs: ClassVar = False
    needs_gradient: ClassVar = True

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        executor, keeps = common.get("executor", "auto"), common.get("keep_noise", "auto")
        check(
            executor in ("auto", "sequential"),
            f"executor={executor}: a derivative is taken in one forward, not in two: leave it out",
        )
        check(keeps is not True, "keep_noise=true: directions are drawn anew here: leave it out")
        common["keep_noise"] = False
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=Derivatives(num_queries),
            update=SGD(),
            **common,
        )
        check(
            all(target.parameter.dtype != torch.float16 for target in self.targets),
            "float16 has no room for derivatives along directions as long as all weights: take "
            "dtype=bfloat16 or float32",
        )

    def exchanged(self, step: int) -> int:
        """See :meth:`ZeroOrder.exchanged`: a loss and its derivative a query."""
        return 2 * self.forwards(step)

    @torch.inference_mode(False)
    @torch.no_grad()
    def self_check(self, closure: Closure) -> int:
        """See :meth:`ZeroOrder.self_check`; and compare a derivative with differences of losses.

        Two of them, at eps and at half of it, tell how much a difference is worth here: the
        derivative may be as far from the second as four times their distance, 5%, and what a
        rounding of the loss by 1e-6 of it makes.

        Raises:
            NoTangent: a layer, or the loss, has none, or drops it without a word.
        """
        checked = super().self_check(closure)
        key = Key(self.num_steps)
        meter, eps = self.meter(closure), self.param_groups[0]["eps"]
        (found,) = meter.derivatives([key])
        (wide,) = meter.two_sided([key])
        (near,) = self.meter(closure, eps=eps / 2).two_sided([key])
        rounding = 1e-6 * abs(meter.all_losses[0]) / eps
        if abs(found - near) > 4 * abs(wide - near) + 0.05 * abs(near) + rounding:
            raise NoTangent(
                "a layer drops its forward-mode derivative without a word (the derivative is "
                f"{found:.4g}, a difference of losses gives {near:.4g})"
            )
        self.direction.end()
        return checked
