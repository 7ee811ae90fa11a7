"""The page on the methods is what the methods say of themselves."""

import json
import re
from types import ModuleType
from typing import Any

import pytest

from smezo_cli.cli.method_notes import COSTS
from tests.scripts_loaded import script as load_script


@pytest.fixture(scope="module")
def methods_page() -> ModuleType:
    """scripts/methods_page.py as a module."""
    return load_script("methods_page")


@pytest.fixture(scope="module")
def costs(methods_page: ModuleType) -> dict[str, Any]:
    """The numbers as they would be written now; to compose all methods takes seconds."""
    return dict(methods_page.costs())


@pytest.fixture(scope="module")
def page(methods_page: ModuleType, costs: dict[str, Any]) -> str:
    """The page as it would be written now."""
    return str(methods_page.page(costs))


def test_the_page_on_methods_is_what_they_say(
    methods_page: ModuleType, page: str, costs: dict[str, Any]
) -> None:
    """After a change of a method: python scripts/methods_page.py."""
    assert methods_page.PAGE.read_text(encoding="utf-8") == page
    assert json.loads(COSTS.read_text(encoding="utf-8")) == costs


def test_the_readme_lists_every_method_by_kind(methods_page: ModuleType) -> None:
    """After a new one: python scripts/methods_page.py."""
    text = methods_page.README.read_text(encoding="utf-8")
    assert text == methods_page.readme()
    assert all(f"`{name}`" in text for name in methods_page.names())


def test_every_row_has_a_source(methods_page: ModuleType, page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(methods_page.names())
    assert all(re.search(r"\(https://(arxiv.org/abs|github.com)/", row) for row in rows)


def test_state_counts_the_places_of_masks_and_a_pool(costs: dict[str, Any]) -> None:
    """8 bytes a place: of a tenth of each row of 64 and of 96 weights, and of 0.1% of 12,448.

    And the 4,095 numbers of the pool, held three times over.
    """
    weights = 2 * 64 * 96 + 64 + 96
    in_rows = 96 * (64 - 58) + 64 * (96 - 86) + (96 - 86) + (64 - 58)
    state = {name: float(costs["methods"][name]["state"]) for name in ("mazo", "senszoq", "pezo")}
    assert state["mazo"] == pytest.approx(8 * in_rows / weights, rel=0.01)
    assert state["senszoq"] == pytest.approx(8 * 12 / weights, rel=0.01)
    assert state["pezo"] == pytest.approx(12 * 4095 / weights, rel=0.01)


def test_forwards_that_grow_or_come_now_and_then_are_told(costs: dict[str, Any]) -> None:
    found = {name: of["forwards"] for name, of in costs["methods"].items()}
    assert (found["mezo"], found["adazeta"], found["dizo"]) == ("2", "2 to 30", "2 to 22")
    assert found["mezo_svrg"] == "2, 4, 2, 4, 2, 4, 2, 4"


def test_a_method_of_anothers_class_says_first_what_is_its_own(page: str) -> None:
    sections = dict(re.findall(r"^### (\w+)\n\n(.*)$", page, re.M))
    assert "drawn anew at every step" in sections["zo_random_sparsity"]
    assert "begin as zeros" in sections["sparse_mezo_lora"]
    assert sections["mezo"].startswith("Perturb every weight that is trained.")
    assert sections["mezo_lora"].startswith("MeZO-LoRA: MeZO on low-rank matrices")


def test_items_of_a_list_stay_items(page: str) -> None:
    (section,) = re.findall(r"^### adamezo\n(.*?)^### ", page, re.M | re.S)
    assert len(re.findall(r"^\* ", section.partition("In print")[0], re.M)) >= 4
