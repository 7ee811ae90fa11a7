"""Hold what a racer has reached: its dev losses, and the seconds of training up to each."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mark:
    """An evaluation of dev.

    Attributes:
        step: after so many steps.
        seconds: of training up to there; evaluations are no part of them.
        loss: on dev.
        accuracy: on dev.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float


Curve = Sequence[Mark]


def lowest(curve: Curve) -> Mark:
    """Return the evaluation with the lowest dev loss; of equals the first."""
    return min(curve, key=lambda mark: (mark.loss, mark.step))


def reached(curve: Curve, loss: float) -> Mark | None:
    """Return the first evaluation whose dev loss is at most ``loss``; None if there is none."""
    return next((mark for mark in curve if mark.loss <= loss), None)


def of_metrics(lines: Iterable[Mapping[str, Any]]) -> list[Mark]:
    """Return the curve of a run from the records of its metrics.jsonl, in their order."""
    seconds, found = 0.0, list[Mark]()
    for line in lines:
        if "seconds" in line:
            seconds += line["seconds"]
        if "dev.loss" in line:
            found.append(Mark(line["step"], seconds, line["dev.loss"], line["dev.accuracy"]))
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all; marks become objects."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1, default=asdict) + "\n", encoding="utf-8")
    os.replace(new, path)


def read(marks: Iterable[Mapping[str, Any]]) -> list[Mark]:
    """Return the curve that :func:`write` wrote."""
    return [Mark(**mark) for mark in marks]
