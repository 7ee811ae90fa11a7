"""Scores of a stopped evaluation are kept, used for the same weights and rows alone, and go on."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from smezo_cli.machine.stop import Stopped
from smezo_cli.models.load import load_model
from smezo_cli.run.console import Console
from smezo_cli.run.evaluate import evaluate, features
from smezo_cli.scoring import scorer as scoring
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.partial_scores import NAME, Part, PartialScores
from smezo_cli.tasks import Prompt, Row
from tests.scoring.test_evaluation import CONF

ABOUT = {"step": 3}
PROMPT = Prompt("{text}. It was", ("terrible bad", "great"))
_TEXTS = [{"text": "the film " * (1 + n % 4)} for n in range(11)]
KINDS = {
    "classification": [Row(text, n % 2, f"{n}") for n, text in enumerate(_TEXTS)],
    "choice": [
        Row(text, 0, f"{n}", tuple("abcd"[: 2 + n % 3]), frozenset({0}))
        for n, text in enumerate(_TEXTS)
    ],
    "generation": [Row(text, 0, f"{n}", answers=("dull",)) for n, text in enumerate(_TEXTS)],
}


@pytest.fixture(autouse=True)
def _small_batches(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "EVAL_TOKENS", 32)
    monkeypatch.setattr(scoring, "EVAL_ANSWERS", 3)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    cfg: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model/tiny-llama.yaml"))
    return Scorer(
        *load_model(cfg, dtype=torch.float32, device=torch.device("cpu"), cache=Path("/nowhere"))
    )


def rows_of(kind: str, scorer: Scorer) -> list[Candidates]:
    return encode(KINDS[kind], PROMPT, scorer.tokenizer, 256, kind, 4)


def after(batches: int) -> Callable[[], bool]:
    """A wish to stop that comes after so many batches."""
    left = [batches]

    def stopped() -> bool:
        left[0] -= 1
        return left[0] <= 0

    return stopped


def bar(rows: Sequence[Candidates]) -> Any:
    return Console().bar("test", len(rows))


def asked_of(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Receives the ids of every batch of rows that the model is asked about."""
    asked: list[tuple[str, ...]] = []

    def noting(name: str) -> Callable[[Sequence[Candidates]], Any]:
        real = getattr(scorer, name)

        def noted(batch: Sequence[Candidates]) -> Any:
            asked.append((name, *(row.id for row in batch)))
            return real(batch)

        return noted

    for name in ("scores", "features", "generate"):
        monkeypatch.setattr(scorer, name, noting(name))
    return asked


def same(found: Evaluation, other: Evaluation) -> bool:
    return torch.equal(found.scores, other.scores) and list(found.texts) == list(other.texts)


