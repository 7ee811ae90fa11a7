"""Manners of a runner: what is kept, runs that go on, warm-up, experiments, jobs side by side."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from smezo_cli.cli.verbs import main
from smezo_cli.config import compose, composer, sweep
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

LAUNCHERS = {
    # With one worker joblib would run the jobs in the process that waits.
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
launchers = pytest.mark.parametrize("launcher", LAUNCHERS)

# What a job does is given by value to the processes, which import nothing of the tests.
ENDINGS = """
import os, pathlib, sys
from smezo_cli.config.launch import launch
from smezo_cli.errors import UserError

def run(cfg):
    pathlib.Path(f"{cfg.seed}.pid").write_text(str(os.getpid()))
    if cfg.seed == 1:
        raise UserError("no room.")
    if cfg.seed == 2:
        raise ZeroDivisionError("of mine")

sys.exit(launch(sys.argv[1:], run))
"""

STRUCK = """
import itertools, os, pathlib, signal, sys, time
from smezo_cli.config.launch import launch
from smezo_cli.train import run as real

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def leave():  # as SLURM asks to
    os.kill(os.getpid(), signal.SIGUSR2)

def wait():
    while not pathlib.Path("go").exists():
        time.sleep(0.02)

def run(cfg):
    struck = pathlib.Path(f"{cfg.seed}.struck")
    if cfg.seed in STRIKES and not struck.exists():
        from smezo_cli.scoring.scorer import Scorer

        loss, count = Scorer.loss, itertools.count(1)

        def counted(self, rows):
            if len(rows) == 4 and next(count) == 6:  # between the two losses of step 3
                struck.touch()
                STRIKES[cfg.seed]()
            return loss(self, rows)

        Scorer.loss = counted
    return real(cfg)

sys.exit(launch(sys.argv[1:], run))
"""


def needs(launcher: str) -> None:
    plugin = launcher.partition("_")[0]
    if importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
        pytest.skip(f"hydra/launcher={launcher} is not installed: {sweep.INSTALL[launcher]}")


def start(script: str, *words: str) -> "subprocess.Popen[str]":
    """A sweep as a process of its own, in this folder."""
    return subprocess.Popen(
        [sys.executable, "-c", script, "-m", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def swept(script: str, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a sweep."""
    with start(script, *words) as process:
        out, err = process.communicate()
    return process.returncode, out, err


@launchers
def test_a_sweep_ends_with_the_code_of_its_worst_job(launcher: str) -> None:
    """Not with that of the first that failed; the others go on; each is told in its words."""
    needs(launcher)
    words = [*LAUNCHERS[launcher], "task=toy"]
    code, _, err = swept(ENDINGS, *words, "seed=1,2")
    refused = "smezo: job 0 (task=toy seed=1): no room.\n"
    assert err.count(refused) == 1
    assert err.count("smezo: job 1 (task=toy seed=2): crashed") == 1
    assert code == 1, err
    pids = [Path(f"{seed}.pid").read_text() for seed in (1, 2)]
    assert len(set(pids)) == 2
    code, _, err = swept(ENDINGS, *words, "seed=0,1")
    assert (code, err) == (2, refused.replace("job 0", "job 1"))
    if launcher == "joblib":
        code, _, err = swept(ENDINGS, *words, "seed=0,4")
        assert (code, err) == (0, "")
    if launcher == "submitit_local":  # a crash is told with the file that holds the traceback
        (log,) = (f for f in Path("runs").rglob("*.err") if "ZeroDivision" in f.read_text())
        assert "ZeroDivisionError: of mine" in log.read_text()
        assert {path.name for path in Path("runs/default").iterdir()} == {
            *(".submitit", "multirun.yaml")
        }


MEZO = f"{SMALL} method=mezo lr=1e-3 steps=4 eval_every=2 method.executor=sequential"


def weights_of(name: str) -> dict[str, bytes]:
    """Seed and bytes of the weights at the end of each run of a group."""
    runs = {path.parent.name: path for path in Path("runs", name).glob("*/trajectory.bin")}
    return {
        run: b"".join(f.read_bytes() for f in sorted(path.parent.glob("checkpoint/weights-*")))
        for run, path in runs.items()
    }


