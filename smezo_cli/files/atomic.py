"""Write files whole or not at all, and check first that the disk has room for them."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from smezo_cli.errors import UserError


def check_space(folder: Path, needed_bytes: int) -> None:
    """Is there room for so many bytes (and a little more)?

    Raises:
        UserError: there is not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + (1 << 24):
        raise UserError(
            f"runs_dir: {folder} has {free / 1e9:.2f} GB free and {needed_bytes / 1e9:.2f} GB are "
            "needed; make room, or choose another disk with runs_dir=PATH."
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to that takes the place of ``path`` at the end, on disk before it does."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if os.path.lexists(partial):
            partial.unlink()  # of a killed run, or a link to elsewhere
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk gives here
        with contextlib.suppress(OSError):  # a system that became read-only
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}.") from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    with replacing(path) as partial:
        partial.write_bytes(content)
