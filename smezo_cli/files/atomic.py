"""Write files whole or not at all."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from smezo_cli.errors import UserError

_ABANDONED_S = 3600.0  # a file that is being written is not left alone for so long


@contextlib.contextmanager
def replacing(path: Path, is_shared: bool = False) -> Iterator[Path]:
    """Yield a name to write to; at the end the file is put on disk and takes the place of ``path``.

    Args:
        path: of the file.
        is_shared: other processes may be writing the same file, in a folder of such files alone;
            what killed ones have left there is removed once it is an hour old.

    Raises:
        UserError: it cannot be written.
    """
    own = f".{os.getpid()}" if is_shared else ""
    partial = path.with_name(f".{path.name}{own}.partial")
    try:
        if is_shared:
            _remove_abandoned(path.parent)
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


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):  # another process has just removed it
            if time.time() - left.lstat().st_mtime > _ABANDONED_S:
                left.unlink()


def write_text(path: Path, text: str, is_shared: bool = False) -> None:
    """Replace a text file as a whole; `is_shared` as in :func:`replacing`."""
    with replacing(path, is_shared) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    with replacing(path) as partial:
        partial.write_bytes(content)
