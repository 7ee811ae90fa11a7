"""Record and replay the trajectory of a zeroth-order run: its steps in a few bytes each.

The noise, the masks and the rounding of a step are functions of (seed, step, query, tensor name)
alone (:mod:`smezo_cli.zo.noise`), so seed and step number are the keys, and a step is its learning
rate and its projected gradients. The base model and this file give the weights of every step again
without a forward: :meth:`smezo_cli.zo.optimizer.ZeroOrder.replay`.

``trajectory.bin``, little-endian, is only ever appended to::

    "SMEZOTRJ"  version u32  length u32  header, JSON of that length  crc u32 of all before
    step u32  lr f64  loss f64  seconds f32  projected_grad f64 a query  crc u32          (repeated)

A record's CRC-32 goes on from that of the record before it, so a record that is changed, missing,
repeated or moved ends the good part of the file. 36 bytes a step with one query.

A delta (``smezo export RUN FILE --delta``) is the same for other users: a JSON of the header, the
settings, the prompt, the metrics and the digest of the weights, then lr and projected gradients
alone, compressed, and a SHA-256 of all of it::

    "SMEZODLT"  version u32  length u32  JSON  zlib of the columns' bytes by significance  sha256
"""

import contextlib
import errno
import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from smezo_cli.errors import UserError
from smezo_cli.files import bounded, strict_json
from smezo_cli.machine.waiting import waiting
from smezo_cli.zo.step import StepRecord

_RUN, DELTA, VERSION = b"SMEZOTRJ", b"SMEZODLT", 1
START = struct.Struct("<8sII")
_CRC = struct.Struct("<I")
# A file may be anybody's: what is read of it, and what is made of that, is bounded.
MAX_BYTES = 1 << 26
_MAX_JSON = 1 << 20
_MAX_QUERIES = 1 << 12


class Damaged(UserError):
    """Say that a file is not, or no longer, what it should be."""


@runtime_checkable
class Replayable(Protocol):
    """Describe a method whose steps can be replayed, such as ``zo.optimizer.ZeroOrder``."""

    num_steps: int
    param_groups: list[dict[str, Any]]

    @property
    def num_scalars(self) -> int:
        """Return how many scalars a step records."""

    def identity(self) -> dict[str, Any]:
        """Return what its updates follow from, besides the base model and the records."""

    def replay(self, lr: float, scalars: Sequence[float]) -> None:
        """Apply a step that was made before."""

    def record(self, loss: float, scalars: Sequence[float], step: int) -> StepRecord:
        """Return what a step told of itself."""


@dataclass(frozen=True)
class Step:
    """Hold what was applied in a step (from 0), and what metrics.jsonl says of it."""

    step: int
    lr: float
    loss: float
    seconds: float
    scalars: tuple[float, ...]


class Trajectory:
    """Hold the header and the good part of the records of a file.

    Attributes:
        header: what the steps belong to: "identity" (of the method), "model", and of a run
            "config" and "rows".
        damage: where the good part ends and why, None where that is the end of the file.
    """

    def __init__(self, header: dict[str, Any], records: npt.NDArray[Any], damage: str | None):
        self.header, self.damage = header, damage
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, step: int) -> Step:
        found = self._records[step]
        number, lr, loss, seconds = (found[k].item() for k in ("step", "lr", "loss", "seconds"))
        return Step(number, lr, loss, seconds, tuple(found["projected_grad"].tolist()))

    def columns(self, steps: int) -> npt.NDArray[np.float64]:
        """Return learning rates and projected gradients of steps, (1 + queries, steps)."""
        some = self._records[:steps]
        return np.concatenate([some["lr"][None], some["projected_grad"].T])


def replay(method: Replayable, trajectory: Trajectory, step: int) -> None:
    """Apply the recorded steps from where the method is up to ``step``."""
    with waiting("applying steps", max(0, step - method.num_steps)) as tick:
        while method.num_steps < step:
            made = trajectory[method.num_steps]
            method.replay(made.lr, made.scalars)
            tick(1)


