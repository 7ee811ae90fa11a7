"""`smezo runs`: list finished and unfinished runs, filtered, merged over seeds, compared."""

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.cli import fitted_table
from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.errors import UserError, near
from smezo_cli.files import strict_json
from smezo_cli.report.best import Best, best, mean_and_sd, on_dev
from smezo_cli.report.compared import compared
from smezo_cli.report.runs import Group, Run, find, groups, has, keys, load, repeats, select

USAGE = """\
smezo runs [KEY=VALUE ...]            the runs below runs/, filtered by results or settings
smezo runs --mean [KEY=VALUE ...]     runs that differ in their seed (and the rows it draws) as one
smezo runs --best [KEY=VALUE ...]     the best settings on dev, of each task, model and method
smezo runs --compare A B [...]        run folders (or parts of their names) row by row
    --runs-dir DIR    where to look (runs)
    --by WHAT         with --best: loss (the lowest dev loss) | metric (the highest dev metric)
    --sort KEY        order by a column or by any key of result.json, such as train_seconds
    --json            machine-readable
Examples:
  smezo runs task=rte status=done --sort score
  smezo runs --mean task=rotten_tomatoes lr_schedule=linear
  smezo runs --best task=rte name=search
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
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--by", choices=("loss", "metric"))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--sort")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_intermixed_args(list(words))
    chosen = [name for name in ("mean", "best", "compare") if getattr(given, name)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other: give one of them.")
    if given.by and not given.best:
        raise UserError(f"--by {given.by} goes with --best.")
    if given.sort and given.best:
        raise UserError("--sort has no effect with --best: --by says what is the best.")
    runs, notes = find(Path(given.runs_dir)), list[str]()
    if given.compare:
        named = [_named(word, runs) for word in given.words]
        if len(named) < 2:
            raise UserError("--compare needs two runs or more: smezo runs --compare A B.")
        if given.sort:
            raise UserError("--sort has no effect with --compare: the order is the one given.")
        records = list(compared([Group((run,)) for run in named]))
    else:
        runs = select(runs, given.words)
        done = [run for run in runs if run.result["status"] == "done"]
        if given.mean:
            found = groups(done)
            notes = [line for group in found for line in repeats(group.name, group.repeated)]
            records = list(compared(_sorted_groups(found, given.sort) if given.sort else found))
        elif given.best:
            records = list(_best(runs, given.by or "loss", for_people=not given.json))
        else:
            runs = _sorted(runs, given.sort) if given.sort else runs
            records = [_record(run) for run in runs]
            if given.json:  # forty digits are too wide for the table
                for record, run in zip(records, runs, strict=True):
                    record["model_commit"] = run.result.get("model_commit")
    if given.json:
        print(strict_json.dumps(records, indent=2))
    elif not records:
        where = f" with {' '.join(given.words)}" if given.words else ""
        print(
            f"no {'finished ' if given.mean or given.best else ''}runs in {given.runs_dir}{where}"
        )
    else:
        fitted_table.show(records, needed=given.sort)
    for line in notes:
        print(line, file=sys.stderr)
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
    columns = [_record(run) for run in runs]
    shown = [
        of[key] if key in of else run.get(key) if has(run, key) else None
        for run, of in zip(runs, columns, strict=True)
    ]
    if runs and key not in columns[0] and not any(has(run, key) for run in runs):
        raise UserError(
            f"--sort {key}: no run has such a key{near(key, [*keys(runs[0]), *columns[0]])}."
        )
    order = sorted(range(len(runs)), key=lambda k: _place(shown[k]))
    return [runs[k] for k in order]


def _sorted_groups(found: list[Group], key: str) -> list[Group]:
    """Order groups by a column of `--mean`, or by the mean of a key over their runs."""
    columns = list(compared(found))
    if found and key not in columns[0] and not any(has(r, key) for g in found for r in g.runs):
        known = [*keys(found[0].runs[0]), *columns[0]]
        raise UserError(f"--sort {key}: no run has such a key{near(key, known)}.")

    def value(k: int) -> object:
        if key in columns[k]:
            return columns[k][key]
        values = [run.get(key) for run in found[k].runs if has(run, key)]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(values) > 0:
            return statistics.mean(numbers)
        return next((v for v in values if v is not None), None)

    return [found[k] for k in sorted(range(len(found)), key=lambda k: _place(value(k)))]


def _place(value: object) -> tuple[bool, float, str]:
    """Return a key that sorts numbers by size, words by letters, and what is missing last."""
    return value is None, value if isinstance(value, int | float) else 0.0, str(value)


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


def _best(runs: Sequence[Run], by: str, *, for_people: bool) -> Iterator[dict[str, Any]]:
    for found in best(runs, by):
        of, result = found.group.runs, found.group.runs[0].result
        loss, loss_sd = mean_and_sd(on_dev(run, "loss") for run in of)
        score, sd = mean_and_sd(run.score for run in of if run.score is not None)
        metric = statistics.mean(on_dev(run, run.metric) for run in of)
        record: dict[str, Any] = {
            "best": f"{result['task']}-{result['model']}-{result['method']}",
            "settings": dict(found.settings),
            "compared": found.compared,
            "seeds": len(of),
            "diverged": list(found.diverged),
            "missing": list(found.missing),
            "note": _note(found),
            "dev_loss": _number(loss),
            "dev_loss_sd": _number(loss_sd),
            "dev_metric": _number(metric),
            "metric": of[0].metric,
            "score": score,
            "sd": sd,
            "runs": [str(run.path) for run in of],
        }
        if for_people:  # the note says these
            del record["diverged"], record["missing"]
        yield record


def _number(value: float | None) -> float | None:
    """Return a mean, or None where a run had no such number."""
    return value if value is not None and math.isfinite(value) else None


def _note(found: Best) -> str | None:
    """Say what makes a mean doubtful: seeds that it lacks, or rivals with more or fewer of them."""
    done = len(found.group.runs)
    lacking = [f"seed {seed} diverged" for seed in found.diverged]
    lacking += [f"seed {seed} has no result" for seed in found.missing]
    notes = [f"{done} of {done + len(lacking)} seeds: {', '.join(lacking)}"] if lacking else []
    fewest, most = found.num_seeds
    if fewest != most:
        notes.append(f"the settings compared have {fewest} to {most} seeds")
    return "; ".join(notes) or None
