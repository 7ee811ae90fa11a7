"""Compute mean, spread and paired gains of groups of runs: a record a group."""

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from smezo_cli.report.identity import flat
from smezo_cli.report.runs import Group, paired
from smezo_cli.report.series import differing_settings


def compared(found: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Yield what `smezo runs --mean` says of each group, compared with the first of them."""
    base: Group | None = None
    for group, name in zip(found, _names(found), strict=True):
        results = [run.result for run in group.runs]
        scores = [run.score for run in group.runs]
        values = [score for score in scores if score is not None]
        kept = set.intersection(*(set(run.outcomes()) for run in group.runs))
        ours = group.mean()
        record: dict[str, Any] = {
            "runs": name,
            "seeds": len(group.runs),
            "metric": group.runs[0].metric,
            "score": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(ours),
            "parts": _mean_of_parts(group),
        }
        for name in ("zero_shot", "calibrated"):
            # Each run less its own: prompt and offsets depend on its dev rows.
            gain = paired(ours, group.mean(name), group.sizes) if name in kept else (None, None)
            record[f"over_{name}"], record[f"over_{name}_se"] = gain
        aucs = [r["test"].get("auc") for r in results]
        record["auc"] = statistics.mean(aucs) if all(a is not None for a in aucs) else None
        record["train_seconds"] = statistics.mean(r["train_seconds"] for r in results)
        record["peak_GiB"] = max(r["peak_memory_bytes"] for r in results) / 2**30
        base = base or group
        same = base is not group and _same_rows(base, group)
        record["over_first"], record["over_first_se"] = (
            paired(ours, base.mean(), group.sizes) if same else (None, None)
        )
        yield record


def _names(found: Sequence[Group]) -> list[str]:
    """Return the names of groups; of those of one name, with the settings that differ."""
    settings = [
        {
            key: json.dumps(value, default=str)
            for key, value in flat(group.runs[0].settings)
            if key.rpartition(".")[2] not in ("seed", "data_seed")
        }
        for group in found
    ]
    names = []
    for mine, group in zip(settings, found, strict=True):
        alike = [of for of, other in zip(settings, found, strict=True) if other.name == group.name]
        names.append(" ".join([group.name, *differing_settings(mine, alike)]))
    return names


def _mean_of_parts(group: Group) -> dict[str, float] | None:
    """Return the mean score of each part of a mixture over the seeds; None of a single task."""
    each = [run.scores_of_parts for run in group.runs]
    return {name: statistics.mean(of[name] for of in each) for name in each[0]} or None


def _same_rows(one: Group, other: Group) -> bool:
    """Return whether both were tested on the same rows, so that these may be paired."""
    a, b = (g.runs[0].result.get("test_rows") for g in (one, other))
    return a is not None and a == b and len(one.mean()) == len(other.mean())
