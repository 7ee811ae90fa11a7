"""Kind `results`: committed results, as a table reads them."""

import copy
import functools
import json
from typing import Any

from fuzz import product
from fuzz.cases import Case, kind
from fuzz.hostile import as_json, reseal, spoil_bytes, spoil_notes


@functools.cache
def cells() -> list[dict[str, Any]]:
    """Settings that some cell of table small/1 asks for."""
    table = product.load("small/1")
    asked = [(table.rows[0], []), (next(r for r in table.rows if r.name == "MeZO"), ["lr=1e-3"])]
    return [
        product.plain(
            product.grid([*(table.words(row, table.columns[0]) or ()), "seed=0", *more])[0]
        )
        for row, more in asked
    ]


@kind(2)
def results(case: Case) -> None:
    """Results from elsewhere, as a table reads them: spoiled, and sealed again."""
    result = json.loads((case.fixtures / "run" / "result.json").read_text())
    for name in ("a", "b")[: case.pick((1, 2))]:
        tree: Any = {"schema": 1, "command": ["smezo", "train"], "settings": case.pick(cells())}
        tree |= {"looks": [[2, 0.5], [4, 0.75]], "result": copy.deepcopy(result)}
        file = case.folder / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        if case.chance(0.8):
            part = case.pick(("result", "result", "settings", "looks", None))
            spoiled = spoil_notes(case, copy.deepcopy(tree if part is None else tree[part]))
            tree = spoiled if part is None else tree | {part: spoiled}
        file.write_bytes(as_json(reseal(case, tree)))
        if case.chance(0.15):
            file.write_bytes(spoil_bytes(case, file.read_bytes()))
    form = case.pick(("markdown", "latex", "csv", "json"))
    more = ["--collect", "out"] if case.chance(0.4) else []
    case.smezo("table", "small/1", "--results", "results", "--format", form, *more)