def differences(header: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of what two headers disagree in."""
    flat = [{**h, **h.get("identity", {})} for h in (header, other)]
    names = flat[1].keys() - {"identity"}
    found = sorted(name for name in names if flat[0].get(name) != flat[1].get(name))
    return found + (["header"] if flat[0].keys() - flat[1].keys() - {"identity"} else [])


# --- reading -----------------------------------------------------------------------------------


def read(path: Path) -> Trajectory:
    """Return the trajectory of a run up to the first damage, if there is any.

    Raises:
        Damaged: the file is missing, or its header is not good.
    """
    with opened(path) as file:
        header, crc = read_start(path, file, _RUN)
        kind = record_type(num_queries_of(path, header))
        stored = _CRC.unpack(_exactly(path, file, _CRC.size))[0]
        if stored != crc:
            raise Damaged(f"{path} is damaged in its header.")
        content = file.read(MAX_BYTES)
    size = kind.itemsize
    whole, rest = divmod(len(content), size)
    records = np.frombuffer(content, kind, whole)
    with np.errstate(invalid="ignore"):
        good = records["step"] == np.arange(whole)
        for name in ("lr", "loss", "seconds"):
            good &= np.isfinite(records[name])
        good &= np.isfinite(records["projected_grad"]).all(1)
    count = whole if good.all() else int(good.argmin())
    body, bytes_ = size - _CRC.size, memoryview(content)
    for i, stored in enumerate(records["crc"][:count].tolist()):
        crc = zlib.crc32(bytes_[i * size : i * size + body], crc)
        if crc != stored:
            count = i
            break
    damage = None
    if count < whole:
        damage = f"the record of step {count} is damaged ({whole - count} from there)"
    elif rest:
        damage = f"the record of step {count} is incomplete"
    return Trajectory(header, records[:count], damage)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a trajectory or a delta to read; raise Damaged where it cannot be."""
    try:
        # What is no file (a pipe, a device) might never end, nor open.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Damaged(f"{path} is not a file.")
            yield file
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror or error}).") from error


def _exactly(path: Path, file: Any, count: int) -> bytes:
    found: bytes = file.read(count)
    if len(found) != count:
        raise Damaged(f"{path} is cut off.")
    return found


