"""Read the labels of the user's own rows: classes by their words, and which option is right."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.tasks.columns import Columns, Split, is_empty, one_spelling, shortened
from smezo_cli.tasks.files import Record
from smezo_cli.tasks.templates import LETTERS
from smezo_cli.words import mapping_of


def label_words(labels: Any) -> tuple[list[str] | None, list[str]]:
    """Return the values of the label column (None: numbers) and their words, both by class."""
    labels = mapping_of(labels, "task.labels")
    if not isinstance(labels, Mapping | list):
        raise UserError(
            f"task.labels={labels} gives no word for each class; write it as "
            "{0: terrible, 1: great}, with the values of the label column before the colons."
        )
    if len(labels) < 2:
        raise UserError(
            f"task.labels={labels} gives words for fewer than two classes, which leaves nothing to "
            "tell apart; write it as {0: terrible, 1: great}."
        )
    if isinstance(labels, list):
        return None, labels
    words = {one_spelling(value): word for value, word in labels.items()}
    if len(words) < len(labels):
        raise UserError(f"task.labels={labels} gives one value of the label column two words.")
    keys = list(words)
    if set(keys) == {str(index) for index in range(len(keys))}:
        keys.sort(key=int)  # however they are written, classes 0, 1, ... are in this order
    return keys, [words[key] for key in keys]


def label_values(splits: Iterable[Split], column: str) -> list[object]:
    """Return what stands in a column in all rows."""
    return [record.value.get(column) for split in splits for record in split.records]


def keys_of_list(size: int, values: Sequence[object]) -> list[str]:
    """Return the values that a list of words is for: 0, 1, ..., or 1, 2, ... if rows have these.

    Args:
        size: how many words there are.
        values: of the label column in all rows.
    """
    found = {one_spelling(value) for value in values if not is_empty(value)}
    from_0, from_1 = ([str(i + start) for i in range(size)] for start in (0, 1))
    return from_1 if found <= set(from_1) and not found <= set(from_0) else from_0


def notes_on_spellings(values: Sequence[object], keys: Sequence[str]) -> list[str]:
    """Return a line for each class whose labels are written in several ways."""
    spelled: dict[str, dict[str, None]] = {}
    for value in values:
        if isinstance(value, str):
            spelled.setdefault(one_spelling(value), {})[value.strip()] = None
    return [
        f"the labels {', '.join(map(repr, list(spelled[key])[:8]))} are read as one class, {key}"
        for key in keys
        if len(spelled.get(key, ())) > 1
    ]


def class_indices(
    split: Split, columns: Columns, keys: Sequence[str], words: Sequence[Any]
) -> list[int]:
    """Return the class of each row; UserError for a label that has no word."""
    column = columns.column(str(columns.cfg["label"]))
    # A data set of the hub stores numbers for words; either may be what task.labels names.
    names = split.class_names.get(column, [])
    as_words = bool(names) and set(keys) <= {one_spelling(name) for name in names}
    classes = {key: index for index, key in enumerate(keys)}
    found = []
    for record in split.records:
        value = record.value.get(column)
        if as_words and isinstance(value, int) and value in range(len(names)):
            value = names[value]
        if (key := one_spelling(value)) not in classes:
            _refuse_empty(value, record, column)
            others = {one_spelling(v): v for v in label_values([split], column) if not is_empty(v)}
            some = ", ".join(sorted(others)[:8]) + (", ..." if len(others) > 8 else "")
            raise UserError(
                f"{record.where}, column {column!r}: the label is {shortened(value)} and "
                f"task.labels has words for {', '.join(keys)}; give a word for each value of "
                f"the column ({some}), as {{{some.partition(',')[0]}: {words[0]}, ...}}."
            )
        found.append(classes[key])
    return found


def _refuse_empty(value: object, record: Record, column: str) -> None:
    if is_empty(value):
        raise UserError(
            f"{record.where}, column {column!r}: the label is empty; fill it, or take the row out."
        )


_FROM_0, _FROM_1 = "a number from 0", "a number from 1"


def _number(value: object) -> int:
    """Return a label as a number, -1 where it is none."""
    key = one_spelling(value)
    return int(key) if key.isdecimal() and key.isascii() and len(key) < 10 else -1


def right_options(
    splits: Sequence[Split],
    columns: Columns,
    options: Mapping[str, Sequence[tuple[str, ...]]],
    notes: list[str],
) -> dict[str, list[int]]:
    """Return the index of each row's right option, by the first reading that all rows allow."""
    column = columns.column(str(columns.cfg["label"]))
    names = columns.option_names
    records = [record for split in splits for record in split.records]
    own = [of_row for split in splits for of_row in options[split.name]]
    for record in records:
        _refuse_empty(record.value.get(column), record, column)
    values = [record.value[column] for record in records]
    texts = [v.strip() if isinstance(v, str) else one_spelling(v) for v in values]
    readings: dict[str, Callable[[int], int]] = {
        _FROM_0: lambda i: _number(values[i]),
        "the name of an option's column": lambda i: (
            names.index(texts[i]) if texts[i] in names and len(names) > 1 else -1
        ),
        "the text of an option": lambda i: _place(texts[i], own[i]),
        "a letter from A": lambda i: LETTERS.find(texts[i]) if len(texts[i]) == 1 else -1,
        _FROM_1: lambda i: _number(values[i]) - 1,
    }
    allowed: dict[str, list[int]] = {}
    failed: dict[str, int] = {}
    for name, reading in readings.items():
        found: list[int] = []
        for i in range(len(records)):
            found.append(reading(i))
            if found[i] not in range(len(own[i])):
                failed[name] = i
                break
        else:
            allowed[name] = found
    if allowed:
        notes += _notes_on_readings(allowed, column)
        found = next(iter(allowed.values()))
        sizes = [len(split.records) for split in splits]
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        return {
            split.name: found[start : start + size]
            for split, start, size in zip(splits, starts, sizes, strict=True)
        }
    row = max(failed.values())  # the reading that came furthest is the likeliest one
    *most, last = readings
    raise UserError(
        f"{records[row].where}, column {column!r}: the label is {shortened(values[row])}, and "
        f"the options are {', '.join(map(repr, own[row]))}; it must be {', '.join(most)} or "
        f"{last}, the same in all rows."
    )


def _notes_on_readings(allowed: Mapping[str, Sequence[int]], column: str) -> list[str]:
    """Return lines on labels that could mean other options: no setting says how they are read.

    Args:
        allowed: for each reading that fits all rows the options that it gives; the first is taken.
        column: of the labels.
    """
    (name, found), *others = allowed.items()
    notes = []
    if name == _FROM_0 and len(found) > 1 and min(found) > 0:
        notes.append(
            f"no row has the label 0: the numbers in column {column!r} are read as options "
            "from 0; where they count from 1, give the right option's column, text or letter"
        )
    cure = "its letter from A" if name == _FROM_0 else "its number from 0"
    for other, its in others:
        differing = sum(a != b for a, b in zip(found, its, strict=True))
        if differing and {name, other} != {_FROM_0, _FROM_1}:
            notes.append(
                f"the labels in column {column!r} are each read as {name}; as {other} they would "
                f"name another option in {differing} of {len(found)} rows: where that is meant, "
                f"give the right option by {cure}"
            )
    return notes


def _place(text: str, own: Sequence[str]) -> int:
    """Return where a text stands among the options, however a number or true is spelled."""
    if text in own:
        return own.index(text)
    keys = [one_spelling(option) for option in own]
    return keys.index(one_spelling(text)) if keys.count(one_spelling(text)) == 1 else -1
