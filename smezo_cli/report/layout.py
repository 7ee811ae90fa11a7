"""Lay a table out as text, Markdown, CSV or LaTeX."""

import csv
import io
import itertools
import re
import shlex
from collections.abc import Sequence

from smezo_cli.files import strict_json
from smezo_cli.report.cells import Cell
from smezo_cli.report.table import Table

FEW_COMMANDS = 3  # of those that fill empty cells, below a table


def command(words: Sequence[str]) -> str:
    """Return the command line that fills a cell."""
    return shlex.join(["smezo", "train", *words])


def _digits(table: Table) -> int:
    return 0 if table.quantity == "steps_to" else 1


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


def grid(table: Table, cells: Sequence[Cell], less: str) -> tuple[list[str], list[list[str]]]:
    """Return the head, and for each row its lines: ours, paper, difference; no empty ones."""
    columns = list(dict.fromkeys(cell.column.name for cell in cells))
    lines = []
    for row, members in itertools.groupby(cells, key=lambda cell: cell.row.name):
        group = list(members)
        kinds = (("ours", _ours), ("paper", _paper), ("difference", _difference))
        for title, show in (*kinds, (f"less {less}", _less)):
            texts = [show(cell, table) for cell in group]
            if title == "ours" or any(texts):
                by = group[0].row.by if title == "paper" else ""
                lines.append([row if title == "ours" else "", by or title, *texts])
    return ["", "", *columns], lines


def shown(
    table: Table,
    cells: Sequence[Cell],
    notes: Sequence[str],
    form: str,
    less: str = "",
    *,
    every_command: bool = False,
) -> str:
    """Return a table as text.

    Args:
        table: what the cells are of.
        cells: in the order of the table.
        notes: lines below it.
        form: markdown, latex, csv or json.
        less: the row that is subtracted; "" for none.
        every_command: markdown shows all commands that fill empty cells, not the first few.
    """
    records = [
        {
            **{"row": cell.row.name, "column": cell.column.name},
            **{"ours": cell.mean, "sd": cell.sd, "n": len(cell.values), "setting": cell.setting},
            "paper": cell.paper.value if cell.paper else None,
            "paper_sd": cell.paper.sd if cell.paper else None,
            "mark": cell.paper.mark if cell.paper else "",
            **({"by": cell.row.by if cell.paper else ""} if table.sources else {}),
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
        keys = {"sources": dict(table.sources)} if table.sources else {}
        keys["marks"] = dict(table.marks)
        whole = {**about, **keys, "cells": records, "notes": list(notes)}
        return strict_json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()
    head, lines = grid(table, cells, less)
    if form == "latex":
        rows = [head, *lines]
        body = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
        start = rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}"
        return "\n".join([start, r"\hline", body[0], r"\hline", *body[1:], r"\hline",
                          r"\end{tabular}", ""])  # fmt: skip
    text = [f"**{table.title}** ({table.source})", ""]
    text += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]
    text += ["", *(f"{by}: {words}" for by, words in table.sources.items())]
    text += [f"{mark} {words}" for mark, words in table.marks.items()]
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
        first = missing if every_command else missing[:FEW_COMMANDS]
        text += [f"    {line}" for line in first]
        if rest := len(missing) - len(first):
            text += [f"    ... and {rest} more: smezo table {table.id} --commands"]
    return "\n".join(text) + "\n"


def _latex(text: str) -> str:
    escaped = re.sub(r"([&%_#])", r"\\\1", text)
    return escaped.replace("±", r"$\pm$").replace("†", r"$\dagger$")
