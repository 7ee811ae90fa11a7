"""Runs that ask all prompts on the first rows of dev alone (``prompt_rows``)."""

import contextlib
import io
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli import train
from smezo_cli.cli import evaluate as evaluate_verb
from smezo_cli.cli import replay as replay_verb
from smezo_cli.config.compose import compose
from smezo_cli.errors import UserError
from smezo_cli.run import console, evaluate, zero_shot
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.store.schema import is_sound_result
from tests.run.processes import Fault, smezo
from tests.run.rank_groups import few_tokens, together
from tests.run.tiny_runs import METHODS, SMALL, assert_same_run, result_of, run_folder, words_of

pytestmark = pytest.mark.usefixtures("one_thread")

FROZEN = [*SMALL, "model=tiny-llama", "method=zero_shot"]
NUM_DEV, NUM_TEST, FIRST = 16, 24, 6


def finished(words: Sequence[str], place: Path) -> Path:
    """The folder of a run in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(compose([*words, f"runs_dir={place / 'runs'}"]))
    return run_folder(place)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each evaluation has scored."""
    found, real = [], evaluate.evaluate

    def counting(scorer: Any, rows: Sequence[Candidates], *rest: Any, **more: Any) -> Any:
        found.append(len(rows))
        return real(scorer, rows, *rest, **more)

    monkeypatch.setattr(evaluate, "evaluate", counting)
    return found


def test_a_prompt_that_is_left_out_is_asked_on_the_first_rows_alone(
    asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_shot, "paired_gain", lambda *_: (0.5, 0.1))
    folder = finished([*FROZEN, f"prompt_rows={FIRST}"], tmp_path)
    assert asked == [FIRST, FIRST, NUM_DEV - FIRST, NUM_TEST]
    result = result_of(folder)
    assert is_sound_result(result)
    (left,) = result["prompts_left_out"]
    assert left["template"] != result["prompt"]["template"]
    assert left["left_out"]["rows"] == left["dev"]["n"] == FIRST
    assert result["prompt"]["dev"]["n"] == NUM_DEV
    assert "left_out" not in result["prompt"]
    said = (folder / "console.log").read_text(encoding="utf-8")
    assert f", on {FIRST} rows: left out, 0.5000 +- 0.1000 behind" in said


