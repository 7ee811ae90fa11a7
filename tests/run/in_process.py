"""Make runs in the process of the test, and read what they said."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from smezo_cli import train
from smezo_cli.config.compose import compose
from tests.run.tiny_runs import run_folder


def finished(words: Sequence[str], place: Path) -> Path:
    """Make a run below a place, and return its folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(compose([*words, f"runs_dir={place / 'runs'}"]))
    return run_folder(place)


def said(folder: Path) -> str:
    """Return all that a run has said."""
    return (folder / "console.log").read_text(encoding="utf-8")
