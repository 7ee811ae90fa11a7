"""The run folder: whole files or none, one process at a time, checkpoints one can go on from."""

import errno
import gc
import json
import mmap
import os
import re
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.files import atomic, sealed
from smezo_cli.files.space import check_space
from smezo_cli.machine.memory import PeakMemory
from smezo_cli.machine.stop import StopRequest
from smezo_cli.store import folder as runs
from smezo_cli.store import versions
from smezo_cli.store.folder import RunFolder, State

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    opened = RunFolder(tmp_path / "runs" / "default" / "toy-s0")
    yield opened
    opened.close()


def weights(value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"a.weight": torch.full((3, 2), value, dtype=dtype), "b": torch.tensor([value, -0.0])}


def state_of(folder: RunFolder) -> State:
    loaded = folder.load_state()
    assert loaded is not None
    return loaded


def saved(folder: RunFolder, step: int) -> Mapping[str, Tensor]:
    """The weights of a step, which the state names."""
    return folder.load_weights(state_of(folder), step)


def names(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.checkpoint.iterdir()}


def message_of(call: Callable[[], object]) -> str:
    """The one sentence of the UserError that `call` raises."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


class Killed(BaseException):
    """Stands for a SIGKILL: nothing may clean up after it."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def dies(
    owner: object, name: str, instead: Callable[..., object], call: Callable[[], object]
) -> None:
    """Run `call` with one function replaced by another that does not come back from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, instead)
        with pytest.raises(Killed):
            call()


# ------------------------------------------------------------------------------ whole files or none


def test_a_write_killed_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    """What is written goes to another name first; what is left there does not hurt the next one."""
    path = tmp_path / "result.json"
    atomic.write_text(path, "old")
    dies(os, "replace", killed, lambda: atomic.write_text(path, "new"))
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    atomic.write_text(path, "newer")
    assert path.read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_file_is_on_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming first and syncing later would leave an empty file after a power cut."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1]
        )
    atomic.write_text(tmp_path / "a.json", "{}")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["os", "safetensors"],
)
def test_a_disk_that_fills_up_is_one_sentence_and_the_old_tensors_stay(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Half a tensor file never takes the place of a whole one, whoever reports the full disk."""
    folder.save_scores({"zero_shot": torch.ones(3)})
    before = {path.name for path in folder.path.iterdir()}

    def fills_up(content: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("smezo_cli.store.saved.save_file", fills_up)
    said = message_of(lambda: folder.save_scores({"zero_shot": torch.zeros(3)}))
    assert "No space left on device" in said
    assert "scores.safetensors" in said
    assert folder.load_scores()["zero_shot"].tolist() == [1, 1, 1]
    assert {path.name for path in folder.path.iterdir()} == before  # nothing half is left


def test_a_checkpoint_is_refused_where_there_is_no_room_for_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence says how much there is and how much is needed; the old checkpoint stays."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**8, 10**8))
    check_space(folder.path, 10**7)
    said = message_of(lambda: check_space(folder.path, 3 * 10**9))
    assert "100 MB free" in said
    assert "needs 3.00 GB" in said
    assert "runs_dir=" in said
    folder.save(State(step=1), weights(1), {})
    big = {"w": torch.zeros(1).expand(25_000_000)}  # 100 MB once it is written out
    message_of(lambda: folder.save(State(step=2), big, {}))
    assert state_of(folder).step == 1
    assert saved(folder, 1)["b"].tolist() == [1, 0]


# --------------------------------------------------------------------------------- one process only


def test_a_folder_in_use_is_refused_naming_the_process(tmp_path: Path) -> None:
    """The second gets the first's process number; after the first is closed it gets the folder."""
    first = RunFolder(tmp_path / "run")
    said = message_of(lambda: RunFolder(tmp_path / "run"))
    assert f"in use by process {os.getpid()};" in said
    assert "name=NAME" in said
    first.close()
    RunFolder(tmp_path / "run").close()


def test_a_lock_left_by_a_dead_process_holds_nobody_up(tmp_path: Path) -> None:
    """It is the system's lock that counts, not the file nor the number in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("99999999")
    opened = RunFolder(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    opened.close()


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    """A file where the folder should be: one sentence with the way out."""
    (tmp_path / "runs").write_text("not a folder")
    assert "runs_dir=PATH" in message_of(lambda: RunFolder(tmp_path / "runs" / "default"))


def test_clear_leaves_nothing_but_the_lock_it_holds(folder: RunFolder, tmp_path: Path) -> None:
    """Files, folders and links go (not what links point to); the folder is still one's own."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    folder.save(State(step=3), weights(1), weights(2))
    folder.write_result({"status": "done"})
    (folder.path / "wandb" / "offline").mkdir(parents=True)
    (folder.path / "link").symlink_to(tmp_path / "elsewhere")
    folder.clear()
    assert {path.name for path in folder.path.iterdir()} == {".lock", "checkpoint"}
    assert names(folder) == set()
    assert folder.result() is None
    assert folder.load_state() is None
    assert (tmp_path / "elsewhere" / "precious").exists()
    assert "in use" in message_of(lambda: RunFolder(folder.path))


# -------------------------------------------------------------------------------------- checkpoints


def test_a_state_comes_back_as_it_was(folder: RunFolder) -> None:
    """Numbers to the last bit, and everything nested; a new one too."""
    state = State(
        step=7,
        looked=5,
        best_step=5,
        best_loss=0.1 + 0.2,
        method={"num_steps": 7, "h": {"a": (0.1).hex()}},
        notes={"offsets": [0.0, 1 / 3], "zero_shot": {"accuracy": 0.5, "auc": None}},
        train_seconds=1e-9,
        num_forwards=14,
        peak_memory_bytes=2**40,
        metrics_bytes=123,
    )
    folder.save(state, weights(1), {})
    assert list(state.files) == ["weights-7.safetensors"]
    assert folder.load_state() == state
    folder.save_state(State())
    assert asdict(state_of(folder)) == asdict(State())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_bit_for_bit(folder: RunFolder, dtype: torch.dtype) -> None:
    """In any dtype, -0.0 and NaN too, transposed or not; on the CPU, without gradients."""
    tensor = torch.tensor([[1e-7, -0.0], [float("nan"), 3.14159], [1e30, -1e-40]]).to(dtype)
    parameter = torch.nn.Parameter(tensor.clone())
    folder.save(State(step=2), {"w": parameter, "wt": parameter.T}, {"w/exp_avg": tensor})
    for loaded, of in (
        (saved(folder, 2)["w"], tensor),
        (saved(folder, 2)["wt"].T, tensor),
        (folder.load_optimizer(state_of(folder), 2)["w/exp_avg"], tensor),
    ):
        assert loaded.dtype == dtype
        assert not loaded.requires_grad
        size = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(loaded.contiguous().view(size), of.view(size))


def test_only_the_last_and_the_best_weights_are_kept(folder: RunFolder) -> None:
    """What no state names is removed at once; after the run the best alone is left."""
    state = State(step=10, best_step=10)
    folder.save(state, weights(10), weights(0))
    assert names(folder) == {"state.json", "weights-10.safetensors", "optimizer-10.safetensors"}
    state.step = 20
    folder.save(state, weights(20), weights(0))
    assert names(folder) == {
        *("state.json", "weights-10.safetensors"),
        *("weights-20.safetensors", "optimizer-20.safetensors"),
    }
    state.step = 30
    folder.save(state, weights(30), {})
    assert folder.load_optimizer(state_of(folder), 30) == {}
    assert saved(folder, 10)["b"][0] == 10
    folder.settle(state, "best", go_on=False)
    assert names(folder) == {"state.json", "weights-10.safetensors"}


def test_a_folder_or_a_link_in_the_place_of_old_weights_is_removed_too(
    folder: RunFolder, tmp_path: Path
) -> None:
    """The link alone: what it leads to stays."""
    (folder.checkpoint / "weights-4.safetensors").mkdir()
    (folder.checkpoint / "weights-4.safetensors" / "x").write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder.checkpoint / "weights-5.safetensors").symlink_to(elsewhere)
    folder.save(State(step=10, best_step=10), weights(10), {})
    assert names(folder) == {"state.json", "weights-10.safetensors"}
    assert elsewhere.is_dir()


