"""Find the versions of libraries and the commit that a run is made with."""

import contextlib
import functools
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from smezo_cli import __version__
from smezo_cli.zo.step import NUMERICS


@functools.cache
def _libraries() -> dict[str, Any]:
    found: dict[str, Any] = {"smezo": __version__, "numerics": NUMERICS}
    found["python"] = platform.python_version()
    for package in ("torch", "transformers", "datasets", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def libraries() -> dict[str, Any]:
    """Return the versions of what computes."""
    return dict(_libraries())


def versions() -> dict[str, Any]:
    """Return versions, commit and machine, for result.json."""
    return libraries() | {
        "commit": _commit(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }


@functools.cache  # a process that makes several runs has the code of its first one
def _commit() -> str | None:
    """Return the commit of a checkout, with "+" if files differ; None for an installed package."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
