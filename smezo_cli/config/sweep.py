"""Pass the results of sweep jobs that ran in other processes back to the launcher.

Hydra's launchers start the jobs, and Hydra drops what they return, or raises the first failure of
all. So a job returns :class:`Ended`, which says so itself when it is back.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

from smezo_cli.words import quoted

# Launchers that are packages of their own, and what installs them (pyproject.toml has the extras).
INSTALL = {
    "joblib": "'hydra-joblib-launcher>=1.2,<1.3'",
    "submitit_local": "'hydra-submitit-launcher>=1.2,<1.3' 'submitit>=1.5,<2'",
    "submitit_slurm": "'hydra-submitit-launcher>=1.2,<1.3' 'submitit>=1.5,<2'",
    "ray": "'hydra-ray-launcher>=1.2.2,<1.3' (Python 3.11, see docs/guide/sweeps.md)",
}

GO_ON = (
    "the same command does what is missing: finished runs are skipped, begun ones go on from "
    "where they were."
)


class Ended:
    """Tell the process that waits how a job in another process ended: see :func:`settle`.

    Args:
        code: 1 crashed, 2 the user's or the machine's fault.
        words: what the waiting process is to say; "" where the job has said it to the same reader.
    """

    def __init__(self, code: int, words: str = "") -> None:
        self.code, self.words = code, words

    def __reduce__(self) -> tuple[Callable[..., "Ended"], tuple[int, str]]:
        return _arrived, (self.code, self.words)


_ARRIVED: list[Ended] = []


def _arrived(code: int, words: str) -> Ended:
    ended = Ended(code, words)
    _ARRIVED.append(ended)
    return ended


def settle() -> list[Ended]:
    """Return the outcomes that arrived since the last call."""
    found = list(_ARRIVED)
    _ARRIVED.clear()
    return found


def here() -> tuple[str, int]:
    """Return what names this process among all machines."""
    return platform.node(), os.getpid()


def reader() -> tuple[int, int]:
    """Return what stderr leads to: processes for which this is equal write to the same reader."""
    with contextlib.suppress(OSError, ValueError):
        found = os.fstat(sys.stderr.fileno())
        return found.st_dev, found.st_ino
    return 0, 0


def log_file() -> str:
    """Return the file that stderr is written to, or "its log" where the system does not tell."""
    with contextlib.suppress(OSError):
        found = os.readlink("/proc/self/fd/2")
        if os.path.isfile(found):
            return found
    return "its log"


@contextlib.contextmanager
def _quiet_tracker() -> Iterator[None]:
    """Start joblib's resource tracker, which outlives this process, without its warnings."""
    before = os.environ.get("PYTHONWARNINGS")
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = f"{before},{quiet}" if before else quiet  # the last one wins
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


@contextlib.contextmanager
def params_as_words() -> Iterator[None]:
    """Have Hydra read hydra.sweeper.params of a file as the same words on the line."""
    from hydra._internal.core_plugins import basic_sweeper

    sweeper: Any = basic_sweeper.BasicSweeper
    real = sweeper._parse_config
    sweeper._parse_config = lambda self: list(map(quoted, real(self)))
    try:
        yield
    finally:
        sweeper._parse_config = real


@contextlib.contextmanager
def waiting(launcher: str) -> Iterator[None]:
    """Have a launcher wait for all its jobs, and say what it lost in smezo's words alone.

    submitit's would end at the first job that is lost. When a worker of joblib is killed, the
    process that counts its semaphores prints warnings after ours; nothing follows from them.

    Args:
        launcher: its name.
    """
    if launcher == "joblib":
        with _quiet_tracker():
            yield
        return
    if not launcher.startswith("submitit"):
        yield
        return
    from unittest import mock  # which imports much

    from hydra.core.utils import JobReturn, JobStatus
    from submitit.core.core import Job
    from submitit.core.utils import UncompletedJobError
    from submitit.local.local import LocalJob

    real = Job.results

    def results(job: Any) -> list[Any]:
        try:
            return real(job)
        except UncompletedJobError:
            words, _, number, *_ = job.submission().args
            lost = JobReturn(status=JobStatus.COMPLETED)
            lost.return_value = _arrived(
                1,
                f"job {number} ({' '.join(words)}): ended without a result: killed, or out of "
                f"memory or of time (its log: {job.paths.stderr}); {GO_ON}",
            )
            return [lost]

    # On one machine a result that is not there when its process has ended does not come later.
    short = mock.patch.object(LocalJob, "_results_timeout_s", 1)
    with mock.patch.object(Job, "results", results), short:
        yield
