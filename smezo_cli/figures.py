"""What the papers' figures show, taken from run folders: the numbers of `smezo plot`, undrawn.

Seeds are merged, and nothing else: runs that differ in a setting are lines of their own. Nothing is
interpolated, smoothed away or counted twice; what is left out is said. No torch, no matplotlib.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.files import bounded
from smezo_cli.results import Run, draw_their_rows
from smezo_cli.table import flat

_MOST_BYTES = 1 << 28  # of metrics.jsonl; 20,000 steps have 3 MB
_MOST_LINES = 7  # colours that everybody tells apart
_MOST_PANELS = 6
_BINS = 50  # points of a line of training losses

X_OF_CURVES = {
    "steps": "step",
    "forwards": "forward passes",
    "seconds": "training time (s, mean over seeds)",
}
Y_OF_CURVES = ("accuracy", "loss", "train_loss")
_NAMES = {
    "mezo": "MeZO",
    "mezo_lora": "MeZO-LoRA",
    "mezo_prefix": "MeZO-prefix",
    "mezo_adam": "MeZO-Adam",
    "adamw": "FT",
    "sgd": "FT (SGD)",
    "lora": "LoRA",
    "prefix": "Prefix",
    "zero_shot": "Zero-shot",
    "icl": "ICL",
    "linear_probe": "LP",
}
_MASKS = {"small": "S-MeZO", "random": "R-MeZO", "large": "Large mask", "none": "MeZO"}


@dataclass(frozen=True)
class Series:
    """A line, or a group of points: at each x a value of every seed.

    Attributes:
        values: per x, one a seed, in the unit of the panel.
        absent: x where every run diverged.
    """

    name: str
    x: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    absent: tuple[float, ...] = ()

    @property
    def mean(self) -> list[float]:
        """Over the seeds, per x."""
        return [statistics.mean(v) for v in self.values]

    @property
    def sd(self) -> list[float | None]:
        """Sample standard deviation over the seeds, per x; None of one seed."""
        return [statistics.stdev(v) if len(v) > 1 else None for v in self.values]

    @property
    def label(self) -> str:
        """The name and how many seeds there are."""
        counts = sorted({len(v) for v in self.values} or {0})
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{self.name} (n = {n})"


@dataclass
class Panel:
    """One task and model: lines, and levels that hold for every x (name and value)."""

    title: str
    y: str
    series: list[Series] = field(default_factory=list)
    levels: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Figure:
    """All that is drawn; `notes` says what is not."""

    kind: str
    x: str
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, panel: Panel) -> None:
        """Take a panel that shows something.

        Raises:
            UserError: it has more lines than can be told apart.
        """
        if len(panel.series) > _MOST_LINES and self.kind != "memory":
            names = ", ".join(s.name for s in panel.series)
            raise UserError(
                f"smezo plot {self.kind}: {panel.title} has {len(panel.series)} lines ({names}) "
                f"and {_MOST_LINES} can be told apart; choose with KEY=VALUE, such as "
                "sparsity=0.75 or method=mezo, or with --row."
            )
        if any(s.x or s.absent for s in panel.series):
            self.panels.append(panel)


@dataclass(frozen=True)
class Source:
    """Runs of one row of a table, or of any kind (no name): what a figure is made of."""

    runs: tuple[Run, ...]
    name: str = ""
    chosen: bool = False  # a table has chosen its settings on dev


def method_name(run: Run) -> str:
    """As the papers say it: S-MeZO, R-MeZO, MeZO-LoRA, FT."""
    method = str(run.result["method"])
    node = run.config.get("method")
    node = node if isinstance(node, Mapping) else {}
    if "mask" not in node:
        return _NAMES.get(method, method)
    name = _MASKS.get(str(node["mask"]), method)
    name += "-LoRA" if node.get("adapter") else ""
    return name + (" refreshed" if node.get("mask_refresh_every") else "")


def _full_name(run: Run) -> str:
    sparsity = _sparsity(run)
    return method_name(run) + (f" {sparsity:g}" if sparsity else "")


def _sparsity(run: Run) -> float | None:
    value = (run.result.get("sparsity") or {}).get("requested")
    return None if value is None else float(value)


# --- groups ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Runs that differ in nothing but the keys that a figure leaves free."""

    name: str
    runs: tuple[Run, ...]
    settings: Mapping[str, str]
    chosen: bool

    def by_seed(self) -> dict[int, Run]:
        return {int(run.result["seed"]): run for run in self.runs}


