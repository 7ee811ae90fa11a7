"""MeZO-Adam: Adam on MeZO's gradient estimate (arXiv 2305.17333; Adam: arXiv 1412.6980)."""

from typing import ClassVar, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Decays, Epsilon, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.adam import Adam


class MeZOAdam(ZeroOrder):
    """Keep Adam's moments of the estimate g = 1/Q sum_q projected_grad_q z_q: 8 bytes a weight.

    The queries are one gradient; z is drawn again part by part, so that no tensor of the model's
    size is needed but the moments. These follow from the recorded projected gradients alone,
    whatever the weights are. The update is in :class:`smezo_cli.zo.updates.adam.Adam`.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        betas: decay of the moments, each in [0, 1).
        adam_eps: added to the root of the second moment; Adam's own epsilon, not the probe's.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; lr is about the largest move of a weight
            in a step, weight decay is apart from the moments, as in AdamW, and projected gradients
            are clipped before the moments.
    """

    names_itself: ClassVar = False

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: Decays = (0.9, 0.999),
        adam_eps: Epsilon = 1e-8,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=Adam(betas, adam_eps),
            **common,
        )
