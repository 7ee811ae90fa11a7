"""Make a `Task` of a task node of the configuration."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.kinds import KINDS, MIXTURE
from smezo_cli.tasks import mixture, own, records, rotten_tomatoes, snippets, toy
from smezo_cli.tasks.base import Row, Tables, Task, cut, lacking, one_class, prompts_of
from smezo_cli.tasks.files import digest_of

READERS: dict[str, Callable[[Mapping[str, Any], Path], Tables]] = {
    "records": records.read,
    "rotten_tomatoes": rotten_tomatoes.read,
    "snippets": snippets.read,
    "toy": toy.read,
}


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Switch the garbage collector off within the context: rows are many, and in no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_uncollected()
def load_task(
    cfg: Mapping[str, Any], *, data_seed: int, cache: Path, by_line: bool = False
) -> Task:
    """Read the rows of the task node `cfg`, cut them by `data_seed`, check the prompts.

    Args:
        cfg: the task node.
        data_seed: orders the rows before they are cut.
        cache: folder of what is fetched.
        by_line: of data of the user's own, see :func:`smezo_cli.tasks.own.read`.

    Raises:
        UserError: missing or malformed data; prompts or counts that do not fit.
    """
    kind = cfg["kind"]
    if kind == MIXTURE:
        nodes = cfg["nodes"].items()
        parts = {
            name: load_task(of, data_seed=data_seed, cache=cache, by_line=by_line)
            for name, of in nodes
        }
        return mixture.joined(cfg, parts)
    if kind not in KINDS:
        raise UserError(f"task.kind={kind} is not known; there are {', '.join(KINDS)}.")
    if "source" not in cfg:
        tables, cfg = own.read(cfg, by_line=by_line)
    else:
        reader = cfg["source"]["reader"]
        if reader not in READERS:
            raise UserError(
                f"task.source.reader={reader} is not known; there are {', '.join(READERS)}."
            )
        tables = READERS[reader](cfg, cache)
    if not tables.train:
        raise UserError(f"task {cfg['name']}: there are no rows to train on in {tables.source}.")
    first = tables.train[0]
    if kind != _kind_of(tables, bool(first.options), bool(first.answers)):
        raise UserError(
            f"task.kind={kind} does not fit: the rows of task {cfg['name']} have no "
            f"{dict(zip(KINDS, ('classes', 'options', 'answers'), strict=True))[kind]}."
        )
    prompts = prompts_of(cfg, tables)
    train, dev, test = cut(tables, cfg, data_seed)
    notes = [tables.source]
    if cfg.get("num_per_class") is not None:
        notes += lacking(train, dev, tables.classes, cfg["num_per_class"])
    elif cfg["num_train"] is not None and len(train) < cfg["num_train"]:
        notes.append(
            f"{len(train)} rows to train on, not {cfg['num_train']}: of {len(tables.train)} "
            f"dev takes {len(dev)}"
            + (f" and test {len(test)}" if not tables.test else "")
            + (", and rows on a passage of the test are left out" if tables.groups else "")
        )
    if tables.groups:
        few = f" ({len(test)}, not {cfg['num_test']})" if len(test) < (cfg["num_test"] or 0) else ""
        notes.append(f"test rows{few} share no passage with rows of train and dev")
    if "source" not in cfg and (copies := own.copies(test, train + dev)):
        notes.append(f"{copies} of {len(test)} test rows are also among train and dev")
    return Task(
        name=cfg["name"],
        kind=kind,
        prompts=tuple(prompt for prompt in prompts if not prompt.is_masked),
        notes=(
            *tables.notes,
            *_missing_classes(tables, {"train": train, "dev": dev, "test": test}),
            *_broken_answers((*train, *dev, *test)),
        ),
        masked=tuple(prompt for prompt in prompts if prompt.is_masked),
        train=train,
        dev=dev,
        test=test,
        classes=tables.classes,
        source="; ".join(notes),
        fingerprint=tables.fingerprint,
    )


_FIRST = 100  # rows by which a file is known to fit


def check_own(cfg: Mapping[str, Any]) -> None:
    """Refuse a task node that the first rows of the user's own files do not fit.

    They are read as :func:`load_task` reads all of them, and nothing heavy is loaded. Where they do
    not fit, all rows decide, since a column or a label may come later.

    Raises:
        UserError: as :func:`load_task` has it.
    """
    if cfg["kind"] == MIXTURE:
        for node in cfg["nodes"].values():
            check_own(node)
    elif "source" not in cfg and own.is_file(str(cfg["data"])):
        try:
            _check_rows(cfg, _FIRST)
        except UserError:
            _check_rows(cfg, None)


@_uncollected()
def _check_rows(cfg: Mapping[str, Any], most: int | None) -> None:
    tables, filled = own.read(cfg, most=most)
    prompts_of(filled, tables)


def _missing_classes(tables: Tables, splits: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return lines on classes that no row has, and on splits with rows of one class alone."""
    if len(tables.classes) < 2:
        return []
    notes = []
    found = {row.label for rows in (tables.train, tables.test) for row in rows}
    if missing := [name for k, name in enumerate(tables.classes) if k not in found]:
        notes.append(f"no row has the label {' or '.join(missing)}")
    alone = [
        f"{name} ({len(rows)} of {len(rows)} rows: label {tables.classes[rows[0].label]})"
        for name, rows in splits.items()
        if one_class([row.label for row in rows])
    ]
    if alone:
        notes.append(
            f"one class alone in {', '.join(alone)}: metrics there say nothing of how well classes "
            "are told apart"
        )
    return notes


def _broken_answers(rows: Sequence[Row]) -> list[str]:
    """Return a line on answers of several lines, which no generated one can be."""
    answers = [row.answers[0].strip() for row in rows if row.answers]
    if count := sum("\n" in answer for answer in answers):
        return [
            f"the answers of {count} of {len(answers)} rows have several lines: they are trained "
            "on whole, and an answer that is generated ends at its first newline"
        ]
    return []


def local_fingerprint(cfg: Mapping[str, Any]) -> str | None:
    """Return the `fingerprint` that the task would have; None if its data is in no local files."""
    if cfg["kind"] == MIXTURE:
        found = [local_fingerprint(node) for node in cfg["nodes"].values()]
        return None if None in found else " ".join(map(str, found))
    if cfg.get("data"):
        names = [cfg["data"], *([cfg["test_data"]] if cfg.get("test_data") else [])]
    elif cfg.get("data_dir"):
        names = [str(path) for path in records.files_of(cfg)]
    else:
        return None
    paths = [Path(str(name)).expanduser() for name in names]
    return digest_of(*paths) if all(path.is_file() for path in paths) else None


def _kind_of(tables: Tables, has_options: bool, has_answers: bool) -> str:
    if tables.classes:
        return "classification"
    return "choice" if has_options else "generation" if has_answers else ""
