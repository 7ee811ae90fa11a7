"""Keep what enters the first trained block in the cache folder, for runs that would compute it too.

    CACHE/inputs/DIGEST/BATCH.safetensors

DIGEST is over everything that the states follow from beside their tokens: the weights before the
block, the configuration of the model, what the machine computes with, and versions. BATCH is over
the tokens of all sequences that were computed together. A file has a SHA-256 of its tensors; one
that is damaged is computed and written anew.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.store.saved import Saved, save_tensors

#: bytes of all such files; a run that begins removes those beyond, used longest ago first
MOST_BYTES = 8_000_000_000


class InputCache:
    """Look up and store tensors by what they follow from.

    Args:
        folder: of all runs; it is made when the first file is written.
        about: plain JSON: what the tensors follow from, beside their key.
        say: receives a line where nothing more can be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], say: Callable[[str], None]) -> None:
        text = json.dumps(about, sort_keys=True)
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._say = say
        self._is_full = False

    def get(self, key: Sequence[Any]) -> list[Tensor] | None:
        """Return the tensors of a key, on the CPU; None if they are not there or damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            saved = Saved(path)
            if not saved.is_whole():
                return None
            found = [saved[str(i)] for i in range(len(saved))]
        except (UserError, KeyError):
            return None  # damaged, or another run has just removed it
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return found

    def put(self, key: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """Store the tensors of a key; where that fails once, say so and store no more."""
        if self._is_full:
            return
        path = self._path(key)
        # Another run may be writing the same file.
        partial = path.with_name(f"{path.stem}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(partial, {str(i): t.cpu() for i, t in enumerate(tensors)})
            os.replace(partial, path)
        except (OSError, UserError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._is_full = True
            self._say(f"  kept    no more in the cache, for other runs: {error}")

    def _path(self, key: Sequence[Any]) -> Path:
        text = json.dumps(key, separators=(",", ":"))
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._folder / f"{name}.safetensors"


def remove_oldest(folder: Path, most: int = MOST_BYTES) -> int:
    """Remove files used longest ago until all take at most so many bytes; return bytes removed."""
    files = list[tuple[float, int, Path]]()
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # another run has just removed it
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    before = total
    for _, size, path in sorted(files):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
    return before - total
