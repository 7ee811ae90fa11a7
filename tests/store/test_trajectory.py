"""The trajectory: steps applied again give the same bits; the good part of a file counts."""

import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.errors import UserError
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.store import delta, trajectory
from smezo_cli.store.trajectory import Damaged, Recorder, differences, read
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.step import StepRecord

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
pytestmark = pytest.mark.usefixtures("one_thread")
RECORD = 36  # bytes, with one query


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.LayerNorm(11), nn.Linear(11, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.to(dtype)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        dtype = next(model.parameters()).dtype
        return (model(X.to(dtype)).double() - Y).square().mean()

    return closure


def method_of(model: nn.Module, **options: Any) -> ZeroOrder:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "sparsity": 0.5, "backend": "eager"}
    defaults |= {"check": False, "executor": "sequential", "seed": 7}
    return SparseMeZO(model, **(defaults | options))


def bits(model: nn.Module) -> list[Tensor]:
    size = {2: torch.int16, 4: torch.int32}
    return [p.detach().view(size[p.element_size()]).clone() for p in model.parameters()]


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, bits(model), bits(other)))


def trained(model: nn.Module, steps: int = 7, **options: Any) -> list[tuple[float, StepRecord]]:
    """lr and record of every step; the lr falls."""
    method, made = method_of(model, **options), []
    for step in range(steps):
        method.set_lr_factor(1 / (step + 1))
        record = method.step(closure_of(model))
        made.append((method.param_groups[0]["lr"], record))
    return made


# ------------------------------------------------------------------------------------------- replay

