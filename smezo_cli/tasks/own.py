"""Your own rows, from a CSV, TSV, JSONL, JSON or Parquet file or a data set of the hub.

What the rows are is said by the task node alone (conf/task/classification.yaml, choice.yaml and
generation.yaml say how); no Python, and nothing is written to the cache of the datasets library.
"""

import contextlib
import datetime
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError, near
from smezo_cli.tasks.base import Prompt, Row, Tables
from smezo_cli.tasks.files import SUFFIXES, Record, read_file, sha256_of
from smezo_cli.tasks.frames import rows_of
from smezo_cli.tasks.hub import HubTable, load_hub
from smezo_cli.tasks.templates import LETTER, NUMBER, OPTION, check_template, fields_of
from smezo_cli.words import mapping_of, value_of

# Of one file without counts: a fifth for the test and a tenth for dev, at most MeZO's sizes.
TEST_SHARE, MOST_TEST = 5, 1000
DEV_SHARE, MOST_DEV = 10, 500


@dataclass(frozen=True)
class _Split:
    name: str  # train or test
    shown: str  # the file or data set
    records: list[Record]
    class_names: Mapping[str, list[str]]


def read(cfg: Mapping[str, Any], *, by_line: bool = False) -> tuple[Tables, dict[str, Any]]:
    """All rows, and the task node with its label words by class and its counts filled in.

    Args:
        cfg: the task node.
        by_line: number rows by the lines of their file, as versions of smezo did whose runs are
            still to be evaluated; ids decide which rows are train, dev and test.

    Raises:
        UserError: naming file, line and column of what is missing or malformed.
    """
    cfg = dict(cfg)
    notes: list[str] = []
    templates = [str(cfg["prompt"])]
    if cfg["kind"] == "choice" and cfg.get("option_template") is not None:
        templates.append(str(cfg["option_template"]))
    splits, fingerprint = _load(cfg, templates, notes)
    columns = _Columns(cfg, splits[0])
    fields = columns.fields(templates)
    if cfg.get("sfc_prompt") is not None:
        more = columns.fields([str(cfg["sfc_prompt"])], ["task.sfc_prompt"])
        fields = list(dict.fromkeys([*fields, *more]))
    for split in splits:
        columns.check(split, fields)
    rows = {}
    options = {
        split.name: [columns.options(record) for record in split.records]
        for split in splits
        if cfg["kind"] == "choice"
    }
    keys: list[str] = []  # of the classes
    if cfg["kind"] == "classification":
        given, cfg["labels"] = _labels(cfg["labels"])
        values = _values(splits, columns.column(str(cfg["label"])))
        keys = _numbers(len(cfg["labels"]), values) if given is None else given
        notes += _spellings(values, keys)
    elif cfg["kind"] == "choice":
        right = _right(splits, columns, options, notes)
    for split in splits:
        texts = columns.texts(split.records, fields)
        names = [
            f"{split.name}/{(by_line and record.line) or record.number}" for record in split.records
        ]
        if cfg["kind"] == "classification":
            found = _classes(split, columns, keys, cfg["labels"])
            rows[split.name] = [
                Row(text, label, name)
                for text, label, name in zip(texts, found, names, strict=True)
            ]
        elif cfg["kind"] == "choice":
            parts = texts, right[split.name], names, options[split.name]
            rows[split.name] = [
                Row(text, label, name, options=own, right=frozenset((label,)))
                for text, label, name, own in zip(*parts, strict=True)
            ]
        else:
            answers = [columns.answers(record) for record in split.records]
            rows[split.name] = [
                Row(text, 0, name, answers=own)
                for text, name, own in zip(texts, names, answers, strict=True)
            ]
    columns.refuse_unused()
    tables = Tables(
        train=rows["train"],
        test=rows.get("test", ()),
        fields=tuple(fields),
        classes=tuple(keys),
        source=" (train, dev), ".join(split.shown for split in splits)
        + (" (test)" if len(splits) > 1 else " (train, dev, test)"),
        fingerprint=fingerprint,
        notes=tuple(notes),
    )
    return tables, cfg | _counts(cfg, tables)


