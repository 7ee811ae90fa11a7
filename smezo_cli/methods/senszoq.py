"""SensZOQ: zeroth-order steps on the few most sensitive weights (arXiv 2406.02913)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.quantised import quantised_layers
from smezo_cli.zo.ranges import Count, Noise, Place, Scope, Sparsity, WeightBits
from smezo_cli.zo.saliency import gradients, largest
from smezo_cli.zo.selections.layers import frozen
from smezo_cli.zo.selections.named import Named, beside
from smezo_cli.zo.step import Closure
from smezo_cli.zo.targets import select
from smezo_cli.zo.updates.sgd import SGD


class SensZOQ(ZeroOrder):
    """Run MeZO on a static mask m of the weights with the largest squared gradients.

    The mask is made once, before the first step, by backpropagation of n sequences alone:

        m = 1 where mean_j [grad l_j(theta)]^2 is among its largest (1 - sparsity) share, else 0

    A step, for queries q = 1..Q, is then

        projected_grad_q = [L(theta + eps m z_q) - L(theta - eps m z_q)] / (2 eps)
        theta <- theta - lr m (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    Each l_j is the loss of one sequence: squares of gradients of single tokens, or of a batch, are
    other masks. Kept: the places of the mask, 8 bytes for each weight in it, and nothing else; a
    tensor without such weights is frozen. Forwards a step: 2 a query. While the mask is made the
    squares take 4 bytes a weight, and a backpropagation its activations.

    The paper takes the gradients from generic text (C4) and holds the other weights in 4 bits
    (SqueezeLLM); a run takes rows of its own training split, under the first prompt of the task,
    and leaves the other weights in the dtype of the model unless ``frozen_bits`` is given, whose
    codes are whole numbers times a scale for 64 columns of a row. A mask belongs to a model, and
    serves any task (``mask_from``).

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        index: the mask: flat places (int64, sorted) by the name of the tensor, such as
            :meth:`choose` returns; None: every weight, which is MeZO.
        sparsity: fraction NOT perturbed, of all weights or of each tensor; for :meth:`choose`.
        scope: "global" or "tensor"; likewise.
        mask_rows: training rows that the run takes gradients of, of each part of a mixture.
        mask_from: folder of a run, or file, whose mask the run takes instead of its own.
        frozen_bits: 8 or 4: the run holds linear layers as codes around the entries of the mask
            (:func:`smezo_cli.models.quantised.freeze_as_codes`); None: in the model's own dtype.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    needs_mask: ClassVar = True
    score_bytes: ClassVar = 4

    def __init__(
        self,
        model: nn.Module,
        *,
        index: Mapping[str, Tensor] | None = None,
        sparsity: Sparsity = 0.999,
        scope: Scope = "global",
        mask_rows: Count = 32,
        mask_from: Place | None = None,
        frozen_bits: WeightBits | None = None,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        self._form = {} if frozen_bits is None else {"frozen_bits": frozen_bits}
        self._chosen_among = _weights_of(model, frozen(model, common))
        common["freeze"] = beside(model, index, frozen(model, common))
        super().__init__(
            model,
            selection=Named(index),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )

    @property
    def num_weights(self) -> int:
        """Return how many weights the mask was chosen among: of layers of codes all."""
        return self._chosen_among

    def identity(self) -> dict[str, Any]:
        """See :class:`ZeroOrder`; with the form of the weights beside the mask."""
        return super().identity() | self._form

    @staticmethod
    def choose(
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        losses: Mapping[str, Sequence[Closure]],
        settings: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return the mask of a model at its present weights.

        Args:
            model: owns the parameters.
            parameters: that may be trained, by name.
            losses: of one sequence each, by the part of a mixture; "" is a single task.
            settings: has ``sparsity`` and ``scope``.

        Raises:
            NonFiniteLoss, ValueError: see :func:`smezo_cli.zo.saliency.gradients`.
        """
        every = [loss for of_part in losses.values() for loss in of_part]
        squares = gradients(model, parameters, every).squares
        return largest(squares, settings["sparsity"], settings["scope"])


def _weights_of(model: nn.Module, freeze: Iterable[str]) -> int:
    plain = dynamo.original(model)
    layers = quantised_layers(plain).values()
    kept = {id(layer.kept) for layer in layers}
    numbers = [t.parameter for t in select(plain, list(freeze), []) if id(t.parameter) not in kept]
    return sum(p.numel() for p in numbers) + sum(layer.num_weights for layer in layers)