KINDS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "dense": {"mask": "none", "sparsity": 0},
    "large": {"mask": "large"},
    "random": {"mask": "random"},
    "random at every step": {"mask": "random", "mask_resample": "step"},
    "thresholds renewed": {"mask_refresh_every": 2},
    "frozen ties": {"constant_tensors": "frozen"},
    "signs": {"noise": "rademacher"},
    "three queries": {"num_queries": 3},
    "decay": {"weight_decay": 0.1},
    "decay and queries": {"weight_decay": 0.1, "num_queries": 2, "noise": "rademacher"},
    "stochastic": {"rounding": "stochastic"},
    "stochastic with decay": {"rounding": "stochastic", "weight_decay": 0.1, "num_queries": 2},
    "in place": {"executor": "in_place"},
    "in place, renewed": {"executor": "in_place", "mask_refresh_every": 3},
    "lockstep": {"executor": "lockstep"},
    "noise kept": {"keep_noise": True},
    "some left out": {"freeze": ["0.bias"], "dense": ["3.*"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_applied_again_give_the_bits_of_steps_made(kind: str, dtype: torch.dtype) -> None:
    """Without a forward, for every kind of noise, mask, rounding, executor and dtype."""
    model, again = network(dtype), network(dtype)
    made = trained(model, **KINDS[kind])
    assert not same(model, again)
    method = method_of(again, **KINDS[kind])
    for lr, record in made:
        method.replay(lr, record.projected_grad)
    assert same(model, again)
    assert method.num_steps == len(made)


@pytest.mark.parametrize("kind", ["the paper's", "stochastic with decay", "random", "decay"])
def test_other_backends_threads_and_executors_replay_the_same_bits(kind: str) -> None:
    """Made by eager passes in one thread, applied by compiled ones in two, and with noise kept."""
    options = KINDS[kind]
    model, threads = network(torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        made = trained(model, keep_noise=False, **options)
        torch.set_num_threads(2)
        ways: list[dict[str, Any]] = [{"backend": "compiled"}, {"executor": "lockstep"}]
        for way in ways:
            again = network(torch.bfloat16)
            method = method_of(again, **(options | way))
            for lr, record in made:
                method.replay(lr, record.projected_grad)
            assert same(model, again), way
    finally:
        torch.set_num_threads(threads)


def test_a_run_goes_on_from_applied_steps_as_from_its_own() -> None:
    """The next losses are the same, the thresholds are renewed at the same steps."""
    model, again = network(), network()
    made = trained(model, steps=9, mask_refresh_every=4)
    method = method_of(again, mask_refresh_every=4)
    for lr, record in made[:5]:
        method.replay(lr, record.projected_grad)
    for step in range(5, 9):
        method.set_lr_factor(1 / (step + 1))
        assert method.step(closure_of(again)) == made[step][1]
    assert same(model, again)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"seed": 8}, "seed"),
        ({"mask": "large"}, "mask"),
        ({"sparsity": 0.25}, "sparsity"),
        ({"noise": "rademacher"}, "noise"),
        ({"rounding": "stochastic"}, "rounding"),
        ({"weight_decay": 0.5}, "weight_decay"),
        ({"executor": "in_place"}, "in_place"),
        ({"freeze": ["0.bias"]}, "tensors"),
        ({"dense": ["0.bias"]}, "tensors"),
        ({"mask_refresh_every": 2}, "mask_refresh_every"),
        ({"constant_tensors": "frozen"}, "constant_tensors"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_identity_names_what_changes_the_weights(changed: dict[str, Any], name: str) -> None:
    """What the same records would make other weights of is told apart, and nothing else is."""
    mine, other = method_of(network()).identity(), method_of(network(), **changed).identity()
    found = trajectory.differences({"identity": mine}, {"identity": other})
    assert name in found
    for way in ({"executor": "lockstep"}, {"backend": "compiled"}, {"lr": 1.0}):
        assert method_of(network(), **way).identity() == mine
    assert method_of(network(torch.bfloat16)).identity() != mine


# --------------------------------------------------------------------------------------- the file


def header_of(method: ZeroOrder) -> dict[str, Any]:
    return {"identity": method.identity(), "model": "0123", "config": "89ab", "rows": {}}


def written(path: Path, steps: int = 6) -> list[StepRecord]:
    """A file with so many steps."""
    model = network()
    method, made = method_of(model), []
    recorder = Recorder(path, header_of(method), method, None)
    for step in range(steps):
        made.append(method.step(closure_of(model)))
        recorder.append(step, made[-1], 0.1 * step)
    recorder.close()
    return made


def test_a_file_holds_every_step_to_the_last_bit(tmp_path: Path) -> None:
    """36 bytes a step beside the header; a process that is killed has written what it made."""
    path = tmp_path / "trajectory.bin"
    made = written(path)
    found = read(path)
    assert found.damage is None
    assert [(found[i].loss, found[i].scalars) for i in range(len(found))] == [
        (record.loss, record.scalars) for record in made
    ]
    assert [found[i].step for i in range(6)] == list(range(6))
    assert {found[i].lr for i in range(6)} == {1e-2}
    short = path.stat().st_size
    written(path, 16)
    assert path.stat().st_size - short == 10 * RECORD


def test_appending_goes_on_where_the_good_part_ends(tmp_path: Path) -> None:
    """Applied steps, then new ones: the file of a run that was never stopped, byte by byte."""
    whole, path = tmp_path / "whole", tmp_path / "trajectory.bin"
    written(whole)
    path.write_bytes(whole.read_bytes()[: -2 * RECORD - 7])
    known, model = read(path), network()
    assert len(known) == 3
    assert known.damage is not None
    assert "step 3 is incomplete" in known.damage
    method = method_of(model)
    recorder = Recorder(path, known.header, method, known)
    for step in range(6):
        if recorder.apply(step) is None:
            assert step >= 3
            recorder.append(step, method.step(closure_of(model)), 0.1 * step)
    recorder.close()
    assert path.read_bytes() == whole.read_bytes()


def test_any_flipped_bit_is_found_where_it_is(tmp_path: Path) -> None:
    """In a record: the steps before it are good. In the header: there is no trajectory."""
    path = tmp_path / "trajectory.bin"
    written(path)
    content = path.read_bytes()
    start = len(content) - 6 * RECORD
    for place in range(len(content)):
        bad = bytearray(content)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        if place < start:
            with pytest.raises(Damaged):
                read(path)
            continue
        found = read(path)
        assert len(found) == (place - start) // RECORD
        assert found.damage is not None
        assert f"step {len(found)} is damaged" in found.damage


def test_records_that_are_repeated_missing_or_moved_are_found(tmp_path: Path) -> None:
    """Also where the step numbers are mended: each record goes on from the one before."""
    path = tmp_path / "trajectory.bin"
    written(path)
    content = path.read_bytes()
    start = len(content) - 6 * RECORD
    rows = [content[start + i * RECORD : start + (i + 1) * RECORD] for i in range(6)]
    for order, good in (([0, 1, 1, 2], 2), ([0, 2, 3], 1), ([1, 0], 0), ([0, 1, 2, 3, 5, 4], 4)):
        path.write_bytes(content[:start] + b"".join(rows[i] for i in order))
        assert len(read(path)) == good
    renumbered = []
    for place, i in enumerate([0, 2]):
        body = struct.pack("<I", place) + rows[i][4:-4]
        renumbered.append(body + rows[i][-4:])
    path.write_bytes(content[:start] + b"".join(renumbered))
    assert len(read(path)) == 1


def sealed(text: bytes, records: bytes = b"") -> bytes:
    """A file whose checksum is right whatever its header says."""
    start = struct.pack("<8sII", b"SMEZOTRJ", 1, len(text)) + text
    return start + struct.pack("<I", zlib.crc32(start)) + records


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"SMEZOTRJ",
        b"PK\x03\x04" * 20,
        struct.pack("<8sII", b"SMEZOTRJ", 1, 2**32 - 1) + b"{}",
        struct.pack("<8sII", b"SMEZOTRJ", 2, 2) + b"{}" + bytes(4),
        sealed(b"[" * 100_000),
        sealed(b"[]"),
        sealed(b"{}"),
        sealed(b'{"identity": {"num_queries": 1e9}}'),
        sealed(b'{"identity": {"num_queries": 99999999}}'),
        sealed(b'{"identity": {"num_queries": true}}'),
        sealed(b'{"identity": 3}'),
        sealed(b"\xff\xfe"),
    ],
    ids=range(13),
)
def test_what_is_no_trajectory_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    """Whatever a file says of its own lengths; missing files, folders and pipes too."""
    path = tmp_path / "x"
    path.write_bytes(content)
    for reader in (read, delta.read_delta):
        with pytest.raises(UserError, match=r"x (is|has|cannot).*\.$"):
            reader(path)


