"""Claims about a mixture's evaluation: each part as alone, and the means over the parts."""

import math

import pytest
import torch

from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.mixture import MixedEvaluation

WEIGHTS = {"short": 0.25, "long": 0.75}


def rows(part: str, kind: str, labels: list[int], options: int) -> list[Candidates]:
    """Rows of so many candidates of two tokens, of which one is the candidate's."""
    full, words = tuple((1, k) for k in range(options)), tuple("abc"[:options])
    return [
        Candidates(
            *(full, (1,) * options, label, False, kind), id=f"{part}/{i}", part=part, words=words
        )
        for i, label in enumerate(labels)
    ]


def mixed(seed: int = 0) -> MixedEvaluation:
    """A classification of two labels, and a choice between three options."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "short": rows("short", "classification", [0, 1, 1, 0, 1], 2),
        "long": rows("long", "choice", [2, 0, 1, 1, 2, 0, 0], 3),
    }
    return MixedEvaluation.of(
        {
            name: Evaluation(of, torch.randn(len(of), len(of[0].full), generator=generator))
            for name, of in parts.items()
        },
        WEIGHTS,
    )


def test_each_part_is_evaluated_as_alone_and_the_metric_is_their_mean() -> None:
    """The mean over the parts, whatever their sizes; the loss by the weights of the training."""
    found = mixed()
    figures = found.figures()
    alone = {name: part.figures() for name, part in found.parts.items()}
    assert figures["parts"] == alone
    short, long = alone["short"], alone["long"]
    assert figures["accuracy"] == pytest.approx((short["accuracy"] + long["accuracy"]) / 2)
    assert figures["loss"] == pytest.approx(0.25 * short["loss"] + 0.75 * long["loss"])
    assert figures["n"] == 12
    errors = math.hypot(short["standard_error"], long["standard_error"])
    assert figures["standard_error"] == pytest.approx(errors / 2)
    by_row = sum(alone[name]["accuracy"] * len(found.parts[name].rows) for name in alone) / 12
    assert figures["accuracy"] != pytest.approx(by_row)  # else sizes would not matter here
    assert [line["part"] for line in found.predictions()] == ["short"] * 5 + ["long"] * 7
    assert found.predictions()[6] == {"part": "long", **found.parts["long"].predictions()[1]}


def test_rows_and_scores_of_the_whole_give_the_parts_again() -> None:
    """What is saved of dev is one table, wider than the scores of a part with fewer candidates."""
    found = mixed()
    assert found.scores.shape == (12, 3)
    assert found.scores[:5, 2].tolist() == [-math.inf] * 5
    again = mixed(seed=1).with_scores(found.rows, found.scores)
    assert again.figures() == found.figures()
    assert torch.equal(again.per_row(), found.per_row())
    assert torch.equal(found.per_row()[:5], found.parts["short"].per_row())


def test_label_offsets_are_those_of_the_parts_that_can_have_them() -> None:
    found = mixed()
    offsets = found.fit_offsets()
    assert list(offsets) == ["short"]
    own = found.parts["short"].fit_offsets()
    assert torch.equal(offsets["short"], own)
    calibrated = found.figures(offsets)
    assert calibrated["parts"]["short"] == found.parts["short"].figures(own)
    assert calibrated["parts"]["long"] == found.parts["long"].figures()
    assert calibrated["accuracy"] >= found.figures()["accuracy"]  # fitted on these rows
    alone = MixedEvaluation.of({"long": found.parts["long"]}, {"long": 1.0})
    assert alone.fit_offsets() is None


def test_a_gain_is_the_mean_of_the_gains_of_the_parts() -> None:
    ours, theirs = mixed(), mixed(seed=1)
    gain, error = ours.gain(theirs.per_row())
    own = [ours.parts[name].gain(theirs.parts[name].per_row()) for name in WEIGHTS]
    assert gain == pytest.approx((own[0][0] + own[1][0]) / 2)
    assert error == pytest.approx(math.hypot(own[0][1], own[1][1]) / 2)
    difference = ours.figures()["accuracy"] - theirs.figures()["accuracy"]
    assert gain == pytest.approx(difference)
    assert difference != 0