@pytest.mark.parametrize("num_renames", range(3))
def test_a_save_killed_at_any_file_leaves_a_checkpoint_that_can_be_read(
    folder: RunFolder, num_renames: int
) -> None:
    """Weights, optimizer, state, in this order: until the last is there the old ones count."""
    folder.save(State(step=1, best_step=1), weights(1), weights(-1))
    done: list[object] = []
    real = os.replace

    def counted(*args: Any) -> None:
        if len(done) == num_renames:
            raise Killed
        done.append(args)
        real(*args)

    new = state_of(folder)
    new.step = new.best_step = 2
    dies(os, "replace", counted, lambda: folder.save(new, weights(2), weights(-2)))
    assert len(done) == num_renames
    state = folder.load_state()
    assert state is not None
    assert (state.step, state.best_step) == (1, 1)
    assert saved(folder, 1)["b"][0] == 1
    assert folder.load_optimizer(state, 1)["b"][0] == -1
    folder.save(new, weights(2), weights(-2))
    assert names(folder) == {"state.json", "weights-2.safetensors", "optimizer-2.safetensors"}


def test_a_save_killed_in_the_clean_up_has_happened(folder: RunFolder) -> None:
    """Old files that are still there neither count nor stay after the next save."""
    folder.save(State(step=1), weights(1), {})
    dies(Path, "unlink", killed, lambda: folder.save(State(step=2), weights(2), {}))
    assert state_of(folder).step == 2
    assert saved(folder, 2)["b"][0] == 2
    folder.save(State(step=3), weights(3), {})
    assert names(folder) == {"state.json", "weights-3.safetensors"}


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "missing", "flipped"])
def test_damaged_tensors_are_one_sentence_with_the_way_out(folder: RunFolder, damage: str) -> None:
    """The file is named, and the setting that starts the run over."""
    folder.save(State(step=4), weights(4), {})
    path = folder.checkpoint / "weights-4.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        damaged = {"cut": content[:-3], "garbage": b"{}" * 50, "empty": b"", "flipped": flipped}
        path.write_bytes(damaged[damage])
    said = message_of(lambda: saved(folder, 4))
    assert "weights-4.safetensors" in said
    assert "if_exists=fresh" in said


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"step": 3}', '{"schema": 99}'])
def test_a_state_that_is_none_counts_as_none(folder: RunFolder, text: str) -> None:
    """Cut short, not an object, or of another schema: the run begins again."""
    (folder.checkpoint / "state.json").write_text(text)
    assert folder.load_state() is None


