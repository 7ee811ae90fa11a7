"""Read files as records: JSON lines, JSON, CSV, TSV, Parquet, parsed lines and trees.

Every record knows its exact place, for messages.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smezo_cli.errors import UserError, first_line
from smezo_cli.files.bounded import check_ordinary, sha256_of

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


class Record(NamedTuple):
    """Hold one record of a file.

    Attributes:
        where: its place for messages: "FILE, line 3".
        number: which record of its file it is, from 1; the same in every format.
        value: what stands there; a mapping in all files but JSON and JSON lines.
        line: where it begins: its line, or in a JSON list and Parquet its row, from 1; 0 where it
            has none.
    """

    where: str
    number: int
    value: Any
    line: int = 0


_Found = tuple[str, int, Any]  # a record's place, its line or row, and its value


def digest_of(*paths: Path) -> str:
    """Return the SHA-256 of one file, or of several digests; UserError where one is unreadable."""
    digests = []
    for path in paths:
        try:
            digests.append(sha256_of(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def read_file(
    path: Path,
    *,
    quotes: bool | None = True,
    notes: list[str] | None = None,
    unique_keys: bool = False,
    form: str | None = None,
    line: str | None = None,
    encoding: str = "utf-8-sig",
) -> Iterator[Record]:
    """Yield the records of a file, by its extension unless `form` or `line` says otherwise.

    A JSON file gives its elements if it is a list, else itself as the only record.

    Args:
        path: the file.
        quotes: of a table; True: cells may stand in quotes, as `csv` reads them; False: they are
            ordinary characters; None: as True, but a cell that may have swallowed rows is refused.
        notes: receives what of the quotes is to be said.
        unique_keys: refuse a JSON record in which a key stands twice.
        form: `jsonl`, whatever the extension; `trees`: a bracketed tree a line, `(3 (2 A) (4 b))`,
            gives the label of its root as `label` and its words, joined by blanks, as `text`.
        line: a regular expression with named groups that each line must match; they are the fields.
        encoding: of parsed lines.

    Raises:
        UserError: naming file, line and column of what cannot be read; a file without records.
    """
    suffix = path.suffix.lower()
    loads = _loads_once if unique_keys else json.loads
    readers: dict[str, Callable[[Path], Iterator[_Found]]] = {
        ".jsonl": lambda path: _jsonl(path, loads),
        ".json": lambda path: _json(path, loads),
        ".parquet": _parquet,
        ".trees": _trees,
    }
    if form is not None:
        suffix = f".{form}"
    try:
        check_ordinary(path)
        _check_content(path, suffix)
        if line is not None:
            records = _parsed(path, re.compile(line), encoding)
        elif suffix in readers:
            records = readers[suffix](path)
        elif suffix in (".csv", ".tsv"):
            records = _table(path, "," if suffix == ".csv" else "\t", quotes, notes)
        else:
            raise UserError(
                f"{path}: files of this kind are not read; give a {', '.join(SUFFIXES[:-1])} or "
                f"{SUFFIXES[-1]} file."
            )
        number = 0
        for number, (where, begins, value) in enumerate(records, start=1):
            yield Record(where, number, value, begins)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not number:
        raise UserError(f"{path} has no rows.")


# How files begin that are not what their name says, and what to do about them.
_STAND_INS = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, which stands for the data "
     "where it was not fetched: run git lfs pull in its folder"),
    (b"/annex/objects/", "a git-annex pointer, which stands for the data where it was not fetched: "
     "run git annex get on it"),
    (b"<!doctype html", "a web page: fetch the data itself (of a hub its raw or resolve address)"),
    (b"<html", "a web page: fetch the data itself (of a hub its raw or resolve address)"),
)  # fmt: skip
_PACKED = (
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"BZh91AY&SY", "compressed by bzip2: unpack it"),
    (b"\xfd7zXZ\x00", "compressed by xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    (b"PK\x03\x04", "a zip archive or an Excel table: unpack it, or save the table as CSV"),
    (b"PAR1\x15", "a Parquet file: let its name end in .parquet"),
    (b"\xff\xfe", "in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "in UTF-16: save it as UTF-8"),
)


def _check_content(path: Path, suffix: str) -> None:
    """Raise UserError for a stand-in of a file, or one named like another kind of file."""
    with path.open("rb") as file:
        head = file.read(64)
    kinds = _STAND_INS if suffix == ".parquet" else _STAND_INS + _PACKED
    for sign, what in kinds:
        if head.startswith(sign) or head.lstrip().lower().startswith(sign):
            raise UserError(f"{path} is {what}.")


def _loads_once(text: str) -> Any:
    """Parse JSON; raise ValueError where a key stands twice in a mapping."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _TwiceError(f"key {twice!r} stands twice in a record; take one of them out")
    return found


class _TwiceError(ValueError):
    """Say that a key of a JSON mapping stands twice."""