@pytest.mark.parametrize(
    ("kind", "batches"),
    [*(("classification", n) for n in (1, 2)), ("choice", 2), ("generation", 1), ("generation", 6)],
)
def test_what_was_scored_is_not_scored_again_and_the_bits_are_the_same(
    kind: str, batches: int, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each number of batches, in scores and in answers; from a file.

    What is left is cut into the batches that it would have been.
    """
    rows = rows_of(kind, scorer)
    asked = asked_of(scorer, monkeypatch)
    whole = evaluate(scorer, rows, bar(rows), lambda: False)
    batches_of_whole = list(asked)
    del asked[:]
    first = PartialScores(tmp_path / NAME, scorer.model)
    with pytest.raises(Stopped):
        evaluate(scorer, rows, bar(rows), after(batches), part=first.part(ABOUT, "test", rows))
    before = list(asked)
    assert first.keep() > 0
    assert len(before) == batches
    assert any("generate" in of for of in before) == (batches == 6)
    again = PartialScores(tmp_path / NAME, scorer.model)
    part = again.part(ABOUT, "test", rows)
    assert same(evaluate(scorer, rows, bar(rows), lambda: False, part=part), whole)
    assert sorted(asked) == sorted(batches_of_whole)
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_go_on_too(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with the number of forwards of a run that was never stopped."""
    rows = rows_of("classification", scorer)
    asked = asked_of(scorer, monkeypatch)
    whole_part = Part(len(rows))
    whole = features(scorer, rows, lambda: False, whole_part)
    batches_of_whole = list(asked)
    with torch.inference_mode():
        assert torch.allclose(whole, scorer.features(rows).double(), rtol=0, atol=1e-5)
    del asked[:]
    first = PartialScores(tmp_path / NAME, scorer.model)
    with pytest.raises(Stopped):
        features(scorer, rows, after(2), first.part(ABOUT, "train", rows))
    first.part(ABOUT, "train", rows).seconds = 1.5
    first.keep()
    part = PartialScores(tmp_path / NAME, scorer.model).part(ABOUT, "train", rows)
    assert part.seconds == 1.5
    assert torch.equal(features(scorer, rows, lambda: False, part), whole)
    assert sorted(asked) == sorted(batches_of_whole)
    assert part.num_forwards == whole_part.num_forwards > 2


@pytest.fixture
def kept(scorer: Scorer, tmp_path: Path) -> tuple[Path, list[Candidates], set[int]]:
    """A file of a stopped evaluation, its rows, and the places of those that were scored."""
    rows, path = rows_of("choice", scorer), tmp_path / NAME
    first = PartialScores(path, scorer.model)
    part = first.part(ABOUT, "test", rows)
    with pytest.raises(Stopped):
        evaluate(scorer, rows, bar(rows), after(2), part=part)
    first.keep()
    assert 0 < len(part.scored) < len(rows)
    return path, rows, part.scored


def test_scores_are_of_these_weights_these_rows_and_these_settings_alone(
    kept: tuple[Path, list[Candidates], set[int]], scorer: Scorer
) -> None:
    """One weight moved by an ulp, another step, split or row: nothing is used."""
    path, rows, scored = kept

    def known(about: Any = ABOUT, split: str = "test", of: Sequence[Candidates] = rows) -> set[int]:
        return PartialScores(path, scorer.model).part(about, split, of).scored

    assert known() == scored
    assert known({"step": 4}) == set()
    assert known(split="dev") == set()
    assert known(of=rows[1:]) == set()
    assert known(of=[dataclasses.replace(rows[0], id="other"), *rows[1:]]) == set()
    assert known(of=[dataclasses.replace(rows[0], num_merged=1), *rows[1:]]) == set()
    weight = next(scorer.model.parameters()).detach().view(-1)
    was = weight[7].clone()
    weight[7] = torch.nextafter(was, torch.tensor(9.0))
    try:
        assert known() == set()
    finally:
        weight[7] = was
    assert known() == scored


def test_rows_in_another_order_are_found_by_what_they_are(
    kept: tuple[Path, list[Candidates], set[int]], scorer: Scorer
) -> None:
    """Not by their place; of two that are the same in all the first is the first."""
    path, rows, scored = kept
    turned = list(reversed(rows))
    part = PartialScores(path, scorer.model).part(ABOUT, "test", turned)
    assert {turned[i].id for i in part.scored} == {rows[i].id for i in scored}
    straight = PartialScores(path, scorer.model).part(ABOUT, "test", rows)
    assert isinstance(part.scores, Tensor)
    assert isinstance(straight.scores, Tensor)
    assert torch.equal(part.scores.flip(0), straight.scores)


@pytest.mark.parametrize("harm", ["cut", "flip", "score", "empty", "folder", "link"])
def test_a_damaged_file_is_not_used_and_made_again(
    harm: str, kept: tuple[Path, list[Candidates], set[int]], scorer: Scorer, tmp_path: Path
) -> None:
    path, rows, scored = kept
    content = bytearray(path.read_bytes())
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm in ("flip", "score"):  # in what the file says; in the first score
        at = -3 if harm == "flip" else 8 + int.from_bytes(content[:8], "little") + 2
        content[at] ^= 4
        path.write_bytes(content)
    elif harm == "empty":
        path.touch()
    elif harm == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    again = PartialScores(path, scorer.model)
    part = again.part(ABOUT, "test", rows)
    assert part.is_empty
    if harm == "folder":
        return
    with pytest.raises(Stopped):
        evaluate(scorer, rows, bar(rows), after(2), part=part)
    again.keep()
    assert not path.is_symlink()
    assert PartialScores(path, scorer.model).part(ABOUT, "test", rows).scored == scored


def test_what_a_second_stop_did_not_reach_stays_kept(scorer: Scorer, tmp_path: Path) -> None:
    """Two evaluations in the file; the next start is stopped in the first of them."""
    rows, other = rows_of("choice", scorer), rows_of("classification", scorer)
    first = PartialScores(tmp_path / NAME, scorer.model)
    for some, batches in ((rows, 1), (other, 2)):
        with pytest.raises(Stopped):
            evaluate(scorer, some, bar(some), after(batches), part=first.part(ABOUT, "test", some))
    first.keep()
    second = PartialScores(tmp_path / NAME, scorer.model)
    with pytest.raises(Stopped):
        evaluate(scorer, rows, bar(rows), after(1), part=second.part(ABOUT, "test", rows))
    second.keep()
    third = PartialScores(tmp_path / NAME, scorer.model)
    assert third.part(ABOUT, "test", other).scored == first.part(ABOUT, "test", other).scored
    assert len(third.part(ABOUT, "test", rows).scored) > len(first.part(ABOUT, "test", rows).scored)
