"""Every method of conf/method/ is set, listed, planned, trained and replayed by the command."""

from typing import Any

import pytest

from smezo_cli.cli.verbs import main
from smezo_cli.config.method_keys import describe, trait
from tests.methods.test_every_method import NAMES, node_of

pytestmark = pytest.mark.usefixtures("one_thread")

# What settings of a method have besides arguments of its class.
_BESIDE = {"name", "_target_", "adapter", "objective"}
_TINY = (
    "model=tiny-llama task=toy task.num_train=8 task.num_dev=4 task.num_test=4 device=cpu "
    "task.prompt=0"
)


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_gives_every_argument_and_no_other(name: str) -> None:
    node = node_of(name)
    found = describe(node)
    assert found is not None
    assert node.keys() - _BESIDE == found.keys.keys()
    assert ("objective" in node) == found.traits["compares_losses"]


def test_each_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "methods"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines.keys() >= set(NAMES)
    assert all(lines[name].endswith((".", "?")) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"method={name}", *_TINY.split()]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"toy | tiny-llama | {name} |")
    assert "held all the time" in said


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_is_replayed(
    name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", f"method={name}", *_TINY.split(), f"runs_dir={tmp_path}"]
    if trait(node_of(name), "takes_steps", default=True):
        words += ["steps=3", "batch_size=2", "eval_every=2", "lr_schedule=constant"]
        words += ["zero_shot=false"]
    if "executor" in node_of(name):
        words += ["method.executor=sequential"]  # to time another takes as long as the steps
    assert main(words) == 0
    (run,) = (tmp_path / "default").iterdir()
    assert (run / "result.json").exists()
    if "steps=3" in words:  # a constant lr: the finished run goes on
        assert main([word if word != "steps=3" else "steps=4" for word in words]) == 0
    if trait(node_of(name), "replays", default=False):
        assert main(["replay", str(run), "--split", "none"]) == 0
    capsys.readouterr()
