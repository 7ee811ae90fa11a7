"""Parse the flags of the verbs, and check and write the files that they name."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from smezo_cli.errors import UserError
from smezo_cli.files import strict_json
from smezo_cli.files.atomic import write_text


class Flags(argparse.ArgumentParser):
    """Parse the flags of a verb; a mistake becomes a UserError."""

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"smezo {verb}", add_help=False, allow_abbrev=False)
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; smezo {self.verb} --help shows the flags.")


def shows_help(words: Sequence[str], usage: str) -> bool:
    """Print the usage of a verb if the words ask for it; return whether they did."""
    asked = "--help" in words or "-h" in words
    if asked:
        print(usage, end="")
    return asked


def check_out(flag: str, out: str | None, example: str) -> None:
    """Check, before the work, that a file can be written after it.

    Args:
        flag: that names the file.
        out: the file; None: there is none to write.
        example: a name for it.

    Raises:
        UserError: it is a folder or a device, or its folder is not there or cannot be written to.
    """
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise UserError(f"{flag} {out} is a folder: give a file, such as {path / example}.")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {out}: there is no folder {path.parent}; make it first.")
    # A file is replaced as a whole, which would make a device an ordinary file.
    place = path.parent.resolve()
    of_devices = any(place.is_relative_to(folder) for folder in ("/dev", "/proc", "/sys"))
    of_devices &= not place.is_relative_to("/dev/shm")
    if of_devices or (path.exists() and not path.is_file()):
        raise UserError(f"{flag} {out} is no ordinary file: give a file, such as {example}.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {out}: the folder {path.parent} cannot be written to.")


def write_lines(path: Path, records: Iterator[dict[str, Any]] | Any) -> None:
    """Replace a JSONL file as a whole."""
    lines = [strict_json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))
