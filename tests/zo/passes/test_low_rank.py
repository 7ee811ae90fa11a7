"""Passes along a product of thin matrices: the documented sum, eager or by Numba, the same bits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smezo_cli.zo.passes.draw import Draw, Numbers, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.passes.low_rank import (
    EagerLowRank,
    Factors,
    LowRankPasses,
    NumbaLowRank,
    product,
)
from smezo_cli.zo.selections.masks import RULES
from tests.zo.passes.scales import weight_of
from tests.zo.passes.test_passes import BF16, DTYPES, F16, F32, draw_of, same

pytestmark = pytest.mark.usefixtures("one_thread")

# Up to 4 products are one sum; 8 and 13 go through the cache. Columns cross a part of 1,024.
SHAPES = [(1, 1), (5, 7), (8, 33), (3, 1030), (67, 2)]
RANKS = [2, 3, 8, 13]


def factors_of(shape: tuple[int, int], rank: int, scale: float = 0.05) -> Factors:
    g = torch.Generator().manual_seed(rank)
    left = torch.randn(shape[0], rank, generator=g) * scale
    return Factors(left, torch.randn(rank, shape[1], generator=g))


def form(worker: LowRankPasses, draw: Draw) -> Any:
    return Numbers.of(draw) if worker.reads_numbers else draw


def moved_by(worker: LowRankPasses, weight: Tensor, factors: Factors, draw: Draw) -> Tensor:
    out = torch.full_like(weight, math.nan)
    worker.move(weight, out, factors, form(worker, draw))
    return out


@pytest.mark.parametrize("rank", RANKS)
def test_a_product_is_a_sum_in_order_each_operation_rounded_once(rank: int) -> None:
    """By NumPy's scalars, one after the other."""
    left, right = factors = factors_of((4, 6), rank)
    wanted = torch.empty(4, 6)
    for i in range(4):
        for j in range(6):
            total = np.float32(left[i, 0]) * np.float32(right[0, j])
            for k in range(1, rank):
                total = total + np.float32(left[i, k]) * np.float32(right[k, j])
            assert total.dtype == np.float32
            wanted[i, j] = float(total)
    assert same(product(factors), wanted)
    assert same(NumbaLowRank(Rule()).product(factors), wanted)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("mask", RULES)
def test_a_pass_is_the_documented_formula(mask: str, decay: bool) -> None:
    """where(mask, w + left right - d w, w), with the masks of dense passes."""
    rule = Rule(mask)
    draw = draw_of(rule, decay=decay)
    for dtype in DTYPES:
        for shape in SHAPES:
            factors, weight = factors_of(shape, 3), weight_of(math.prod(shape), dtype)
            step, w = product(factors).view(-1), weight.float()
            if decay:
                assert draw.decay is not None
                step = step - draw.decay * w
            active = EagerPasses(rule).mask_of(weight, draw)
            wanted = torch.where(active, (w + step).to(dtype), weight)
            assert same(moved_by(EagerLowRank(rule), weight, factors, draw), wanted)


# Each is compiled, which takes a second or two.
COMPILED = [
    (F32, Rule("small"), False, 2),
    (F32, Rule("random"), True, 8),
    (BF16, Rule("small"), True, 5),
    (BF16, Rule("large", stochastic=True), False, 2),
    (F16, Rule("random", stochastic=True), True, 2),
]


@pytest.mark.parametrize(("dtype", "rule", "decay", "rank"), COMPILED, ids=str)
def test_numba_gives_the_bits_of_torch(
    dtype: torch.dtype, rule: Rule, decay: bool, rank: int
) -> None:
    eager, numba = EagerLowRank(rule), NumbaLowRank(rule)
    draw = draw_of(rule, decay=decay)
    for shape in SHAPES:
        factors, weight = factors_of(shape, rank), weight_of(math.prod(shape), dtype)
        wanted = moved_by(eager, weight, factors, draw)
        assert same(moved_by(numba, weight, factors, draw), wanted)
        for worker in (eager, numba):
            written = weight.clone()
            worker.move(written, written, factors, form(worker, draw))
            assert same(written, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [EagerLowRank, NumbaLowRank])
def test_both_ways_are_two_passes(kind: type[LowRankPasses], dtype: torch.dtype) -> None:
    rule, rank = Rule("small"), 5 if dtype == BF16 else 2
    worker, eager, draw = kind(rule), EagerLowRank(rule), draw_of(rule)
    factors, weight = factors_of((8, 33), rank), weight_of(8 * 33, dtype)
    plus, minus = torch.empty_like(weight), torch.empty_like(weight)
    worker.move_both(weight, plus, minus, factors, form(worker, draw))
    assert same(plus, moved_by(eager, weight, factors, draw))
    assert same(minus, moved_by(eager, weight, factors.negated(), draw))
    assert not same(plus, minus)


@pytest.mark.parametrize(("dtype", "rule", "decay", "rank"), COMPILED, ids=str)
def test_threads_share_the_rows(dtype: torch.dtype, rule: Rule, decay: bool, rank: int) -> None:
    """One, two or five threads write the same bits; 401 rows are shared unevenly."""
    draw, shape = draw_of(rule, decay=decay), (401, 523)
    factors, weight = factors_of(shape, rank), weight_of(math.prod(shape), dtype)
    wanted = moved_by(EagerLowRank(rule), weight, factors, draw)
    for threads in (2, 5):
        torch.set_num_threads(threads)  # put back by the fixture
        for worker in (EagerLowRank(rule), NumbaLowRank(rule)):
            assert same(moved_by(worker, weight, factors, draw), wanted)
            assert same(worker.product(factors), product(factors))


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_picked_entries_move_as_in_the_whole_pass(stochastic: bool) -> None:
    rule = Rule("random", stochastic=stochastic)
    draw, factors = draw_of(rule, decay=True), factors_of((9, 31), 3)
    for dtype in DTYPES:
        weight = weight_of(9 * 31, dtype)
        whole = moved_by(EagerLowRank(rule), weight, factors, draw)
        index = torch.randperm(9 * 31, generator=torch.Generator().manual_seed(1))
        moved = EagerLowRank(rule).move_at(weight[index], index, 9 * 31, factors, draw)
        assert same(moved, whole[index])


@pytest.mark.parametrize("kind", [EagerLowRank, NumbaLowRank])
def test_rows_of_a_product_are_the_product_of_rows(kind: type[LowRankPasses]) -> None:
    rule = Rule("small")
    worker, draw, factors = kind(rule), draw_of(rule), factors_of((9, 31), 2)
    weight = weight_of(9 * 31, F32)
    whole = moved_by(worker, weight, factors, draw).view(9, 31)
    rows = torch.tensor([7, 0, 3])
    picked = weight.view(9, 31)[rows].reshape(-1)
    assert same(moved_by(worker, picked, factors.rows(rows), draw).view(3, 31), whole[rows])


def test_float16_in_several_chunks_has_the_bits_of_one() -> None:
    """Chunks know where they lie: rounding by chance is keyed by the place in the whole matrix."""
    rule = Rule("random", stochastic=True)
    draw, factors = draw_of(rule, decay=True), factors_of((150, 1000), 2)
    weight = weight_of(150_000, F16)
    index = torch.arange(150_000)
    wanted = EagerLowRank(rule).move_at(weight, index, 150_000, factors, draw)
    for worker in (EagerLowRank(rule), NumbaLowRank(rule)):
        assert same(moved_by(worker, weight, factors, draw), wanted)
