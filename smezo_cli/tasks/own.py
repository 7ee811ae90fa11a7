"""Read the user's own rows from a CSV, TSV, JSONL, JSON or Parquet file, or from the hub.

What the rows are is said by the task node alone (conf/task/classification.yaml, choice.yaml and
generation.yaml say how); no Python, and nothing is written to the cache of the datasets library.
"""

import contextlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError, near
from smezo_cli.tasks.base import Prompt, Row, Tables, check_letters
from smezo_cli.tasks.columns import Columns, Split, as_list
from smezo_cli.tasks.files import SUFFIXES, Record, digest_of, read_file
from smezo_cli.tasks.frames import rows_of
from smezo_cli.tasks.hub import HubTable, load_hub
from smezo_cli.tasks.labels import (
    class_indices,
    keys_of_list,
    label_values,
    label_words,
    notes_on_spellings,
    right_options,
)
from smezo_cli.tasks.paths import tokens_of
from smezo_cli.tasks.records import listed_fields, without_prefix
from smezo_cli.tasks.templates import LETTER, NUMBER, OPTION, fields_of
from smezo_cli.words import mapping_of

# Of one file without counts: a fifth for the test and a tenth for dev, at most MeZO's sizes.
TEST_SHARE, MOST_TEST = 5, 1000
DEV_SHARE, MOST_DEV = 10, 500


def read(
    cfg: Mapping[str, Any], *, by_line: bool = False, most: int | None = None
) -> tuple[Tables, dict[str, Any]]:
    """Return all rows, and the task node with its label words by class and its counts filled in.

    Args:
        cfg: the task node.
        by_line: number rows by the lines of their file, as versions of smezo did whose runs are
            still to be evaluated; ids decide which rows are train, dev and test.
        most: of a file, the first so many rows are read; None: all.

    Raises:
        UserError: naming file, line and column of what is missing or malformed.
    """
    cfg = dict(cfg)
    notes: list[str] = []
    templates = [str(cfg["prompt"])]
    if cfg["kind"] == "choice" and cfg.get("option_template") is not None:
        templates.append(str(cfg["option_template"]))
    splits, fingerprint = _load(cfg, templates, notes, most)
    columns = Columns(cfg, splits[0])
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
        given, cfg["labels"] = label_words(cfg["labels"])
        values = label_values(splits, columns.column(str(cfg["label"])))
        keys = keys_of_list(len(cfg["labels"]), values) if given is None else given
        notes += notes_on_spellings(values, keys)
    elif cfg["kind"] == "choice":
        right = right_options(splits, columns, options, notes)
    for split in splits:
        texts = columns.texts(split.records, fields)
        names = [
            f"{split.name}/{(by_line and record.line) or record.number}" for record in split.records
        ]
        if cfg["kind"] == "classification":
            found = class_indices(split, columns, keys, cfg["labels"])
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
    """Return how many of the rows have the texts of one of the others."""
    texts = Counter(tuple(row.fields.values()) for row in rows)
    seen = {key for row in others if (key := tuple(row.fields.values())) in texts}
    return sum(texts[key] for key in seen)


