"""`smezo runs`: list finished and unfinished runs, filtered, merged over seeds, compared."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.errors import UserError, near
from smezo_cli.files import strict_json
from smezo_cli.report.compared import compared
from smezo_cli.report.runs import Group, Run, find, groups, has, keys, load, select

USAGE = """\
smezo runs [KEY=VALUE ...]            the runs below runs/, filtered by results or settings
smezo runs --mean [KEY=VALUE ...]     runs that differ in their seed (and the rows it draws) as one
smezo runs --compare A B [...]        run folders (or parts of their names) row by row
    --runs-dir DIR    where to look (runs)
    --sort KEY        order by a column or by any key of result.json, such as train_seconds
    --json            machine-readable
Examples:
  smezo runs task=rte status=done --sort score
  smezo runs --mean task=rotten_tomatoes lr_schedule=linear
  smezo runs --compare sparse_mezo-s0 -mezo-s0
"""


# --- tables ----------------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """Print the table of runs; return the exit code.

    Raises:
        UserError: a mistake on the line.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("runs")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--mean", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--sort")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_intermixed_args(list(words))
    if given.mean and given.compare:
        raise UserError("--mean and --compare exclude each other: give one of them.")
    runs = find(Path(given.runs_dir))
    if given.compare:
        chosen = [_named(word, runs) for word in given.words]
        if len(chosen) < 2:
            raise UserError("--compare needs two runs or more: smezo runs --compare A B.")
        if given.sort:
            raise UserError("--sort has no effect with --compare: the order is the one given.")
        records = list(compared([Group((run,)) for run in chosen]))
    else:
        runs = select(runs, given.words)
        if given.sort:
            runs = _sorted(runs, given.sort)
        if given.mean:
            done = [run for run in runs if run.result["status"] == "done"]
            records = list(compared(groups(done)))
        else:
            records = [_record(run) for run in runs]
            if given.json:  # forty digits are too wide for the table
                for record, run in zip(records, runs, strict=True):
                    record["model_commit"] = run.result.get("model_commit")
    if given.json:
        print(strict_json.dumps(records, indent=2))
    elif not records:
        where = f" with {' '.join(given.words)}" if given.words else ""
        print(f"no {'finished ' if given.mean else ''}runs in {given.runs_dir}{where}")
    else:
        _print(records)
    return 0


def _named(word: str, runs: Sequence[Run]) -> Run:
    """Return the run whose folder this is, or the only one with this in its name."""
    folder = load(Path(word))
    found = [folder] if folder else [run for run in runs if run.path.name == word]
    found = found or [run for run in runs if word in run.path.name]
    if len(found) != 1:
        names = ", ".join(run.path.name for run in found or runs)[:300]
        what = f"fits {len(found)} runs" if found else "is no run"
        raise UserError(f"{word} {what} (there are: {names or 'none'}).")
    if found[0].result["status"] != "done":
        raise UserError(f"{found[0].path} is not finished: {found[0].result['status']}.")
    return found[0]


def _sorted(runs: list[Run], key: str) -> list[Run]:
    if runs and not any(has(run, key) for run in runs):
        raise UserError(f"--sort {key}: no run has such a key{near(key, keys(runs[0]))}.")

    def place(run: Run) -> tuple[bool, float, str]:
        value = run.get(key) if has(run, key) else None
        number = value if isinstance(value, int | float) else 0.0
        return value is None, number, str(value)

    return sorted(runs, key=place)


def _record(run: Run) -> dict[str, Any]:
    result = run.result
    test, zero = result.get("test") or {}, result.get("zero_shot") or {}
    sparsity = (result.get("sparsity") or {}).get("requested")
    progress = f"{result.get('step', 0)}/{result['steps']}" if "steps" in result else ""
    return {
        "run": str(run.path),
        "status": result["status"],
        "steps": progress,
        "lr": result.get("lr"),
        "sparsity": sparsity,
        "seed": result.get("seed"),
        "metric": run.metric,
        "score": run.score,
        "standard_error": test.get("standard_error"),
        "parts": run.scores_of_parts or None,
        "zero_shot": zero.get(run.metric),
        "train_seconds": result.get("train_seconds"),
        "peak_GiB": (result.get("peak_memory_bytes") or 0) / 2**30,
    }


def _print(records: Sequence[Mapping[str, Any]]) -> None:
    """Print a table as wide as it must be; a gain and its standard error share a column."""
    names = [key for key in records[0] if not key.endswith("_se")]
    names = [key for key in names if any(r.get(key) is not None for r in records)]
    table = Table(box=SIMPLE, pad_edge=False)
    for name in names:
        left = isinstance(records[0][name], str)
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for record in records:
        table.add_row(*(_cell(record, name) for name in names))
    # A run is named by its folder, which must not be cut where the table is piped or narrow.
    columns = max(os.get_terminal_size().columns if os.isatty(1) else 0, 400)
    Console(width=columns, highlight=False).print(table)


def _cell(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if f"{name}_se" in record:
        return f"{value:+.4f} +- {record[f'{name}_se']:.4f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{part} {score:.4f}" for part, score in value.items())
    if name in ("score", "sd", "zero_shot", "auc", "standard_error"):
        return f"{value:.4f}"
    if name == "train_seconds":
        return f"{value:.0f}"
    if name == "peak_GiB":
        return f"{value:.2f}"
    return f"{value:g}" if isinstance(value, float) else str(value)
