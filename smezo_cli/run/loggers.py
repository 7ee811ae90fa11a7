"""Write metrics: JSON lines, W&B, TensorBoard, Trackio."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shlex
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from smezo_cli.config.fixed import INSTALL_LOGGER
from smezo_cli.errors import UserError, redacted, redacted_tree
from smezo_cli.files import bounded, strict_json


def open_log(path: Path) -> FileIO:
    """Open a log of a run to append to it; raise UserError if that fails."""
    try:
        return bounded.open_own_bytes(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; it must be a file of the run folder."
        ) from error


def logged(split: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics as a log has them: dev.accuracy, and of a part of a mixture dev.rte.accuracy.

    Args:
        split: of the rows.
        metrics: of an evaluation.
    """
    found = dict[str, Any]()
    for key, value in metrics.items():
        if key == "parts":
            for name, of_part in value.items():
                found |= logged(f"{split}.{name}", of_part)
        elif key not in ("standard_error", "n"):
            found[f"{split}.{key}"] = value
    return found


class Logger(Protocol):
    """Receive the records of a run."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record; it has the key ``step``."""

    def close(self, summary: Mapping[str, Any], ok: bool) -> str:
        """End the log; ``summary`` is result.json's content. Return a line to say, or ''."""


def removed(path: Path) -> str:
    """Return the line that says that a log was removed during the run."""
    return f"  {path.name} was removed or replaced while the run went on: it is written anew"


class JsonlLogger:
    """Write metrics.jsonl, one JSON object a line.

    Args:
        path: of the file; it is put back if somebody removes it.
        keep_bytes: length that is kept of the file that is there.
        lost: is told before the file is put back, and of lines that somebody else took out.
    """

    def __init__(
        self, path: Path, keep_bytes: int, lost: Callable[[str], None] = lambda line: None
    ) -> None:
        self._path, self._lost = path, lost
        self._file = open_log(path)
        with self._saying():
            # Steps after the checkpoint are logged anew; a shorter file must not grow by zeros.
            self._file.truncate(min(keep_bytes, path.stat().st_size))
            self._file.seek(0)
            self._digest = hashlib.sha256(self._file.read())

    def log(self, record: Mapping[str, Any]) -> None:
        """See :class:`Logger`.

        Raises:
            UserError: the disk is full.
        """
        line = (strict_json.dumps(record) + "\n").encode()
        self._stay()
        with self._saying():
            done = 0
            while done < len(line):
                done += self._file.write(line[done:])
        self._digest.update(line)

    def standing(self) -> tuple[int, str]:
        """Return the length of the file so far, and its SHA-256."""
        return self._file.tell(), self._digest.hexdigest()

    def close(self, summary: Mapping[str, Any], ok: bool) -> str:
        """See :class:`Logger`."""
        try:
            self._stay()
        finally:
            self._file.close()
        return ""

    def _stay(self) -> None:
        """Put the file back if it was removed; say so if it was changed."""
        if os.fstat(self._file.fileno()).st_size != self._file.tell():
            self._lost(
                f"  {self._path.name} was changed while the run went on: lines are lost; after the "
                "end the same command makes them again where it can"
            )
            self._file.seek(0, os.SEEK_END)
        if bounded.is_at(self._file.fileno(), self._path):
            return
        self._lost(removed(self._path))
        with self._saying():
            bounded.put_back(self._file.fileno(), self._path)
            self._file.close()
            self._file = open_log(self._path)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}.") from error


