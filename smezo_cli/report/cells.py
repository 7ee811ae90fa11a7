"""Fill the cells of a table: find the runs of each, and their mean."""

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from smezo_cli.config.digest import NOT_IN_DIGEST
from smezo_cli.config.fixed import plain
from smezo_cli.errors import UserError
from smezo_cli.report import collected
from smezo_cli.report.identity import differences, flat, identity, stripped, version
from smezo_cli.report.runs import Group, Run, paired
from smezo_cli.report.table import Line, Printed, Table, last


@dataclass
class Cell:
    """Hold our values and the paper's, in the unit of the table.

    Attributes:
        values: one a seed, of the setting that dev has chosen.
        runs: those that the values are of.
        searched: the runs of the grid that finished, with the first seed.
        setting: the chosen one, as KEY=VALUE of what was searched.
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
        """Return the mean over the seeds."""
        return statistics.mean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Return the standard deviation over the seeds, where there are several."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Return our mean less the paper's value."""
        return None if self.paper is None or self.mean is None else self.mean - self.paper.value


_Scored = tuple[tuple[float, float], dict[str, Any]]  # ranks, and the setting that has them


class Reader:
    """Fill the cells of a table from runs; `notes` says what was left out and why.

    `taken` has the runs that cells took, those of a search too, each with its command.
    """

    def __init__(self, table: Table, runs: Sequence[Run]) -> None:
        self.table, self.notes = table, list[str]()
        done = [run for run in runs if run.result["status"] in ("done", "diverged")]
        self._runs = [(run, identity(run.settings)) for run in done if run.config]
        finished = [run for run, _ in self._runs if run.result["status"] == "done"]
        newest = max(finished, key=lambda run: str(run.result.get("ended")), default=None)
        self._version = None if newest is None else version(newest)
        self._alike: dict[tuple[object, ...], tuple[object, object]] = {}
        self._asked: list[tuple[str, Mapping[str, Any]]] = []
        self._used: set[Path] = set()
        self.taken: dict[Path, tuple[Run, tuple[str, ...]]] = {}

    def cells(self, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> list[Cell]:
        """Return every cell, row by row, or those of some rows and columns."""
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
        each = t.seeds_of(cell.row)
        seeds = ",".join(map(str, each))
        first = t.searched(cell.row, words)
        if not self._could_have(words):
            cell.missing = first
            return cell
        from smezo_cli.config.compose import grid

        cfg, swept = grid(first)
        scored, gap = [], False
        for values in itertools.product(*swept.values()):
            setting = dict(zip(swept, values, strict=True))
            run = self._find(
                cell, first, cfg, setting, int(cfg.seed), is_tested=not cell.row.search
            )
            gap = gap or run is None
            if run is not None and run.result["status"] == "done":
                cell.searched.append(run)
                scored.append((self._ranks(run), setting))
        if gap:
            cell.missing = first if swept else (*words, f"seed={seeds}")
            return cell
        if not scored:
            cell.why = "every run of its grid diverged"
            return cell
        if cell.row.search:
            scored = self._finals(cell, words, scored, each[0])
            if not scored:
                return cell
        _, setting = max(scored, key=lambda item: item[0])
        cell.setting = _as_words(setting)
        if cell.row.search:
            cfg, _ = grid(last((*words, *cell.setting.split(), f"seed={each[0]}")))
        chosen = [self._find(cell, words, cfg, setting, seed) for seed in each]
        lacking = [str(s) for s, one in zip(each, chosen, strict=True) if one is None]
        for one in chosen:
            if one is not None and one.result["status"] == "done":
                value = value_of(one, cell.row.quantity or t.quantity, t.level)
                if value is None:
                    why = f"never reached {t.level:g} on dev"
                    if cell.row.quantity == "zero_shot":
                        why = "has no zero-shot score (zero_shot=false)"
                    self.notes.append(f"{one.path} {why}.")
                else:
                    cell.values.append(value)
                    cell.runs.append(one)
            elif one is not None:
                self.notes.append(f"{one.path} diverged and is not in the mean.")
        if lacking:
            cell.missing = last((*words, *cell.setting.split(), f"seed={','.join(lacking)}"))
        return cell

    def _ranks(self, run: Run) -> tuple[float, float]:
        """Return what a run is chosen by on dev: the metric and then the loss, or the reverse."""
        best = run.result["dev"]["best"]
        ranks = float(best.get(run.metric, 0.0)), -float(best.get("loss", 0.0))
        return ranks[::-1] if self.table.search_by == "loss" else ranks

    def _finals(
        self, cell: Cell, words: Sequence[str], scored: Sequence[_Scored], seed: int
    ) -> list[_Scored]:
        """Return the best settings of a search with what they come to in a whole run.

        Where such a run lacks, or all have diverged, nothing is returned, and the cell says so.
        """
        from smezo_cli.config.compose import grid

        best = sorted(scored, key=lambda item: item[0], reverse=True)[: self.table.finals]
        if len(best) == 1:
            return best
        found = []
        for _, setting in best:
            whole = last((*words, *_as_words(setting).split(), f"seed={seed}"))
            run = self._find(cell, words, grid(whole)[0], setting, seed)
            if run is None:
                cell.missing = whole
                return []
            if run.result["status"] == "done":
                found.append((self._ranks(run), setting))
        if not found:
            cell.why = "the best settings of its search diverged"
        return found

    def _could_have(self, words: Sequence[str]) -> bool:
        """Return whether there is a run of this task and model; else nothing need be composed."""
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
        *,
        is_tested: bool = True,
    ) -> Run | None:
        cfg = copy.deepcopy(cfg)
        for key, value in {**setting, "seed": seed}.items():
            OmegaConf.update(cfg, key, value)
        values = plain(cfg)
        self._asked.append((f"{cell.row.name}, {cell.column.name}", values))
        wanted = identity(values)
        for run, found in self._runs:
            if found == wanted and self._fits(run, cell, is_tested=is_tested):
                # A second run of the same settings, perhaps a collected one, is no near miss.
                self._used.update(one.path for one, same in self._runs if same == wanted)
                chosen = (f"{key}={value}" for key, value in setting.items())
                self.taken[run.path] = (run, last((*words, *chosen, f"seed={seed}")))
                return run
        return None

    def _fits(self, run: Run, cell: Cell, *, is_tested: bool) -> bool:
        """Return whether a run may stand beside the others: same version, same rows, same model.

        The test rows of a run that only chooses settings, on dev, may be others.
        """
        self._used.add(run.path)  # what is wrong with it is said here, not as a near miss
        if version(run) != self._version:
            self._refuse(run, f"it is of smezo {version(run)}, the newest runs of {self._version}")
            return False
        if run.result["status"] != "done":
            return True
        key = (cell.column.name, run.result["model"], run.result.get("data_seed"), is_tested)
        rows = run.result.get("test_rows") if is_tested else None
        mine = (rows, run.result.get("model_fingerprint"))
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
        """Write the runs that cells took as small files; return how many are new.

        Raises:
            UserError: one cannot be written.
        """
        new = 0
        for run, words in self.taken.values():
            settings = {k: v for k, v in stripped(run.settings).items() if k not in NOT_IN_DIGEST}
            what = "-".join(str(run.result[key]) for key in _NAMES)
            name = f"{what}-s{run.result['seed']}-{identity(settings).replace(' ', '-')}"
            new += collected.write(folder, name, run, settings, words)
        return new

    def _note_near_misses(self, whole: bool) -> None:
        """Note runs of a cell's task, model and method that differ in another setting.

        Of collected runs, note all that no cell takes: they were written for this table.
        """
        for run, _ in self._runs:
            if run.path in self._used:
                continue
            near_by: list[tuple[list[str], str]] = []
            for where, asked in self._asked:
                keys = [f"{g}.name" for g in _NAMES] + ["seed", "lr", "sparsity", "method.mask"]
                ours, its = dict(flat(asked)), dict(flat(run.settings))
                if all(ours.get(key) == its.get(key) for key in keys):
                    near_by.append((differences(its, ours), where))
            if near_by:
                differing, where = min(near_by, key=lambda item: len(item[0]))
                words = "; ".join(differing[:4])
                self.notes.append(f"{run.path} is left out of ({where}): {words}.")
            elif whole and run.collected is not None:
                self.notes.append(f"{run.path} is left out: no cell of this table asks for it.")


