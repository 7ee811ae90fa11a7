"""LeZO: MeZO on some layers, drawn anew in every step (arXiv 2410.09823)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise, Sparsity
from smezo_cli.zo.selections.layers import SomeLayers, layers_of
from smezo_cli.zo.targets import check
from smezo_cli.zo.updates.sgd import SGD


class LeZO(ZeroOrder):
    """Run MeZO on some layers of the model, while the others rest.

    One step, for queries q = 1..Q, with m_t = 1 on the layers of step t and 0 on those at rest:

        projected_grad_q = [L(theta + eps m_t z_q) - L(theta - eps m_t z_q)] / (2 eps)
        theta <- theta - lr m_t (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    Of n layers ``round(sparsity n)`` rest, but never all. A layer is all tensors whose names begin
    with the same number, such as model.layers.3; embeddings, the last norm and the head belong to
    no layer and never rest. The seed, the step and the names say which layers rest, so a replay
    draws the same ones.

    A layer at rest is neither drawn nor copied nor written to, and its forward is not wrapped; the
    forwards themselves are as long as MeZO's. Forwards a step: 2 Q. Keeps no state. There is no
    released code to compare with.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        sparsity: fraction of the layers that rest, in [0, 1).
        num_queries: Q; the same layers rest in all of a step's queries.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.

    Raises:
        ValueError: fewer than two layers have a number in their names, so that none can rest.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: Sparsity = 0.75,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=SomeLayers(sparsity),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )
        layers = [layer for layer in layers_of(self.targets) if layer]
        known = f"only {layers[0]}" if layers else "none"
        check(
            sparsity == 0 or len(layers) > 1,
            f"sparsity={sparsity:g} lets some layers rest, which takes two trained layers with "
            f"numbers in their names, such as model.layers.3, and here is {known}: choose "
            "method=mezo",
        )
