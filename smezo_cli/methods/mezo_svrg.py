"""MeZO-SVRG: zeroth-order steps whose batch noise an anchor takes away (arXiv 2404.08080)."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from torch import nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.base import Ask
from smezo_cli.zo.move import Gradient, Key, Move, Term, keys
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Noise, Positive, Rows
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.base import Update, WeightWriter


class AnchorPairs:
    """Estimate at an anchor with all rows, and between anchors the difference to it with a batch.

    Args:
        every: steps from one anchor to the next.
        num_queries: directions of an anchor's estimate.
    """

    def __init__(self, every: int, num_queries: int) -> None:
        self.every, self.num_queries = every, num_queries
        self.num_scalars = max(2, num_queries)
        self.num_terms = 1 + num_queries

    def is_anchor(self, step: int) -> bool:
        """Return whether a step makes its weights the anchor."""
        return step % self.every == 0

    def forwards(self, step: int) -> int:
        """See :class:`Estimator`."""
        return 2 * self.num_queries if self.is_anchor(step) else 4

    def measure(self, ask: Ask) -> list[float]:
        """See :class:`Estimator`; what a step does not need is recorded as 0."""
        if self.is_anchor(ask.step):
            found = ask.two_sided(keys(ask.step, self.num_queries), objective="full")
        else:
            # The same direction at both points, or the noise would double.
            here, there = (Move((Term(Key(ask.step), ask.eps),), base=b) for b in ("", "anchor"))
            pairs = ask.losses([(here, here.negated()), (there, there.negated())])
            found = [(plus - minus) / (2 * ask.eps) for plus, minus in pairs]
        return found + [0.0] * (self.num_scalars - len(found))

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        """See :class:`Estimator`; between anchors without the anchor's own estimate."""
        if self.is_anchor(step):
            terms = map(Term, keys(step, self.num_queries), scalars[: self.num_queries])
            return Gradient(tuple(terms), self.num_queries)
        return Gradient((Term(Key(step), scalars[0] - scalars[1]),))


class FromAnchor(Update):
    """Add the anchor's estimate to the difference; keep both anchor and estimate.

    The estimate is kept as the projected gradients of its directions, which are drawn again.

    Args:
        pairs: says which steps are anchors.
        batch_lr_factor: steps between anchors are made at ``lr`` times it.
    """

    copies = ("anchor",)

    def __init__(self, pairs: AnchorPairs, batch_lr_factor: float) -> None:
        self._pairs, self.batch_lr_factor = pairs, batch_lr_factor

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        kept = weights.state.numbers
        if self._pairs.is_anchor(weights.step):
            weights.copy_weights("anchor")
            kept["anchor_step"] = weights.step
            kept["anchor_grads"] = [t.coefficient / gradient.divisor for t in gradient.terms]
        else:
            keys = (Key(kept["anchor_step"], q) for q in range(len(kept["anchor_grads"])))
            terms = (*gradient.terms, *map(Term, keys, kept["anchor_grads"]))
            gradient, lr = Gradient(terms), lr * self.batch_lr_factor
        weights.move(gradient, -lr, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {
            "anchor_every": self._pairs.every,
            "num_queries": self._pairs.num_queries,
            "batch_lr_factor": self.batch_lr_factor,
        }


class MeZOSVRG(ZeroOrder):
    """Correct a batch's estimate by the same one at an anchor, whose own estimate is over all rows.

    g(theta; B) is MeZO's estimate [L(theta + eps z) - L(theta - eps z)] / (2 eps) z (Algorithm 1
    of the paper). Every ``anchor_every`` steps, with Q directions over all rows:

        anchor <- theta;  g_anchor <- g(anchor; all rows);  theta <- theta - lr g_anchor

    and in the steps between, with one direction z at both points:

        theta <- theta - lr batch_lr_factor [g(theta; B) - g(anchor; B) + g_anchor]

    It keeps a copy of the weights (in their dtype) and Q numbers; the paper keeps g_anchor as a
    second copy. Forwards a step: 2 Q over all rows, or 4 over the batch. The logged loss is that
    of all rows at the probes of an anchor's step, and between anchors the mean of the batch's at
    the probes of the weights and of those of the anchor.

    The released code differs: its anchor is a list of the live parameters, so that it is no copy;
    its two estimates of a step use different seeds, which doubles the noise in place of removing
    it; and lr falls fivefold when losses rise by 5% (here: ``lr_schedule``). The noise of the
    anchor's own direction stays; more ``num_queries`` lower it.

    Args:
        model: any module; parameters with ``requires_grad`` are trained.
        anchor_every: steps from one anchor to the next; the first step is one.
        batch_lr_factor: steps between anchors are made at ``lr`` times it.
        num_queries: Q, directions of the anchor's estimate.
        full_rows: rows of "all rows": a fixed draw of so many of the train split; 0: all of it.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`; weight decay is that of the step's lr. At an
            anchor ``clip_projected_grad`` cuts each projected gradient, and between anchors the
            difference of the two of a step.
    """

    objectives: ClassVar = ("batch", "full")
    least_groups: ClassVar = 2  # between anchors a pair at the weights, one at the anchor

    def __init__(
        self,
        model: nn.Module,
        *,
        anchor_every: Count = 2,
        batch_lr_factor: Positive = 0.01,
        num_queries: Count = 1,
        full_rows: Rows = 0,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        pairs = AnchorPairs(anchor_every, num_queries)
        self.full_rows = full_rows
        self._full: dict[int, list[int]] = {}  # by the number of train rows
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=pairs,
            update=FromAnchor(pairs, batch_lr_factor),
            **common,
        )

    def rows_of(
        self, objective: str, step: int, batch: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[int]:
        """Return the rows of an anchor's loss: all, or those drawn once for the run."""
        count = len(lengths)
        if count not in self._full:  # of a run there is one
            key = functools.partial(stream_key, self.seed, "full rows")
            rows = sorted(range(count), key=key)
            self._full[count] = sorted(rows[: self.full_rows or count])
        return self._full[count]
