"""Follow paths into nested records: `passage.text`, and `[]` for each element of a list.

The path of the rows (`passage.questions[].answers[]`) says what one row is. Other paths also start
at the top of the record: where one begins like the path of the rows, its `[]` there is the element
of this row; any further `[]` collects a list.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Token = tuple[str, bool]  # (name or "", is followed by [])


class NotThereError(Exception):
    """Say that a path leads nowhere, where it ends and what is there."""


@dataclass(frozen=True)
class Place:
    """Hold where a row lies: the objects along the path of the rows, and each []'s element."""

    tokens: tuple[Token, ...]
    stack: tuple[Any, ...]  # the record and the objects behind each token: one more than tokens
    where: str  # such as passage.questions[2].answers[1], "" at the top; counted from 1


def tokens_of(path: str) -> tuple[Token, ...]:
    """Split a path at its dots; "" is the record itself."""
    parts = path.split(".") if path else []
    return tuple((part.removesuffix("[]"), part.endswith("[]")) for part in parts)


def places_of(record: Any, path: str) -> Iterator[Place]:
    """Yield every place that the path of the rows leads to, in order; for "" the record itself.

    Raises:
        NotThereError: a name that a record lacks, or [] behind what has no elements.
    """
    yield from _walk(tokens_of(path), 0, (record,), "")


def _walk(
    tokens: tuple[Token, ...], depth: int, stack: tuple[Any, ...], at: str
) -> Iterator[Place]:
    if depth == len(tokens):
        yield Place(tokens, stack, at)
        return
    name, each = tokens[depth]
    value = _child(stack[-1], name, at)
    at = f"{at}.{name}" if at and name else at or name
    if not each:
        yield from _walk(tokens, depth + 1, (*stack, value), at)
        return
    for number, element in enumerate(_elements(value, at), start=1):
        yield from _walk(tokens, depth + 1, (*stack, element), f"{at}[{number}]")


def value_at(place: Place, path: str) -> Any:
    """Return the value of a path for the row at `place`; a list if it has a [] of its own.

    Raises:
        NotThereError: as `places_of`.
    """
    tokens = tokens_of(path)
    shared = 0
    while tokens[shared : shared + 1] == place.tokens[shared : shared + 1] != ():
        shared += 1
    return _collect(place.stack[shared], tokens[shared:], ".".join(n for n, _ in tokens[:shared]))


def _collect(value: Any, tokens: tuple[Token, ...], at: str) -> Any:
    for depth, (name, each) in enumerate(tokens):
        value = _child(value, name, at)
        at = f"{at}.{name}" if at and name else at or name
        if each:
            found: list[Any] = []
            for element in _elements(value, at):
                inner = _collect(element, tokens[depth + 1 :], at)
                further = any(more for _, more in tokens[depth + 1 :])
                found.extend(inner if further else [inner])
            return found
    return value


def _child(value: Any, name: str, at: str) -> Any:
    if not name:
        return value
    if isinstance(value, Mapping) and value.get(name) is not None:
        return value[name]
    there = ", ".join(map(repr, value)) if isinstance(value, Mapping) else ""
    inside = f" in {at}" if at else ""
    raise NotThereError(f"field {name!r} is missing{inside}; there are {there or 'none'}")


def _elements(value: Any, at: str) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list):
        return value
    raise NotThereError(f"{at or 'the record'} must be a list and is a {type(value).__name__}")
