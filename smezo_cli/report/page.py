"""Write runs as one HTML page that needs nothing else: no network, no other file."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from smezo_cli import __version__
from smezo_cli.report import page_settings, page_tables
from smezo_cli.report.cells import Cell, Reader
from smezo_cli.report.layout import command, grid
from smezo_cli.report.page_blocks import Block, blocks
from smezo_cli.report.runs import Run, load
from smezo_cli.report.table import Table

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Row:
    """Hold a row of a paper's table: each line is ours, the paper's or the difference."""

    name: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass
class Filled:
    """Hold a paper's table as it is filled, and what fills the rest."""

    id: str
    title: str
    source: str
    head: list[str]
    rows: list[Row]
    notes: list[str]
    missing: list[str]


@dataclass
class Page:
    """Hold all that a report shows.

    Attributes:
        words: of the line that made it, behind `smezo`.
        runs: every one, in order.
        blocks: of those that are finished.
        unfinished: the others.
        damaged: a line for each folder or file that cannot be read.
        table: the paper's table that the runs are of.
    """

    words: str
    runs: list[Run]
    blocks: list[Block] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    table: Filled | None = None

    @property
    def finished(self) -> list[Run]:
        """Return the finished runs."""
        return [run for run in self.runs if run.result["status"] == "done"]

    @property
    def environment(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Return versions and devices of the runs that tell them."""
        return page_settings.environment([r for r in self.runs if r.result.get("versions")])

    @property
    def dates(self) -> tuple[str, str] | None:
        """Return when the first run started and the last one ended, as far as they say."""
        started = [t for run in self.runs if isinstance(t := run.result.get("started"), str)]
        ended = [t for run in self.runs if isinstance(t := run.result.get("ended"), str)]
        return (min(started), max(ended)) if started and ended else None


_NEEDED = ("task", "model", "method", "seed")


def page(
    words: str,
    runs: Sequence[Run],
    damaged: Sequence[str] = (),
    names: Mapping[Path, str] | None = None,
) -> Page:
    """Return the page of runs.

    Args:
        words: of the line that asks for it.
        runs: finished ones and others.
        damaged: lines on folders that hold no run that can be read.
        names: of the runs that a table took, the names of its rows.
    """
    found = Page(words, list(runs), damaged=list(damaged))
    done = [run for run in found.finished if run.config and _is_named(run)]
    found.blocks, notes = blocks(done, names or {})
    lost = [run for run in found.finished if run not in done]
    found.damaged += [f"{run.path}/config.yaml has no settings." for run in lost] + notes
    found.unfinished = [run for run in runs if run.result["status"] != "done"]
    return found


def _is_named(run: Run) -> bool:
    return all(run.result.get(key) is not None for key in _NEEDED)


def filled(table: Table, cells: Sequence[Cell], reader: Reader) -> Filled:
    """Return a paper's table as a page shows it."""
    head, lines = grid(table, cells, "")
    rows: list[Row] = []
    for name, kind, *texts in lines:
        line = (kind, tuple(texts))
        rows = [*rows, Row(name, (line,))] if name else [*rows[:-1], _longer(rows[-1], line)]
    notes = [f"{by}: {words}" for by, words in table.sources.items()]
    notes += [f"{mark} {words}" for mark, words in table.marks.items()]
    notes += reader.notes
    notes += dict.fromkeys(f"{c.row.name}, {c.column.name}: {c.why}." for c in cells if c.why)
    missing = dict.fromkeys(command(cell.missing) for cell in cells if cell.missing)
    return Filled(table.id, table.title, table.source, head[2:], rows, notes, list(missing))


def _longer(row: Row, line: tuple[str, tuple[str, ...]]) -> Row:
    return Row(row.name, (*row.lines, line))


def unreadable(runs_dir: Path) -> list[str]:
    """Return a line for each folder with a result.json or settings of a run that cannot be read."""
    files = {f.parent for name in ("result.json", "config.yaml") for f in runs_dir.rglob(name)}
    found = []
    for folder in sorted(files):
        if load(folder) is not None or folder.name == ".hydra":
            continue
        what = "result.json or config.yaml is damaged or missing"
        found.append(f"{folder}: {what}; the command of the run makes it again.")
    return found


# --- HTML ------------------------------------------------------------------------------------


def html(content: Page) -> str:
    """Return the page as HTML. The same runs give the same text."""
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    env = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "percent": page_tables.percent,
        "gain": page_tables.gain,
        "plain": page_settings.text,
    }
    return env.get_template("page.html").render(
        page=content,
        tables=page_tables,
        version=__version__,
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,  # lets the browser run this script and no other
    )


# Control characters but line feed and tab, and halves of surrogate pairs: HTML has none of them.
_NOT_OF_HTML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def _readable(value: Any) -> Any:
    """Replace characters that a page cannot hold, in whatever the template writes."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _NOT_OF_HTML.sub("\ufffd", value)
    return value
