"""`smezo show run` of runs that came to an end otherwise; tests of trained runs have the rest."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from smezo_cli.cli import show_run
from smezo_cli.cli.verbs import main
from smezo_cli.report.runs import Run


def shown(result: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is printed of a run with this result.json and one setting."""
    (folder / "config.yaml").write_text("steps: 9\n")
    monkeypatch.setattr(show_run, "load", lambda path: Run(folder, result, {"steps": 9}))
    said = show_run.text("it")
    assert yaml.safe_load(said) == {"steps": 9}  # all else is a comment
    assert said.endswith("\n\nsteps: 9\n")  # what came of it stands first
    return said


def test_a_run_that_diverged_before_an_evaluation_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "loss nan at step 3\n  of 9"
    result = {"status": "diverged", "step": 2, "steps": 9, "error": why, "dev": {}}
    said = shown(result | {"dev": {"best": {"step": None}}}, tmp_path, monkeypatch)
    assert "# status: diverged at step 2 of 9\n# error: loss nan at step 3\n#   of 9\n" in said
    assert "best" not in said


def test_each_prompt_of_a_mixture_is_named_by_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"part": "a", "template": "{text}\nIt was"}, {"part": "b", "template": "{text}"}]
    said = shown({"status": "done", "prompt": prompts}, tmp_path, monkeypatch)
    assert "# prompt of a: '{text}\\nIt was'\n# prompt of b: '{text}'\n" in said


def test_a_run_is_found_by_a_part_of_its_name_that_no_other_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"rte-{k}" for k in range(5)]
    runs = [Run(Path("runs/a") / name, {"status": "done"}, {}) for name in names]
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr(show_run, "find", lambda folder: runs)
    assert main(["show", "run", "rte"]) == 2
    assert "fits 5 runs: runs/a/rte-0, runs/a/rte-1, runs/a/rte-2 and 2 more." in (
        capsys.readouterr().err
    )
    assert main(["show", "run", "runs/a/rte_3"]) == 2
    assert "did you mean runs/a/rte-3" in capsys.readouterr().err
    Path("mine").mkdir()
    assert main(["show", "run", "rte-3", "--config-dir", "mine"]) == 2
    assert "leave out --config-dir" in capsys.readouterr().err