def copies(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """How many of the rows have the texts of one of the others."""
    texts = Counter(tuple(row.fields.values()) for row in rows)
    seen = {key for row in others if (key := tuple(row.fields.values())) in texts}
    return sum(texts[key] for key in seen)


def _counts(cfg: Mapping[str, Any], tables: Tables) -> dict[str, Any]:
    """Counts that are not given, and where the test rows come from."""
    have = len(tables.train)
    counts: dict[str, Any] = {"test_from": "test" if tables.test else "train"}
    if not tables.test and cfg["num_test"] is None:
        counts["num_test"] = max(1, min(MOST_TEST, have // TEST_SHARE))
    if cfg["num_dev"] is None:
        counts["num_dev"] = max(1, min(MOST_DEV, have // DEV_SHARE))
    return counts


# --- files and data sets ---------------------------------------------------------------------


# What task.quoting says, as `read_file` takes it.
_QUOTES = {None: None, "minimal": True, "none": False}


def _load(
    cfg: Mapping[str, Any], templates: Sequence[str], notes: list[str]
) -> tuple[list[_Split], str]:
    data, second = str(cfg["data"]), cfg.get("test_data")
    quoting = cfg.get("quoting")
    if quoting is not None and not any(
        str(file).lower().endswith((".csv", ".tsv")) for file in (data, second)
    ):
        raise UserError(
            f"task.quoting={quoting} is for .csv and .tsv files, and task.data={data}: leave "
            "task.quoting out."
        )
    if not _is_file(data):
        if second is not None:
            raise UserError(
                f"task.test_data={second} goes with a file; of the data set {data} choose the test "
                "split by task.splits={train: train, test: test}."
            )
        return _from_hub(cfg, data)
    for key in ("data_name", "revision", "splits"):
        if cfg.get(key):
            raise UserError(
                f"task.{key} is for a data set of the hub, and task.data={data} is a file: leave "
                f"task.{key} out."
            )
    paths = [_path("task.data", data)]
    if second is not None:
        paths.append(_path("task.test_data", str(second)))
        if paths[0].samefile(paths[1]):
            raise UserError(
                f"task.test_data={second} is the file of task.data too; leave it out, and test "
                "rows are cut from the one file."
            )
    wanted = _wanted(cfg, templates)
    splits = [
        _Split(name, str(path), _records(path, quoting, wanted, notes), {})
        for name, path in zip(("train", "test"), paths, strict=False)
    ]
    for split in splits:
        _check_mappings(split)
    return splits, sha256_of(*paths)


def _records(
    path: Path, quoting: str | None, wanted: Sequence[str], notes: list[str] | None = None
) -> list[Record]:
    """Records of a file, and of a JSON file its rows if it is a data frame or a wrapped list."""
    found = list(read_file(path, quotes=_QUOTES[quoting], notes=notes, unique_keys=True))
    if len(found) == 1 and path.suffix.lower() in (".json", ".jsonl"):
        rows = rows_of(found[0].value, wanted, str(path))
        if rows is not None:
            found = [Record(f"{path}, row {n}", n, row, n) for n, row in enumerate(rows, start=1)]
    if not found:
        raise UserError(f"{path} has no rows.")
    return found


def _wanted(cfg: Mapping[str, Any], templates: Sequence[str]) -> list[str]:
    """The columns that the rows must have, as far as the settings can be read."""
    names = []
    for template in templates:
        with contextlib.suppress(ValueError):  # is said when the rows are known
            names += fields_of(template)
    names += [str(cfg[key]) for key in ("label", "answer") if cfg.get(key) is not None]
    names += _listed(cfg.get("options"))
    mapped = mapping_of(cfg.get("columns"), "task.columns") or {}
    return [str(mapped.get(name, name)) for name in names if name not in _OF_AN_OPTION]


_OF_AN_OPTION = (OPTION, NUMBER, LETTER)


def _listed(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _is_file(data: str) -> bool:
    try:
        path = Path(data).expanduser()
        return path.exists() or path.suffix.lower() in SUFFIXES or data.count("/") > 1
    # A zero byte, a user that is not there, a name longer than names are.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"task.data={data} can be no path ({error}).") from error


def _path(key: str, data: str) -> Path:
    try:
        path = Path(data).expanduser().absolute()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}={data} can be no path ({error}).") from error
    if is_folder:
        raise UserError(f"{key}={data} is a folder; give a file, one of {', '.join(SUFFIXES)}.")
    if not is_there:
        like = [file.name for file in path.parent.glob("*") if file.suffix.lower() in SUFFIXES]
        hint = near(path.name, like) if like else ""
        raise UserError(f"{key}={data}: there is no such file{hint}.")
    return path


def _from_hub(cfg: Mapping[str, Any], data: str) -> tuple[list[_Split], str]:
    name, revision = cfg.get("data_name"), cfg.get("revision") or "main"
    splits = dict(cfg.get("splits") or {"train": "train"})
    if "train" not in splits or not set(splits) <= {"train", "test"}:
        raise UserError(
            f"task.splits={splits}: name the split to train on and, if there is one, that of the "
            "test, as {train: train, test: validation}."
        )
    cure = f"check that task.data={data} is a file or OWNER/NAME of a data set"
    tables: dict[str, HubTable] = {
        split: load_hub(data, name, revision, splits[split], task=cfg["name"], cure=cure)
        for split in ("train", "test")
        if split in splits
    }
    commits = {table.commit for table in tables.values()}
    commit = commits.pop() if len(commits) == 1 else ""
    found = [
        _Split(
            split,
            f"hub {table.where} at {commit or revision}",
            list(table.records(words=False)),
            table.class_names,
        )
        for split, table in tables.items()
    ]
    return found, commit


def unlabelled(
    task: Mapping[str, Any],
    prompt: Prompt,
    data: str | Mapping[str, str],
    notes: list[str] | None = None,
) -> list[Row]:
    """Rows to predict, with the texts that a prompt shows and no labels.

    Args:
        task: the node of the task that a model was trained on; of a choice task its `options` name
            the columns of the options, as in the training data.
        prompt: the one that was trained with.
        data: a file, or the texts of one row.
        notes: receives what is to be said of the file.

    Raises:
        UserError: naming file, line and column of what is missing or malformed.
    """
    if isinstance(data, str):
        path = _path("FILE", data)
        templates = [prompt.template, prompt.option] if task["kind"] == "choice" else []
        asked = {"columns": task.get("columns"), "options": task.get("options")}
        wanted = _wanted(asked, templates or [prompt.template])
        records = _records(path, task.get("quoting"), wanted, notes)
        split = _Split("predict", str(path), records, {})
        _check_mappings(split)
    else:
        split = _Split("predict", "--field", [Record("--field", 1, dict(data))], {})
    options = task.get("options") or (task.get("source") or {}).get("options") or "options"
    columns = _Columns({"columns": task.get("columns"), "options": options}, split)
    choice = task["kind"] == "choice"
    fields = columns.fields([prompt.template, prompt.option] if choice else [prompt.template])
    if prompt.sfc is not None:
        fields = list(dict.fromkeys([*fields, *columns.fields([prompt.sfc], ["task.sfc_prompt"])]))
    for name in columns.option_names if choice else ():
        columns.need(name, f"task.options={name}")
    texts = columns.texts(split.records, fields)
    return [
        Row(
            text,
            -1,
            str(record.number),
            options=columns.options(record) if choice else (),
        )
        for text, record in zip(texts, split.records, strict=True)
    ]


def _check_mappings(split: _Split) -> None:
    for record in split.records:
        if not isinstance(record.value, dict):
            raise UserError(
                f"{record.where}: a record of columns is needed, not a "
                f'{type(record.value).__name__}; write it as {{"text": "a film", "label": 1}}.'
            )


# --- columns ---------------------------------------------------------------------------------


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


# --- labels ----------------------------------------------------------------------------------


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


def _labels(labels: Any) -> tuple[list[str] | None, list[str]]:
    """Values of the label column (None: numbers) and the words for them, both by class."""
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
    words = {_key(value): word for value, word in labels.items()}
    if len(words) < len(labels):
        raise UserError(f"task.labels={labels} gives one value of the label column two words.")
    keys = list(words)
    if set(keys) == {str(index) for index in range(len(keys))}:
        keys.sort(key=int)  # however they are written, classes 0, 1, ... are in this order
    return keys, [words[key] for key in keys]


def _values(splits: Iterable[_Split], column: str) -> list[object]:
    return [record.value.get(column) for split in splits for record in split.records]


def _numbers(size: int, values: Sequence[object]) -> list[str]:
    """What a list of words stands for: the values 0, 1, ..., or 1, 2, ... where those stand there.

    Args:
        size: how many words there are.
        values: of the label column in all rows.
    """
    found = {_key(value) for value in values if not _is_empty(value)}
    from_0, from_1 = ([str(i + start) for i in range(size)] for start in (0, 1))
    return from_1 if found <= set(from_1) and not found <= set(from_0) else from_0


def _spellings(values: Sequence[object], keys: Sequence[str]) -> list[str]:
    """Say which labels are taken for one although they are not written alike."""
    spelled: dict[str, dict[str, None]] = {}
    for value in values:
        if isinstance(value, str):
            spelled.setdefault(_key(value), {})[value.strip()] = None
    return [
        f"the labels {', '.join(map(repr, list(spelled[key])[:8]))} are read as one class, {key}"
        for key in keys
        if len(spelled.get(key, ())) > 1
    ]


def _classes(
    split: _Split, columns: _Columns, keys: Sequence[str], words: Sequence[Any]
) -> list[int]:
    column = columns.column(str(columns.cfg["label"]))
    # A data set of the hub stores numbers for words; either may be what task.labels names.
    names = split.class_names.get(column, [])
    as_words = bool(names) and set(keys) <= {_key(name) for name in names}
    classes = {key: index for index, key in enumerate(keys)}
    found = []
    for record in split.records:
        value = record.value.get(column)
        if as_words and isinstance(value, int) and value in range(len(names)):
            value = names[value]
        if (key := _key(value)) not in classes:
            _refuse_empty(value, record, column)
            others = {_key(v): v for v in _values([split], column) if not _is_empty(v)}
            some = ", ".join(sorted(others)[:8]) + (", ..." if len(others) > 8 else "")
            raise UserError(
                f"{record.where}, column {column!r}: the label is {_brief(value)} and task.labels "
                f"has words for {', '.join(keys)}; give a word for each value of the column "
                f"({some}), as {{{some.partition(',')[0]}: {words[0]}, ...}}."
            )
        found.append(classes[key])
    return found


def _refuse_empty(value: object, record: Record, column: str) -> None:
    if _is_empty(value):
        raise UserError(
            f"{record.where}, column {column!r}: the label is empty; fill it, or take the row out."
        )


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _number(value: object) -> int:
    """A label as a number, -1 where it is none."""
    key = _key(value)
    return int(key) if key.isdecimal() and key.isascii() and len(key) < 10 else -1


def _right(
    splits: Sequence[_Split],
    columns: _Columns,
    options: Mapping[str, Sequence[tuple[str, ...]]],
    notes: list[str],
) -> dict[str, list[int]]:
    """Index of each row's right option: of the readings below the first that all rows allow."""
    column = columns.column(str(columns.cfg["label"]))
    names = columns.option_names
    records = [record for split in splits for record in split.records]
    own = [of_row for split in splits for of_row in options[split.name]]
    for record in records:
        _refuse_empty(record.value.get(column), record, column)
    values = [record.value[column] for record in records]
    texts = [v.strip() if isinstance(v, str) else _key(v) for v in values]
    readings: dict[str, Callable[[int], int]] = {
        "a number from 0": lambda i: _number(values[i]),
        "the name of an option's column": lambda i: (
            names.index(texts[i]) if texts[i] in names and len(names) > 1 else -1
        ),
        "the text of an option": lambda i: _place(texts[i], own[i]),
        "a letter from A": lambda i: _LETTERS.find(texts[i]) if len(texts[i]) == 1 else -1,
        "a number from 1": lambda i: _number(values[i]) - 1,
    }
    failed: dict[str, int] = {}
    for name, reading in readings.items():
        found = [reading(i) for i in range(len(records))]
        bad = [i for i, at in enumerate(found) if at not in range(len(own[i]))]
        if not bad:
            if name == "a number from 0" and len(records) > 1 and min(found) > 0:
                notes.append(
                    f"no row has the label 0: the numbers in column {column!r} are read as options "
                    "from 0; where they count from 1, give the right option's column, text or "
                    "letter"
                )
            sizes = [len(split.records) for split in splits]
            starts = [sum(sizes[:at]) for at in range(len(sizes))]
            return {
                split.name: found[start : start + size]
                for split, start, size in zip(splits, starts, sizes, strict=True)
            }
        failed[name] = bad[0]
    row = max(failed.values())  # the reading that came furthest is the likeliest one
    *most, last = readings
    raise UserError(
        f"{records[row].where}, column {column!r}: the label is {_brief(values[row])}, and "
        f"the options are {', '.join(map(repr, own[row]))}; it must be {', '.join(most)} or "
        f"{last}, the same in all rows."
    )


def _place(text: str, own: Sequence[str]) -> int:
    """Where a text stands among the options; one spelling of a number or true is as good."""
    if text in own:
        return own.index(text)
    keys = [_key(option) for option in own]
    return keys.index(_key(text)) if keys.count(_key(text)) == 1 else -1
