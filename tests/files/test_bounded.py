"""Files of unknown origin are read within limits."""

from pathlib import Path

import pytest

from smezo_cli.files.bounded import read_json


def nested(depth: int, kind: str) -> str:
    opening, closing = {"lists": ("[", "]"), "objects": ('{"a":', "}")}[kind]
    return '{"a":' + opening * (depth - 1) + "1" + closing * (depth - 1) + "}"


@pytest.mark.parametrize("kind", ["lists", "objects"])
@pytest.mark.parametrize(("depth", "is_read"), [(20, True), (99, True), (150, False), (900, False)])
def test_json_that_nests_too_deep_is_no_object(
    kind: str, depth: int, is_read: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    path.write_text(nested(depth, kind))
    assert (read_json(path) is not None) == is_read
