"""Accuracy, ranking, offsets and errors against the definitions, counted out row by row."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from smezo_cli.scoring import metrics


def draw(seed: int, n: int, classes: int, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores float32 (n, classes), of so many levels where ties are wanted, and labels."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, classes, generator=generator)
    if levels is not None:
        scores = torch.randint(levels, (n, classes), generator=generator).float() / 2
    labels = torch.randint(classes, (n,), generator=generator)
    labels[:classes] = torch.arange(classes)  # every class is there
    return scores, labels


def num_right(scores: Tensor, labels: Tensor) -> int:
    """Rows whose label has the highest score (the first of equals), one by one."""
    right = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        right += max(range(len(row)), key=lambda k: (row[k], -k)) == label
    return right


CASES = [(0, 40, None), (1, 40, 3), (2, 7, 2), (3, 100, 6), (4, 2, None)]


@pytest.mark.parametrize(("seed", "n", "levels"), CASES)
def test_auc_counts_the_pairs_in_the_right_order(seed: int, n: int, levels: int | None) -> None:
    """Of all pairs of a positive and a negative row: those ranked right, and half of the ties."""
    scores, labels = draw(seed, n, 2, levels)
    margin = (scores[:, 1] - scores[:, 0]).tolist()
    positive = [m for m, label in zip(margin, labels.tolist(), strict=True) if label == 1]
    negative = [m for m, label in zip(margin, labels.tolist(), strict=True) if label == 0]
    points = [(p > q) + (p == q) / 2 for p, q in itertools.product(positive, negative)]
    found = metrics.auc(scores, labels)
    # Sums of halves are exact; one division each.
    assert found == pytest.approx(sum(points) / len(points), abs=1e-15)
    if levels is not None and n > 7:
        assert 0.5 in points  # there were ties


def test_auc_does_not_see_a_moved_threshold_and_turns_with_the_labels() -> None:
    """An offset on one class leaves it; the other class as the positive one gives 1 - AUC."""
    scores, labels = draw(5, 50, 2)
    found = metrics.auc(scores, labels)
    assert found is not None
    assert metrics.auc(scores.double() + torch.tensor([0.0, 3.0]), labels) == found
    assert metrics.auc(scores, 1 - labels) == pytest.approx(1 - found, abs=1e-15)
    assert metrics.auc(torch.eye(2), torch.tensor([0, 1])) == 1


def test_auc_is_none_where_there_is_no_pair_or_no_single_ranking() -> None:
    """Three classes, or rows of one class alone, have no area."""
    assert metrics.auc(*draw(0, 20, 3)) is None
    assert metrics.auc(torch.randn(4, 2), torch.ones(4, dtype=torch.int64)) is None
    assert metrics.auc(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)) is None


@pytest.mark.parametrize(("seed", "n", "levels"), [*CASES, *((s, 30, 4) for s in range(10, 30))])
def test_two_classes_get_the_best_threshold(seed: int, n: int, levels: int | None) -> None:
    """No threshold on the margin, tried between and beyond all margins, is right more often."""
    scores, labels = draw(seed, n, 2, levels)
    gaps = sorted({float(a - b) for a, b in scores.double()})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(gaps)]
    offsets = [gaps[0] - 1, *middles, gaps[-1] + 1, *gaps]
    best = max(num_right(scores.double() + torch.tensor([0.0, t]), labels) for t in offsets)
    found = metrics.fit_offsets(scores, labels)
    assert found[0] == 0
    assert num_right(scores.double() + found, labels) == best


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(5))
def test_offsets_never_lose_to_none(seed: int, levels: int | None, classes: int) -> None:
    """On the rows that they are fitted on, ties included."""
    scores, labels = draw(seed, 60, classes, levels)
    scores[range(60), labels] += 1.0
    before = num_right(scores, labels)
    assert num_right(scores.double() + metrics.fit_offsets(scores, labels), labels) >= before


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("biased_class", [0, 1, -1])
@pytest.mark.parametrize("seed", range(3))
def test_a_bias_towards_one_class_is_taken_out(seed: int, biased_class: int, classes: int) -> None:
    """A model that always says one word is no worse, calibrated, than without that bias."""
    scores, labels = draw(seed, 60, classes)
    scores[range(60), labels] += 1.0
    unbiased = num_right(scores, labels)
    scores[:, biased_class] += 20
    assert num_right(scores, labels) < unbiased  # that class everywhere
    assert num_right(scores.double() + metrics.fit_offsets(scores, labels), labels) >= unbiased


def test_the_nearest_middle_of_equally_good_ranges_is_taken() -> None:
    """Where two ranges of offsets are right equally often, the one nearer to no offset wins."""
    # Class 1 wins a row where its offset is above the row's first score: -9, -1, 1.
    scores = torch.tensor([[-9.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    # Labels 1, 0, 1: right in two rows between -9 and -1 and beyond 1, elsewhere in one.
    assert metrics.fit_offsets(scores, torch.tensor([1, 0, 1])).tolist() == [0, 2]
    assert metrics.fit_offsets(-scores, torch.tensor([0, 1, 0])).tolist() == [0, -2]
    # Labels 1, 1, 0: right in all between -1 and 1, the middle of which is no offset at all.
    assert metrics.fit_offsets(scores, torch.tensor([1, 1, 0])).tolist() == [0, 0]
    # No offset would do as well, and is in no middle: -9 and 3 have theirs at -3.
    scores = torch.tensor([[-9.0, 0.0], [3.0, 0.0]])
    assert metrics.fit_offsets(scores, torch.tensor([1, 0])).tolist() == [0, -3]


def test_a_paired_gain_is_that_of_the_written_out_table() -> None:
    """Of 10 rows 4 are gained, 1 is lost, 5 are alike: gain 0.3 and its error, by hand."""
    ours = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 0, 0])
    theirs = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0])
    gain, error = metrics.paired_gain(ours, theirs)
    assert gain == pytest.approx(0.3, abs=1e-15)
    assert error == pytest.approx(math.sqrt((4 * 0.49 + 1.69 + 5 * 0.09) / 10 / 10), abs=1e-15)
    assert metrics.paired_gain(ours == 1, theirs == 1) == (gain, error)
    assert metrics.paired_gain(ours, ours) == (0, 0)


def test_a_paired_gain_of_f1_is_that_of_its_differences() -> None:
    """Any figure of a row will do: differences 0.5, 0, -0.25, 1."""
    ours, theirs = torch.tensor([0.5, 1, 0.25, 1]), torch.tensor([0, 1, 0.5, 0])
    gain, error = metrics.paired_gain(ours, theirs)
    assert gain == 1.25 / 4
    squares = sum((d - gain) ** 2 for d in (0.5, 0, -0.25, 1))
    assert error == pytest.approx(math.sqrt(squares / 4 / 4), abs=1e-15)


def test_several_candidates_may_be_right() -> None:
    """The best scored candidate (the first of equals) is looked up among those that count."""
    never = -math.inf
    scores = torch.tensor([[1, 2, 0], [1, 1, never], [0, never, never], [3, 1, 2]])
    right = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]]) == 1
    assert metrics.correct(scores, right).tolist() == [True, False, True, False]
    assert metrics.accuracy(scores, right) == 0.5
    assert metrics.correct(scores, torch.tensor([1, 0, 0, 2])).tolist() == [True, True, True, False]


@pytest.mark.parametrize("classes", [2, 3])
def test_accuracy_and_cross_entropy_are_their_definitions(classes: int) -> None:
    """Shares of right rows; mean of log(sum of exp) - score, in float64."""
    scores, labels = draw(6, 31, classes, 3)
    assert metrics.accuracy(scores, labels) == num_right(scores, labels) / 31
    losses = [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    # float64 all through: 31 terms of size 1.
    assert metrics.cross_entropy(scores, labels) == pytest.approx(sum(losses) / 31, abs=1e-14)


def test_the_standard_error_is_the_spread_of_an_accuracy() -> None:
    """sqrt(p (1 - p) / n), and what 20,000 drawn accuracies of 50 rows at p = 0.8 really spread."""
    right = torch.tensor([1] * 40 + [0] * 10) == 1
    found = metrics.standard_error(right)
    assert found == pytest.approx(math.sqrt(0.8 * 0.2 / 50), abs=1e-16)
    assert metrics.standard_error(torch.ones(50)) == metrics.standard_error(torch.zeros(50)) == 0
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.rand(20_000, 50, generator=generator) < 0.8).double().mean(1)
    # The spread of 20,000 draws is itself known to 1 / sqrt(2 * 20,000) = 0.5 %; four times that.
    assert found == pytest.approx(float(drawn.std()), rel=0.02)
