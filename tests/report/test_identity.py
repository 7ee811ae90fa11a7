"""What makes two runs the same experiment: one list for digests, means and curves."""

from pathlib import Path

import pytest

from smezo_cli.report import identity
from smezo_cli.report.runs import groups, load
from smezo_cli.report.series import Source, merge_seeds
from tests.report.test_runs import make


@pytest.mark.parametrize(
    "other", [{"cache_scores": True}, {"compile": True}, {"logger": {"name": "wandb"}}]
)
def test_seeds_of_one_digest_are_one_mean_and_one_curve(
    other: dict[str, object], tmp_path: Path
) -> None:
    folders = make(tmp_path, "a"), make(tmp_path, "b", seed=1, **other)
    runs = [run for folder in folders if (run := load(folder))]
    assert len(runs) == 2
    assert len(groups(runs)) == 1
    assert len(merge_seeds([Source(tuple(runs))], ())) == 1


def test_settings_are_told_by_dotted_keys() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [2]}, "e": {}}
    assert dict(identity.dotted(tree)) == {"a.b.c": 1, "a.d": [2], "e": {}}
