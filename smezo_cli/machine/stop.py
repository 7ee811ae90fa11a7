"""Turn a signal to stop into a request that the run honours where nothing is lost."""

import signal
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """Say that the user (or the machine) asked the run to stop; its state is saved."""


class StopRequest:
    """Turn SIGINT and SIGTERM into a request that the loop honours between steps."""

    def __init__(self, say: Callable[[str], None], patient: bool = True) -> None:
        self._say = say
        self.asked = self._ending = False
        self.patient = patient  # False while nothing is to be saved: a signal stops at once

    def __enter__(self) -> "StopRequest":
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._ending:  # Ctrl-C comes twice to a job of a sweep (see fork.py)
            return
        if not self.patient:
            self.asked = self._ending = True
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            self._say(
                f"{signal.Signals(number).name}: stopping after this step or batch, please wait."
            )
