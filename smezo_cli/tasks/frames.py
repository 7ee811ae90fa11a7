"""Read rows of JSON that is no list of records: a data frame of pandas, or a wrapped list."""

from collections.abc import Collection, Mapping
from typing import Any

from smezo_cli.errors import UserError

# Of a mapping with other keys beside, under which its list is taken as the rows.
_WRAPPERS = ("data", "rows", "records", "examples", "instances", "items", "entries", "samples")
_SPLITS = {"train", "test", "dev", "validation", "valid", "val"}


def rows_of(value: object, wanted: Collection[str], shown: str) -> list[Any] | None:
    """Return the rows of a data frame or of a wrapped list, None where `value` is one record.

    Read are `{"data": [{..}, ..]}` and the like, a list for each column, and what pandas' `to_json`
    writes by orient split, columns, index and table.

    Args:
        value: what a JSON file holds.
        wanted: names of columns that the rows must have; they tell columns from row names.
        shown: the file, for messages.

    Raises:
        UserError: rows of several splits; columns of unlike length.
    """
    if not isinstance(value, dict) or not value:
        return None
    data, columns = value.get("data"), value.get("columns")
    if isinstance(data, list) and isinstance(columns, list):
        return _split(data, columns, shown)
    lists: dict[str, list[Any]] = {key: v for key, v in value.items() if _is_records(v)}
    if len(lists) > 1 and lists.keys() <= _SPLITS:
        raise UserError(
            f"{shown} holds the lists {', '.join(lists)}: write each to a file of its own, and "
            "give task.data=FILE task.test_data=FILE."
        )
    for key in (*_WRAPPERS, *(value if len(value) == 1 else ())):
        if key in lists:
            return lists[key]
    if all(isinstance(item, list) for item in value.values()) and not lists:
        if len({len(item) for item in value.values()}) > 1:
            raise UserError(
                f"{shown} holds columns of unlike length "
                f"({', '.join(f'{key}: {len(item)}' for key, item in value.items())}); give a list "
                "of records."
            )
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if all(isinstance(item, dict) for item in value.values()):
        return _by_name(value, set(wanted))
    return None


def _is_records(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _split(data: list[Any], columns: list[Any], shown: str) -> list[Any]:
    names = [str(column) for column in columns]
    if len(set(names)) < len(names):
        raise UserError(f"{shown} names a column twice; the columns are {', '.join(names)}.")
    for number, cells in enumerate(data, start=1):
        if not isinstance(cells, list) or len(cells) != len(names):
            raise UserError(
                f"{shown}, row {number}: a list of {len(names)} cells is needed, one for each of "
                f"{', '.join(names)}."
            )
    return [dict(zip(names, cells, strict=True)) for cells in data]


def _by_name(value: Mapping[str, dict[str, Any]], wanted: set[str]) -> list[Any]:
    """Return the rows of a mapping of mappings, whose outer keys name rows or columns."""
    inner = [item.keys() for item in value.values()]
    outer_are_columns = wanted <= value.keys() or (
        not all(wanted <= keys for keys in inner) and all(key.isdecimal() for key in inner[0])
    )
    if not outer_are_columns:
        return list(value.values())
    names = dict.fromkeys(name for column in value.values() for name in column)
    return [{key: column.get(name) for key, column in value.items()} for name in names]
