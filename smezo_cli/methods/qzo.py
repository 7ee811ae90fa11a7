"""QZO: zeroth-order steps on the scales of weights that are integers (arXiv 2505.13430)."""

from collections.abc import Collection
from typing import Any, ClassVar, Unpack

from torch import nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.quantised import SMALLEST, quantise, quantised_layers
from smezo_cli.zo.ranges import Count, Noise, Others, WeightBits
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import check, one_of
from smezo_cli.zo.updates.base import WeightWriter
from smezo_cli.zo.updates.sgd import SGD


class CutAtZero(SGD):
    """SGD; afterwards some tensors have no entry below 0.

    Args:
        names: of these tensors.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        super().apply(weights, gradient, lr)
        for target in weights.targets:
            if target.name in self.names:
                target.flat.clamp_(min=0.0)


class QZO(ZeroOrder):
    """Hold linear layers as integers that stay as they are, and train the scales of their groups.

    A weight is code x scale, with one scale Delta for ``group_size`` columns of a row. One step,
    for queries q = 1..Q with z_q ~ N(0, I) as large as the scales:

        projected_grad_q = [L(codes (Delta + eps z_q)) - L(codes (Delta - eps z_q))] / (2 eps)
        projected_grad_q <- min(max(projected_grad_q, -C), C),  C = clip_projected_grad
        Delta <- max(Delta - lr (1/Q sum_q projected_grad_q z_q + weight_decay Delta), 0)

    A probe may go below 0, the scales themselves never do. No float copy of the weights is kept:
    of 4 bits in groups of 128 a weight of these layers takes 0.53 bytes, its scale (float32)
    counted, and one layer at a time is written out for its forward. No state; 2 Q forwards a step.
    A run saves the scales alone: 4 bytes for a group.

    The paper was read at second hand: integer codes that stay, group scales that are probed and
    trained, a clipped projected gradient and scales from 0 up are its rule. Our choice: codes are
    rounded to nearest, symmetric, and of the layers that
    :func:`smezo_cli.zo.quantised.linear_layers` names; all other tensors (embeddings, norms,
    biases, the output layer) stay as they are, unless ``others`` says that they are trained by the
    same steps; C, eps and lr. The first commit of the released code, which holds none, was read;
    later code was not read.

    Args:
        model: any module; its linear layers are changed in place, see
            :func:`smezo_cli.zo.quantised.quantise`, and what is not trained requires no gradient
            afterwards. Scales of layers whose weights require one are trained.
        weight_bits: 8 or 4, of a code.
        group_size: columns that share a scale.
        others: "frozen", or "trained": tensors that hold no codes, as MeZO trains them.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.

    Raises:
        ValueError: no layer is held as codes, and nothing else is trained.
    """

    holds_codes: ClassVar = True

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_bits: WeightBits = 4,
        group_size: Count = 128,
        others: Others = "frozen",
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        one_of("others", others, ("frozen", "trained"))
        model = dynamo.original(model)
        quantise(model, weight_bits, group_size)
        layers = {n: layer for n, layer in quantised_layers(model).items() if layer.is_trained}
        check(
            bool(layers) or others == "trained",
            f"no linear layer of the model has {SMALLEST} weights or more and is trained, so there "
            "are no scales; use method=mezo, or others=trained",
        )
        if others == "frozen":
            model.requires_grad_(False)
        for layer in layers.values():
            layer.scales.requires_grad_(True)
        self._form = {"weight_bits": weight_bits, "group_size": group_size}
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=CutAtZero([dynamo.plain_name(f"{name}.scales") for name in layers]),
            **common,
        )

    def identity(self) -> dict[str, Any]:
        """See :meth:`Parts.identity`."""
        return {**super().identity(), **self._form}
