"""Show that work goes on where it takes more than two seconds and prints nothing itself.

On a terminal one moving line, which goes away again; elsewhere a line every ten seconds. Both stand
among the other lines of progress, on stdout; on stderr where a verb prints data.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from smezo_cli.machine import torchrun

AFTER_S = 2.0  # before a terminal shows what is waited for
LINE_EVERY_S = 10.0  # between lines elsewhere
_LOOK_EVERY_S = 0.25

Tick = Callable[[int], None]


@dataclass
class _Work:
    what: str
    total: int | None
    since: float
    done: int = 0


class _Shown:
    """Hold what is waited for, the innermost last, and what of it is on the terminal."""

    def __init__(self) -> None:
        self.works: list[_Work] = []
        self.lock = threading.RLock()
        self.is_drawn = False
        self.spoke = 0.0
        self.beside_data = False
        self.has_bar = False


_shown = _Shown()


@contextlib.contextmanager
def waiting(what: str, total: int | None = None) -> Iterator[Tick]:
    """Show `what` goes on as long as the context is open; yield what counts its parts.

    Args:
        what: in words, such as "loading smollm2-135m".
        total: number of parts, if they are counted.
    """
    work = _Work(what, total, time.monotonic())

    def tick(count: int = 1) -> None:
        work.done += count

    if torchrun.speaker() is None:  # another rank says the same
        yield tick
        return
    with _shown.lock:
        _shown.works.append(work)
        is_first = len(_shown.works) == 1
    try:
        with _watched() if is_first else contextlib.nullcontext():
            yield tick
    finally:
        with _shown.lock:
            _shown.works.remove(work)
            clear()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Look at what is waited for now and then; not at all where no thread can be had."""
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), daemon=True)
    try:
        watch.start()
    except RuntimeError:  # there are as many as this process may have
        yield
        return
    try:
        yield
    finally:
        ended.set()
        watch.join()


def beside_data(is_printed: bool) -> None:
    """Say whether stdout is for data alone from now on, so that waits are shown on stderr."""
    _shown.beside_data = is_printed


def leave_terminal_to_bar(is_shown: bool) -> None:
    """Say whether a progress bar has the terminal from now on: it shows that work goes on."""
    with _shown.lock:
        clear()
        _shown.has_bar = is_shown


def clear() -> None:
    """Take the moving line off the terminal: something else is printed now."""
    with _shown.lock:
        _shown.spoke = time.monotonic()
        if _shown.is_drawn:
            _shown.is_drawn = False
            _write("\r\x1b[K")


def _watch(ended: threading.Event) -> None:
    while not ended.wait(_LOOK_EVERY_S):
        with _shown.lock:
            if _shown.works:
                _show(_shown.works[-1], time.monotonic())


def _show(work: _Work, now: float) -> None:
    """Draw a line if it is time to; the lock is held."""
    try:
        is_terminal = _stream().isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return
    parts = "" if work.total is None else f" {work.done}/{work.total}"
    words = f"  {work.what}{parts}  {now - work.since:.0f} s"
    if is_terminal:
        if _shown.has_bar:
            return
        if now - max(work.since, _shown.spoke) >= AFTER_S or _shown.is_drawn:
            _shown.is_drawn = True
            # A line that is folded could not be taken away again.
            _write(f"\r\x1b[K{words[: shutil.get_terminal_size().columns - 1]}")
    elif now - max(work.since, _shown.spoke) >= LINE_EVERY_S:
        _shown.spoke = now
        _write(f"{words}\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it any more
        _stream().write(text)
        _stream().flush()


def _stream() -> TextIO:
    return sys.stderr if _shown.beside_data else sys.stdout
