"""`smezo table`: the papers' tables, ours beside the printed values, and what fills them.

A table is data (conf/table/): what a cell runs is the command of its row, table and column. The
first seed searches the grid, dev chooses, the other seeds run the choice. No torch here.
"""

import argparse
import copy
import csv
import io
import itertools
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from smezo_cli import collected
from smezo_cli.config.digest import LATER, digest, without_later_keys
from smezo_cli.config.fixed import CONF_DIR, WITHOUT_STEPS, plain
from smezo_cli.errors import UserError, near
from smezo_cli.files import bounded, strict_json
from smezo_cli.results import Group, Run, find, paired

USAGE = """\
smezo table                                   the tables there are
smezo table ID [KEY=VALUE ...]                ours | paper | difference, and what fills empty cells
    COLUMN:KEY=VALUE   a setting of one column alone, such as RTE:task.data_dir=PATH
    --run              run what is missing, one run after the other; safe to interrupt and repeat
    --row NAME, --column NAME     these alone (each may be given again)
    --less ROW         each row less that one, too, paired by test row, with the standard error
    --format FORMAT    markdown (default), latex, csv or json
    --runs-dir DIR     where the runs lie (runs)
    --collect DIR      write what the cells take of their runs, the search of lr too, as small files
    --results DIR      the table from such files alone; with --run or --runs-dir beside the runs
Examples:
  smezo table sparse-mezo/1
  smezo table small/1 --run --row MeZO --column rotten_tomatoes
  smezo table small/1 --collect docs/results/small-1
  smezo table small/1 --results docs/results/small-1
"""

FIGURES = ("score", "zero_shot", "peak_gb", "steps_to")
# Where weights, data and computation are does not change what is asked; rows and the model's
# fingerprint are compared instead.
_PLACES = {
    "task": ("data_dir",),
    "model": ("path", "revision", "device_map"),
    "method": ("keep_noise",),
}


@dataclass(frozen=True)
class Printed:
    """A value as the paper prints it, its spread, and the mark that says how sure it is."""

    value: float
    sd: float | None
    mark: str


@dataclass(frozen=True)
class Line:
    """A row or a column; without a command, what smezo lacks for it stands in `awaits`."""

    name: str
    command: tuple[str, ...] | None
    awaits: str = ""
    figure: str = ""
    of: str = ""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    paper: tuple[Printed | None, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)  # columns that it cannot have: why
    one_seed: bool = False  # nothing in it depends on the seed
    no_steps: bool = False  # settings of steps, which others of its table may have, are not for it


@dataclass(frozen=True)
class Table:
    """A table of a paper, as conf/table/ has it."""

    id: str
    title: str
    source: str
    figure: str
    level: float
    common: tuple[str, ...]
    extra: tuple[str, ...]
    seeds: tuple[int, ...]
    marks: Mapping[str, str]
    columns: tuple[Line, ...]
    rows: tuple[Line, ...]

    def words(self, row: Line, column: Line) -> tuple[str, ...] | None:
        """What the cell runs: `smezo train` and these; None where something is not in smezo yet."""
        if row.of:
            row = next(line for line in self.rows if line.name == row.of)
        if row.command is None or column.command is None or column.name in row.without:
            return None
        also = row.also.get(column.name, ())
        words = _last((*row.command, *self.common, *column.command, *also, *self.extra))
        if row.no_steps:
            return tuple(word for word in words if word.partition("=")[0] not in WITHOUT_STEPS)
        return words


def _last(words: Sequence[str]) -> tuple[str, ...]:
    """Of settings that are given twice the last."""
    return tuple({word.partition("=")[0]: word for word in words}.values())


def names() -> list[str]:
    """Ids of the tables."""
    folder = CONF_DIR / "table"
    return sorted(f.relative_to(folder).with_suffix("").as_posix() for f in folder.rglob("*.yaml"))


