"""Check that a disk has room for what is about to be written."""

import shutil
from pathlib import Path

from smezo_cli.errors import UserError

_SPARE_BYTES = 16_000_000  # for the small files that are written beside


def check_space(
    folder: Path,
    needed_bytes: int,
    what: str = "a checkpoint",
    way_out: str = "choose another disk with runs_dir=PATH",
) -> None:
    """Raise UserError unless the disk of a folder has room for so many bytes, and a few more.

    Args:
        folder: one that is there.
        needed_bytes: to be written.
        what: needs them, for the message.
        way_out: what the user may do but make room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise UserError(
            f"{folder} has {_in_words(free)} free, and {what} needs {_in_words(needed_bytes)} and "
            f"{_in_words(_SPARE_BYTES)} to spare: make room, or {way_out}."
        )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
