"""P-RGE: MeZO on the B of LoRA, with all losses of a step from one batch (arXiv 2409.15520)."""

from typing import ClassVar, Unpack

from torch import nn

from smezo_cli.methods.mezo import MeZO
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count


class PRGE(MeZO):
    """Perturb the B of each low-rank pair, at 2 Q points that one batched forward computes.

    One step, where each layer computes y = W x + s B A x, A stays as it was drawn (LoRA-FA), and
    queries q = 1..Q have directions z_q ~ N(0, I) of B:

        projected_grad_q = [L(B + eps z_q) - L(B - eps z_q)] / (2 eps)
        B <- B - lr (1/Q sum_q projected_grad_q z_q + weight_decay B)

    The rows of the batch are repeated 2 Q times, once a point. W and A are read once for all of
    them, and each point's rows meet a B of their own. 2 Q losses a step, one forward; nothing is
    kept between steps. The paper holds Q times the rows of a batch constant; here both are given,
    and points are split where the memory is too small for all.

    The steps are those of :class:`MeZO` on the same weights, to rounding: the batch adds in another
    order. That A is frozen is the adapter's affair (``method.adapter.kind=lora_fa``).

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: Q.
        common: see :class:`smezo_cli.zo.parts.Common`; ``executor`` is "batched" unless given.
    """

    names_itself: ClassVar = True

    def __init__(
        self, model: nn.Module, *, num_queries: Count = 4, **common: Unpack[Common]
    ) -> None:
        common.setdefault("executor", "batched")
        super().__init__(model, num_queries=num_queries, **common)