def _jsonl(path: Path, loads: Callable[[str], Any]) -> Iterator[_Found]:
    # By bytes: a text may hold characters that str.splitlines() takes for line ends.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    value = loads(line.decode("utf-8-sig"))
                except _TwiceError as error:
                    raise UserError(f"{where}: {error}.") from error
                except (ValueError, RecursionError) as error:
                    hint = _hint_of_whole(path)
                    raise UserError(f"{where}: not JSON in UTF-8 ({error}){hint}.") from error
                _check_characters(line, value, where)
                yield where, number, value


def _hint_of_whole(path: Path) -> str:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return ""
    return "; the whole file is one JSON text: let its name end in .json"


def lines_of(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """Return the lines of a text file without their ends, and without an empty last one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = path.read_bytes().decode(encoding)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding.upper()} ({error.reason}).") from error
    # Not str.splitlines(), which takes some characters of a text for line ends.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _parsed(path: Path, pattern: re.Pattern[str], encoding: str) -> Iterator[_Found]:
    for number, line in enumerate(lines_of(path, encoding), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            if not (match := pattern.fullmatch(line)):
                raise UserError(
                    f"{where}: {line[:80]!r} is not of the form of such a file, {pattern.pattern}."
                )
            yield where, number, match.groupdict()


def _trees(path: Path) -> Iterator[_Found]:
    for number, line in enumerate(lines_of(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            root = re.fullmatch(r"\s*\((\S+) .*\)\s*", line)
            words = re.findall(r"\(\S+ ([^\s()]+)\)", line)
            if not root or not words or line.count("(") != line.count(")"):
                raise UserError(
                    f"{where}: {line[:80]!r} is no tree such as (3 (2 A) (4 film)), with a label "
                    "behind each bracket."
                )
            yield where, number, {"label": root[1], "text": " ".join(words)}


def _json(path: Path, loads: Callable[[str], Any]) -> Iterator[_Found]:
    data = path.read_bytes()
    if not data.strip():
        return
    try:
        value = loads(data.decode("utf-8-sig"))
    except _TwiceError as error:
        raise UserError(f"{path}: {error}.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            hint = "; if each line is a record of its own, name the file .jsonl"
        else:
            hint = ""
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}){hint}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({error}).") from error
    _check_characters(data, value, str(path))
    if not isinstance(value, list):
        yield str(path), 1, value
        return
    for number, element in enumerate(value, start=1):
        yield f"{path}, row {number}", number, element


def _check_characters(data: bytes, value: Any, where: str) -> None:
    """Raise UserError for half of a character, which JSON can spell and nothing can write."""
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: a text holds half of a character, \\ud800 to \\udfff alone; mend it."
            ) from error


def _table(
    path: Path, delimiter: str, quotes: bool | None, notes: list[str] | None
) -> Iterator[_Found]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); save the file as "
            "UTF-8."
        ) from error
    unquoted = f"; {_UNQUOTED}" if quotes is None and '"' in text else ""
    columns: list[str] | None = None
    wide: list[tuple[int, int]] = []  # first and last line of records that have several
    line = 1
    limit = csv.field_size_limit(2**31 - 1)  # a document may be longer than csv's 128 KiB
    rows = _cells(io.StringIO(text, newline=""), delimiter, quotes is not False)
    try:
        for cells, last in rows:
            where, number, line = f"{path}, line {line}", line, last + 1
            if not cells:
                continue
            if columns is None:
                columns = _header(cells, where)
                continue
            if (given := _fitted(cells, columns)) is None:
                raise UserError(
                    f"{where}: {len(cells)} cells, and the first line names {len(columns)} columns "
                    f"({', '.join(columns)}); a cell that holds a "
                    f"{'comma' if delimiter == ',' else 'tab'} needs quotes{unquoted}."
                )
            if last > number:
                wide.append((number, last))
            yield where, number, _named(columns, given)
        if quotes is None and wide and columns is not None:
            _check_swallowed(path, text, delimiter, wide, len(columns), notes)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line}: {error}; a quoted cell ends with a quote, and a quote in it is "
            f"written twice{unquoted}."
        ) from error
    finally:
        csv.field_size_limit(limit)


_UNQUOTED = "where quotation marks are ordinary characters, add task.quoting=none"


def _cells(lines: Iterable[str], delimiter: str, quotes: bool) -> Iterator[tuple[list[str], int]]:
    """Yield the cells of each record, and the number of its last line."""
    rows = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        strict=True,
    )
    for cells in rows:
        yield cells, rows.line_num


def _header(cells: list[str], where: str) -> list[str]:
    """Return the names of the columns, "" for one without a name (a data frame's index)."""
    columns = [cell.strip() for cell in cells]
    for column in columns:
        if column and columns.count(column) > 1:
            raise UserError(
                f"{where}: the first line must name each column once, and {column!r} stands there "
                f"twice; the columns are {', '.join(map(repr, columns))}."
            )
    return columns


def _fitted(cells: list[str], columns: Sequence[str]) -> list[str] | None:
    """Return a cell for each column, or None if there are others; a last comma is no cell."""
    size = len(columns)
    if any(cells[size:]) or any(columns[len(cells) :]):
        return None
    return [*cells[:size], *[""] * (size - len(cells))]


def _named(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Return cells by the names of their columns; one column may have no name, and is ""."""
    named = dict(zip(columns, cells, strict=True))
    if columns.count("") > 1:
        del named[""]
    return named


def _check_swallowed(
    path: Path,
    text: str,
    delimiter: str,
    wide: Sequence[tuple[int, int]],
    size: int,
    notes: list[str] | None,
) -> None:
    """Find records of several lines, each of which would be a record if quotes were plain text.

    A stray quotation mark at the start of a cell swallows all up to the next one at the end of a
    cell. In a TSV such a record is refused, since a tab is seldom text. So it is in a CSV where
    its lines have in a column what other records have there; elsewhere it is noted.

    Raises:
        UserError: rows are swallowed.
    """
    lines = io.StringIO(text, newline="").readlines()
    found: list[tuple[int, int, list[list[str]]]] = []
    for first, last in wide:
        apart = [cells for cells, _ in _cells(lines[first - 1 : last], delimiter, False)]
        if all(len(cells) == size for cells in apart):
            found.append((first, last, apart))
    if not found:
        return
    for first, last, _ in found:
        lines[first - 1 : last] = ["\n"] * (last - first + 1)
    rest = [cells for cells, _ in _cells(lines, delimiter, False) if len(cells) == size]
    known = [set(column) for column in zip(*rest[1:], strict=True)]  # without the header
    for first, last, apart in found:
        is_known = any(
            all(cells[at] and cells[at] in of for cells in apart) for at, of in enumerate(known)
        )
        where = f"{path}, line {first}: a quotation mark makes one row of lines {first} to {last}"
        if size > 1 and (delimiter == "\t" or is_known):
            raise UserError(
                f"{where}, each of which could be a row; {_UNQUOTED}, else task.quoting=minimal."
            )
    if notes is not None:
        others = f" (and of {len(found) - 1} more)" if len(found) > 1 else ""
        first, last, _ = found[0]
        notes.append(
            f"{path.name}: a quotation mark makes one row of lines {first} to {last}{others}; "
            f"{_UNQUOTED}"
        )


def _parquet(path: Path) -> Iterator[_Found]:
    import pyarrow  # type: ignore[import-untyped]  # the library ships no types
    from pyarrow import parquet

    # A table of a kilobyte can unpack to a terabyte; one of texts grows by far less than this.
    most = _FREE_BYTES + _MOST_GROWTH * path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            about = file.metadata
            names = file.schema_arrow.names
            for name in names:
                if names.count(name) > 1:
                    raise UserError(
                        f"{path}: each column must have a name of its own, and {name!r} stands "
                        f"there twice; the columns are {', '.join(map(repr, names))}."
                    )
            read = {
                field.name: reading
                for field in file.schema_arrow
                if (reading := _reading(field.type)) is not None
            }
            groups = [about.row_group(at).total_byte_size for at in range(about.num_row_groups)]
            unpacked = max(sum(groups), 0) + _BYTES_A_CELL * about.num_rows * about.num_columns
            if unpacked > most:
                raise UserError(_unpacks(path, most))
            number, unpacked = 0, 0
            for batch in file.iter_batches(batch_size=1024):
                unpacked += batch.nbytes
                if unpacked > most:
                    raise UserError(_unpacks(path, most))
                for value in batch.to_pylist():
                    number += 1
                    for name, reading in read.items():
                        if value[name] is not None:
                            value[name] = reading(value[name])
                    yield f"{path}, row {number}", number, value
    except UserError:
        raise
    # Arrow's own, and what Python makes of a cell: a day beyond the calendar, bytes for text.
    except (pyarrow.ArrowException, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        reason = first_line(error)
        raise UserError(f"{path} is no Parquet file that can be read ({reason}).") from error


def _reading(kind: Any) -> Callable[[Any], Any] | None:
    """Return what turns a cell into what a CSV of the table has; None if it is that already."""
    import numpy
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind):  # texts that are not marked as such
        return _as_text
    if types.is_float32(kind):
        return lambda value: float(str(numpy.float32(value)))  # 0.1, not 0.10000000149011612
    if types.is_float16(kind):
        return lambda value: float(str(numpy.float16(value)))
    return None


def _as_text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


_FREE_BYTES, _MOST_GROWTH = 1 << 24, 200
_BYTES_A_CELL = 32  # at least, of a value of Python


def _unpacks(path: Path, most: int) -> str:
    return (
        f"{path} has {path.stat().st_size} bytes and unpacks to more than {most}; give the rows as "
        ".jsonl."
    )
