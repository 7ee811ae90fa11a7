"""Find finished and unfinished runs, filter them, merge them over seeds, compare them.

No torch here: a table of a hundred runs should not wait for it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import plain, usual_eval_every
from smezo_cli.errors import UserError, near
from smezo_cli.files import bounded
from smezo_cli.store import schema

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """Hold one run folder: result.json, the resolved settings, the outcome of every test row.

    Of a run that only a collected file is left of (collected.py), `path` is that file.
    """

    path: Path
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    collected: tuple[tuple[int, float], ...] | None = None
    collected_outcomes: Floats | None = None

    @property
    def metric(self) -> str:
        """Return the name of the metric that counts: accuracy or f1."""
        return str(self.result.get("metric", "accuracy"))

    @property
    def score(self) -> float | None:
        """Return the metric on the test rows."""
        return (self.result.get("test") or {}).get(self.metric)

    @property
    def scores_of_parts(self) -> dict[str, float]:
        """Return the metric on the test rows of each part of a mixture; none of a single task."""
        parts = (self.result.get("test") or {}).get("parts") or {}
        return {name: of[self.metric] for name, of in parts.items() if self.metric in of}

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Return the settings as the run resolved them: eval_every is a number, if it takes steps.

        What null stands for may be another number in another version.
        """
        steps = self.config.get("steps")
        if not isinstance(steps, int) or not steps or self.config.get("eval_every", ...):
            return self.config
        every = self.result.get("eval_every")
        if not isinstance(every, int):  # a run of before it was recorded
            try:
                every = next(step for step, _ in self.evaluations() if step)
            except (UserError, StopIteration):
                every = usual_eval_every(steps)
        return {**self.config, "eval_every": every}

    def evaluations(self) -> list[tuple[int, float]]:
        """Return step and metric (0 to 1) of every evaluation on dev, in order.

        Raises:
            UserError: metrics.jsonl is missing or damaged.
        """
        if self.collected is not None:
            return list(self.collected)
        path = self.path / "metrics.jsonl"
        try:
            key = f"dev.{self.metric}"
            lines = bounded.read_text(path, 1 << 30).splitlines()
            # Of thousands of lines a few are evaluations: the others are not parsed.
            found = [json.loads(line) for line in lines if f'"{key}"' in line]
            return [(int(line["step"]), float(line[key])) for line in found]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be read: it is damaged.") from error

    def get(self, key: str) -> object:
        """Return `score`, `run` (its name), or a value of result.json or the settings by its key.

        Raises:
            KeyError: there is none.
        """
        if key in ("score", "run"):
            return self.score if key == "score" else self.path.name
        for tree in (self.result, self.config):
            node: Any = tree
            for part in key.split("."):
                if not isinstance(node, Mapping) or part not in node:
                    break
                node = node[part]
            else:
                if not isinstance(node, Mapping):
                    return node
        raise KeyError(key)

    def outcomes(self) -> dict[str, Floats]:
        """Return outcomes by test row, float64 (n,): `test`, `zero_shot` and perhaps `calibrated`.

        Raises:
            UserError: the run has none, or the file is damaged.
        """
        if self.collected is not None:
            if self.collected_outcomes is None:
                raise UserError(
                    f"{self.path} has no outcomes of test rows: it was collected by an older "
                    "version; smezo table ID --collect DIR, where the run is, writes them."
                )
            return {"test": self.collected_outcomes}
        path = self.path / "scores.safetensors"
        try:
            bounded.check_ordinary(path)
            found = {
                name.removeprefix("outcome."): rows.astype(np.float64)
                for name, rows in load_file(path).items()
                if name.startswith("outcome.")
            }
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}).") from error
        if "test" not in found:
            raise UserError(f"{self.path} has no outcomes of test rows: it is of an older version.")
        shapes = {rows.shape for rows in found.values()}
        if len(shapes) > 1 or len(shape := shapes.pop()) != 1 or shape[0] == 0:
            raise UserError(f"{path} is damaged: give the command of its run again to mend it.")
        return found


def find(runs_dir: Path) -> list[Run]:
    """Return every run below a folder, by name; other folders are passed over.

    Raises:
        UserError: there is no such folder.
    """
    if not runs_dir.is_dir():
        raise UserError(f"--runs-dir {runs_dir}: there is no such folder.")
    found = []
    for file in sorted(runs_dir.rglob("result.json")):
        run = load(file.parent)
        if run is not None:
            found.append(run)
    return found


def load(folder: Path) -> Run | None:
    """Return the run in a folder, or None if there is none that can be read."""
    try:
        result = bounded.read_json(folder / "result.json")
        if result is None or not schema.is_sound_result(result):
            return None
        return Run(folder, result, plain(bounded.load_yaml(folder / "config.yaml")))
    except UserError:
        return None


def select(runs: Iterable[Run], filters: Sequence[str]) -> list[Run]:
    """Return the runs for which every KEY=VALUE holds; VALUE may list several (seed=0,1).

    Raises:
        UserError: not of that form, or a key that no run has.
    """
    runs = list(runs)
    for text in filters:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r} is not of the form KEY=VALUE, such as task=rte.")
        if runs and not any(has(run, key) for run in runs):
            raise UserError(f"no run has a key {key}{near(key, keys(runs[0]))}.")
        wanted = values.split(",")
        runs = [run for run in runs if has(run, key) and _is_one_of(run.get(key), wanted)]
    return runs


def has(run: Run, key: str) -> bool:
    """Return whether a run has this key."""
    try:
        run.get(key)
    except KeyError:
        return False
    return True


