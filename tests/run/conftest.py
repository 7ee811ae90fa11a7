"""What several files about runs share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.run.processes import smezo
from tests.run.tiny_runs import words_of


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which a method's run was never stopped; it is made once, for all workers.

    Only tests of test_session.py start processes in it, so that none finds it in use.
    """
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent

    def of(method: str) -> Path:
        cwd, mark = place / f"finished-{method}", place / f"finished-{method}.mark"
        with FileLock(f"{cwd}.lock"):
            if not mark.exists():
                shutil.rmtree(cwd, ignore_errors=True)
                ended = smezo(words_of(method), cwd)
                assert ended.code == 0, ended.err
                assert ended.err == ""
                mark.touch()
        return cwd

    return of
