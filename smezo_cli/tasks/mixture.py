"""Join several tasks into a mixture: one task whose rows and prompts say which part they are of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smezo_cli.tasks.base import Prompt, Row, Task


@dataclass(frozen=True)
class Prompts:
    """Hold the prompt of each part of a mixture, by the name of the part."""

    parts: Mapping[str, Prompt]


def joined(cfg: Mapping[str, Any], parts: Mapping[str, Task]) -> Task:
    """Return the mixture of some tasks: their rows and prompts, part after part.

    Args:
        cfg: the task node of the mixture.
        parts: its tasks by name.
    """
    return Task(
        name=cfg["name"],
        kind=cfg["kind"],
        prompts=_prompts(parts, "prompts"),
        masked=_prompts(parts, "masked"),
        train=_rows(parts, "train"),
        dev=_rows(parts, "dev"),
        test=_rows(parts, "test"),
        classes=(),
        source="; ".join(
            f"{name}: {task.source} ({len(task.train)} train, {len(task.dev)} dev, "
            f"{len(task.test)} test)"
            for name, task in parts.items()
        ),
        fingerprint=" ".join(task.fingerprint for task in parts.values()).strip(),
        notes=tuple(f"{name}: {note}" for name, task in parts.items() for note in task.notes),
        parts=parts,
        weights=weights_of(cfg),
    )


def weights_of(cfg: Mapping[str, Any]) -> dict[str, float]:
    """Return how much the loss of each part of a task node counts; empty for a single task."""
    names = list(cfg.get("nodes") or ())
    given = cfg.get("weights") or [1.0] * len(names)
    return {name: weight / sum(given) for name, weight in zip(names, given, strict=True)}


def _prompts(parts: Mapping[str, Task], which: str) -> tuple[Prompt, ...]:
    return tuple(
        replace(prompt, part=name)
        for name, task in parts.items()
        for prompt in getattr(task, which)
    )


def _rows(parts: Mapping[str, Task], split: str) -> tuple[Row, ...]:
    return tuple(
        row._replace(id=f"{name}/{row.id}", part=name)
        for name, task in parts.items()
        for row in getattr(task, split)
    )
