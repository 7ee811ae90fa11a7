"""PeZO: zeroth-order steps along random numbers that are used again (arXiv 2504.20314)."""

from typing import Unpack

from torch import nn

from smezo_cli.zo.directions.pool import Pool
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Generators, Modulus, PoolBits
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.sgd import SGD


class PeZO(ZeroOrder):
    """Run MeZO along a small pool of uniform numbers, laid end to end over the weights.

    One step, for queries q = 1..Q, with a pool R of N = 2^bits - 1 uniforms, the weights as one
    vector of length d, and a place s_q that rolls on from direction to direction:

        u_q[i] = scale R[(s_q + i) mod N],  |u_q| = E |N(0, I_d)|
        projected_grad_q = [L(theta + eps u_q) - L(theta - eps u_q)] / (2 eps)
        theta <- theta - lr (1/Q sum_q projected_grad_q u_q + weight_decay theta)

    ``generators=G`` is the paper's variant without a pool in memory: G shift registers of ``bits``
    bits, which take turns. There are no more than N directions (N places of G registers), so all
    updates lie in a space of at most N (N G) dimensions, which :attr:`remark` says. It keeps the
    pool three times over, so as to read on behind its end: 12 N bytes. Forwards a step: 2 a query.
    No code was released; the roll of the pool, the turns of the registers and the defaults are our
    reading.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        bits: the pool holds 2^bits - 1 numbers; 4 to 16.
        generators: 0: one pool; else so many shift registers.
        modulus: the scale is "exact", or the nearest "power_of_two", as hardware shifts.
        num_queries: Q.
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: PoolBits = 12,
        generators: Generators = 0,
        modulus: Modulus = "exact",
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        self._pool = Pool(bits, generators, modulus, num_queries)
        super().__init__(
            model,
            selection=Everything(),
            direction=self._pool,
            estimator=TwoSided(num_queries),
            update=SGD(),
            **common,
        )

    @property
    def remark(self) -> str:
        """See :attr:`smezo_cli.zo.parts.Parts.remark`."""
        return (
            f"its directions span at most {self._pool.reach:,} of the {self.num_weights:,} "
            "dimensions of the weights"
        )
