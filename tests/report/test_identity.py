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


@pytest.mark.parametrize(("family", "asked"), [("causal", "prompts"), ("masked", "masked")])
def test_prompts_for_the_other_family_of_models_are_no_difference(family: str, asked: str) -> None:
    """They are never asked, so that a mended one leaves a table its runs."""

    def of(**prompts: str) -> str:
        node = {"name": "rte", "prompts": "a", "masked": "a"} | prompts
        whole = {"task": node, "model": {"family": family}}
        mixture = {"task": {"nodes": {"rte": node}}, "model": {"family": family}}
        return identity.identity(whole) + identity.identity(mixture)

    for key in ("prompts", "masked"):
        assert (of(**{key: "b"}) == of()) == (key != asked)