def load(name: str, extra: Sequence[str] = ()) -> Table:
    """A table; `extra` are settings of all its cells, or of one column (COLUMN:KEY=VALUE).

    Raises:
        UserError: there is no such table or column.
    """
    if name not in names():
        raise UserError(f"there is no table {name}{near(name, names())}.")
    node = plain(bounded.load_yaml(CONF_DIR / "table" / f"{name}.yaml"))
    columns = [str(key) for key in node["columns"]]
    own: dict[str, tuple[str, ...]] = {}
    for word in extra:
        column, colon, rest = word.partition(":")
        if colon and "=" not in column:
            if column not in columns:
                raise UserError(f"{word}: there is no column {column}{near(column, columns)}.")
            own[column] = (*own.get(column, ()), rest)
    common = [word for word in extra if ":" not in word.partition("=")[0]]
    seeds = [word for word in common if word.startswith("seed=")]
    mark = str(node.get("mark", ""))
    return Table(
        id=name,
        title=node["title"],
        source=node["source"],
        figure=node.get("figure", "score"),
        level=float(node.get("level", 0)),
        common=_split(node["command"]),
        extra=tuple(word for word in common if word not in seeds),
        seeds=tuple(map(int, seeds[-1][5:].split(",")) if seeds else node["seeds"]),
        marks=node.get("marks", {}),
        columns=tuple(
            _line(str(k), v, mark, own.get(str(k), ())) for k, v in node["columns"].items()
        ),
        rows=tuple(_line(str(k), v, mark, ()) for k, v in node["rows"].items()),
    )


def check_names(
    table: Table, rows: Sequence[str], columns: Sequence[str], flag_of_rows: str = "row"
) -> None:
    """Has it these rows and columns?

    Raises:
        UserError: it has not.
    """
    asked = ((flag_of_rows, rows, table.rows), ("column", columns, table.columns))
    for flag, wanted, lines in asked:
        known = [line.name for line in lines]
        for word in wanted:
            if word not in known:
                what = "column" if flag == "column" else "row"
                raise UserError(f"--{flag} {word}: there is no such {what}{near(word, known)}.")


def _split(command: str | None) -> tuple[str, ...]:
    return tuple(shlex.split(command or ""))


def _line(name: str, node: Mapping[str, Any], mark: str, extra: tuple[str, ...]) -> Line:
    command = None if node.get("command") is None else (*_split(node["command"]), *extra)
    return Line(
        name=name,
        command=command,
        awaits=node.get("awaits", ""),
        figure=node.get("figure", ""),
        of=node.get("of", ""),
        also={str(key): _split(words) for key, words in node.get("also", {}).items()},
        paper=tuple(_printed(value, mark) for value in node.get("paper", ())),
        without=node.get("without", {}),
        one_seed=bool(node.get("one_seed")),
        no_steps=bool(node.get("no_steps")),
    )


def _printed(value: object, mark: str) -> Printed | None:
    if value is None:
        return None
    found = re.fullmatch(r"(-?[\d.]+)(?: \(([\d.]+)\))?(\D*)", str(value))
    assert found is not None, f"{value} is no printed value"
    sd = found[2]
    return Printed(float(found[1]), float(sd) if sd else None, found[3] or mark)


# --- cells -----------------------------------------------------------------------------------


@dataclass
class Cell:
    """Ours and the paper's; values in the unit of the table.

    Attributes:
        values: one a seed, of the setting that dev has chosen.
        runs: those that the values are of.
        searched: what finished of the grid, with the first seed.
        setting: that setting, of what was searched.
        missing: the next command of `smezo train` that it needs, None where it is complete.
        why: what it waits for, where no command fills it.
        less: the difference from another row's cell, paired by test row, and its standard error.
    """

    row: Line
    column: Line
    paper: Printed | None
    values: list[float] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    searched: list[Run] = field(default_factory=list)
    setting: str = ""
    missing: tuple[str, ...] | None = None
    why: str = ""
    less: tuple[float, float] | None = None

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.mean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Over the seeds, where there are several."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.paper is None or self.mean is None else self.mean - self.paper.value


