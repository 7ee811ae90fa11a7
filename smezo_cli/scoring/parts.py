"""Group the rows of a mixture by their part: the scorer itself sees rows of one task at a time."""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class OfPart(Protocol):
    """Describe a row or a prompt, which may be of a part."""

    @property
    def part(self) -> str: ...


T = TypeVar("T", bound=OfPart)


def by_part(items: Iterable[T]) -> dict[str, list[T]]:
    """Return rows, or prompts, by the name of their part, in order; "" is that of a single task."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(item.part, []).append(item)
    return found


def of_one_part(items: Iterable[T]) -> list[T]:
    """Return the items of the part that the first one is of."""
    return next(iter(by_part(items).values()), [])
