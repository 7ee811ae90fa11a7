"""Compute numbers that change over a run: a factor of ``lr``, or a straight line."""

import math
from collections.abc import Callable

# Of the share of the run that is done, in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}


def lr_factor(schedule: str, step: int, steps: int, warmup_steps: int = 0) -> float:
    """Return the factor at a step (from 0) of a run of ``steps``.

    The first ``warmup_steps`` steps rise evenly to the factor 1; the schedule spans the rest.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)  # the first step would be lost at 0
    return SCHEDULES[schedule]((step - warmup_steps) / (steps - warmup_steps))


def between(first: float, last: float, step: int, start: int, end: int) -> float:
    """Return ``first`` before step ``start``, ``last`` from ``end`` on, and the line in between."""
    if not start <= step < end:
        return first if step < start else last
    return first + (last - first) * (step - start) / (end - start)
