"""Claims about task=mixture: what its parts stand for, and the sentence on a mistake."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import plain
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.report.identity import identity

TINY = ["task=mixture", "model=tiny-llama", "method=mezo"]
OWN = "{task: classification, data: my.csv, prompt: '{text} is', labels: {0: bad, 1: good}}"


def checked(*words: str) -> dict[str, Any]:
    return check(compose([*TINY, *words])).task


def test_a_part_is_the_task_of_its_name_with_settings_of_its_own() -> None:
    alone = check(compose(["task=rte", "model=tiny-llama", "method=mezo"])).task
    nodes = checked("task.parts=[toy,{task: rte, data_dir: /there, num_dev: 9}]")["nodes"]
    assert list(nodes) == ["toy", "rte"]
    assert nodes["rte"] == alone | {"data_dir": "/there", "num_dev": 9}


def test_counts_of_the_mixture_hold_for_every_part() -> None:
    nodes = checked("task.parts=[toy,copa]", "task.num_test=5", "task.max_train_tokens=30")["nodes"]
    assert [node["num_test"] for node in nodes.values()] == [5, 5]
    assert [node["max_train_tokens"] for node in nodes.values()] == [30, 30]
    assert [node["num_dev"] for node in nodes.values()] == [64, 100]  # their own


def test_own_files_are_parts() -> None:
    nodes = checked(f"task.parts=[toy,{OWN}]")["nodes"]
    assert list(nodes) == ["toy", "my"]
    assert (nodes["my"]["data"], nodes["my"]["labels"]) == ("my.csv", {0: "bad", 1: "good"})


def test_the_config_of_a_run_names_all_that_its_parts_are(tmp_path: Path) -> None:
    """It is read again without the files of the tasks, and is the same run."""
    words = [*TINY, "task.parts=[toy,{task: rte, data_dir: /there}]", "task.weights=[1,3]"]
    cfg = compose(words)
    file = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(plain(cfg)), file)
    read: Any = OmegaConf.load(file)
    assert check(read) == check(cfg)
    assert digest(read) == digest(cfg)
    other = compose([*words[:-1], "task.weights=[1,2]"])
    assert digest(other) != digest(cfg)


def test_where_the_data_of_a_part_lies_is_no_other_experiment() -> None:
    here, there, more = (
        plain(compose([*TINY, f"task.parts=[toy,{{task: rte, {words}}}]"]))
        for words in ("data_dir: /here", "data_dir: /there", "data_dir: /here, num_dev: 9")
    )
    assert identity(here) == identity(there) != identity(more)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "task.parts is needed by task=mixture: add task.parts=[sst2,rte]"),
        (["task.parts=3"], "task.parts=3: it must be a list of tasks"),
        (["task.parts=[]"], "it must be a list of tasks"),
        (["task.parts=[toy,rt]"], "task.parts has rt, which names no task of smezo, did you mean"),
        (["task.parts=[toy,mixture]"], "task.parts has mixture, which names no task"),
        (["task.parts=[toy,{data: my.csv}]"], "which names no task"),
        (["task.parts=[toy,toy]"], "task.parts has toy twice: give one of them a name"),
        (
            ["task.parts=[toy,squad]"],
            "task.parts, squad: it is of kind generation, and a mixture takes tasks of kind "
            "classification and choice: leave it out",
        ),
        (["task.parts=[toy,{task: rte, dta_dir: x}]"], "did you mean data_dir?"),
        (["task.parts=[toy,{task: rte, num_dev: 0}]"], "task.parts, rte: task.num_dev=0"),
        (["task.parts=[toy,classification]"], "task.parts, classification: task.data is needed"),
        (["task.parts=[toy,copa]", "task.weights=[1]"], "are 1 and task.parts are 2: give one"),
        (["task.parts=[toy,copa]", "task.weights=[1,0]"], "a list of numbers above 0"),
        (["task.parts=[toy,copa]", "task.prompt=0"], "task.prompt"),
        (["task.parts=[toy,copa]", "batch_size=1"], "add batch_size=2 or more"),
        (["task.parts=[toy,copa]", "batch_order=stratified"], "is of kind choice and class"),
        (["task.parts=[toy,copa]", "method=linear_probe"], "tells classes apart"),
        (["task.parts=[toy,copa]", "method.objective=f1"], "whose metric is accuracy"),
        (["task.parts=[toy,{task: rte, sfc_prompt: 'x'}]"], "is the prompt of task.sfc=true"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], says: str) -> None:
    steps = [] if "method=linear_probe" in words else ["steps=4"]
    base = [word for word in TINY if word.partition("=")[0] not in str(words)]
    with pytest.raises(UserError) as error:
        check(compose([*base, *words, *steps, "task=mixture"]))
    assert says in str(error.value)
    assert str(error.value).count("\n") == 0
