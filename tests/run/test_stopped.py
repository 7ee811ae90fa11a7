"""Runs that a signal stops: exit code 130, nothing is lost, and the printed command goes on."""

import functools
import itertools
import os
import shlex
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.run import frozen, prepare, zero_shot
from smezo_cli.scoring.forward import Forward
from smezo_cli.store.partial_scores import NAME
from tests.run.processes import Fault, count_batches, ctrl_c_with_tee, smezo
from tests.run.tiny_runs import (
    EXACT,
    SEQUENTIAL,
    SMALL,
    assert_same_run,
    flip,
    records_of,
    result_of,
    run_folder,
    state_of,
    words_of,
)


def test_a_stop_between_two_looks_leaves_no_weights_of_its_own(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """keep=all keeps those of the looks, whether the run was stopped in between or not."""
    words = words_of("adamw", "keep=all")
    assert smezo(words, tmp_path / "whole").code == 0
    for losses in (1, 4, 1):  # at step 0, 4 and 4 again
        stop = Fault("loss", losses, signal.SIGTERM)
        assert smezo(words, tmp_path / "part", faults=[stop.install]).code == 130
    assert smezo(words, tmp_path / "part").code == 0
    assert_same_run(run_folder(tmp_path / "part"), run_folder(tmp_path / "whole"))


def step_lines(folder: Path) -> int:
    return sum("loss" in record for record in records_of(folder))


@pytest.mark.parametrize("method", EXACT)
def test_a_signal_is_honoured_between_steps_and_nothing_is_lost(
    finished: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """SIGINT and SIGTERM in zero-shot, probes, looks, writes and the test: exit code 130 each time.

    The state is saved, the printed command goes on from it, and the end is the same bit for bit.
    """
    words, steps = words_of(method), 0
    stops = [
        Fault("evaluate", 1, signal.SIGINT),  # zero-shot on dev
        Fault("evaluate", 3, signal.SIGTERM),  # zero-shot on test
        Fault("loss", 1, signal.SIGINT),  # the first probe of all
        Fault("loss", 4, signal.SIGTERM),  # for MeZO the second probe of a step
        Fault("evaluate", 1, signal.SIGINT),  # a look at dev
        Fault("rename", 4, signal.SIGTERM),  # a checkpoint is being written
        Fault("evaluate", 3, signal.SIGINT),
    ]
    for fault in stops:
        ended = smezo(words, tmp_path, faults=[fault.install])
        folder = run_folder(tmp_path)
        assert ended.code == 130, (fault, ended.out[-500:], ended.err)
        assert ended.err == ""
        assert f"{fault.action.name}: " in ended.out
        assert "Traceback" not in ended.out
        assert result_of(folder)["status"] == "stopped", fault
        printed = shlex.split(ended.out.splitlines()[-1])
        assert printed[:2] == ["smezo", "train"]
        words = printed[2:]
        # Every step that was made is saved, and no other.
        made = step_lines(folder) if (folder / "metrics.jsonl").exists() else 0
        saved = state_of(folder)["step"] if (folder / "checkpoint/state.json").exists() else 0
        assert saved == made == result_of(folder)["step"] >= steps, fault
        steps = made
    assert steps > 3
    ended = smezo(words, tmp_path)
    assert ended.code == 0, ended.err
    assert f"from step {steps}" in ended.out
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))
    assert result_of(folder)["train_seconds"] > 0


STAGES = [(zero_shot, "choose_batching"), (prepare, "_choose_executor")]


def strike_in(stage: str) -> None:
    """Send SIGINT at the first forward of a stage; note it and each later one in a file."""
    (module,) = (module for module, name in STAGES if name == stage)
    real, computing, in_stage = getattr(module, stage), Forward.computing, False

    def entered(*args: Any, **keywords: Any) -> Any:
        nonlocal in_stage
        in_stage = True
        return real(*args, **keywords)

    def counted(self: Forward) -> Any:
        found = computing(self)
        if in_stage:
            if not Path("forwards").exists():
                os.kill(os.getpid(), signal.SIGINT)
            with Path("forwards").open("a") as file:
                file.write("forward\n")
        return found

    setattr(module, stage, entered)
    Forward.computing = counted  # type: ignore[method-assign]  # in a child process of its own


