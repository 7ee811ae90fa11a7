"""Manners of a runner: what is kept, runs that go on, warm-up, experiments, jobs in turn."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from smezo_cli.cli.verbs import main
from smezo_cli.config import sweep
from smezo_cli.config.launch import launch
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.store.folder import RunFolder
from tests import ROOT

SMALL = (
    "task=toy task.num_train=16 task.num_dev=8 task.num_test=8 task.prompt=0 "
    "model=tiny-llama device=cpu batch_size=4"
)
ADAMW = f"{SMALL} method=adamw lr=1e-2 eval_every=2"
SPARSE = f"{SMALL} method=sparse_mezo lr=1e-2 method.mask_refresh_every=3 eval_every=2"


@pytest.fixture(autouse=True)
def _quick(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(words: str) -> Path:
    """`smezo train WORDS` to its end; the newest run folder."""
    assert main(["train", *shlex.split(words)]) == 0
    return max(Path("runs").glob("*/*/result.json"), key=lambda p: p.stat().st_mtime_ns).parent


def result_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded


def records_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


# --- keep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("keep", ["best", "last", "all"])
def test_the_checkpoint_holds_what_keep_says(
    keep: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs what it may go on from and the best; at the end what the test used.

    A run with a constant lr can be extended, so that its last weights and optimizer stay, too.
    """
    seen: list[list[int]] = []
    save, figures = RunFolder.save, Evaluation.figures
    losses = iter([9.0, 0.5, 0.3, 0.4, 0.6])  # of dev: zero-shot, then at steps 2, 4, 6 and 8

    def noted(self: RunFolder, *words: Any) -> None:
        save(self, *words)
        seen.append(words[0].weights())

    def scripted(self: Evaluation, offsets: torch.Tensor | None = None) -> dict[str, Any]:
        found = figures(self, offsets)
        is_dev = len(self.rows) == 8 and offsets is None
        return found | {"loss": next(losses)} if is_dev else found

    monkeypatch.setattr(RunFolder, "save", noted)
    monkeypatch.setattr(Evaluation, "figures", scripted)
    words = f"{ADAMW} task.num_test=12 steps=8 keep={keep} lr_schedule={schedule}"
    folder = train(words)
    assert (
        seen
        == {
            "best": [[2], [4], [4, 6], [4, 8]],
            "last": [[2], [4], [6], [8]],
            "all": [[2], [2, 4], [2, 4, 6], [2, 4, 6, 8]],
        }[keep]
    )
    tested = 8 if keep == "last" else 4
    steps = {"best": {tested}, "last": {8}, "all": {2, 4, 6, 8}}[keep]
    names = {"state.json", *(f"weights-{step}.safetensors" for step in steps)}
    if schedule == "constant":
        names |= {"weights-8.safetensors", "optimizer-8.safetensors"}
    assert kept(folder) == sorted(names)
    assert result_of(folder)["dev"]["best"]["step"] == tested


