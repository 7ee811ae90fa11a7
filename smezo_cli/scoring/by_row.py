"""Cut a batch into forwards that tell the loss of each row, and which sequence is of which row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from smezo_cli.scoring.candidate_scores import Sharing, log_p
from smezo_cli.scoring.candidates import Candidates, check_family, shared_label_ids
from smezo_cli.scoring.objectives import outcomes
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.step import RowForward


def by_row(scorer: Scorer, batch: Sequence[Candidates], name: str = "loss") -> list[RowForward]:
    """Return forwards that give each row's part of :meth:`Scorer.objective_sum`.

    Where a row's loss takes several passes, or tokens that rows have in common, a forward is of
    that row alone.

    Args:
        scorer: computes the losses.
        batch: rows of one kind.
        name: of the objective.

    Raises:
        UserError: the prompt is not for this model.
        ValueError: a row has no label.
    """
    check_family(batch[0], scorer.model)
    if not all(c.gold >= 0 if name == "loss" else c.is_labelled for c in batch):
        raise ValueError(f"a row without a label has no {name}")
    is_lm = name == "loss" and batch[0].kind != "classification"
    if is_lm:
        batch = [c.gold_alone() for c in batch]
    is_one_each = is_lm or shared_label_ids(batch) is not None
    is_apart = name == "f1" or batch[0].base is not None
    if is_apart or not (is_one_each or scorer.batching.pads):
        groups = [[i] for i in range(len(batch))]
    else:
        groups = list(_groups(scorer, batch))
    found = []
    for rows in groups:
        each = [1 if is_one_each or len(rows) == 1 else len(batch[i].full) for i in rows]
        sequences = [i for i, count in zip(rows, each, strict=True) for _ in range(count)]
        losses = partial(_losses, scorer, [batch[i] for i in rows], name, is_lm=is_lm)
        found.append(RowForward(rows, sequences, losses))
    return found


def _groups(scorer: Scorer, batch: Sequence[Candidates]) -> Iterator[list[int]]:
    """Yield the numbers of the rows that share a forward, as losses of a whole batch do."""
    first = len(scorer.parts(batch)[0])
    order = list(range(len(batch)))
    if first < len(batch):  # the longest come first
        order.sort(key=lambda i: -batch[i].num_tokens)
    for part in (order[:first], order[first:]):
        for chosen in scorer.batching.groups([batch[i].width for i in part]) if part else ():
            yield [part[k] for k in chosen]


def _losses(scorer: Scorer, rows: Sequence[Candidates], name: str, *, is_lm: bool) -> Tensor:
    scorer.num_forwards += 1
    with _sequence_by_sequence(scorer) if len(rows) > 1 else nullcontext():
        if name == "f1":
            return scorer.objective_sum(rows, name)[None]
        if name == "accuracy":
            return 1 - outcomes(rows, scorer.scores(rows))
        if is_lm:
            with scorer.forward.computing():
                return -log_p(scorer.forward, rows, Sharing(scorer.batching))
        labels = torch.tensor([row.label for row in rows], device=scorer.forward.device)
        return F.cross_entropy(scorer.scores(rows), labels, reduction="none")


@contextmanager
def _sequence_by_sequence(scorer: Scorer) -> Iterator[None]:
    """Make every layer of the model see all sequences, in their order, within the context."""
    batching = scorer.batching
    scorer.batching, scorer.forward.keeps_rows = replace(batching, caches=False), True
    try:
        yield
    finally:
        scorer.batching, scorer.forward.keeps_rows = batching, False
