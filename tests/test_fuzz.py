"""A short run of scripts/fuzz: every kind of hostile input, no finding."""

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import ROOT, quick_hydra


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The harness, with all kinds registered."""
    monkeypatch.setenv("HYPOTHESIS_STORAGE_DIRECTORY", str(tmp_path))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    quick_hydra.remember()()  # what is remembered is pickled, which no case may do
    yield importlib.import_module("fuzz.harness")
    quick_hydra.remember()


# A worker is forked from a process that may have threads, which do nothing then.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_hostile_inputs_give_results_or_one_sentence(
    fuzz: ModuleType, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    # Other tests run on the same cores, whose caches they share: 2 s of a case alone were over 5 s.
    monkeypatch.setattr(fuzz, "ALARM_S", 20)
    monkeypatch.setattr(fuzz, "WAIT_S", 120)  # of the clock: a case of 3 s was over 30
    found = fuzz.fuzz(200, seed=1)
    assert [r for r in found if r["finding"] is not None] == []
    assert set(Counter(r["kind"] for r in found)) == set(fuzz.KINDS)
    refused = sum(r["refused"] for r in found)
    assert 0.3 * len(found) < refused < len(found)  # both outcomes are seen


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("print('two\\nlines'); raise UserErrors", "NameError"),
        ("Path('../outside/new.txt').write_text('x')", "changed outside"),
        ("Path('../outside/keep.txt').unlink()", "changed outside"),
        ("import pickle; pickle.loads(pickle.dumps(Path))", "pickle.find_class"),
        ("os.kill(os.getpid(), 9)", "status -9"),
        ("bytearray(1 << 40)", "MemoryError"),
        ("case.smezo('train', 'x=1'); raise fuzz.Finding('seen')", "seen"),
    ],
)
def test_the_harness_sees_what_it_is_there_for(
    fuzz: ModuleType, one_thread: None, monkeypatch: pytest.MonkeyPatch, bad: str, says: str
) -> None:
    import os

    def make(case: object) -> None:
        exec(bad, {"Path": Path, "os": os, "case": case, "fuzz": fuzz})

    monkeypatch.setitem(fuzz.KINDS, "bad", replace(fuzz.KINDS["data"], make=make))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(fuzz, "prepare", lambda scratch: fuzz.restore(scratch))
    (record,) = fuzz.fuzz(1, seed=0, kinds=["bad"])
    assert says in record["finding"]


def test_a_case_is_made_again_from_its_key(fuzz: ModuleType) -> None:
    """Whatever was drawn before it."""
    drawn: list[str] = []

    def test(data: Any) -> None:
        drawn.append(repr([data.draw(fuzz.VALUES) for _ in range(40)]))

    for key in ("0/data/1", "0/data/2", "0/data/1"):
        fuzz.once(test, key)
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_case_that_draws_too_much_is_a_finding(fuzz: ModuleType) -> None:
    """Hypothesis leaves such a case without an error, and what it would have done is not done."""
    with pytest.raises(fuzz.Finding, match="more choices"):
        fuzz.once(lambda data: [data.draw(fuzz.VALUES) for _ in range(10_000)], "0/data/1")


def test_every_case_of_a_run_has_a_number(fuzz: ModuleType) -> None:
    jobs = fuzz.planned(500, list(fuzz.KINDS))
    assert len(jobs) == len(set(jobs))
    assert abs(len(jobs) - 500) < len(fuzz.KINDS)