# --- longer runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [ADAMW, SPARSE], ids=["adamw", "sparse_mezo"])
def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_never_ended(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Constant lr: weights, metrics and figures of a run of that length from the start, bitwise."""
    words += " lr_schedule=constant"
    short = train(f"{words} steps=4")
    capsys.readouterr()
    longer = train(f"{words} steps=8")
    assert longer == short
    assert "going on from step 4" in capsys.readouterr().out
    whole = train(f"{words} steps=8 name=whole")
    assert whole.name == longer.name
    assert records_of(longer) == records_of(whole)
    assert kept(longer) == kept(whole)
    for name in [n for n in kept(whole) if n != "state.json"]:
        mine, theirs = ((f / "checkpoint" / name).read_bytes() for f in (longer, whole))
        assert mine == theirs, name
    for key in ("test", "zero_shot", "dev", "steps", "step", "num_forwards", "sparsity", "digest"):
        assert result_of(longer)[key] == result_of(whole)[key], key


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_lr_knew_its_length_is_not_extended(schedule: str) -> None:
    """More steps are another run, in a folder of its own."""
    words = f"{ADAMW} lr_schedule={schedule}"
    short, longer = train(f"{words} steps=2"), train(f"{words} steps=4")
    assert short != longer
    assert (result_of(short)["step"], result_of(longer)["step"]) == (2, 4)


def test_warm_up_halves_the_first_of_two_steps() -> None:
    """SGD moves by lr times gradient: with warmup_steps=1 the first step goes half the way."""
    words = f"{SMALL} method=sgd lr=1e-1 lr_schedule=constant keep=all eval_every=1 steps=2"
    plain, warm = train(words), train(f"{words} warmup_steps=1")
    start = train(f"{words} name=start lr=1e-30")  # nothing moves
    first = [load_file(f / "checkpoint/weights-1.safetensors") for f in (plain, warm, start)]
    for name, zero in first[2].items():
        whole, half = first[0][name] - zero, first[1][name] - zero
        # Weights of size 1 in float32: differences carry an error of 1e-7.
        torch.testing.assert_close(half, whole / 2, rtol=0, atol=3e-7)
    assert max(float((first[0][n] - z).abs().max()) for n, z in first[2].items()) > 1e-3
    assert result_of(warm)["warmup_steps"] == 1


# --- sweeps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        ("", [(m, s) for m in ("sparse_mezo", "mezo", "adamw") for s in (0, 1, 2)]),
        ("method=mezo seed=3,4", [("mezo", 3), ("mezo", 4)]),
    ],
    ids=["as it is", "two of mine"],
)
def test_an_experiment_sweeps_over_what_it_says_and_the_command_line_wins(
    words: str, jobs: list[tuple[str, int]]
) -> None:
    """experiment=embedded needs no -m; what is given replaces what it would have swept over."""
    seen: list[tuple[str, int]] = []

    def run(cfg: DictConfig) -> None:
        assert (cfg.task.name, cfg.model.name) == ("rotten_tomatoes", "smollm2-135m")
        seen.append((cfg.method.name, cfg.seed))

    assert launch(["experiment=embedded", *words.split()], run) == 0
    assert sorted(seen) == sorted(jobs)


# --- jobs in processes of their own ----------------------------------------------------------

ONE_AFTER_THE_OTHER = """
import os, pathlib, signal, sys, time
from smezo_cli.config.launch import launch

def run(cfg):
    sys.modules["torch"] = None  # what a job loads; the next must not see it
    pathlib.Path(f"{cfg.seed}.pid").write_text(str(os.getpid()))
    if cfg.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.seed == 2:
        time.sleep(100)

assert "torch" not in sys.modules
sys.exit(launch(["-m", "task=toy", *sys.argv[1:]], run))
"""


@contextmanager
def one_after_the_other(words: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a session of its own, of jobs that load nothing: 1 is killed, 2 takes long."""
    with subprocess.Popen(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, *words.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as under_way:
        try:
            yield under_way
        finally:
            under_way.kill()


def pid_of(seed: int) -> int:
    """Of a job, once it runs."""
    path, end = Path(f"{seed}.pid"), time.monotonic() + 60
    while not (path.is_file() and (text := path.read_text())):
        assert time.monotonic() < end, "the job does not start"
        time.sleep(0.01)
    return int(text)


def test_a_job_that_is_killed_does_not_stop_the_others() -> None:
    """For want of memory, say. It is named with its words, and the exit code is 1."""
    with one_after_the_other("seed=0,1,3") as under_way:
        _, err = under_way.communicate(timeout=60)
    said = "smezo: job 1 (task=toy seed=1): ended by SIGKILL (is there memory enough?); "
    assert err == f"{said}{sweep.GO_ON}\n"
    assert under_way.returncode == 1
    assert len({under_way.pid, *(pid_of(seed) for seed in (0, 1, 3))}) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["the sweep", "its group, as a terminal does", "its job"])
def test_a_stopped_sweep_leaves_no_job_behind(to: str, number: signal.Signals) -> None:
    """No traceback, 130, and no job after the one that was stopped."""
    if (to, number) == ("its job", signal.SIGTERM):
        pytest.skip("a job takes that for a wish once its run has begun, which these have not")
    with one_after_the_other("seed=2,3") as under_way:
        job = pid_of(2)
        if to.startswith("its group"):
            os.killpg(under_way.pid, number)
        else:
            os.kill(job if to == "its job" else under_way.pid, number)
        out, err = under_way.communicate(timeout=60)
    assert (out, err, under_way.returncode) == ("", "", 130)
    assert not Path("3.pid").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(job, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the child of a killed parent")
def test_a_killed_sweep_takes_its_job_along() -> None:
    """Else the job would hold its run folder, and the same command would be refused."""
    with one_after_the_other("seed=2,3") as under_way:
        job = pid_of(2)
        under_way.kill()
        under_way.wait(60)
        end = time.monotonic() + 60
        while True:
            try:
                state = Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[0]
            except FileNotFoundError:
                break
            if state == "Z":  # nobody here may be there to take it up
                break
            assert time.monotonic() < end, "the job goes on"
            time.sleep(0.01)


def test_a_job_of_a_sweep_is_a_run_of_its_own_its_memory_included() -> None:
    """Numba and LLVM, which the first job loads, are no memory of the second: they have 170 MiB.

    16 MiB is what the C library and the kernel may do in one process and not in the other.
    """
    recipe = Path("own/recipe/toy-tiny-opt-mezo.yaml")
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\ncompile: true\n")
    words = f"train {SMALL} --config-dir own method=mezo lr=1e-3 steps=2 eval_every=1"
    peaks, folders = [], []
    for more in ("name=swept -m model=tiny-opt,tiny-llama", "name=alone model=tiny-llama"):
        command = [sys.executable, "-m", "smezo_cli", *shlex.split(words), *more.split()]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
        if more.startswith("name=swept"):
            assert "passes  numba" in ended.stdout.lower()
        folders.append(
            next(Path("runs", more.split()[0].removeprefix("name=")).glob("*tiny-llama*"))
        )
        peaks.append(result_of(folders[-1])["peak_memory_bytes"])
    swept, alone = folders
    assert abs(peaks[0] - peaks[1]) < 16 << 20, [peak >> 20 for peak in peaks]
    assert records_of(swept) == records_of(alone)
    assert kept(swept) == kept(alone)
    for name in [n for n in kept(alone) if n != "state.json"]:
        mine, theirs = ((f / "checkpoint" / name).read_bytes() for f in (swept, alone))
        assert mine == theirs, name
    for key in ("test", "zero_shot", "dev", "weights"):
        assert result_of(swept)[key] == result_of(alone)[key]


def test_what_a_job_leaves_behind_changes_no_number_of_the_next() -> None:
    """A sweep over models and dtypes: the third of four runs is the one that ran alone.

    test_train.py compares with fresh processes; here the jobs before differ in what they load.
    """
    words = f"{SMALL.replace('model=tiny-llama', '')} method=mezo lr=1e-3 steps=2 eval_every=1"
    sweep = "model=tiny-opt,tiny-llama dtype=float32,bfloat16 name=swept"
    assert main(["train", "-m", *shlex.split(f"{words} {sweep}")]) == 0
    assert len(list(Path("runs/swept").glob("*/result.json"))) == 4
    alone = train(f"{words} model=tiny-llama dtype=float32 name=alone")
    twin = Path("runs/swept") / alone.name
    assert records_of(twin) == records_of(alone)
    assert len(records_of(alone)) == 4
    for key in ("test", "zero_shot", "dev"):
        assert result_of(twin)[key] == result_of(alone)[key]
