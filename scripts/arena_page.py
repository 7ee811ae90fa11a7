#!/usr/bin/env python
"""Write what the arena has measured: docs/results/arena-tables.md, a picture, and an order.

    .venv/bin/python scripts/arena_page.py

It reads what `smezo table arena/1 --collect docs/results/arena-1` has written, and the runs of
arena/2 likewise. Rows that lack runs are left out. The picture is docs/results/arena-pareto.svg,
the order, for `smezo choose`, smezo_cli/cli/arena.json; scripts/methods_page.py is to follow.
"""

import io
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.cli.method_notes import ARENA
from smezo_cli.report import collected
from smezo_cli.report.cells import Cell, Reader, subtract
from smezo_cli.report.draw import COLOURS, STYLE
from smezo_cli.report.runs import Run
from smezo_cli.report.table import Line, Table, load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGE = RESULTS / "arena-tables.md"
PICTURE = RESULTS / "arena-pareto.svg"
BASE = "MeZO"
#: An lr is on the plateau if its trial ends with a dev loss at most this far above the lowest one.
PLATEAU = 0.02

HEAD = f"""# The arena: tables

Written by `scripts/arena_page.py` from the collected runs in `docs/results/arena-1` and
`docs/results/arena-2`; [arena.md](arena.md) says what was run, and reads it.

* **accuracy**: of the test rows, in %, mean and standard deviation over seeds (their number).
* **less MeZO**: in points, paired by test row. The standard error is over rows and seeds: the
  squares of that over the rows and of those of both means over their seeds are added.
* **lr**: chosen by the dev loss of the trials; `<` or `>`: the lowest or the highest one tried.
* **plateau**: of the trials that did not diverge, those whose lowest dev loss is at most {PLATEAU}
  above that of the best.
* **time**: of all steps over MeZO's, each in the fastest run of the seeds that both have.
* **at MeZO's time**: accuracy on dev at the last evaluation before MeZO would be done, mean over
  seeds; empty where nothing is cut off.
* **peak**: resident memory of the run in units of MeZO's.
"""

ALT = "Accuracy of each row against the time of its steps, a panel a bed, the area by peak memory"


def main() -> int:
    """Write all files; return 0."""
    arena = dict[str, dict[str, list[float]]]()
    lines = [HEAD]
    for name in ("arena/1", "arena/2"):
        folder = RESULTS / name.replace("/", "-")
        if not folder.is_dir():
            continue
        table = load(name)
        runs, notes = collected.find(folder)
        reader = Reader(table, runs)
        cells = [cell for cell in reader.cells() if cell.values and cell.missing is None]
        for note in [*notes, *reader.notes]:
            print(note, file=sys.stderr)
        based = [
            c for c in cells if any(o.column == c.column and o.row.name == BASE for o in cells)
        ]
        subtract(based, BASE)
        widen(based)
        lines += [f"## {table.title}", ""]
        for column in table.columns:
            own = [cell for cell in based if cell.column.name == column.name]
            if own:
                lines += [f"`smezo table {name} --column {column.name}`:", "", *bed(own), ""]
        if name == "arena/1" and based:
            arena = order(table, based)
            lines += ["## Accuracy against time", "", f"![{ALT}]({PICTURE.name})", ""]
            PICTURE.write_bytes(pareto(table, based))
            lines += ["## What is in print against MeZO", "", *claims(table, based), ""]
    PAGE.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    ARENA.write_text(json.dumps({"methods": arena}, indent=1, sort_keys=True) + "\n")
    return 0


def widen(cells: Sequence[Cell]) -> None:
    """Add to the error of each difference what other seeds would have changed in both means."""
    bases = {cell.column.name: cell for cell in cells if cell.row.name == BASE}
    for cell in cells:
        if cell.less is not None:
            both = (cell, bases[cell.column.name])
            of_seeds = sum((one.sd or 0.0) ** 2 / len(one.values) for one in both)
            points, error = cell.less
            cell.less = points, math.hypot(error, math.sqrt(of_seeds))


