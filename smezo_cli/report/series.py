"""Group runs into the panels and series of a figure."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from smezo_cli.errors import UserError
from smezo_cli.report.identity import flat
from smezo_cli.report.runs import Run, draw_their_rows

MOST_BYTES = 1 << 28  # of metrics.jsonl; 20,000 steps have 3 MB

MOST_LINES = 7  # colours that can be told apart

_MOST_PANELS = 6

BINS = 50  # points of a line of training losses

NAMES = {
    "mezo": "MeZO",
    "mezo_lora": "MeZO-LoRA",
    "mezo_prefix": "MeZO-prefix",
    "mezo_adam": "MeZO-Adam",
    "adazeta": "AdaZeta",
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
    """Hold a line, or a group of points: at each x a value of every seed.

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
        """Return the mean over the seeds, per x."""
        return [statistics.mean(v) for v in self.values]

    @property
    def sd(self) -> list[float | None]:
        """Return the sample standard deviation over the seeds, per x; None of one seed."""
        return [statistics.stdev(v) if len(v) > 1 else None for v in self.values]

    @property
    def label(self) -> str:
        """Return the name and how many seeds there are."""
        counts = sorted({len(v) for v in self.values} or {0})
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{self.name} (n = {n})"


@dataclass
class Panel:
    """Hold one task and model: lines, and levels that hold for every x (name and value)."""

    title: str
    y: str
    series: list[Series] = field(default_factory=list)
    levels: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Figure:
    """Hold everything that is drawn; `notes` says what is left out."""

    kind: str
    x: str
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, panel: Panel) -> None:
        """Add a panel, unless it shows nothing.

        Raises:
            UserError: it has more lines than can be told apart.
        """
        if len(panel.series) > MOST_LINES and self.kind != "memory":
            names = ", ".join(s.name for s in panel.series)
            raise UserError(
                f"smezo plot {self.kind}: {panel.title} has {len(panel.series)} lines ({names}) "
                f"and {MOST_LINES} can be told apart; choose with KEY=VALUE, such as "
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
    place: int = 0  # among those of a figure; those of one place are in the order of the papers


def method_name(run: Run) -> str:
    """Return the name that the papers give a method: S-MeZO, R-MeZO, MeZO-LoRA, FT."""
    method = str(run.result["method"])
    node = run.config.get("method")
    node = node if isinstance(node, Mapping) else {}
    if "mask" not in node:
        return NAMES.get(method, method)
    name = _MASKS.get(str(node["mask"]), method)
    name += "-LoRA" if node.get("adapter") else ""
    return name + (" refreshed" if node.get("mask_refresh_every") else "")


def full_name(run: Run) -> str:
    """Return the name of the method, with the sparsity that was asked for."""
    sparsity = requested_sparsity(run)
    return method_name(run) + (f" {sparsity:g}" if sparsity else "")


def requested_sparsity(run: Run) -> float | None:
    """Return the sparsity that the settings asked for; None of a method that has none."""
    value = (run.result.get("sparsity") or {}).get("requested")
    return None if value is None else float(value)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the keys that a figure leaves free."""

    name: str
    runs: tuple[Run, ...]
    settings: Mapping[str, str]
    chosen: bool
    place: int

    def by_seed(self) -> dict[int, Run]:
        return {int(run.result["seed"]): run for run in self.runs}


def merge_seeds(sources: Iterable[Source], free: Sequence[str]) -> list[Group]:
    """Group runs that differ in the seed and the free keys alone; give the groups unlike names.

    Where the seed draws the rows, too (data_seed=${seed}), other rows are no difference.
    """
    buckets: dict[str, list[tuple[Run, Group]]] = {}
    for source in sources:
        for run in source.runs:
            settings = {
                key: json.dumps(value)
                for key, value in flat(run.settings)
                if key.rpartition(".")[2] not in ("seed", *free)
            }
            settings["train_rows"] = str(run.result.get("train_rows"))
            name = source.name or full_name(run)
            rest = {k: v for k, v in settings.items() if k not in _OF_SPLIT}
            key = json.dumps([name, source.chosen, rest], sort_keys=True)
            group = Group(name, (), settings, source.chosen, source.place)
            buckets.setdefault(key, []).append((run, group))
    found: dict[str, Group] = {}
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
        words = differing_settings(group.settings, alike)
        named.append(replace(group, name=" ".join([group.name, *words])))
    return sorted(named, key=lambda g: (g.place, natural(g.name)))


_OF_SPLIT = ("data_seed", "train_rows")


def natural(name: str) -> tuple[int, str]:
    """Return a key that sorts methods as the papers list them."""
    order = ("MeZO", "S-MeZO", "R-MeZO", "Large mask")
    stem = name.split(" ")[0] if not name.startswith("Large mask") else "Large mask"
    return order.index(stem) if stem in order else len(order), name


def differing_settings(mine: Mapping[str, str], alike: Sequence[Mapping[str, str]]) -> list[str]:
    """Return KEY=VALUE of settings that others have differently; no `method.lr` beside `lr`."""
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


def by_panel(sources: Sequence[Source], more: Callable[[Run], str]) -> dict[str, list[Source]]:
    """Return the sources by panel: one a task, model and what else must not be mixed.

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


def one_metric(sources: Sequence[Source]) -> str:
    """Return the metric of these sources, which all have the same."""
    return next(run.metric for source in sources for run in source.runs)


def check_rows(title: str, sources: Sequence[Source]) -> None:
    """Raise UserError if runs were tested on unlike rows; a table has checked that itself."""
    rows = {
        str(run.result.get("test_rows"))
        for source in sources
        for run in finished(source.runs)
        if not source.chosen
    }
    if len(rows) > 1:
        raise UserError(
            f"{title}: these runs were tested on {len(rows)} different sets of rows; choose one "
            f"with test_rows=X (there are: {', '.join(sorted(rows))})."
        )


def score(run: Run) -> float:
    """Return a run's test score in percent."""
    return 100 * float(run.result["test"][run.metric])


def finished(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that ended well."""
    return [run for run in runs if run.result["status"] == "done"]
