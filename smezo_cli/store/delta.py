"""Write and read deltas: a fine-tune as a file of kilobytes, the steps from its base model."""

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smezo_cli.files import strict_json
from smezo_cli.store.trajectory import (
    DELTA,
    MAX_BYTES,
    START,
    VERSION,
    Damaged,
    Trajectory,
    num_queries_of,
    opened,
    read_start,
    record_type,
)


def delta(trajectory: Trajectory, steps: int, about: Mapping[str, Any]) -> bytes:
    """Return the content of a delta of the first ``steps`` steps; ``about`` is plain JSON."""
    text = strict_json.dumps({"header": trajectory.header, "step": steps, **about}).encode()
    columns = np.ascontiguousarray(trajectory.columns(steps), "<f8")
    # Bytes of like significance lie together: those of equal learning rates then take no room.
    by_place = columns.view(np.uint8).reshape(len(columns), steps, 8).transpose(0, 2, 1)
    content = START.pack(DELTA, VERSION, len(text)) + text + zlib.compress(by_place.tobytes(), 9)
    return content + hashlib.sha256(content).digest()


def read_delta(path: Path) -> tuple[dict[str, Any], Trajectory]:
    """Return what a delta says about itself, and its steps (loss and seconds are 0).

    Raises:
        Damaged: it is not one, or not whole.
    """
    with opened(path) as file:
        about, _ = read_start(path, file, DELTA)
        file.seek(0)
        content = file.read(MAX_BYTES + 1)
    damaged = Damaged(f"{path} is damaged: get it anew.")
    if len(content) > MAX_BYTES or hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise damaged
    header, steps = about.get("header"), about.get("step")
    if not isinstance(header, dict) or type(steps) is not int or steps < 0:
        raise damaged
    kind = record_type(num_queries_of(path, header))
    columns = 1 + kind["projected_grad"].shape[0]
    size = columns * steps * 8
    if size > MAX_BYTES:
        raise damaged
    packed = content[START.size + START.unpack(content[: START.size])[2] : -32]
    unpack = zlib.decompressobj()
    try:
        found = unpack.decompress(packed, size + 1)
    except zlib.error as error:
        raise damaged from error
    if len(found) != size or (steps and not unpack.eof):
        raise damaged
    by_place = np.frombuffer(found, np.uint8).reshape(columns, 8, steps).transpose(0, 2, 1)
    numbers = np.ascontiguousarray(by_place).view("<f8").reshape(columns, steps)
    if not np.isfinite(numbers).all():
        raise damaged
    records = np.zeros(steps, kind)
    records["step"], records["lr"] = np.arange(steps), numbers[0]
    records["projected_grad"] = numbers[1:].T
    return about, Trajectory(header, records, None)


def is_delta(path: Path) -> bool:
    """Return whether a file begins as a delta does."""
    if not path.is_file():
        return False
    with opened(path) as file:
        found: bytes = file.read(len(DELTA))
    return found == DELTA
