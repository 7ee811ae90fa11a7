"""Read tasks whose YAML says how a record becomes a row, from a benchmark's files or the hub.

`source` holds, for `files` and `hub` alike or in each of the two blocks, the paths
(`smezo_cli.tasks.paths`) of what a row is made of:

    rows          what one row is; without it one record is one row
    fields        texts: a list of names, or a mapping of names to paths
    values        of a field, what its values become: {conjunction: {effect: so, cause: because}}
    label         of classification the class, of choice the right option
    classes       values of the label: a list, or a mapping of each class to its values
    options       of choice: a list of paths, or one path with []
    option_spans  path of the text of which the options are {start, end} spans, the end included
    option_prefix regular expression of what stands before the text of each option
    answers       of choice the texts of the right options, of which the first in the order of
                  characters is trained on; of generation the reference answers: a path, or a list
                  of which the first with a text counts ("a b" joins two)
    answers_in    of generation, by split, the paths of the objects that `answers` lead into (where
                  they do not start at the top of the record): a row has the answers of them all,
                  and is a blank row that takes no number if one has several kinds, or all have none
    unlabelled    values of the label of rows without one, which are blank rows
    listed        further fields that list the options: {choices: "({letter}) {option}"}
    skip_blank    leave out rows with a blank text or nothing right, and say how many

`files` says besides how they are read (`smezo_cli.tasks.files.read_file`): `quotes`, `format`,
`line`, `encoding`; and its `labels` names for each split a file with one `label` a line.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.tasks.base import Row, Tables, option_fields
from smezo_cli.tasks.files import Record, digest_of, lines_of, read_file
from smezo_cli.tasks.hub import load_hub
from smezo_cli.tasks.paths import NotThereError, Place, places_of, tokens_of, value_at
from smezo_cli.tasks.templates import LETTER, LETTERS, fields_of, fill


class _BlankError(Exception):
    """Say why `skip_blank` leaves a row out."""

    takes_number = True  # it stands in the hub's copy, too


class _NoAnswerError(_BlankError):
    """Say that a row has no clear answer; the hub's copy lacks it."""

    takes_number = False


def read(cfg: Mapping[str, Any], cache: Path) -> Tables:
    """Return all rows of the folder `cfg.data_dir` if it is given, else of the hub.

    With `test_from: train` the test split is not asked for.

    Raises:
        UserError: naming file, line and field of what is missing or malformed.
    """
    source = cfg["source"]
    splits = _splits(cfg)
    if cfg["data_dir"] is None:
        if "hub" not in source:
            raise UserError(f"task {cfg['name']} is not on the hub: give task.data_dir=PATH.")
        layout = _layout(source, "hub")
        where, fingerprint, found = _from_hub(cfg["name"], source["hub"], splits)
    else:
        if "files" not in source:
            raise UserError(f"task.data_dir: task {cfg['name']} reads no files; leave it out.")
        layout = _layout(source, "files")
        paths = files_of(cfg)
        _check_files(cfg, paths)
        folder = paths[0].parent
        found = {split: _from_file(folder, source["files"], split) for split in splits}
        where = f"{folder} ({', '.join(path.name for path in paths)})"
        fingerprint = digest_of(*paths)
    rows, skipped = {}, {}
    for split in splits:
        rows[split], skipped[split] = _rows(found[split], layout, cfg["kind"], split)
    if sum(skipped.values()):
        told = " and ".join(f"{count} of {split}" for split, count in skipped.items() if count)
        where += f"; without blank rows or rows with nothing right: {told}"
    return Tables(
        train=rows["train"],
        test=rows.get("test", ()),
        fields=(*_fields(layout), *layout.get("listed", {})),
        classes=tuple(_classes(layout)) if cfg["kind"] == "classification" else (),
        source=where,
        fingerprint=fingerprint,
        groups={} if "test" in splits else _groups(rows["train"], source, layout),
    )


