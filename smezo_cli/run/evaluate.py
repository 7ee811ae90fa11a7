"""Evaluate rows with a model: in batches, on from an earlier stop, shared by ranks."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smezo_cli.config.settings import Settings
from smezo_cli.machine.out_of_memory import SHORTER, refusing_out_of_memory
from smezo_cli.machine.stop import Stopped
from smezo_cli.run.console import Bar
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.ranks import Ranks
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.mixture import MixedEvaluation
from smezo_cli.scoring.objectives import check_scores
from smezo_cli.scoring.parts import by_part
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.partial_scores import Part
from smezo_cli.store.saved import tensors_digest
from smezo_cli.tasks import Prompt


def evaluate(
    scorer: Scorer,
    rows: Sequence[Candidates],
    bar: Bar,
    stopped: Callable[[], bool],
    team: Ranks | None = None,
    part: Part | None = None,
) -> Evaluation:
    """Score every row; for a generation task, let the model answer too.

    Ranks share the batches, which are cut as for one process, and every rank gets all scores.

    Args:
        scorer: of the model.
        rows: of one kind.
        bar: moves with them.
        stopped: asked after each batch.
        team: the ranks that share the batches.
        part: what is known already, which is not computed again; receives what is found.

    Raises:
        Stopped: between two batches, if this rank or another was asked to stop.
        NonFiniteScore: a score is not finite; several ranks all raise it after the last batch.
        UserError: the memory is too small for one row.
    """
    scorer.model.eval()
    part = Part(len(rows)) if part is None else part
    first, every = (0, 1) if team is None else (team.rank, team.size)
    answers = rows[0].kind == "generation"
    known = [set(part.scored), set(part.answered)]
    scores = part.table(max(1, *(len(row.full) for row in rows)))
    texts = part.texts
    is_stopping = False
    with bar, refusing_out_of_memory("for an evaluation", SHORTER), scorer.holding(rows):
        batches: Iterator[tuple[list[int], Any]] = scorer.score_all(rows, first, every, known[0])
        if answers:
            batches = itertools.chain(batches, scorer.generate_all(rows, first, every, known[1]))
        while True:
            chosen, batch = next(batches, ([], ()))
            of_batch = [rows[i] for i in chosen]
            if isinstance(batch, Tensor):
                if team is None:
                    check_scores(of_batch, batch)
                scores[chosen] = -math.inf
                scores[chosen, : batch.shape[1]] = batch
                part.scored.update(chosen)
            elif chosen:
                if team is None:
                    check_scores(of_batch, scores[chosen], batch)
                texts |= zip(chosen, batch, strict=True)
                part.answered.update(chosen)
            if chosen and answers != isinstance(batch, Tensor):  # answering takes the time
                bar.step(len(chosen) * every)
            if team is not None:
                # By what all ranks hear: one that stopped by itself would leave the others waiting.
                goes_on = team.goes_on(bool(chosen))
                is_stopping = team.stop_asked
            else:
                goes_on = bool(chosen)
                is_stopping = goes_on and stopped()
            if is_stopping or not goes_on:
                break
        bases = torch.zeros(len(rows)) if rows[0].kind == "choice" and rows[0].base else None
        if bases is not None and not is_stopping:
            for chosen, sums in scorer.log_p_of_bases(rows, first, every):
                bases[chosen] = sums
                if team is None and (is_stopping := stopped()):
                    break
    if team is not None:
        _put_together(part, team, known, answers)
    if is_stopping:
        raise Stopped
    if team is not None and bases is not None:
        bases = team.add_tensor(bases)
    answered = [texts[i] for i in range(len(rows))] if answers else ()
    return Evaluation(rows, part.table(0), answered, bases)


def in_parts(
    rows: Sequence[Candidates],
    weights: Mapping[str, float],
    one: Callable[[Sequence[Candidates], str], Evaluation],
) -> Evaluation:
    """Evaluate the parts of a mixture one after the other, each as a task of its own.

    Args:
        rows: of a split, part after part; of a single task they are evaluated as they are.
        weights: of the losses of the parts.
        one: evaluates rows of one task; it is given the name of the part, too.
    """
    parts = by_part(rows)
    if "" in parts:
        return one(rows, "")
    return MixedEvaluation.of({name: one(of, name) for name, of in parts.items()}, weights)


def lots(
    settings: Settings, prompts: Sequence[Prompt], split: str, rows: Sequence[Candidates]
) -> list[slice]:
    """Return the lots in which the rows of a task or a part are evaluated, each on its own.

    Dev is cut in two where its first rows decide which prompts are asked on the others, and then
    each time, so that its batches are always the same.

    Args:
        settings: of the run.
        prompts: of which the run chose one, or one of each part.
        split: of the rows.
        rows: of one task, or of one part.
    """
    first = settings.prompt_rows
    is_cut = split == "dev" and first is not None and first < len(rows)
    if not is_cut or sum(prompt.part == rows[0].part for prompt in prompts) == 1:
        return [slice(0, len(rows))]
    return [slice(0, first), slice(first, len(rows))]


def scores_follow_from(
    loaded: Loaded, batching: Mapping[str, Any], step: int, as_it_came: bool
) -> dict[str, Any]:
    """Return what partial scores follow from beside weights and rows, as plain JSON.

    Args:
        loaded: holds the model.
        batching: which rows share a forward.
        step: that the weights are of.
        as_it_came: the model computes without its adapter.
    """
    s, probe = loaded.settings, loaded.scorer.probe
    return {
        "step": step,
        "as_it_came": as_it_came,
        "probe": None if probe is None else tensors_digest(probe),
        "batching": batching,
        "machine": [str(loaded.device), s.dtype, s.compute_dtype],
    }


def _put_together(part: Part, team: Ranks, known: Sequence[set[int]], answers: bool) -> None:
    """Give every rank what all have found; rank 0 adds what was known before."""
    # What was known before is rank 0's, which adds it.
    of_another = known if team.rank else [set[int](), set[int]()]
    own = part.scored - of_another[0], part.answered - of_another[1]
    found = torch.zeros(2, part.num_rows)
    for k, of in enumerate(own):
        found[k, sorted(of)] = 1
    found = team.add_tensor(found)
    part.scored, part.answered = (set(of.nonzero()[:, 0].tolist()) for of in found)
    part.scores = team.add_tensor(part.table(0))  # of the rows of others there are zeros
    if answers:
        mine = {i: part.texts[i] for i in own[1]}
        for content in team.gather(json.dumps(mine).encode()):
            part.texts |= {int(i): text for i, text in json.loads(content).items()}


def features(
    scorer: Scorer, rows: Sequence[Candidates], stopped: Callable[[], bool], part: Part
) -> Tensor:
    """Return the hidden states of rows, float64 (rows, size); `part` as in :func:`evaluate`.

    Raises:
        Stopped: between two batches, if asked to stop.
    """
    scorer.model.eval()
    for chosen, batch in scorer.features_all(rows, set(part.scored)):
        part.table(batch.shape[1], torch.float64)[chosen] = batch
        part.scored.update(chosen)
        part.num_forwards += 1
        if stopped():
            raise Stopped
    return part.table(0)