def _groups(sources: Iterable[Source], free: Sequence[str]) -> list[_Group]:
    """Runs that differ in the seed and the free keys alone, named so that names differ.

    Where the seed draws the rows, too (data_seed=${seed}), these are no difference of their own.
    """
    buckets: dict[str, list[tuple[Run, _Group]]] = {}
    for source in sources:
        for run in source.runs:
            settings = {
                key: json.dumps(value)
                for key, value in flat(run.config)
                if key.rpartition(".")[2] not in ("seed", *free)
            }
            settings["train_rows"] = str(run.result.get("train_rows"))
            name = source.name or _full_name(run)
            rest = {k: v for k, v in settings.items() if k not in _OF_SPLIT}
            key = json.dumps([name, source.chosen, rest], sort_keys=True)
            buckets.setdefault(key, []).append((run, _Group(name, (), settings, source.chosen)))
    found: dict[str, _Group] = {}
    for key, members in buckets.items():
        follows = draw_their_rows([run for run, _ in members])
        for run, group in members:
            split = [] if follows else [group.settings.get(k) for k in _OF_SPLIT]
            old = found.setdefault(f"{key} {split}", group)
            if run.path not in [r.path for r in old.runs]:
                found[f"{key} {split}"] = replace(old, runs=(*old.runs, run))
    groups = list(found.values())
    named = []
    for group in groups:
        alike = [g.settings for g in groups if g.name == group.name]
        words = _differing(group.settings, alike)
        named.append(replace(group, name=" ".join([group.name, *words])))
    return sorted(named, key=lambda g: _natural(g.name))


_OF_SPLIT = ("data_seed", "train_rows")


def _natural(name: str) -> tuple[int, str]:
    order = ("MeZO", "S-MeZO", "R-MeZO", "Large mask")
    stem = name.split(" ")[0] if not name.startswith("Large mask") else "Large mask"
    return order.index(stem) if stem in order else len(order), name


def _differing(mine: Mapping[str, str], alike: Sequence[Mapping[str, str]]) -> list[str]:
    """key=value where some others have another value; `method.lr` not beside `lr`."""
    keys = {key for other in alike for key in (*mine, *other) if mine.get(key) != other.get(key)}
    return [
        f"{key.rpartition('.')[2]}={_word(mine[key])}"
        for key in sorted(keys)
        if key in mine and ("." not in key or key.rpartition(".")[2] not in keys)
    ]


def _word(value: str) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return value.strip('"')


def _panels(sources: Sequence[Source], more: Callable[[Run], str]) -> dict[str, list[Source]]:
    """Sources by task, model and what else must not be mixed, as titles.

    Raises:
        UserError: there are more than a page holds.
    """
    found: dict[str, list[Source]] = {}
    for source in sources:
        for title in dict.fromkeys(_title(run, more) for run in source.runs):
            runs = tuple(run for run in source.runs if _title(run, more) == title)
            found.setdefault(title, []).append(replace(source, runs=runs))
    if len(found) > _MOST_PANELS:
        raise UserError(
            f"these runs are of {len(found)} tasks and models ({'; '.join(found)}) and "
            f"{_MOST_PANELS} panels fit a figure; choose with KEY=VALUE, such as task=rte."
        )
    return dict(sorted(found.items()))


def _title(run: Run, more: Callable[[Run], str]) -> str:
    words = [str(run.result["task"]), str(run.result["model"]), more(run)]
    return ", ".join(word for word in words if word)


def _one_metric(sources: Sequence[Source]) -> str:
    return next(run.metric for source in sources for run in source.runs)


def _check_rows(title: str, sources: Sequence[Source]) -> None:
    """Refuse runs of other test rows; a table has done so, for each of its splits."""
    rows = {
        str(run.result.get("test_rows"))
        for source in sources
        for run in _done(source.runs)
        if not source.chosen
    }
    if len(rows) > 1:
        raise UserError(
            f"{title}: these runs were tested on {len(rows)} different sets of rows; choose one "
            f"with test_rows=X (there are: {', '.join(sorted(rows))})."
        )


# --- curves ----------------------------------------------------------------------------------


def _records(run: Run) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]], int]:
    """Steps and looks of metrics.jsonl by step, and how many lines are damaged."""
    steps: dict[int, dict[str, Any]] = {}
    looks: dict[int, dict[str, Any]] = {}
    bad = 0
    for line in bounded.read_text(run.path / "metrics.jsonl", _MOST_BYTES).splitlines():
        try:
            record = json.loads(line)
            step = record["step"]
            if not isinstance(step, int) or not isinstance(record.get("projected_grad", []), list):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            bad += 1
            continue
        (steps if "seconds" in record else looks)[step] = record
    return steps, looks, bad


