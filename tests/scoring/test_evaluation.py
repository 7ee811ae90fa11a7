"""Figures and predictions of a split follow from the scores and texts of its rows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from smezo_cli.machine.stop import Stopped
from smezo_cli.models.load import load_model
from smezo_cli.run.console import Console
from smezo_cli.run.evaluate import evaluate
from smezo_cli.scoring import metrics
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import Prompt, Row
from tests import CONF

pytestmark = pytest.mark.usefixtures("one_thread")


def classified(label: int, classes: int = 2) -> Candidates:
    words = ("bad", "good", "so-so")[:classes]
    full = tuple((1, k) for k in range(classes))
    return Candidates(full, (1,) * classes, label, False, words=words, id=f"r{label}")


def chosen(label: int, right: Sequence[int], counts: Sequence[int]) -> Candidates:
    full = tuple((1, *range(n)) for n in counts)
    return Candidates(
        full,
        tuple(counts),
        label,
        False,
        "choice",
        right=frozenset(right),
        words=tuple(f"w{k}" for k in range(len(counts))),
        id=f"c{label}",
    )


def asked(*answers: str, count: int = 2) -> Candidates:
    full = ((1, *range(count)),) if answers else ()
    counts = (count,) if answers else ()
    return Candidates(full, counts, 0, False, "generation", answers=answers, context=(1,), id="q")


def test_classification_by_hand() -> None:
    """Three rows, two right; loss and predictions by hand; offsets move them."""
    scores = torch.tensor([[1.0, 3.0], [0.0, -1.0], [2.0, 0.0]])
    found = Evaluation([classified(1), classified(0), classified(1)], scores)
    figures = found.figures()
    assert found.metric == "accuracy"
    assert found.per_row().tolist() == [1, 1, 0]
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["standard_error"] == pytest.approx(math.sqrt(2 / 9 / 3))
    assert figures["n"] == 3
    loss = sum(math.log(1 + math.exp(-m)) for m in (2, 1, -2)) / 3
    assert figures["loss"] == pytest.approx(loss, abs=1e-12)
    assert figures["auc"] == 0.5  # margins 2 and -2 of the positives, -1 of the negative
    moved = found.figures(torch.tensor([0.0, 2.5]))
    assert moved["accuracy"] == pytest.approx(2 / 3)
    assert found.per_row(torch.tensor([0.0, 2.5])).tolist() == [1, 0, 1]
    assert moved["auc"] == figures["auc"]
    line = found.predictions()[2]
    assert line["scores"] == pytest.approx([-math.log(1 + math.exp(-2)), -2.126928], abs=1e-6)
    del line["scores"]
    assert line == {"id": "r1", "prediction": 0, "word": "bad", "label": 1, "correct": False}
    assert found.predictions(torch.tensor([0.0, 2.5]))[2]["word"] == "good"


def test_three_classes_have_no_auc() -> None:
    """The key stays, so that every line of a log has it."""
    assert Evaluation([classified(2, 3)], torch.tensor([[0.0, 0.0, 1.0]])).figures()["auc"] is None


def test_choice_by_hand() -> None:
    """Ragged scores; any right option counts; the loss is that of the gold option's tokens."""
    never = -math.inf
    scores = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, never], [-2.0, never, never]])
    rows = [chosen(0, {0, 2}, (4, 1, 2)), chosen(0, set(), (1, 5)), chosen(0, {0}, (2,))]
    found = Evaluation(rows, scores)
    figures = found.figures()
    assert found.per_row().tolist() == [1, 0, 1]
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["loss"] == pytest.approx((4 * 1 + 1 * 3 + 2 * 2) / 7, abs=1e-7)
    assert "auc" not in figures
    assert found.predictions()[:2] == [
        {"id": "c0", "prediction": 2, "word": "w2", "label": [0, 2], "correct": True}
        | {"scores": [-1.0, -2.0, -0.5]},
        {"id": "c0", "prediction": 1, "word": "w1", "label": [0], "correct": False}
        | {"scores": [-3.0, -1.0]},
    ]