def test_a_state_with_a_flipped_bit_counts_as_none(folder: RunFolder) -> None:
    """Also where it is JSON still; one of other keys or types, too."""
    folder.save_state(State(step=13))
    path = folder.checkpoint / "state.json"
    text = path.read_text()
    path.write_text(text.replace('"step": 13', '"step": 12'))
    assert folder.load_state() is None
    for change in ({"step": "13"}, {"notes": []}, {"more": 1}):
        content = json.loads(text) | change
        path.write_text(json.dumps(sealed.sealed(content)))
        assert folder.load_state() is None


def test_the_nearest_good_weights_are_found_and_damaged_ones_said(folder: RunFolder) -> None:
    """A damaged file is left out with one line; what is left may be nothing."""
    state, said = State(best_step=3), list[str]()
    for state.step in (2, 5, 9):
        folder.save(state, weights(state.step), {}, "all")
    assert (folder.nearest(state, 8, said.append) or (0,))[0] == 5
    path = folder.checkpoint / "weights-5.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert (folder.nearest(state, 8, said.append) or (0,))[0] == 2
    assert len(said) == 1
    assert "weights-5.safetensors is damaged" in said[0]
    assert folder.nearest(state, 1, said.append) is None
    folder.settle(state, "best")  # the nearest up to step 3, and up to step 9
    assert names(folder) == {"state.json", "weights-2.safetensors", "weights-9.safetensors"}


def test_readers_share_a_folder_and_keep_writers_out(folder: RunFolder) -> None:
    """One who trains keeps readers out, naming itself; readers do not disturb each other."""
    said = message_of(lambda: RunFolder(folder.path, to_read=True))
    assert f"in use by process {os.getpid()};" in said
    folder.close()
    (folder.path / ".lock").write_text("")
    readers = [RunFolder(folder.path, to_read=True) for _ in range(2)]
    assert "a process that reads it" in message_of(lambda: RunFolder(folder.path))
    for reader in readers:
        reader.close()
    (folder.path / ".lock").unlink()
    RunFolder(folder.path, to_read=True).close()
    assert not (folder.path / ".lock").exists()


