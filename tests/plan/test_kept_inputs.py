"""What a plan reckons for inputs of the first trained block that are kept."""

from typing import Any

import pytest

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.plan.planner import KEPT, Plan, plan
from tests.run.tiny_runs import SMALL

FROZEN = ["method.freeze=['*embed*','model.layers.0.*']"]
TOKENS = 60
# 32 numbers of 4 bytes a token; 32 rows of train, 16 of dev and 24 of test.
MOST = 32 * 4 * (32 + 16 + 24) * TOKENS


def planned(*words: str, capacity: int = 8 << 30, **keywords: Any) -> Plan:
    given = [*SMALL, "model=tiny-llama", "method=mezo", "lr=1e-3", *words]
    return plan(check(compose(given)), capacity=capacity, tokens=TOKENS, **keywords)


@pytest.mark.parametrize("how", ["true", "auto"])
def test_what_is_kept_is_held_all_the_time_and_fewer_blocks_are_computed(how: str) -> None:
    whole, kept = planned(*FROZEN), planned(*FROZEN, f"keep_inputs={how}")
    assert kept.resident[KEPT] == MOST
    assert kept.peak == whole.peak + MOST
    assert kept.disk_peak == whole.disk_peak
    assert kept.work == whole.work | {"blocks in each, of 2": 1}
    assert any("begin at block 1 of 2" in line for line in kept.assumptions)


def test_what_the_memory_does_not_hold_lies_on_the_disk() -> None:
    whole = planned(*FROZEN)
    # A quarter of what is left is a third of what is to be kept.
    held = sum(whole.resident.values())
    kept = planned(*FROZEN, "keep_inputs=true", capacity=held + 4 * (MOST // 3))
    assert kept.resident[KEPT] == MOST // 3
    assert kept.disk_peak == whole.disk_peak + MOST - MOST // 3
    assert kept.disk == whole.disk  # nothing is left of it


def test_on_cuda_it_lies_on_the_host() -> None:
    words = [word for word in SMALL if word != "device=cpu"]
    given = [*words, "model=tiny-llama", "method=mezo", "lr=1e-3", "device=cuda", *FROZEN]
    whole, kept = (
        plan(check(compose([*given, f"keep_inputs={how}"])), capacity=8 << 30, tokens=TOKENS)
        for how in ("false", "true")
    )
    assert kept.host == whole.host + MOST
    assert kept.peak == whole.peak


@pytest.mark.parametrize("share", [8, 1])
def test_the_parts_of_a_mixture_share_one_store(share: int) -> None:
    """A quarter of what is free holds the rows of all parts, not a quarter for each."""
    parts = "task.parts=[{task: toy, name: a},{task: toy, name: b},{task: toy, name: c}]"
    words = ["task=mixture", parts, *FROZEN]
    words = [*(w for w in SMALL if not w.startswith("task")), *words, "task.num_train=32"]
    given = [*words, "task.num_dev=16", "task.num_test=24", "model=tiny-llama", "method=mezo"]

    def of(how: str, capacity: int) -> Plan:
        cfg = compose([*given, "lr=1e-3", f"keep_inputs={how}"])
        return plan(check(cfg), capacity=capacity, tokens=TOKENS)

    whole = of("false", 8 << 30)
    free = 4 * MOST * 3 * share // 8
    kept = of("true", sum(whole.resident.values()) + free)
    assert kept.resident[KEPT] == MOST * 3 * share // 8
    assert kept.disk_peak == whole.disk_peak + MOST * 3 - kept.resident[KEPT]


def test_test_rows_are_counted_where_they_are_scored_twice() -> None:
    once = planned(*FROZEN, "keep_inputs=true", "zero_shot=false")
    assert once.resident[KEPT] == 32 * 4 * (32 + 16) * TOKENS
    unknown = planned(*FROZEN, "keep_inputs=true", "task.num_test=null")
    assert unknown.resident[KEPT] == once.resident[KEPT]
    assert any("test rows not counted as task.num_test is null" in x for x in unknown.assumptions)
    assert not any("task.num_test is null" in line for line in once.assumptions)


def test_a_number_of_rows_that_is_not_known_is_not_made_up() -> None:
    kept = planned(*FROZEN, "keep_inputs=true", "task.num_train=null")
    assert KEPT not in kept.resident
    assert any("128 bytes a token) is not counted" in line for line in kept.assumptions)


def test_where_all_is_trained_a_plan_says_what_a_run_says() -> None:
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is trained, and all blocks"):
        planned("keep_inputs=true")
    assert planned("keep_inputs=auto").resident == planned().resident