class Reader:
    """Fills the cells of a table from runs; `notes` says what was left out and why.

    `taken` has the runs that cells take, those of a search too, each with the words that ask it.
    """

    def __init__(self, table: Table, runs: Sequence[Run]) -> None:
        self.table, self.notes = table, list[str]()
        done = [run for run in runs if run.result["status"] in ("done", "diverged")]
        self._runs = [(run, identity(run.config)) for run in done if run.config]
        finished = [run for run, _ in self._runs if run.result["status"] == "done"]
        newest = max(finished, key=lambda run: str(run.result.get("ended")), default=None)
        self._version = None if newest is None else _version(newest)
        self._alike: dict[tuple[object, ...], tuple[object, object]] = {}
        self._asked: list[tuple[str, Mapping[str, Any]]] = []
        self._used: set[Path] = set()
        self.taken: dict[Path, tuple[Run, tuple[str, ...]]] = {}

    def cells(self, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> list[Cell]:
        """Every cell, row by row, or those of some rows and columns."""
        t, found = self.table, []
        for row in t.rows:
            for k, column in enumerate(t.columns):
                if (not rows or row.name in rows) and (not columns or column.name in columns):
                    paper = row.paper[k] if k < len(row.paper) else None
                    found.append(self._fill(Cell(row, column, paper)))
        self._note_near_misses(whole=not (rows or columns))
        return found

    def _fill(self, cell: Cell) -> Cell:
        t = self.table
        words = t.words(cell.row, cell.column)
        if words is None:
            if (why := cell.row.without.get(cell.column.name)) and cell.column.command is not None:
                cell.why = why
                return cell
            what = cell.row.awaits if cell.row.command is None else cell.column.awaits
            cell.why = f"{what} is not in smezo yet"
            return cell
        each = t.seeds[:1] if cell.row.one_seed else t.seeds
        seeds = ",".join(map(str, each))
        first = (*words, f"seed={each[0]}")
        if not self._could_have(words):
            cell.missing = first
            return cell
        from smezo_cli.config.compose import grid

        cfg, swept = grid(first)
        scored, gap = [], False
        for values in itertools.product(*swept.values()):
            setting = dict(zip(swept, values, strict=True))
            run = self._find(cell, words, cfg, setting, each[0])
            gap = gap or run is None
            if run is not None and run.result["status"] == "done":
                best = run.result["dev"]["best"]
                cell.searched.append(run)
                scored.append((best.get(run.metric, 0.0), -best.get("loss", 0.0), setting, run))
        if gap:
            cell.missing = first if swept else (*words, f"seed={seeds}")
            return cell
        if not scored:
            cell.why = "every run of its grid diverged"
            return cell
        *_, setting, run = max(scored, key=lambda item: item[:2])
        cell.setting = " ".join(f"{key}={value}" for key, value in setting.items())
        chosen = [run, *(self._find(cell, words, cfg, setting, seed) for seed in each[1:])]
        lacking = [str(s) for s, one in zip(each, chosen, strict=True) if one is None]
        for one in chosen:
            if one is not None and one.result["status"] == "done":
                value = figure(one, cell.row.figure or t.figure, t.level)
                if value is None:
                    why = f"never reached {t.level:g} on dev"
                    if cell.row.figure == "zero_shot":
                        why = "has no zero-shot score (zero_shot=false)"
                    self.notes.append(f"{one.path} {why}.")
                else:
                    cell.values.append(value)
                    cell.runs.append(one)
            elif one is not None:
                self.notes.append(f"{one.path} diverged and is not in the mean.")
        if lacking:
            cell.missing = _last((*words, *cell.setting.split(), f"seed={','.join(lacking)}"))
        return cell

    def _could_have(self, words: Sequence[str]) -> bool:
        """Is there a run of this task and model? Else nothing need be composed."""
        given = dict(word.partition("=")[::2] for word in words)
        return any(
            all(given.get(key, run.result.get(key)) == run.result.get(key) for key in _NAMES)
            for run, _ in self._runs
        )

    def _find(
        self,
        cell: Cell,
        words: Sequence[str],
        cfg: Any,
        setting: Mapping[str, Any],
        seed: int,
    ) -> Run | None:
        cfg = copy.deepcopy(cfg)
        for key, value in {**setting, "seed": seed}.items():
            OmegaConf.update(cfg, key, value)
        values = plain(cfg)
        self._asked.append((f"{cell.row.name}, {cell.column.name}", values))
        wanted = identity(values)
        for run, found in self._runs:
            if found == wanted and self._fits(run, cell):
                # The same once more, collected or under another name, is no near miss.
                self._used.update(one.path for one, same in self._runs if same == wanted)
                chosen = (f"{key}={value}" for key, value in setting.items())
                self.taken[run.path] = (run, _last((*words, *chosen, f"seed={seed}")))
                return run
        return None

    def _fits(self, run: Run, cell: Cell) -> bool:
        """Numbers of another version, of other rows or another model are not mixed in."""
        self._used.add(run.path)  # it is said here, not as a near miss
        if _version(run) != self._version:
            self._refuse(run, f"it is of smezo {_version(run)}, the newest runs of {self._version}")
            return False
        if run.result["status"] != "done":
            return True
        key = (cell.column.name, run.result["model"], run.result.get("data_seed"))
        mine = (run.result.get("test_rows"), run.result.get("model_fingerprint"))
        if self._alike.setdefault(key, mine) != mine:
            what = "test rows" if self._alike[key][0] != mine[0] else "model weights"
            self._refuse(run, f"its {what} are not those of the column's other runs")
            return False
        return True

    def _refuse(self, run: Run, why: str) -> None:
        what = "repeat its command" if run.collected is not None else "if_exists=fresh repeats it"
        note = f"{run.path} is left out: {why}; {what}."
        if note not in self.notes:
            self.notes.append(note)

    def collect(self, folder: Path) -> int:
        """Write files of the runs that cells took (:mod:`smezo_cli.collected`); how many are new.

        Raises:
            UserError: one cannot be written.
        """
        new = 0
        for run, words in self.taken.values():
            settings = {k: v for k, v in _stripped(run.config).items() if k not in _NOT_ASKED}
            what = "-".join(str(run.result[key]) for key in _NAMES)
            name = f"{what}-s{run.result['seed']}-{identity(settings).replace(' ', '-')}"
            new += collected.write(folder, name, run, settings, words)
        return new

    def _note_near_misses(self, whole: bool) -> None:
        """Runs of a cell's task, model and method that differ in another setting.

        Of collected ones all that no cell of the whole table takes: they were written for it.
        """
        for run, _ in self._runs:
            if run.path in self._used:
                continue
            near_by: list[tuple[list[str], str]] = []
            for where, asked in self._asked:
                keys = [f"{g}.name" for g in _NAMES] + ["seed", "lr", "sparsity", "method.mask"]
                ours, its = dict(flat(asked)), dict(flat(run.config))
                if all(ours.get(key) == its.get(key) for key in keys):
                    near_by.append((_differences(its, ours), where))
            if near_by:
                differing, where = min(near_by, key=lambda item: len(item[0]))
                words = "; ".join(differing[:4])
                self.notes.append(f"{run.path} is left out of ({where}): {words}.")
            elif whole and run.collected is not None:
                self.notes.append(f"{run.path} is left out: no cell of this table asks for it.")


_NAMES = ("task", "model", "method")
# No part of a digest either.
_NOT_ASKED = (
    *("name", "runs_dir", "logger", "if_exists", "compile", "full_save_every"),
    *("micro_batch_size", "query_ranks", "rank_backend"),
)


def subtract(cells: Sequence[Cell], base: str) -> list[str]:
    """Fill `less` of cells: less the row `base` of their column; what could not be, in words.

    Outcomes are averaged over the seeds that each has, subtracted test row by test row, and their
    standard error is that over the rows (points of 100).
    """
    notes = []
    theirs = {cell.column.name: cell for cell in cells if cell.row.name == base}
    for cell in cells:
        other = theirs[cell.column.name]
        if cell is other or not cell.runs:
            continue
        why = ""
        if not other.runs:
            why = f"{base} has no finished run there"
        elif cell.row.figure or other.row.figure:
            why = "one of them is not the score of test rows"
        elif not _one_set([cell, other]):
            why = "they were tested on different rows"
        else:
            try:
                ours, its = (Group(tuple(c.runs)).mean() for c in (cell, other))
                difference, error = paired(ours, its)
                cell.less = 100 * difference, 100 * error
            except UserError as lacking:
                why = str(lacking)
        if why:
            notes.append(f"{cell.row.name} less {base}, {cell.column.name}: {why.rstrip('.')}.")
    return notes


def _one_set(cells: Sequence[Cell]) -> bool:
    """Were all their runs tested on the same rows?"""
    sets = {run.result.get("test_rows") for cell in cells for run in cell.runs}
    return len(sets) == 1 and None not in sets


def figure(run: Run, name: str, level: float = 0.0) -> float | None:
    """A figure of a finished run: points of 100, GB (1e9 bytes), or steps; None: it has none."""
    if name == "peak_gb":
        return float(run.result["peak_memory_bytes"]) / 1e9
    if name == "steps_to":
        return next((float(step) for step, value in run.looks() if value >= level), None)
    tree = run.result["zero_shot" if name == "zero_shot" else "test"]
    if tree is None:  # a run with zero_shot=false
        return None
    return 100 * float(tree[run.metric])


def identity(values: Mapping[str, Any]) -> str:
    """What runs of one cell and seed have in common: the settings less places and devices."""
    return digest(_stripped(values)) + f" {values.get('steps')}"


def _stripped(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key != "device"}
    for group, dropped in _PLACES.items():
        given = kept.get(group)
        if not isinstance(given, Mapping):
            continue
        node = {k: v for k, v in given.items() if k not in dropped}
        if group == "method" and node.get("executor") in ("sequential", "lockstep"):
            node["executor"] = "auto"  # the same numbers
        if group == "model" and node.get("attention") == "auto":
            node["attention"] = "sdpa"  # likewise
        kept[group] = node
    return kept


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values of what :func:`identity` compares."""
    for key, value in (node if prefix else without_later_keys(_stripped(node))).items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif prefix or key not in _NOT_ASKED:
            yield f"{prefix}{key}", value


def _differences(its: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    keys = [key for key in {**ours, **its} if its.get(key) != ours.get(key)]
    before = {key: LATER.get(key.rpartition(".")[2]) for key in keys}
    return [
        f"{key}={its.get(key, before[key])} where the table has {ours.get(key, before[key])}"
        for key in keys
    ]


def _version(run: Run) -> str:
    """Numbers change with the version (CHANGELOG.md), and between versions with the arithmetic."""
    versions = run.result.get("versions") or {}
    numerics = versions.get("numerics")
    return f"{versions.get('smezo')}" + ("" if numerics is None else f", numerics {numerics}")


# --- printing --------------------------------------------------------------------------------


def command(words: Sequence[str]) -> str:
    """The line that fills a cell."""
    return shlex.join(["smezo", "train", *words])


def _digits(table: Table) -> int:
    return 0 if table.figure == "steps_to" else 1


def _ours(cell: Cell, table: Table) -> str:
    if cell.mean is None:
        return ""
    digits = _digits(table)
    sd = "" if cell.sd is None else f" ± {cell.sd:.{digits}f}"
    return f"{cell.mean:.{digits}f}{sd} ({len(cell.values)})"


def _paper(cell: Cell, table: Table) -> str:
    if cell.paper is None:
        return ""
    digits = _digits(table)
    sd = "" if cell.paper.sd is None else f" ({cell.paper.sd:.{digits}f})"
    return f"{cell.paper.value:.{digits}f}{sd}{cell.paper.mark}"


def _difference(cell: Cell, table: Table) -> str:
    return "" if cell.difference is None else f"{cell.difference:+.{_digits(table)}f}"


def _less(cell: Cell, table: Table) -> str:
    if cell.less is None:
        return ""
    return "{:+.{digits}f} ± {:.{digits}f}".format(*cell.less, digits=_digits(table) + 1)


def _grid(table: Table, cells: Sequence[Cell], less: str) -> tuple[list[str], list[list[str]]]:
    """The head, and for each row its lines: ours, paper, difference; empty ones are left out."""
    columns = list(dict.fromkeys(cell.column.name for cell in cells))
    lines = []
    for row, members in itertools.groupby(cells, key=lambda cell: cell.row.name):
        group = list(members)
        kinds = (("ours", _ours), ("paper", _paper), ("difference", _difference))
        for title, show in (*kinds, (f"less {less}", _less)):
            texts = [show(cell, table) for cell in group]
            if title == "ours" or any(texts):
                lines.append([row if title == "ours" else "", title, *texts])
    return ["", "", *columns], lines


def shown(
    table: Table, cells: Sequence[Cell], notes: Sequence[str], form: str, less: str = ""
) -> str:
    """The table as text; form: markdown, latex, csv or json; less: of which row `less` is."""
    records = [
        {
            **{"row": cell.row.name, "column": cell.column.name},
            **{"ours": cell.mean, "sd": cell.sd, "n": len(cell.values), "setting": cell.setting},
            "paper": cell.paper.value if cell.paper else None,
            "paper_sd": cell.paper.sd if cell.paper else None,
            "mark": cell.paper.mark if cell.paper else "",
            "difference": cell.difference,
            **(
                {"less": cell.less and cell.less[0], "less_se": cell.less and cell.less[1]}
                if less
                else {}
            ),
            "command": command(cell.missing) if cell.missing else None,
            "why": cell.why,
        }
        for cell in cells
    ]
    if form == "json":
        about = {"table": table.id, "title": table.title, "source": table.source}
        whole = about | {"marks": dict(table.marks), "cells": records, "notes": list(notes)}
        return strict_json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()
    head, lines = _grid(table, cells, less)
    if form == "latex":
        rows = [head, *lines]
        body = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
        start = rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}"
        return "\n".join([start, r"\hline", body[0], r"\hline", *body[1:], r"\hline",
                          r"\end{tabular}", ""])  # fmt: skip
    text = [f"**{table.title}** ({table.source})", ""]
    text += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]
    text += ["", *(f"{mark} {words}" for mark, words in table.marks.items())]
    if less:
        text += [
            f"less {less}: mean over the seeds, paired by test row, ± standard error over the rows"
        ]
    text += [*notes]
    absent = {f"{cell.row.name}: {cell.why}" if cell.row.command is None and not cell.row.of
              else f"{cell.row.name}, {cell.column.name}: {cell.why}": 0 for cell in cells
              if cell.why}  # fmt: skip
    text += ["", *absent] if absent else []
    missing = list(dict.fromkeys(command(cell.missing) for cell in cells if cell.missing))
    if missing:
        text += ["", f"What fills it (all of it: smezo table {table.id} --run):", ""]
        text += [f"    {line}" for line in missing]
    return "\n".join(text) + "\n"


def _latex(text: str) -> str:
    escaped = re.sub(r"([&%_#])", r"\\\1", text)
    return escaped.replace("±", r"$\pm$").replace("†", r"$\dagger$")


# --- the verb --------------------------------------------------------------------------------


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; smezo table --help shows the flags.")


def main(words: Sequence[str]) -> int:
    """`smezo table`: prints; returns the exit code, with --run the worst of the runs.

    Raises:
        UserError: a mistake on the line.
    """
    parser = _Flags(prog="smezo table", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--column", action="append", default=[])
    parser.add_argument("--less", default="")
    parser.add_argument("--format", default="markdown")
    parser.add_argument("--runs-dir")
    parser.add_argument("--collect")
    parser.add_argument("--results")
    parser.add_argument("--help", "-h", action="store_true")
    given = parser.parse_intermixed_args(list(words))
    forms = ("markdown", "latex", "csv", "json")
    if given.format not in forms:
        raise UserError(f"--format {given.format}: no such format{near(given.format, forms)}.")
    if given.help:
        print(USAGE, end="")
        return 0
    if not given.words:
        for name in names():
            table = load(name)
            print(f"{name:24} {table.title} ({table.source})")
        return 0
    name, *extra = given.words
    if bad := [word for word in extra if "=" not in word]:
        raise UserError(f"{bad[0]!r} is not of the form KEY=VALUE or COLUMN:KEY=VALUE.")
    if given.runs_dir is not None:
        extra.append(f"runs_dir={given.runs_dir}")
    table = load(name, extra)
    check_names(table, given.row, given.column)
    _check_less(table, given.less, given.row)
    folder = Path(given.runs_dir or "runs")
    with_runs = given.results is None or given.run or given.runs_dir is not None

    def read() -> tuple[list[Cell], Reader]:
        runs = find(folder) if with_runs and folder.is_dir() else []
        notes = list[str]()
        if given.results is not None:
            files, notes = collected.find(Path(given.results))
            runs += files
        reader = Reader(table, runs)
        reader.notes += notes
        return reader.cells(given.row, given.column), reader

    code = _run(read) if given.run else 0
    if code == 130:
        return code
    cells, reader = read()
    if given.collect is not None:
        new, all_of_it = reader.collect(Path(given.collect)), len(reader.taken)
        print(f"{given.collect}: {all_of_it} results, {new} of them new", file=sys.stderr)
    notes = reader.notes + (subtract(cells, given.less) if given.less else [])
    print(shown(table, cells, notes, given.format, given.less), end="")
    return code


def _check_less(table: Table, less: str, rows: Sequence[str]) -> None:
    if not less:
        return
    check_names(table, [less], [], "less")
    if table.figure != "score":
        raise UserError(
            f"--less {less}: {table.id} shows no figure of test rows ({table.figure}), and nothing "
            "can be paired by them."
        )
    if list(rows) == [less]:
        raise UserError(f"--less {less}: add --row NAME for what it is to be taken from.")
    if rows and less not in rows:
        raise UserError(f"--less {less}: add --row {shlex.quote(less)} beside the others.")


def _run(read: Any) -> int:
    """Run the next command of each cell until none is new; an interrupted one ends it all."""
    from smezo_cli.train import main as train

    tried: set[tuple[str, ...]] = set()
    worst = 0
    while True:
        cells = read()[0]
        todo = list(dict.fromkeys(cell.missing for cell in cells if cell.missing))
        todo = [words for words in todo if words not in tried]
        if not todo:
            return worst
        complete = sum(cell.missing is None for cell in cells)
        print(
            f"[{complete} of {len(cells)} cells need nothing more] {command(todo[0])}",
            file=sys.stderr,
            flush=True,
        )
        tried.add(todo[0])
        sweep = () if any(word.startswith("experiment=") for word in todo[0]) else ("-m",)
        code = train([*sweep, *todo[0]])
        if code == 130:
            return code
        worst = max(worst, code)