def test_damaged_scores_are_none(folder: RunFolder) -> None:
    """To be computed again, whatever bit it is."""
    folder.save_scores({"dev": torch.ones(3)})
    path = folder.path / "scores.safetensors"
    content = path.read_bytes()
    for place in range(8, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        found = folder.load_scores()
        assert not found or torch.equal(found["dev"], torch.ones(3))
    assert not found


# ------------------------------------------------------------------------------- results and scores


def test_a_result_is_plain_json(folder: RunFolder) -> None:
    """Readable without smezo; a missing or damaged one is None, and is replaced as a whole."""
    assert folder.result() is None
    folder.write_result({"status": "done", "test": {"accuracy": 0.5}})
    folder.write_result({"status": "running"})
    found = json.loads((folder.path / "result.json").read_text())
    assert found.pop("sha256")
    assert found == {"status": "running"}
    assert folder.result() == {"status": "running"}
    text = (folder.path / "result.json").read_text()
    (folder.path / "result.json").write_text(text.replace("running", "runnjng"))
    assert folder.result() is None
    (folder.path / "result.json").write_text('{"status": "do')
    assert folder.result() is None


def test_scores_come_back_and_open_without_smezo(folder: RunFolder) -> None:
    """A safetensors file like any other; none at all is an empty mapping."""
    assert folder.load_scores() == {}
    scores = {"zero_shot": torch.randn(5, 2), "labels": torch.arange(5)}
    folder.save_scores(scores)
    for found in (folder.load_scores(), load_file(folder.path / "scores.safetensors")):
        assert found.keys() == scores.keys()
        assert all(torch.equal(found[key], scores[key]) for key in scores)


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_wish_and_is_answered_once(number: signal.Signals) -> None:
    """No exception inside; the old handlers afterwards."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    said: list[str] = []
    with StopRequest(said.append) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.asked
    assert len(said) == 1
    assert number.name in said[0]
    assert {s: signal.getsignal(s) for s in before} == before


# -------------------------------------------------------------------------- what a reader must know


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not called "in use", which would send the user looking for a process that does not exist."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot lock files \(No locks available\).*runs_dir=PATH"):
        RunFolder(tmp_path / "run")


def test_peak_memory_is_that_of_this_run_alone() -> None:
    """What an earlier run in the process took and gave back does not count; its own does."""
    megabyte = 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pytest.skip("this system cannot set the peak of a process back")

    def touch(size: int) -> None:
        # Fresh pages, given back at once; malloc would serve them from what earlier tests freed.
        with mmap.mmap(-1, size) as pages:
            for at in range(0, size, mmap.PAGESIZE):
                pages[at] = 1

    gc.collect()
    first = PeakMemory(CPU)
    start = first.read()
    touch(200 * megabyte)  # some 20 MB of the rest of the process may come or go meanwhile
    assert first.read() >= start + 180 * megabyte
    second = PeakMemory(CPU)
    before = second.read()
    assert before <= start + 20 * megabyte
    touch(80 * megabyte)
    assert before + 60 * megabyte <= second.read() <= start + 120 * megabyte


def test_what_an_earlier_run_left_in_a_cycle_is_no_peak_of_the_next() -> None:
    """200 MB that nothing can reach; 20 MB of the rest of the process may come or go meanwhile."""
    gc.collect()
    start = PeakMemory(CPU).read()
    gc.disable()  # it would come by sooner or later
    try:
        left: list[object] = [bytearray(b"x") * (200 << 20)]
        left.append(left)
        del left
        assert PeakMemory(CPU).read() <= start + (20 << 20)
    finally:
        gc.enable()


def test_versions_name_what_a_result_depends_on() -> None:
    """Packages, machine, threads, commit (40 hex digits, + where files differ, or null)."""
    found = versions.versions()
    assert {"smezo", "python", "torch", "transformers", "safetensors", "machine"} <= found.keys()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    json.dumps(found)


def test_times_are_utc_to_the_second() -> None:
    """ISO 8601, so that they sort and every tool reads them."""
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", versions.now())


def test_metrics_that_are_a_pipe_or_shorter_than_told_are_none(folder: RunFolder) -> None:
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b"x")
    assert not folder.has_metrics(State(metrics_bytes=2**62))
    path.unlink()
    os.mkfifo(path)
    assert not folder.has_metrics(State(metrics_bytes=1, metrics_sha256="0"))


@pytest.mark.parametrize(
    "notes",
    [
        {"watch": {"recent": []}},
        {"numerics": {"moved_share": 0.5}},
        {"weights": {"best": {"step": "1", "sha256": "0"}}},
        {"zero_shot": 3},
    ],
)
def test_notes_that_no_run_has_written_are_no_state(
    folder: RunFolder, notes: dict[str, Any]
) -> None:
    folder.save_state(State(notes=notes))
    assert folder.load_state() is None