@pytest.mark.parametrize("stage", [name for _, name in STAGES])
def test_a_signal_before_the_first_step_is_honoured_at_the_next_forward(
    tmp_path: Path, stage: str
) -> None:
    """Of the choices that take several forwards, only the one under way is ended; no step is made.

    The prompt that was chosen without an evaluation on test is not chosen again.
    """
    words = [*words_of("mezo"), "method.executor=auto", "zero_shot=false"]
    words.remove(SEQUENTIAL)
    ended = smezo(words, tmp_path, faults=[functools.partial(strike_in, stage)])
    assert (ended.code, ended.err) == (130, "")
    assert "stopped; the same command goes on from here" in ended.out
    assert (tmp_path / "forwards").read_text().count("forward") == 1
    assert "two forwards:" not in ended.out
    assert result_of(run_folder(tmp_path))["status"] == "stopped"
    again = smezo(words, tmp_path)
    assert (again.code, again.err) == (0, "")
    assert ("chosen on dev" in again.out) == (stage == "choose_batching")


SCORED = {
    "mezo": words_of("mezo"),
    "adamw": words_of("adamw", "eval_every=6"),
    "linear_probe": [*SMALL, "model=tiny-llama", "method=linear_probe"],
    "icl": [*SMALL, "model=tiny-llama", "method=icl", "method.num_demonstrations=2"],
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that noted its batches and was never stopped."""

    @functools.cache
    def of(method: str) -> Path:
        cwd = tmp_path_factory.mktemp(method)
        assert smezo(SCORED[method], cwd, faults=[count_batches]).code == 0
        return cwd

    return of


@pytest.mark.parametrize("method", SCORED)
def test_a_stop_between_two_batches_keeps_what_is_scored(
    counted: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """In zero-shot, looks, hidden states and the test: every start is stopped at its 5th batch.

    No batch is computed twice, the end is that of a run that was never stopped.
    """
    whole, part, words = counted(method), tmp_path / "part", SCORED[method]
    stops = 0
    while True:
        before = len((part / "batches").read_text().splitlines()) if stops else 0
        ended = smezo(words, part, faults=[functools.partial(count_batches, 5)])
        if ended.code == 0:
            break
        assert (ended.code, ended.err) == (130, "")
        assert len((part / "batches").read_text().splitlines()) == before + 5
        assert "kept the scores of" in ended.out
        assert (run_folder(part) / NAME).is_file()
        stops += 1
    assert stops >= 2
    batches = [sorted((of / "batches").read_text().splitlines()) for of in (whole, part)]
    assert batches[0] == batches[1]
    assert_same_run(run_folder(part), run_folder(whole))


def tick() -> None:
    """As if the clock of a probe went on by a second from one look at it to the next."""
    clock = itertools.count()
    frozen.time = types.SimpleNamespace(perf_counter=lambda: float(next(clock)))  # type: ignore[assignment]


def test_seconds_of_a_probe_before_a_stop_count_too(
    counted: Callable[[str], Path], tmp_path: Path
) -> None:
    words = SCORED["linear_probe"]
    batches = (counted("linear_probe") / "batches").read_text().splitlines()
    first = next(k for k, line in enumerate(batches, 1) if line.startswith("features_all"))
    assert batches[first].startswith("features_all")  # so that there is one more
    stop = functools.partial(count_batches, first)
    assert smezo(words, tmp_path, faults=[stop, tick]).code == 130
    assert smezo(words, tmp_path, faults=[count_batches, tick]).code == 0
    # Hidden states before the stop and behind it, and the fit.
    assert result_of(run_folder(tmp_path))["train_seconds"] == 3.0


def test_a_stop_in_the_measurements_after_the_test_is_honoured(tmp_path: Path) -> None:
    """The loss noise of low precision; the scores of the test are kept, and the end is the same."""
    whole, part, words = tmp_path / "whole", tmp_path / "part", words_of("mezo", "dtype=bfloat16")
    assert smezo(words, whole, faults=[count_batches]).code == 0
    stop = Fault("noise", 1, signal.SIGTERM)
    ended = smezo(words, part, faults=[count_batches, stop.install])
    assert (ended.code, ended.err) == (130, "")
    assert "kept the scores of 24 rows" in ended.out
    assert smezo(words, part, faults=[count_batches]).code == 0
    batches = [(of / "batches").read_text().splitlines() for of in (whole, part)]
    assert batches[0] == batches[1]
    assert_same_run(run_folder(part), run_folder(whole))


@pytest.mark.parametrize("harm", ["flipped", "of another run"])
def test_partial_scores_that_are_not_this_runs_are_not_used(
    counted: Callable[[str], Path], tmp_path: Path, harm: str
) -> None:
    """Damaged, or of other weights: all is scored again, the file is gone at the end."""
    whole, part, words = counted("mezo"), tmp_path / "part", SCORED["mezo"]
    assert smezo(words, part, faults=[functools.partial(count_batches, 3)]).code == 130
    kept = run_folder(part) / NAME
    if harm == "flipped":
        flip(kept, 0.7)
    else:
        other = words_of("mezo", "seed=1")
        stop = [functools.partial(count_batches, 3)]
        assert smezo(other, tmp_path / "other", faults=stop).code == 130
        shutil.copy(run_folder(tmp_path / "other") / NAME, kept)
    ended = smezo(words, part, faults=[count_batches])
    assert (ended.code, ended.err) == (0, "")
    assert "before the stop" not in ended.out
    assert_same_run(run_folder(part), run_folder(whole))


@pytest.mark.parametrize("choice", ["fresh", "error"])
def test_the_printed_command_goes_on_whatever_if_exists_said(tmp_path: Path, choice: str) -> None:
    """if_exists=fresh would start over and if_exists=error refuse; blanks and newlines count."""
    prompt = ["task.prompt='{text}  It\nwas'", "task.labels=[bad,good]"]
    words = words_of("mezo", f"if_exists={choice}", *prompt)
    ended = smezo(words, tmp_path, faults=[Fault("loss", 9, signal.SIGINT).install])
    assert ended.code == 130
    printed = shlex.split(ended.out[ended.out.rindex("smezo train") :])[2:]
    again = smezo(printed, tmp_path)
    assert again.code == 0, again.err
    assert "from step 5" in again.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_ends_the_run(
    finished: Callable[[str], Path], tmp_path: Path, number: signal.Signals
) -> None:
    """Exit code 130 without a traceback; nothing is to be saved, the next start is a first."""
    ended = smezo(words_of("sgd"), tmp_path, faults=[Fault("load", 1, number).install])
    assert (ended.code, ended.err) == (130, "")
    assert "Traceback" not in ended.out
    assert result_of(run_folder(tmp_path))["status"] == "stopped"
    assert smezo(words_of("sgd"), tmp_path).code == 0
    assert_same_run(run_folder(tmp_path), run_folder(finished("sgd")))


def test_ctrl_c_saves_the_state_when_the_reader_of_the_output_is_gone(tmp_path: Path) -> None:
    """As Ctrl-C leaves `smezo train | tee log`; what was to be said is in console.log."""
    ended = smezo(words_of("mezo"), tmp_path, faults=[Fault("loss", 9, ctrl_c_with_tee).install])
    folder = run_folder(tmp_path)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert state_of(folder)["step"] == step_lines(folder) == 5
    assert "smezo train" in (folder / "console.log").read_text().splitlines()[-1]
