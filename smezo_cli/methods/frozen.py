"""Ask a model by methods that take no steps and leave it as it is.

Zero-shot, in-context learning, and a linear probe of what the model makes of a prompt.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from smezo_cli.errors import UserError
from smezo_cli.zo.ranges import Positive, Shown

SEPARATOR = "\n\n"  # between demonstrations, and between them and the row, as in MeZO


class Frozen:
    """Trains no weights of the model."""

    takes_steps: ClassVar = False
    replays: ClassVar = False
    compares_losses: ClassVar = False
    shows_demonstrations: ClassVar = False  # labelled rows before every row
    scores_words: ClassVar = True  # as answers; else it tells classes apart by itself


class ZeroShot(Frozen):
    """Ask the model as it came, with the prompt that is best on dev."""


class InContext(Frozen):
    """Put labelled training rows before every row (MeZO, arXiv 2305.17333, appendix E).

    They are drawn at random, by ``seed`` alone, and are the same for all rows. MeZO's icl.sh draws
    others for every row that it evaluates, so that its metrics are means over draws: a run here is
    one draw, and several seeds say how much that matters.

    Args:
        num_demonstrations: rows shown, or as many as there are and fit.
        seed: keys the draw.
    """

    shows_demonstrations: ClassVar = True

    def __init__(self, *, num_demonstrations: Shown, seed: int = 0) -> None:
        self.num_demonstrations = num_demonstrations
        self.seed = seed

    def drawn(self, num_rows: int) -> list[int]:
        """Return the indices of the rows to show, in the order in which they are shown."""
        order = list(range(num_rows))
        random.Random(f"{self.seed}/demonstrations").shuffle(order)
        return order[: self.num_demonstrations]

    def choose(
        self,
        examples: Sequence[tuple[str, str]],
        count: Callable[[str], int],
        limit: int,
        longest: int,
    ) -> dict[str, Any]:
        """Return what is shown of the training rows.

        As many of those drawn are shown, the first ones, as leave room for the longest row, or for
        half of the window where that row takes more: such rows lose tokens on the left, which are
        those of the first demonstrations.

        Args:
            examples: id of each training row, and its prompt with the right answer.
            count: tokens of a text.
            limit: tokens of the window.
            longest: tokens of the longest row that is to be asked.

        Returns:
            Plain values for the run: ``asked``, ``used``, their ``tokens`` (what parts them
            included), the ``rows`` by id, and the ``text`` that stands before every row.

        Raises:
            UserError: there is no room for a single one.
        """
        rows = [examples[i] for i in self.drawn(len(examples))]
        room = limit - min(longest, limit // 2)
        for used in range(len(rows), 0, -1):
            text = "".join(shown.strip() + SEPARATOR for _, shown in rows[:used])
            tokens = count(text)
            if tokens <= room:
                return {
                    **{"asked": self.num_demonstrations, "used": used, "tokens": tokens},
                    **{"rows": [name for name, _ in rows[:used]], "text": text},
                }
        raise UserError(
            f"method.num_demonstrations={self.num_demonstrations}: not one of them fits beside a "
            f"row into the {limit} tokens of a prompt; raise model.max_length, or choose "
            "method=zero_shot."
        )


class LinearProbe(Frozen):
    """Fit a logistic regression on the frozen model's last hidden state (MeZO, appendix E: LP).

    That of the last token of the prompt, or of its mask, as it enters the output layer; each of
    its numbers is standardised by mean and spread over the training rows. Minimised is the mean
    cross-entropy plus ``l2 / 2 n`` times the squared norm of the weights (n rows; the bias is
    free), which is scikit-learn's with C = 1 / l2, by LBFGS in float64 from zero.

    Args:
        l2: strength of the penalty.
    """

    scores_words: ClassVar = False
    GRADIENT = 1e-6  # largest entry of the gradient at which the fit has converged
    STEPS = 5000  # of LBFGS, at most

    def __init__(self, *, l2: Positive) -> None:
        self.l2 = l2

    def fit(self, features: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
        """Return the probe of some rows.

        Args:
            features: (n, size), of any dtype.
            labels: int64 (n,).
            num_classes: columns of the probe; every one of them gets its weights.

        Returns:
            Float64 tensors: ``weight`` (classes, size) and ``bias`` (classes,) for features as they
            are, the standardisation taken in.

        Raises:
            UserError: features are not finite, or the fit does not converge.
        """
        x = features.double()
        if not x.isfinite().all():
            raise UserError(
                "method=linear_probe: hidden states of the model are not finite; use dtype=float32."
            )
        mean, spread = x.mean(0), x.std(0, correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        x = (x - mean) / spread
        weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS(
            [weight, bias],
            max_iter=self.STEPS,
            max_eval=2 * self.STEPS,
            tolerance_grad=self.GRADIENT,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            search.zero_grad()
            found = F.cross_entropy(x @ weight.T + bias, labels)
            found = found + self.l2 / (2 * len(x)) * (weight**2).sum()
            found.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            return found

        with torch.enable_grad():
            search.step(loss)  # type: ignore[no-untyped-call]  # untyped in torch
            loss()
        assert weight.grad is not None
        assert bias.grad is not None
        largest = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
        if not largest <= 10 * self.GRADIENT:
            raise UserError(
                f"method.l2={self.l2:g}: the fit did not converge (gradient {largest:.1g} after "
                f"{self.STEPS} steps of LBFGS); raise method.l2."
            )
        own = (weight / spread).detach()
        return {"weight": own, "bias": (bias - own @ mean).detach()}