def read_start(path: Path, file: Any, magic: bytes) -> tuple[dict[str, Any], int]:
    """Read the header of a file: its JSON object, and where the records begin."""
    start = _exactly(path, file, START.size)
    found, version, length = START.unpack(start)
    if found != magic:
        what = "trajectory" if magic == _RUN else "delta"
        raise Damaged(f"{path} is no {what} of smezo.")
    if version != VERSION:
        raise Damaged(f"{path} has version {version}, this smezo reads {VERSION}.")
    if length > _MAX_JSON:
        raise Damaged(f"{path} is damaged in its header.")
    text = _exactly(path, file, length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged in its header.") from error
    if not isinstance(header, dict) or not isinstance(header.get("rows", {}), dict):
        raise Damaged(f"{path} is damaged in its header.")
    return header, zlib.crc32(text, zlib.crc32(start))


def num_queries_of(path: Path, header: Mapping[str, Any]) -> int:
    """Return how many scalars a record of the file holds; raise Damaged if it does not say."""
    identity = header.get("identity")
    named = identity if isinstance(identity, dict) else {}
    queries = named.get("num_scalars", named.get("num_queries"))
    if type(queries) is not int or not 1 <= queries <= _MAX_QUERIES:
        raise Damaged(f"{path} is damaged in its header.")
    return queries


def record_type(queries: int) -> np.dtype[Any]:
    """Return the dtype of one record with so many projected gradients."""
    return np.dtype(
        [
            *(("step", "<u4"), ("lr", "<f8"), ("loss", "<f8"), ("seconds", "<f4")),
            *(("projected_grad", "<f8", (queries,)), ("crc", "<u4")),
        ]
    )


# --- recording ---------------------------------------------------------------------------------


class Recorder:
    """Apply the recorded steps of a run under way, and record new ones.

    Args:
        path: of trajectory.bin; cut to its good part, made anew where that has no header.
        header: of this run.
        method: whose steps these are.
        known: the good part of the file, None to begin it.
        lost: is told before the file is put back, where its name was taken from it.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        method: Replayable,
        known: Trajectory | None,
        lost: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.method, self._known, self._lost = path, method, known, lost
        self.count = 0 if known is None else len(known)
        kind = record_type(method.num_scalars)
        self._kind, text = kind, strict_json.dumps(header, sort_keys=True).encode()
        start = START.pack(_RUN, VERSION, len(text)) + text
        start += _CRC.pack(zlib.crc32(start))
        self._crc = zlib.crc32(start[: -_CRC.size])
        if known is not None and self.count:
            self._crc = int(known._records[-1]["crc"])
        self._end = len(start) + self.count * kind.itemsize
        with self._saying():
            self._file = self._open()
            if known is None:
                os.ftruncate(self._file, 0)
                self._write(start, 0)
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)

    def apply(self, step: int) -> Step | None:
        """Apply a recorded step and return it; None if it is not recorded and must be made."""
        if self._known is None or step >= len(self._known):
            return None
        made = self._known[step]
        self.method.replay(made.lr, made.scalars)
        return made

    def append(self, step: int, record: StepRecord, seconds: float) -> float:
        """Record a step that the method has just made; return its seconds as they are recorded."""
        assert step == self.count
        row = np.zeros(1, self._kind)
        row["step"], row["lr"] = step, self.method.param_groups[0]["lr"]
        row["loss"], row["seconds"] = record.loss, seconds
        row["projected_grad"] = record.scalars
        self._crc = zlib.crc32(row.tobytes()[: -_CRC.size], self._crc)
        row["crc"] = self._crc
        self._stay()
        with self._saying():
            self._write(row.tobytes(), self._end)
        self._end += self._kind.itemsize
        self.count += 1
        return float(row["seconds"][0])

    def trajectory(self) -> Trajectory:
        """Return all that is recorded now."""
        self._stay()
        return read(self.path)

    def sync(self) -> None:
        """Have the system write it to the disk."""
        with self._saying():
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _open(self) -> int:
        # A link might lead out of the run folder.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(self.path, flags, 0o666)

    def _stay(self) -> None:
        """Check that the file is unchanged; put it back if its name was taken from it."""
        with self._saying():
            if os.fstat(self._file).st_size != self._end:
                raise OSError(
                    errno.EIO,
                    "it was changed while the run went on; the same command makes again what is "
                    "lost",
                )
            if bounded.is_at(self._file, self.path):
                return
            name = self.path.name
            self._lost(
                f"  {name} was removed or replaced while the run went on: it is written anew"
            )
            bounded.put_back(self._file, self.path)
            os.close(self._file)
            self._file = self._open()

    def _write(self, content: bytes, place: int) -> None:
        done = 0
        while done < len(content):  # a disk that fills up takes a part
            done += os.pwrite(self._file, content[done:], place + done)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}.") from error


def check_length(steps: int, queries: int) -> None:
    """Refuse a run whose trajectory could not be read again.

    Raises:
        UserError: more than `MAX_BYTES`.
    """
    if queries > _MAX_QUERIES or steps * record_type(queries).itemsize > MAX_BYTES:
        most = MAX_BYTES // record_type(min(queries, _MAX_QUERIES)).itemsize
        raise UserError(
            f"steps={steps} with method.num_queries={queries}: a trajectory holds at most {most} "
            f"steps of so many and {_MAX_QUERIES} queries; take fewer."
        )


def seconds_between(start: float, end: float) -> float:
    """Return the time between two readings of a clock; 0 if it jumped back, at most 3e38."""
    spent = end - start
    return min(max(spent, 0.0), 3e38) if math.isfinite(spent) else 0.0
