"""Files that are taken from a run while it goes on: put back, or said, never lost in silence."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.cli.verbs import main
from smezo_cli.run.watch import Watch

WORDS = [
    *("train", "model=tiny-llama", "task=toy", "device=cpu"),
    *("task.num_train=8", "task.num_dev=4", "task.num_test=4"),
    *("batch_size=2", "eval_every=2", "steps=4"),
]
FILES = ("metrics.jsonl", "console.log", "trajectory.bin", "config.yaml", "scores.safetensors")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


def run_of(*words: str) -> tuple[int, Path]:
    code = main([*WORDS, *words])
    (run,) = Path("runs/default").iterdir() if Path("runs/default").is_dir() else [Path("gone")]
    return code, run


@pytest.fixture
def in_step_3(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], object]], None]:
    """Has something done to the run folder once, after the third step."""

    def arrange(act: Callable[[Path], object]) -> None:
        real, done = Watch.after_step, list[int]()

        def after_step(self: Watch, step: int, record: Any) -> str:
            if step == 3 and not done:
                done.append(step)
                (run,) = Path("runs/default").iterdir()
                act(run)
            return real(self, step, record)

        monkeypatch.setattr(Watch, "after_step", after_step)

    return arrange


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without seconds."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


@pytest.mark.parametrize("method", ["mezo", "adamw"])
def test_files_that_are_removed_are_written_anew(
    method: str,
    in_step_3: Callable[[Callable[[Path], object]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All of them, .lock and result.json too: the run ends as one that nobody touched."""
    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "whole")
        whole = run_of(f"method={method}")[1].absolute()
    files = [name for name in FILES if (whole / name).exists()]
    in_step_3(lambda run: [(run / name).unlink() for name in (*files, ".lock", "result.json")])
    capsys.readouterr()
    code, run = run_of(f"method={method}")
    assert code == 0
    out = capsys.readouterr().out
    for name in files[:-2]:
        assert out.count(f"{name} was removed or replaced while the run went on") == 1
    assert {f.name for f in run.iterdir()} == {f.name for f in whole.iterdir()}
    assert records(run) == records(whole)
    assert "zero-shot, before training:" in (run / "console.log").read_text()
    result, other = (json.loads((f / "result.json").read_text()) for f in (run, whole))
    assert result["test"] == other["test"]
    assert "over_zero_shot" in result["test"]
    assert main([*WORDS, f"method={method}"]) == 0
    assert "done already" in capsys.readouterr().out


def test_lines_that_are_taken_out_are_said_and_made_again(
    in_step_3: Callable[[Callable[[Path], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_step_3(lambda run: os.truncate(run / "metrics.jsonl", 0))
    code, run = run_of("method=mezo")
    assert code == 0
    assert "metrics.jsonl was changed while the run went on: lines are lost" in (
        capsys.readouterr().out
    )
    assert [record["step"] for record in records(run)] == [4, 4]
    assert main([*WORDS, "method=mezo"]) == 0
    assert [record["step"] for record in records(run)] == [1, 2, 2, 3, 4, 4]


def test_steps_that_are_taken_out_end_the_run_and_are_made_again(
    in_step_3: Callable[[Callable[[Path], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_step_3(lambda run: os.truncate(run / "trajectory.bin", 40))
    code, run = run_of("method=mezo")
    assert code == 2
    assert "trajectory.bin: it was changed while the run went on" in capsys.readouterr().err
    assert main([*WORDS, "method=mezo"]) == 0
    assert [record["step"] for record in records(run)] == [1, 2, 2, 3, 4, 4]


def test_a_folder_that_is_removed_ends_the_run_in_one_sentence(
    in_step_3: Callable[[Callable[[Path], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_step_3(lambda run: shutil.rmtree("runs"))
    assert run_of("method=mezo")[0] == 2
    said = capsys.readouterr().err
    assert "was removed or moved while the run went on" in said
    assert said.count("\n") == 1
    assert not os.path.exists("runs")


def test_a_folder_that_another_process_began_anew_is_left_to_it(
    in_step_3: Callable[[Callable[[Path], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    held = []

    def replace(run: Path) -> None:
        shutil.rmtree(run)
        run.mkdir()
        (run / "metrics.jsonl").write_text("another's\n")
        held.append((run / ".lock").open("w"))
        fcntl.flock(held[0], fcntl.LOCK_EX)

    in_step_3(replace)
    code, run = run_of("method=mezo")
    assert code == 2
    said = capsys.readouterr().err
    assert "is in use by" in said
    assert said.count("\n") == 1
    assert sorted(f.name for f in run.iterdir()) == [".lock", "metrics.jsonl"]
    assert (run / "metrics.jsonl").read_text() == "another's\n"
    held[0].close()
