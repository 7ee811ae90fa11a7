"""Writes docs/guide/result-json.md from the keys and descriptions in smezo_cli/store/schema.py.

.venv/bin/python scripts/result_page.py
"""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typing_extensions
from pydantic.fields import FieldInfo

from smezo_cli.store import schema, values

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guide" / "result-json.md"
WORDS = {
    values.Text: "text",
    values.Count: "count",
    values.Number: "number",
    values.Flag: "true or false",
    values.Metrics: "object",
    Any: "",
    type(None): "null",
}
HEAD = """# result.json

Every run writes `result.json` into its folder: at its start, and again when it ends. It is one JSON
object with these keys, in this order; `test.accuracy` is the key `accuracy` of the object `test`.

* A file of an older version may lack keys, and one of a newer version may have more.
* A number that is not finite is written as `null`.
* A *count* is a whole number from 0.
* Where no type is given, the value is not checked when the file is read.

This page is written by `scripts/result_page.py` from `smezo_cli/store/schema.py`.

| key | type | meaning |
|---|---|---|
"""


def parts(hint: Any) -> tuple[Any, str]:
    """Return a type without its checks, and its description."""
    says = ""
    while hint not in WORDS:
        if typing.get_origin(hint) is typing.Required:
            hint = typing.get_args(hint)[0]
        elif typing.get_origin(hint) is typing.Annotated:
            hint, *more = typing.get_args(hint)
            more = [of.description for of in more if isinstance(of, FieldInfo) and of.description]
            says = says or "".join(more)
            known = [of for of in WORDS if typing.get_origin(of) is typing.Annotated]
            hint = next((of for of in known if typing.get_args(of)[0] is hint), hint)
        else:
            break
    return hint, says


def words(hint: Any) -> str:
    """Return a type in words."""
    hint, _ = parts(hint)
    if hint in WORDS:
        return WORDS[hint]
    inner = typing.get_args(hint)
    match typing.get_origin(hint):
        case types.UnionType | typing.Union:
            return " or ".join(words(of) for of in inner)
        case typing.Literal:
            return " or ".join(f"`{value}`" for value in inner)
        case origin if origin is list:
            return f"list of {words(inner[0])}"
    return "object"


def rows(of: Any, prefix: str, told: dict[Any, str]) -> Iterator[str]:
    """Yield the lines of the table for a TypedDict and what lies in it, each TypedDict once.

    Args:
        of: the TypedDict.
        prefix: of its keys.
        told: where the keys of a TypedDict have been listed before.
    """
    for key, hint in typing.get_type_hints(of, include_extras=True).items():
        inner, says = parts(hint)
        path, found = f"{prefix}{key}", None
        is_union = typing.get_origin(inner) in (types.UnionType, typing.Union)
        for choice in typing.get_args(inner) if is_union else (inner,):
            choice, _ = parts(choice)
            is_table = typing.get_origin(choice) is dict
            choice = typing.get_args(choice)[1] if is_table else choice
            if typing_extensions.is_typeddict(choice):
                found, below = choice, f"{path}.NAME." if is_table else f"{path}."
        if found in told:
            says += f" Its keys are those of `{told[found]}`."
        yield f"| `{path}` | {words(inner)} | {says} |\n"
        if found is not None and found not in told:
            told[found] = path
            yield from rows(found, below, told)


def page() -> str:
    """Return the page."""
    return HEAD + "".join(rows(schema.Result, "", {}))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
