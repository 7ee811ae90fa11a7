"""Measure which rows may share a forward with a model, by scoring a few together and alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from smezo_cli.scoring.batching import ALONE, ONE_LENGTH, Batching, Found
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.forward import Forward
from smezo_cli.scoring.generation import next_tokens
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.scoring.tokens import num_rows

MOST_ROWS = 4  # that are measured; a forward each alone, and one or two together
# Largest difference that is put down to rounding, as a part of the largest score: some ten times
# what other shapes of matrix products make of the logits of a small model.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Products of a large model round more: how much shows where a row is scored beside its own copy.
NOISE_FACTOR = 8
COLUMNS = 1024  # entries of the vocabulary whose logits are compared


def pick(rows: Sequence[Candidates], most_tokens: int) -> list[Candidates]:
    """Return the rows to measure: the longest, the shortest, some between, two of one length.

    Two candidates of each row are kept: they are computed whole, even where a run would compute
    once what all candidates have in common.

    Args:
        rows: encoded.
        most_tokens: padded, in one forward; two rows are taken whatever they hold.
    """
    ordered = sorted(_with_two_candidates(rows), key=lambda row: row.width)
    chosen = [ordered[0], ordered[-1]] if len(ordered) > 1 else list(ordered)
    like = [row for row in ordered[1:-1] if row.width == chosen[-1].width]
    between = ordered[len(ordered) // 2]
    for row in (*like[:1], between, *ordered[1:-1]):
        together = (*chosen, row)
        tokens = max(one.width * max(1, len(one.full)) for one in together) * len(together)
        is_there = any(row is one for one in chosen)
        if len(chosen) < MOST_ROWS and tokens <= most_tokens and not is_there:
            chosen.append(row)
    return chosen


def _with_two_candidates(rows: Sequence[Candidates]) -> list[Candidates]:
    """Return rows with their first candidate and the one whose length differs most from its."""

    def unlike(row: Candidates) -> int:
        first, *others = row.num_option
        return 1 + max(range(len(others)), key=lambda k: abs(others[k] - first), default=-1)

    def with_two(row: Candidates, k: int) -> Candidates:
        kept = (0, k) if k else (0,)
        base = None if row.base is None else with_two(row.base, k)
        full, options = tuple(row.full[i] for i in kept), tuple(row.num_option[i] for i in kept)
        return replace(
            row, full=full, num_option=options, label=-1, right=frozenset(), words=(), base=base
        )

    classes = next((unlike(row) for row in rows if row.full), 0)  # the same for all rows
    return [
        with_two(row, classes if row.kind == "classification" else unlike(row)) if row.full else row
        for row in rows
    ]


@torch.no_grad()
def measure(scorer: Scorer, rows: Sequence[Candidates]) -> Found:
    """Return the batching by which these rows are scored, and answered, as they are alone.

    Args:
        scorer: of the model as it is, with what it holds of demonstrations.
        rows: some of unlike length; labels are not read.
    """
    scorer.model.eval()
    before = Found(scorer.batching, scorer.batching_of_answers)
    try:
        scores, difference = _scores(scorer, rows)
        answers = Batching()
        if rows[0].kind == "generation":
            replace(before, scores=scores).to(scorer)
            answers, of_answers = _answers(scorer, rows)
            difference = max(difference, of_answers)
            Found(scores, answers).to(scorer)
            with scorer.holding(rows):
                behind_held = scorer.generate(rows)
            if behind_held != scorer.generate(rows):
                scores = replace(scores, caches=False)
    finally:
        before.to(scorer)
    return Found(scores, answers, difference)


def _scores(scorer: Scorer, rows: Sequence[Candidates]) -> tuple[Batching, float]:
    rows = [row for row in rows if row.full]
    if not rows:
        return Batching(), 0.0

    def scored(batching: Batching, rows: Sequence[Candidates] = rows) -> Tensor:
        scorer.batching = batching
        found = scorer.scores(rows).float()
        # Those of classification are defined up to a constant of the row.
        return found.log_softmax(1) if rows[0].kind == "classification" else found

    alone = [scored(ALONE, [row])[0] for row in rows]
    longest = max(range(len(rows)), key=lambda i: rows[i].width)
    copies = scored(ONE_LENGTH, [rows[longest]] * 2)[:1]
    wanted = _padded(alone)
    limit = _limit(scorer, wanted, _difference(copies, alone[longest][None]))
    padded = _difference(scored(Batching(caches=False)), wanted)
    if padded > limit:
        within = _difference(scored(ONE_LENGTH), wanted) <= limit
        return ONE_LENGTH if within else ALONE, padded
    scorer.batching = Batching()  # what is held is held only where caches may be
    with _always_caching(scorer), scorer.holding(rows):
        cached = _difference(scored(Batching()), wanted)
        if scorer.holds_common:  # of a batch it is used only where it saves tokens for every row
            each = _padded([scored(Batching(), [row])[0] for row in rows])
            cached = max(cached, _difference(each, wanted))
    return Batching(caches=cached <= limit), max(padded, cached)


def _answers(scorer: Scorer, rows: Sequence[Candidates]) -> tuple[Batching, float]:
    contexts = [row.context for row in rows]
    num = max(row.max_new_tokens for row in rows)
    columns = _some_of_vocabulary(scorer.model)
    largest = 0.0
    for batching in (Batching(), Batching(pads=False), ONE_LENGTH):
        differs = False
        for chosen, logits, tokens in _continued(scorer.forward, contexts, batching, num, columns):
            for k, i in enumerate(chosen):
                ids = (*contexts[i], *tokens[k].tolist()[:-1])
                wanted = copies = _logits_alone(scorer.forward, ids, num, columns)
                if k == 0:
                    copies = _logits_alone(scorer.forward, ids, num, columns, copies=2)
                limit = _limit(scorer, wanted, _difference(copies, wanted))
                difference = _difference(logits[k], wanted)
                largest, differs = max(largest, difference), differs or difference > limit
        if not differs:
            return batching, largest
    return ALONE, largest


def _continued(
    forward: Forward,
    contexts: Sequence[Sequence[int]],
    batching: Batching,
    num: int,
    columns: Sequence[int],
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Continue contexts by the most probable token, so many times, whatever it is.

    Yields:
        For the contexts of each forward: their numbers, logits (contexts, num, columns) and tokens
        (contexts, num).
    """
    for chosen in batching.groups(list(map(len, contexts))):
        with forward.computing():
            steps = next_tokens(
                forward.model,
                forward.pad_id,
                [contexts[i] for i in chosen],
                caches=batching.caches,
            )
            found = [(logits[:, columns].float(), best) for logits, best in islice(steps, num)]
        logits, tokens = (torch.stack(of, dim=1) for of in zip(*found, strict=True))
        yield chosen, logits, tokens


