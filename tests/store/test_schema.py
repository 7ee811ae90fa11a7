"""What is taken for a state.json or result.json that a run wrote, and the page on result.json."""

import copy
import json
import math
import os
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from smezo_cli import train
from smezo_cli.config.compose import compose
from smezo_cli.files import sealed
from smezo_cli.store.schema import (
    Result,
    is_batching,
    is_known,
    is_looks,
    is_prompt,
    is_sound_result,
    is_sound_state,
)
from tests import ROOT
from tests.scripts_loaded import script as load_script


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["task=toy", "model=tiny-llama", "method=sparse_mezo", "device=cpu"]
    train.run(compose([*words, "steps=4", "eval_every=2", "seed=3", f"runs_dir={runs}"]))
    (found,) = (runs / "default").iterdir()
    return found


@pytest.fixture
def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.fixture
def state(folder: Path) -> dict[str, Any]:
    found = sealed.unsealed(json.loads((folder / "checkpoint" / "state.json").read_text()))
    assert found is not None
    del found["schema"]
    return found


def changed(tree: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with another value at a path of keys; ... takes the key out."""
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return tree


def test_a_run_writes_the_keys_of_the_schema_in_its_order(result: dict[str, Any]) -> None:
    with_settings = {
        "kept_inputs",
        "prompts_left_out",
        "dominant_layer",
        "eval_every",
    }  # written where it is asked for alone
    assert list(result) == [key for key in Result.__annotations__ if key not in with_settings]
    assert is_sound_result(result)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("key_of_a_newer_version", {"a": ["anything"]}),
        ("test.metric_of_a_newer_version", {"a": [1.5, 2], "b": "text", "c": None}),
        ("versions.library", None),
        ("batching", ...),  # a file of before this key
        ("metric", ...),
        ("eps", ...),
        ("eps", None),
        ("test.loss", math.nan),  # old files hold it
        ("train_seconds", math.inf),
        ("weights", None),
        ("prompt.option", ...),
        ("test.auc", None),
        ("watch", "whatever"),
    ],
)
def test_results_of_other_versions_are_sound(
    result: dict[str, Any], path: str, value: object
) -> None:
    assert is_sound_result(changed(result, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("status", ...),
        ("status", None),
        ("steps", None),
        ("steps", ...),  # of a finished run it is needed
        ("steps", -1),
        ("steps", 1.0),
        ("steps", True),
        ("seed", 1 << 63),
        ("lr", 10**400),
        ("lr", "1e-3"),
        ("metric", "loss"),
        ("metric", "f1"),  # of which there is none in test
        ("test", None),
        ("test.accuracy", None),
        ("test.new", ["text"]),
        ("test.over_zero_shot", 0.5),
        ("test.over_new", 0.5),
        ("sparsity.realised", "most"),
        ("sparsity.new", {}),
        ("prompt.labels", None),
        ("prompt.offsets", None),
        ("weights.best.step", "../../4"),
        ("dev.best.step", -1),
        ("batching.new", True),
        ("batching.scores.pads", 1),
    ],
)
def test_results_that_no_run_writes_are_not_sound(
    result: dict[str, Any], path: str, value: object
) -> None:
    assert not is_sound_result(changed(result, path, value))


@pytest.mark.parametrize(
    ("path", "value", "is_sound"),
    [
        ("notes.new", {"of": "a newer version"}, True),
        ("notes.watch.unmoved", ..., True),
        ("notes.watch.new", 1, True),
        ("method.new", [], True),
        ("new", 1, False),
        ("step", ..., False),
        ("step", 1, False),  # less than the best
        ("best_step", None, False),
        ("looked", 5, False),
        ("files", {"../weights-1.safetensors": "0"}, False),
        ("files", {"weights-1.safetensors\n": "0"}, False),
        ("files", {"optimizer-1.safetensors": "0"}, True),
        ("method.num_steps", -1, False),
        ("notes.prompt", 9, False),
        ("notes.rows.dev", ..., False),
        ("notes.zero_shot.accuracy", ..., False),
        ("notes.watch.recent", [], False),
        ("notes.watch.recent", [math.inf], False),
        ("notes.watch.squares", 1, False),
        ("notes.watch.spikes", 1, False),
        ("notes.numerics.rms_move", ..., False),
        ("notes.micro_batch_size", 0, False),
        ("notes.unsettled", {"goes_on": True, "new": 1}, False),
    ],
)
def test_states(state: dict[str, Any], path: str, value: object, is_sound: bool) -> None:
    assert is_sound_state(state)
    assert is_sound_state(changed(state, path, value)) is is_sound


def test_hostile_values_are_refused_in_little_time_and_memory() -> None:
    nested: dict[str, Any] = {}
    for _ in range(900):
        nested = {"a": nested}
    assert not is_sound_result({"status": "failed", "test": nested})
    assert not is_sound_result({"status": "failed", "test": {"a": ["x"] * 1_000_000}})
    # Halves of characters come from JSON, and are text.
    assert is_sound_result({"status": "\ud800", "versions": {"\ud800": 1}, "\ud800": 1})


def test_parts_of_a_delta(result: dict[str, Any]) -> None:
    assert is_prompt(result["prompt"])
    assert not is_prompt(None)
    assert is_batching(None)
    assert is_batching(result["batching"])
    assert not is_batching({})
    assert is_known(4, "ab", [result["test"], None])
    assert not is_known(4, None, [])
    assert not is_known(4, "ab", [{"loss": None}])
    assert is_looks([[2, 0.5], [4, 1]])
    assert not is_looks([[2, 0.5, 1]])
    assert not is_looks([{"2": 0, "4": 0}])


@pytest.fixture
def result_page() -> ModuleType:
    return load_script("result_page")


def test_the_page_on_result_json_is_what_the_schema_says(result_page: ModuleType) -> None:
    """After a change of the schema: python scripts/result_page.py."""
    text = result_page.PAGE.read_text(encoding="utf-8")
    assert text == result_page.page()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} > typing.get_type_hints(Result).keys()
    assert all(len(row[2].strip(" |")) > 5 for row in rows)  # each key is described


def test_help_and_the_check_of_settings_do_without_pydantic(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from smezo_cli.cli.verbs import main\n"
        "from smezo_cli.config.compose import prepare\n"
        "main(['--help'])\n"
        "prepare(['task=toy', 'model=tiny-llama', 'device=cpu'])\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "smezo_cli.config.settings" in run.stderr.split()
    assert not {"pydantic", "torch"} & {*run.stderr.split()}


@pytest.mark.parametrize(
    ("chosen", "sound"),
    [([0, 1], True), ([1], True), ([], False), ([0, 9], False), ([0, -1], False), ("01", False)],
)
def test_a_mixture_notes_a_prompt_of_each_part(
    chosen: object, sound: bool, state: dict[str, Any]
) -> None:
    notes = state["notes"]
    note = {**notes["prompts"][0], "part": "toy"}
    mixed = changed(changed(state, "notes.prompts", [note, note]), "notes.prompt", chosen)
    assert is_sound_state(mixed) is sound
    assert is_prompt([note, note])
    assert not is_prompt([note, {"part": "toy"}])
    assert not is_prompt([])
