"""Runs that an older smezo left in old/ go on, are scored, exported, replayed and listed as it did.

Commit 144a4ad made them. numbers.json has the command of each run, and what the same commit made of
it. A stopped run got a SIGINT in the step before the one that numbers.json says it stands at; its
"end" is that of a run that was never stopped. Nothing here is made anew by a later version: it
would no longer be old.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smezo_cli.cli import main
from tests.golden.test_golden import canary

OLD = Path(__file__).with_name("old")
NUMBERS: dict[str, Any] = json.loads((OLD / "numbers.json").read_text(encoding="utf-8"))
RUNS: dict[str, Any] = NUMBERS["runs"]
STOPPED = [name for name, of in RUNS.items() if "eval" not in of]
FINISHED = [name for name, of in RUNS.items() if "eval" in of]
REPLAYED = [name for name, of in RUNS.items() if "replay" in of]
SAME_KERNELS = canary() == NUMBERS["canary"]
pytestmark = pytest.mark.usefixtures("one_thread", "base_model_is_the_same")


def smezo(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def digest_of(path: Path | str) -> str:
    """SHA-256 of names, types, shapes and bits of the tensors of a file, by no code of smezo."""
    tensors, found = load_file(path), hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def copied(name: str, cwd: Path) -> Path:
    """A copy of a run where its command finds it: runs/default/FOLDER of a working folder."""
    folder = Path("default") / RUNS[name]["folder"]
    shutil.copytree(OLD / folder, cwd / "runs" / folder)
    return Path("runs") / folder


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Whether predictions are the same: bit for bit, with other kernels within 0.02 (bfloat16)."""
    if SAME_KERNELS:
        return found == wanted
    scores = [[x for line in of for x in line["scores"]] for of in (found, wanted)]
    ids = [[line["id"] for line in of] for of in (found, wanted)]
    return ids[0] == ids[1] and scores[0] == pytest.approx(scores[1], abs=0.02)


@pytest.fixture(scope="module")
def base_model_is_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where a processor makes other first weights of the tiny model of the runs."""
    if SAME_KERNELS:
        return
    cwd = tmp_path_factory.mktemp("base")
    run = cwd / copied("sparse_mezo", cwd)
    try:
        code = main(["eval", str(run), "--base", "--out", str(cwd / "base.jsonl")])
    finally:
        shutil.rmtree(cwd)
    if code:
        pytest.skip("the first weights of the tiny model are others on this processor")


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_to_the_end_of_one_that_was_never_stopped(
    name: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command: weights, metrics and result, bit for bit where the kernels are the same."""
    of, run = RUNS[name], copied(name, cwd)
    before, end = lines(run / "metrics.jsonl"), of["end"]
    smezo("train", *of["command"])
    assert f"from step {of['step']}" in capsys.readouterr().out
    assert [path.parent for path in cwd.glob("runs/*/*/result.json")] == [cwd / run]
    metrics, result = lines(run / "metrics.jsonl"), json.loads((run / "result.json").read_text())
    assert metrics[: len(before)] == before
    assert (result["status"], result["step"]) == ("done", 8)
    assert result["num_forwards"] == end["num_forwards"]
    if not SAME_KERNELS:
        return
    for line in metrics:
        line.pop("seconds", None)
    assert metrics == end["metrics"]
    kept = {path.name: digest_of(path) for path in (run / "checkpoint").glob("weights-*")}
    assert all(kept[name] == end["files"][name] for name in kept.keys() & end["files"])
    assert "weights-8.safetensors" in kept.keys() & end["files"]
    for key in ("weights", "test", "dev", "zero_shot", "prompt", "sparsity"):
        assert result[key] == end[key], key


@pytest.mark.parametrize("name", FINISHED)
def test_the_command_of_a_finished_run_says_that_it_is_finished(
    name: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And changes no file of it."""

    def content() -> dict[str, bytes]:
        files = (path for path in cwd.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.read_bytes() for path in files}

    of, run = RUNS[name], copied(name, cwd)
    before = content()
    smezo("train", *of["command"])
    accuracy = of["end"]["test"]["accuracy"]
    said = capsys.readouterr().out
    assert said.startswith(f"{run}: done already, test accuracy {accuracy:.4f}")
    assert content() == before


@pytest.mark.parametrize("name", FINISHED)
def test_rows_are_scored_and_predicted_as_before(name: str, cwd: Path) -> None:
    """Test and dev, the base model, a step whose weights are in the trajectory alone, own rows."""
    of, run = RUNS[name], copied(name, cwd)
    recorded = lines(run / "predictions-test.jsonl")
    for given, wanted in of["eval"].items():
        smezo("eval", run, "--split", *given.split(), "--out", "found.jsonl")
        assert same(lines("found.jsonl"), wanted), given
    smezo("eval", run)
    found = lines(run / "predictions-test.jsonl")
    assert same([{k: v for k, v in line.items() if k != "fields"} for line in found], recorded)
    text = "".join(json.dumps(row) + "\n" for row in NUMBERS["rows"])
    Path("rows.jsonl").write_text(text, encoding="utf-8")
    smezo("predict", run, "rows.jsonl", "--out", "found.jsonl")
    assert same(lines("found.jsonl"), of["predict"])


@pytest.mark.parametrize("name", FINISHED)
def test_an_export_has_the_weights_of_before(name: str, cwd: Path) -> None:
    """Low-rank matrices that are multiplied into the weights round as the kernels do."""
    of, run = RUNS[name], copied(name, cwd)
    if "lora" in name and not SAME_KERNELS:
        pytest.skip("the kernels of this processor round products otherwise")
    for at, wanted in of["export"].items():
        smezo("export", run, f"exported{at}", *at.split())
        assert digest_of(f"exported{at}/model.safetensors") == wanted, at


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replay_gives_the_weights_of_before(
    name: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run and of its delta, on any processor; with the figures where the kernels are those."""
    of, run = RUNS[name], copied(name, cwd)
    best, split = of["end"]["weights"]["best"]["sha256"], "test" if SAME_KERNELS else "none"
    for source in (run, OLD / f"{name}.delta"):
        smezo("replay", source, "--split", split)
        said = capsys.readouterr().out
        assert f"weights sha256 {best}: the same as the run's" in said
        assert said.count("the same as the run's") == (2 if SAME_KERNELS else 1)
    for at, wanted in of["replay"].items():
        if "lora" not in name or SAME_KERNELS:
            smezo("replay", run, *at.split(), "--split", "none", "--out", f"replayed{at}")
            assert digest_of(f"replayed{at}/model.safetensors") == wanted, at


def test_runs_are_listed_as_before(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is in the list but time and memory; later versions may say more."""
    for name in RUNS:
        copied(name, cwd)
    smezo("runs", "--json")
    found = {line["run"]: line for line in json.loads(capsys.readouterr().out)}
    wanted = {line["run"]: line for line in NUMBERS["listed"]}
    assert found.keys() == wanted.keys()
    for run, line in wanted.items():
        assert found[run] | line == found[run]
    smezo("runs", "status=done")
    said = capsys.readouterr().out
    assert all((RUNS[name]["folder"] in said) == (name in FINISHED) for name in RUNS)
