"""SubZero+: Adam in the subspaces of SubZero, on many one-sided directions (arXiv 2608.15665)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.directions.products import UZV
from smezo_cli.zo.estimators.one_sided import OneSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common, check_common
from smezo_cli.zo.ranges import Count, Decays, Epsilon, StepSize, YesNo
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.adam import Adam
from smezo_cli.zo.updates.base import WeightWriter


class NewFrames(Factored):
    """Perturbs as :class:`Factored`, and carries nothing from old frames to new ones."""

    def carry(self, target: Target, core: Tensor, step: int) -> Tensor:
        """See :class:`Direction`."""
        return core if self.shape_of(target) is None else torch.zeros_like(core)


class CoreAdam(Adam):
    """Moves W by U A V^T, A being Adam's step of the core, whose moments begin with its frames.

    Args:
        frames: the direction; what has no frames is moved by Adam as it is.
        lr: of the method, as it begins.
        lr_1d: of what has no frames; it follows the schedule of lr.
        betas: see :class:`Adam`.
        adam_eps: likewise.
    """

    def __init__(
        self, frames: Factored, lr: float, lr_1d: float, betas: Sequence[float], adam_eps: float
    ) -> None:
        super().__init__(betas, adam_eps)
        self._frames, self._share = frames, lr_1d / lr

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        frames, step, lr_1d = self._frames, weights.step, lr * self._share

        def of_matrix(target: Target) -> Callable[..., Tensor]:
            shape, every = frames.shape_of(target), frames.refresh_every
            assert shape is not None
            assert every is not None
            scale = UZV.scale(shape, frames.rank_of(target))
            return self.change(step % every + 1, lr / scale)

        def of_others(target: Target) -> Callable[..., Tensor]:
            return self.change(step + 1, lr_1d)

        names = frozenset(t.name for t in weights.targets)
        others = frozenset(t.name for t in weights.targets if frames.shape_of(t) is None)
        decay = weights.weight_decay
        weights.by_target(gradient.on(names - others), of_matrix, lr * decay)
        weights.by_target(gradient.on(others), of_others, lr_1d * decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return super().identity() | {"lr_1d_over_lr": self._share}


class SubZeroPlus(ZeroOrder):
    """Probe many directions in one subspace of each matrix W (m, n), and keep Adam's moments in it.

    One step, with Z_k (r, r) Gaussian, k = 1..K, and U (m, r), V (n, r) random with orthonormal
    columns at each F-th; s = sqrt(m n) / r makes probes as long as MeZO's:

        projected_grad_k = [L(W + eps s U Z_k V^T) - L(W)] / eps
        g = 1/K sum_k projected_grad_k Z_k
        M <- beta1 M + (1 - beta1) g;  S <- beta2 S + (1 - beta2) g^2
        A = [M / (1 - beta1^t)] / [sqrt(S / (1 - beta2^t)) + adam_eps]
        W <- W - lr (U A V^T + weight_decay W)

    Tensors of one dimension have dense noise, and make steps of Adam with ``lr_1d``. Forwards a
    step: K + 1. Kept are M and S, 8 r^2 bytes a matrix, and U and V, 4 r (m + n).

    No code was released. How the paper goes from old frames to new ones we have not read, so it is
    our choice: M and S begin anew, t being 1 in new frames. Of two random subspaces one shows r / m
    of what lies in the other, so little could be carried; S carried as M would be has entries below
    0, of which there is no root. That A is lifted without s is our reading of the paper's lr: with
    s a step would move every weight by about lr, and lr is 1e-3 and more. So a weight of a matrix
    moves by some lr r / sqrt(m n), 6e-5 at the defaults in one of 2048 x 2048, and ``lr_1d``, which
    is our choice, is of that size: with lr, norms and biases would move 16 times as far. The signs
    of the frames are those of a QR with a positive diagonal, as in the paper.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r; a matrix with a side below it has that side.
        refresh_every: F.
        square: as :class:`smezo_cli.methods.subzero.SubZero` has it.
        betas: decay of the moments, each in [0, 1).
        adam_eps: added to the root of S; not the eps of the probe.
        num_queries: K.
        lr_1d: step size of tensors of one dimension.
        common: see :class:`smezo_cli.zo.parts.Common`; ``keep_noise`` is about dense noise.
    """

    measures_pairs: ClassVar = False
    groups_by: ClassVar = ""  # all differences have one loss in common

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 128,
        refresh_every: Count = 50,
        square: YesNo = False,
        betas: Decays = (0.9, 0.95),
        adam_eps: Epsilon = 1e-8,
        num_queries: Count = 99,
        lr_1d: StepSize = 5e-5,
        **common: Unpack[Common],
    ) -> None:
        check_common(type(self).__name__, common)
        frames = NewFrames("uzv", rank, refresh_every, is_square=square)
        super().__init__(
            model,
            selection=Everything(),
            direction=frames,
            estimator=OneSided(num_queries),
            update=CoreAdam(frames, common["lr"], lr_1d, betas, adam_eps),
            **common,
        )