def _counts(cfg: Mapping[str, Any], tables: Tables) -> dict[str, Any]:
    """Return the counts that are not given, and where the test rows come from."""
    have = len(tables.train)
    counts: dict[str, Any] = {"test_from": "test" if tables.test else "train"}
    if not tables.test and cfg["num_test"] is None:
        counts["num_test"] = max(1, min(MOST_TEST, have // TEST_SHARE))
    if cfg["num_dev"] is None:
        counts["num_dev"] = max(1, min(MOST_DEV, have // DEV_SHARE))
    return counts


# What task.quoting says, as `read_file` takes it.
_QUOTES = {None: None, "minimal": True, "none": False}


def _load(
    cfg: Mapping[str, Any], templates: Sequence[str], notes: list[str], most: int | None
) -> tuple[list[Split], str]:
    data, second = str(cfg["data"]), cfg.get("test_data")
    quoting = cfg.get("quoting")
    if quoting is not None and not any(
        str(file).lower().endswith((".csv", ".tsv")) for file in (data, second)
    ):
        raise UserError(
            f"task.quoting={quoting} is for .csv and .tsv files, and task.data={data}: leave "
            "task.quoting out."
        )
    if not is_file(data):
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
    paths = [existing("task.data", data)]
    if second is not None:
        paths.append(existing("task.test_data", str(second)))
        if paths[0].samefile(paths[1]):
            raise UserError(
                f"task.test_data={second} is the file of task.data too; leave it out, and test "
                "rows are cut from the one file."
            )
    wanted = _wanted(cfg, templates)
    splits = [
        Split(name, str(path), _records(path, quoting, wanted, notes, most), {})
        for name, path in zip(("train", "test"), paths, strict=False)
    ]
    for split in splits:
        _check_mappings(split)
    return splits, digest_of(*paths)


def _records(
    path: Path,
    quoting: str | None,
    wanted: Sequence[str],
    notes: list[str] | None = None,
    most: int | None = None,
) -> list[Record]:
    """Return the records of a file; of JSON also those of a data frame or a wrapped list."""
    every = read_file(path, quotes=_QUOTES[quoting], notes=notes, unique_keys=True)
    found = list(islice(every, most))
    if len(found) == 1 and path.suffix.lower() in (".json", ".jsonl"):
        rows = rows_of(found[0].value, wanted, str(path))
        if rows is not None:
            found = [Record(f"{path}, row {n}", n, row, n) for n, row in enumerate(rows, start=1)]
    if not found:
        raise UserError(f"{path} has no rows.")
    return found


def _wanted(cfg: Mapping[str, Any], templates: Sequence[str]) -> list[str]:
    """Return the columns that the rows must have, as far as the settings can be read."""
    names = []
    for template in templates:
        with contextlib.suppress(ValueError):  # is said when the rows are known
            names += fields_of(template)
    names += [str(cfg[key]) for key in ("label", "answer") if cfg.get(key) is not None]
    names += as_list(cfg.get("options"))
    mapped = mapping_of(cfg.get("columns"), "task.columns") or {}
    return [str(mapped.get(name, name)) for name in names if name not in _OF_AN_OPTION]


_OF_AN_OPTION = (OPTION, NUMBER, LETTER)


def is_file(data: str) -> bool:
    """Say whether task.data names a file, and not a data set of the hub."""
    try:
        path = Path(data).expanduser()
        return path.exists() or path.suffix.lower() in SUFFIXES or data.count("/") > 1
    # A zero byte, a user that is not there, a name longer than names are.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"task.data={data} can be no path ({error}).") from error


def existing(key: str, data: str) -> Path:
    """Return the path of a file of rows; UserError, naming the key, if there is none.

    It loads nothing heavy.
    """
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


def _from_hub(cfg: Mapping[str, Any], data: str) -> tuple[list[Split], str]:
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
        Split(
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
    """Return rows to predict, with the texts that a prompt shows and no labels.

    Args:
        task: the node of the task that a model was trained on; of a choice task its `options` name
            the columns of the options, as in the training data. A benchmark's may be a path, whose
            last name is then the column, and its fields that list the options are made of these.
        prompt: the one that was trained with.
        data: a file, or the texts of one row.
        notes: receives what is to be said of the file.

    Raises:
        UserError: naming file, line and column of what is missing or malformed.
    """
    source = task.get("source") or {}
    choice = task["kind"] == "choice"
    made = list(source.get("listed", ())) if choice else []
    if isinstance(data, str):
        path = existing("FILE", data)
        templates = [prompt.template, prompt.option] if choice else []
        asked = {"columns": task.get("columns"), "options": task.get("options")}
        wanted = _wanted(asked, templates or [prompt.template])
        wanted = [name for name in wanted if name not in made]
        records = _records(path, task.get("quoting"), wanted, notes)
        split = Split("predict", str(path), records, {})
        _check_mappings(split)
    else:
        split = Split("predict", "--field", [Record("--field", 1, dict(data))], {})
        for name in _wanted({"columns": task.get("columns")}, [prompt.template]):
            if name not in data and name not in made:
                raise UserError(
                    f"--field: the prompt {prompt.template!r} shows {name!r}, which is not given"
                    f"{near(name, data)}: add --field {shlex.quote(name)}=TEXT."
                )
    options = task.get("options") or _option_columns(source)
    columns = Columns({"columns": task.get("columns"), "options": options}, split)
    shown = [prompt.template, prompt.option] if choice else [prompt.template]
    fields = columns.fields(shown, made=made)
    if prompt.sfc is not None:
        more = columns.fields([prompt.sfc], ["task.sfc_prompt"], made)
        fields = list(dict.fromkeys([*fields, *more]))
    for name in columns.option_names if choice else ():
        columns.need(name, f"task.options={name}")
    rows = []
    for text, record in zip(columns.texts(split.records, fields), split.records, strict=True):
        own, listed = _options_of(record, columns, source) if choice else ((), {})
        rows.append(Row(listed | text, -1, str(record.number), options=own))
    check_letters(prompt, rows)
    return rows


def _option_columns(source: Mapping[str, Any]) -> Any:
    """Return the columns of the options of a benchmark's rows, or the one that holds a list."""
    paths = source.get("options") or "options"
    return tokens_of(paths)[-1][0] if isinstance(paths, str) else paths


def _options_of(
    record: Record, columns: Columns, source: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the options of a row as its task reads them, and the fields that list them."""
    own = tuple(without_prefix(columns.options(record), source))
    if not all(own):
        raise UserError(
            f"{record.where}: an option is empty behind its prefix; give every option a text."
        )
    try:
        return own, listed_fields(own, source)
    except ValueError as error:
        raise UserError(f"{record.where}: {error}.") from error


def _check_mappings(split: Split) -> None:
    for record in split.records:
        if not isinstance(record.value, dict):
            raise UserError(
                f"{record.where}: a record of columns is needed, not a "
                f'{type(record.value).__name__}; write it as {{"text": "a film", "label": 1}}.'
            )
