"""Run a job of a sweep in a process of its own, where it finds nothing that an earlier job left.

No run can give back the libraries that it loaded: after one that needed Numba, 171 MiB (its code,
LLVM's, and their objects) stayed and counted as memory of the next, which needed neither. So the
process that Hydra launches jobs in loads no torch, and each job starts from a copy of it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from smezo_cli.machine import torchrun

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def can_fork() -> bool:
    """Return whether this process is still as small as a new one, so that it can be copied.

    Not where a program that uses torch calls us: its threads would not be there in a copy; nor for
    a rank, which joins the others once for all jobs.
    """
    return hasattr(os, "fork") and "torch" not in sys.modules and torchrun.local_rank() is None


def in_own_process(
    work: Callable[[], tuple[int, float | None]],
) -> tuple[int, float | None]:
    """Run `work` in a copy of this process; return its exit code, and the number that it gives.

    The code is -N where signal N ended it; the number is then None.

    SIGINT and SIGTERM are passed on, and waited for until the job has saved what it has. If this
    process is killed, so is the copy (on Linux).

    Raises:
        KeyboardInterrupt: this process was asked to stop, or the copy was.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    old: dict[int, Any] = {number: signal.getsignal(number) for number in _PASSED_ON}
    context = multiprocessing.get_context("fork")
    given, found = context.Pipe(duplex=False)
    copy = context.Process(target=_in_copy, args=(work, found, os.getpid(), old, blocked))
    asked: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if copy.pid is not None and copy.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # ended just now, and was waited for
                os.kill(copy.pid, number)

    try:
        for number in old:
            signal.signal(number, pass_on)
        copy.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        copy.join()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    code = copy.exitcode
    assert code is not None
    with given, found:
        value = given.recv() if given.poll() else None
    if asked or code == 130:
        raise KeyboardInterrupt
    return code, value


def _in_copy(
    work: Callable[[], tuple[int, float | None]],
    found: Connection,
    parent: int,
    old: dict[int, Any],
    blocked: Any,
) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before that
            os._exit(1)
    for number, handler in old.items():
        signal.signal(number, handler)
    if old[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_once)
    code = 130
    with contextlib.suppress(KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        code, value = work()
        found.send(value)
    sys.exit(code)


def _interrupt_once(number: int, _: FrameType | None) -> None:
    """Ctrl-C comes twice: from the terminal, and passed on."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
