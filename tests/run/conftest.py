"""What several files about runs share."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.processes import smezo
from tests.run.tiny_runs import words_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which a method's run was never stopped."""

    @functools.cache
    def of(method: str) -> Path:
        cwd = tmp_path_factory.mktemp(method)
        ended = smezo(words_of(method), cwd)
        assert ended.code == 0, ended.err
        assert ended.err == ""
        return cwd

    return of
