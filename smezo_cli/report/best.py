"""Find the best settings of each task, model and method by what they came to on dev, over seeds."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smezo_cli.config.digest import NOT_IN_DIGEST, digest
from smezo_cli.report.identity import dotted
from smezo_cli.report.runs import Group, Run, draw_their_rows, groups

# Of the task, what the rows of dev follow from, beside the data and data_seed.
_DRAWN_BY = ("num_train", "num_dev", "num_test", "num_per_class", "data_dir", "data")

# The seed, and values that stand in the settings a second time.
_NOT_SHOWN = ("seed", "method.lr", "method.eps", "method.sparsity", "method.optimizer.lr")

_TOLD_ALONE = ("lr", "eps", "sparsity", "steps")


@dataclass(frozen=True)
class Best:
    """Hold the best settings of a task, model and method.

    Attributes:
        group: the runs with these settings, one a seed.
        settings: those in which other runs of this task, model and method differ; if there are no
            others, lr, eps, sparsity and steps.
        compared: so many settings, itself included.
        diverged: seeds of these settings that diverged.
        missing: seeds of these settings whose runs failed or are not finished.
        num_seeds: the fewest and the most runs that a mean of the settings compared is of.
    """

    group: Group
    settings: Mapping[str, Any]
    compared: int
    diverged: tuple[int, ...]
    missing: tuple[int, ...]
    num_seeds: tuple[int, int]


@dataclass(frozen=True)
class _Tried:
    """Hold the runs with the same settings: those that have a value, one a seed, and the others."""

    group: Group
    diverged: tuple[Run, ...]
    missing: tuple[Run, ...]

    @property
    def all(self) -> tuple[Run, ...]:
        return (*self.group.runs, *self.diverged, *self.missing)


def on_dev(run: Run, key: str) -> float:
    """Return the "loss", or the metric of that name, of the weights tested; NaN if it has none."""
    value = ((run.result.get("dev") or {}).get("best") or {}).get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def best(runs: Sequence[Run], by: str) -> list[Best]:
    """Return the best of each task, model and method, in the order of their first runs.

    Test rows have no say in it. What was evaluated on other rows of dev is not compared. Settings
    with a seed that diverged come behind all others.

    Args:
        runs: of any status.
        by: "loss": the lowest mean over the seeds; "metric": the highest.
    """
    kinds: dict[tuple[str, ...], list[_Tried]] = {}
    for tried in _tried(runs, by):
        result = tried.group.runs[0].result
        kind = tuple(str(result.get(key)) for key in ("task", "model", "method"))
        kinds.setdefault(kind, []).append(tried)
    return [found for members in kinds.values() for found in _best_of(members, by)]


def _tried(runs: Sequence[Run], by: str) -> Iterator[_Tried]:
    """Yield the settings of which at least one run has a value, whatever folder it is in."""
    has_value = [run.result["status"] == "done" and math.isfinite(_value(run, by)) for run in runs]
    others: dict[str, list[Run]] = {}
    for run, has in zip(runs, has_value, strict=True):
        if not has:
            others.setdefault(_asked(run), []).append(run)
    with_value = [run for run, has in zip(runs, has_value, strict=True) if has]
    for group in groups(with_value, across_folders=True):
        each = {run.result["seed"] for run in group.runs}
        left: dict[int, Run] = {}
        for run in others.get(_asked(group.runs[0]), ()):
            seed = run.config.get("seed")
            if not isinstance(seed, int) or seed in each or not _draws_as(run, group):
                continue
            if seed not in left or _has_diverged(run):
                left[seed] = run
        diverged = tuple(run for run in left.values() if _has_diverged(run))
        missing = tuple(run for run in left.values() if not _has_diverged(run))
        yield _Tried(group, diverged, missing)


def _asked(run: Run) -> str:
    """Return what runs that differ in their seed alone have in common, finished or not."""
    return f"{digest(dict(run.settings) | {'seed': 0, 'data_seed': 0})} {run.config.get('steps')}"


def _has_diverged(run: Run) -> bool:
    return bool(run.result["status"] == "diverged")


def _draws_as(run: Run, group: Group) -> bool:
    """Return whether a run draws its rows as those of a group, and is tested on the same."""
    first = group.runs[0]
    drawn = [run.config.get("data_seed"), first.config.get("data_seed")]
    own = drawn == [run.config.get("seed"), first.result["seed"]]
    return (own or drawn[0] == drawn[1]) and (
        run.result.get("test_rows") in (None, first.result.get("test_rows"))
    )


def _best_of(members: Sequence[_Tried], by: str) -> Iterator[Best]:
    """Yield the best of the settings of one task, model and method; one for each rows of dev."""
    settings = [_that_count(tried.group.runs[0].settings) for tried in members]
    keys = dict.fromkeys(key for each in settings for key in each)
    told = [key for key in keys if _differ(key, settings)] if len(members) > 1 else _TOLD_ALONE
    rows = [_rows_of_dev(tried) for tried in members]
    ranks = [
        (not tried.diverged, statistics.mean(_value(run, by) for run in tried.group.runs))
        for tried in members
    ]
    for same in dict.fromkeys(rows):
        rivals = [at for at, of in enumerate(rows) if of == same]
        at = max(rivals, key=ranks.__getitem__)
        shown = {key: settings[at][key] for key in told if settings[at].get(key) is not None}
        found = members[at]
        sizes = [len(members[rival].group.runs) for rival in rivals]
        diverged, missing = (
            tuple(sorted(run.config["seed"] for run in of))
            for of in (found.diverged, found.missing)
        )
        num_seeds = min(sizes), max(sizes)
        yield Best(found.group, shown, len(rivals), diverged, missing, num_seeds)


def _value(run: Run, by: str) -> float:
    """Return what is the best where it is the highest."""
    return -on_dev(run, "loss") if by == "loss" else on_dev(run, run.metric)


def _rows_of_dev(tried: _Tried) -> str:
    """Return what the rows of dev follow from: equal for settings that may be compared."""
    run = tried.group.runs[0]
    task = run.config.get("task") or {}
    each = [(of.config.get("data_seed"), of.config.get("seed")) for of in tried.all]
    own = draw_their_rows(tried.group.runs) or (
        len(each) > 1 == len(tried.group.runs) and all(data == seed for data, seed in each)
    )
    seed = "own" if own else run.config.get("data_seed")
    data = [run.result.get(key) for key in ("data_fingerprint", "test_rows", "metric")]
    return json.dumps([seed, *data, *(task.get(key) for key in _DRAWN_BY)], default=str)


def _that_count(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their dotted keys, without those that cannot change a result."""
    return {
        key: value
        for key, value in dotted(config)
        if key.partition(".")[0] not in NOT_IN_DIGEST and key not in _NOT_SHOWN and value != {}
    }


def _differ(key: str, each: Sequence[Mapping[str, Any]]) -> bool:
    values = {json.dumps(settings.get(key), default=str) for settings in each}
    return len(values) > 1 and key != "data_seed"


def mean_and_sd(values: Iterator[float]) -> tuple[float, float | None]:
    """Return the mean of numbers, and their standard deviation where there are several."""
    numbers = list(values)
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
