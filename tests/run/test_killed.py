"""Runs that were killed, or whose files were damaged: the same command ends with the same bits."""

import functools
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from smezo_cli.errors import UserError
from smezo_cli.run import loaded
from tests.run.processes import Fault, Started, sentence_of, smezo, until
from tests.run.tiny_runs import (
    EXACT,
    assert_same_run,
    flip,
    records_of,
    result_of,
    run_folder,
    state_of,
    words_of,
)


@pytest.mark.parametrize(("method", "seed"), [*((m, m) for m in EXACT), ("mezo", "lozo")])
def test_a_run_killed_anywhere_and_started_again_is_one_never_killed(
    finished: Callable[[str], Path], tmp_path: Path, method: str, seed: str
) -> None:
    """SIGKILL in probes, looks and writes, the places drawn: the end is the same bit for bit.

    Many more: python scripts/soak.py --kills 200.
    """
    rng = random.Random(seed)
    kills = 0
    while True:
        # Some 14 events lie between a start and its first checkpoint.
        fault = Fault("any", rng.randint(3, 20) if kills < 6 else 10**6, signal.SIGKILL)
        ended = smezo(words_of(method), tmp_path, faults=[fault.install])
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        kills += 1
        # What the system had not written when the power went.
        with (run_folder(tmp_path) / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9')
    assert kills >= 4
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))


@pytest.mark.parametrize("method", ["mezo", "adamw"])
def test_a_run_killed_behind_its_result_leaves_nothing_that_is_to_go(
    finished: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """SIGKILL at every file that is renamed or removed from where all is scored on."""
    kills, done = 0, 0
    while True:
        fault = Fault("end", kills - done + 1, signal.SIGKILL)
        ended = smezo(words_of(method), tmp_path, faults=[fault.install])
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        kills += 1
        if not done and result_of(run_folder(tmp_path))["status"] == "done":
            done = kills  # what is left then begins anew
    assert 3 <= done < kills - 2
    assert "unsettled" not in state_of(run_folder(tmp_path))["notes"]
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))
    assert "done already" in smezo(words_of(method), tmp_path).out


def words_said(cwd: Path) -> int:
    """Bytes in the console.log of the one run in `cwd`, if there is one."""
    return sum(path.stat().st_size for path in cwd.glob("runs/default/*/console.log"))


def has_said(words: float, started: Started, cwd: Path) -> bool:
    return words_said(cwd) > words or not started.alive


