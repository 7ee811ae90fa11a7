"""TensorBoard and W&B beside metrics.jsonl: the same numbers once, killed or in a sweep."""

import importlib.util
import json
import shlex
import signal
import struct
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smezo_cli.cli.verbs import main
from smezo_cli.run.loggers import _numbers
from tests import ROOT
from tests.run.processes import Fault, smezo

SMALL = (
    "task=toy task.num_train=16 task.num_dev=8 task.num_test=8 task.prompt=0 model=tiny-llama "
    "device=cpu batch_size=4 method=mezo lr=1e-3 eval_every=2 method.executor=sequential"
)

# Between the two losses of step 5 of 6.
KILLED = Fault("loss", 10, signal.SIGKILL)
# Zero-shot on dev and test, the evaluations at steps 2 and 4.
STOPPED = Fault("evaluate", 4, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _quick(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_folder() -> Path:
    (found,) = (path.parent for path in Path("runs").glob("*/*/config.yaml"))
    return found


# ------------------------------------------------------------------------------------- TensorBoard


def series_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each series, as TensorBoard itself reads them."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl and result.json; TensorBoard's values are float32."""
    found: dict[str, list[tuple[int, float]]] = {}
    result = json.loads((folder / "result.json").read_text())
    last = {
        f"{part}.{name}": value
        for part in ("test", "zero_shot", "zero_shot_calibrated")
        for name, value in result[part].items()
    }
    for record in [*records_of(folder), {"step": result["step"], **last}]:
        for name, value in record.items():
            numbers = value if isinstance(value, list) else [value]
            for place, number in enumerate(numbers):
                if isinstance(number, int | float) and name != "step":
                    tag = name if len(numbers) == 1 else f"{name}/{place}"
                    found.setdefault(tag, []).append((record["step"], float(np.float32(number))))
    return found


def tensorflow_is_installed() -> None:
    """As if the folder were that of installed packages."""
    sys.path.insert(0, "elsewhere")


def test_a_killed_run_that_goes_on_has_every_step_once() -> None:
    """SIGKILL in step 5 of 6; then each number of metrics.jsonl stands there once, at its step.

    Nothing is written outside the run folder, and a TensorFlow that is installed is not imported.
    """
    pytest.importorskip("tensorboard")
    words = [*shlex.split(SMALL), "steps=6", "logger=tensorboard"]
    Path("elsewhere").mkdir()
    Path("elsewhere/tensorflow.py").write_text("open('imported', 'w')\nraise ImportError\n")
    faults = [tensorflow_is_installed, KILLED.install]
    killed = smezo(words, Path.cwd(), env={"HOME": "home"}, faults=faults)
    assert killed.code == -9, killed.err
    folder = run_folder()
    (first,) = (folder / "tensorboard").iterdir()
    assert main(["train", *words]) == 0
    assert not first.exists()
    found = series_of(folder)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["dev.loss"]] == [2, 4, 6]
    wanted = expected(folder)
    for name in ("over_zero_shot", "over_zero_shot_calibrated"):  # a mapping each
        assert len(found.pop(f"test.{name}.gain")) == 1
        assert len(found.pop(f"test.{name}.standard_error")) == 1
    assert found == wanted
    written = {path.parts[0] for path in Path().iterdir()}
    assert written == {"runs", "elsewhere", "0.out", "0.err"}  # these two are what it printed
    assert {path.name for path in Path("elsewhere").iterdir()} <= {"tensorflow.py", "__pycache__"}


def test_what_was_logged_before_there_was_tensorboard_is_there_too() -> None:
    """A run of two steps with another logger, extended to four with two queries a step."""
    pytest.importorskip("tensorboard")
    words = [*shlex.split(SMALL), "lr_schedule=constant", "method.num_queries=2"]
    assert main(["train", *words, "steps=2"]) == 0
    assert not (run_folder() / "tensorboard").exists()
    assert main(["train", *words, "steps=4", "logger=tensorboard"]) == 0
    found = series_of(run_folder())
    for name in ("loss", "seconds", "projected_grad/0", "projected_grad/1"):
        assert [step for step, _ in found[name]] == [1, 2, 3, 4]
    assert [step for step, _ in found["test.accuracy"]] == [4]


def test_numbers_of_a_record() -> None:
    record = {"step": 3, "a": None, "b": [2.5], "c": [1, 2], "d": {"e": 4, "f": "x"}, "g": "h"}
    numbers = [("step", 3.0), ("b", 2.5), ("c/0", 1.0), ("c/1", 2.0), ("d.e", 4.0)]
    assert list(_numbers(record)) == numbers


def test_event_files_are_not_written_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder from elsewhere may hold one."""
    pytest.importorskip("tensorboard")
    (tmp_path / "out").mkdir()
    words = [*shlex.split(SMALL), "lr_schedule=constant"]
    assert main(["train", *words, "steps=1"]) == 0
    (run_folder() / "tensorboard").symlink_to(tmp_path / "out")
    assert main(["train", *words, "steps=2", "logger=tensorboard"]) == 2
    assert "it is a link to elsewhere" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_without_the_package_one_sentence_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before anything is made, with the pin of pyproject.toml."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    assert main(["train", *shlex.split(SMALL), "logger=tensorboard"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = project["optional-dependencies"]["tensorboard"]
    assert said.endswith(f"is not installed: python -m pip install '{pin}'.\n")
    assert not Path("runs").exists()


# --------------------------------------------------------------------------------------------- W&B


def sent_by(file: Path) -> list[Any]:
    """The records of an offline run: 7 bytes (a name and a version), then a log as LevelDB has it.

    Its blocks are of 32 KiB, and a record is one piece or several: checksum (4 bytes), length (2),
    whether it is whole (1), first (2), middle (3) or last (4), and so many bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, found, pieces = file.read_bytes(), 7, [], b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(pieces))
            pieces = b""
    return found


