"""The model card of an export: what the hub reads of it, and what a person does."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from smezo_cli.config.settings import Settings
from smezo_cli.run.model_card import model_card
from tests.composed import settings_of

TEST = {
    "accuracy": 0.75,
    "standard_error": 0.05,
    "n": 80,
    "loss": 0.5,
    "over_zero_shot": {"gain": 0.125, "standard_error": 0.04},
}
RESULT: dict[str, Any] = {
    "metric": "accuracy",
    "test": TEST,
    "zero_shot": TEST | {"accuracy": 0.625},
    "zero_shot_calibrated": None,
    "weights": {"best": {"step": 30}, "last": {"step": 40}},
    "seed": 7,
    "command": "smezo train task=rte model.token=hf_abcdefghijklmnopqrstuvwxyz123456",
    "versions": {"smezo": "0.1.0"},
    "prompt": {"template": "{premise}\nDoes this mean?", "labels": ["Yes", "No"]},
}


def card(settings: Settings, result: dict[str, Any] = RESULT, step: int = 30) -> ModelCard:
    text = model_card(
        settings, result, step, loaded_by="transformers loads it: X(FOLDER)", is_adapter=False
    )
    return ModelCard(text)


@pytest.fixture(scope="module")
def rte() -> Settings:
    return settings_of("task=rte", "model=opt-125m", "method=mezo")


def test_the_hub_reads_base_data_set_metric_and_error(rte: Settings) -> None:
    """By the hub's own parser: from the metadata to its records of results."""
    found = card(rte)
    data = found.data
    assert (data.base_model, data.datasets) == ("facebook/opt-125m", ["aps/super_glue"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["smezo", "mezo"]
    (measured,) = data.eval_results
    assert (measured.metric_type, measured.metric_value) == ("accuracy", 0.75)
    assert measured.metric_name == "accuracy, 80 rows, standard error 0.0500"
    assert (measured.dataset_type, measured.dataset_split) == ("aps/super_glue", "test")


def test_a_person_reads_gain_prompt_and_command_without_a_token(rte: Settings) -> None:
    text = card(rte).text
    assert "| before training | 0.6250 | 0.0500 |" in text
    assert "| after training | 0.7500 | 0.0500 |" in text
    assert "paired by row: +0.1250 +- 0.0400." in text
    assert "calibrated" not in text
    assert "{premise}\nDoes this mean?" in text
    assert "model.token=[token]" in text
    assert "Transformers loads it: X(FOLDER)." in text


def test_a_mixture_has_the_prompt_of_each_part() -> None:
    settings = settings_of("task=mixture", "task.parts=[sst2,rte]", "method=mezo", "model=opt-125m")
    parts = [{"part": part, "template": f"{part}: {{text}}", "labels": []} for part in ("a", "b")]
    found = card(settings, RESULT | {"prompt": parts})
    assert all(f"Prompt of part {part}:\n\n```\n{part}: " in found.text for part in ("a", "b"))
    (measured,) = found.data.eval_results
    assert measured.task_type == "text-classification"  # as both parts are


def test_paths_of_this_machine_are_not_published(rte: Settings) -> None:
    command = (
        "smezo train --config-dir /home/me/conf task.data=[/data/x.csv,/data/y.csv] model.path=~/m "
        "steps=3 'task.prompt={a} and/or {b} / {c}?' model.token_url=https://host.org/x/y"
    )
    text = card(rte, RESULT | {"command": command}).text
    assert (
        "smezo train --config-dir conf task.data=[x.csv,y.csv] model.path=m "
        "steps=3 'task.prompt={a} and/or {b} / {c}?' model.token_url=https://host.org/x/y"
    ) in text


def test_weights_of_another_step_have_no_result(rte: Settings) -> None:
    found = card(rte, step=40)
    assert found.data.eval_results is None
    assert "These weights were not tested." in found.text
    assert "after training" not in found.text


def test_local_files_are_no_ids_of_the_hub_and_a_licence_beside_them_is_kept(
    tmp_path: Path,
) -> None:
    """A folder's own card names the licence; one that is broken is as if there were none."""
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    words = "task=classification 'task.prompt={text}' 'task.labels={0: a, 1: b}' method=mezo"
    (tmp_path / "my.csv").write_text("text,label\n")
    line = f"{words} task.data={tmp_path}/my.csv model=own model.path={tmp_path}"
    data = card(settings_of(*shlex.split(line))).data
    assert (data.base_model, data.datasets, data.license) == (None, None, "apache-2.0")
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert card(settings_of(*shlex.split(line))).data.license is None