def _number(value: object) -> float:
    """A number, or NaN for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return math.nan


def _line(run: Run, y: str, x: str, every: int, notes: list[str]) -> dict[int, tuple[float, float]]:
    """Step to (x, y) of one run; what is not finite is left out and said."""
    steps, looks, bad = _records(run)
    if bad:
        notes.append(f"{run.path}: {bad} lines of metrics.jsonl cannot be read and are left out.")
    place, total = {0: 0.0}, 0.0
    for step in sorted(steps):
        record = steps[step]
        if x == "steps":
            total = step
        elif x == "forwards":
            total += 2 * len(record.get("projected_grad", ())) or 1
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
        points = {step: scale * _number(look[y]) for step, look in looks.items() if y in look}
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
    """Accuracy or loss (dev, or train_loss) against steps, forwards or seconds."""
    figure = Figure("curve", X_OF_CURVES[x])
    _add_curves(figure, sources, y, x)
    if x == "forwards" and any(method_name(r) in _BACKWARD for s in sources for r in s.runs):
        figure.notes.append("The backward passes of FT, LoRA and prefix tuning are not counted.")
    return figure


_BACKWARD = {_NAMES[name] for name in ("adamw", "sgd", "lora", "prefix")}


def active(sources: Sequence[Source], x: str = "steps") -> Figure:
    """The share of weights that are perturbed, against steps, forwards or seconds."""
    figure = Figure("active", X_OF_CURVES[x])
    _add_curves(figure, sources, "active_share", x)
    return figure


def _add_curves(figure: Figure, sources: Sequence[Source], y: str, x: str) -> None:
    for title, members in _panels(sources, lambda _: "").items():
        metric = _one_metric(members)
        key, label, every = f"dev.{metric}", f"dev {metric} (%)", 1
        if y == "loss":
            key, label = "dev.loss", "dev loss"
        elif y == "train_loss":
            most = max(int(r.result.get("step") or 0) for s in members for r in s.runs)
            every = max(1, -(-most // _BINS))
            key, label = y, _train_loss(title, members)
            label += f" (mean of {every} steps)" if every > 1 else ""
        elif y == "active_share":
            key, label = y, "active share (%)"
        panel = Panel(title, label)
        for group in _groups(members, ("eval_every", "keep", "full_save_every")):
            lines = [_line(run, key, x, every, figure.notes) for run in group.runs]
            common = [step for step in lines[0] if all(step in line for line in lines)]
            if any(len(line) != len(common) for line in lines):
                seen = len({step for line in lines for step in line})
                figure.notes.append(
                    f"{title}, {group.name}: the seeds share {len(common)} of {seen} looks, "
                    "and these alone are drawn."
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
    """What the steps of runs lowered, in words.

    Raises:
        UserError: they lowered different figures, which have no axis in common.
    """
    lowered = {str(r.result.get("objective") or "loss") for s in sources for r in s.runs}
    if len(lowered) > 1:
        raise UserError(
            f"{title}: the steps of these runs lowered {' and '.join(sorted(lowered))}, which are "
            "not drawn on one axis; choose with method.objective=X, or draw --y loss (of dev)."
        )
    (objective,) = lowered
    return "train loss" if objective == "loss" else f"1 - train {objective}"


# --- scores ----------------------------------------------------------------------------------


def _score(run: Run) -> float:
    return 100 * float(run.result["test"][run.metric])


def _done(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.result["status"] == "done"]


def sparsity(sources: Sequence[Source]) -> Figure:
    """Test accuracy against sparsity; MeZO stands at 0, zero-shot is a level.

    Of several learning rates the one with the best dev accuracy of the first seed is taken, as
    :mod:`smezo_cli.table` does.

    Raises:
        UserError: runs of one point differ in more than lr, or were tested on other rows.
    """
    figure = Figure("sparsity", "sparsity (fraction of weights not perturbed)")
    for title, members in _panels(sources, lambda _: "").items():
        runs = [run for source in members for run in _done(source.runs)]
        _check_rows(title, members)
        panel = Panel(title, f"test {_one_metric(members)} (%)")
        points: dict[str, dict[float, list[_Group]]] = {}
        for source in members:
            at: dict[tuple[str, float], list[Run]] = {}
            for run in _done(source.runs):
                place = 0.0 if method_name(run).startswith("MeZO") else _sparsity(run)
                if place is None:
                    words = f"{title}: {method_name(run)} has no sparsity and is left out."
                    figure.notes += [words] if words not in figure.notes else []
                else:
                    at.setdefault((method_name(run), place), []).append(run)
            for (name, place), found in at.items():
                groups = _groups([Source(tuple(found), name, source.chosen)], ())
                points.setdefault(name, {}).setdefault(place, []).extend(groups)
        for name in sorted(points, key=_natural):
            best = {
                place: _best(f"{title}, {name} at sparsity {place:g}", groups, figure.notes)
                for place, groups in sorted(points[name].items())
            }
            values = tuple(tuple(_score(r) for r in group.runs) for group in best.values())
            panel.series.append(Series(name, tuple(best), values))
        zero = {
            100 * float(z[run.metric])
            for run in runs
            if isinstance((z := run.result.get("zero_shot") or {}).get(run.metric), int | float)
        }
        if len(zero) == 1:
            panel.levels.append(("zero-shot", zero.pop()))
        elif zero:
            low, high = min(zero), max(zero)
            panel.levels.append(("zero-shot (mean)", statistics.fmean(zero)))
            figure.notes.append(f"{title}: zero-shot differs, {low:.1f} to {high:.1f}.")
        figure.add(panel)
    return figure


def _best(where: str, groups: Sequence[_Group], notes: list[str]) -> _Group:
    """The group that dev prefers, of groups that differ in lr."""
    if len(groups) == 1:
        return groups[0]
    differing = sorted(
        {
            word.partition("=")[0]
            for g in groups
            for word in _differing(g.settings, [other.settings for other in groups])
        }
        - {"lr"}
    )
    if differing or any(g.chosen for g in groups):
        raise UserError(
            f"{where}: these runs differ in {', '.join(differing) or 'lr'} and are not mixed; "
            f"choose with KEY=VALUE, such as {differing[0] if differing else 'lr'}=X."
        )
    shared = set.intersection(*({*g.by_seed()} for g in groups))
    if not shared:
        raise UserError(
            f"{where}: no seed was run with every lr, so that dev cannot choose one; "
            "choose with lr=X."
        )
    seed = min(shared)

    def on_dev(group: _Group) -> tuple[float, float]:
        run = group.by_seed()[seed]
        best = (run.result.get("dev") or {}).get("best") or {}
        return best.get(run.metric, 0.0), -best.get("loss", 0.0)

    chosen = max(groups, key=on_dev)
    rates = ", ".join(f"{g.runs[0].result['lr']:g}" for g in groups)
    lr = chosen.runs[0].result["lr"]
    notes.append(f"{where}: lr={lr:g} of {rates}, by dev of seed {seed}.")
    return chosen


def lr(sources: Sequence[Source]) -> Figure:
    """Test accuracy against the learning rate; where all seeds diverged it is marked."""
    figure = Figure("lr", "learning rate")
    for title, members in _panels(sources, lambda _: "").items():
        _check_rows(title, members)
        panel = Panel(title, f"test {_one_metric(members)} (%)")
        for group in _groups(members, ("lr",)):
            at: dict[float, list[Run]] = {}
            for run in group.runs:
                if run.result.get("lr") is not None:
                    at.setdefault(float(run.result["lr"]), []).append(run)
            if not at:
                figure.notes.append(f"{title}: {group.name} has no lr and is left out.")
                continue
            done = {rate: _done(at[rate]) for rate in sorted(at)}
            panel.series.append(
                Series(
                    group.name,
                    tuple(rate for rate, kept in done.items() if kept),
                    tuple(tuple(_score(r) for r in kept) for kept in done.values() if kept),
                    tuple(rate for rate, kept in done.items() if not kept),
                )
            )
        figure.add(panel)
    return figure


def memory(sources: Sequence[Source]) -> Figure:
    """Peak memory by method in GB (1e9 bytes): of the allocator on CUDA, resident elsewhere."""
    figure = Figure("memory", "peak memory (GB, the largest of the runs)")

    def device(run: Run) -> str:
        return str(run.result.get("device") or "").partition(":")[0]

    for title, members in _panels(sources, device).items():
        panel = Panel(title, "")
        for group in _groups(members, ("lr", "eval_every", "steps", "lr_schedule")):
            peaks = tuple(float(run.result["peak_memory_bytes"]) / 1e9 for run in _done(group.runs))
            if peaks:
                panel.series.append(Series(group.name, (0.0,), (peaks,)))
        figure.add(panel)
    return figure
