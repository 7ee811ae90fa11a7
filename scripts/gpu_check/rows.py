"""What a check finds, where it runs, and how long it may take."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

PASS, FAIL, SKIP = "pass", "fail", "skip"


@dataclass(frozen=True)
class Row:
    """One finding of a check.

    Attributes:
        name: what was checked.
        status: "pass", "fail" or "skip".
        numbers: what was measured, plain.
        note: why it failed or was skipped, or what limits it.
        seconds: since the row before.
    """

    name: str
    status: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        """Return it as a line of a table."""
        numbers = "  ".join(f"{key} {_short(value)}" for key, value in self.numbers.items())
        told = "; ".join(filter(None, (numbers, self.note)))
        return f"{self.status:<5}{self.seconds:7.1f} s  {self.name:<46} {told}".rstrip()


def row(name: str, is_right: bool, note: str = "", **numbers: Any) -> Row:
    """Return a row that passes or fails."""
    return Row(name, PASS if is_right else FAIL, numbers, note)


def skipped(name: str, why: str, **numbers: Any) -> Row:
    """Return a row that was not checked."""
    return Row(name, SKIP, numbers, why)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Place:
    """Where checks run.

    Attributes:
        device: with its number, if it is a CUDA device.
        tiny: the models are tiny, so that times and memory say nothing and have no bound.
        until: by time.monotonic(), when the check under way should end.
    """

    device: torch.device
    tiny: bool
    until: float

    @property
    def left(self) -> float:
        """Return how many seconds the check under way has left."""
        return self.until - time.monotonic()

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Check = Callable[[Place], Iterator[Row]]


def timed(name: str, check: Check, place: Place) -> Iterator[Row]:
    """Yield the rows of a check with their seconds; what it raises becomes a row that fails."""
    start = time.monotonic()
    rows = check(place)
    while True:
        try:
            found = next(rows, None)
            if found is None:
                return
        except Exception as error:  # of one check: the others are to run all the same
            first, *_ = str(error).strip().splitlines() or [""]
            found = row(name, False, f"{type(error).__name__}: {first[:300]}")
        now = time.monotonic()
        yield Row(found.name, found.status, found.numbers, found.note, round(now - start, 3))
        start = now


def write(path: Path, about: Mapping[str, Any], rows: list[Row]) -> None:
    """Write what was found so far as JSON."""
    found = {**about, "rows": [asdict(one) for one in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
