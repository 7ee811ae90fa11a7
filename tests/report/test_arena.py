"""The table of the arena: every method that fits, with the forwards and trials of all others."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from smezo_cli.config.build import build
from smezo_cli.config.compose import compose
from smezo_cli.config.fixed import CONF_DIR, plain
from smezo_cli.plan import losses
from smezo_cli.report.table import Line, load
from tests.scripts_loaded import script

FORWARDS = 2000
# Several tasks; at most 100,000 weights; keys and values in every block; adapters of any kind.
LEFT_OUT = {"mazo", "zoro_fa", "cubic_newton", "mezo_prefix", "mezo_peft"}
# Backpropagation counts as two more.
OF_FIRST_ORDER = dict.fromkeys(("adamw", "sgd", "lora"), 3)
# What docs/guide/methods.md, which counts the first steps, does not tell: steps of several kinds,
# losses over other rows than those of the batch, backpropagation, and blocks.
SUMMED = {"adazeta", "addax", "dizo", "elasticzo", "mezo_svrg", "zo_block"}


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


def forwards_of(row: Line, steps: str) -> float:
    """The forwards of so many steps in units of 8 rows; two layers stand for the two blocks."""
    table = load("arena/1")
    words = table.words(row, table.columns[0])
    assert words is not None
    kept = [word for word in words if not word.startswith("steps=")]
    cfg = plain(compose([*kept, f"steps={steps}"]))
    node = {k: v for k, v in cfg["method"].items() if k not in ("adapter", "layers")}
    node |= {"project": ["*"]} if "project" in node else {}  # no tensor here has keys or values
    method = build(node, "method", model=script("methods_page").Two(), seed=0, check=False)
    counts = dict(losses.forwards_by_loss(method, cfg["steps"]))
    if method.tail is not None:
        counts[method.tail.objective] += 2 * cfg["steps"]
    rows = {name: node.get(f"{name}_rows") for name in ("full", "long", "short")}
    rows["batch"] = cfg["batch_size"]
    return float(sum(number * rows[name] for name, number in counts.items()) / 8)


def test_every_zeroth_order_method_that_fits_is_a_row() -> None:
    rows = {settings(row)["method"] for row in load("arena/1").rows}
    assert rows >= set(costs()) - LEFT_OUT
    assert not rows & LEFT_OUT


@pytest.mark.parametrize(
    "row", [*load("arena/1").rows, *load("arena/2").rows], ids=lambda row: row.name
)
def test_a_row_has_the_forwards_and_the_trials_of_every_other(row: Line) -> None:
    given = settings(row)
    search = dict(word.partition("=")[::2] for word in row.search)
    method, steps = given["method"], int(given["steps"])
    if method in SUMMED:
        assert 0.99 * FORWARDS <= forwards_of(row, given["steps"]) <= FORWARDS
        assert 0.19 * FORWARDS <= forwards_of(row, search["steps"]) <= 0.2 * FORWARDS
    else:
        of_step = OF_FIRST_ORDER.get(method) or int(costs()[method]["forwards"])
        assert FORWARDS - of_step < steps * of_step <= FORWARDS
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
