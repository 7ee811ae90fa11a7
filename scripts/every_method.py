#!/usr/bin/env python
"""Train by every method on the embedded job, alone and in ranks, and keep what came out.

    .venv/bin/python scripts/every_method.py FOLDER --json docs/results/every-method.json

Each runs `smezo train method=NAME steps=20 task.num_test=200`, each rank with one thread; what the
JSON file has is not run again, so that the whole can be made in pieces, and a complete file is only
printed. Printed: a Markdown table. FOLDER keeps the runs. The exit code is 1 if a run has failed.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from smezo_cli.cli.ls import parts
from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.files.atomic import write_text

WORDS = ("steps=20", "task.num_test=200")
#: kinds of methods that are compared with, and make no zeroth-order step
OTHERS = ("backpropagation", "untrained")


def main() -> int:
    """Run what the file lacks, and print the table."""
    given = arguments()
    kept = Kept(given.json)
    todo = [
        (method, ranks)
        for ranks in given.ranks
        for method in given.methods or methods()
        if kept.of(method, ranks) is None
    ]

    def work(item: tuple[str, int]) -> bool:
        found = run(*item, given.folder)
        if found is not None:
            kept.add(*item, found)
        print(*item, "failed" if found is None else found, file=sys.stderr, flush=True)
        return found is not None

    good = True
    for ranks in given.ranks:  # as many processes at once as there are cores
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // ranks)) as pool:
            good = all(list(pool.map(work, (one for one in todo if one[1] == ranks)))) and good
    print("\n".join(table(kept.found)))
    return 0 if good else 1


def arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of runs")
    parser.add_argument("--methods", nargs="+", choices=methods(), metavar="NAME")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, required=True, help="what came out")
    return parser.parse_args()


def methods() -> list[str]:
    """Return the names of all zeroth-order methods."""
    files = {file.stem: file for file in sorted((CONF_DIR / "method").glob("*.yaml"))}
    found = [
        name
        for title, names in parts("methods", files)
        if not any(title.startswith(f"methods, {kind}:") for kind in OTHERS)
        for name in names
    ]
    return sorted(found)


def run(method: str, ranks: int, folder: Path) -> dict[str, Any] | None:
    """Return what came out of a run; None if it failed. A run that is there is not made again."""
    name = f"{method}-{ranks}"
    words = [f"method={method}", *WORDS, f"name={name}"]
    launch = ["-m", "smezo_cli", "train"]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launch += ["-m", "smezo_cli.train"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, *launch, *words, f"runs_dir={folder / 'runs'}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    for file in (folder / "runs" / name).glob("*/result.json"):
        result = json.loads(file.read_text("utf-8"))
        if result["status"] == "done" and result["world_size"] == ranks:
            return of(result)
    return None


def of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a result.json."""
    (score,) = {result["metric"]} & set(result["test"])
    return {
        "score": result["test"][score],
        "loss": result["dev"]["best"]["loss"],
        "forwards": result["num_forwards"],
        "peak_bytes": result["peak_memory_bytes"],
        "executor": result["executor"],
        "commit": result["versions"]["commit"],
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


class Kept:
    """Hold what came out, by method and number of ranks, as a JSON file has it.

    Args:
        path: of the file; it is made when there is something to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.found = json.loads(path.read_text("utf-8"))

    def of(self, method: str, ranks: int) -> dict[str, Any] | None:
        """Return what came out of a run, None if it was not made."""
        return self.found.get(method, {}).get(str(ranks))

    def add(self, method: str, ranks: int, what: dict[str, Any]) -> None:
        """Write the file with one run more."""
        with self._lock:
            self.found.setdefault(method, {})[str(ranks)] = what
            write_text(self.path, json.dumps(self.found, indent=1, sort_keys=True) + "\n")


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a method a line, one process and two ranks."""
    yield "| method | forwards | dev loss, test score | peak GiB | two ranks: dev loss, score |"
    yield "|---|---|---|---|---|"
    for method, by_ranks in sorted(found.items()):
        one, two = by_ranks.get("1"), by_ranks.get("2")
        cells = [method, *((str(one["forwards"]), said(one)) if one else ("", ""))]
        cells.append(f"{one['peak_bytes'] / 2**30:.2f}" if one else "")
        yield "| " + " | ".join([*cells, said(two) if two else ""]) + " |"


def said(what: Mapping[str, Any]) -> str:
    """Return dev loss and test score as a cell has them."""
    return f"{what['loss']:.4f}, {what['score']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
