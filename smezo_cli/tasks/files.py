"""Files as records: JSON lines, JSON, CSV, TSV, Parquet, and by request parsed lines and trees.

Every record knows its exact place, for messages.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smezo_cli.errors import UserError
from smezo_cli.intake import check_ordinary

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


class Record(NamedTuple):
    """One record of a file.

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


def sha256_of(*paths: Path) -> str:
    """Hex digest of one file, or of the digests of several; UserError if one cannot be read."""
    digests = []
    for path in paths:
        try:
            check_ordinary(path)
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def read_file(
    path: Path,
    *,
    quotes: bool = True,
    form: str | None = None,
    line: str | None = None,
    encoding: str = "utf-8-sig",
) -> Iterator[Record]:
    """Records of a file, by its extension unless `form` or `line` says otherwise.

    A JSON file gives its elements if it is a list, else itself as the only record.

    Args:
        path: the file.
        quotes: False: in a TSV they are ordinary characters.
        form: `jsonl`, whatever the extension; `trees`: a bracketed tree a line, `(3 (2 A) (4 b))`,
            gives the label of its root as `label` and its words, joined by blanks, as `text`.
        line: a regular expression with named groups that each line must match; they are the fields.
        encoding: of parsed lines.

    Raises:
        UserError: naming file, line and column of what cannot be read; a file without records.
    """
    suffix = path.suffix.lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".trees": _trees}
    if form is not None:
        suffix = f".{form}"
    try:
        check_ordinary(path)
        if line is not None:
            records = _parsed(path, re.compile(line), encoding)
        elif suffix in readers:
            records = readers[suffix](path)
        elif suffix in (".csv", ".tsv"):
            records = _table(path, "," if suffix == ".csv" else "\t", quotes)
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


def _jsonl(path: Path) -> Iterator[_Found]:
    # By bytes: a text may hold characters that str.splitlines() takes for line ends.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON in UTF-8 ({error}).") from error
                _check_characters(line, value, where)
                yield where, number, value


def lines_of(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """The lines of a text file without their ends, and without an empty last one.

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


def _json(path: Path) -> Iterator[_Found]:
    data = path.read_bytes()
    if not data.strip():
        return
    try:
        value = json.loads(data.decode("utf-8-sig"))
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
    """Half of a character, which JSON can spell and nothing can write."""
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: a text holds half of a character, \\ud800 to \\udfff alone; mend it."
            ) from error


def _table(path: Path, delimiter: str, quotes: bool) -> Iterator[_Found]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); save the file as "
            "UTF-8."
        ) from error
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        strict=True,
    )
    columns: list[str] | None = None
    line = 1
    limit = csv.field_size_limit(2**31 - 1)  # a document may be longer than csv's 128 KiB
    try:
        for cells in rows:
            where, number, line = f"{path}, line {line}", line, rows.line_num + 1
            if not cells:
                continue
            if columns is None:
                columns = _header(cells, where)
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{where}: {len(cells)} cells, and the first line names {len(columns)} columns "
                    f"({', '.join(columns)}); a cell that holds a "
                    f"{'comma' if delimiter == ',' else 'tab'} needs quotes."
                )
            yield where, number, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line}: {error}; a quoted cell ends with a quote, and a quote in it is "
            "written twice."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _header(cells: list[str], where: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    for column in columns:
        if not column or columns.count(column) > 1:
            raise UserError(
                f"{where}: the first line must name each column once, and "
                f"{column or 'an empty name'!r} stands there"
                f"{' twice' if column else ''}; the columns are {', '.join(map(repr, columns))}."
            )
    return columns


def _parquet(path: Path) -> Iterator[_Found]:
    import pyarrow  # type: ignore[import-untyped]  # the library ships no types
    from pyarrow import parquet

    # A table of a kilobyte can unpack to a terabyte; one of texts grows by far less than this.
    most = _FREE_BYTES + _MOST_GROWTH * path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            about = file.metadata
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
                    yield f"{path}, row {number}", number, value
    except UserError:
        raise
    # Arrow's own, and what Python makes of a cell: a day beyond the calendar, bytes for text.
    except (pyarrow.ArrowException, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UserError(f"{path} is no Parquet file that can be read ({reason}).") from error


_FREE_BYTES, _MOST_GROWTH = 1 << 24, 200
_BYTES_A_CELL = 32  # at least, of a value of Python


def _unpacks(path: Path, most: int) -> str:
    return (
        f"{path} has {path.stat().st_size} bytes and unpacks to more than {most}; give the rows as "
        ".jsonl."
    )
