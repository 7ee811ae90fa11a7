"""Where a run speaks: the console (a bar on a terminal, plain lines elsewhere) and its loggers."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shlex
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from io import BufferedRandom, FileIO, TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from smezo_cli.config.fixed import INSTALL_TENSORBOARD
from smezo_cli.errors import UserError, redacted, redacted_tree
from smezo_cli.files import bounded, strict_json

LINE_EVERY_S = 10.0  # between plain progress lines


def _open(path: Path) -> FileIO:
    try:
        return bounded.open_own_bytes(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; it must be a file of the run folder."
        ) from error


class Logger(Protocol):
    """Receives the records of a run."""

    def log(self, record: Mapping[str, Any]) -> None:
        """One record; it has the key ``step``."""

    def close(self, summary: Mapping[str, Any], ok: bool) -> str:
        """No more records; ``summary`` is result.json's content. Return a line to say, or ''."""


def _removed(path: Path) -> str:
    return f"  {path.name} was removed or replaced while the run went on: it is written anew"


class JsonlLogger:
    """metrics.jsonl: one JSON object a line.

    Args:
        path: of the file; where its name is taken from it, it is put back.
        keep_bytes: of what is there.
        lost: is told before the file is put back, and of lines that somebody else took out.
    """

    def __init__(
        self, path: Path, keep_bytes: int, lost: Callable[[str], None] = lambda line: None
    ) -> None:
        self._path, self._lost = path, lost
        self._file = _open(path)
        with self._saying():
            # What lies after the checkpoint is done again; a shorter file must not grow by zeros.
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
        """Length of the file so far, and its SHA-256."""
        return self._file.tell(), self._digest.hexdigest()

    def close(self, summary: Mapping[str, Any], ok: bool) -> str:
        """See :class:`Logger`."""
        try:
            self._stay()
        finally:
            self._file.close()
        return ""

    def _stay(self) -> None:
        """See that the file is where it was, with what was in it."""
        if os.fstat(self._file.fileno()).st_size != self._file.tell():
            self._lost(
                f"  {self._path.name} was changed while the run went on: lines are lost; after the "
                "end the same command makes them again where it can"
            )
            self._file.seek(0, os.SEEK_END)
        if bounded.is_at(self._file.fileno(), self._path):
            return
        self._lost(_removed(self._path))
        with self._saying():
            bounded.put_back(self._file.fileno(), self._path)
            self._file.close()
            self._file = _open(self._path)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}.") from error


class WandbLogger:
    """Weights & Biases, offline or online; the run's id is its digest, so a resumed run goes on.

    Each start of an offline run leaves a folder `wandb/offline-run-TIME-ID` with the steps that no
    folder before it has; all say that they resume the run, so that `wandb sync` appends one to the
    other in the order of their times. The lines that metrics.jsonl has kept and W&B lacks (what it
    had not written when the run was killed) are sent first. A step is sent when it is complete,
    with its look at dev: W&B takes no second row of a step.

    Args:
        node: the settings of the logger.
        folder: of the run; its metrics.jsonl is open, and cut to what is kept.
        config: of the run.

    Raises:
        UserError: W&B cannot be had as it is asked for.
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
        """See :class:`Logger`; the command that uploads what is offline is the line to say."""
        if summary["status"] not in ("stopped", "failed"):  # else it may lack its look at dev
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
    """The last step in a .wandb file, -1 where there is none; what is damaged ends it.

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
    """Event files in the folder `tensorboard` of a run, a series for each number of a record.

    Values are float32 there. A run that goes on writes them anew from the lines that metrics.jsonl
    has kept: every step is there once, those of a run that began with another logger too.

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
            raise UserError(f"logger=tensorboard: {error}: {INSTALL_TENSORBOARD}.") from error
        self._folder = folder / "tensorboard"
        with self._saying():
            if self._folder.is_symlink():
                raise OSError(errno.ELOOP, "it is a link to elsewhere")
            self._folder.mkdir(exist_ok=True)
            for file in self._folder.glob("events.out.tfevents.*"):
                file.unlink()
            # Who looks at the files meanwhile is told to forget what was in them.
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
        """See :class:`Logger`; the figures of the test rows are a last point each."""
        names = ("test", "zero_shot", "zero_shot_calibrated")
        with self._saying():
            if ok:
                figures = {name: summary[name] for name in names if summary.get(name)}
                self._add(figures, summary["step"], None)
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


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records in a metrics.jsonl; a damaged line is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in a record, with its keys; one alone in a list has no place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _numbers(item, name if len(value) == 1 else f"{name}/{place}")
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)


class _Terminal(RichConsole):
    """A console whose reader may go away without ending the run of a program that calls us.

    For a process of our own see streams.py.
    """

    def on_broken_pipe(self) -> None:
        """Say nothing more; rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Lines to the terminal and, as soon as there is one, to the run folder's console.log."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._rich = _Terminal(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._file: Any = None
        self._progress: Progress | None = None
        self._path = Path()
        self._check: Callable[[], None] = lambda: None

    def keep(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """Write every line to this file too.

        Args:
            path: of the file; where its name is taken from it, it is put back.
            check: raises UserError where it must not be, since the folder is another's now.
        """
        self._path, self._check = path, check
        self._file = TextIOWrapper(
            BufferedRandom(_open(path)), encoding="utf-8", errors="backslashreplace"
        )

    def say(self, text: str = "") -> None:
        """One line or more; secrets are redacted."""
        text = redacted(text)
        if self._file:
            try:
                if not bounded.is_at(self._file.fileno(), self._path):
                    self._check()
                    bounded.put_back(self._file.fileno(), self._path)
                    self._file.close()
                    self.keep(self._path, self._check)
                    text = f"{_removed(self._path)}\n{text}"
                self._file.write(text + "\n")
                self._file.flush()
            # A full disk, or a folder that is gone; what counts is written elsewhere, and says so.
            except (OSError, UserError):
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
        (self._progress.console if self._progress else self._rich).print(Text(text))

    def bar(self, title: str, total: int, done: int = 0) -> "Bar":
        """A progress bar; use it as a context."""
        return Bar(self, title, total, done)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


class Bar:
    """Progress of ``total`` things: a moving bar on a terminal, else a line every ten seconds."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._first = self._done = done
        self._start = self._spoke = time.monotonic()
        self._live: Progress | None = None

    def __enter__(self) -> "Bar":
        rich = self._console._rich
        if rich.is_terminal and self._console._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
            )
            self._live = Progress(*columns, console=rich, transient=True)
            self._live.start()
            self._task = self._live.add_task(
                self._title, total=self._total, completed=self._done, note=""
            )
            self._console._progress = self._live
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._console._progress = None

    def step(self, count: int, note: str = "") -> None:
        """``count`` more are done; ``note`` stands behind the bar."""
        self._done += count
        now = time.monotonic()
        rate = (self._done - self._first) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else math.inf
        pace = f"{rate:.2f}/s" if rate < 100 else f"{rate:.0f}/s"
        words = f"{note}  {pace}  {duration(left)} left".strip()
        if self._live:
            self._live.update(self._task, advance=count, note=words)
        elif self._console._progress is None and now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            self._console.say(f"  {self._title} {self._done}/{self._total}  {words}")


def duration(seconds: float) -> str:
    """Seconds as people say them: 48 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
