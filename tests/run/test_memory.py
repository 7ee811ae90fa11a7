"""Runs whose memory is too small outside their steps."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli import train
from smezo_cli.cli import evaluate as evaluate_verb
from smezo_cli.config.compose import compose
from smezo_cli.errors import UserError
from smezo_cli.run import loaded
from smezo_cli.scoring.forward import Forward
from smezo_cli.scoring.kept_inputs import KeptInputs
from tests.run.in_process import finished, said
from tests.run.processes import smezo
from tests.run.rank_groups import few_tokens, together
from tests.run.tiny_runs import METHODS, SMALL, result_of, run_folder, state_of

pytestmark = pytest.mark.usefixtures("one_thread")

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
WORDS = [*SMALL, "model=tiny-llama", "method=mezo", "method.executor=sequential", "lr=1e-3"]
WORDS += ["steps=2", "eval_every=1", "batch_size=4"]


def limit(rows: int, is_meant: Callable[[], bool] = torch.is_inference_mode_enabled) -> None:
    """Memory for so many rows in a forward, of an evaluation or of what is meant."""
    real = Forward.padded

    def limited(self: Forward, sequences: Any, *more: Any) -> Any:
        if is_meant() and len(sequences) > rows:
            raise ERROR
        return real(self, sequences, *more)

    Forward.padded = limited  # type: ignore[method-assign]  # put back by the fixture


@pytest.fixture(autouse=True)
def _ample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards as they are, after each test."""
    monkeypatch.setattr(Forward, "padded", Forward.padded)


def test_an_evaluation_that_is_too_large_is_halved_and_the_run_goes_on(tmp_path: Path) -> None:
    """It is said once, and the next start knows it."""
    ample = finished(WORDS, tmp_path / "ample")
    limit(3)
    folder = finished(WORDS, tmp_path / "small")
    assert len(re.findall("out of memory with", said(folder))) == 1
    assert re.search(r"out of memory with \d+ rows at once: evaluations go on with", said(folder))
    assert state_of(folder)["notes"]["most_at_once"].keys() == {"scores"}
    for name in ("test", "zero_shot", "dev"):
        mine, theirs = (result_of(of)[name] for of in (folder, ample))
        mine, theirs = (of.get("best", of) for of in (mine, theirs))
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["accuracy"] == theirs["accuracy"]
    finished([*WORDS, "steps=4"], tmp_path / "small")
    assert result_of(folder)["steps"] == 4
    assert said(folder).count("out of memory") == 1


def test_inputs_are_kept_of_the_batches_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final test and an evaluation without anything kept give the same bits."""
    limit(1)
    kept, real = list[int](), KeptInputs._keep_batch

    def keep(self: KeptInputs, key: Any, states: Any) -> None:
        kept.append(len(states))
        real(self, key, states)

    monkeypatch.setattr(KeptInputs, "_keep_batch", keep)
    freeze = "method.freeze=['*embed*','model.layers.0.*']"
    folder = finished([*WORDS, "keep_inputs=true", freeze], tmp_path)
    assert kept
    assert set(kept) == {1}
    before = (folder / "predictions-test.jsonl").read_bytes()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert evaluate_verb.main([str(folder)]) == 0
    assert "out of memory" in out.getvalue()
    assert (folder / "predictions-test.jsonl").read_bytes() == before


def test_scores_of_halved_batches_are_no_other_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMEZO_CACHE", str(tmp_path / "cache"))
    limit(3)
    words = [*SMALL, "model=tiny-llama", "method=zero_shot", "cache_scores=true"]
    finished(words, tmp_path)
    assert not (tmp_path / "cache" / "scores").exists()


def limit_to_one() -> None:
    """Of each rank."""
    limit(1)


def test_ranks_halve_their_batches_each_by_itself(tmp_path: Path) -> None:
    words = [*SMALL, *METHODS["mezo"], "steps=2", "batch_size=8", "micro_batch_size=4"]
    faults = [few_tokens, limit_to_one]
    ended = together(2, words, tmp_path / "many", faults)
    assert [of.code for of in ended] == [0, 0], ended[0].err
    assert smezo(words, tmp_path / "one", faults=faults).code == 0
    many, one = (run_folder(tmp_path / name) for name in ("many", "one"))
    for name in ("prompt", "zero_shot", "test", "weights"):
        assert result_of(many)[name] == result_of(one)[name]


def refused(words: list[str], place: Path) -> str:
    """The sentence in which a run ends."""
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(UserError) as refusal:
        train.run(compose([*words, f"runs_dir={place / 'runs'}"]))
    assert result_of(run_folder(place))["status"] == "failed"
    return str(refusal.value)


def test_a_row_that_does_not_fit_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    limit(0)
    sentence = refused(WORDS, tmp_path)
    assert sentence.startswith("the memory is too small for a forward over one row (CUDA out of")
    assert "lower model.max_length, or take dtype=bfloat16" in sentence


def test_the_self_check_and_the_choice_of_batches_say_so_too(tmp_path: Path) -> None:
    limit(1, lambda: not torch.is_inference_mode_enabled())
    assert "too small for the self-check, a forward over two rows" in refused(WORDS, tmp_path / "a")
    words = [*SMALL, "model=tiny-llama", "method=zero_shot"]
    assert "too small for a forward over two rows" in refused(words, tmp_path / "b")


@pytest.mark.parametrize("is_explained", [False, True])
def test_a_model_that_cannot_be_loaded_for_its_size_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_explained: bool
) -> None:
    """Whether or not an error of the libraries was taken for one of the files."""

    def load(*_: object, **__: object) -> None:
        if is_explained:
            raise UserError("model=tiny-llama is damaged.") from ERROR
        raise ERROR

    monkeypatch.setattr(loaded, "load_model", load)
    sentence = refused(WORDS, tmp_path)
    assert sentence.startswith("the memory is too small to load model=tiny-llama (CUDA out of")
    assert "dtype=bfloat16, +model.device_map=auto over several GPUs, or device=cpu" in sentence
