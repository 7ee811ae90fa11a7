"""Write and read the mask of a run: which entries of each tensor are trained, as safetensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.files.bounded import check_ordinary
from smezo_cli.store.saved import Saved, save_tensors
from smezo_cli.zo.selections.named import check_places

NAME = "mask.safetensors"

_MOST_HEADER = 1 << 24  # bytes; tensors of a model have some hundred bytes there


@dataclass(frozen=True)
class Model:
    """Name the model that a mask is of.

    Attributes:
        shapes: of the tensors that may be trained, by name.
        dtype: of its weights.
        fingerprint: of the model as it came; weights of another dtype have another one.
    """

    shapes: Mapping[str, Sequence[int]]
    dtype: str
    fingerprint: str


def write(path: Path, index: Mapping[str, Tensor], model: Model) -> None:
    """Replace the mask of a run as a whole; places are held in four bytes where that is enough.

    Raises:
        UserError: there is no room, or it cannot be written.
    """
    few = all(_numel(model.shapes[name]) < 1 << 31 for name in index)
    held = {name: places.to(torch.int32 if few else torch.int64) for name, places in index.items()}
    about = {
        "shapes": {name: list(model.shapes[name]) for name in index},
        "dtype": model.dtype,
        "model": model.fingerprint,
    }
    save_tensors(path, held, about)


def read(path: Path, model: Model) -> dict[str, Tensor]:
    """Return the mask in a file of any origin: int64, sorted, by the name of the tensor.

    Raises:
        UserError: the file is missing, damaged, larger than any mask of the model, or of another
            model.
    """
    most = 8 * sum(map(_numel, model.shapes.values())) + _MOST_HEADER
    try:
        size = check_ordinary(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if size > most:
        raise UserError(
            f"{path} has {size} bytes, and a mask of this model has {most} at most: give the mask "
            "of a run of this model."
        )
    damaged = UserError(f"{path} is damaged, or no mask: give the mask.safetensors of a run.")
    try:
        saved = Saved(path)
        shapes, of = saved.about.get("shapes"), saved.about.get("model")
        if not isinstance(shapes, dict) or shapes.keys() != saved.keys() or not saved.is_whole():
            raise damaged
    except (UserError, ValueError, TypeError, RuntimeError) as error:
        raise damaged from error
    is_other = of != model.fingerprint and saved.about.get("dtype") == model.dtype
    for name, shape in shapes.items():
        if is_other or name not in model.shapes or shape != list(model.shapes[name]):
            what = "has other weights" if is_other else f"has no {name} of shape {shape} to train"
            raise UserError(
                f"{path} is the mask of another model, as this one {what}: give the mask of a run "
                "of this model."
            )
    index = {}
    for name in saved:
        try:
            check_places(name, saved[name], _numel(model.shapes[name]))
        except ValueError as error:
            raise damaged from error
        index[name] = saved[name].to(torch.int64)
    if not index:
        raise damaged
    return index


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
