"""Prepare the process of a command before anything else is imported, and end it."""

import _signal as signal  # is loaded already; the other takes a while to import
import os
import sys


def begin() -> None:
    """Take over Ctrl-C, the text encoding and the standard streams.

    Until :func:`interruptible` Ctrl-C ends the process at once: an exception that is raised while
    libraries are imported may come out of them as another, or be dropped.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _leave)
    sys.unraisablehook = _unraisable
    from smezo_cli.machine import streams

    closed = streams.reopen_closed()
    _use_utf8()
    streams.guard(closed)


def interruptible() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on: there may be something to save."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end(code: int) -> int:
    """Say which output was lost; return the exit code."""
    from smezo_cli.machine import streams

    code = streams.settle(code)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python takes a while to end, too
    return code


def _leave(*_: object) -> None:
    os._exit(130)


def _unraisable(found: "sys.UnraisableHookArgs", /) -> None:
    """Print nothing for a Ctrl-C that came in the middle of a finalizer; it is noted elsewhere."""
    if found.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(found)


def _use_utf8() -> None:
    """Start Python again in its UTF-8 mode where the locale gives file names another encoding.

    Settings, tables and models name files in UTF-8. Python does the same by itself where the locale
    is C, unless PYTHONUTF8=0 and PYTHONCOERCECLOCALE=0 forbid it.
    """
    is_asked = "utf8" in sys._xoptions  # by us, or it would be to no purpose
    if sys.getfilesystemencoding() == "utf-8" or is_asked or not sys.executable:
        return
    os.environ["PYTHONUTF8"] = "1"  # for processes that we start
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