def test_a_prompt_that_is_not_clearly_worse_goes_on(
    asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both come to what they come to without the setting; rows of a lot are scored once."""
    monkeypatch.setattr(zero_shot, "_CLEARLY", 100.0)
    whole = result_of(finished(FROZEN, tmp_path / "whole"))
    asked.clear()
    result = result_of(finished([*FROZEN, f"prompt_rows={FIRST}"], tmp_path / "lots"))
    assert asked == [FIRST, FIRST, *[NUM_DEV - FIRST] * 2, NUM_TEST]
    assert result["prompts_left_out"] == []
    assert "prompts_left_out" not in whole
    # fp32 losses of size 1: rows stand in other batches.
    for name in ("dev", "dev_calibrated"):
        assert result["prompt"][name] == pytest.approx(whole["prompt"][name], abs=1e-6)
    assert result["zero_shot"] == whole["zero_shot"]


def test_eval_and_replay_cut_dev_as_the_run_did(
    asked: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, *METHODS["mezo"], "steps=2", "batch_size=4", f"prompt_rows={FIRST}"]
    folder = finished(words, tmp_path)
    for main in (evaluate_verb.main, replay_verb.main):
        asked.clear()
        assert main([str(folder), "--split", "dev"]) == 0
        assert asked == [FIRST, NUM_DEV - FIRST]
    assert "NOT the same" not in capsys.readouterr().out
    asked.clear()
    assert evaluate_verb.main([str(folder)]) == 0
    assert asked == [NUM_TEST]


def test_progress_names_the_prompt_that_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dev is gone through once a prompt; test, and dev of a single prompt, say no number."""
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    said = (finished(FROZEN, tmp_path / "both") / "console.log").read_text(encoding="utf-8")
    for line in ("dev (prompt 1 of 2) 16/16", "dev (prompt 2 of 2) 16/16", "test 24/24"):
        assert f"\n  {line}  " in said
    only = finished([*FROZEN, "task.prompt=1"], tmp_path / "one") / "console.log"
    assert "\n  dev 16/16  " in only.read_text(encoding="utf-8")


@pytest.mark.parametrize("word", ["task.prompt=0", f"prompt_rows={NUM_DEV}"])
def test_where_there_is_nothing_to_leave_out_dev_is_evaluated_at_once(
    word: str, asked: list[int], tmp_path: Path
) -> None:
    result = result_of(finished([*FROZEN, f"prompt_rows={FIRST}", word], tmp_path))
    assert asked == [*[NUM_DEV] * (1 if "task" in word else 2), NUM_TEST]
    assert result["prompts_left_out"] == []


def outcome_of(num_right: int, of: int) -> Evaluation:
    """Rows of two classes of which the first ones are right by a wide margin."""
    rows = [Candidates(((5, 6), (5, 7)), (1, 1), k % 2, False, id=str(k)) for k in range(of)]
    scores = torch.zeros(of, 2)
    for k, row in enumerate(rows):
        scores[k, row.label if k < num_right else 1 - row.label] = 1 + k / of
    return Evaluation(rows, scores)


@pytest.mark.parametrize(
    ("others", "out"),
    [
        ({1: 88, 2: 60}, {2}),  # 30 points behind, of 4.6; 2 points behind, of 1.4
        ({1: 90}, set()),  # the same
        ({1: 86}, {1}),  # 4 points, of 1.96
        ({1: 87}, set()),  # 3 points, of 1.7
    ],
)
def test_only_what_is_two_paired_standard_errors_behind_is_left_out(
    others: dict[int, int], out: set[int]
) -> None:
    begun = {k: outcome_of(right, 100) for k, right in ({0: 90} | others).items()}
    found = zero_shot._left_out(begun)
    assert set(found) == out
    for k in out:
        assert found[k]["gain"] == pytest.approx((90 - others[k]) / 100)
        share = (90 - others[k]) / 100
        assert found[k]["standard_error"] == pytest.approx((share * (1 - share) / 100) ** 0.5)


def test_rows_without_a_label_decide_nothing() -> None:
    def without(found: Evaluation, count: int) -> Evaluation:
        rows = [replace(row, label=-1) if k < count else row for k, row in enumerate(found.rows)]
        return Evaluation(rows, found.scores)

    begun = {0: outcome_of(90, 100), 1: outcome_of(60, 100)}
    assert zero_shot._left_out({k: without(of, 100) for k, of in begun.items()}) == {}
    (behind,) = zero_shot._left_out({k: without(of, 20) for k, of in begun.items()}).values()
    assert behind["gain"] == pytest.approx(30 / 80)
    assert behind["rows"] == 100


def test_a_run_that_was_killed_while_it_chose_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    words = words_of("mezo", f"prompt_rows={FIRST}")
    assert smezo(words, tmp_path / "once").code == 0
    fault = Fault("evaluate", 3, signal.SIGTERM)  # the first lot under both prompts, and then
    assert smezo(words, tmp_path / "stopped", faults=[fault.install]).code != 0
    assert smezo(words, tmp_path / "stopped").code == 0
    assert_same_run(run_folder(tmp_path / "stopped"), run_folder(tmp_path / "once"))


def test_ranks_choose_as_one_does(tmp_path: Path) -> None:
    words = [*SMALL, *METHODS["mezo"], "steps=2", "batch_size=8", f"prompt_rows={FIRST}"]
    ended = together(2, words, tmp_path / "many", [few_tokens])
    assert [one.code for one in ended] == [0, 0], ended[0].err
    one = smezo([*words, "micro_batch_size=4"], tmp_path / "one", faults=[few_tokens])
    assert one.code == 0
    mine, theirs = (result_of(run_folder(tmp_path / name)) for name in ("many", "one"))
    for name in ("prompt", "prompts_left_out", "zero_shot", "test"):
        assert mine[name] == theirs[name]


def test_a_number_of_rows_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^prompt_rows=1: .*for example prompt_rows=100"):
        finished([*FROZEN, "prompt_rows=1"], tmp_path)
