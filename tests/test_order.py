"""The order in which files of tests are handed out."""

import pytest

from tests import ROOT, conftest


def test_the_longest_files_are_there() -> None:
    assert [name for name in conftest.LONGEST if not (ROOT / "tests" / name).is_file()] == []
    assert len(set(conftest.LONGEST)) == len(conftest.LONGEST)


def test_they_come_first_and_tests_of_a_file_keep_their_order(
    request: pytest.FixtureRequest,
) -> None:
    items = list(request.session.items)
    conftest.pytest_collection_modifyitems(items)
    assert items == request.session.items  # it has been done
    long = [str(item.path.relative_to(ROOT / "tests")) in conftest.LONGEST for item in items]
    assert long == sorted(long, reverse=True)
    lines = [item.location[1] or 0 for item in items if item.path.name == "test_order.py"]
    assert lines == sorted(lines)
