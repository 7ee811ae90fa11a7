"""Write lines and progress bars to the terminal, and lines to console.log."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from io import BufferedRandom, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from smezo_cli.errors import UserError, redacted
from smezo_cli.files import bounded
from smezo_cli.machine import waiting
from smezo_cli.run.loggers import open_log, removed

LINE_EVERY_S = 10.0  # between plain progress lines


def in_words(metrics: Mapping[str, Any], metric: str) -> str:
    """Return the metric and the loss of each part of a mixture in one line; "" of a single task."""
    return ", ".join(
        f"{name} {of[metric]:.4f} (loss {of['loss']:.4f})"
        for name, of in metrics.get("parts", {}).items()
    )


class _Terminal(RichConsole):
    """Go on in silence when the reader of the output goes away.

    This serves programs that call smezo; for the command itself see machine/streams.py.
    """

    def on_broken_pipe(self) -> None:
        """Fall silent; rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Write lines to the terminal and, once :meth:`keep` names it, to console.log."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._rich = _Terminal(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._file: Any = None
        self._progress: Progress | None = None
        self._path = Path()
        self._check: Callable[[], None] = lambda: None

    def keep(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """Write every line to this file too.

        Args:
            path: of the file; it is put back if somebody removes it.
            check: raises UserError if the folder is another's now, so that it must not be put back.
        """
        self._path, self._check = path, check
        self._file = TextIOWrapper(
            BufferedRandom(open_log(path)), encoding="utf-8", errors="backslashreplace"
        )

    def say(self, text: str = "") -> None:
        """Write one line or more, without secrets."""
        text = redacted(text)
        waiting.clear()
        if self._file:
            try:
                if not bounded.is_at(self._file.fileno(), self._path):
                    self._check()
                    bounded.put_back(self._file.fileno(), self._path)
                    self._file.close()
                    self.keep(self._path, self._check)
                    text = f"{removed(self._path)}\n{text}"
                self._file.write(text + "\n")
                self._file.flush()
            # A full disk, or a folder that is gone; what counts is written elsewhere, and says so.
            except (OSError, UserError):
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
        (self._progress.console if self._progress else self._rich).print(Text(text))

    def bar(self, title: str, total: int, done: int = 0) -> "Bar":
        """Return a progress bar; use it as a context."""
        return Bar(self, title, total, done)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


class Bar:
    """Show progress: a moving bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._first = self._done = done
        self._start = self._spoke = time.monotonic()
        self._live: Progress | None = None

    def __enter__(self) -> "Bar":
        rich = self._console._rich
        waiting.clear()
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
        """Move on by ``count``; ``note`` is shown behind the bar."""
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
    """Return seconds as people say them: 48 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