def _groups(
    rows: Sequence[Row], source: Mapping[str, Any], layout: Mapping[str, Any]
) -> dict[str, str]:
    """Return, by the id of a row, the text that the rows of one record share: their passage.

    The files say which fields those are, for the hub has the same rows flat; of several fields the
    longest text counts, so that in MultiRC it is the paragraph and not the question.
    """
    files = _layout(source, "files") if "files" in source else {}
    own = tokens_of(files.get("rows", ""))
    if not own:
        return {}
    shared = [name for name, path in _fields(files).items() if tokens_of(path)[: len(own)] != own]
    shared = [name for name in shared if name in _fields(layout)]
    return {row.id: max((row.fields[name] for name in shared), key=len) for row in rows if shared}


def files_of(cfg: Mapping[str, Any]) -> list[Path]:
    """Return the files of the folder `cfg.data_dir` that the rows come from."""
    folder = Path(cfg["data_dir"]).expanduser().absolute()
    files = cfg["source"]["files"]
    names = [files[split] for split in _splits(cfg)]
    names += [files["labels"][split] for split in _splits(cfg) if "labels" in files]
    return [folder / name for name in names]


def _splits(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    return ("train",) if cfg.get("test_from", "test") == "train" else ("train", "test")


def _layout(source: Mapping[str, Any], block: str) -> dict[str, Any]:
    shared = {key: value for key, value in source.items() if key not in ("files", "hub", "reader")}
    return shared | dict(source[block])


def _fields(layout: Mapping[str, Any]) -> dict[str, str]:
    fields = layout["fields"]
    return dict(fields) if isinstance(fields, Mapping) else {name: name for name in fields}


def _classes(layout: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of the label by the name of the class, in the order of the classes."""
    classes = layout.get("classes", {})
    if isinstance(classes, Mapping):
        return {str(name): list(values) for name, values in classes.items()}
    return {str(value): [value] for value in classes}


def _from_hub(
    task: str, hub: Mapping[str, Any], splits: tuple[str, ...]
) -> tuple[str, str, dict[str, Iterator[Record]]]:
    cure = f"give the folder of the benchmark's own files: task={task} task.data_dir=PATH"
    tables = {
        split: load_hub(
            hub["path"],
            hub.get("name"),
            hub["revision"],
            hub["splits"][split],
            task=task,
            cure=cure,
        )
        for split in splits
    }
    commits = {table.commit for table in tables.values() if table.commit}
    fingerprint = commits.pop() if len(commits) == 1 else ""
    name = f" {hub['name']}" if hub.get("name") else ""
    where = f"hub {hub['path']}{name} at {fingerprint or hub['revision']}"
    return where, fingerprint, {split: table.records() for split, table in tables.items()}


def _check_files(cfg: Mapping[str, Any], paths: list[Path]) -> None:
    folder, files = paths[0].parent, cfg["source"]["files"]
    of_test = {files["test"], files.get("labels", {}).get("test")}
    for path in paths:
        if not path.is_file():
            there = folder.is_dir()
            lacks = f"there is no {path.name} in it" if there else "there is no such folder"
            *names, last = [path.name for path in paths]
            must = f"{', '.join(names)} and {last}" if names else last
            # A sample of a benchmark is often a train file alone.
            alone = path.name in of_test and there
            cure = "; task.test_from=train cuts test rows from the train file" if alone else ""
            raise UserError(f"task.data_dir={folder}: {lacks}; the folder must hold {must}{cure}.")


def _from_file(folder: Path, files: Mapping[str, Any], split: str) -> Iterator[Record]:
    path = folder / files[split]
    given = {"quotes": "quotes", "format": "form", "line": "line", "encoding": "encoding"}
    how = {given[key]: files[key] for key in given if key in files}
    records = read_file(path, **how)
    return _labelled(records, folder / files["labels"][split]) if "labels" in files else records


def _labelled(records: Iterator[Record], path: Path) -> Iterator[Record]:
    """Yield records with the `label` that stands in the same line of another file."""
    labels = [line.strip() for line in lines_of(path)]
    count = 0
    for count, record in enumerate(records, start=1):
        if count > len(labels):
            raise UserError(f"{path} has {len(labels)} labels, and {record.where} needs one more.")
        labelled = isinstance(record.value, dict)
        yield record._replace(
            value={**record.value, "label": labels[count - 1]} if labelled else record.value
        )
    if count < len(labels):
        raise UserError(f"{path} has {len(labels)} labels for {count} records; give the pair.")


def _rows(
    records: Iterable[Record], layout: Mapping[str, Any], kind: str, split: str
) -> tuple[list[Row], int]:
    """Return the rows, and how many were left out as blank."""
    rows: list[Row] = []
    skipped = count = 0
    nested = layout.get("rows", "")
    for record in records:
        if not isinstance(record.value, dict):
            raise UserError(
                f"{record.where}: a record of fields in braces is needed, "
                f"not a {type(record.value).__name__}."
            )
        try:
            for place in places_of(record.value, nested):
                count += 1
                # Running numbers, so that nested files and flat tables of the hub agree.
                number = count if nested else record.number
                where = f"{record.where}, {place.where}" if place.where else record.where
                try:
                    rows.append(_row(place, layout, kind, split, number))
                except _BlankError as error:
                    if not layout.get("skip_blank"):
                        raise UserError(f"{where}: {error}.") from None
                    skipped += 1
                    count -= not error.takes_number
                except (NotThereError, ValueError) as error:
                    raise UserError(f"{where}: {error}.") from error
        except NotThereError as error:
            raise UserError(f"{record.where}: {error}.") from error
    return rows, skipped


def _row(place: Place, layout: Mapping[str, Any], kind: str, split: str, number: int) -> Row:
    """Return one row; ValueError or NotThereError for what is missing or malformed."""
    texts, identity = {}, f"{split}/{number}"
    for name, path in _fields(layout).items():
        value = value_at(place, path)
        if not isinstance(value, str):
            raise ValueError(f"field {path!r} must be a text and is {value!r}")
        if not value.strip():
            raise _BlankError(f"field {path!r} must be a text and is {value!r}")
        if name in layout.get("values", {}):
            meanings = layout["values"][name]
            if value not in meanings:
                raise ValueError(
                    f"field {path!r} is {value!r}; allowed are {', '.join(map(repr, meanings))}"
                )
            value = meanings[value]
        texts[name] = value
    if kind == "generation":
        return Row(texts, 0, identity, answers=_references(place, layout, split))
    if kind == "classification":
        return Row(texts, _label(place, layout), identity)
    options = _options(place, layout)
    texts |= listed_fields(options, layout)
    if "answers" in layout:
        # Files have them in the order in which people gave them, the hub's copy of ReCoRD so.
        answers = sorted(_answers(place, layout["answers"]))
        right = [options.index(answer) for answer in answers if answer in options]
        if not right:
            raise _BlankError(f"none of the answers ({', '.join(answers)}) is an option")
    else:
        right = [_label(place, layout)]
        if right[0] >= len(options):
            raise ValueError(f"field {layout['label']!r} names no option; there are {len(options)}")
        # Another option of the same text is as right.
        right += [k for k, text in enumerate(options) if text == options[right[0]]]
    return Row(texts, right[0], identity, options=options, right=frozenset(right))


def _label(place: Place, layout: Mapping[str, Any]) -> int:
    value = value_at(place, layout["label"])
    if any(type(value) is type(none) and value == none for none in layout.get("unlabelled", ())):
        raise _BlankError(f"field {layout['label']!r} is {value!r}, which is no label")
    classes = list(_classes(layout).values())
    for index, values in enumerate(classes):
        # By type as well: in Python True is 1.
        if any(type(value) is type(known) and value == known for known in values):
            return index
    allowed = ", ".join(repr(known) for values in classes for known in values)
    raise ValueError(f"field {layout['label']!r} is {value!r}; allowed are {allowed}")


def _options(place: Place, layout: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the row's own candidates, in order; each once if the right ones are known by text."""
    paths = layout["options"]
    if isinstance(paths, str):
        found = value_at(place, paths)
    else:
        found = [value_at(place, path) for path in paths]
    if "option_spans" in layout:
        text = value_at(place, layout["option_spans"])
        try:
            found = [text[span["start"] : span["end"] + 1] for span in found]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"field {layout['options']!r} must hold spans, {{start, end}} of "
                f"{layout['option_spans']}"
            ) from error
    found = without_prefix(_texts(found, "an option", blank=True), layout)
    options = _texts(found, "an option")
    return tuple(dict.fromkeys(options)) if "answers" in layout else options


def without_prefix(options: Sequence[str], layout: Mapping[str, Any]) -> list[str]:
    """Return options without what stands before the text of each, if `option_prefix` says what."""
    if "option_prefix" not in layout:
        return list(options)
    prefix = re.compile(rf"\s*(?:{layout['option_prefix']})\s*")
    return [prefix.sub("", text, count=1) for text in options]


def listed_fields(options: Sequence[str], layout: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that list the options of a row, by name.

    Raises:
        ValueError: they are to show letters, and there are more options than these.
    """
    texts = {}
    for name, template in layout.get("listed", {}).items():
        if LETTER in fields_of(template) and len(options) > len(LETTERS):
            raise ValueError(
                f"field {name!r} shows letters, which end at {LETTERS[-1]}, and there are "
                f"{len(options)} options"
            )
        parts = [fill(template, option_fields(text, k)) for k, text in enumerate(options)]
        texts[name] = " ".join(parts)
    return texts


def _references(place: Place, layout: Mapping[str, Any], split: str) -> tuple[str, ...]:
    """Return the reference answers of a generation row, each once; the first is trained on."""
    if "answers_in" not in layout:
        return _answers(place, layout["answers"])
    found: dict[str, None] = {}
    for path in layout["answers_in"][split]:
        try:
            objects = value_at(place, path)
        except NotThereError:
            continue
        for one in objects if isinstance(objects, list) else [objects]:
            kinds = list(_kinds(Place((), (one,), ""), layout["answers"]))
            if len(kinds) > 1:
                several = ", ".join(repr(text) for texts in kinds for text in texts)
                raise _NoAnswerError(f"one answer is of several kinds ({several})")
            found |= dict.fromkeys(text for texts in kinds for text in texts)
    if not found:
        raise _NoAnswerError(f"there is no answer in {' or '.join(layout['answers_in'][split])}")
    return tuple(found)


def _answers(place: Place, paths: str | list[str]) -> tuple[str, ...]:
    texts = _texts_at(place, paths) if isinstance(paths, str) else next(_kinds(place, paths), ())
    if not texts:
        raise _BlankError(
            f"there is no answer in {paths if isinstance(paths, str) else paths[0]!r}"
        )
    return texts


def _kinds(place: Place, paths: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield the texts of each path that leads to any."""
    for path in paths:
        with contextlib.suppress(NotThereError):  # the next path may lead somewhere
            if texts := _texts_at(place, path):
                yield texts


def _texts_at(place: Place, path: str) -> tuple[str, ...]:
    """Return the texts of a path that are not blank; "a b" joins the texts of two paths."""
    found = [value_at(place, part) for part in path.split(" ")]
    if len(found) > 1:
        values = [" ".join(str(text) for text in found if text)]
    else:
        values = found[0] if isinstance(found[0], list) else [found[0]]
    return tuple(text for text in _texts(values, "an answer", blank=True) if text.strip())


def _texts(values: Any, what: str, *, blank: bool = False) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise ValueError(f"a list of texts is needed, and {values!r} stands there")
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{what} must be a text and is {value!r}")
        if not blank and not value.strip():
            raise _BlankError(f"{what} must be a text and is {value!r}")
    return tuple(values)
