"""Parse the flags of the verbs, and check and write the files that they name."""

import argparse
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


def check_out(out: str | None) -> None:
    """Raise UserError if predictions could not be written to this file after the work."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out {out} is a folder: give the file for the predictions.")
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.parent}; make it first.")


def write_lines(path: Path, records: Iterator[dict[str, Any]] | Any) -> None:
    """Replace a JSONL file as a whole."""
    lines = [strict_json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))
