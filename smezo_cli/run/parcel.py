"""Send a file of the run folder from rank 0 to the other ranks, which have no folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.run.ranks import Ranks

_PIECE = 1 << 24  # bytes: a rank holds few of them at a time


def send(team: Ranks, path: Path, do: str, **about: Any) -> None:
    """Send a file piece by piece, then a command that uses it; see :meth:`Ranks.tell`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                team.tell("piece", piece, name=path.name)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    team.tell(do, **about)


class Parcel:
    """Hold the file that rank 0 sends, in a temporary folder until it is used."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, name: str, piece: bytes) -> None:
        """Take the next piece of the file of this name.

        Raises:
            UserError: there is no room for it.
        """
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="smezo-")
            with (Path(self._folder.name) / Path(name).name).open("ab") as file:
                file.write(piece)
        except OSError as error:
            raise UserError(
                f"{name} of rank 0 cannot be kept in {tempfile.gettempdir()} "
                f"({error.strerror or error}): name a folder with room for it by TMPDIR=PATH."
            ) from error

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Give the folder of the file, which is removed at the end of the context."""
        assert self._folder is not None  # a command that uses a file follows its pieces
        with self._folder as path:
            self._folder = None
            yield Path(path)
