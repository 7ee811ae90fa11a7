"""Turn scores and answers into the metric of each row, and refuse those that are not finite."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smezo_cli.scoring import metrics, squad
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.zo.step import NonFiniteLoss


class NonFiniteScore(NonFiniteLoss):
    """Say that a model's score of a row was NaN or infinite."""


def loss_weight(batch: Sequence[Candidates], name: str) -> int:
    """Return what a summed objective is divided by: the rows, or the tokens of a loss per token."""
    if name != "loss" or batch[0].kind == "classification":
        return len(batch)
    return sum(c.num_option[c.gold] for c in batch)


def outcomes(
    rows: Sequence[Candidates], scores: Tensor | None, texts: Sequence[str | None] = ()
) -> Tensor:
    """Return the metric of each row, float64 (n,).

    NaN where nothing is known to compare with, and where the scores say nothing; see
    :func:`are_scored`.

    Args:
        rows: of one kind.
        scores: (n, most candidates of a row), read in classification and choice.
        texts: in generation the answers.
    """
    if rows[0].kind == "generation":
        return of_answers(rows, texts, squad.f1)
    assert scores is not None
    right = torch.zeros(scores.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        right[i, list(row.correct)] = True
    scores = scores.cpu()
    found = metrics.correct(scores, right).double()
    is_known = torch.tensor([row.is_labelled for row in rows]) & are_scored(rows, scores)
    return torch.where(is_known, found, math.nan)


def are_scored(rows: Sequence[Candidates], scores: Tensor) -> Tensor:
    """Say whether the scores of a row can be compared and have a loss: bool (n,).

    A candidate at -inf is one that the model rules out, which is a score like others; not where it
    is the one that the loss is of, nor where all of a row are ruled out. NaN and inf never are.

    Args:
        rows: of one kind.
        scores: (n, most candidates of a row) on the CPU, -inf where a row has fewer.
    """
    has_any = torch.tensor([bool(row.full) for row in rows])
    gold = torch.tensor([row.gold for row in rows])
    of_gold = scores.gather(1, gold.clamp(min=0)[:, None])[:, 0]
    good = ~(scores.isnan() | (scores == math.inf)).any(1)
    good &= ~has_any | (scores.amax(1) > -math.inf)
    return good & ((gold < 0) | (of_gold > -math.inf))


def check_scores(
    rows: Sequence[Candidates], scores: Tensor, texts: Sequence[str | None] = ()
) -> None:
    """Raise NonFiniteScore for scores or answers that are not finite; see :func:`are_scored`.

    Args:
        rows: of one kind.
        scores: (n, most candidates of a row) on the CPU.
        texts: in generation the answers, None for a row whose answer cannot be told.

    Raises:
        NonFiniteScore: it names the first such row.
    """
    bad = (~are_scored(rows, scores)).nonzero()[:, 0].tolist()
    if bad:
        row, of_row = rows[bad[0]], scores[bad[0]]
        found = ", ".join(f"{score:g}" for score in of_row[: len(row.full) or 1].tolist())
        has_numbers = not (of_row.isnan() | (of_row == math.inf)).any()
        why = ": the right answer is ruled out, and its loss infinite" if has_numbers else ""
        raise NonFiniteScore(f"the scores of row {row.id} are {found}{why}")
    for row, text in zip(rows, texts, strict=False):
        if text is None:
            raise NonFiniteScore(f"the scores of the next token of row {row.id} are not finite")


def of_answers(
    rows: Sequence[Candidates],
    texts: Sequence[str | None],
    metric: Callable[[str, Sequence[str]], float],
) -> Tensor:
    """Return a metric of each row's answer, float64 (n,); nan without a reference or a text."""
    found = [
        metric(text, row.answers) if row.answers and text is not None else math.nan
        for text, row in zip(texts, rows, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)
