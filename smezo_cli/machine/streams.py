"""Keep a run going when standard streams are closed, full, or read by nobody.

A command that only prints ends with a sentence then. Nothing heavy is imported here.
"""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_ERRORS = "smezo.shown"


class _Outlet(io.FileIO):
    """Write to standard output or error, and drop what cannot be written.

    Args:
        number: 1 or 2.
        is_closed: nobody reads, or ever did.

    Attributes:
        lost: why something was not written, the first time.
        is_spare: what counts is written elsewhere.
    """

    def __init__(self, number: int, is_closed: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.is_closed = is_closed
        self.lost: OSError | None = None
        self.is_spare = False

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write some of the bytes; return all as written if nobody takes them."""
        try:
            if self.is_closed:
                raise OSError(errno.EBADF, "it is closed")
            while (done := super().write(data)) is None:  # a full pipe that does not block
                select.select([], [self], [])
            return done
        except OSError as error:
            self.lost = self.lost or error
        return memoryview(data).nbytes


_OUTLETS: dict[str, _Outlet] = {}


def reopen_closed() -> set[int]:
    """Open standard streams that were closed, on /dev/null; return their numbers.

    Otherwise the next file that is opened would take the place of one, and receive what is printed.
    """
    closed = set[int]()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            closed.add(number)
    if 0 in closed:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as we live
    return closed


def guard(closed: set[int] | None = None) -> None:
    """Let no failure to write to standard output or error end the process, and print any text.

    Characters that the encoding lacks are escaped; bytes of a file name that are no text are
    written as they are.

    Args:
        closed: what :func:`reopen_closed` returned.
    """
    codecs.register_error(_ERRORS, _shown)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        old: TextIO | None = getattr(sys, name)
        if old is not None and old is not getattr(sys, f"__{name}__"):
            continue  # a program has put its own there, or we have
        if old is not None:  # what a program has printed before stands before
            with contextlib.suppress(OSError, ValueError):
                old.flush()
        is_closed = closed is not None and number in closed
        outlet = _OUTLETS[name] = _Outlet(number, is_closed)
        # Python leaves standard output unbuffered with -u, and so do we: a line at a time.
        by_line = number == 2 or outlet.isatty() or getattr(old, "write_through", False)
        new = io.TextIOWrapper(
            io.BufferedWriter(outlet),
            encoding=old.encoding if old is not None else "utf-8",
            errors=_ERRORS,
            newline="\n",
            line_buffering=by_line,
        )
        setattr(sys, name, new)


def outlast() -> None:
    """Allow printed output to be lost: what counts is written to files."""
    if "stdout" in _OUTLETS:
        _OUTLETS["stdout"].is_spare = True


def settle(code: int) -> int:
    """Flush the output; say on standard error if some of it was lost.

    A reader that has seen enough (``smezo runs | head``) is no mistake, and it is none to close the
    standard output of what does more than print.

    Args:
        code: the exit code so far.

    Returns:
        The exit code: 2 where all that was to be done was to print.
    """
    sys.stdout.flush()
    outlet = _OUTLETS.get("stdout")
    if outlet is None:  # a program has put its own there
        return code
    why = outlet.lost
    if why is None or why.errno == errno.EPIPE or (outlet.is_closed and outlet.is_spare):
        return code
    sys.stderr.write(
        f"smezo: standard output cannot be written ({why.strerror}), and what was printed is lost: "
        "give it a terminal, or a file on a disk with room.\n"
    )
    return code if outlet.is_spare else code or 2


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what an encoding lacks, for :func:`codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    first = error.object[error.start]
    if "\udc80" <= first <= "\udcff":  # a byte of a file name, as Python carries it
        return bytes([ord(first) - 0xDC00]), error.start + 1
    return first.encode("ascii", "backslashreplace"), error.start + 1
