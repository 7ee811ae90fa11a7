"""GRZO: a direction of its own for each row of a batch, in two forwards (arXiv 2606.02857)."""

import statistics
from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch
from torch import nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.directions.signed_rows import SignedNoise
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Move, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.probe import Mover
from smezo_cli.zo.ranges import Count
from smezo_cli.zo.reached import Reads
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.step import ByRow, Closure
from smezo_cli.zo.targets import check, number
from smezo_cli.zo.updates.sgd import SGD

_LEAST = 1e-8  # added to the standard deviation


class GroupRelative:
    """Estimate 1/(2 eps B) sum_i a_i Z_i, a_i = delta_i / (std(delta) + 1e-8), of rows i = 1..B.

        delta_i = [l_i(theta + eps Z_i) - l_i(theta - eps Z_i)] / 2

    Recorded is projected_grad_i = delta_i / eps, and the gradient is their sum along Z_i over
    2 B (eps std(projected_grad) + 1e-8). One row has no deviation: its divisor is 1.

    Args:
        num_rows: B.
        eps: radius of the probe.
    """

    def __init__(self, num_rows: int, eps: float) -> None:
        check(num_rows >= 1, f"num_rows={num_rows}: must be at least 1")
        self.num_scalars = self.num_terms = num_rows
        self._eps = eps

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 2

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`."""
        there = [Move((Term(key, ask.eps),)) for key in keys(ask.step, self.num_scalars)]
        pairs = ask.by_row([(move, move.negated()) for move in there])
        return [(plus - minus) / (2 * ask.eps) for plus, minus in pairs]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`."""
        divisor = 1.0
        if (rows := len(scalars)) > 1:
            divisor = 2 * rows * (self._eps * statistics.stdev(scalars) + _LEAST)
        return Gradient(tuple(map(Term, keys(step, self.num_scalars), scalars)), divisor)


class GRZO(ZeroOrder):
    """Probe each row of a batch along a direction of its own, all in the same two forwards.

    One step, with one base U ~ N(0, I) and random signs r_i (m) and s_i (n) of row i = 1..B:

        Z_i = U * (r_i s_i^T)                              (elementwise; of a vector U * r_i)
        delta_i = [l_i(W + eps Z_i) - l_i(W - eps Z_i)] / 2
        a_i = delta_i / (std(delta) + 1e-8)                (its mean is not taken off)
        W <- W - lr (1/(2 eps B) sum_i a_i Z_i + weight_decay W)

    l_i are the losses of the rows, whose mean is the loss of the batch. A linear layer computes
    y = x W^T + eps r_i * ((x * s_i) U^T): two products where MeZO has one, so that a forward costs
    up to twice as much. The sum over rows is U * (R^T diag(a) S), part by part. Two forwards a
    step, B scalars; no state.
    :class:`smezo_cli.zo.directions.signed_rows.SignedNoise` says which tensors have signs.

    Where this leaves the paper or the released code: signs of norms and embeddings are the parity
    of row, column and seed there, a checkerboard that is the same, up to its sign, for all rows
    (those of linear layers are random). Here each sign is a hash of its place. There a norm moves
    along a vector of signs alone, without U, and its bias along that of its weight, unprobed; an
    embedding along one of signs for each token, with a sign for each row of the batch that has it,
    so that of the table the batch's tokens alone move; and biases of linear layers rest. Here all
    of these have a Gaussian U, and the whole table moves. Both notes on the paper have the factor
    1/(2 eps B), with the half in delta or without, which a_i does not show. The standard deviation
    is that of a sample, as there, and one row has none: its step is MeZO's, along U under its
    signs. Tensors that are no linear layer's, embedding's or norm's move along U, alike for all
    rows (our choice). Clipping cuts delta_i / eps after the deviation is taken.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        num_rows: B, rows of each batch.
        common: see :class:`smezo_cli.zo.parts.Common`; ``executor`` is "sequential".
    """

    needs_rows: ClassVar = True
    measures_pairs: ClassVar = False  # in turns: a forward has no copies that both sides could draw
    groups_by: ClassVar = ""  # all rows are in one forward

    def __init__(self, model: nn.Module, *, num_rows: Count = 16, **common: Unpack[Common]) -> None:
        executor = common.get("executor", "auto")
        check(
            executor in ("auto", "sequential"),
            f"executor={executor}: a forward computes each row at a point of its own here: leave "
            "executor out, or take sequential",
        )
        self.signed = SignedNoise(dynamo.original(model), num_rows)
        super().__init__(
            model,
            selection=Everything(),
            direction=self.signed,
            estimator=GroupRelative(num_rows, common.get("eps", 0.0)),
            update=SGD(),
            **common,
        )

    def exchanged(self, step: int) -> int:
        """See :meth:`ZeroOrder.exchanged`: two losses a row."""
        return 2 * self.num_scalars

    @torch.inference_mode(False)
    @torch.no_grad()
    def self_check(self, closure: Closure) -> int:
        """See :meth:`ZeroOrder.self_check`; and check that rows can be moved apart in this model.

        Raises:
            ValueError: likewise if they cannot.
        """
        checked = super().self_check(closure)
        reads = Reads([target.parameter for target in self.targets])
        with self.executors.compiler():
            with self._probe.at(reads), reads:
                here = number(closure())
            # What a tenth, or a hundredth, of an effect hides in; and below it, rounding.
            share, least = (0.01, 1e-5) if reads.eps <= 2**-23 else (0.1, 4 * reads.eps)
            self._check_layers(closure, here, share, least * max(1.0, abs(here)))
            if isinstance(closure, ByRow) and closure.num_rows <= self.num_scalars:
                self._check_rows(closure, least)
        self.direction.end()
        return checked

    def _check_layers(self, closure: Closure, here: float, share: float, least: float) -> None:
        """Compare layers that are computed by signs with layers that hold a moved copy, by kind."""
        by_kind: dict[str, set[int]] = {}
        for module, names in self._probe.owners:
            if self.signed.kind_of(module):
                own = {id(module._parameters[name]) for name in names}
                by_kind.setdefault(type(module).__name__, set()).update(own)
        move = self._along(0)
        for kind, only in by_kind.items():
            losses = []
            for mover in (self.signed.mover(self.num_steps, move), self._by_rows([move])):
                with self._probe.at(mover, only):
                    losses.append(number(closure()))
            effect = max(abs(loss - here) for loss in losses)
            check(
                abs(losses[0] - losses[1]) <= max(share * effect, least),
                f"a {kind} of the model computes something else than its class says, so that its "
                "rows cannot be moved apart: choose another method, such as method=mezo",
            )

    def _check_rows(self, closure: ByRow, least: float) -> None:
        """Compare rows that are moved each along its own direction with all moved along that one.

        Shapes are the same, and so is the arithmetic of a row.
        """
        for rows, sequences, losses in closure.by_row():
            movers = [self._by_rows([self._along(row) for row in sequences])]
            movers += [self._by_rows([self._along(row)]) for row in (rows[0], rows[-1])]
            found: list[list[float]] = [self.executors.one(losses, m).tolist() for m in movers]
            for place, alike in ((0, found[1]), (-1, found[2])):
                check(
                    abs(found[0][place] - alike[place]) <= least * max(1.0, abs(alike[place])),
                    "the rows of a batch see each other in this model, so that no loss of one row "
                    "can be told: choose another method, such as method=mezo",
                )

    def _along(self, row: int) -> Move:
        """Return a move along the direction of a row that is long enough to be seen."""
        return Move((Term(Key(self.num_steps, row), max(self.param_groups[0]["eps"], 1e-2)),))

    def _by_rows(self, moves: Sequence[Move]) -> Mover:
        return self.signed.row_mover(self.num_steps, moves)
