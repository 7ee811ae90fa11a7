"""AIM-ZO: probes along learned directions of the inputs of linear layers (Xie et al., 2026)."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.directions.input_space import InputSpace, both_sides, orthonormal_rows
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Move, Term, keys
from smezo_cli.zo.noise import stream_key, uniform_at
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.passes.low_rank import Factors
from smezo_cli.zo.ranges import Count, Positive, Rows
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.state import State
from smezo_cli.zo.targets import Target, check
from smezo_cli.zo.updates.base import WeightWriter
from smezo_cli.zo.updates.sgd import SGD


class Seen(NamedTuple):
    """Hold sums over the tokens x of a layer: of (Q^T x) x^T, and of |x|^2."""

    product: Tensor
    squares: Tensor


class LearnedInputs(InputSpace):
    """Perturb along u(key) = c a (Q_S b)^T, with k of the K columns of Q; |u| as of dense noise.

    a (m) and b (k) are Gaussian, of one stream, a first. The columns S are the leading h, and k - h
    of the others, which each direction draws for each layer. Q follows the inputs by one step of
    Oja's rule each time that they are watched, so that its leading columns come nearest to the
    directions of most variance:

        Q <- qr(Q + oja n C Q / trace(C)),  C = sum_x x x^T
    """

    def __init__(self, model: nn.Module, basis_size: int, columns: int, shared: int, oja: float):
        super().__init__(model, basis_size)
        check(
            shared <= columns <= basis_size,
            f"columns={columns}: at least shared_columns={shared}, and at most "
            f"basis_size={basis_size}",
        )
        self.columns, self.shared, self.oja = columns, shared, oja
        #: where bases are kept; a method says so
        self.state: State | None = None

    def factors_at(self, target: Target, key: Key) -> Factors:
        """See :class:`InputSpace`."""
        rows = target.parameter.shape[0]
        chosen = self.chosen(target, key)
        drawn = self.gaussian(target, key, rows + len(chosen))
        a, b = drawn[:rows], drawn[rows:]
        lengths = a.double().norm() * b.double().norm()  # of Q_S b it is that of b
        scale = (target.parameter.numel() ** 0.5 / lengths).float()
        return Factors((a * scale)[:, None], b[None] @ self.basis_of(target)[chosen])

    def chosen(self, target: Target, key: Key) -> Tensor:
        """Return the numbers of the columns that a direction takes: int64 (k,)."""
        size = self.size_of(target)
        columns = min(self.columns, size)
        shared, others = torch.arange(size).tensor_split([min(self.shared, columns)])
        stream = torch.tensor(stream_key(self.dense._seed, "columns", *key[:2], target.name))
        order = uniform_at(torch.arange(len(others)), len(others), stream).argsort(stable=True)
        found = torch.cat((shared, others[order[: columns - len(shared)]]))
        return found.to(target.parameter.device)

    def seen(self, target: Target, x: Tensor, found: Seen | None) -> Seen:
        """See :class:`InputSpace`."""
        product, squares = both_sides(x, self.basis_of(target)), x.square().sum()
        if found is None:
            return Seen(product, squares)
        return Seen(found.product + product, found.squares + squares)

    def improved(self, target: Target, found: Seen) -> Tensor:
        """See :class:`InputSpace`."""
        basis = self.basis_of(target)
        pull = found.product * (self.oja * basis.shape[1] / found.squares)
        return orthonormal_rows(basis + pull) if bool(pull.isfinite().all()) else basis

    def kept(self, target: Target) -> Tensor | None:
        """See :class:`InputSpace`."""
        if not self.state:
            return None
        return self.state.of(target)[0].view(self.size_of(target), -1)

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        names = ("columns", "shared", "oja")
        return super().identity() | {name: getattr(self, name) for name in names}


class LeaveOneOut:
    """Estimate 1/(N - 1) sum_i [y_i - mean(y)] / eps Z_i, of losses y_i on one side of the weights.

    That is the mean over i of the slope of each loss against the mean of the others. The forward at
    the weights, where there is one, is for the inputs of the layers alone.

    Args:
        num_queries: N.
        direction: what watches that forward.
        basis_every: steps between two of them.
    """

    def __init__(self, num_queries: int, direction: InputSpace, basis_every: int) -> None:
        check(num_queries >= 2, f"num_queries={num_queries}: must be at least 2")
        check(basis_every >= 1, f"basis_every={basis_every}: must be at least 1")
        self.num_scalars = self.num_terms = num_queries
        self._direction, self._basis_every = direction, basis_every

    def _watches(self, step: int) -> bool:
        return step % self._basis_every == 0

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return self.num_scalars + self._watches(step)

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        if self._watches(ask.step):
            with self._direction.watching():
                ask.losses([(Move(()),)])
        there = [(Move((Term(key, ask.eps),)),) for key in keys(ask.step, self.num_scalars)]
        found = [loss for (loss,) in ask.losses(there)]
        mean = sum(found) / len(found)
        return [(loss - mean) / ask.eps for loss in found]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        return Gradient(tuple(map(Term, keys(step, self.num_scalars), scalars)), len(scalars) - 1)


class KeepsBasis(SGD):
    """Move as theta <- theta - lr (g + weight_decay theta), and keep the bases of the step."""

    slots = ("basis",)

    def __init__(self, direction: LearnedInputs) -> None:
        self._direction = direction

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        super().apply(weights, gradient, lr)
        for target in weights.targets:
            (kept,) = weights.state.of(target)
            if (made := self._direction.made.get(target.name)) is not None:
                kept.copy_(made.view(-1))
        self._direction.made.clear()


class AIMZO(ZeroOrder):
    """Learn directions in which the inputs of each linear layer lie, and probe along those alone.

    One step, with Q (n, K) of orthonormal columns for each linear layer W (m, n):

        Q <- qr(Q + oja n C Q / trace(C)),  C = sum of x x^T over the layer's inputs at W
        Z_i = c_i a_i b_i^T Q_i^T,  |Z_i|_F = sqrt(m n)             (i = 1..N)
        y_i = L(W + eps Z_i)
        W <- W - lr (1/((N - 1) eps) sum_i (y_i - mean(y)) Z_i + weight_decay W)

    a_i (m) and b_i (k) are Gaussian. Q_i has k of the columns: the leading h, which all i have, and
    k - h of the others, drawn for each i and layer. A first Q is random. Tensors that are no linear
    layer's weight have dense Gaussian Z_i. Forwards a step: N, and one at W in every
    ``basis_every``-th. It keeps Q: 4 n K bytes a layer, and as much again in a step.

    A new Q depends on the batch, so that steps cannot be made again from their scalars, and ranks,
    which see different rows, do not share steps. A layer that its model does not call keeps its
    first Q.

    Where this leaves the released code: its update is not divided by eps, so that its lr is worth
    lr eps here, and as its eps decays to a quarter, by a cosine, so do its steps; here eps stays.
    Its step of Oja's rule is oja C / T, of T tokens, the same as here where the mean square of
    an input is 1, as after a norm; dividing by trace(C) lets no scale of the inputs matter (our
    choice). It looks at the first 128 tokens of a layer, here all count, those of padding too.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_queries: N, at least 2.
        basis_size: K; of a layer of fewer inputs, as many.
        columns: k, at most K.
        shared_columns: h, at most k.
        basis_every: steps between two forwards that Q follows.
        oja: how far Q goes then.
        common: see :class:`smezo_cli.zo.parts.Common`; ``executor="side_path"`` and "batched"
            compute linear layers without moved copies; ``keep_noise`` has no effect.
    """

    replays: ClassVar = False
    shares_steps: ClassVar = False
    measures_pairs: ClassVar = False

    def __init__(
        self,
        model: nn.Module,
        *,
        num_queries: Count = 15,
        basis_size: Count = 128,
        columns: Count = 64,
        shared_columns: Rows = 48,
        basis_every: Count = 1,
        oja: Positive = 0.3,
        **common: Unpack[Common],
    ) -> None:
        plain = dynamo.original(model)
        direction = LearnedInputs(plain, basis_size, columns, shared_columns, oja)
        super().__init__(
            model,
            selection=Everything(),
            direction=direction,
            estimator=LeaveOneOut(num_queries, direction, basis_every),
            update=KeepsBasis(direction),
            **common,
        )
        direction.state = self.state_of_update
