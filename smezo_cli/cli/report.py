"""`smezo report`: write runs as one HTML file to look at."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from smezo_cli.cli.flags import Flags, check_out, shows_help
from smezo_cli.errors import UserError
from smezo_cli.files.atomic import write_text
from smezo_cli.machine import streams
from smezo_cli.report import cells
from smezo_cli.report import table as table_module
from smezo_cli.report.page import Page, filled, html, page, unreadable
from smezo_cli.report.runs import Run, find, select

USAGE = """\
smezo report [KEY=VALUE ...]           one HTML file on the runs below runs/, filtered as smezo runs does
smezo report TABLE [KEY=VALUE ...]     on the runs that a table took (smezo table)
    --out FILE        the file (report.html)
    --runs-dir DIR    where the runs lie (runs)
It has results with error bars and paired differences, learning curves, memory and time, settings, sample
predictions, versions and commands. It needs nothing else: no network, no other file.
Examples:
  smezo report task=rte method=mezo,sparse_mezo
  smezo report sparse-mezo/1 --out table-1.html
"""  # noqa: E501  # as wide as the terminal shows it


def main(words: Sequence[str]) -> int:
    """Write the report, and say where it is; return the exit code.

    Raises:
        UserError: a mistake on the line, or there is nothing to report.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("report")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--out", default="report.html")
    parser.add_argument("--runs-dir", default="runs")
    given = parser.parse_intermixed_args(list(words))
    out = _file(given.out)
    ids = [word for word in given.words if "=" not in word]
    if len(ids) > 1:
        raise UserError(f"{ids[1]!r} is neither KEY=VALUE nor the one table that may be given.")
    of_dir = ["--runs-dir", given.runs_dir] if given.runs_dir != "runs" else []
    line = shlex.join(["report", *given.words, *of_dir])
    found = _of_table(ids[0], line, given) if ids else _of_folders(line, given)
    streams.outlast()
    write_text(out, html(found))
    left = len(found.unfinished) + len(found.damaged)
    of = "run" if len(found.runs) == 1 else "runs"
    print(f"{out}: {len(found.runs)} {of}" + (f", {left} not in its numbers" if left else ""))
    return 0


def _file(out: str) -> Path:
    """Return the file to write.

    Raises:
        UserError: it is no HTML file, or there is no such folder.
    """
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: a report is HTML, so give a name such as {out}.html.")
    check_out("--out", out, "report.html")
    return path


def _of_folders(line: str, given: argparse.Namespace) -> Page:
    folder = Path(given.runs_dir)
    runs = select(find(folder), given.words)
    if not runs:
        where = f" with {' '.join(given.words)}" if given.words else ""
        raise UserError(
            f"smezo report: there are no runs in {folder}{where}; smezo runs lists what there is."
        )
    return page(line, runs, unreadable(folder))


def _of_table(name: str, line: str, given: argparse.Namespace) -> Page:
    """Return the page of the runs that each cell took, below the table itself.

    Raises:
        UserError: there is no such table, or no run for it.
    """
    of_dir = [f"runs_dir={given.runs_dir}"] if given.runs_dir != "runs" else []
    table = table_module.load(name, [*(w for w in given.words if "=" in w), *of_dir])
    folder = Path(given.runs_dir)
    runs = find(folder) if folder.is_dir() else []
    reader = cells.Reader(table, runs)
    found = reader.cells()
    taken: dict[Path, Run] = {}
    names: dict[Path, str] = {}
    for cell in found:
        for run in cell.runs:
            taken.setdefault(run.path, run)
            # Where rows are tasks and columns are methods, the runs tell the name.
            if cell.row.name != str(run.result["task"]) and not cell.row.of:
                names.setdefault(run.path, cell.row.name)
    if not taken:
        raise UserError(
            f"smezo report {name}: no cell of the table has runs in {folder}; smezo table {name} "
            "prints the commands that fill them."
        )
    written = page(line, list(taken.values()), unreadable(folder), names)
    written.table = filled(table, found, reader)
    return written
