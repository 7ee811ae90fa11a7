"""MaZO: zeroth-order steps for several tasks at once, on a mask of each row (arXiv 2502.11513)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise, NotNegative, Place, Sparsity
from smezo_cli.zo.saliency import gradients, largest_of_rows, rows_of
from smezo_cli.zo.selections.layers import frozen
from smezo_cli.zo.selections.named import Named, beside
from smezo_cli.zo.step import Closure
from smezo_cli.zo.updates.sgd import SGD


class MaZO(ZeroOrder):
    """Run MeZO on a static mask m of the weights that matter most to the tasks, row by row.

    The mask is made once, before the first step. Of the squared gradients F_t (mean over sequences
    of task t) and the mean gradients g_t, each term divided by its norm in the row of the matrix:

        S_t = F_t w^2 / 2 + alpha g_t^2 + beta |w|
        m = 1 where sum_t S_t / |S_t| is among the (1 - sparsity) largest of its row, else 0

    The first term is what the loss loses without the weight (the optimal brain damage's saliency,
    by the Fisher diagonal), the second what a step along the gradient wins at once. A vector is one
    row. A step, for queries q = 1..Q, with the weighted mean L of the losses of the tasks:

        projected_grad_q = [L(theta + eps m z_q) - L(theta - eps m z_q)] / (2 eps)
        theta <- theta - lr m (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    Kept: the places of the mask, 8 bytes for each weight in it. Forwards a step: 2 a query. While
    the mask is made it takes 12 bytes a weight, and a backpropagation of one row its activations.

    There is no public code, and the paper was read at second hand: the mask of each row, its sum
    over tasks of scores over the row's norm, and its three terms are the paper's. How the first two
    are computed (by gradients, where the paper speaks of a Hessian), that each term is divided by
    its norm (they differ by orders of magnitude), alpha, beta and the sparsity are our choice. The
    tasks are the parts of ``task=mixture``; a single task is a sum of one.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        index: the mask: flat places (int64, sorted) by the name of the tensor, such as
            :meth:`choose` returns; None: every weight, which is MeZO.
        sparsity: fraction of each row that is NOT perturbed; for :meth:`choose`.
        alpha: how much the squared mean gradient counts; likewise.
        beta: how much the magnitude counts; likewise.
        mask_rows: training rows of each task that the run takes gradients of.
        mask_from: folder of a run, or file, whose mask the run takes instead of its own.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    needs_mask: ClassVar = True
    score_bytes: ClassVar = 12

    def __init__(
        self,
        model: nn.Module,
        *,
        index: Mapping[str, Tensor] | None = None,
        sparsity: Sparsity = 0.9,
        alpha: NotNegative = 1.0,
        beta: NotNegative = 1.0,
        mask_rows: Count = 32,
        mask_from: Place | None = None,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        common["freeze"] = beside(model, index, frozen(model, common))
        super().__init__(
            model,
            selection=Named(index),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )

    @staticmethod
    @torch.no_grad()
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
            losses: of one sequence each, by task.
            settings: has ``sparsity``, ``alpha`` and ``beta``.

        Raises:
            NonFiniteLoss, ValueError: see :func:`smezo_cli.zo.saliency.gradients`.
        """
        alpha, beta = settings["alpha"], settings["beta"]
        total: dict[str, Tensor] = {}
        for of_task in losses.values():
            found = gradients(model, parameters, of_task, with_means=True)
            for name, parameter in parameters.items():
                weight = rows_of(parameter.detach().float())
                squares = rows_of(found.squares.pop(name))
                score = _over_norm(squares * weight.square() / 2)
                score += alpha * _over_norm(rows_of(found.means.pop(name)).square())
                score += beta * _over_norm(weight.abs())
                score = _over_norm(score)
                total[name] = total[name] + score if name in total else score
        return largest_of_rows(total, settings["sparsity"])


def _over_norm(rows: Tensor) -> Tensor:
    """Divide each row (not negative) by its norm; a row of zeros stays as it is."""
    largest = rows.amax(1, keepdim=True)  # first, as squares of small numbers would be 0
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norm = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)
