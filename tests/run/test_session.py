"""Whole runs, as the command line starts them: to the end, once more, and side by side.

Every run is a process of its own, forked from one that has torch imported already.
"""

import json
import math
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from smezo_cli.models.load import load_model
from smezo_cli.run import method as building
from smezo_cli.scoring import metrics
from smezo_cli.scoring.candidates import encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.notes import Notes
from smezo_cli.tasks import load_task
from smezo_cli.zo.directions import dense
from tests import ROOT
from tests.run.processes import Fault, Started, no_model, sentence_of, smezo
from tests.run.tiny_runs import (
    METHODS,
    SEQUENTIAL,
    SMALL,
    assert_same_run,
    records_of,
    result_of,
    run_folder,
    state_of,
    words_of,
)

# -------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_to_a_result(finished: Callable[[str], Path], method: str) -> None:
    """result.json has all that a reader of a table must know, and the run folder all the rest."""
    folder = run_folder(finished(method))
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "console.log", "result.json", "scores.safetensors"),
        *("checkpoint", ".lock", "predictions-test.jsonl"),
        *(["trajectory.bin"] if "mezo" in method else []),
    }
    result = result_of(folder)
    steps, forwards = 12, 24 if "mezo" in method else 12
    assert result["status"] == "done"
    assert result["error"] is None
    assert type(result["schema"]) is int
    assert result["test"]["n"] == 24
    for name in ("test", "zero_shot", "zero_shot_calibrated"):
        assert 0 <= result[name]["accuracy"] <= 1
        assert 0 <= result[name]["auc"] <= 1
        assert math.isfinite(result[name]["loss"])
    assert result["step"] == result["steps"] == steps
    assert result["num_forwards"] == forwards
    assert result["train_seconds"] > 0
    assert 2**25 < result["peak_memory_bytes"] < 2**34
    assert (result["seed"], result["data_seed"], result["dtype"]) == (0, 0, "float32")
    assert result["versions"]["torch"] == torch.__version__
    assert result["command"] == f"smezo train {shlex.join(words_of(method))}"
    sparsity = result["sparsity"]
    if method == "sparse_mezo":
        # Of 37,000 weights in tensors of thousands: ties and constant gains make up the rest.
        assert sparsity["requested"] == 0.6
        assert sparsity["realised"] == pytest.approx(0.6, abs=0.01)
        assert result["noise"] == "gaussian"
    else:
        assert (sparsity["requested"], sparsity["realised"]) == (None, 0)
        assert result["noise"] == ("gaussian" if "mezo" in method else None)
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config.method.lr if "mezo" in method else config.lr, float)
    assert (config.steps, config.task.num_dev) == (12, 16)
    assert state_of(folder)["notes"].keys() <= Notes.__annotations__.keys()


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_one_line_a_step_and_one_a_look(
    finished: Callable[[str], Path], method: str
) -> None:
    """Steps 1 to 12, looks at 3, 6, 9 and 12; the best step is the one with the lowest dev loss."""
    folder = run_folder(finished(method))
    records = records_of(folder)
    steps = [r for r in records if "loss" in r]
    looks = [r for r in records if "dev.loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in looks] == [3, 6, 9, 12]
    assert len({r["loss"] for r in steps}) == 12
    assert all(len(r["projected_grad"]) == ("mezo" in method) for r in steps)
    best = min(looks, key=lambda r: r["dev.loss"])
    found = result_of(folder)["dev"]["best"]
    assert (found["step"], found["loss"]) == (best["step"], best["dev.loss"])
    # With weights 10 are the moments from which a longer run goes on.
    kept = {best["step"], 10} if method == "mezo_adam" else {best["step"]}
    assert {path.name for path in folder.glob("checkpoint/weights*")} == {
        f"weights-{step}.safetensors" for step in kept
    }
    assert (folder / "checkpoint/optimizer-10.safetensors").exists() == (method == "mezo_adam")


def test_what_eval_every_stood_for_is_in_the_result(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where the setting is null; another version may take null for another number."""
    assert "eval_every" not in result_of(run_folder(finished("mezo")))
    words = [*SMALL, *METHODS["mezo"], "steps=3", "batch_size=4", "zero_shot=false"]
    assert smezo(words, tmp_path).code == 0
    assert result_of(run_folder(tmp_path))["eval_every"] == 3


def test_the_result_is_that_of_the_saved_weights(finished: Callable[[str], Path]) -> None:
    """Figures follow from the saved scores, and those from the best weights, loaded anew."""
    folder = run_folder(finished("adamw"))
    result, scores = result_of(folder), load_file(folder / "scores.safetensors")
    cfg: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    task = load_task(cfg["task"], data_seed=0, cache=Path("/nowhere"))
    net, tokenizer = load_model(
        cfg["model"], dtype=torch.float32, device=torch.device("cpu"), cache=Path("/nowhere")
    )
    prompt = next(p for p in task.prompts if p.template == result["prompt"]["template"])
    labels = torch.tensor([row.label for row in task.test])
    scorer = Scorer(net, tokenizer)
    rows = encode(task.test, prompt, tokenizer, 256)
    before = scorer.scores(rows).detach()
    step = result["dev"]["best"]["step"]
    assert step < 12
    best = load_file(folder / f"checkpoint/weights-{step}.safetensors")
    assert not net.load_state_dict(best, strict=False).unexpected_keys
    after = scorer.scores(rows).detach()
    # Logits of size 4 in batches of another shape: the last bits differ.
    torch.testing.assert_close(scores["zero_shot"], before, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores["test"], after, rtol=0, atol=1e-5)
    assert (before - after).abs().max() > 0.01
    assert torch.equal(scores["labels"], labels)
    assert result["test"]["accuracy"] == metrics.accuracy(scores["test"], labels)
    assert result["zero_shot"]["accuracy"] == metrics.accuracy(scores["zero_shot"], labels)
    gain, error = metrics.paired_gain(
        *(metrics.correct(scores[name], labels) for name in ("test", "zero_shot"))
    )
    assert result["test"]["over_zero_shot"] == {"gain": gain, "standard_error": error}


def test_the_prompt_is_chosen_on_dev_alone(finished: Callable[[str], Path]) -> None:
    """The best calibrated zero-shot accuracy on dev, then its loss; the test set has no say."""
    folder = run_folder(finished("mezo"))
    chosen = result_of(folder)["prompt"]
    tried = state_of(folder)["notes"]["prompts"]
    assert len(tried) == 2
    key = [(p["dev_calibrated"]["accuracy"], -p["dev_calibrated"]["loss"]) for p in tried]
    assert chosen["template"] == tried[key.index(max(key))]["template"]
    assert all(p["dev"]["n"] == 16 for p in tried)


def test_the_words_of_a_run_are_plain_lines(finished: Callable[[str], Path]) -> None:
    """No escape codes in a pipe; both zero-shots, dev at a cadence, the summary; kept in a file."""
    cwd = finished("sparse_mezo")
    out = (cwd / "0.out").read_text()
    assert out == (run_folder(cwd) / "console.log").read_text()
    assert "\x1b" not in out
    assert "\r" not in out
    assert len(re.findall(r"^ +step +\d+ +dev accuracy 0\.\d+", out, re.MULTILINE)) == 4
    assert out.count("calibrated") >= 4
    summary = out[out.index("test accuracy") :]
    result = result_of(run_folder(cwd))
    for said in (
        f"{result['test']['accuracy']:.4f}",
        f"{result['zero_shot']['accuracy']:.4f}",
        f"{result['zero_shot_calibrated']['accuracy']:.4f}",
        f"{result['sparsity']['realised']:.4f}",
        *("24", "GiB", "result.json", "zero-shot", "0.6"),
    ):
        assert said in summary


def test_a_run_has_the_same_name_wherever_and_whenever(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """TASK-MODEL-METHOD-sSEED-DIGEST; neither the group nor the order of words is in the digest."""
    name = run_folder(finished("sgd")).name
    assert re.fullmatch(r"toy-tiny-llama-sgd-s0-[0-9a-f]{8}", name)
    words = words_of("sgd")[::-1]
    for more in (["name=other"], ["name=third", "seed=1"], ["name=fourth", "lr=0.02"]):
        # The name is known before the first look at the model.
        smezo([*words, *more], tmp_path, faults=[Fault("evaluate", 1, signal.SIGKILL).install])
    assert run_folder(tmp_path, "other").name == name
    assert run_folder(tmp_path, "third").name.startswith("toy-tiny-llama-sgd-s1-")
    assert run_folder(tmp_path, "fourth").name[:-8] == name[:-8]
    assert run_folder(tmp_path, "fourth").name != name


# ------------------------------------------------------------------------------- the same run again


def test_a_finished_run_is_skipped_in_one_line(finished: Callable[[str], Path]) -> None:
    """Exit code 0, one line, no model loaded, nothing written."""
    cwd = finished("mezo")
    folder = run_folder(cwd)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    ended = smezo(words_of("mezo"), cwd, faults=[no_model])
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("\n") == 1
    assert folder.name in ended.out
    assert f"{result_of(folder)['test']['accuracy']:.4f}" in ended.out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before


def test_if_exists_says_what_becomes_of_an_old_run(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """error refuses it and leaves it; fresh does it again, to the same numbers."""
    cwd = finished("mezo")
    assert "if_exists=fresh" in sentence_of(smezo(words_of("mezo", "if_exists=error"), cwd))
    words = words_of("mezo")
    assert smezo([*words, "if_exists=error"], tmp_path).code == 0  # there was none
    folder = run_folder(tmp_path)
    (folder / "checkpoint" / "weights-99.safetensors").touch()
    (folder / "old").touch()
    assert smezo([*words, "if_exists=fresh"], tmp_path).code == 0
    assert not (folder / "old").exists()
    assert (folder / "console.log").read_text().count("test accuracy") == 1
    assert_same_run(folder, run_folder(cwd))


# ------------------------------------------------------------------------------------- side by side


def test_two_runs_in_one_process_are_those_of_two(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """A sweep leaves the numbers, and the names, of runs started one by one."""
    for method in ("sparse_mezo", "adamw"):
        cwd = tmp_path / method
        ended = smezo([*words_of(method), "-m", "seed=0,1"], cwd)
        assert (ended.code, ended.err) == (0, "")
        first, second = sorted(p for p in (cwd / "runs/default").iterdir() if p.is_dir())
        assert_same_run(first, run_folder(finished(method)))
        assert smezo(words_of(method, "seed=1"), cwd / "alone").code == 0
        assert_same_run(second, run_folder(cwd / "alone"))
        assert records_of(first) != records_of(second)
        command = result_of(second)["command"]
        assert "seed=1" in command
        assert "0,1" not in command


def test_a_sweep_goes_on_after_a_refused_job(tmp_path: Path) -> None:
    """The job that cannot load its data is named with its words; the exit code is 2."""
    words = [*words_of("sgd"), "steps=1", "-m", "task.num_dev=9999,16"]
    ended = smezo(words, tmp_path)
    assert "task.num_dev=9999" in sentence_of(ended)
    statuses = {result_of(path.parent)["status"] for path in tmp_path.glob("runs/*/*/result.json")}
    assert statuses == {"failed", "done"}


def test_compiled_passes_change_no_bit(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """compile=true and compile=false (and auto) are one run with one name."""
    ended = smezo(words_of("sparse_mezo", "compile=true"), tmp_path)
    assert ended.code == 0, ended.err
    compiled, eager = run_folder(tmp_path), run_folder(finished("sparse_mezo"))
    assert result_of(compiled)["passes"] == "numba"
    assert result_of(eager)["passes"] == "eager"  # auto: a run this short is not worth it
    assert compiled.name == eager.name
    assert records_of(compiled) == records_of(eager)
    for pattern in ("checkpoint/*.safetensors", "scores.safetensors"):
        (mine,), (theirs,) = (list(path.glob(pattern)) for path in (compiled, eager))
        assert mine.read_bytes() == theirs.read_bytes()


def always_worth_it() -> None:
    """As if every run were long enough to compile for."""
    building.WORTH_IT = dense.WORTH_COMPILING = 0


def numba_is_broken() -> None:
    """As if Numba were not installed."""
    sys.modules["numba"] = None  # type: ignore[assignment]  # importing it raises ImportError


def test_without_numba_compile_is_refused_and_auto_goes_on(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """One sentence for compile=true; for auto the same numbers and a line on what is missing."""
    words = words_of("sparse_mezo", "compile=true")
    said = sentence_of(smezo(words, tmp_path / "true", faults=[numba_is_broken]))
    assert "compile=true" in said
    assert "Numba" in said
    faults = [numba_is_broken, always_worth_it]
    ended = smezo(words_of("sparse_mezo"), tmp_path / "auto", faults=faults)
    assert (ended.code, ended.err) == (0, "")
    (line,) = (line for line in ended.out.splitlines() if "Numba" in line)
    assert "passes  eager" in line
    assert_same_run(run_folder(tmp_path / "auto"), run_folder(finished("sparse_mezo")))


def numba_is_off() -> None:
    """As if its switch were set."""
    os.environ["NUMBA_DISABLE_JIT"] = "1"


def test_a_switch_that_turns_the_compiler_off_is_named(tmp_path: Path) -> None:
    said = sentence_of(
        smezo(words_of("sparse_mezo", "compile=true"), tmp_path, faults=[numba_is_off])
    )
    assert "compile=true: the compiler is off as long as NUMBA_DISABLE_JIT=1 is set" in said


# -------------------------------------------------------------------- terminal, W&B, the real thing


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    """Title, count, loss, dev, steps a second and time left move; the log file stays plain."""
    ours, theirs = pty.openpty()
    try:
        terminal = os.ttyname(theirs)
        env = {"TERM": "xterm-256color", "COLUMNS": "100"}
        seen = b""
        with Started(words_of("mezo", "steps=60"), tmp_path, out=terminal, env=env) as started:
            while started.alive or select.select([ours], [], [], 0)[0]:
                if select.select([ours], [], [], 0.05)[0]:
                    seen += os.read(ours, 65536)
            ended = started.wait()
    finally:
        os.close(ours)
        os.close(theirs)
    text = seen.decode()
    assert ended.code == 0, ended.err
    assert "\x1b[?25l" in text  # a moving bar hides the cursor ...
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # ... and gives it back
    assert re.search(r"train.*/60.*loss \d\.\d+.*/s.*left", text)
    log = (run_folder(tmp_path) / "console.log").read_text()
    assert "\x1b" not in log
    assert "test accuracy" in log


def test_wandb_offline_needs_no_network(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """logger=wandb writes an offline run beside metrics.jsonl; name and numbers stay."""
    pytest.importorskip("wandb")
    # Any request would go to a port that nobody listens on.
    env = {name: "http://127.0.0.1:9" for name in ("WANDB_BASE_URL", "HTTPS_PROXY", "HTTP_PROXY")}
    ended = smezo(words_of("sgd", "logger=wandb"), tmp_path, env=env)
    assert ended.code == 0, ended.err
    folder, plain = run_folder(tmp_path), run_folder(finished("sgd"))
    (offline,) = folder.glob("wandb/offline-run-*")
    (file,) = offline.glob("*.wandb")
    content = file.read_bytes()
    assert b"projected_grad" in content
    assert b"dev.loss" in content
    assert folder.name == plain.name
    assert records_of(folder) == records_of(plain)
    (mine,), (theirs,) = (list(path.glob("checkpoint/weights*")) for path in (folder, plain))
    assert mine.read_bytes() == theirs.read_bytes()


def test_the_module_is_a_command(finished: Callable[[str], Path]) -> None:
    """`python -m smezo_cli.train` from another folder: here it finds the finished run."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "smezo_cli.train", *words_of("sparse_mezo")]
    cwd = finished("sparse_mezo")
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("\n") == 1
    assert "done already" in ended.stdout


def test_the_executor_is_chosen_by_measuring_and_changes_no_number(
    tmp_path: Path, finished: Callable[[str], Path]
) -> None:
    """One line of the console and result.json name it; training has the bits of sequential."""
    done = {}
    for executor in ("auto", "lockstep"):
        words = [w for w in words_of("mezo", "name=by") if w != SEQUENTIAL]
        (tmp_path / executor).mkdir()
        ended = smezo([*words, f"method.executor={executor}"], tmp_path / executor)
        assert ended.code == 0, ended.err
        done[executor] = run_folder(tmp_path / executor, "by")
        said = [line for line in ended.out.splitlines() if line.startswith("  executor  ")]
        assert len(said) == (executor == "auto")
        if said:
            assert re.search(r"(sequential|lockstep) \(two forwards: .* s, .* s\)$", said[0])
    assert result_of(done["auto"])["executor"] in ("sequential", "lockstep")
    assert result_of(done["lockstep"])["executor"] == "lockstep"
    sequential = run_folder(finished("mezo"))
    for folder in done.values():
        losses, wanted = (
            [
                json.loads(line).get("loss")
                for line in (f / "metrics.jsonl").read_text().splitlines()
            ]
            for f in (folder, sequential)
        )
        assert losses == wanted
        assert result_of(folder)["test"] == result_of(sequential)["test"]
