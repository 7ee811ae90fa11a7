"""Read the columns of the user's own rows: texts, options and answers."""

import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any

from smezo_cli.errors import UserError, near
from smezo_cli.tasks.files import Record
from smezo_cli.tasks.templates import LETTER, NUMBER, OPTION, check_template, fields_of
from smezo_cli.words import mapping_of, value_of


@dataclass(frozen=True)
class Split:
    """Hold the records of one split, and where they come from."""

    name: str  # train or test
    shown: str  # the file or data set
    records: list[Record]
    class_names: Mapping[str, list[str]]


def _columns_of(records: Sequence[Record]) -> list[str]:
    """Return every column of the records, in the order in which they come."""
    return list(dict.fromkeys(chain.from_iterable(record.value for record in records)))


class Columns:
    """Read cells by the names that the task node uses; `task.columns` maps names to columns."""

    def __init__(self, cfg: Mapping[str, Any], first: Split) -> None:
        self.cfg = cfg
        self.map: dict[str, str] = dict(mapping_of(cfg.get("columns"), "task.columns") or {})
        self.there = _columns_of(first.records)
        self.shown = first.shown
        self.used: set[str] = set()
        self.option_names = as_list(cfg.get("options"))

    def column(self, name: str) -> str:
        """Return the column that a name stands for."""
        self.used.add(name)
        return self.map.get(name, name)

    def need(self, name: str, key: str) -> str:
        """Return the column; UserError, naming the key that asks for it, if the rows have none."""
        column = self.column(name)
        if column not in self.there:
            mapped = f" (of {name})" if column != name else ""
            raise UserError(
                f"{key}: {self.shown} has no column {column!r}{mapped}"
                f"{near(column, filter(None, self.there))}; "
                f"task.columns={{{name}: COLUMN}} says which one is meant."
            )
        return column

    def fields(
        self,
        templates: Sequence[str],
        keys: Sequence[str] = ("task.prompt", "task.option_template"),
        made: Collection[str] = (),
    ) -> list[str]:
        """Return the fields that the templates show; UserError if one is no column.

        Args:
            templates: of the prompt and of an option.
            keys: that give the templates.
            made: fields that are made of the options where there is no such column.
        """
        made = [name for name in made if name not in self.there]
        names: list[str] = []
        for number, template in enumerate(templates):
            key = keys[number]
            places = [p for p in (NUMBER, LETTER) if self.map.get(p, p) not in self.there]
            reserved = [*made, *((OPTION, *places) if number else ())]
            try:
                shown = [name for name in fields_of(template) if name not in reserved]
            except ValueError:
                check_template(template, self.there, key=key)
                raise
            for name in shown:
                self.need(name, f"{key}={template!r}")
            names += shown
        return list(dict.fromkeys(names))

    def check(self, split: Split, fields: Sequence[str]) -> None:
        """Raise UserError if a split lacks a column that is used."""
        there = _columns_of(split.records)
        kind = self.cfg["kind"]
        more = {
            "classification": [("task.label", self.cfg.get("label"))],
            "choice": [("task.label", self.cfg.get("label"))]
            + [("task.options", name) for name in self.option_names],
            "generation": [("task.answer", self.cfg.get("answer"))],
        }[kind]
        wanted = [("task.prompt", name) for name in fields] + more
        for key, name in wanted:
            if self.need(str(name), f"{key}={name}") not in there:
                raise UserError(
                    f"{split.shown} has no column {self.column(str(name))!r}"
                    f"{near(self.column(str(name)), filter(None, there))}."
                )

    def refuse_unused(self) -> None:
        """Raise UserError for a name in `task.columns` that nothing asked for."""
        for name in self.map:
            if name not in self.used:
                raise UserError(
                    f"task.columns names {name}, which neither the prompt nor a setting uses"
                    f"{near(name, self.used)}."
                )

    def texts(self, records: Sequence[Record], fields: Sequence[str]) -> list[dict[str, str]]:
        """Return the texts of the fields of each row."""
        columns = [(name, self.column(name)) for name in fields]
        return [{name: self.text(record, column) for name, column in columns} for record in records]

    def text(self, record: Record, column: str) -> str:
        """Return one cell as a text, a number as its digits; UserError for anything else."""
        value = record.value.get(column)
        if isinstance(value, str) and value and not value.isspace():
            return value
        if is_empty(value):
            raise UserError(
                f"{record.where}, column {column!r}: the cell is empty; fill it, or take the row "
                "out."
            )
        if isinstance(value, datetime.date | datetime.time | Decimal):
            return str(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{record.where}, column {column!r}: a text is needed and {shortened(value)} "
                "stands there."
            )
        return _plain(value)

    def _texts(self, record: Record, column: str, values: Sequence[object]) -> list[str]:
        """Return the texts of a list that stands in a cell."""
        return [self.text(Record(record.where, 0, {column: item}), column) for item in values]

    def options(self, record: Record) -> tuple[str, ...]:
        """Return the options of a row: one from each column, or all from one column of lists.

        Blanks at their ends go: behind the comma of a CSV they are no part of an option.
        """
        columns = [self.column(name) for name in self.option_names]
        if len(columns) == 1:
            values = _listed(record.value.get(columns[0]))
            if values is None:
                raise UserError(
                    f"{record.where}, column {columns[0]!r}: with one column in task.options it "
                    'must hold a list of texts, such as ["yes", "no"], and '
                    f"{shortened(record.value.get(columns[0]))} stands there."
                )
            texts = self._texts(record, columns[0], values)
        else:
            texts = [self.text(record, column) for column in columns]
        texts = [text.strip() for text in texts]
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise UserError(
                f"{record.where}: two or more different options are needed, and there are "
                f"{', '.join(map(repr, texts)) or 'none'}."
            )
        return tuple(texts)

    def answers(self, record: Record) -> tuple[str, ...]:
        """Return the reference answers of a row; the first is trained on."""
        column = self.column(str(self.cfg["answer"]))
        value = record.value.get(column)
        values = _listed(value)
        # A text may begin with a bracket, or be a list of numbers: then it is the answer itself.
        if isinstance(value, str) and not (values and all(isinstance(x, str) for x in values)):
            values = None
        if values is not None:
            texts = self._texts(record, column, values)
            if not texts:
                raise UserError(
                    f"{record.where}, column {column!r}: the list is empty; give an answer."
                )
        else:
            texts = [self.text(record, column)]
        return tuple(text.strip() for text in texts)


def _listed(value: object) -> list[Any] | None:
    """Return a list, or one that a text holds as JSON, as cells of a CSV do; else None."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def as_list(given: Any) -> list[str]:
    """Return the names that a setting gives: one, several or none."""
    return [given] if isinstance(given, str) else list(given or ())


def is_empty(value: object) -> bool:
    """Say whether it is null, blank, or the NaN that data frames write for what is missing."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float) and math.isnan(value))


def one_spelling(value: object) -> str:
    """Return a label in one spelling, whatever wrote it: 1, 1.0, "+1" and "1.0" are one label.

    So are true, "True" and "TRUE", nan and "NaN", null and "null": as Hydra reads words.
    """
    if isinstance(value, str | Decimal):
        value = value_of(str(value).strip())
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def shortened(value: object) -> str:
    """Return a value as Python writes it, cut to 40 characters for a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
