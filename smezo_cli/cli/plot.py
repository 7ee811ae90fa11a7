"""`smezo plot`: draw the papers' figures from runs or from a table, as PNG and SVG.

Colours are those of Okabe and Ito, which everybody tells apart; markers and dashes differ, too. The
same runs give the same bytes: files carry no date, and SVG ids come from a fixed salt.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from smezo_cli.cli.flags import Flags, check_out, shows_help
from smezo_cli.errors import UserError, near
from smezo_cli.files.atomic import write_bytes
from smezo_cli.machine import streams
from smezo_cli.report import cells, collected, curves, figures
from smezo_cli.report import table as table_module
from smezo_cli.report.draw import drawn
from smezo_cli.report.runs import find, select
from smezo_cli.report.series import Figure, Source

USAGE = """\
smezo plot KIND [KEY=VALUE ...]            draws the runs below runs/, filtered as smezo runs does
smezo plot KIND TABLE [KEY=VALUE ...]      draws the runs that a table took (smezo table)
  curve       dev accuracy (or loss) along training, mean and standard deviation over seeds
  sparsity    test accuracy against sparsity, MeZO at 0, zero-shot as a level (points of one x side by side)
  lr          test accuracy against the learning rate
  memory      peak memory by method
  active      the share of weights that are perturbed, along training
    --x X             of curve and active: steps (default), forwards or seconds
    --y Y             of curve: accuracy (default), loss (both of dev) or train_loss
    --row NAME, --column NAME     of TABLE, these alone (each may be given again)
    --out FILE        FILE.png or FILE.svg; without an ending both (plot-KIND)
    --runs-dir DIR    where the runs lie (runs)
    --results DIR     of TABLE, what smezo table --collect has written, instead of runs
Runs that differ in their seed alone are one line; unfinished runs are drawn where status= asks for them.
Examples:
  smezo plot curve task=rotten_tomatoes lr=3e-4 --x seconds
  smezo plot sparsity small/1 --column rotten_tomatoes --out docs/sparsity.svg
"""  # noqa: E501  # as wide as the terminal shows it

KINDS = ("curve", "sparsity", "lr", "memory", "active")


def main(words: Sequence[str]) -> int:
    """Draw a figure, and say what was left out; return the exit code.

    Raises:
        UserError: a mistake on the line, nothing to draw, or matplotlib is not there.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("plot")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--x", default="")
    parser.add_argument("--y", default="")
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--column", action="append", default=[])
    parser.add_argument("--out", default="")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--results")
    given = parser.parse_intermixed_args(list(words))
    if not given.words:
        print(USAGE, end="")
        return 0
    kind, *rest = given.words
    if kind not in KINDS:
        raise UserError(f"smezo plot {kind}: there is no such figure{near(kind, KINDS)}.")
    for flag, value, known, kinds in (
        ("x", given.x, curves.X_OF_CURVES, ("curve", "active")),
        ("y", given.y, curves.Y_OF_CURVES, ("curve",)),
    ):
        if value and kind not in kinds:
            raise UserError(f"--{flag} has no effect with {kind}: it is of {' and '.join(kinds)}.")
        if value and value not in known:
            raise UserError(f"--{flag} {value}: there is no such axis{near(value, known)}.")
    files = _files(given.out or f"plot-{kind}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "smezo plot draws with matplotlib, which is not installed: "
            "python -m pip install 'matplotlib>=3.9,<4'."
        )
    ids = [word for word in rest if "=" not in word]
    if len(ids) > 1:
        raise UserError(f"{ids[1]!r} is neither KEY=VALUE nor the one table that may be given.")
    if not ids and (given.row or given.column or given.results):
        raise UserError(
            "--row, --column and --results are of a table: smezo plot KIND TABLE --row NAME."
        )
    if ids:
        extra = [word for word in rest if "=" in word]
        sources, notes = _of_table(ids[0], extra, kind, given)
    else:
        sources, notes = _of_folders(rest, kind, Path(given.runs_dir))
    figure = _found(kind, sources, given.x or "steps", given.y or "accuracy")
    notes += figure.notes
    if not figure.panels:
        why = f" {' '.join(notes[:3])}" if notes else ""
        raise UserError(f"smezo plot {kind}: these runs have nothing to draw.{why}")
    streams.outlast()
    for file, content in drawn(figure, files):
        write_bytes(file, content)
        print(file)
    for note in dict.fromkeys(notes):
        print(f"  {note}")
    return 0


