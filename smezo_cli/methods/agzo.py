"""AGZO: probes along the top directions of what each linear layer is given (arXiv 2601.17261)."""

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.directions.input_space import InputSpace, both_sides, orthonormal_rows
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.estimators.one_sided import OneSided
from smezo_cli.zo.move import Key, Move, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.passes.low_rank import Factors
from smezo_cli.zo.ranges import Count
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check
from smezo_cli.zo.updates.sgd import SGD


class TopInputs(InputSpace):
    """Perturb along u(key) = R A^T, with R (m, r) Gaussian and A (n, r) of orthonormal columns.

    These are the top directions of the inputs watched last. A comes from power iterations on the
    inputs X (tokens, n): A <- qr(X^T X A), so many times, from random ones; where they are given in
    several parts, on from part to part.
    """

    def __init__(self, model: nn.Module, rank: int, iterations: int) -> None:
        super().__init__(model, rank, rank)
        check(iterations >= 1, f"iterations={iterations}: must be at least 1")
        self.iterations = iterations

    def factors_at(self, target: Target, key: Key) -> Factors:
        """See :class:`InputSpace`."""
        rows, basis = target.parameter.shape[0], self.basis_of(target)
        return Factors(self.gaussian(target, key, rows, len(basis)), basis)

    def seen(self, target: Target, x: Tensor, found: Tensor | None) -> Tensor:
        """See :class:`InputSpace`."""
        basis = self.basis_of(target) if found is None else found
        for _ in range(self.iterations):
            pulled = both_sides(x, basis)
            if not bool(pulled.isfinite().all()):
                return basis
            basis = orthonormal_rows(pulled)
        return basis

    def improved(self, target: Target, found: Tensor) -> Tensor:
        """See :class:`InputSpace`."""
        return found

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return super().identity() | {"iterations": self.iterations}


class Watched(OneSided):
    """Make the one-sided estimate; watch the forward at the weights, which comes first."""

    def __init__(self, num_queries: int, direction: InputSpace) -> None:
        super().__init__(num_queries)
        self._direction = direction

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        with self._direction.watching():
            ((here,),) = ask.losses([(Move(()),)])
        there = [(Move((Term(key, ask.eps),)),) for key in keys(ask.step, self.num_terms)]
        return [*((loss - here) / ask.eps for (loss,) in ask.losses(there)), here]


class AGZO(ZeroOrder):
    """Probe each linear layer along the top directions of its inputs, on one side of the weights.

    One step, with the inputs X of each linear layer W (m, n) at the weights, for q = 1..Q:

        A <- qr(X^T X A), ``iterations`` times, from a random A (n, r)
        Delta_q = R_q A^T,  R_q (m, r) Gaussian
        projected_grad_q = [L(W + eps Delta_q) - L(W)] / eps
        W <- W - lr (1/Q sum_q projected_grad_q Delta_q + weight_decay W)

    On average that is the gradient, projected onto A: most of it, as the gradient of a linear layer
    is a sum of products with its inputs. As in the paper, tensors that are no linear layer's weight
    have dense Gaussian directions. Q + 1 forwards a step; it keeps no state.

    A depends on the batch, so that steps cannot be made again from their scalars, and ranks, which
    see different rows, do not share steps. No code could be read; lr, and what the notes on the
    paper do not say, are our choice: a first A that is drawn once for the run, tokens of padding
    that count as others, and of several micro-batches an A that goes on from one to the next.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        rank: r; of a layer of fewer inputs, as many.
        iterations: power iterations a forward.
        num_queries: Q.
        common: see :class:`smezo_cli.zo.parts.Common`; ``executor="side_path"`` and "batched"
            compute linear layers without moved copies.
    """

    replays: ClassVar = False
    shares_steps: ClassVar = False
    measures_pairs: ClassVar = False

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: Count = 1,
        iterations: Count = 3,
        num_queries: Count = 1,
        **common: Unpack[Common],
    ) -> None:
        direction = TopInputs(dynamo.original(model), rank, iterations)
        super().__init__(
            model,
            selection=Everything(),
            direction=direction,
            estimator=Watched(num_queries, direction),
            update=SGD(),
            **common,
        )