class WandbLogger:
    """Log to Weights & Biases, offline or online; the run's id is its digest, so a resume goes on.

    Each start of an offline run leaves a folder `wandb/offline-run-TIME-ID` with the steps that no
    folder before it has. Each folder says that it resumes the run, so that `wandb sync` appends one
    to the other in the order of their times. Lines that metrics.jsonl has kept and W&B lacks, since
    it had not written them when the run was killed, are sent first. A step is sent when it is
    complete, with its evaluation of dev: W&B takes no second row for a step.

    Args:
        node: the settings of the logger.
        folder: of the run; its metrics.jsonl is open, and cut to what is kept.
        config: of the run.

    Raises:
        UserError: W&B refuses the settings, or cannot be reached.
    """

    def __init__(self, node: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._offline = node["mode"] == "offline"
        self._folder = folder / "wandb"
        parts = sorted(self._folder.glob("*run-*/run-*.wandb")) if self._offline else []
        try:
            self._run = wandb.init(
                mode=node["mode"],
                project=redacted(node["project"]),
                entity=redacted_tree(node["entity"]),
                tags=redacted_tree(node["tags"]),
                dir=str(folder),
                id=f"{folder.parent.name}-{folder.name}"[-128:],  # the longest that W&B takes
                name=folder.name,
                config=redacted_tree(config),
                resume="allow",
                reinit="finish_previous",
                # Its metadata would hold the command line as it was typed.
                settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise UserError(
                f"logger=wandb logger.mode={node['mode']}: {str(error).splitlines()[0]}: "
                "run `wandb login`, or add logger.mode=offline."
            ) from error
        self._num_parts = 1 + len(parts)
        # The last step that was sent; a service says where it goes on, of files we read it.
        self._last = max(map(_last_step, parts), default=-1)
        if not self._offline:
            self._last = self._run.step - 1
        self._step, self._row = -1, dict[str, Any]()
        for record in _records(folder / "metrics.jsonl"):
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """See :class:`Logger`."""
        if record["step"] != self._step:
            self._send()
        self._step = record["step"]
        self._row |= {k: v for k, v in record.items() if k != "step"}

    def _send(self) -> None:
        if self._row and self._step > self._last:
            self._run.log(self._row, step=self._step)
            self._last = self._step
        self._row = {}

    def close(self, summary: Mapping[str, Any], ok: bool) -> str:
        """See :class:`Logger`; the line is the command that uploads an offline run."""
        if summary["status"] not in ("stopped", "failed"):  # else it may lack its evaluation
            self._send()
        self._run.summary.update(
            strict_json.finite(
                redacted_tree({k: v for k, v in summary.items() if k not in ("config", "versions")})
            )
        )
        self._run.finish(exit_code=0 if ok else 1)
        if not self._offline:
            return ""
        parts = f" (its {self._num_parts} parts together: wandb 0.31 or later appends them)"
        command = f"wandb sync {shlex.quote(str(self._folder))}"
        return f"  wandb   offline; upload: {command}{parts if self._num_parts > 1 else ''}"


def _last_step(path: Path) -> int:
    """Return the last step in a .wandb file, -1 if there is none; damage ends the reading.

    A header of 7 bytes, then LevelDB's log format: blocks of 32 KiB; a record is one piece or some,
    each with a checksum (4 bytes), its length (2), and whether it is whole (1), the first (2), a
    middle (3) or the last one (4). wandb itself has no reader for Python.
    """
    # Neither has types.
    decode = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    damage = import_module("google.protobuf.message").DecodeError
    bounded.check_ordinary(path)
    content, at, pieces, last = path.read_bytes(), 7, b"", -1
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            try:
                record = decode(pieces)
            except damage:
                return last
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
            pieces = b""
    return last


class TensorBoardLogger:
    """Write event files to the run's folder `tensorboard`, a series for each number of a record.

    Values are float32 there. A resumed run writes the files anew from the lines that metrics.jsonl
    has kept: every step is there once, also if the run began with another logger.

    Args:
        folder: of the run; its metrics.jsonl is open, and cut to what is kept.
        config: shown as text.

    Raises:
        UserError: the package is missing, or nothing can be written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        # What TensorBoard asks for before it would import a TensorFlow, to do without it.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            install = INSTALL_LOGGER["tensorboard"]
            raise UserError(f"logger=tensorboard: {error}: {install}.") from error
        self._folder = folder / "tensorboard"
        with self._saying():
            if self._folder.is_symlink():
                raise OSError(errno.ELOOP, "it is a link to elsewhere")
            self._folder.mkdir(exist_ok=True)
            for file in self._folder.glob("events.out.tfevents.*"):
                file.unlink()
            # A reader of the files is told to forget what was in them.
            self._writer: Any = SummaryWriter(str(self._folder), purge_step=0, flush_secs=10)
            text = strict_json.dumps(redacted_tree(config), indent=1)
            self._writer.add_text("config", f"```\n{text}\n```")
            kept = list(_records(folder / "metrics.jsonl"))
            since = sum(record.get("seconds", 0.0) for record in kept)
            now = time.time()
            for record in kept:
                since -= record.get("seconds", 0.0)
                self._add(record, record["step"], now - since)

    def log(self, record: Mapping[str, Any]) -> None:
        """See :class:`Logger`.

        Raises:
            UserError: the disk is full.
        """
        with self._saying():
            self._add(record, record["step"], None)

    def close(self, summary: Mapping[str, Any], ok: bool) -> str:
        """See :class:`Logger`; each metric of the test rows is one last point."""
        with self._saying():
            if ok:
                self._add(_of_test(summary), summary["step"], None)
            self._writer.close()
        return ""

    def _add(self, record: Mapping[str, Any], step: int, now: float | None) -> None:
        for name, value in _numbers(record):
            if name != "step":
                self._writer.add_scalar(name, value, step, now)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._folder}: {error.strerror or error}.") from error


class TrackioLogger:
    """Log to Trackio's database on this machine; nothing is sent anywhere.

    The database lies in TRACKIO_DIR, the same for all runs, as its dashboard shows them together. A
    resumed run is written anew from the lines that metrics.jsonl has kept: every step is there
    once, also if the run began with another logger.

    Args:
        node: the settings of the logger.
        folder: of the run; its metrics.jsonl is open, and cut to what is kept.
        config: of the run.

    Raises:
        UserError: Trackio refuses the name of the project, or cannot write.
    """

    def __init__(self, node: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> None:
        self._project, name = redacted(node["project"]), f"{folder.parent.name}-{folder.name}"
        try:
            with _alone():
                import trackio

                with contextlib.suppress(ValueError):  # there is no such project yet
                    for run in trackio.Api().runs(self._project):
                        if run.name == name:
                            run.delete()
                self._trackio = trackio
                self._run = trackio.init(
                    self._project,
                    name=name,
                    group=folder.parent.name,
                    config=redacted_tree(config),
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except (OSError, ValueError, sqlite3.Error, ImportError) as error:
            raise UserError(f"logger=trackio logger.project={self._project}: {error}.") from error
        for record in _records(folder / "metrics.jsonl"):
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """See :class:`Logger`; each number of a record is a series."""
        numbers = {name: value for name, value in _numbers(record) if name != "step"}
        self._run.log(numbers, step=record["step"])

    def close(self, summary: Mapping[str, Any], ok: bool) -> str:
        """See :class:`Logger`; the line is the command that shows the project."""
        if ok:
            self.log({**_of_test(summary), "step": summary["step"]})
        with _alone():
            self._trackio.finish()
        return f"  trackio  look at it: trackio show --project {shlex.quote(self._project)}"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep Trackio from printing, and from asking the hub who the user is or sending it the run."""
    from huggingface_hub import constants

    kept = {name: os.environ.pop(name, None) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")}
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        os.environ.update({name: value for name, value in kept.items() if value is not None})


class Loggers:
    """Pass records on to all loggers of a run; metrics.jsonl is always one of them.

    Args:
        lines: of metrics.jsonl.
        services: the others.
    """

    def __init__(self, lines: JsonlLogger, *services: Logger) -> None:
        self._lines, self._all = lines, (lines, *services)

    def log(self, record: Mapping[str, Any]) -> None:
        """Give one record to each logger."""
        for logger in self._all:
            logger.log(record)

    def standing(self) -> tuple[int, str]:
        """Return the length of metrics.jsonl so far, and its SHA-256."""
        return self._lines.standing()

    def close(self, summary: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Close each logger, whatever another one cannot write.

        Args:
            summary: result.json's content.
            say: receives what a logger has to say.
        """

        def close_one(logger: Logger) -> None:
            if line := logger.close(summary, summary["status"] == "done"):
                say(line)

        with contextlib.ExitStack() as stack:
            for logger in reversed(self._all):
                stack.callback(close_one, logger)


def open_loggers(
    node: Mapping[str, Any],
    folder: Path,
    config: Mapping[str, Any],
    keep_bytes: int,
    lost: Callable[[str], None],
) -> Loggers:
    """Open metrics.jsonl and the service that the settings name.

    Args:
        node: the settings of the logger.
        folder: of the run.
        config: its settings.
        keep_bytes: of metrics.jsonl.
        lost: see :class:`JsonlLogger`.

    Raises:
        UserError: a file cannot be written, or the service cannot be had as it is asked for.
    """
    lines = JsonlLogger(folder / "metrics.jsonl", keep_bytes, lost)
    with contextlib.ExitStack() as undo:
        undo.callback(lines.close, {}, False)
        services: list[Logger] = []
        if node["name"] == "wandb":
            services = [WandbLogger(node, folder, config)]
        elif node["name"] == "tensorboard":
            services = [TensorBoardLogger(folder, config)]
        elif node["name"] == "trackio":
            services = [TrackioLogger(node, folder, config)]
        undo.pop_all()
    return Loggers(lines, *services)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Return the records in a metrics.jsonl, without damaged lines."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _of_test(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of the test rows in result.json."""
    names = ("test", "zero_shot", "zero_shot_calibrated")
    return {name: summary[name] for name in names if summary.get(name)}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Return every finite number in a record with its keys, and its place in a longer list."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _numbers(item, name if len(value) == 1 else f"{name}/{place}")
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)
