"""Make what a report shows of each task and model: results, differences, curves, memory, time."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.report import curves, page_chart, page_settings
from smezo_cli.report.compared import compared
from smezo_cli.report.identity import flat
from smezo_cli.report.page_chart import LineChart, RowChart, Value
from smezo_cli.report.page_samples import Samples, samples
from smezo_cli.report.runs import Group, Run, groups, paired, repeats
from smezo_cli.report.series import (
    MOST_LINES,
    Source,
    differing_settings,
    full_name,
)


@dataclass(frozen=True)
class Entry:
    """Hold runs that differ in their seed alone, a short name for them, and their numbers.

    Attributes:
        record: as `smezo runs --mean --json` has it.
        step_seconds: seconds of a step, one a seed; none of a method without steps.
    """

    group: Group
    label: str
    record: Mapping[str, Any]
    step_seconds: tuple[float, ...]

    @property
    def first(self) -> Run:
        """Return the run of the first seed."""
        return self.group.runs[0]

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of the runs."""
        return [run.result["seed"] for run in self.group.runs]

    @property
    def tested(self) -> list[int]:
        """Return the step of each run's tested weights."""
        best = [(run.result.get("dev") or {}).get("best") or {} for run in self.group.runs]
        return [of["step"] for of in best if of.get("step") is not None]

    @property
    def seconds_in_words(self) -> str:
        """Return the seconds of a step, with their spread over several seeds."""
        if not self.step_seconds:
            return ""
        mean, sd = page_chart.mean_and_spread(self.step_seconds)
        return f"{mean:.3g}" + (f" ± {sd:.2g}" if len(self.step_seconds) > 1 else "")

    @property
    def zero_shot(self) -> float | None:
        """Return the mean zero-shot metric; None where a run has none."""
        return _mean([(r.result.get("zero_shot") or {}).get(r.metric) for r in self.group.runs])

    @property
    def forwards(self) -> float | None:
        """Return the mean number of forwards; None where a run has none recorded."""
        return _mean([run.result.get("num_forwards") for run in self.group.runs])


def _mean(values: Sequence[object]) -> float | None:
    """Return the mean of finite numbers; None if one is none."""
    found = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return statistics.mean(found) if len(found) == len(values) else None


@dataclass
class Curves:
    """Hold the charts of a few lines, and the lines' legend."""

    charts: list[LineChart]

    @property
    def legend(self) -> list[page_chart.Line]:
        """Return each line once."""
        found = {line.name: line for chart in self.charts for line in chart.lines}
        return list(found.values())


@dataclass
class Block:
    """Hold what is shown of runs of one task and model that were tested on the same rows."""

    title: str
    entries: list[Entry]
    notes: list[str] = field(default_factory=list)
    scores: RowChart | None = None
    pairs: list[list[tuple[float, float] | None]] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    peaks: RowChart | None = None
    seconds: RowChart | None = None
    settings: page_settings.Compared | None = None
    samples: list[Samples] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """Return the name of the metric that counts."""
        return str(self.entries[0].record["metric"])

    @property
    def parts(self) -> list[str]:
        """Return the names of the parts of a mixture."""
        return list(self.entries[0].record.get("parts") or ())

    @property
    def has_pairs(self) -> bool:
        """Return whether any two of its entries were tested on rows known to be the same."""
        return any(pair is not None for row in self.pairs for pair in row)

    @property
    def prompts(self) -> list[Mapping[str, Any]]:
        """Return the different prompts that were asked."""
        found: list[Mapping[str, Any]] = []
        for run in (run for entry in self.entries for run in entry.group.runs):
            asked = run.result.get("prompt")
            for prompt in asked if isinstance(asked, list) else [asked]:
                kept = {k: (prompt or {}).get(k) for k in ("part", "template", "labels", "option")}
                if prompt and kept not in found:
                    found.append(kept)
        return found

    def said(self, key: str) -> list[str]:
        """Return the different values that results of these runs have under a key."""
        values = [run.result.get(key) for entry in self.entries for run in entry.group.runs]
        each = [v for of in values for v in (of if isinstance(of, list) else [of])]
        return list(dict.fromkeys(page_settings.text(v) for v in each if v))


