"""Make curves along the steps of runs, from their metrics.jsonl."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.files import bounded
from smezo_cli.report.runs import Run, one_a_seed, repeats
from smezo_cli.report.series import (
    BINS,
    MOST_BYTES,
    NAMES,
    Figure,
    Panel,
    Series,
    Source,
    by_panel,
    merge_seeds,
    method_name,
    one_metric,
)

X_OF_CURVES = {
    "steps": "step",
    "forwards": "forward passes",
    "seconds": "training time (s, mean over seeds)",
}

Y_OF_CURVES = ("accuracy", "loss", "train_loss")


def read_metrics(run: Run) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]], int]:
    """Return steps and evaluations of metrics.jsonl by step, and how many lines are damaged."""
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    bad = 0
    for line in bounded.read_text(run.path / "metrics.jsonl", MOST_BYTES).splitlines():
        try:
            record = json.loads(line)
            step = record["step"]
            if not isinstance(step, int) or not isinstance(record.get("projected_grad", []), list):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            bad += 1
            continue
        (steps if "seconds" in record else evaluations)[step] = record
    return steps, evaluations, bad


def _number(value: object) -> float:
    """Return a number as a float, and NaN for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return math.nan


def _line(run: Run, y: str, x: str, every: int, notes: list[str]) -> dict[int, tuple[float, float]]:
    """Return (x, y) by step for one run; values that are not finite are left out and noted."""
    if run.collected is not None:
        if (y, x) != (f"dev.{run.metric}", "steps"):
            raise UserError(
                f"{run.path} is a collected result, which has dev {run.metric} by step and nothing "
                "else along a run: leave --x and --y out, or draw the runs themselves."
            )
        return {step: (step, 100 * value) for step, value in run.collected}
    steps, evaluations, bad = read_metrics(run)
    if bad:
        notes.append(f"{run.path}: {bad} lines of metrics.jsonl cannot be read and are left out.")
    place, total = {0: 0.0}, 0.0
    # Lines of older versions have no number of their own.
    whole = [_number(run.result.get(key)) for key in ("num_forwards", "step")]
    per_step = whole[0] / whole[1] if whole[1] else math.nan
    for step in sorted(steps):
        record = steps[step]
        if x == "steps":
            total = step
        elif x == "forwards":
            total += _number(record.get("num_forwards", per_step))
        else:
            total += _number(record["seconds"])
        place[step] = total
    points: dict[int, float] = {}
    if y == "train_loss":
        for end in range(every, max(steps, default=0) + 1, every):
            losses = [
                _number(steps.get(k, {}).get("loss")) for k in range(end - every + 1, end + 1)
            ]
            points[end] = statistics.fmean(losses)
    else:
        scale = 1 if y == "dev.loss" else 100
        points = {
            step: scale * _number(found[y]) for step, found in evaluations.items() if y in found
        }
        sparsity = (run.result.get("sparsity") or {}).get("realised")
        if y == "active_share" and points and sparsity is not None:
            points[0] = 100 * (1 - float(sparsity))
    kept = {
        step: (place[step], points[step])
        for step in sorted(points)
        if step in place and math.isfinite(points[step]) and math.isfinite(place[step])
    }
    if lost := len(points) - len(kept):
        notes.append(f"{run.path}: {lost} of {len(points)} values are not finite and left out.")
    return kept


def curve(sources: Sequence[Source], y: str = "accuracy", x: str = "steps") -> Figure:
    """Draw accuracy or loss (of dev, or train_loss) against steps, forwards or seconds."""
    figure = Figure("curve", X_OF_CURVES[x])
    _add_curves(figure, sources, y, x)
    if x == "forwards" and any(method_name(r) in _BACKWARD for s in sources for r in s.runs):
        figure.notes.append("The backward passes of FT, LoRA and prefix tuning are not counted.")
    return figure


_BACKWARD = {NAMES[name] for name in ("adamw", "sgd", "lora", "prefix")}


def active(sources: Sequence[Source], x: str = "steps") -> Figure:
    """Draw the share of weights that are perturbed against steps, forwards or seconds."""
    figure = Figure("active", X_OF_CURVES[x])
    _add_curves(figure, sources, "active_share", x)
    return figure


def _add_curves(figure: Figure, sources: Sequence[Source], y: str, x: str) -> None:
    for title, members in by_panel(sources, lambda _: "").items():
        metric = one_metric(members)
        key, label, every = f"dev.{metric}", f"dev {metric} (%)", 1
        if y == "loss":
            key, label = "dev.loss", "dev loss"
        elif y == "train_loss":
            most = max(int(r.result.get("step") or 0) for s in members for r in s.runs)
            every = max(1, -(-most // BINS))
            key, label = y, _train_loss(title, members)
            label += f" (mean of {every} steps)" if every > 1 else ""
        elif y == "active_share":
            key, label = y, "active share (%)"
        panel = Panel(title, label)
        for group in merge_seeds(members, ("eval_every", "keep", "full_save_every")):
            runs, repeated = one_a_seed(group.runs)
            figure.notes += repeats(f"{title}, {group.name}", repeated)
            lines = [_line(run, key, x, every, figure.notes) for run in runs]
            common = [step for step in lines[0] if all(step in line for line in lines)]
            if any(len(line) != len(common) for line in lines):
                seen = len({step for line in lines for step in line})
                figure.notes.append(
                    f"{title}, {group.name}: the seeds have {len(common)} of {seen} evaluations "
                    "in common, and these alone are drawn."
                )
            panel.series.append(
                Series(
                    group.name,
                    tuple(statistics.fmean(line[step][0] for line in lines) for step in common),
                    tuple(tuple(line[step][1] for line in lines) for step in common),
                )
            )
        figure.notes += [
            f"{title}, {series.name}: there is no {label} to draw."
            for series in panel.series
            if not series.x
        ]
        panel.series = [s for s in panel.series if s.x]
        figure.add(panel)


def _train_loss(title: str, sources: Sequence[Source]) -> str:
    """Return what the steps of runs lowered, as the label of an axis.

    Raises:
        UserError: they lowered different objectives, which have no axis in common.
    """
    lowered = {str(r.result.get("objective") or "loss") for s in sources for r in s.runs}
    if len(lowered) > 1:
        raise UserError(
            f"{title}: the steps of these runs lowered {' and '.join(sorted(lowered))}, which are "
            "not drawn on one axis; choose with method.objective=X, or draw --y loss (of dev)."
        )
    (objective,) = lowered
    return "train loss" if objective == "loss" else f"1 - train {objective}"
