"""Save tensors as safetensors, and read them back without a second copy, checked by digest."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.files import bounded, strict_json
from smezo_cli.files.atomic import replacing
from smezo_cli.files.space import check_space
from smezo_cli.machine.waiting import waiting


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> str:
    """Replace a safetensors file as a whole; return the digest of what is in it.

    Raises:
        UserError: there is no room, or it cannot be written.
    """
    content = {name: t.detach().contiguous() for name, t in tensors.items()}
    needed = sum(t.numel() * t.element_size() for t in content.values())
    check_space(path.parent, needed)
    digest = tensors_digest(content)
    words = strict_json.dumps({"sha256": digest, **(about or {})})
    with replacing(path) as partial:
        save_file(content, partial, {"smezo": words})
    return digest


_PIECE = 1 << 22  # entries of a saved tensor that are read at a time


class Saved(Mapping[str, Tensor]):
    """Read a safetensors file. Each tensor is mapped on its own, so that no two lie in memory.

    Attributes:
        about: what was saved beside the tensors: their digest, the method's numbers.

    Raises:
        UserError: the file is missing or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            self._names: list[str] = list(file.keys())
            try:
                about = json.loads((file.metadata() or {}).get("smezo", "{}"))
            except (ValueError, RecursionError):
                about = {}
        self.about: dict[str, Any] = about if isinstance(about, dict) else {}

    def is_whole(self) -> bool:
        """Return whether the tensors are those that were saved."""
        return self.about.get("sha256") == tensors_digest(self)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            bounded.check_ordinary(self._path)
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._path} cannot be read ({error}); start this run over with if_exists=fresh."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def in_pieces(self, name: str) -> tuple[torch.dtype, Sequence[int], Iterator[Tensor]]:
        """Return dtype, shape and rows of a tensor, some at a time: mapped pages take memory."""
        with self._open() as file:
            shape: list[int] = file.get_slice(name).get_shape()
        if not shape or 0 in shape:
            return self[name].dtype, shape, iter([self[name]])
        rows = max(1, _PIECE // math.prod(shape[1:]))

        def pieces() -> Iterator[Tensor]:
            for start in range(0, shape[0], rows):
                with self._open() as file:
                    yield file.get_slice(name)[start : start + rows]

        return next(pieces()).dtype, shape, pieces()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, sorted by name; one copy at a time."""
    digest = hashlib.sha256()
    with waiting("hashing the weights", len(tensors)) as tick:
        for name in sorted(tensors):
            dtype, shape, pieces = _in_pieces(tensors, name)
            digest.update(f"{name} {dtype} {tuple(shape)}\n".encode())
            for piece in pieces:
                flat = piece.contiguous().view(-1).cpu()
                digest.update(flat.view(torch.uint8).numpy().data)
            tick(1)
    return digest.hexdigest()


def _in_pieces(
    tensors: Mapping[str, Tensor], name: str
) -> tuple[torch.dtype, Sequence[int], Iterator[Tensor]]:
    """Return dtype, shape and contents of a tensor; those of a file some rows at a time."""
    if not isinstance(tensors, Saved):
        tensor = tensors[name].detach()
        return tensor.dtype, tensor.shape, iter([tensor])
    return tensors.in_pieces(name)
