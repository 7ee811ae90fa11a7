"""Make the tables of a report that have a row for each group of runs; leave out empty columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smezo_cli.report.page_blocks import Block, Entry
from smezo_cli.report.page_settings import text


@dataclass(frozen=True)
class Cell:
    """Hold a cell: what is shown, the whole number behind it and what kind of number that is."""

    shown: str
    value: float | None = None
    kind: str = ""
    error: str = ""


@dataclass(frozen=True)
class Column:
    """Hold a column: its heading and a cell for each row."""

    head: str
    cells: tuple[Cell, ...]
    classes: str = "num"
    classes_of_head: str = "num"


def asked(block: Block) -> list[Column]:
    """Return what each group of runs was: its method, settings and seeds."""
    of_result = {
        "steps": "steps",
        "batch": "batch_size",
        "lr": "lr",
        "eps": "eps",
        "sparsity": "sparsity",
        "trained weights": "num_trained",
    }
    return _filled(
        [
            _words(block, "method", lambda entry: entry.first.result["method"]),
            _words(block, "lowers", lambda entry: entry.first.result.get("objective")),
            *(_setting(block, head, key) for head, key in of_result.items()),
            _words(block, "seeds", lambda entry: ", ".join(map(str, entry.seeds))),
            _words(block, "tested step", lambda e: ", ".join(map(str, e.tested)), "num"),
        ]
    )


def results(block: Block) -> list[Column]:
    """Return test scores, with their gains."""
    columns = [
        _words(block, "seeds", lambda entry: entry.record["seeds"], "num"),
        _share(block, block.metric, "score", lambda entry: entry.record["score"]),
        _share(block, "sd", "sd", lambda entry: entry.record["sd"]),
        _share(block, "zero-shot", "zero", lambda entry: entry.zero_shot),
        _gain(block, "over zero-shot", "over_zero_shot"),
        _gain(block, "over calibrated", "over_calibrated"),
    ]
    if block.has_pairs:
        columns.append(_gain(block, f"over {block.entries[0].label}", "over_first", "num of"))
    columns.append(_share(block, "AUC", "auc", lambda entry: entry.record["auc"]))
    columns += [_share(block, name, "part", _of_part(name)) for name in block.parts]
    return _filled(columns)


def cost(block: Block) -> list[Column]:
    """Return memory, time and forwards, and what they are of."""
    return _filled(
        [
            _number(block, "peak GiB", "peak", "{:.2f}", lambda entry: entry.record["peak_GiB"]),
            _words(block, "seconds a step", lambda entry: entry.seconds_in_words, "num"),
            _number(
                block, "training seconds", "seconds", "{:.4g}", lambda e: e.record["train_seconds"]
            ),
            _words(
                block,
                "forwards",
                lambda e: None if e.forwards is None else f"{e.forwards:g}",
                "num",
            ),
            _words(block, "executor", lambda entry: entry.first.result.get("executor")),
            _words(block, "device", lambda entry: entry.first.result.get("device")),
        ]
    )


def _of_part(name: str) -> Callable[[Entry], float]:
    return lambda entry: float(entry.record["parts"][name])


def _filled(columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if any(cell.shown for cell in column.cells)]


def _words(block: Block, head: str, of: Callable[[Entry], Any], classes: str = "") -> Column:
    cells = tuple(Cell(str(of(entry) or "")) for entry in block.entries)
    return Column(head, cells, classes, classes)


def _setting(block: Block, head: str, key: str) -> Column:
    values = [entry.first.result.get(key) for entry in block.entries]
    asked_for = [v.get("requested") if isinstance(v, dict) else v for v in values]
    return Column(head, tuple(Cell("" if v is None else text(v)) for v in asked_for))


def _number(
    block: Block, head: str, kind: str, shape: str, of: Callable[[Entry], float | None]
) -> Column:
    values = [of(entry) for entry in block.entries]
    cells = (Cell("") if v is None else Cell(shape.format(v), v, kind) for v in values)
    return Column(head, tuple(cells))


def _share(block: Block, head: str, kind: str, of: Callable[[Entry], float | None]) -> Column:
    values = [of(entry) for entry in block.entries]
    cells = (Cell("") if v is None else Cell(percent(v), v, kind) for v in values)
    return Column(head, tuple(cells))


def _gain(block: Block, head: str, key: str, classes_of_head: str = "num") -> Column:
    gains = [(e.record.get(key), e.record.get(f"{key}_se")) for e in block.entries]
    cells = (
        Cell("") if value is None else Cell(gain(value), value, key, f" ± {percent(error or 0.0)}")
        for value, error in gains
    )
    return Column(head, tuple(cells), classes_of_head=classes_of_head)


def percent(value: float) -> str:
    """Return a share in percent, to a hundredth."""
    return f"{100 * value:.2f}"


def gain(value: float) -> str:
    """Return a difference of shares in points, with its sign."""
    return f"{100 * value:+.2f}".replace("-", "\u2212")
