"""What tests/quick_hydra.py remembers is what Hydra composes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from smezo_cli.config.compose import compose
from smezo_cli.config.composer import Composer
from smezo_cli.errors import UserError
from tests import quick_hydra

LINES = [
    [],
    ["task=rte", "model=opt-125m", "seed=3"],
    ["method=mezo", "lr=1e-2", "method.num_queries=2", "+hydra.job.env_set.A=b"],
    ["method=adamw", "task.num_train=8", "hydra.job.name=x"],
    ["experiment=mezo/ft", "task=sst2", "hydra/launcher=basic"],
    ["method=mezo", "~method.eps", "task={num_dev: 7}"],
]


@pytest.fixture
def at_first() -> Iterator[None]:
    """Nothing is remembered yet; afterwards, as the other tests have it."""
    end = quick_hydra.remember()
    yield
    end()
    quick_hydra.remember()


def all_of(words: list[str]) -> DictConfig:
    with Composer() as composer:
        return composer.compose(words, with_hydra=True)


def flags(cfg: DictConfig) -> list[tuple[str, object]]:
    """What may be changed in it, node by node."""
    found: list[tuple[str, object]] = [(cfg._get_full_key(""), dict(cfg._metadata.flags or {}))]
    for _, node in cfg.items_ex(resolve=False):
        found += flags(node) if isinstance(node, DictConfig) and not node._is_none() else []
    return found


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_what_is_remembered_is_what_hydra_composes(words: list[str], at_first: None) -> None:
    """With other values in between, and whoever has what was composed changes it."""
    quick_hydra.remember()()  # not to remember, for once
    wanted = all_of(words)
    quick_hydra.remember()
    for more in (["seed=7"], ["seed=8"], []):
        found = all_of([*words, *more])
        assert (found == wanted) == (not more)
        assert flags(found) == flags(wanted)
        if more:
            with open_dict(found):
                found.task.num_test = 77
                found.hydra.job.name = found.new = "changed"
    assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(wanted)


def test_a_mistake_is_found_each_time(at_first: None) -> None:
    for words in (["task=toy"], ["task=tyo"], ["task=toy", "task.num_trian=3"], ["task=tyo"]):
        if words == ["task=toy"]:
            compose(words)
            continue
        with pytest.raises(UserError, match="did you mean"):
            compose(words)


def test_the_files_of_a_user_are_read_each_time(at_first: None, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    for count in (5, 6):
        text = f"defaults: [toy, _self_]\nnum_dev: {count}\n"
        (tmp_path / "task" / "mine.yaml").write_text(text)
        assert compose(["task=mine"], str(tmp_path)).task.num_dev == count
