#!/usr/bin/env python
"""Race to a dev loss: seconds of training that MeZO as its paper says needs, and that smezo needs.

    .venv/bin/python scripts/race.py FOLDER --seeds 0 1 2 --json race.json

The goal of a seed is the lowest dev loss that textbook MeZO (in place, a forward a candidate, all
logits) comes to in 200 steps of the embedded job. Its lr is the best of three (the lowest dev loss,
first seed), tried with `smezo train method=mezo`: the same steps along other draws, in less time.
Beside it run that MeZO, Sparse-MeZO on all blocks, and `smezo train` as it is; all under the
task's first prompt. The textbook's steps are made in quarters, and after each but the last one
of the others runs whole, so that all share what the machine does. Dev evaluations are not counted.

Broken off and started again, it goes on; a seed that the JSON file has is not run again, so that
seeds can be run one a day. Printed: a Markdown table. FOLDER keeps runs and weights.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from race.curve import Curve, Mark, lowest, of_metrics, reached, read, write
from race.textbook import TextbookRacer

from smezo_cli.run.console import Console
from smezo_cli.store import versions

QUARTERS = 4
_TEST_ROWS = 16  # nothing is read off them
#: words of the others, by name
RACERS: Mapping[str, Sequence[str]] = {
    "MeZO": ["method=mezo", "lr_schedule=constant"],
    "Sparse-MeZO, all blocks": [
        "method=sparse_mezo",
        "steps=100",
        "batch_order=stratified",
        "lr=3e-4",
        "lr_schedule=constant",
        "eps=1e-3",
        "sparsity=0.75",
        "method.freeze=['*embed_tokens*','*norm*']",
        "keep_inputs=false",
    ],
    "the default recipe": [],
}


def main() -> int:
    """Race as the command line says, and print."""
    given = arguments()
    kept = given.json or given.folder / "race.json"
    race = Race(given)
    if kept.is_file():
        race.read(json.loads(kept.read_text("utf-8")), kept)
    if race.lr is None:
        race.search(given.seeds[0])
        write(kept, race.found())
    for seed in given.seeds:
        if seed not in race.curves:
            race.heat(seed)
            write(kept, race.found())
    print("\n".join(table(race.found())))
    return 0


def arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of runs and weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of the textbook")
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-5, 1e-4, 3e-4])
    parser.add_argument("--eval-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--word", action="append", default=[], help="of every run, as task=toy")
    parser.add_argument("--json", type=Path, help="what was found, curves and all")
    given = parser.parse_args()
    if given.steps % (QUARTERS * given.eval_every):
        parser.error(f"--steps: {given.steps} is no multiple of {QUARTERS} x --eval-every")
    return given


class Race:
    """Run the heats of a race, a seed each.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.words = ["device=cpu", "task.prompt=0", *given.word]
        self.asked = {
            "steps": given.steps,
            "eval_every": given.eval_every,
            "lrs": given.lrs,
            "words": self.words,
            "racers": {name: list(words) for name, words in RACERS.items()},
        }
        self.lr: float | None = None  # the best, once it is known
        self.tried: dict[str, Curve] = {}
        self.curves: dict[int, dict[str, Curve]] = {}
        self.made_by: dict[int, dict[str, Any]] = {}  # versions and machine, by seed

    @functools.cached_property
    def textbook(self) -> TextbookRacer:
        """Return what makes the textbook's steps; it loads model and data."""
        return TextbookRacer(self.words, Console())

    def read(self, found: Mapping[str, Any], path: Path) -> None:
        """Take the heats of a race that was run before.

        Raises:
            SystemExit: they were of another race.
        """
        if differing := [key for key, value in self.asked.items() if found["asked"][key] != value]:
            raise SystemExit(
                f"race: {path} is of a race with other {' and '.join(differing)}: give another one."
            )
        self.lr = found["lr"]
        self.tried = {name: read(marks) for name, marks in found["tried"].items()}
        for seed, curves in found["curves"].items():
            self.curves[int(seed)] = {name: read(marks) for name, marks in curves.items()}
            self.made_by[int(seed)] = found["made_by"][seed]

    def search(self, seed: int) -> None:
        """Find the best lr."""
        tried = {lr: self._mezo(seed, lr, "search") for lr in self.given.lrs}
        self.lr = min(tried, key=lambda lr: lowest(tried[lr]).loss)
        self.tried = {f"MeZO, lr {lr:g}": curve for lr, curve in tried.items()}

    def heat(self, seed: int) -> None:
        """Let the textbook and the others run in turns."""
        assert self.lr is not None
        racers = list(RACERS)
        curves: dict[str, Curve] = {}
        for quarter in range(QUARTERS):
            curves["textbook MeZO"] = self.textbook.run(
                self.given.folder / f"textbook-s{seed}-lr{self.lr:g}",
                lr=self.lr,
                seed=seed,
                steps=self.given.steps * (quarter + 1) // QUARTERS,
                eval_every=self.given.eval_every,
            )
            for name in racers[quarter : quarter + 1]:
                mezo = name == "MeZO"
                curves[name] = (
                    self._mezo(seed, self.lr, name) if mezo else self._ours(name, seed, name)
                )
        self.made_by[seed] = versions.versions() | {
            "processor": torch.backends.cpu.get_cpu_capability()
        }
        self.curves[seed] = curves

    def _mezo(self, seed: int, lr: float, group: str) -> Curve:
        """Return the curve of smezo's MeZO with the textbook's settings."""
        words = [f"lr={lr:g}", f"steps={self.given.steps}"]
        return self._ours("MeZO", seed, f"{group} {lr:g}", *words)

    def _ours(self, racer: str, seed: int, name: str, *more: str) -> Curve:
        """Return the curve of a run of smezo; one that is finished is not made again."""
        place = self.given.folder / "runs"
        own = "".join(c if c.isalnum() else "_" for c in name)
        every = f"eval_every={self.given.eval_every}"
        words = [f"runs_dir={place}", f"name={own}", f"seed={seed}", "zero_shot=false", every]
        words += [f"task.num_test={_TEST_ROWS}"]
        words = [*RACERS[racer], *words, *self.words, *more]
        subprocess.run([sys.executable, "-m", "smezo_cli", "train", *words], check=True)
        (log,) = (place / own).glob(f"*-s{seed}-*/metrics.jsonl")
        return of_metrics(map(json.loads, log.read_text("utf-8").splitlines()))

    def found(self) -> dict[str, Any]:
        """Return what was found so far, as plain JSON but for the marks."""
        goals = {seed: lowest(curves["textbook MeZO"]) for seed, curves in self.curves.items()}
        return {
            "asked": self.asked,
            "made_by": self.made_by,
            "lr": self.lr,
            "tried": self.tried,
            "goals": goals,
            "reached": {
                seed: {name: reached(curve, goals[seed].loss) for name, curve in curves.items()}
                for seed, curves in self.curves.items()
            },
            "curves": self.curves,
        }


def table(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table: seconds to the goal, and how many times fewer."""
    by_seed: Mapping[int, Mapping[str, Mark | None]] = found["reached"]
    lines = [
        "| | " + " | ".join(f"seed {seed}: steps, seconds" for seed in by_seed) + " | times |",
        "|---|" + "---|" * (len(by_seed) + 1),
    ]
    for name in ("textbook MeZO", *RACERS):
        marks = {seed: marks[name] for seed, marks in by_seed.items()}
        cells = [
            "not reached" if mark is None else f"{mark.step}, {mark.seconds:.0f}"
            for mark in marks.values()
        ]
        ratios = [
            found["goals"][seed].seconds / mark.seconds for seed, mark in marks.items() if mark
        ]
        mean = f"{statistics.mean(ratios):.1f}" if len(ratios) == len(marks) else ""
        if mean and len(ratios) > 1:
            mean += f" ({min(ratios):.1f} to {max(ratios):.1f})"
        lines.append("| " + " | ".join([name, *cells, mean]) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