def test_generation_by_hand() -> None:
    """F1 and exact match of the texts, the loss of the first answer's tokens."""
    rows = [asked("Denver Broncos", "x", count=3), asked("1999", count=1), asked("no", count=1)]
    texts = ["the Denver", "1999.", "yes"]
    found = Evaluation(rows, torch.tensor([[-1.0], [-3.0], [-2.0]]), texts)
    figures = found.figures()
    assert found.metric == "f1"
    assert found.per_row().tolist() == pytest.approx([2 / 3, 1, 0])
    assert figures["f1"] == pytest.approx(5 / 9)
    assert figures["exact_match"] == pytest.approx(1 / 3)
    assert figures["standard_error"] == metrics.standard_error(found.per_row())
    assert figures["loss"] == pytest.approx((3 + 3 + 2) / 5, abs=1e-7)
    assert "accuracy" not in figures
    assert found.predictions()[0] == {
        "id": "q",
        "prediction": "the Denver",
        "answers": ["Denver Broncos", "x"],
        "f1": pytest.approx(2 / 3),
        "exact_match": 0.0,
    }


def test_rows_without_labels_are_predicted_and_left_out_of_figures() -> None:
    """Of each kind; with no labelled row at all there are no figures."""
    some = Evaluation([classified(1), classified(-1)], torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert some.per_row().isnan().tolist() == [False, True]
    assert some.figures()["accuracy"] == 1
    assert some.figures()["n"] == 1
    line = some.predictions()[1]
    assert line["word"] == "good"
    assert line["label"] is None
    assert "correct" not in line
    found = Evaluation(
        [chosen(-1, set(), (2, 2)), chosen(1, {1}, (2, 3))], torch.tensor([[0.0, -1], [-2.0, -1]])
    )
    assert found.figures() == {"accuracy": 1, "standard_error": 0, "n": 1, "loss": 1}
    answers = Evaluation([asked(), asked("x")], torch.tensor([[-math.inf], [-1.0]]), ["y", "x"])
    assert answers.figures()["f1"] == answers.figures()["n"] == 1
    assert answers.predictions()[0] == {"id": "q", "prediction": "y", "answers": []}
    with pytest.raises(ValueError, match="no row has a label"):
        Evaluation([asked()], torch.tensor([[-math.inf]]), ["y"]).figures()


PROMPT = Prompt("{text}. It was", ("terrible bad", "great"))
KINDS = {
    "classification": [Row({"text": "the film " * n}, n % 2, f"{n}") for n in (1, 5, 3)],
    "choice": [
        Row({"text": "the film " * n}, 0, f"{n}", tuple("abcd"[:n]), frozenset({0}))
        for n in (1, 4, 3)
    ],
    "generation": [Row({"text": "the film " * n}, 0, f"{n}", answers=("dull",)) for n in (1, 5, 3)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_is_that_of_the_model_and_survives_a_file(kind: str, tmp_path: Path) -> None:
    """Scores in the order of the rows; the loss is the training loss; tensors and texts suffice."""
    cfg: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model/tiny-llama.yaml"))
    model, tokenizer = load_model(
        cfg, dtype=torch.float32, device=torch.device("cpu"), cache=Path("/nowhere")
    )
    rows = encode(KINDS[kind], PROMPT, tokenizer, 256, kind, 8)
    scorer = Scorer(model, tokenizer)
    model.train()
    found = evaluate(scorer, rows, Console().bar("test", len(rows)), lambda: False)
    assert not model.training
    with torch.no_grad():
        for i, row in enumerate(rows):
            alone = scorer.scores([row])[0]
            torch.testing.assert_close(found.scores[i, : len(alone)], alone, rtol=0, atol=3e-6)
            assert found.scores[i, len(row.full) :].isneginf().all()
        assert found.figures()["loss"] == pytest.approx(float(scorer.loss(rows)), abs=3e-6)
        if kind == "generation":
            assert list(found.texts) == [scorer.generate([row])[0] for row in rows]
    save_file({"test": found.scores}, tmp_path / "scores.safetensors")
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, found.texts)))
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    again = Evaluation(rows, load_file(tmp_path / "scores.safetensors")["test"], texts)
    assert again.figures() == found.figures()
    assert again.predictions() == found.predictions()
    assert json.loads(json.dumps(found.predictions(), allow_nan=False)) == found.predictions()


@pytest.mark.parametrize("batches", [0, 1])
def test_an_evaluation_stops_between_two_batches(batches: int) -> None:
    """While it scores, and while it lets the model answer."""
    cfg: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model/tiny-llama.yaml"))
    model, tokenizer = load_model(
        cfg, dtype=torch.float32, device=torch.device("cpu"), cache=Path("/nowhere")
    )
    rows = encode(KINDS["generation"], PROMPT, tokenizer, 256, "generation", 8)
    asked_for: list[int] = []

    def stopped() -> bool:
        asked_for.append(1)
        return len(asked_for) > batches

    with pytest.raises(Stopped):
        evaluate(Scorer(model, tokenizer), rows, Console().bar("test", len(rows)), stopped)
    assert len(asked_for) == batches + 1
