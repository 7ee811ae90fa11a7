"""Read the columns of the user's own rows: texts, options and answers."""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any

from smezo_cli.errors import UserError, near
from smezo_cli.tasks.files import Record
from smezo_cli.tasks.templates import LETTER, NUMBER, OPTION, check_template, fields_of
from smezo_cli.words import mapping_of, value_of


@dataclass(frozen=True)
class _Split:
    name: str  # train or test
    shown: str  # the file or data set
    records: list[Record]
    class_names: Mapping[str, list[str]]


def _columns_of(records: Sequence[Record]) -> list[str]:
    """Every column of the records, in the order in which they come."""
    return list(dict.fromkeys(chain.from_iterable(record.value for record in records)))


class _Columns:
    """Columns by the names that the task node uses; `task.columns` maps names to columns."""

    def __init__(self, cfg: Mapping[str, Any], first: _Split) -> None:
        self.cfg = cfg
        self.map: dict[str, str] = dict(mapping_of(cfg.get("columns"), "task.columns") or {})
        self.there = _columns_of(first.records)
        self.shown = first.shown
        self.used: set[str] = set()
        self.option_names = _listed(cfg.get("options"))

    def column(self, name: str) -> str:
        """The column that a name stands for."""
        self.used.add(name)
        return self.map.get(name, name)

    def need(self, name: str, key: str) -> str:
        """The column, or a refusal that names the key that asks for it."""
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
    ) -> list[str]:
        """The fields that the templates show; all must be columns."""
        names: list[str] = []
        for number, template in enumerate(templates):
            key = keys[number]
            places = [p for p in (NUMBER, LETTER) if self.map.get(p, p) not in self.there]
            reserved = (OPTION, *places) if number else ()
            try:
                shown = [name for name in fields_of(template) if name not in reserved]
            except ValueError:
                check_template(template, self.there, key=key)
                raise
            for name in shown:
                self.need(name, f"{key}={template!r}")
            names += shown
        return list(dict.fromkeys(names))

    def check(self, split: _Split, fields: Sequence[str]) -> None:
        """The second file has the columns too."""
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
        """A name in `task.columns` that nothing asked for is a mistake."""
        for name in self.map:
            if name not in self.used:
                raise UserError(
                    f"task.columns names {name}, which neither the prompt nor a setting uses"
                    f"{near(name, self.used)}."
                )

    def texts(self, records: Sequence[Record], fields: Sequence[str]) -> list[dict[str, str]]:
        """The texts of the fields of each row."""
        columns = [(name, self.column(name)) for name in fields]
        return [{name: self.text(record, column) for name, column in columns} for record in records]

    def text(self, record: Record, column: str) -> str:
        """One cell as a text; a number is one too."""
        value = record.value.get(column)
        if isinstance(value, str) and value and not value.isspace():
            return value
        if _is_empty(value):
            raise UserError(
                f"{record.where}, column {column!r}: the cell is empty; fill it, or take the row "
                "out."
            )
        if isinstance(value, datetime.date | datetime.time | Decimal):
            return str(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{record.where}, column {column!r}: a text is needed and {_brief(value)} stands "
                "there."
            )
        return _plain(value)

    def _list(self, record: Record, column: str) -> list[str] | None:
        """The texts of a cell that holds a list (in a CSV: a JSON list), else None."""
        value = record.value.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if not isinstance(value, list):
            return None
        return [self.text(Record(record.where, 0, {column: item}), column) for item in value]

    def options(self, record: Record) -> tuple[str, ...]:
        """The options of a row: one from each column, or all from the one that holds a list."""
        columns = [self.column(name) for name in self.option_names]
        if len(columns) == 1:
            texts = self._list(record, columns[0])
            if texts is None:
                raise UserError(
                    f"{record.where}, column {columns[0]!r}: with one column in task.options it "
                    'must hold a list of texts, such as ["yes", "no"], and '
                    f"{_brief(record.value.get(columns[0]))} stands there."
                )
        else:
            texts = [self.text(record, column) for column in columns]
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise UserError(
                f"{record.where}: two or more different options are needed, and there are "
                f"{', '.join(map(repr, texts)) or 'none'}."
            )
        return tuple(texts)

    def answers(self, record: Record) -> tuple[str, ...]:
        """The reference answers of a row; the first is trained on."""
        column = self.column(str(self.cfg["answer"]))
        value = record.value.get(column)
        if isinstance(value, list):
            texts = self._list(record, column) or []
            if not texts:
                raise UserError(
                    f"{record.where}, column {column!r}: the list is empty; give an answer."
                )
        else:
            texts = [self.text(record, column)]
        return tuple(text.strip() for text in texts)


def _listed(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _is_empty(value: object) -> bool:
    """Is it null, a text of blanks, or the NaN that data frames write for what is missing?"""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _key(value: object) -> str:
    """A label in one spelling, whatever wrote it: 1, 1.0, "+1" and "1.0" are one label.

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


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
