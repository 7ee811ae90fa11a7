"""Find the best settings of each task, model and method by what they came to on dev, over seeds."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smezo_cli.config.digest import NOT_IN_DIGEST
from smezo_cli.report.runs import Group, Run, draw_their_rows, groups

# Of the task, what the rows of dev follow from, beside the data and data_seed.
_DRAWN_BY = ("num_train", "num_dev", "num_test", "num_per_class", "data_dir", "data")

# Names of runs, and values that stand in the settings a second time.
_NOT_SHOWN = (*NOT_IN_DIGEST, "seed", "method.lr", "method.eps", "method.sparsity")

_TOLD_ALONE = ("lr", "eps", "sparsity", "steps")


@dataclass(frozen=True)
class Best:
    """Hold the best settings of a task, model and method.

    Attributes:
        group: the runs with these settings, one a seed.
        settings: those in which other runs of this task, model and method differ; if there are no
            others, lr, eps, sparsity and steps.
        compared: so many settings, itself included.
    """

    group: Group
    settings: Mapping[str, Any]
    compared: int


def on_dev(run: Run, key: str) -> float:
    """Return the "loss", or the metric of that name, of the weights tested; NaN if it has none."""
    value = ((run.result.get("dev") or {}).get("best") or {}).get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def best(runs: Sequence[Run], by: str) -> list[Best]:
    """Return the best of each task, model and method, in the order of their first runs.

    Test rows have no say in it. What was evaluated on other rows of dev is not compared.

    Args:
        runs: finished.
        by: "loss": the lowest mean over the seeds; "metric": the highest.
    """
    kinds: dict[tuple[str, ...], list[Group]] = {}
    for group in groups([run for run in runs if math.isfinite(_value(run, by))]):
        result = group.runs[0].result
        kind = tuple(str(result.get(key)) for key in ("task", "model", "method"))
        kinds.setdefault(kind, []).append(group)
    return [found for members in kinds.values() for found in _best_of(members, by)]


def _best_of(members: Sequence[Group], by: str) -> Iterator[Best]:
    """Yield the best of the settings of one task, model and method; one for each rows of dev."""
    settings = [_flat(group.runs[0].config) for group in members]
    keys = dict.fromkeys(key for each in settings for key in each)
    told = [key for key in keys if _differ(key, settings)] if len(members) > 1 else _TOLD_ALONE
    rows = [_rows_of_dev(group) for group in members]
    means = [statistics.mean(_value(run, by) for run in group.runs) for group in members]
    for same in dict.fromkeys(rows):
        rivals = [at for at, of in enumerate(rows) if of == same]
        at = max(rivals, key=means.__getitem__)
        shown = {key: settings[at][key] for key in told if settings[at].get(key) is not None}
        yield Best(members[at], shown, len(rivals))


def _value(run: Run, by: str) -> float:
    """Return what is the best where it is the highest."""
    return -on_dev(run, "loss") if by == "loss" else on_dev(run, run.metric)


def _rows_of_dev(group: Group) -> str:
    """Return what the rows of dev follow from: equal for settings that may be compared."""
    run = group.runs[0]
    task = run.config.get("task") or {}
    seed = "own" if draw_their_rows(group.runs) else run.config.get("data_seed")
    data = [run.result.get(key) for key in ("data_fingerprint", "test_rows", "metric")]
    return json.dumps([seed, *data, *(task.get(key) for key in _DRAWN_BY)], default=str)


def _flat(node: object, prefix: str = "") -> dict[str, Any]:
    """Return settings by their dotted keys, without those that cannot change a result."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if name not in _NOT_SHOWN:
            found |= _flat(value, name)
    return found


def _differ(key: str, each: Sequence[Mapping[str, Any]]) -> bool:
    values = {json.dumps(settings.get(key), default=str) for settings in each}
    return len(values) > 1 and key != "data_seed"


def mean_and_sd(values: Iterator[float]) -> tuple[float, float | None]:
    """Return the mean of numbers, and their standard deviation where there are several."""
    numbers = list(values)
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
