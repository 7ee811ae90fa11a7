#!/usr/bin/env python
"""Solve a partial differential equation by a tensor-train network without backpropagation.

    .venv/bin/python scripts/pinn.py --problem heat --seeds 0 1 2 --svg heat.svg

Derivatives of the network come from its values at points nearby, and its weights are trained by the
library's zeroth-order steps (smezo_cli.zo). docs/results/pinn.md says what is solved and how
well. Printed, as a Markdown table: the relative l2 error to the exact solution. One thread.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pinn.problems import PROBLEMS
from pinn.settings import NETWORKS, recipe
from pinn.training import DERIVATIVES, OPTIMIZERS, Trained, train


def main() -> int:
    """Train as the command line says, and print."""
    given = arguments()
    torch.set_num_threads(1)  # tensors are small
    changed = {key: value for key in CHANGEABLE if (value := getattr(given, key)) is not None}
    groups: dict[str, list[Trained]] = {}
    heads = "problem", "network", "weights", "derivatives", "optimizer"
    print(row(*heads, "steps", "losses", "error", "seconds"))
    print(row(*["---"] * 9))
    for names in itertools.product(
        given.problem, given.network, given.derivatives, given.optimizer
    ):
        settings = replace(recipe(*names), **changed)
        group = [train(replace(settings, seed=seed)) for seed in given.seeds]
        groups[", ".join(names)] = group
        print(line(group), flush=True)
    if given.json is not None:
        found = [record(trained) for group in groups.values() for trained in group]
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.svg is not None:
        from pinn.picture import draw

        draw(groups, given.svg)
    return 0


CHANGEABLE = {"steps": int, "queries": int, "lr": float, "eps": float, "width": float, "rank": int}


def arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, choices, default in (
        ("problem", PROBLEMS, [*PROBLEMS]),
        ("network", NETWORKS, ["tt"]),
        ("derivatives", DERIVATIVES, ["stein"]),
        ("optimizer", OPTIMIZERS, ["sign"]),
    ):
        words = f"of {', '.join(choices)}; {' '.join(default)} if left out"
        parser.add_argument(
            f"--{name}", nargs="+", choices=[*choices], default=default, help=words, metavar="NAME"
        )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="one training each"
    )
    for name, kind in CHANGEABLE.items():
        parser.add_argument(
            f"--{name}", type=above_0(kind), metavar="X", help="in place of the recipe's"
        )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write errors along the trainings"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw; needs matplotlib")
    given = parser.parse_args()
    if given.svg is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--svg draws with matplotlib, which is not installed: pip install matplotlib")
    for file in filter(None, (given.json, given.svg)):  # before the trainings, not after them
        if not file.parent.is_dir():
            parser.error(f"{file}: there is no folder {file.parent}")
    return given


def above_0(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return a reader of numbers above 0."""

    def read(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{word} is not a {whole}number above 0")
        return value

    return read


def line(group: Sequence[Trained]) -> str:
    """Return the row of a table for trainings that differ in the seed alone."""
    s, first = group[0].settings, group[0]
    errors = [trained.error for trained in group if math.isfinite(trained.error)]
    error = f"{statistics.mean(errors):.4f}" if errors else ""
    if len(errors) > 1:
        error += f" ± {statistics.stdev(errors):.4f} (n = {len(errors)})"
    if diverged := len(group) - len(errors):
        error += f" diverged: {diverged} of {len(group)}; take a smaller --lr"
    seconds = statistics.mean(trained.seconds for trained in group)
    names = s.problem, s.network, first.num_weights, s.derivatives, s.optimizer
    return row(*names, s.steps, first.forwards, error, f"{seconds:.0f}")


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def record(trained: Trained) -> dict[str, Any]:
    """Return a training as JSON has it."""
    return {
        **asdict(trained.settings),
        "num_weights": trained.num_weights,
        "losses": trained.forwards,
        "seconds": round(trained.seconds, 1),
        "errors": [(n, e if math.isfinite(e) else None) for n, e in trained.errors],
    }


if __name__ == "__main__":
    sys.exit(main())
