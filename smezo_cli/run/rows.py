"""Encode the rows of a run under its prompt, and say what of them does not reach the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smezo_cli.errors import UserError
from smezo_cli.machine.waiting import waiting
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.parts import by_part
from smezo_cli.tasks import Task
from smezo_cli.tasks.base import one_class


@dataclass(frozen=True)
class Rows:
    """Hold the rows of a run as tokens, those of train that are short enough."""

    train: list[Candidates]
    dev: list[Candidates]
    test: list[Candidates]


def short_enough(rows: Sequence[Candidates], loaded: Loaded) -> list[Candidates]:
    """Return the training rows that are not longer than the settings of their task allow."""
    return [row for row in rows if row.width <= _longest(loaded, row.part)]


def _longest(loaded: Loaded, part: str) -> float:
    longest: int | None = loaded.node_of(part)["max_train_tokens"]
    return math.inf if longest is None else longest


def encode(run: Run, loaded: Loaded) -> Rows:
    """Return all rows under the chosen prompt.

    Raises:
        UserError: no training row is short enough.
    """
    task, prompt = loaded.task, loaded.prompt(run.notes["prompt"])
    with waiting("reading rows as tokens"):
        train, dev, test = (loaded.encode(of, prompt) for of in (task.train, task.dev, task.test))
    kept = [row for part, rows in by_part(train).items() for row in _kept(run, loaded, part, rows)]
    rows = Rows(kept, dev, test)
    count_cut(run, rows)
    return rows


def _kept(run: Run, loaded: Loaded, part: str, train: list[Candidates]) -> list[Candidates]:
    """Return the training rows of a task, or of a part, that are short enough."""
    longest = _longest(loaded, part)
    if longest == math.inf:
        return train
    kept = short_enough(train, loaded)
    of_part = f"{part}: " if part else ""
    if not kept:
        raise UserError(
            f"{of_part}task.max_train_tokens={longest} leaves out all {len(train)} rows; raise it."
        )
    run.say(
        f"  {of_part}{len(train) - len(kept)} of {len(train)} training rows are longer than "
        f"{longest} tokens and left out"
    )
    if len(kept) < len(train):
        for note in one_class_left(loaded.task, kept):
            run.say(f"  note    {note}")
    return kept


def one_class_left(task: Task, train: Sequence[Candidates]) -> list[str]:
    """Return a sentence for a task, or a part, whose training rows kept are of one class alone."""
    found = []
    for part, kept in by_part(train).items():
        own = task.parts[part] if part else task
        labels, before = [c.label for c in kept], [row.label for row in own.train]
        if own.classes and one_class(labels) and not one_class(before):
            found.append(
                f"{f'{part}: ' if part else ''}one class alone in train (the {len(kept)} rows that "
                f"are short enough: label {own.classes[kept[0].label]}): there is nothing to tell "
                "apart"
            )
    return found


def count_cut(run: Run, rows: Rows) -> None:
    """Say how many prompts are cut, or scored in another way than most; note how many are cut."""
    every = [*rows.train, *rows.dev, *rows.test]
    truncated = sum(c.truncated for c in every)
    run.notes["truncated"] = truncated
    if truncated:
        run.say(
            f"  {truncated} of {len(every)} prompts are longer than "
            f"{run.settings.model['max_length']} tokens: cut on the left"
        )
    merged = sum(c.num_merged > 0 for c in every)
    if merged:
        run.say(
            f"  in {merged} of {len(every)} prompts the tokenizer merges a candidate with its "
            "context: scored from the first token that differs"
        )
    if not all(c.shares_prefix for c in every if c.kind == "classification"):
        run.say("  label words of more than one token: a forward scores one candidate")
