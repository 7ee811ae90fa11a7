"""The table of the arena: every method that fits, with the forwards and trials of all others."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.report.table import Line, load

FORWARDS = 2000
# Several tasks; at most 100,000 weights; keys and values in every block; adapters of any kind.
LEFT_OUT = {"mazo", "zoro_fa", "cubic_newton", "mezo_prefix", "mezo_peft"}
# Backpropagation counts as two more; what else a step does besides its probes.
OF_FIRST_ORDER = dict.fromkeys(("adamw", "sgd", "lora"), 3)
# What docs/guide/methods.md, which counts the first steps, does not tell: an anchor of two passes
# over 64 rows and a step of two probes at both points, in turns; 20 forwards of a projection in 50
# steps; the two blocks of these beds.
ON_AVERAGE = {"mezo_svrg": (16 + 4) / 2, "dizo": 2 + 20 / 50, "zo_block": 2 * 2}


def settings(row: Line) -> dict[str, str]:
    """The words of a row by their keys."""
    assert row.command is not None
    return dict(word.partition("=")[::2] for word in row.command)


def costs() -> dict[str, Any]:
    """What docs/guide/methods.md says of each method."""
    folder = CONF_DIR.parent / "smezo_cli" / "cli"
    methods = json.loads((folder / "method_costs.json").read_text())["methods"]
    assert isinstance(methods, dict)
    return methods


def test_every_zeroth_order_method_that_fits_is_a_row() -> None:
    rows = {settings(row)["method"] for row in load("arena/1").rows}
    assert rows >= set(costs()) - LEFT_OUT
    assert not rows & LEFT_OUT


@pytest.mark.parametrize(
    "row", [*load("arena/1").rows, *load("arena/2").rows], ids=lambda row: row.name
)
def test_a_row_has_the_forwards_and_the_trials_of_every_other(row: Line) -> None:
    given = settings(row)
    method = given["method"]
    known = OF_FIRST_ORDER | ON_AVERAGE
    of_step = known.get(method) or int(str(costs()[method]["forwards"]).split(",")[0])
    steps = int(given["steps"])
    assert FORWARDS - of_step < steps * of_step <= FORWARDS
    search = dict(word.partition("=")[::2] for word in row.search)
    assert set(search) == {"steps", "eval_every", "task.num_test", "lr"}
    assert int(search["steps"]) == max(1, steps // 5)
    lrs = [float(lr) for lr in search["lr"].split(",")]
    assert len(lrs) == 5
    ratios = [b / a for a, b in itertools.pairwise(lrs)]
    assert all(2.9 < ratio < 3.4 for ratio in ratios)
    # As many evaluations of dev, from which the tested step is chosen.
    assert -(-steps // int(given["eval_every"])) == 4
    assert search["eval_every"] == search["steps"]


def test_rows_of_one_name_are_the_same_runs_in_both_tables() -> None:
    """So that a run fills both."""
    one, two = load("arena/1"), load("arena/2")
    assert (one.columns, one.seeds, one.common) == (two.columns, two.seeds, two.common)
    rows = {row.name: replace(row, claim="") for row in one.rows}
    both = [row for row in two.rows if row.name in rows]
    assert len(both) == 4
    assert all(row == rows[row.name] for row in both)
