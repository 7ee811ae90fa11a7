"""The learning rate over a run."""

import itertools
import math

import pytest

from smezo_cli.zo.schedule import SCHEDULES, lr_factor


def test_constant_is_one_throughout() -> None:
    assert {lr_factor("constant", step, 50) for step in range(50)} == {1.0}


def test_linear_falls_by_equal_steps_and_ends_one_step_above_zero() -> None:
    factors = [lr_factor("linear", step, 4) for step in range(4)]
    assert factors == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_down_in_the_middle_and_steepest_there() -> None:
    factors = [lr_factor("cosine", step, 100) for step in range(100)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(0.5)
    assert factors[25] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    falls = [a - b for a, b in itertools.pairwise(factors)]
    assert min(falls) > 0
    assert falls.index(max(falls)) in (49, 50)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_warm_up_rises_evenly_from_above_zero_and_the_schedule_spans_the_rest(
    schedule: str,
) -> None:
    factors = [lr_factor(schedule, step, 14, warmup_steps=4) for step in range(14)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4:] == [lr_factor(schedule, step, 10) for step in range(10)]