def _is_one_of(value: object, words: Sequence[str]) -> bool:
    if value is None or isinstance(value, bool):
        return json.dumps(value) in words
    for word in words:
        try:
            if isinstance(value, int | float) and float(word) == value:
                return True
        except ValueError:
            pass
        if str(value) == word:
            return True
    return False


def keys(run: Run) -> list[str]:
    """Return the keys that a run can be filtered by."""
    top = {
        key for key, value in {**run.config, **run.result}.items() if not isinstance(value, dict)
    }
    return sorted(top | {"score", "run", "task", "model", "method"})


# --- paired gains ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, and in the training rows that it draws.

    Attributes:
        runs: one a seed.
        repeated: further runs of these seeds, which count for nothing.
    """

    runs: tuple[Run, ...]
    repeated: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        """Return the settings that the runs have in common, in words."""
        first = self.runs[0].result
        words = [f"{first['task']}-{first['model']}-{first['method']}"]
        for key in ("lr", "sparsity", "eps", "steps"):
            value = first.get(key)
            value = value.get("requested") if isinstance(value, dict) else value
            if value is not None:
                words.append(f"{key}={value:g}")
        seeds = [f"seed={run.result['seed']}" for run in self.runs]
        return " ".join(words + (seeds if len(seeds) == 1 else []))

    @property
    def sizes(self) -> list[int]:
        """Return the test rows of each part of a mixture, in order; none of a single task."""
        parts = (self.runs[0].result.get("test") or {}).get("parts") or {}
        return [int(of["n"]) for of in parts.values()]

    def mean(self, rows: str = "test") -> Floats:
        """Return the mean outcome of each test row over the seeds, float64 (n,)."""
        outcomes = [run.outcomes()[rows] for run in self.runs]
        for run, found in zip(self.runs, outcomes, strict=True):
            if len(found) != len(outcomes[0]):
                raise UserError(
                    f"{run.path} has outcomes of {len(found)} test rows and {self.runs[0].path} "
                    f"of {len(outcomes[0])}: one of them is damaged; give its command again."
                )
        mean: Floats = np.mean(outcomes, axis=0)
        return mean


def groups(runs: Sequence[Run], *, across_folders: bool = False) -> list[Group]:
    """Group runs that differ in their seed alone, in the order of their first runs.

    Where each seed draws its training rows, too (data_seed=${seed}), these are no difference of
    their own; the test rows have to be the same.

    Args:
        runs: finished.
        across_folders: equal settings under several name= are one group.
    """
    buckets: dict[str, list[Run]] = {}
    for run in runs:
        # Runs that can be extended keep their digest; data files may change behind a name.
        # So may weights behind the id of a model.
        rows = [run.result.get(key) for key in ("steps", "test_rows", "model_fingerprint")]
        rest = digest(dict(run.settings) | {"seed": 0, "data_seed": 0})
        folder = "" if across_folders else run.path.parent
        buckets.setdefault(f"{folder} {rest} {rows}", []).append(run)
    found: dict[tuple[str, str], list[Run]] = {}
    for key, members in buckets.items():
        follows = draw_their_rows(members)
        for run in members:
            drawn = [run.config.get("data_seed"), run.result.get("train_rows")]
            found.setdefault((key, "" if follows else str(drawn)), []).append(run)
    place = {run.path: k for k, run in enumerate(runs)}
    ordered = sorted(found.values(), key=lambda members: place[members[0].path])
    return [Group(*one_a_seed(members)) for members in ordered]


def one_a_seed(runs: Sequence[Run]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Return the first run of each seed, and the others.

    The same settings and seed may have been run in several folders, or evaluated at other steps.
    """
    first: dict[int, Run] = {}
    for run in runs:
        first.setdefault(int(run.result["seed"]), run)
    kept = tuple(first.values())
    return kept, tuple(run for run in runs if all(run is not one for one in kept))


def repeats(where: str, runs: Sequence[Run]) -> list[str]:
    """Return a line for each run whose seed another run with the same settings stands for."""
    return [
        f"{where}: {run.path} repeats seed {run.result['seed']} and is left out." for run in runs
    ]


def draw_their_rows(runs: Sequence[Run]) -> bool:
    """Return whether each of several seeds has the training rows that it draws itself."""
    seeds = {run.result["seed"] for run in runs}
    drawn = {(run.result["seed"], str(run.result.get("train_rows"))) for run in runs}
    own = all(run.config.get("data_seed") == run.result["seed"] for run in runs)
    return own and len(drawn) == len(seeds) > 1


def paired(ours: Floats, theirs: Floats, sizes: Sequence[int] = ()) -> tuple[float, float]:
    """Return the mean difference over rows and its standard error.

    Args:
        ours: by row, (n,).
        theirs: the same.
        sizes: rows of each part of a mixture, whose mean over the parts it then is.

    Raises:
        UserError: they are not of the same rows.
    """
    if len(ours) != len(theirs):
        raise UserError(f"outcomes of {len(ours)} and of {len(theirs)} test rows have no pairs.")
    difference = ours - theirs
    n = len(difference)
    if len(sizes) > 1 and sum(sizes) == n:
        found = [paired(part, part * 0) for part in np.split(difference, np.cumsum(sizes)[:-1])]
        errors = math.fsum(error**2 for _, error in found)
        return math.fsum(mean for mean, _ in found) / len(found), math.sqrt(errors) / len(found)
    error = float(difference.std()) / math.sqrt(n)
    return float(difference.mean()), error
