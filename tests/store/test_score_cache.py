"""Scores of an untouched model in the cache folder, where several runs write."""

import os
import time
from pathlib import Path

import pytest
import torch

from smezo_cli.files.atomic import replacing
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.store.partial_scores import Part
from smezo_cli.store.score_cache import ScoreCache

ROWS = [Candidates(((5, 6), (5, 7)), (1, 1), k % 2, False, id=str(k)) for k in range(3)]
SCORES = torch.arange(6.0).view(3, 2)


def test_runs_that_write_the_same_file_at_once_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ScoreCache(tmp_path, {"seed": 0})
    path = cache.path_of(ROWS)
    with replacing(path, is_shared=True) as partial:
        partial.write_text("of another run, which is slower", encoding="utf-8")
        own = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        cache.keep(ROWS, SCORES, ())
        assert cache.fill(Part(len(ROWS)), ROWS)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_goes_once_nobody_can_be_writing_it(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, {"seed": 0})
    old, new = tmp_path / ".a.json.1.partial", tmp_path / ".b.json.2.partial"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    cache.keep(ROWS, SCORES, ())
    assert {*tmp_path.iterdir()} == {new, cache.path_of(ROWS)}
