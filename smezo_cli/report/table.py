"""Read a table of a paper from its YAML file: rows, columns and the printed values."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smezo_cli.config.fixed import CONF_DIR, WITHOUT_STEPS, plain
from smezo_cli.errors import UserError, near
from smezo_cli.files import bounded


@dataclass(frozen=True)
class Printed:
    """Hold a value as printed, its spread, and a mark that the table's `marks` explains."""

    value: float
    sd: float | None
    mark: str


@dataclass(frozen=True)
class Line:
    """Describe a row or a column; one without a command says in `awaits` what smezo lacks."""

    name: str
    command: tuple[str, ...] | None
    awaits: str = ""
    quantity: str = ""
    of: str = ""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    paper: tuple[Printed | None, ...] = ()
    search: tuple[str, ...] = ()  # what the runs of its search have besides, such as fewer steps
    without: Mapping[str, str] = field(default_factory=dict)  # why it has no value, by column
    seeds: tuple[int, ...] = ()  # of this row, where they are not those of the table
    one_seed: bool = False  # no value of it depends on the seed
    no_steps: bool = False  # the table's settings of steps do not hold for it
    claim: str = ""  # what a paper says of it
    by: str = ""  # whose run the printed values are; `sources` of the table says where they stand


@dataclass(frozen=True)
class Table:
    """Hold a table of a paper, as conf/table/ has it."""

    id: str
    title: str
    source: str
    quantity: str
    level: float
    common: tuple[str, ...]
    extra: tuple[str, ...]
    seeds: tuple[int, ...]
    search_seed: int | None  # of the searches of rows; None: the first of the seeds
    search_by: str  # what a search chooses by on dev: metric, then loss; or loss
    finals: int  # of the best settings of a row's search, run whole with the first seed
    marks: Mapping[str, str]
    sources: Mapping[str, str]
    columns: tuple[Line, ...]
    rows: tuple[Line, ...]

    def words(self, row: Line, column: Line) -> tuple[str, ...] | None:
        """Return what follows `smezo train` for a cell; None if smezo cannot run it yet."""
        if row.of:
            row = next(line for line in self.rows if line.name == row.of)
        if row.command is None or column.command is None or column.name in row.without:
            return None
        also = row.also.get(column.name, ())
        words = last((*row.command, *self.common, *column.command, *also, *self.extra))
        if row.no_steps:
            return tuple(word for word in words if word.partition("=")[0] not in WITHOUT_STEPS)
        return words

    def seeds_of(self, row: Line) -> tuple[int, ...]:
        """Return the seeds whose runs a row is the mean of."""
        seeds = row.seeds or self.seeds
        return seeds[:1] if row.one_seed else seeds

    def searched(self, row: Line, words: Sequence[str]) -> tuple[str, ...]:
        """Return what follows `smezo train` for the runs that choose the settings of a cell."""
        seed = self.seeds_of(row)[0] if self.search_seed is None else self.search_seed
        return last((*words, *row.search, f"seed={seed}"))


def last(words: Sequence[str]) -> tuple[str, ...]:
    """Return the last value of each setting that is given more than once."""
    return tuple({word.partition("=")[0]: word for word in words}.values())


def names() -> list[str]:
    """Return the ids of the tables."""
    folder = CONF_DIR / "table"
    return sorted(f.relative_to(folder).with_suffix("").as_posix() for f in folder.rglob("*.yaml"))


def load(name: str, extra: Sequence[str] = ()) -> Table:
    """Read a table; `extra` are settings of all its cells, or of one column (COLUMN:KEY=VALUE).

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
    given = _seeds(seeds[-1]) if seeds else ()
    mark = str(node.get("mark", ""))
    return Table(
        id=name,
        title=node["title"],
        source=node["source"],
        quantity=node.get("quantity", "score"),
        level=float(node.get("level", 0)),
        common=_split(node["command"]),
        extra=tuple(word for word in common if word not in seeds),
        seeds=given or tuple(node["seeds"]),
        search_seed=node.get("search_seed"),
        search_by=node.get("search_by", "metric"),
        finals=int(node.get("finals", 1)),
        marks=node.get("marks", {}),
        sources=node.get("sources", {}),
        columns=tuple(
            _line(str(k), v, mark, own.get(str(k), ())) for k, v in node["columns"].items()
        ),
        rows=tuple(
            _line(str(k), v | {"seeds": given or v.get("seeds", ())}, mark, ())
            for k, v in node["rows"].items()
        ),
    )


def _seeds(word: str) -> tuple[int, ...]:
    """Return the seeds of seed=N,N, each once."""
    texts = [text.strip() for text in word.removeprefix("seed=").split(",")]
    if not all(text.isascii() and text.isdecimal() and int(text) < 2**63 for text in texts):
        raise UserError(f"{word}: seeds of a table are whole numbers of at least 0: seed=0,1,2.")
    return tuple(dict.fromkeys(map(int, texts)))


def check_names(
    table: Table, rows: Sequence[str], columns: Sequence[str], flag_of_rows: str = "row"
) -> None:
    """Raise UserError if the table lacks one of these rows or columns."""
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
        quantity=node.get("quantity", ""),
        of=node.get("of", ""),
        also={str(key): _split(words) for key, words in node.get("also", {}).items()},
        paper=tuple(_printed(value, mark) for value in node.get("paper", ())),
        search=_split(node.get("search")),
        seeds=tuple(node.get("seeds", ())),
        without=node.get("without", {}),
        one_seed=bool(node.get("one_seed")),
        no_steps=bool(node.get("no_steps")),
        claim=node.get("claim", ""),
        by=node.get("by", ""),
    )


def _printed(value: object, mark: str) -> Printed | None:
    if value is None:
        return None
    found = re.fullmatch(r"(-?[\d.]+)(?: \(([\d.]+)\))?(\D*)", str(value))
    assert found is not None, f"{value} is no printed value"
    sd = found[2]
    return Printed(float(found[1]), float(sd) if sd else None, found[3] or mark)