@pytest.mark.parametrize(("fault", "code"), [(KILLED, -9), (STOPPED, 130)], ids=["kill", "stop"])
def test_the_parts_of_a_resumed_run_hold_each_step_once(
    fault: Fault, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in step 5 of 6, or a stop in the look at step 4: each row once, with its look.

    Every part says that it resumes the run, by which W&B appends it; the run says what to upload.
    """
    pytest.importorskip("wandb")
    words = [*shlex.split(SMALL), "steps=6", "logger=wandb"]
    first = smezo(words, Path.cwd(), faults=[fault.install])
    assert first.code == code, first.err
    assert main(["train", *words]) == 0
    folder = run_folder()
    command = f"wandb sync {folder}/wandb"
    assert f"upload: {command} (its 2 parts together: " in capsys.readouterr().out
    parts = [sent_by(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
    assert len(parts) == 2
    rows = [
        [
            {i.key or ".".join(i.nested_key): i.value_json for i in r.history.item}
            for r in part
            if r.WhichOneof("record_type") == "history"
        ]
        for part in parts
    ]
    steps = [[int(row["_step"]) for row in part] for part in rows]
    assert steps[0] + steps[1] == [1, 2, 3, 4, 5, 6]  # what W&B had not written comes again
    assert len(steps[0]) == 3 or code == -9
    wanted: dict[int, dict[str, Any]] = {}
    for record in records_of(folder):
        wanted.setdefault(record["step"], {}).update(record)
    for row in [*rows[0], *rows[1]]:
        found = {key: json.loads(value) for key, value in row.items() if key[0] != "_"}
        of_step = wanted[int(row["_step"])]
        assert {k: v for k, v in found.items() if k != "seconds"} == {
            k: v for k, v in of_step.items() if k not in ("step", "seconds")
        }
    runs = [r.run for part in parts for r in part if r.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1
    assert all(run.resume for run in runs)
    from click.testing import CliRunner
    from wandb.cli.cli import cli

    listed = CliRunner().invoke(cli, ["sync", "--dry-run", *shlex.split(command)[2:]])
    assert listed.exit_code == 0, listed.output
    assert "2 run(s)" in listed.output


def test_each_job_of_a_sweep_is_a_finished_run_of_wandb() -> None:
    """One job after the other in this process, and two in workers of joblib: never one for two.

    Name, number of records and exit code are those of the job, of one that failed too.
    """
    pytest.importorskip("wandb")
    words = [*shlex.split(SMALL), "steps=2", "logger=wandb"]
    assert main(["train", "-m", *words, "seed=0,1", "name=alone"]) == 0
    diverging = [word for word in words if word != "lr=1e-3"]
    assert main(["train", *diverging, "lr=1e38", "name=diverged"]) == 2
    groups = ["alone", "diverged"]
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is not None:
        side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
        more = [*side, *words, "seed=0,1", "name=side"]
        from joblib.externals.loky import get_reusable_executor

        assert main(["train", "-m", *more]) == 0
        get_reusable_executor().shutdown()  # else its workers would wait for more
        groups.append("side")
    for group in groups:
        folders = [path.parent for path in Path("runs", group).glob("*/config.yaml")]
        assert len(folders) == (1 if group == "diverged" else 2)
        for folder in folders:
            (file,) = folder.glob("wandb/offline-run-*/*.wandb")
            sent = sent_by(file)
            (run,) = (r.run for r in sent if r.WhichOneof("record_type") == "run")
            assert run.display_name == folder.name
            assert run.run_id == f"{group}-{folder.name}"
            ends = [r.exit.exit_code for r in sent if r.WhichOneof("record_type") == "exit"]
            assert ends == [1 if group == "diverged" else 0]
            history = [r for r in sent if r.WhichOneof("record_type") == "history"]
            steps = {record["step"] for record in records_of(folder)}
            assert len(history) == len(steps)
