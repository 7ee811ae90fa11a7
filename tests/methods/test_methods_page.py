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
