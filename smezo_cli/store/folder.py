"""Read and write a run folder: its lock, its checkpoints, its result.

    RUNS_DIR/NAME/TASK-MODEL-METHOD-sSEED-DIGEST/
        config.yaml  metrics.jsonl  console.log  result.json  scores.safetensors  trajectory.bin
        mask.safetensors (of a method that trains named entries)
        checkpoint/state.json  weights-STEP.safetensors  optimizer-STEP.safetensors

Every file but those that grow line by line is written beside its place and then renamed, so a
reader (or a resumed run) sees the old one or the new one, never a half. JSON and tensor files carry
a SHA-256 of what is in them; a file that does not agree with its own is never used.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from torch import Tensor

from smezo_cli.errors import UserError, redacted_tree
from smezo_cli.files import bounded, sealed, strict_json
from smezo_cli.files.atomic import write_bytes, write_text
from smezo_cli.store import schema
from smezo_cli.store.notes import Notes
from smezo_cli.store.saved import Saved, save_tensors

SCHEMA = 2  # of result.json; 1 had no checksum
_STATE = 2  # of checkpoint/state.json
# The note of a run that has its result, and has not removed the rest yet.
UNSETTLED: Final = "unsettled"


@dataclass
class State:
    """Hold how far a run is; everything but tensors.

    Attributes:
        step: updates done, and the number in the names of the tensor files.
        looked: the step of the last evaluation on dev.
        best_step: that of the best evaluation on dev so far, None before the first.
        best_loss: its dev loss.
        method: the method's own numbers.
        notes: what was found on the way, such as the prompt and zero-shot metrics; their types
            are in :class:`smezo_cli.store.notes.Notes`.
        train_seconds: spent in steps, evaluation apart.
        num_forwards: forward passes of steps.
        peak_memory_bytes: of the process so far.
        metrics_bytes: length of metrics.jsonl at this step.
        metrics_sha256: of these bytes.
        files: the tensor files that it may need, each with the digest of its tensors.
    """

    step: int = 0
    looked: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    method: dict[str, Any] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    train_seconds: float = 0.0
    num_forwards: int = 0
    peak_memory_bytes: int = 0
    metrics_bytes: int = 0
    metrics_sha256: str = hashlib.sha256().hexdigest()
    files: dict[str, str] = field(default_factory=dict)

    def weights(self, most: float = math.inf) -> list[int]:
        """Return the steps whose weights are saved, up to `most`, in order."""
        names = [Path(name).stem for name in self.files if name.startswith("weights-")]
        return sorted(n for name in names if (n := int(name.removeprefix("weights-"))) <= most)

    def start_over(self) -> None:
        """Reset to before the first step; keep what was found before training."""
        for name in _OF_TRAINING:
            self.notes.pop(name, None)  # type: ignore[misc]  # keys of Notes
        self.__dict__.update(State(notes=self.notes).__dict__)


_OF_TRAINING = (
    *("lowest_loss", "highest_metric", "best_look", "final_share"),
    *("watch", "numerics", "stopped_early"),
)


class RunFolder:
    """Hold a run on disk, locked as long as it is open.

    Args:
        path: the folder; made where it is not there.
        to_read: nothing will be written to it, and others may read it, too; it may be read-only.

    Raises:
        UserError: it cannot be written to, or is in use.
    """

    def __init__(self, path: Path, to_read: bool = False) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint"
        self._lock: TextIO | None = None
        self._scores: dict[str, Tensor] = {}  # as last saved
        self.config = ""  # the text of config.yaml, as this run has written it
        if to_read:
            lock = path / ".lock"
            with contextlib.suppress(OSError):  # nobody can train in a folder that has no lock
                if lock.is_file():  # a pipe would wait
                    self._lock = lock.open(encoding="utf-8")
                    self._get(fcntl.LOCK_SH)
            return
        try:
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            if self.checkpoint.is_symlink():
                raise OSError(20, "its checkpoint is a link to elsewhere")
            self._lock = bounded.open_own(path / ".lock")
        except OSError as error:
            raise UserError(
                f"runs_dir: cannot write to {path} ({error.strerror}); "
                "choose another with runs_dir=PATH."
            ) from error
        try:
            self._get(fcntl.LOCK_EX)
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"runs_dir: the file system of {path} cannot lock files ({error.strerror}); "
                "choose another with runs_dir=PATH."
            ) from error
        self._sign()

    def _sign(self) -> None:
        assert self._lock is not None
        try:
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}/.lock: {error.strerror}.") from error

    def check_mine(self) -> None:
        """Check before a write that the folder is still the one that was opened.

        Raises:
            UserError: it was removed or moved, or another process has begun the run anew.
        """
        path = self.path / ".lock"
        if self._lock is None or bounded.is_at(self._lock.fileno(), path):
            return
        if not self.path.is_dir():
            raise UserError(
                f"{self.path} was removed or moved while the run went on, so nothing more can be "
                "kept: the same command begins it anew."
            )
        old = self._lock
        try:
            self._lock = bounded.open_own(path)
            self._get(fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
        except UserError:
            self._lock = old  # that of a folder which is no more
            raise
        self._sign()
        old.close()

    def _get(self, kind: int) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read(20).strip()
            self._lock.close()
            known = owner.isdecimal() and Path(f"/proc/{owner}").exists()
            who = f"process {owner}" if known else "a process that reads it (such as smezo eval)"
            raise UserError(
                f"{self.path} is in use by {who}; wait for it, or give this run another name=NAME."
            ) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def result(self) -> dict[str, Any] | None:
        """Return result.json, or None if it is missing or damaged."""
        found = bounded.read_json(self.path / "result.json")
        if found is not None and found.get("schema") != 1:
            found = sealed.unsealed(found)
        return found if found is not None and schema.is_sound_result(found) else None

    def write_result(self, result: Mapping[str, Any], name: str = "result.json") -> None:
        """Write result.json, or under another name the result of a shorter run beside it."""
        self.check_mine()
        write_text(
            self.path / name,
            strict_json.dumps(sealed.sealed(redacted_tree(result)), indent=2) + "\n",
        )

    def damaged(self) -> list[str]:
        """Return the names of files that are not what was written; weights are not read."""
        found = []
        state, of_state = self.load_state(), self.checkpoint / "state.json"
        if state is None and of_state.exists():
            is_old = (bounded.read_json(of_state) or {}).get("schema") == 1
            found += [] if is_old else ["state.json"]
        if (self.path / "scores.safetensors").exists() and not self.load_scores():
            found.append("scores.safetensors")
        if state is not None and (self.path / "metrics.jsonl").exists():
            found += [] if self.has_metrics(state) else ["metrics.jsonl"]
        return found

    def damaged_weights(self, state: State) -> list[str]:
        """Return the names of tensor files that are not what was written.

        Reads every file that the state names.
        """
        found = []
        for step in state.weights():
            try:
                self.load_weights(state, step)
            except UserError:
                found.append(self.weights_path(step).name)
            try:
                self.load_optimizer(state, step)
            except UserError:
                found.append(self._optimizer(step).name)
        return found

    def has_metrics(self, state: State) -> bool:
        """Return whether metrics.jsonl begins with the bytes that the state has the digest of."""
        content, path = b"", self.path / "metrics.jsonl"
        with contextlib.suppress(OSError, UserError):
            if bounded.check_ordinary(path) < state.metrics_bytes:
                return False
            with path.open("rb") as file:
                content = file.read(state.metrics_bytes)
        return hashlib.sha256(content).hexdigest() == state.metrics_sha256

    def mend_metrics(self, state: State) -> int:
        """Keep the lines of metrics.jsonl that can be read; return of how many steps they are.

        The state says from then on what is there.
        """
        content, path = b"", self.path / "metrics.jsonl"
        with contextlib.suppress(OSError, UserError):
            bounded.check_ordinary(path)
            content = path.read_bytes()
        kept, steps = list[bytes](), set[int]()
        for line in content.splitlines(keepends=True):
            record = _record(line)
            if record is not None and record["step"] <= state.step:
                kept.append(line)
                steps |= {record["step"]} if "loss" in record else set()
        self.check_mine()
        text = b"".join(kept)
        write_bytes(path, text)
        state.metrics_bytes, state.metrics_sha256 = len(text), hashlib.sha256(text).hexdigest()
        self.save_state(state)
        return len(steps)

    def clear(self) -> None:
        """Remove all but the lock, to start over."""
        for entry in self.path.iterdir():
            if entry.name != ".lock":
                _remove(entry)
        self.checkpoint.mkdir()

    # --- checkpoints --------------------------------------------------------------------------

    def save(
        self,
        state: State,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        keep: str = "best",
    ) -> None:
        """Save weights, then the state that names them; then remove what nothing names.

        With ``keep="all"`` the weights of every evaluation on dev stay.
        """
        self.save_weights(state, state.step, weights, state.method)
        if optimizer:
            path = self._optimizer(state.step)
            state.files[path.name] = self._save_tensors(path, optimizer)
        self.settle(state, keep)

    def save_weights(
        self, state: State, step: int, weights: Mapping[str, Tensor], method: Mapping[str, Any]
    ) -> None:
        """Save the weights of a step and the method's numbers; the next saved state names them."""
        path = self.weights_path(step)
        state.files[path.name] = self._save_tensors(path, weights, {"method": method})

    def save_state(self, state: State) -> None:
        """Write state.json only; the tensors that it names are already on disk."""
        self.check_mine()
        self.checkpoint.mkdir(exist_ok=True)
        content = sealed.sealed({"schema": _STATE, **asdict(state)})
        write_text(self.checkpoint / "state.json", strict_json.dumps(content, indent=1) + "\n")

    def settle(self, state: State, keep: str, go_on: bool = True) -> None:
        """Save the state and remove tensors that are not needed; ``keep="all"`` keeps all weights.

        Needed are the nearest weights up to the best step and, to go on, up to the present one
        (where a method has tensors of its own, with them): those of a run without a trajectory are
        saved at these very steps.
        """
        steps = state.weights(state.best_step or 0)[-1:]
        wanted = set()
        if go_on:
            saved = state.weights(state.step)
            with_own = [step for step in saved if self._optimizer(step).name in state.files]
            steps += saved[-1:] + with_own[-1:]
            wanted = {self._optimizer(step).name for step in with_own[-1:]}
        wanted |= {self.weights_path(step).name for step in steps}
        state.files = {
            name: digest
            for name, digest in state.files.items()
            if name in wanted or (keep == "all" and name.startswith("weights-"))
        }
        self.save_state(state)
        for entry in self.checkpoint.iterdir():
            if entry.name != "state.json" and entry.name not in state.files:
                _remove(entry)

    def load_state(self) -> State | None:
        """Return the state to go on from, or None if there is none or it is damaged."""
        saved = bounded.read_json(self.checkpoint / "state.json")
        saved = None if saved is None else sealed.unsealed(saved)
        if saved is None or saved.pop("schema", None) != _STATE:
            return None
        return State(**saved) if schema.is_sound_state(saved) else None

    def load_weights(self, state: State, step: int) -> "Saved":
        """Return the weights of a step by name, on the CPU, each read when it is asked for.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.weights_path(step)
        return self._verified(path, state.files.get(path.name))

    def nearest(
        self, state: State, step: int, say: Callable[[str], None]
    ) -> "tuple[int, Saved] | None":
        """Return the last good weights up to a step; say which are damaged, and forget them."""
        for found in reversed(state.weights(step)):
            try:
                return found, self.load_weights(state, found)
            except UserError:
                name = self.weights_path(found).name
                say(f"  checkpoint/{name} is damaged or missing: its steps are applied again")
                del state.files[name]
        return None

    @staticmethod
    def _verified(path: Path, digest: str | None) -> "Saved":
        saved = Saved(path)
        if digest is None or saved.about.get("sha256") != digest or not saved.is_whole():
            raise UserError(
                f"{path} cannot be read (it is not what was written); "
                "start this run over with if_exists=fresh."
            )
        return saved

    def load_optimizer(self, state: State, step: int) -> Mapping[str, Tensor]:
        """Return the method's own tensors at a step by name, each read when it is asked for.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self._optimizer(step)
        if path.name not in state.files:
            return {}
        return self._verified(path, state.files[path.name])

    def save_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Save candidate scores and labels, row by row, as scores.safetensors."""
        self._scores = dict(scores)
        self._save_tensors(self.path / "scores.safetensors", scores)

    def load_scores(self) -> dict[str, Tensor]:
        """Load scores.safetensors. Return an empty dict if the file is missing or damaged."""
        try:
            saved = Saved(self.path / "scores.safetensors")
            return dict(saved) if saved.is_whole() else {}
        except UserError:
            return {}

    def scores_so_far(self) -> dict[str, Tensor]:
        """Load scores.safetensors, or return what this run saved if the file was taken away."""
        return self.load_scores() or dict(self._scores)

    def weights_path(self, step: int) -> Path:
        """Return where the weights of a step are, if they are saved."""
        return self.checkpoint / f"weights-{step}.safetensors"

    def _optimizer(self, step: int) -> Path:
        return self.checkpoint / f"optimizer-{step}.safetensors"

    def _save_tensors(
        self, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
    ) -> str:
        self.check_mine()
        path.parent.mkdir(exist_ok=True)
        return save_tensors(path, tensors, about)


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics.jsonl; None if it is damaged or not whole."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(found, dict) and bounded.is_count(found.get("step"))
    return found if is_record and line.endswith(b"\n") else None


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
