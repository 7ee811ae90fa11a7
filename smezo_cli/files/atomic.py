"""Write files whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from smezo_cli.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to; at the end the file is put on disk and takes the place of ``path``.

    Raises:
        UserError: it cannot be written.
    """
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
