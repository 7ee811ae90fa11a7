"""scripts/every_method.py: what is there is not run again, and each run is kept at once."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.run.processes import smezo
from tests.scripts_loaded import script as load_script


@pytest.fixture
def script() -> ModuleType:
    return load_script("every_method")


def test_a_part_is_run_then_the_rest_and_nothing_twice(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def forked(command: list[str], env: dict[str, str], **streams: object) -> None:
        assert command[:4] == [sys.executable, "-m", "smezo_cli", "train"]
        assert env["OMP_NUM_THREADS"] == "1"
        asked.append(command[4])
        smezo(command[4:], tmp_path)

    tiny = ("model=tiny-llama", "task=toy", "steps=2", "batch_size=2", "device=cpu", "eval_every=1")
    monkeypatch.setattr(script, "WORDS", (*tiny, "task.num_test=4", "task.num_dev=8"))
    # A fork of what has torch imported takes a tenth of a new interpreter's seconds.
    monkeypatch.setattr(
        script, "subprocess", SimpleNamespace(run=forked, DEVNULL=None, STDOUT=None)
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    kept = tmp_path / "kept.json"

    def lines(*methods: str) -> list[str]:
        words = [str(tmp_path / "runs"), "--ranks", "1", "--json", str(kept), "--methods", *methods]
        monkeypatch.setattr(sys, "argv", ["every_method.py", *words])
        code = script.main()
        out = capsys.readouterr().out.splitlines()
        return [str(code), *(line for line in out if line.startswith("|"))]

    first = lines("mezo")
    assert (first[0], len(first)) == ("0", 4)
    both = lines("mezo", "lozo")
    assert both[-1] == first[-1]  # by name
    assert both == lines("mezo", "lozo")
    assert asked == ["method=mezo", "method=lozo"]
    found = json.loads(kept.read_text("utf-8"))
    assert set(found) == {"mezo", "lozo"}
    assert found["mezo"]["1"]["forwards"] == 4
    monkeypatch.setattr(script, "WORDS", ("task=nowhere",))
    assert lines("mezo_adam")[0] == "1"
    assert json.loads(kept.read_text("utf-8")) == found


def test_the_methods_are_those_that_make_zeroth_order_steps(script: ModuleType) -> None:
    found = script.methods()
    assert {"mezo", "sparse_mezo", "addax", "mezo_peft"} <= set(found)
    assert not {"adamw", "sgd", "lora", "zero_shot", "icl", "linear_probe"} & set(found)
