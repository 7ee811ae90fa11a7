"""scripts/arena_page.py: the tables of the arena and the order of `smezo choose`, from cells."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from smezo_cli.report.cells import Cell, subtract
from smezo_cli.report.runs import Run
from smezo_cli.report.table import Table, load
from tests.scripts_loaded import script as load_script


@pytest.fixture
def page() -> ModuleType:
    return load_script("arena_page")


def run_of(
    method: str,
    right: int,
    *,
    lr: float = 1e-3,
    loss: float = 0.5,
    peak: int = 100,
    seconds: float = 10.0,
    seed: int = 1,
) -> Run:
    """A run that has `right` of 10 test rows right, and evaluations at steps 500 and 1,500."""
    outcomes = np.array([1.0] * right + [0.0] * (10 - right))
    result: dict[str, Any] = {
        **{"method": method, "lr": lr, "steps": 1500, "num_forwards": 3000, "metric": "accuracy"},
        **{"test": {"accuracy": right / 10, "n": 10}, "test_rows": "same"},
        **{"dev": {"best": {"loss": loss, "accuracy": 0.7}}, "peak_memory_bytes": peak},
        **{"train_seconds": seconds, "seed": seed, "step": 1500},
    }
    return Run(Path("x.json"), result, {}, ((500, 0.6), (1500, 0.7)), outcomes)


def cell_of(table: Table, name: str, runs: list[Run], lrs: dict[float, float]) -> Cell:
    """The cell of a row on the first bed: its runs, and the dev loss of the trial of each lr."""
    row = next(row for row in table.rows if row.name == name)
    method = runs[0].result["method"]
    chosen = min(lrs, key=lambda lr: lrs[lr])
    return Cell(
        row,
        table.columns[0],
        None,
        values=[100 * run.result["test"]["accuracy"] for run in runs],
        runs=runs,
        searched=[run_of(method, 5, lr=lr, loss=loss) for lr, loss in lrs.items()],
        setting=f"lr={chosen}",
    )


def test_a_bed_is_told_row_by_row_and_choose_gets_the_differences(page: ModuleType) -> None:
    table = load("arena/1")
    cells = [
        cell_of(
            table, "MeZO", [run_of("mezo", 6), run_of("mezo", 8, seed=2)], {1e-4: 0.6, 1e-3: 0.59}
        ),
        cell_of(
            table,
            "AdaMeZO",
            [run_of("adamezo", 9, peak=150, seconds=t, seed=k) for k, t in ((1, 12.0), (2, 20.0))],
            {1e-4: 0.7, 3e-4: 0.5, 1e-3: 0.51},
        ),
        # A second row of a method that has a plainer one.
        cell_of(table, "R-MeZO 0.75", [run_of("sparse_mezo", 5)], {1e-4: 0.5}),
    ]
    assert subtract(cells, "MeZO") == []
    (over_rows,) = (cell.less[1] for cell in cells if cell.row.name == "AdaMeZO" and cell.less)
    page.widen(cells)
    head, _, first, second, third = page.bed(cells)
    assert head.startswith("| row | accuracy | less MeZO | lr | plateau |")
    texts = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (first, second, third)]
    assert [row[:2] for row in texts] == [
        ["AdaMeZO", "90.0 (0.0), 2"],
        ["MeZO", "70.0 (14.1), 2"],
        ["R-MeZO 0.75", "50.0, 1"],
    ]
    assert texts[1][2] == ""
    # 14.1 points of standard deviation over two seeds of MeZO, none over those of AdaMeZO.
    assert texts[0][2] == f"+20.0 +- {math.hypot(over_rows, 14.142 / 2**0.5):.1f}"
    assert [row[3] for row in texts] == ["0.0003", ">0.001", "0.0001"]
    assert [row[4] for row in texts] == ["2 of 3", "2 of 2", "1 of 1"]
    # AdaMeZO takes a fifth longer, so that only its first evaluation is left.
    assert [row[5] for row in texts] == ["1.20", "1.00", "1.00"]
    assert [row[6] for row in texts[:2]] == ["60.0", ""]
    assert [row[7] for row in texts[:2]] == ["1.50", "1.00"]
    found = page.order(table, cells)
    assert found["mezo"] == {"films": [0.0, 0.0]}
    assert found["adamezo"]["films"][0] == 20.0
    assert "sparse_mezo" not in found  # its plain row has not been run
    # What a paper claims stands beside what was found, and the picture has every row.
    rows = [line for line in page.claims(table, cells) if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| row", "| R-MeZO 0.75"]
    assert "Table 1) | -20.0 +- " in rows[1]
    picture = page.pareto(table, cells).decode()
    assert all(f"<!-- {cell.row.name} -->" in picture for cell in cells)


def test_what_no_other_beats_is_on_the_frontier(page: ModuleType) -> None:
    points = [(1.0, 70.0), (2.0, 70.0), (0.5, 60.0), (1.0, 65.0), (3.0, 72.0), (0.7, 55.0)]
    assert page.frontier(points) == [(0.5, 60.0), (1.0, 70.0), (3.0, 72.0)]
