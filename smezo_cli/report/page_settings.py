"""Compare the settings and the environment of runs for a report: what they share, what differs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smezo_cli.errors import redacted_tree
from smezo_cli.report.identity import dotted
from smezo_cli.report.runs import Run

_MOST_NAMES = 4


@dataclass(frozen=True)
class Compared:
    """Hold the settings of several columns: KEY and value if all have it, else a value a column."""

    columns: tuple[str, ...]
    shared: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]


def settings(columns: Sequence[tuple[str, Sequence[Run]]]) -> Compared:
    """Compare the settings of groups of runs, each with a name; "" where a group lacks a key."""
    found = [[_texts(run) for run in runs] for _, runs in columns]
    keys = sorted({key for group in found for of in group for key in of})
    keys.sort(key=lambda key: (key.count("."), key))
    shared, differing = [], []
    for key in keys:
        if _repeats(key, found):
            continue
        cells = tuple(
            ", ".join(dict.fromkeys(of[key] for of in group if key in of)) for group in found
        )
        is_same = len({of.get(key) for group in found for of in group}) == 1
        if is_same:
            shared.append((key, cells[0]))
        else:
            differing.append((key, cells))
    return Compared(tuple(name for name, _ in columns), tuple(shared), tuple(differing))


def _repeats(key: str, found: Sequence[Sequence[Mapping[str, str]]]) -> bool:
    """Return whether a key of the method only takes up the one at the top: method.lr=${lr}."""
    group, _, last = key.rpartition(".")
    if group != "method":
        return False
    return all(of.get(key, of.get(last)) == of.get(last) for runs in found for of in runs)


def _texts(run: Run) -> dict[str, str]:
    return {key: text(value) for key, value in dotted(redacted_tree(dict(run.settings)))}


def text(value: object) -> str:
    """Return a value as a line of a settings file has it."""
    if isinstance(value, str) and value:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


_OF_MACHINE = (
    *("device", "dtype", "compute_dtype", "attention", "executor", "passes", "noise"),
    *("world_size", "onednn_layers"),
)


def environment(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return versions and devices, each with its values and the runs that have it.

    A value that all runs have stands alone, beside "".
    """
    each = []
    for run in runs:
        versions = run.result.get("versions")
        found = {key: text(value) for key, value in (versions or {}).items()}
        found |= {key: text(run.result[key]) for key in _OF_MACHINE if run.result.get(key)}
        each.append(found)
    lines = []
    for key in dict.fromkeys(key for found in each for key in found):
        by_value: dict[str, list[str]] = {}
        for run, found in zip(runs, each, strict=True):
            by_value.setdefault(found.get(key, "not recorded"), []).append(run.path.name)
        alone = len(by_value) == 1
        lines.append((key, [(v, "" if alone else _names(of)) for v, of in by_value.items()]))
    return lines


def _names(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
