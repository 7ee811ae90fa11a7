"""Sparse-MeZO: perturb and update only the small weights of each tensor (arXiv 2402.15751)."""

from typing import ClassVar, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import (
    ConstantTensors,
    Count,
    Globs,
    MaskRule,
    Noise,
    Resample,
    Sparsity,
    StepsBetween,
)
from smezo_cli.zo.selections.masked import Masked
from smezo_cli.zo.updates.sgd import SGD


class SparseMeZO(ZeroOrder):
    """Run MeZO under a mask m, taken at the unperturbed weights.

    One step, for queries q = 1..Q:

        projected_grad_q = [L(theta + eps m z_q) - L(theta - eps m z_q)] / (2 eps)
        theta <- theta - lr m (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    ``mask="small"`` is S-MeZO, ``"random"`` R-MeZO, ``"large"`` the paper's counter-example.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        sparsity: fraction NOT perturbed, in [0, 1).
        mask: "none", "small", "large" or "random" (see :mod:`smezo_cli.zo.selections.masks`).
        mask_refresh_every: refresh thresholds every so many steps; 0 keeps the initial ones.
        mask_resample: "run" or "step": when the random mask is drawn anew.
        constant_tensors: "dense" or "frozen": tensors whose magnitudes are all equal.
        dense: globs of parameter names perturbed without a mask.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    names_itself: ClassVar = False

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: Sparsity = 0.0,
        mask: MaskRule = "small",
        mask_refresh_every: StepsBetween = 0,
        mask_resample: Resample = "run",
        constant_tensors: ConstantTensors = "dense",
        dense: Globs = (),
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        masked = Masked(
            mask, sparsity, mask_refresh_every, mask_resample, constant_tensors, tuple(dense)
        )
        super().__init__(
            model,
            selection=masked,
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )
