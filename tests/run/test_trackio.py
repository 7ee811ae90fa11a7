"""Trackio beside metrics.jsonl: the same numbers once, on this machine alone."""

import importlib.util
import json
import os
import shlex
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.cli.verbs import main
from smezo_cli.run.loggers import _numbers
from tests import ROOT

SMALL = (
    "task=toy task.num_train=16 task.num_dev=8 task.num_test=8 task.prompt=0 model=tiny-llama "
    "device=cpu batch_size=4 method=mezo lr=1e-3 eval_every=2 lr_schedule=constant "
    "method.executor=sequential"
)


@pytest.fixture
def _quick(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackio reads its folder from the environment when it is imported: put in by hand."""
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    monkeypatch.chdir(tmp_path)
    home = tmp_path / "trackio"
    for module in (utils, sqlite_storage):
        for name in ("TRACKIO_DIR", "MEDIA_DIR"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, home / ("media" if name == "MEDIA_DIR" else ""))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every address that something tries to reach."""
    found: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        found.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: connect(None, words))  # type: ignore[arg-type]
    return found


def logged(name: str) -> list[dict[str, Any]]:
    """The rows of a run as Trackio itself reads them, in order."""
    from trackio.sqlite_storage import SQLiteStorage

    return [dict(row) for row in SQLiteStorage.get_logs("smezo", name)]


def expected(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The same of metrics.jsonl and result.json."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    result = json.loads((folder / "result.json").read_text())
    names = ("test", "zero_shot", "zero_shot_calibrated")
    of_test = {name: result[name] for name in names} | {"step": result["step"]}
    rows = [*map(json.loads, lines), of_test]
    return [(row["step"], {k: v for k, v in _numbers(row) if k != "step"}) for row in rows]


@pytest.mark.usefixtures("_quick")
def test_each_number_is_there_once_also_if_a_run_goes_on_and_nothing_is_sent(
    asked: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hub token, and a Space named in the environment; the first part had no Trackio."""
    monkeypatch.setenv("HF_TOKEN", "hf_planted0123456789abcdefghij")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/else")
    words = ["train", *shlex.split(SMALL)]
    assert main([*words, "steps=2"]) == 0
    capsys.readouterr()
    assert main([*words, "steps=4", "logger=trackio"]) == 0
    out, err = capsys.readouterr()
    assert asked == []
    assert err == ""
    assert "trackio show --project smezo" in out
    assert "* Trackio" not in out
    assert os.environ["TRACKIO_SPACE_ID"] == "somebody/else"
    (folder,) = Path("runs/default").iterdir()
    name = f"default-{folder.name}"
    for _ in range(2):  # made anew, not twice
        rows = logged(name)
        mine = [
            (row["step"], {k: v for k, v in row.items() if k not in ("step", "timestamp")})
            for row in rows
        ]
        assert mine == expected(folder)
        assert main([*words, "steps=4", "logger=trackio", "if_exists=fresh"]) == 0
        rows = logged(name)
    database = b"".join(f.read_bytes() for f in Path("trackio").rglob("*") if f.is_file())
    assert name.encode() in database
    assert b"hf_planted" not in database


@pytest.mark.usefixtures("_quick")
def test_a_project_that_trackio_refuses_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", *shlex.split(SMALL), "steps=2", "logger=trackio"]
    assert main([*words, "logger.project=registry-mine"]) == 2
    err = capsys.readouterr().err
    assert "logger=trackio logger.project=registry-mine" in err
    assert err.count("\n") == 1


def test_without_the_package_one_sentence_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before anything is made, with the pin of pyproject.toml."""
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name)
    )
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main(["train", *shlex.split(SMALL), "logger=trackio"]) == 2
    said = capsys.readouterr().err
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = project["optional-dependencies"]["trackio"]
    assert said.endswith(f"is not installed: python -m pip install '{pin}'.\n")
    assert said.count("\n") == 1
    assert not Path("runs").exists()