@launchers
def test_a_sweep_with_a_killed_job_is_repeated_and_does_what_is_missing(launcher: str) -> None:
    """SIGKILL in the middle of step 3: exit code 1, one sentence, and nothing of it is lost.

    What is finished is skipped; the killed run goes on to the weights of one never killed. One that
    SLURM preempts (SIGUSR2) is started again by submitit, before the sweep ends.
    """
    needs(launcher)
    words = [*shlex.split(MEZO), "seed=1,2"]
    # Of joblib the death of one ends the others, wherever they are.
    strikes = "{1: die}" if launcher == "joblib" else "{1: die, 2: leave}"
    script = STRUCK.replace("STRIKES", strikes)
    code, out, err = swept(script, *LAUNCHERS[launcher], *words, "name=killed")
    assert code == 1, out + err
    assert err.count("\n") == 1, err
    assert "killed" in err
    assert "the same command does what is missing" in err
    if launcher == "submitit_local":
        assert "job 0 (" in err
        (done,) = Path("runs/killed").glob("*-s2-*/result.json")
        assert json.loads(done.read_text())["status"] == "done"
        logs = [file.read_text() for file in Path("runs/killed/.submitit").rglob("*.out")]
        assert sum(log.count("Requeued job") for log in logs) == 1
        code, out, err = swept(script, *LAUNCHERS[launcher], *words, "name=killed")
        assert (code, err) == (0, "")
    else:  # what goes on is the run folder's affair: in this process, which has torch already
        assert main(["train", "-m", *words, "name=killed"]) == 0
    (console,) = Path("runs/killed").glob("*-s1-*/console.log")
    assert "going on from step 2" in console.read_text()
    before = {file: file.stat().st_mtime_ns for file in Path("runs/killed").glob("*/result.json")}
    for name in ("killed", "whole"):  # in this process, one after the other
        assert main(["train", "-m", *words, f"name={name}"]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}  # both were done
    assert weights_of("killed") == weights_of("whole")
    assert len(weights_of("killed")) == 2


def test_of_two_copies_of_a_sweep_the_second_leaves_a_run_in_use_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It says who has it, does the others and ends with 2; the first skips what the second did."""
    words = [*shlex.split(MEZO), "seed=1,2", "name=twice"]
    with start(STRUCK.replace("STRIKES", "{1: wait}"), *words) as first:
        while not Path("1.struck").exists():
            assert first.poll() is None
            time.sleep(0.02)
        code = main(["train", "-m", *words])
        said = capfd.readouterr()
        Path("go").touch()
        out, err = first.communicate()
    assert code == 2, said.err
    assert said.err.count("\n") == 1
    assert re.search(r"is in use by process \d+; wait for it", said.err)
    assert (first.returncode, err) == (0, "")
    assert out.count("done already") == 1
    assert len(weights_of("twice")) == 2


def test_a_launcher_is_not_for_a_single_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra would ignore it."""
    needs("joblib")
    assert main(["train", "task=toy", "hydra/launcher=joblib"]) == 2
    assert "starts the jobs of a sweep; add -m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "joblib"), ("submitit_slurm", "submitit")]
)
def test_a_launcher_that_is_not_installed(
    launcher: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence with the command that installs it, as the extra in pyproject.toml pins it."""
    listed = composer.Composer.options

    def without(self: Any, group: str) -> list[str]:
        return ["basic"] if group == "hydra/launcher" else listed(self, group)

    monkeypatch.setattr(composer.Composer, "options", without)
    assert main(["train", "-m", "task=toy", f"hydra/launcher={launcher}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = " ".join(f"'{pin}'" for pin in project["optional-dependencies"][package])
    assert said.endswith(f"is not installed: python -m pip install {pins}.\n")


def test_what_a_launcher_refuses_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Here without SLURM."""
    needs("submitit_slurm")
    if shutil.which("srun"):
        pytest.skip("this is a SLURM cluster")
    assert main(["train", "-m", "task=toy", "hydra/launcher=submitit_slurm", "seed=0,1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "hydra/launcher=submitit_slurm: Could not detect" in said


def test_a_launcher_of_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM's has shell commands among its settings: a folder from elsewhere runs none."""
    needs("submitit_slurm")
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    text = (
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: submitit_slurm\n"
        "hydra:\n  mode: MULTIRUN\n  launcher:\n    setup: [touch ran]\n"
    )
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
    words = ["train", "--config-dir", "own", "experiment=mine", "task=toy"]
    assert main(words) == 2
    assert "hydra.launcher is set by a file" in capsys.readouterr().err
    assert not Path("ran").exists()


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


# --- what docs/sweeps.md shows ---------------------------------------------------------------

SHOWN = re.findall(r"^ {4}smezo (train .*)$", (ROOT / "docs" / "sweeps.md").read_text(), re.M)


@pytest.mark.parametrize("line", SHOWN)
def test_the_commands_of_the_page_compose(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the launcher that they name, whose keys Hydra knows; no run starts."""
    verb, *words = shlex.split(line)
    assert verb == "train"
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    launcher = given.get("hydra/launcher", "basic")
    if launcher != "basic":
        needs(launcher)
    if "-m" in words:
        assert compose.prepare(words).launcher == launcher
        return
    assert launch(words, lambda cfg: pytest.fail("ran")) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.hydra.launcher._target_.endswith(".SlurmLauncher")
    assert shown.hydra.launcher.partition == given["hydra.launcher.partition"]
    node = OmegaConf.to_container(shown.hydra.launcher, resolve=False)
    assert node["submitit_folder"] == "${hydra.sweep.dir}/.submitit/%j"


def test_the_page_has_every_launcher() -> None:
    named = {word for line in SHOWN for word in shlex.split(line) if word.startswith("hydra/")}
    assert {word.partition("=")[2] for word in named} == {*sweep.INSTALL}