def blocks(runs: Sequence[Run], names: Mapping[Path, str]) -> tuple[list[Block], list[str]]:
    """Return a block for each task, model and set of test rows, and lines on runs left out.

    Args:
        runs: finished ones.
        names: of the runs that a table took, the names of its rows.
    """
    sound, notes = _sound(runs)
    by_title: dict[tuple[str, str], list[Group]] = {}
    for group in groups(sound):
        notes += repeats(group.name, group.repeated)
        first = group.runs[0].result
        try:
            rows = str(first.get("test_rows") or f"not recorded, {len(group.mean())}")
        except UserError as error:
            notes.append(str(error))
            continue
        by_title.setdefault((f"{first['task']}, {first['model']}", rows), []).append(group)
    found = []
    for (title, rows), members in sorted(by_title.items()):
        alone = sum(title == other for other, _ in by_title) == 1
        block = Block(title if alone else f"{title} (test rows {rows})", [])
        labels = _labels(members, names)
        for group, record, label in zip(members, compared(members), labels, strict=True):
            block.entries.append(Entry(group, label, record, _step_seconds(group)))
        _fill(block)
        found.append(block)
    return found, notes


def _sound(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Return the runs whose outcomes can be read and paired, and a line for each other one."""
    sound, notes, alike = list[Run](), list[str](), dict[object, object]()
    for run in runs:
        key = (
            run.result["task"],
            run.result["model"],
            str(run.result.get("test_rows") or run.path),
        )
        try:
            mine = (len(run.outcomes()["test"]), run.metric, Group((run,)).sizes)
            if _mean([run.score, run.result["train_seconds"]]) is None:
                raise UserError(f"{run.path}/result.json has numbers that are not finite.")
            if alike.setdefault(key, mine) != mine:
                raise UserError(
                    f"{run.path} has outcomes of {mine[0]} test rows that are not those of other "
                    "runs on the same rows: give its command again."
                )
            sound.append(run)
        except UserError as error:
            notes.append(str(error))
        except (KeyError, TypeError, ValueError):
            notes.append(f"{run.path}/result.json is damaged: give its command again.")
    return sound, notes


def _labels(members: Sequence[Group], names: Mapping[Path, str]) -> list[str]:
    """Return a name for each group, unlike those of the others: the method and what differs.

    What differs from any other runs of the same method is told, though the sparsity, which stands
    in the name of the method, may tell them apart already.
    """
    settings = [_settings(group.runs[0]) for group in members]
    rows = [names.get(group.runs[0].path) for group in members]
    bases = [row or full_name(g.runs[0]) for row, g in zip(rows, members, strict=True)]
    kinds = [row or str(g.runs[0].result["method"]) for row, g in zip(rows, members, strict=True)]
    found = []
    for mine, base, row, kind in zip(settings, bases, rows, kinds, strict=True):
        alike = [of for of, other in zip(settings, kinds, strict=True) if other == kind]
        words = [_cut(word) for word in differing_settings(mine, alike)]
        words.sort(key=lambda word: not word.startswith(_TOLD_FIRST))
        if row is None:
            words = [word for word in words if not word.startswith(_TOLD_BY_FULL_NAME)]
        found.append(" ".join([base, *words]))
    folders = [group.runs[0].path.parent.name for group in members]
    for words in (folders, [str(k + 1) for k in range(len(members))]):
        found = [
            f"{label} ({word})" if found.count(label) > 1 else label
            for label, word in zip(found, words, strict=True)
        ]
    return found


def _cut(word: str) -> str:
    return word if len(word) <= _MOST_LETTERS else word[: _MOST_LETTERS - 1] + "…"


_MOST_LETTERS = 40  # of a setting in the name of runs

_TOLD_BY_FULL_NAME = ("sparsity=", "mask=")
_TOLD_FIRST = ("lr=", "eps=")  # where a chart cuts a long name, these still tell runs apart


def _settings(run: Run) -> dict[str, str]:
    kept = ((key, page_settings.text(value)) for key, value in flat(run.settings))
    return {key: value for key, value in kept if key.rpartition(".")[2] not in _OF_SEED}


_OF_SEED = ("seed", "data_seed")


def _step_seconds(group: Group) -> tuple[float, ...]:
    made = [(run.result["train_seconds"], run.result.get("step") or 0) for run in group.runs]
    return tuple(seconds / steps for seconds, steps in made if steps)


def _fill(block: Block) -> None:
    block.scores = _scores(block)
    block.pairs = _pairs(block.entries)
    block.curves = _curves(block)
    gib = [(e, [float(r.result["peak_memory_bytes"]) / 2**30 for r in e.group.runs])
           for e in block.entries]  # fmt: skip
    peaks = [
        Value(e.label, max(each), 0.0, (), f"{max(each):.2f} GiB, the largest of {_runs(each)}")
        for e, each in gib
    ]
    block.peaks = page_chart.bars(peaks, "peak memory (GiB)", f"Peak memory: {block.title}")
    seconds = []
    for entry in block.entries:
        if each := entry.step_seconds:
            mean, sd = page_chart.mean_and_spread(each)
            says = f"{entry.seconds_in_words} s, {_runs(each)}"
            seconds.append(Value(entry.label, mean, sd, each, says))
    if seconds:
        block.seconds = page_chart.bars(
            seconds, "seconds a step", f"Seconds of a step: {block.title}"
        )
    columns = [(entry.label, entry.group.runs) for entry in block.entries]
    block.settings = page_settings.settings(columns)
    for entry in block.entries:
        if entry.first.result["method"] != "zero_shot":
            block.samples.append(samples(entry.first, entry.label))


def _runs(each: Sequence[float]) -> str:
    return f"{len(each)} run{'s' * (len(each) != 1)}"


def _scores(block: Block) -> RowChart:
    values = []
    for entry in block.entries:
        record, runs = entry.record, entry.group.runs
        each = tuple(100 * run.score for run in runs if run.score is not None)
        test = entry.first.result.get("test") or {}
        sd, se = record["sd"], _mean([test.get("standard_error")])
        error, of = (sd, f"over {len(each)} seeds") if sd is not None else (se, "over test rows")
        spread = "" if error is None else f" ± {100 * error:.2f} {of}"
        zero = entry.zero_shot
        values.append(
            Value(
                entry.label,
                100 * record["score"],
                100 * (error or 0.0),
                each,
                f"{100 * record['score']:.2f}{spread}"
                + ("" if zero is None else f", zero-shot {100 * zero:.2f}"),
                None if zero is None else 100 * zero,
            )
        )
    return page_chart.dots(values, f"test {block.metric} (%)", f"Test scores: {block.title}")


def _pairs(entries: Sequence[Entry]) -> list[list[tuple[float, float] | None]]:
    """Return each entry less each, paired by test row, with the standard error; None of itself."""
    if entries[0].first.result.get("test_rows") is None:  # nobody knows whether rows are the same
        return [[None for _ in entries] for _ in entries]
    means, sizes = [entry.group.mean() for entry in entries], entries[0].group.sizes
    each = range(len(entries))
    return [[None if a == b else paired(means[a], means[b], sizes) for b in each] for a in each]


_CURVES = (("loss", "steps"), ("accuracy", "steps"), ("loss", "seconds"), ("accuracy", "seconds"))
_X_WORDS = {"steps": "steps", "seconds": "seconds of training"}


def _evaluated(block: Block) -> list[Entry]:
    """Return the entries whose runs were evaluated on the way; note what cannot be read."""
    kept = []
    for entry in block.entries:
        try:
            found = [(run, *curves.read_metrics(run)) for run in entry.group.runs]
        except UserError as error:
            block.notes.append(str(error))
            continue
        if all(evaluations for _, _, evaluations, _ in found):
            kept.append(entry)
            continue
        block.notes += [
            f"{run.path}: {bad} lines of metrics.jsonl cannot be read and are left out."
            for run, _, _, bad in found
            if bad
        ]
    return kept


def _curves(block: Block) -> list[Curves]:
    """Return four charts for every few of the entries that were evaluated on the way."""
    lines = _evaluated(block)
    found = []
    for start in range(0, len(lines), MOST_LINES):
        chosen = lines[start : start + MOST_LINES]
        sources = [Source(e.group.runs, e.label, place=k) for k, e in enumerate(chosen)]
        styles = {entry.label: k for k, entry in enumerate(chosen)}
        charts = []
        for y, x in _CURVES:
            try:
                figure = curves.curve(sources, y, x)
            except UserError as error:  # settings that no digest has split one of the lines
                block.notes.append(str(error))
                continue
            block.notes += figure.notes
            for panel in figure.panels:
                title = f"{panel.y.removesuffix(' (%)')} against {_X_WORDS[x]}: {block.title}"
                charts.append(
                    page_chart.lines(panel, _X_WORDS[x], title[0].upper() + title[1:], styles)
                )
        found += [Curves(charts)] if charts else []
    block.notes = list(dict.fromkeys(block.notes))
    return found