def _logits_alone(
    forward: Forward, ids: Sequence[int], num: int, columns: Sequence[int], copies: int = 1
) -> Tensor:
    """Return logits (num, columns) at the last places of one sequence, by one forward over it.

    Args:
        forward: runs the model.
        ids: the tokens of the sequence.
        num: how many places.
        columns: the tokens of the vocabulary whose logits are wanted.
        copies: how often the sequence stands in the batch; what the first gives is returned.
    """
    places = [(0, p) for p in range(len(ids) - num, len(ids))]
    with forward.computing():
        found = forward.logits_at(
            places, columns, input_ids=forward.padded([ids] * copies), use_cache=False
        )
    return found.float()


def _some_of_vocabulary(model: nn.Module) -> list[int]:
    """Return at most `COLUMNS` numbers of tokens, evenly spread."""
    size = num_rows(model) or 1
    return list(range(0, size, -(-size // COLUMNS)))


def _limit(scorer: Scorer, wanted: Tensor, noise: float) -> float:
    dtype = scorer.compute_dtype or next(scorer.model.parameters()).dtype
    largest = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else 0.0
    return max(ROUNDING.get(dtype, 0.0) * float(largest), NOISE_FACTOR * noise)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference; infinite if an entry is finite in only one of the two."""
    both = found.isfinite() & wanted.isfinite()
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return float("inf")
    return float((found[both] - wanted[both]).abs().max()) if both.any() else 0.0


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows as (rows, longest), padded with -inf."""
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=-float("inf")
    )


@contextmanager
def _always_caching(scorer: Scorer) -> Iterator[None]:
    scorer.always_caches = True
    try:
        yield
    finally:
        scorer.always_caches = False
