"""Passes along noise that comes again: by rows of a period, bit for bit as looked up."""

import math

import pytest
import torch
from torch import Tensor

from smezo_cli.zo.passes.by_index import PassesByIndex
from smezo_cli.zo.passes.choose import choose_looked_up
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import chunk_size
from smezo_cli.zo.passes.in_periods import PeriodicPasses
from tests.zo.passes.scales import weight_of
from tests.zo.passes.test_passes import F16, F32, draw_of, moved_by, same

pytestmark = pytest.mark.usefixtures("one_thread")

PERIOD = 31
POOL = torch.randn(2 * PERIOD, generator=torch.Generator().manual_seed(0))[:PERIOD].repeat(2)
CPU = torch.device("cpu")


def values(index: Tensor, key: Tensor) -> Tensor:
    return POOL[(index + key[0] + key[1]) % PERIOD]


def period(key: tuple[int, int]) -> Tensor:
    start = sum(key) % PERIOD
    return POOL[start : start + PERIOD]


def small_keys(draw: Draw) -> Draw:
    """Keys that are places, as those of a pool: their sum does not leave int64."""
    return draw._replace(keys=draw.keys % 1000)


# Each is compiled, which takes seconds; tests/zo/passes/test_low_rank.py has the same loops.
@pytest.mark.parametrize(
    ("dtype", "rule", "decay"),
    [(F32, Rule("small"), False), (F16, Rule("random", stochastic=True), True)],
    ids=str,
)
def test_fused_passes_have_the_bits_of_looked_up_ones(
    dtype: torch.dtype, rule: Rule, decay: bool
) -> None:
    """Less than a period, whole ones, and a rest, whose masks and roundings go by its place."""
    eager, worker = PassesByIndex(rule, values), PeriodicPasses(rule, values, period)
    draw = small_keys(draw_of(rule, 2, decay=decay))
    for numel in (1, PERIOD - 1, PERIOD, 3 * PERIOD, 7 * PERIOD + 5):
        weight = weight_of(numel, dtype)
        wanted = moved_by(eager, weight, draw)
        assert same(moved_by(worker, weight, draw), wanted)
        written = weight.clone()
        worker.move(written, written, draw)
        assert same(written, wanted)
        index = torch.arange(numel)
        assert same(worker.move_at(weight, index, numel, draw), wanted)
        plus, minus = (torch.full_like(weight, math.nan) for _ in range(2))
        plain = draw._replace(decay=None)
        worker.move_both(weight, plus, minus, plain)
        back = plain._replace(coefficients=-draw.coefficients)
        nearest = PassesByIndex(Rule(rule.mask), values)
        assert same(plus, moved_by(nearest, weight, plain))
        assert same(minus, moved_by(nearest, weight, back))


@pytest.mark.parametrize("mask", ["small", "random"])
def test_noise_that_is_kept_is_looked_up_part_by_part(mask: str) -> None:
    """So that whole places of a tensor, 8 bytes each, are at no time in memory."""
    sizes: list[int] = []

    def counted(index: Tensor, key: Tensor) -> Tensor:
        sizes.append(index.numel())
        return values(index, key)

    passes = PassesByIndex(Rule(mask), counted)
    weight, draw = weight_of(70_001, F16), small_keys(draw_of(passes.rule))
    z, active = passes.noise_and_mask(weight, draw)
    assert max(sizes) == chunk_size(CPU) < weight.numel()
    assert same(z, values(torch.arange(weight.numel()), draw.keys[0]))
    assert torch.equal(active, passes.mask_of(weight, draw))


def test_noise_without_a_period_is_looked_up_and_says_so_where_that_was_not_asked_for() -> None:
    for backend, said in (("auto", ""), ("compiled", "numbers of a pool are looked up")):
        passes, why = choose_looked_up(Rule(), values, None, backend, CPU)
        assert passes.name == "eager"
        assert why.startswith(said)
        assert bool(why) == bool(said)
