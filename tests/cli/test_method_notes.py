"""What `smezo show method` says of a method against MeZO: papers, and the arena."""

import json
from pathlib import Path

import pytest

from smezo_cli.cli import method_notes
from smezo_cli.cli.verbs import main


def test_a_method_says_what_papers_print_and_what_the_arena_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arena = tmp_path / "arena.json"
    monkeypatch.setattr(method_notes, "ARENA", arena)
    points = {"mezo": {"films": [0.0, 0.0]}, "lozo": {"films": [-1.25, 0.9]}}
    for methods, found in (
        ({}, "LOZO: not run yet"),
        (points, "LOZO: points over MeZO -1.2 +- 0.9 on films"),
    ):
        arena.write_text(json.dumps({"methods": methods}))
        assert main(["show", "method", "lozo"]) == 0
        lines = [line.removeprefix("# ") for line in capsys.readouterr().out.splitlines()]
        assert lines[-1] == f"In the arena (docs/results/arena.md), {found}"
        assert lines[-2].startswith("In print, LOZO: +1.9 over MeZO, OPT-13B, mean of 11 tasks (")
    # A first-order method, of which no cost is measured.
    assert main(["show", "method", "adamw"]) == 0
    assert "# In print, AdamW: +3.2 over MeZO" in capsys.readouterr().out
    # The row that all others are compared with, and a method that is no row.
    assert list(method_notes.against_mezo("mezo")) == []
    assert list(method_notes.against_mezo("zoro_fa")) == []
    assert len([line for line in method_notes.against_mezo("sparse_mezo") if "print" in line]) == 2
