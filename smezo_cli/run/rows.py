"""Encode the rows of a run under its prompt, and say what of them does not reach the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from smezo_cli.errors import UserError
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.tasks import Task
from smezo_cli.tasks.base import one_class


@dataclass(frozen=True)
class Rows:
    """The rows of a run as tokens, those of train that are short enough."""

    train: list[Candidates]
    dev: list[Candidates]
    test: list[Candidates]


def short_enough(rows: list[Candidates], longest: int | None) -> list[Candidates]:
    """Return the rows of at most so many tokens; None: all."""
    return [row for row in rows if longest is None or row.width <= longest]


def encode(run: Run, loaded: Loaded) -> Rows:
    """Return all rows under the chosen prompt.

    Raises:
        UserError: no training row is short enough.
    """
    task, prompt = loaded.task, loaded.prompts[run.notes["prompt"]]
    train, dev, test = (loaded.encode(rows, prompt) for rows in (task.train, task.dev, task.test))
    rows = Rows(_leave_out_long(run, task, train), dev, test)
    count_cut(run, task.kind, rows)
    return rows


def _leave_out_long(run: Run, task: Task, train: list[Candidates]) -> list[Candidates]:
    longest = run.settings.task["max_train_tokens"]
    if longest is None:
        return train
    kept = short_enough(train, longest)
    if not kept:
        raise UserError(
            f"task.max_train_tokens={longest} leaves out all {len(train)} rows; raise it."
        )
    run.say(
        f"  {len(train) - len(kept)} of {len(train)} training rows are longer than "
        f"{longest} tokens and left out"
    )
    if len(kept) < len(train) and (note := one_class_left(task, kept)):
        run.say(f"  note    {note}")
    return kept


def one_class_left(task: Task, train: Sequence[Candidates]) -> str:
    """Return a sentence if the training rows kept are of one class alone; else an empty string."""
    if not one_class([c.label for c in train]) or one_class([r.label for r in task.train]):
        return ""
    return (
        f"one class alone in train (the {len(train)} rows that are short enough: label "
        f"{task.classes[train[0].label]}): there is nothing to tell apart"
    )


def count_cut(run: Run, kind: str, rows: Rows) -> None:
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
    if kind == "classification" and not all(c.shares_prefix for c in every):
        run.say("  label words of more than one token: a forward scores one candidate")
