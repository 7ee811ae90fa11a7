"""Claims about the order of rows: a function of (seed, step), and of each class its share."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch

from smezo_cli.run.batches import Batches


@dataclass(frozen=True)
class Row:
    label: int


def rows_of(*counts: int) -> list[Any]:
    return [Row(label) for label, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("order", ["shuffled", "stratified"])
@pytest.mark.parametrize("counts", [(7, 4), (10,), (5, 1, 9), (16, 16)])
def test_an_epoch_has_every_row_once_and_the_next_in_another_order(
    order: str, counts: tuple[int, ...]
) -> None:
    rows = rows_of(*counts)
    batches = Batches(rows, 1, seed=3, order=order)
    epochs = [[batches(e * len(rows) + k)[0] for k in range(len(rows))] for e in range(3)]
    assert all(sorted(epoch) == list(range(len(rows))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("order", ["shuffled", "stratified"])
def test_a_batch_is_that_of_its_seed_and_step_whatever_was_asked_before(order: str) -> None:
    rows = rows_of(31, 22)
    one = Batches(rows, 8, seed=1, order=order)
    in_turn = [one(step) for step in range(30)]
    for step in (29, 0, 17):
        assert Batches(rows, 8, seed=1, order=order)(step) == in_turn[step]
    assert Batches(rows, 8, seed=2, order=order)(0) != in_turn[0]


@pytest.mark.parametrize("counts", [(1000, 1000), (1562, 438), (300, 900, 150), (1990, 10)])
@pytest.mark.parametrize("seed", range(5))
def test_a_stratified_batch_has_of_each_class_its_share(counts: tuple[int, ...], seed: int) -> None:
    """Within one row for two classes, two for three, inside an epoch; shuffled, no such thing.

    Keys of a class are 1/n apart, so an interval of length t holds t n of them give or take one;
    the batch's own bounds move t by at most one row more for each class beyond the second.
    """
    rows, size = rows_of(*counts), 16
    farthest = {}
    for order in ("stratified", "shuffled"):
        batches = Batches(rows, size, seed, order)
        farthest[order] = max(
            abs(Counter(rows[i].label for i in batches(step))[label] - size * n / len(rows))
            for step in range(len(rows) // size)
            for label, n in enumerate(counts)
        )
    assert farthest["stratified"] <= len(counts) - 1
    if min(counts) > 100:
        assert farthest["shuffled"] > len(counts)


def test_stratified_batches_spread_less_and_their_mean_is_the_same() -> None:
    """Of a quantity that is mostly the class: the mean over an epoch is that of the rows."""
    rows = rows_of(320, 320)
    noise = torch.randn(640, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.tensor([2.0 * row.label - 1 for row in rows], dtype=torch.float64) + noise
    means = {
        order: torch.stack([value[Batches(rows, 16, 0, order)(step)].mean() for step in range(40)])
        for order in ("shuffled", "stratified")
    }
    for mean in means.values():
        torch.testing.assert_close(mean.mean(), value.mean(), rtol=0, atol=1e-12)
    # 1/16 of the rows' variance, 2 and 1; each estimate of 40 batches is within a factor of 1.7.
    assert 1.7**-1 < means["shuffled"].var() * 16 / 2 < 1.7
    assert 1.7**-1 < means["stratified"].var() * 16 < 1.7


def test_other_labels_of_the_same_rows_give_another_order() -> None:
    rows = rows_of(8, 8)
    turned = [cast(Any, Row(k % 2)) for k in range(16)]
    assert Batches(rows, 4, 0, "stratified")(0) != Batches(turned, 4, 0, "stratified")(0)
    assert Batches(rows, 4, 0)(0) == Batches(turned, 4, 0)(0)
