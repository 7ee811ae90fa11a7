"""The run folder: its name, its lock, its checkpoints, its result.

    RUNS_DIR/NAME/TASK-MODEL-METHOD-sSEED-DIGEST/
        config.yaml  metrics.jsonl  console.log  result.json  scores.safetensors
        checkpoint/state.json  weights-STEP.safetensors  optimizer-STEP.safetensors

Every file is written beside its place and then renamed, so a reader (or a resumed run) sees the old
one or the new one, never a half.
"""

import contextlib
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smezo_cli import __version__, intake
from smezo_cli.errors import UserError
from smezo_cli.redaction import redacted_tree

SCHEMA = 1  # of result.json
_STATE = 1  # of checkpoint/state.json


@dataclass
class State:
    """Where a run stands; everything but tensors.

    Attributes:
        step: updates done, and the number in the names of the tensor files.
        looked: the last step at which dev was looked at.
        best_step: the step with the lowest dev loss so far, None before the first look.
        best_loss: that loss.
        method: the method's own numbers.
        notes: found before training: zero-shot figures, the prompt, the realised sparsity.
        train_seconds: spent in steps, evaluation apart.
        num_forwards: forward passes of steps.
        peak_memory_bytes: of the process so far.
        metrics_bytes: length of metrics.jsonl at this step.
    """

    step: int = 0
    looked: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    method: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    train_seconds: float = 0.0
    num_forwards: int = 0
    peak_memory_bytes: int = 0
    metrics_bytes: int = 0


