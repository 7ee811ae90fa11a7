"""Launchers of sweeps: jobs that joblib and submitit start, and what docs/guide/sweeps.md shows."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from smezo_cli.cli.verbs import main
from smezo_cli.config import compose, composer, sweep
from smezo_cli.config.launch import launch
from tests import ROOT

SMALL = (
    "task=toy task.num_train=16 task.num_dev=8 task.num_test=8 task.prompt=0 "
    "model=tiny-llama device=cpu batch_size=4"
)


@pytest.fixture(autouse=True)
def _quick(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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


LEAK = """
import contextlib
import sys
from joblib.externals.loky.backend import resource_tracker
from smezo_cli.config import sweep

with sweep.waiting("joblib") if "quiet" in sys.argv else contextlib.nullcontext():
    resource_tracker.register("/nobody-has-it", "semlock")
"""


def test_semaphores_that_a_killed_worker_leaves_are_no_news() -> None:
    """Joblib's tracker warns of them after this process's last words; that depends on timing."""
    pytest.importorskip("joblib")
    assert "leaked semlock" in swept(LEAK)[2]  # it does, where nobody asks it not to
    assert swept(LEAK, "quiet") == (0, "", "")


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


# --- what docs/guide/sweeps.md shows ---------------------------------------------------------

SWEEPS = ROOT / "docs" / "guide" / "sweeps.md"
SHOWN = re.findall(r"^ {4}smezo (train .*)$", SWEEPS.read_text(), re.M)


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
