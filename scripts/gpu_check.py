#!/usr/bin/env python
"""Check smezo on a GPU within five minutes: bits, self-check, steps, memory, executors, nccl.

    python scripts/gpu_check.py --json gpu.json
    python scripts/gpu_check.py --device cpu --tiny        (seconds; what the tests run)

From a checkout, without an installation, a network or weights: models are random, built from the
numbers in conf/model. It needs torch, transformers, numba and, for fused passes, triton. A row for
each finding; exit code 1 if one fails. docs/guide/gpu.md says what is checked.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # smezo_cli need not be installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from gpu_check import bits, collective, executors, steps
from gpu_check.rows import FAIL, SKIP, Check, Place, Row, skipped, timed, write

ROOT = Path(__file__).resolve().parents[1]
#: seconds that a check may take; it ends the case under way
BUDGETS = {
    "bits": 90,
    "self-check": 30,
    "steps: opt-1.3b": 35,
    "steps: llama-7b": 60,
    "executors": 35,
    "all_reduce": 20,
}
ALL_SECONDS = 290  # of all together, the imports before them left out
LEAST = 10  # seconds left, without which no check begins


def checks(tiny: bool) -> dict[str, Check]:
    """Return the checks by the names of their budgets."""
    opt, llama = ("tiny-opt", "tiny-llama") if tiny else ("opt-1.3b", "llama-7b")
    return {
        "bits": bits.check,
        "self-check": steps.self_check,
        "steps: opt-1.3b": partial(steps.check, opt),
        "steps: llama-7b": partial(steps.check, llama),
        "executors": executors.check,
        "all_reduce": collective.check,
    }


def main() -> int:
    """Run the checks as the command line says; return 1 if one failed, else 0."""
    given = arguments()
    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    warnings.simplefilter("ignore")  # of libraries; the table is what is read
    found: list[Row] = []
    facts = about(device, given.tiny)
    print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    for row in run(device, given.tiny, given.only, given.seconds):
        found.append(row)
        print(row.line(), flush=True)
        if given.json is not None:  # now: a command that is stopped leaves what it found
            write(given.json, {**facts, "command": sys.argv[1:]}, found)
    failed = sum(row.status == FAIL for row in found)
    skips = sum(row.status == SKIP for row in found)
    spent = sum(row.seconds for row in found)
    passed = len(found) - failed - skips
    print(f"{passed} passed, {failed} failed, {skips} skipped in {spent:.0f} s")
    return 1 if failed else 0


def run(device: torch.device, tiny: bool, only: list[str], seconds: float) -> Iterator[Row]:
    """Yield the rows of all checks, or of those whose names begin with a word of `only`."""
    end = time.monotonic() + seconds
    for name, check in checks(tiny).items():
        if only and not name.startswith(tuple(only)):
            continue
        now = time.monotonic()
        if end - now < LEAST:
            yield skipped(name, "no time is left")
            continue
        place = Place(device, tiny, min(end, now + BUDGETS[name]))
        yield from timed(name, check, place)


def about(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Return where this runs: the device and the versions."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    found: dict[str, Any] = {"device": f"{device} ({name})", "tiny": tiny, "commit": commit()}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "transformers", "numba"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Return the commit of this checkout; None where git does not know it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    has_cuda = torch.cuda.is_available()
    parser.add_argument(
        "--device", default="cuda", metavar="NAME", help="cuda (the default), cuda:N or cpu"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, and no bounds of time")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help=f"of {', '.join(BUDGETS)}"
    )
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    given = parser.parse_args()
    kind, _, number = given.device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        parser.error(f"--device {given.device}: one of cuda, cuda:N, cpu")
    if kind == "cuda" and not has_cuda:
        parser.error("torch sees no CUDA device here: --device cpu --tiny runs the same checks")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        parser.error(f"--device {given.device}: there are {torch.cuda.device_count()} devices")
    if kind == "cpu" and not given.tiny:
        parser.error("--device cpu takes hours with models of full size: add --tiny")
    if not all(any(name.startswith(word) for name in BUDGETS) for word in given.only):
        parser.error(f"--only {' '.join(given.only)}: beginnings of {', '.join(BUDGETS)}")
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.parent}")
    return given


if __name__ == "__main__":
    sys.exit(main())