def bed(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of the table of a bed, the highest accuracy first."""
    base = next(cell for cell in cells if cell.row.name == BASE)
    yield "| row | accuracy | less MeZO | lr | plateau | time | at MeZO's time | peak |"
    yield "|---|---|---|---|---|---|---|---|"
    for cell in sorted(cells, key=lambda cell: -(cell.mean or 0.0)):
        sd = "" if cell.sd is None else f" ({cell.sd:.1f})"
        less = "" if cell.less is None else "{:+.1f} +- {:.1f}".format(*cell.less)
        time = time_of(cell, base)
        peak = peak_of(cell) / peak_of(base)
        texts = [cell.row.name, f"{cell.mean:.1f}{sd}, {len(cell.values)}", less, lr_of(cell)]
        texts += [plateau(cell), f"{time:.2f}", at_time(cell, 1 / time), f"{peak:.2f}"]
        yield f"| {' | '.join(texts)} |"


def claims(table: Table, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of the table of what papers print of the rows that were run."""
    yield "In points of accuracy unless it says otherwise, on models up to 100 times as large."
    yield ""
    yield f"| row | in print | {' | '.join(column.name for column in table.columns)} |"
    yield "|---" * (2 + len(table.columns)) + "|"
    for row in table.rows:
        own = {cell.column.name: cell.less for cell in cells if cell.row.name == row.name}
        found = [own.get(column.name) for column in table.columns]
        if row.claim and any(found):
            texts = ["" if one is None else "{:+.1f} +- {:.1f}".format(*one) for one in found]
            yield f"| {' | '.join([row.name, row.claim, *texts])} |"


def pareto(table: Table, cells: Sequence[Cell]) -> bytes:
    """Return a picture, as SVG: what no other row beats in both accuracy and time is on a line."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        beds = [[c for c in cells if c.column.name == column.name] for column in table.columns]
        beds = [own for own in beds if own]
        drawing = Figure(figsize=(7.5, 5.5 * len(beds)), layout="constrained")
        FigureCanvasAgg(drawing)
        for k, own in enumerate(beds):
            base = next(cell for cell in own if cell.row.name == BASE)
            points = [(time_of(c, base), c.mean or 0.0, c) for c in own]
            axes = drawing.add_subplot(len(beds), 1, k + 1)
            axes.set(title=own[0].column.name, xscale="log", ylabel="test accuracy (%)")
            axes.set_xlabel("time of all steps, in MeZO's (area: peak memory)")
            for x, y, cell in points:
                area = 40 * peak_of(cell) / peak_of(base)
                axes.scatter([x], [y], s=area, alpha=0.6, color=COLOURS[0])
                note = {"textcoords": "offset points", "fontsize": 6}
                axes.annotate(cell.row.name, (x, y), xytext=(4, 3), **note)
            line = frontier([(x, y) for x, y, _ in points])
            axes.plot([x for x, _ in line], [y for _, y in line], color=COLOURS[1], linewidth=0.8)
        out = io.BytesIO()
        drawing.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points than which no other has both less time and more accuracy, by time."""
    found = list[tuple[float, float]]()
    for time, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or accuracy > found[-1][1]:
            found.append((time, accuracy))
    return found


def lr_of(cell: Cell) -> str:
    """Return the lr that was chosen, marked where it is at an end of those tried."""
    chosen = cell.setting.removeprefix("lr=")
    tried = sorted({float(run.result["lr"]) for run in cell.searched})
    mark = {tried[0]: "<", tried[-1]: ">"}.get(float(chosen), "") if len(tried) > 1 else ""
    return f"{mark}{float(chosen):g}"


def plateau(cell: Cell) -> str:
    """Return how many of the trials come near the best one, of how many that did not diverge."""
    losses = [run.result["dev"]["best"]["loss"] for run in cell.searched]
    return f"{sum(loss <= min(losses) + PLATEAU for loss in losses)} of {len(losses)}"


def time_of(cell: Cell, base: Cell) -> float:
    """Return the seconds of all steps over those of the base.

    Each are of the fastest run of the seeds that both have, for other runs were disturbed more.
    """

    def fastest(cell: Cell, other: Cell) -> float:
        seeds = {run.result["seed"] for run in other.runs}
        return min(
            float(run.result["train_seconds"]) / int(run.result["step"]) * _steps(run)
            for run in cell.runs
            if run.result["seed"] in seeds
        )

    return fastest(cell, base) / fastest(base, cell)


def at_time(cell: Cell, share: float) -> str:
    """Return the accuracy on dev once a share of the steps is made; "" if that is all of them."""
    if share > 0.99:
        return ""
    found = []
    for run in cell.runs:
        before = [score for step, score in run.evaluations() if step <= share * _steps(run)]
        if not before:
            return ""
        found.append(before[-1])
    return f"{100 * sum(found) / len(found):.1f}"


def _steps(run: Run) -> int:
    return int(run.result["steps"])


def peak_of(cell: Cell) -> float:
    """Return the peak memory, mean over the runs."""
    return statistics.mean(float(run.result["peak_memory_bytes"]) for run in cell.runs)


def order(table: Table, cells: Sequence[Cell]) -> dict[str, dict[str, list[float]]]:
    """Return points and error of each method by bed, of the row that says least besides it."""
    plain = dict[str, Line]()
    for row in sorted(table.rows, key=lambda row: len(row.command or ())):
        words = dict(word.partition("=")[::2] for word in row.command or ())
        plain.setdefault(words["method"], row)
    found = dict[str, dict[str, list[float]]]()
    for method, row in plain.items():
        for cell in cells:
            if cell.row.name == row.name:
                points, error = cell.less or (0.0, 0.0)
                of_beds: dict[str, Any] = found.setdefault(method, {})
                of_beds[cell.column.name] = [round(points, 2), round(error, 2)]
    return found


if __name__ == "__main__":
    sys.exit(main())
