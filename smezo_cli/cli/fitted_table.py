"""Print records as a table: whole into a pipe or a file, and on a terminal as wide as that is."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# Columns that a narrow terminal does without, the least needed first.
_LEAST_NEEDED = (
    *("peak_GiB", "train_seconds", "auc", "parts", "standard_error", "n", "over_calibrated"),
    *("zero_shot", "metric", "dev_loss_sd", "sd", "compared", "steps", "runs", "seeds", "seed"),
    *("over_zero_shot", "sparsity", "lr", "over_first", "dev_metric"),
)
_DIGITS = ("score", "sd", "zero_shot", "auc", "standard_error", "dev_loss", "dev_metric")


def show(records: Sequence[Mapping[str, Any]], needed: str | None = None) -> None:
    """Print the records; a gain and its standard error share a column.

    On a terminal that is too narrow columns are left out, which is said, and the words of others
    are folded: nothing is cut.

    Args:
        records: with the same keys.
        needed: a column that stays.
    """
    names = [key for key in records[0] if not key.endswith("_se")]
    names = [key for key in names if any(r.get(key) is not None for r in records)]
    left: list[str] = []
    width = terminal_width()
    if width is not None:
        order = [name for name in _LEAST_NEEDED if name in names and name != needed]
        while order and natural_width(_table(records, names)) > width:
            left.append(order.pop(0))
            names.remove(left[-1])
    table = _table(records, names)
    natural = natural_width(table)
    if width is not None and natural > width:
        for column in table.columns:
            column.no_wrap, column.overflow = False, "fold"
    # With a height, rich takes the width even of a terminal that calls itself dumb.
    Console(width=natural if width is None else width, height=24, highlight=False).print(table)
    if left:
        print(
            f"left out, as the terminal has {width} columns: {', '.join(left)} "
            "(a pipe and --json have them all)"
        )


def terminal_width() -> int | None:
    """Return the columns of the terminal that the output goes to; None if it goes elsewhere."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):  # no terminal; no file at all
        return None


def natural_width(table: Table) -> int:
    """Return the columns that a table takes where nothing is folded."""
    console = Console(width=1 << 16, height=24)
    return Measurement.get(console, console.options, table).maximum


def _table(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for name in names:
        of_words = any(isinstance(record.get(name), str | list | Mapping) for record in records)
        table.add_column(name, justify="left" if of_words else "right", no_wrap=True)
    for record in records:
        # As text: in a string rich would take [INST] for markup.
        table.add_row(*(Text(_cell(record, name)) for name in names))
    return table


def _cell(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if f"{name}_se" in record:
        return f"{value:+.4f} +- {record[f'{name}_se']:.4f}"
    if name == "settings":
        return " ".join(f"{key}={number(of)}" for key, of in value.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{part} {score:.4f}" for part, score in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - 1} more" if len(value) > 1 else ""
        return f"{value[0]}{more}"
    if name in _DIGITS or name.endswith("_sd"):
        return f"{value:.4f}"
    if name == "train_seconds":
        return f"{value:.0f}"
    if name == "peak_GiB":
        return f"{value:.2f}"
    return number(value)


def number(value: Any) -> str:
    """Return a value as a person would write it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)