def test_what_is_no_file_does_not_hold_the_reader_up(tmp_path: Path) -> None:
    """A pipe nobody writes to, a folder, nothing."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "", "nothing"):
        with pytest.raises(Damaged):
            read(tmp_path / name)


def test_numbers_that_are_not_finite_end_the_good_part(tmp_path: Path) -> None:
    """They would make every weight NaN, with a right checksum too."""
    path = tmp_path / "trajectory.bin"
    method = method_of(network())
    recorder = Recorder(path, header_of(method), method, None)
    recorder.append(0, StepRecord(1.0, (0.5,), 2, scalars=(0.5,)), 1.0)
    recorder.append(1, StepRecord(1.0, (math.inf,), 2, scalars=(math.inf,)), 1.0)
    recorder.close()
    assert len(read(path)) == 1


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the file held before is still good."""
    path = tmp_path / "trajectory.bin"
    method = method_of(network())
    recorder = Recorder(path, header_of(method), method, None)
    recorder.append(0, StepRecord(1.0, (0.5,), 2, scalars=(0.5,)), 1.0)
    real = os.pwrite

    def some_of_it(file: int, content: bytes, place: int) -> int:
        if len(content) < 20:
            raise OSError(28, "No space left on device")
        return real(file, content[:20], place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", some_of_it)
        with pytest.raises(UserError, match=r"trajectory\.bin: No space left"):
            recorder.append(1, StepRecord(1.0, (0.5,), 2, scalars=(0.5,)), 1.0)
    recorder.close()
    assert len(read(path)) == 1


def test_a_run_too_long_to_be_read_again_is_refused() -> None:
    """Before it begins."""
    trajectory.check_length(1_000_000, 1)
    with pytest.raises(UserError, match=r"steps=20000 with method\.num_queries=500"):
        trajectory.check_length(20_000, 500)


# ------------------------------------------------------------------------------------------- delta


def test_a_delta_holds_what_the_update_needs_and_no_more(tmp_path: Path) -> None:
    """lr and projected gradients to the last bit; equal learning rates take next to no room."""
    path, out = tmp_path / "trajectory.bin", tmp_path / "x.delta"
    model = network()
    method = method_of(model, num_queries=2)
    recorder = Recorder(path, header_of(method), method, None)
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double() / 3
    for step, (one, two) in enumerate(values.tolist()):
        recorder.append(step, StepRecord(0.5, (one, two), 4, scalars=(one, two)), 0.1)
    recorder.close()
    found = read(path)
    out.write_bytes(delta.delta(found, 300, {"config": "seed: 0"}))
    about, again = delta.read_delta(out)
    assert about["config"] == "seed: 0"
    assert again.header == found.header
    assert len(again) == 300
    for i in range(300):
        assert (again[i].lr, again[i].scalars) == (found[i].lr, found[i].scalars)
    assert out.stat().st_size < 300 * 2 * 8 + 1500
    assert delta.is_delta(out)
    assert not delta.is_delta(path)


def test_a_delta_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """Any cut, any flipped bit; and one that unpacks to more than it says."""
    path, out = tmp_path / "trajectory.bin", tmp_path / "x.delta"
    written(path)
    content = delta.delta(read(path), 5, {})
    for place in range(len(content)):
        bad = bytearray(content)
        bad[place] ^= 1 << (place % 8)
        for damaged in (bytes(bad), content[:place]):
            out.write_bytes(damaged)
            with pytest.raises(Damaged):
                delta.read_delta(out)
    out.write_bytes(delta.delta(read(path), 5, {"step": 4}))
    with pytest.raises(Damaged):
        delta.read_delta(out)


def test_names_that_a_foreign_header_made_up_are_not_repeated() -> None:
    mine = {"model": "a", "identity": {"seed": 0}}
    theirs = {"model": "a", "identity": {"seed": 1, "evil\nname": 1}}
    assert differences(theirs, mine) == ["seed", "header"]


def test_a_header_whose_rows_are_no_mapping_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "trajectory.bin"
    text = b'{"identity": {"num_queries": 1}, "rows": 3}'
    start = struct.pack("<8sII", b"SMEZOTRJ", 1, len(text)) + text
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)))
    with pytest.raises(Damaged, match="header"):
        read(path)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", tmp_path / "trajectory.bin"
    outside.write_bytes(b"keep")
    path.symlink_to(outside)
    method = method_of(network())
    with pytest.raises(UserError, match="cannot write"):
        Recorder(path, header_of(method), method, None)
    assert outside.read_bytes() == b"keep"
