"""Runs that cannot begin or go on: one sentence, exit code 2, and no ruined checkpoint."""

import functools
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.run.processes import Fault, Started, no_model, sentence_of, smezo, until
from tests.run.tiny_runs import SMALL, result_of, run_folder, state_of, words_of

# ----------------------------------------------------------------------------------------- diverged


def assert_finite(folder: Path) -> None:
    for path in folder.glob("checkpoint/*.safetensors"):
        assert all(bool(torch.isfinite(t).all()) for t in load_file(path).values()), path.name
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert "NaN" not in (folder / "result.json").read_text()


@pytest.mark.parametrize(("method", "number"), [("sparse_mezo", 15), ("adamw", 8)])
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    tmp_path: Path, method: str, number: int
) -> None:
    """Exit code 2, one sentence: the step, the last good checkpoint, a smaller lr to try."""
    words = words_of(method)
    faults = [Fault("nan", number, signal.SIGTERM).install]
    ended = smezo(words, tmp_path, faults=faults)
    folder = run_folder(tmp_path)
    said = sentence_of(ended)
    assert "nan" in said
    assert re.search(r"step 7\b", said)
    assert re.search(r"checkpoint is step [36]\b", said)
    assert "lr=" in said
    result = result_of(folder)
    assert result["status"] == "diverged"
    assert "nan" in result["error"]
    assert result["step"] == 7
    assert state_of(folder)["step"] == 6
    assert_finite(folder)
    # Without the fault the run goes on from there.
    assert smezo(words, tmp_path).code == 0
    assert result_of(folder)["status"] == "done"


@pytest.mark.parametrize("eval_every", [1, 4])
@pytest.mark.parametrize(("method", "lr"), [("sparse_mezo", "1e38"), ("adamw", "1e30")])
def test_a_step_size_far_too_large_leaves_no_result_and_no_ruined_checkpoint(
    tmp_path: Path, method: str, lr: str, eval_every: int
) -> None:
    """Also where dev shows it first, or the last step ruins the weights."""
    steps = {1: 5, 4: 1}[eval_every]
    words = words_of(method, f"lr={lr}", f"steps={steps}", f"eval_every={eval_every}")
    said = sentence_of(smezo(words, tmp_path))
    assert "nan" in said
    assert f"lr={float(lr):g}" in said
    folder = run_folder(tmp_path)
    assert result_of(folder)["status"] == "diverged"
    assert result_of(folder)["test"] is None
    kept = {path.name for path in folder.glob("checkpoint/weights-*")}
    assert kept == ({"weights-0.safetensors"} if method == "sparse_mezo" else set())
    assert_finite(folder)


# ------------------------------------------------------------------------------------------ refused


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """While one process trains, the same command elsewhere names it and changes nothing."""
    words = words_of("mezo")
    go_on = tmp_path / "go-on"
    held = Fault("loss", 5, functools.partial(until, go_on.exists))
    with Started(words, tmp_path, faults=[held.install]) as first:
        until(lambda: list(tmp_path.glob("runs/default/*/metrics.jsonl")))
        said = sentence_of(smezo(words, tmp_path, faults=[no_model]))
        assert f"process {first.pid}" in said
        assert "if_exists=fresh" not in said
        assert f"process {first.pid}" in sentence_of(smezo([*words, "if_exists=fresh"], tmp_path))
        go_on.touch()
        assert first.wait().code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method=mezo", "sparsity=0.8"], ["sparsity", "sparse_mezo"]),
        (["method=adamw", "eps=1e-3"], ["eps", "mezo"]),
        (["method=adamw", "compile=true"], ["compile", "adamw"]),
        (["method=sparse_mezo", "sparsity=1"], ["sparsity=1", "[0, 1)"]),
        (["method.freeze=[nosuch*]"], ["nosuch*"]),
        (["task.num_dev=9999"], ["task.num_dev=9999", "200"]),
        (["task.prompt='{text} It was'", "task.labels=[good]"], ["task.labels", "2 classes"]),
        (["model.max_length=8", "task.labels=[abcdefgh,good]", "task.prompt=0"], ["task.labels"]),
    ],
    ids=lambda words: " ".join(words) if "=" in words[0] else "",
)
def test_what_cannot_be_run_is_refused_in_one_sentence(
    words: list[str], says: list[str], tmp_path: Path
) -> None:
    """Exit code 2, what was given and what is allowed; never a traceback."""
    said = sentence_of(smezo(["task=toy", "model=tiny-llama", "steps=2", *words], tmp_path))
    for word in says:
        assert word in said


def test_prompts_that_are_cut_are_counted_in_one_line(tmp_path: Path) -> None:
    """How many and to what length, ours alone: the tokenizer's own warning would mislead."""
    ended = smezo(words_of("sgd", "model.max_length=10", "task.prompt=1"), tmp_path)
    assert (ended.code, ended.err) == (0, "")
    (line,) = (line for line in ended.out.splitlines() if "10 tokens" in line)
    assert result_of(run_folder(tmp_path))["truncated_prompts"] == 32 + 16 + 24
    assert "72" in line


def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    """One sentence with the way out, before anything is written."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for device in ("cuda", "cuda:3"):
        said = sentence_of(smezo([*SMALL, f"device={device}"], tmp_path, faults=[no_model]))
        assert f"device={device}" in said
        assert "device=cpu" in said
    assert not list(tmp_path.glob("runs/*/*"))