_NAMES = ("task", "model", "method")


def _as_words(setting: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in setting.items())


def subtract(cells: Sequence[Cell], base: str) -> list[str]:
    """Fill `less` of cells by subtracting the row `base`; return what could not be subtracted.

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
        elif cell.row.quantity or other.row.quantity:
            why = "one of them is not the score of test rows"
        elif not _one_set([cell, other]):
            why = "they were tested on different rows"
        else:
            try:
                groups = [Group(tuple(c.runs)) for c in (cell, other)]
                ours, its = (group.mean() for group in groups)
                difference, error = paired(ours, its, groups[0].sizes)
                cell.less = 100 * difference, 100 * error
            except UserError as lacking:
                why = str(lacking)
        if why:
            notes.append(f"{cell.row.name} less {base}, {cell.column.name}: {why.rstrip('.')}.")
    return notes


def _one_set(cells: Sequence[Cell]) -> bool:
    """Return whether all runs of these cells were tested on the same rows."""
    sets = {run.result.get("test_rows") for cell in cells for run in cell.runs}
    return len(sets) == 1 and None not in sets


def value_of(run: Run, quantity: str, level: float = 0.0) -> float | None:
    """Return a quantity of a finished run in points of 100, GB (1e9 bytes) or steps, or None."""
    if quantity == "peak_gb":
        return float(run.result["peak_memory_bytes"]) / 1e9
    if quantity == "steps_to":
        return next((float(step) for step, value in run.evaluations() if value >= level), None)
    tree = run.result["zero_shot" if quantity == "zero_shot" else "test"]
    if tree is None:  # a run with zero_shot=false
        return None
    return 100 * float(tree[run.metric])