def _files(out: str) -> list[Path]:
    """Return the files to write.

    Raises:
        UserError: another format, or no such folder.
    """
    path = Path(out)
    if path.suffix in (".png", ".svg"):
        files = [path]
    elif path.suffix and not path.suffix[1:].isdigit():
        raise UserError(f"--out {out}: no such format, there are .png and .svg.")
    else:
        files = [path.with_name(f"{path.name}.{form}") for form in ("png", "svg")]
    for file in files:
        check_out("--out", str(file), "plot.svg")
    return files


def _of_folders(filters: Sequence[str], kind: str, folder: Path) -> tuple[list[Source], list[str]]:
    runs = select(find(folder), filters)
    if not runs:
        where = f" with {' '.join(filters)}" if filters else ""
        raise UserError(f"smezo plot {kind}: there are no runs in {folder}{where}.")
    wanted = {"done"} | ({"diverged"} if kind == "lr" else set())
    asked = any(word.startswith("status=") for word in filters) and kind in ("curve", "active")
    # A folder may tell its status and not even its task.
    named = [r for r in runs if r.config and all(r.result.get(k) is not None for k in _NEEDED)]
    kept = [run for run in named if asked or run.result["status"] in wanted]
    left = [str(run.result["status"]) for run in runs if run not in kept]
    counts = ", ".join(f"{left.count(s)} {s}" for s in sorted(set(left)))
    notes = [f"{len(left)} of {len(runs)} runs are left out: {counts}."] if left else []
    if not kept:
        raise UserError(f"smezo plot {kind}: no run in {folder} is finished ({counts}).")
    return [Source(tuple(kept))], notes


_NEEDED = ("task", "model", "method", "seed")


def _of_table(
    name: str, extra: Sequence[str], kind: str, given: argparse.Namespace
) -> tuple[list[Source], list[str]]:
    """Return the runs that each cell took, and what is missing in words."""
    of_dir = [f"runs_dir={given.runs_dir}"] if given.runs_dir != "runs" else []
    found = table_module.load(name, [*extra, *of_dir])
    table_module.check_names(found, given.row, given.column)
    folder = Path(given.runs_dir)
    sources, notes = [], list[str]()
    if given.results is not None:
        runs, notes = collected.find(Path(given.results))
    else:
        runs = find(folder) if folder.is_dir() else []
    reader = cells.Reader(found, runs)
    for cell in reader.cells(given.row, given.column):
        if cell.row.of:  # shows another row's runs
            continue
        where = f"{cell.row.name}, {cell.column.name}"
        lines = dict.fromkeys(run.path for run in cell.runs)
        runs = [*cell.runs]
        if kind == "lr":
            runs += [run for run in cell.searched if run.path not in lines]
        if runs:
            # Where rows are tasks and columns are methods, the runs tell the name.
            by_run = kind == "sparsity" or cell.row.name == str(runs[0].result["task"])
            label = "" if by_run else cell.row.name
            sources.append(Source(tuple(runs), label, chosen=True))
        if cell.missing:
            seeds = f"{len(cell.runs)} of {len(found.seeds_of(cell.row))} seeds"
            notes.append(f"{where}: {seeds if cell.runs else 'not run yet'}.")
    if not sources:
        raise UserError(
            f"smezo plot {kind} {name}: no cell of these has runs in {given.results or folder}; "
            f"smezo table {name} prints the commands that fill them."
        )
    return sources, [*notes, *reader.notes]


def _found(kind: str, sources: Sequence[Source], x: str, y: str) -> Figure:
    if kind == "curve":
        return curves.curve(sources, y, x)
    if kind == "active":
        return curves.active(sources, x)
    kinds: dict[str, Callable[[Sequence[Source]], Figure]] = {
        "sparsity": figures.sparsity,
        "lr": figures.lr,
        "memory": figures.memory,
    }
    return kinds[kind](sources)