class RunFolder:
    """One run on disk. Holds a lock as long as it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint"
        try:
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            if self.checkpoint.is_symlink():
                raise OSError(20, "its checkpoint is a link to elsewhere")
            self._lock = intake.open_own(path / ".lock")
        except OSError as error:
            raise UserError(
                f"runs_dir: cannot write to {path} ({error.strerror}); "
                "choose another with runs_dir=PATH."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._lock.close()
                raise UserError(
                    f"runs_dir: the file system of {path} cannot lock files ({error.strerror}); "
                    "choose another with runs_dir=PATH."
                ) from error
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise UserError(
                f"{path} is in use by process {owner}; wait for it, "
                "or give this run another name=NAME."
            ) from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    def result(self) -> dict[str, Any] | None:
        """result.json, or None where there is none (or it cannot be read)."""
        result = intake.read_json(self.path / "result.json")
        return result if result is not None and intake.is_sound_result(result) else None

    def write_result(self, result: Mapping[str, Any], name: str = "result.json") -> None:
        """Replace result.json, or the record of a shorter run beside it."""
        write_text(self.path / name, json.dumps(redacted_tree(result), indent=2) + "\n")

    def clear(self) -> None:
        """Start over: remove all but the lock."""
        for entry in self.path.iterdir():
            if entry.name == ".lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self.checkpoint.mkdir()

    # --- checkpoints --------------------------------------------------------------------------

    def save(
        self,
        state: State,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        keep: str = "best",
    ) -> None:
        """Weights first, then the state that names them, then what nothing names is removed.

        With ``keep="all"`` the weights of every look at dev stay.
        """
        self._save_tensors(self._weights(state.step), weights)
        if optimizer:
            self._save_tensors(self._optimizer(state.step), optimizer)
        self.save_state(state, has_optimizer=bool(optimizer))
        self._keep(state, keep)

    def save_state(self, state: State, has_optimizer: bool = False) -> None:
        """The state alone: before the first step there are no tensors of its own."""
        content = {"schema": _STATE, "has_optimizer": has_optimizer, **asdict(state)}
        write_text(self.checkpoint / "state.json", json.dumps(content, indent=1) + "\n")

    def tidy(self, state: State, keep: str, extensible: bool) -> None:
        """After the run: where it cannot be extended, only what the test used (or all) stays."""
        self._keep(state, keep, go_on=extensible)

    def load_state(self) -> State | None:
        """The state to go on from, or None."""
        saved = intake.read_json(self.checkpoint / "state.json")
        if saved is None or saved.get("schema") != _STATE or not intake.is_sound_state(saved):
            return None
        return State(**{known.name: saved[known.name] for known in fields(State)})

    def load_weights(self, step: int) -> Mapping[str, Tensor]:
        """Tensors by name, on the CPU, each read when it is asked for.

        Raises:
            UserError: the file is missing or damaged.
        """
        return _Saved(self._weights(step))

    def has_weights(self, step: int) -> bool:
        """Are the weights of that step kept?"""
        return self._weights(step).is_file()

    def steps_kept(self) -> list[int]:
        """Steps whose weights are kept, in order."""
        files = self.checkpoint.glob("weights-*.safetensors")
        steps = (file.stem.removeprefix("weights-") for file in files)
        return sorted(int(step) for step in steps if step.isdecimal())

    def load_optimizer(self, step: int) -> dict[str, Tensor]:
        """Tensors of the optimizer by name; none for a method that has none."""
        path = self._optimizer(step)
        saved = intake.read_json(self.checkpoint / "state.json") or {}
        return self._load_tensors(path) if saved.get("has_optimizer") else {}

    def save_scores(self, scores: Mapping[str, Tensor]) -> None:
        """scores.safetensors: candidate scores and labels, row by row."""
        self._save_tensors(self.path / "scores.safetensors", scores)

    def load_scores(self) -> dict[str, Tensor]:
        """Undo :meth:`save_scores`; empty where there is no such file."""
        path = self.path / "scores.safetensors"
        return self._load_tensors(path) if path.exists() else {}

    def _weights(self, step: int) -> Path:
        return self.checkpoint / f"weights-{step}.safetensors"

    def _optimizer(self, step: int) -> Path:
        return self.checkpoint / f"optimizer-{step}.safetensors"

    def _save_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        content = {name: t.detach().contiguous() for name, t in tensors.items()}
        needed = sum(t.numel() * t.element_size() for t in content.values())
        check_space(path.parent, needed)
        with _replacing(path) as partial:
            save_file(content, partial)

    def _load_tensors(self, path: Path) -> dict[str, Tensor]:
        return dict(_Saved(path))

    def _best(self, state: State) -> Path | None:
        return None if state.best_step is None else self._weights(state.best_step)

    def _keep(self, state: State, keep: str, go_on: bool = True) -> None:
        wanted = {self.checkpoint / "state.json", self._best(state)}
        if go_on:
            wanted |= {self._weights(state.step), self._optimizer(state.step)}
        for entry in self.checkpoint.iterdir():
            is_weights = entry.name.startswith("weights-")
            if entry not in wanted and not (keep == "all" and is_weights):
                entry.unlink()


class _Saved(Mapping[str, Tensor]):
    """A safetensors file. Every tensor has a mapping of its own, so that no two lie in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            self._names: list[str] = list(file.keys())

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            intake.check_ordinary(self._path)
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._path} cannot be read ({error}); start this run over with if_exists=fresh."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Is there room for so many bytes (and a little more)?

    Raises:
        UserError: there is not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + (1 << 24):
        raise UserError(
            f"runs_dir: {folder} has {free / 1e9:.2f} GB free and {needed_bytes / 1e9:.2f} GB are "
            "needed; make room, or choose another disk with runs_dir=PATH."
        )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to that takes the place of ``path`` at the end, on disk before it does."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if os.path.lexists(partial):
            partial.unlink()  # of a killed run, or a link to elsewhere
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk gives here
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}.") from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --- signals ----------------------------------------------------------------------------------


class Stopped(Exception):
    """The user (or the machine) asked the run to stop; its state is saved."""


class StopRequest:
    """Turns SIGINT and SIGTERM into a wish that the loop honours between steps."""

    def __init__(self, say: Callable[[str], None], patient: bool = True) -> None:
        self._say = say
        self.asked = False
        self.patient = patient  # False while nothing is to be saved: a signal stops at once

    def __enter__(self) -> "StopRequest":
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.patient:
            self.asked = True
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            self._say(f"{signal.Signals(number).name}: stopping after this step, please wait.")


# --- what a reader of a result must know ------------------------------------------------------


class PeakMemory:
    """Peak bytes of this run alone: allocator statistics on CUDA, resident memory elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which also starts CUDA
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux keeps the peak of the process; 5 sets it back to the present (see proc(5)).
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def versions() -> dict[str, Any]:
    """Versions, commit and machine."""
    found: dict[str, Any] = {"smezo": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "datasets", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    found |= {"commit": _commit(), "machine": platform.machine(), "system": platform.system()}
    found["threads"] = torch.get_num_threads()
    return found


def _commit() -> str | None:
    """Commit of a checkout, "+" behind it where files differ; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