@pytest.mark.parametrize("method", EXACT)
def test_a_run_killed_from_outside_at_any_moment_is_one_never_killed(
    finished: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """The same with a look at what it says in place of a counter: moments no test thought of."""
    rng, codes = random.Random(method), []
    all_words = words_said(finished(method))
    for _ in range(3):
        words = words_said(tmp_path) + rng.uniform(0, 0.6) * all_words
        with Started(words_of(method), tmp_path) as started:
            until(functools.partial(has_said, words, started, tmp_path))
            codes.append(started.kill())
    assert -signal.SIGKILL in codes
    assert smezo(words_of(method), tmp_path).code == 0
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder in which a run was killed at one of its losses; to be copied."""

    @functools.cache
    def at(loss: int, *words: str) -> Path:
        cwd = tmp_path_factory.mktemp("killed")
        ended = smezo(words, cwd, faults=[Fault("loss", loss, signal.SIGKILL).install])
        assert ended.code == -signal.SIGKILL
        return cwd

    return at


DAMAGED = ("trajectory.bin", "checkpoint/state.json", "metrics.jsonl", "scores.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("name", [*DAMAGED, "checkpoint/weights-*"])
def test_a_damaged_file_of_a_stopped_run_is_made_again(
    finished: Callable[[str], Path],
    killed: Callable[..., Path],
    tmp_path: Path,
    name: str,
    share: float,
) -> None:
    """One flipped bit anywhere: the same command ends with the bits of a run never harmed."""
    words = words_of("sparse_mezo", "full_save_every=4")
    shutil.copytree(killed(21, *words), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    for path in folder.glob(name):
        flip(path, share)
    ended = smezo(words, tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(folder, run_folder(finished("sparse_mezo")))


@pytest.mark.parametrize("name", ["state.json", "weights-*", "optimizer-*"])
def test_a_damaged_file_of_a_stopped_first_order_run_is_made_again(
    finished: Callable[[str], Path], killed: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Without a trajectory the last good point is the beginning."""
    shutil.copytree(killed(8, *words_of("adamw")), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    paths = list((folder / "checkpoint").glob(name))
    assert paths
    for path in paths:
        flip(path, 0.7)
    ended = smezo(words_of("adamw"), tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert name == "state.json" or "trained again from the first step on" in ended.out
    assert_same_run(folder, run_folder(finished("adamw")))


@pytest.mark.parametrize("name", [*DAMAGED, "result.json", "config.yaml", "checkpoint/weights-*"])
def test_a_damaged_file_of_a_finished_run_is_made_again(
    finished: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """It is not skipped as if nothing had happened."""
    shutil.copytree(finished("sparse_mezo"), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    (path,) = folder.glob(name)
    before = path.read_bytes()
    flip(path, 0.7)
    ended = smezo(words_of("sparse_mezo"), tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    if name in ("trajectory.bin", "config.yaml"):  # the seconds of a step are another's
        assert len(path.read_bytes()) == len(before)
    assert_same_run(folder, run_folder(finished("sparse_mezo")))


@pytest.mark.parametrize("name", ["scores.safetensors", "result.json", "checkpoint/state.json"])
def test_a_damaged_file_of_a_finished_first_order_run_is_made_again(
    finished: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Its lr falls, so it has the best weights alone; if the state is good, no step is made."""
    shutil.copytree(finished("adamw"), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    assert state_of(folder)["best_step"] < 12
    flip(folder / name, 0.7)
    faults = [] if "state" in name else [Fault("loss", 1, signal.SIGKILL).install]
    ended = smezo(words_of("adamw"), tmp_path / "run", faults=faults)
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(folder, run_folder(finished("adamw")))
    assert "done already" in smezo(words_of("adamw"), tmp_path / "run").out


def test_a_first_order_run_whose_last_weights_are_lost_is_made_again(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(finished("adamw"), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    for path in (*folder.glob("checkpoint/weights-*"), folder / "result.json"):
        path.unlink()
    ended = smezo(words_of("adamw"), tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert "trained again from the first step on" in ended.out
    assert_same_run(folder, run_folder(finished("adamw")))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_metrics_that_no_trajectory_makes_again_keep_what_can_be_read(
    tmp_path: Path, schedule: str
) -> None:
    """It is said how much that is, and once: afterwards the run is whole."""
    words = words_of("adamw", f"lr_schedule={schedule}")
    assert smezo(words, tmp_path / "whole").code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    before = records_of(folder)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert "loss" in before[4]
    lines[4] = lines[4].replace(b":", b";", 1)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines)[:-9])  # and the last look's end is lost
    ended = smezo(words, tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    said = "metrics.jsonl is damaged: 11 of 12 steps can be read, the rest is lost"
    assert ended.out.count(said) == 1
    assert records_of(folder) == [*before[:4], *before[5:-1]]
    for name in ("weights", "test", "dev", "zero_shot", "step"):
        assert result_of(folder)[name] == result_of(run_folder(tmp_path / "whole"))[name]
    again = smezo(words, tmp_path / "run")
    assert (again.code, again.out.count("\n")) == (0, 1)
    assert "done already" in again.out


def unreachable() -> None:
    """As if the hub that the model comes from did not answer."""

    def refuse(*_: object, **__: object) -> None:
        raise UserError("the hub does not answer.")

    loaded.load_model = refuse  # type: ignore[assignment]  # in a child process of its own


BROKEN_OFF = {
    "unreachable": (unreachable, 2),
    # Between the zero-shot scores of test, which are saved, and those of the trained weights.
    "stopped": (Fault("evaluate", 2, signal.SIGTERM).install, 130),
    "killed": (Fault("evaluate", 2, signal.SIGKILL).install, -signal.SIGKILL),
}


@pytest.mark.parametrize("how", BROKEN_OFF)
def test_a_mending_that_is_broken_off_leaves_the_result_and_goes_on(
    finished: Callable[[str], Path], tmp_path: Path, how: str
) -> None:
    fault, code = BROKEN_OFF[how]
    words = words_of("sparse_mezo")
    shutil.copytree(finished("sparse_mezo"), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    before = (folder / "result.json").read_bytes()
    flip(folder / "scores.safetensors", 0.7)
    for _ in range(2):
        assert smezo(words, tmp_path / "run", faults=[fault]).code == code
        assert (folder / "result.json").read_bytes() == before
    ended = smezo(words, tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert "test accuracy" in ended.out
    assert_same_run(folder, run_folder(finished("sparse_mezo")))
    assert "done already" in smezo(words, tmp_path / "run").out


def test_a_killed_run_computes_no_step_twice(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """What was made after the last look is applied from the trajectory, without a forward."""
    killed = Fault("loss", 12, signal.SIGKILL)  # within step 6; looks are at 3, 6, 9 and 12
    assert smezo(words_of("sparse_mezo"), tmp_path, faults=[killed.install]).code < 0
    folder = run_folder(tmp_path)
    assert state_of(folder)["step"] == 3
    assert (folder / "metrics.jsonl").read_text().splitlines()[-1].startswith('{"step": 5, "loss"')
    again = Fault("loss", 2 * (12 - 5) + 1, signal.SIGKILL)  # one loss more than is needed
    ended = smezo(words_of("sparse_mezo"), tmp_path, faults=[again.install])
    assert ended.code == 0, ended.err
    assert "2 steps after step 3 are recorded: applied" in ended.out
    assert_same_run(folder, run_folder(finished("sparse_mezo")))


def test_a_trajectory_of_other_settings_is_refused(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """One sentence names what differs; nothing is applied or overwritten."""
    shutil.copytree(finished("sparse_mezo"), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    smezo(words_of("sparse_mezo", "seed=1"), tmp_path)
    foreign = (run_folder(tmp_path) / "trajectory.bin").read_bytes()
    (folder / "trajectory.bin").write_bytes(foreign)
    (folder / "result.json").unlink()
    said = sentence_of(smezo(words_of("sparse_mezo"), tmp_path / "run"))
    assert "another config and seed" in said
    assert "if_exists=fresh" in said
    assert (folder / "trajectory.bin").read_bytes() == foreign
