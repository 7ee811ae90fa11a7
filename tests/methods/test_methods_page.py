"""The page on the methods is what the methods say of themselves."""

import importlib.util
from types import ModuleType

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def methods_page() -> ModuleType:
    """scripts/methods_page.py as a module."""
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "scripts/methods_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(methods_page: ModuleType) -> str:
    """The page as it would be written now; to compose all methods takes seconds."""
    return str(methods_page.page())


def test_the_page_on_methods_is_what_they_say(methods_page: ModuleType, page: str) -> None:
    """After a change of a method: python scripts/methods_page.py."""
    assert methods_page.PAGE.read_text(encoding="utf-8") == page


def test_every_row_has_a_source(methods_page: ModuleType, page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(methods_page.names())
    assert all("https://arxiv.org/abs/" in row for row in rows)
