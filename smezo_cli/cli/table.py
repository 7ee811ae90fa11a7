"""`smezo table`: print the papers' tables, ours beside theirs, and run what fills them.

A table is data (conf/table/): what a cell runs is the command of its row, table and column. The
first seed searches the grid, dev chooses, the other seeds run the choice; or a search of its own,
shorter and of another seed, goes before all of them. No torch here.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.errors import UserError, near
from smezo_cli.report import collected
from smezo_cli.report.cells import Cell, Reader, subtract
from smezo_cli.report.layout import command, shown
from smezo_cli.report.runs import find
from smezo_cli.report.table import Table, check_names, load, names

USAGE = """\
smezo table                                   the tables there are
smezo table ID [KEY=VALUE ...]                ours | paper | difference, and what fills empty cells
    COLUMN:KEY=VALUE   a setting of one column alone, such as RTE:task.data_dir=PATH
    --commands         all commands that fill empty cells, not the first three
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


def main(words: Sequence[str]) -> int:
    """Print a table; return the exit code, which with --run is the worst of the runs.

    Raises:
        UserError: a mistake on the line.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("table")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--column", action="append", default=[])
    parser.add_argument("--less", default="")
    parser.add_argument("--format", default="markdown")
    parser.add_argument("--runs-dir")
    parser.add_argument("--collect")
    parser.add_argument("--results")
    given = parser.parse_intermixed_args(list(words))
    forms = ("markdown", "latex", "csv", "json")
    if given.format not in forms:
        raise UserError(f"--format {given.format}: no such format{near(given.format, forms)}.")
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
    if given.runs_dir is not None and not given.run and not folder.is_dir():
        raise UserError(f"--runs-dir {given.runs_dir}: there is no such folder.")
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

    code = _run(read, is_data=given.format != "markdown") if given.run else 0
    if code == 130:
        return code
    cells, reader = read()
    if given.collect is not None:
        new, all_of_it = reader.collect(Path(given.collect)), len(reader.taken)
        print(f"{given.collect}: {all_of_it} results, {new} of them new", file=sys.stderr)
    notes = reader.notes + (subtract(cells, given.less) if given.less else [])
    text = shown(table, cells, notes, given.format, given.less, every_command=given.commands)
    print(text, end="")
    return code


def _check_less(table: Table, less: str, rows: Sequence[str]) -> None:
    if not less:
        return
    check_names(table, [less], [], "less")
    if table.quantity != "score":
        raise UserError(
            f"--less {less}: {table.id} shows {table.quantity}, which is no score of test rows, "
            "so nothing can be paired by them."
        )
    if list(rows) == [less]:
        raise UserError(f"--less {less}: add --row NAME for what it is to be taken from.")
    if rows and less not in rows:
        raise UserError(f"--less {less}: add --row {shlex.quote(less)} beside the others.")


def _run(read: Any, *, is_data: bool) -> int:
    """Run the next command of each cell until none is new, or one is interrupted.

    Args:
        read: returns the cells as they are now.
        is_data: standard output is for the table alone.
    """
    from smezo_cli.config.launch import worst
    from smezo_cli.train import main as train

    tried: set[tuple[str, ...]] = set()
    codes = [0]
    while True:
        cells = read()[0]
        todo = list(dict.fromkeys(cell.missing for cell in cells if cell.missing))
        todo = [words for words in todo if words not in tried]
        if not todo:
            return worst(codes)
        complete = sum(cell.missing is None for cell in cells)
        print(
            f"[{complete} of {len(cells)} cells need nothing more] {command(todo[0])}",
            file=sys.stderr,
            flush=True,
        )
        tried.add(todo[0])
        with _on_stderr() if is_data else contextlib.nullcontext():
            codes.append(train(["-m", *todo[0]]))
        if codes[-1] == 130:
            return 130


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """Send to stderr what this process and those that it starts print meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
