"""Runs that go on with other settings: more steps, or other weights that are kept."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from smezo_cli.store.folder import RunFolder
from tests.run.processes import Fault, sentence_of, smezo
from tests.run.tiny_runs import (
    METHODS,
    SMALL,
    assert_same_run,
    records_of,
    result_of,
    run_folder,
    state_of,
    words_of,
)


@pytest.mark.parametrize("known", ["in the state", "in the result", "nowhere"])
def test_eval_every_null_stays_what_it_stood_for(tmp_path: Path, known: str) -> None:
    """All of a run of 3 steps is 3; that of 7 steps would be 7. An older run has not noted it."""
    words = [*SMALL, *METHODS["mezo"], "batch_size=4", "zero_shot=false"]
    assert smezo([*words, "steps=3"], tmp_path).code == 0
    path = run_folder(tmp_path)
    assert state_of(path)["notes"]["eval_every"] == 3
    if known != "in the state":
        folder = RunFolder(path)
        state, result = folder.load_state(), folder.result()
        assert state is not None
        assert result is not None
        del state.notes["eval_every"]
        folder.save_state(state)
        if known == "nowhere":
            del result["eval_every"]
            folder.write_result(result)
        folder.close()
    assert smezo([*words, "steps=7"], tmp_path).code == 0
    looks = [record["step"] for record in records_of(path) if "dev.loss" in record]
    assert looks == ([3, 7] if known == "nowhere" else [3, 6, 7])
    assert result_of(path)["eval_every"] == (7 if known == "nowhere" else 3)


def test_keep_all_is_refused_where_weights_are_gone(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """In a sentence, before anything is written; as it began, the run goes on."""
    stop = Fault("loss", 9, signal.SIGTERM)  # evaluated at steps 3 and 6
    assert smezo(words_of("adamw"), tmp_path, faults=[stop.install]).code == 130
    folder = run_folder(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != ".lock"}
    said = sentence_of(smezo(words_of("adamw", "keep=all"), tmp_path))
    assert "keep=all: " in said
    assert "has evaluated dev at step" in said
    assert "if_exists=fresh" in said
    assert {path: path.read_bytes() for path in before} == before
    assert smezo(words_of("adamw"), tmp_path).code == 0
    assert_same_run(folder, run_folder(finished("adamw")))


def test_keep_all_is_refused_where_a_finished_run_is_extended(tmp_path: Path) -> None:
    words = words_of("adamw", "lr_schedule=constant")
    assert smezo([*words, "steps=6"], tmp_path).code == 0
    folder = run_folder(tmp_path)
    before = (folder / "result.json").read_bytes()
    said = sentence_of(smezo([*words, "keep=all"], tmp_path))
    assert "has evaluated dev at step 3 " in said
    assert (folder / "result.json").read_bytes() == before


@pytest.mark.parametrize("method", ["adamw", "sparse_mezo"])
def test_keep_all_goes_on_where_all_is_there_or_can_be_made(tmp_path: Path, method: str) -> None:
    """From before the first evaluation; and with a trajectory at any time."""
    step = 2 if method == "adamw" else 7
    losses = step if method == "adamw" else 2 * step
    stop = Fault("loss", losses, signal.SIGTERM)
    assert smezo(words_of(method), tmp_path, faults=[stop.install]).code == 130
    assert smezo(words_of(method, "keep=all"), tmp_path).code == 0
    assert result_of(run_folder(tmp_path))["keep"] == "all"


def test_a_run_too_long_to_record_is_refused_before_a_row_is_scored(tmp_path: Path) -> None:
    ended = smezo(words_of("mezo", "steps=2000000"), tmp_path)
    assert "a trajectory holds at most" in sentence_of(ended)
    assert "zero-shot" not in ended.out
