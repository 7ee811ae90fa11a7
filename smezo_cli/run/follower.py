"""Run a rank other than 0: follow rank 0's commands; write and print nothing.

A follower has no folder. Its weights follow from the base model and from what all ranks share in a
step; if the run goes on from an earlier start, from the trajectory that rank 0 sends, or from the
weights that it saved where the method records no steps.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from smezo_cli import __version__
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.machine.device import choose_device
from smezo_cli.machine.memory import PeakMemory
from smezo_cli.machine.out_of_memory import SHORTER, refusing_out_of_memory
from smezo_cli.machine.stop import Stopped, StopRequest
from smezo_cli.machine.torchrun import local_rank
from smezo_cli.methods.base import compares_losses, replays
from smezo_cli.run import kept_inputs, layers, mask, self_check
from smezo_cli.run.batches import batches_of
from smezo_cli.run.console import Console
from smezo_cli.run.evaluate import evaluate
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.measure import Measure
from smezo_cli.run.method import build_method
from smezo_cli.run.parcel import Parcel
from smezo_cli.run.ranks import Left, Ranks
from smezo_cli.run.rows import short_enough
from smezo_cli.scoring.batching import Found
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.parts import by_part, of_one_part
from smezo_cli.store.partial_scores import Part
from smezo_cli.store.saved import Saved
from smezo_cli.tasks.base import fingerprint
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.schedule import lr_factor
from smezo_cli.zo.step import NUMERICS, NonFiniteLoss

# These may differ between machines, or follow from settings that may.
_OF_A_MACHINE = ("device", "compile", "micro_batch_size", "runs_dir", "logger", "if_exists")
# Rank 0 alone says when dev is evaluated.
_OF_RANK_0 = ("eval_every",)


def facts(loaded: Loaded, settings: Settings) -> dict[str, Any]:
    """Return what every rank must have in common, as ``{"same": ...}``."""
    rows = {name: fingerprint(getattr(loaded.task, name)) for name in ("train", "dev", "test")}
    others = (*_OF_A_MACHINE, *_OF_RANK_0)
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if k not in others}
    text = json.dumps(asked, sort_keys=True, default=str)
    same = {
        "kind of device": loaded.device.type,
        "command line": hashlib.sha256(text.encode()).hexdigest(),
        "version of smezo": [__version__, NUMERICS],
    }
    return {"same": {**same, "data": rows, "model": loaded.fingerprint()}}


def follow(settings: Settings, team: Ranks) -> None:
    """Follow rank 0 through one run.

    Raises:
        UserError: this rank cannot go on; the others then notice that it is gone.
    """
    message, _ = team.told()
    if message["do"] == "end":
        return
    with (
        refusing_out_of_memory("for a rank of this run", SHORTER),
        StopRequest(lambda _: None) as stop,
        ExitStack() as at_end,
    ):
        team.asked = lambda: stop.asked
        try:
            try:
                follower = Follower(
                    settings, team, choose_device(settings.device, None, local_rank())
                )
                at_end.callback(kept_inputs.end, follower.loaded)
                said, error = facts(follower.loaded, settings), None
            except UserError as problem:
                said, error = {}, str(problem)
            team.agree(said, error)
            while (told := team.told())[0]["do"] != "end":
                follower.do(*told)
        except BaseException as error:
            if not isinstance(error, Left):
                team.abandon()
                raise
            # Rank 0 says "end" if it left a step, but not if the ranks did not agree.
            while team.told()[0]["do"] != "end":
                pass


class Follower:
    """Hold task, model and method of a rank, and do what rank 0 tells."""

    def __init__(self, settings: Settings, team: Ranks, device: str) -> None:
        self.settings, self.team = settings, team
        self.console = Console(io.StringIO())
        self.loaded = Loaded(settings, device, lambda _: None)
        self.memory = PeakMemory(self.loaded.device)
        self.method: ZeroOrder | None = None
        self._is_checked = False
        self._known = np.zeros((2, 0))
        self._parcel = Parcel()
        self._encoded: dict[str, list[Candidates]] = {}
        self._measure = Measure(
            self.loaded.scorer,
            settings.method.get("objective", "loss"),
            settings.micro_batch_size,
            team,
            lambda *_: None,
            weights=self.loaded.task.weights,
        )

    def do(self, message: dict[str, Any], content: bytes) -> None:
        """Carry out one command of rank 0.

        Raises:
            Left: rank 0 ends the run in the middle of it.
        """
        do = message.pop("do")
        if do == "trajectory":
            self._known = np.frombuffer(content, "<f8").reshape(message["queries"] + 1, -1)
        elif do == "piece":
            self._parcel.add(message["name"], content)
        elif do == "layers":
            self.loaded.settings = layers.resolved(self.loaded.settings, message["found"])
        elif do == "mask":
            with self._parcel.opened() as folder:
                mask.use(self.loaded, folder)
        elif do == "batching":
            Found.of(message["found"]).to(self.loaded.scorer)
        elif do == "keep_inputs":
            folder = Path(message["folder"])
            kept_inputs.begin(self.loaded, self._advance(0), folder, self.team.size)
        elif do == "evaluate":
            self._evaluate(**message)
        elif do == "steps":
            self._steps(**message)
        elif do == "weights":
            self._load(**message)
        elif do == "saved":
            self._take(**message)
        elif do == "restore":
            self._made().restore(message["numbers"], {})
        elif do == "memory":
            size = self._measure.size
            halved = size != self.settings.micro_batch_size
            found = {"peak": self.memory.read(), "micro_batch_size": size, "halved": halved}
            self.team.gather(json.dumps(found).encode())
        else:
            raise AssertionError(do)

    def _made(self) -> ZeroOrder:
        if self.method is None:
            method = build_method(self.loaded)
            assert compares_losses(method)
            self.method = method
        return self.method

    def _advance(self, step: int) -> ZeroOrder:
        """Return the method after so many steps; those that it lacks are in the trajectory."""
        method = self._made()
        assert replays(method) or method.num_steps >= step
        while method.num_steps < step:
            lr, *scalars = self._known[:, method.num_steps].tolist()
            method.replay(lr, scalars)
        return method

    def _rows(
        self, split: str, prompt: int | Sequence[int], part: str | None = None
    ) -> list[Candidates]:
        """Return the rows of a split, or those of a part, under a prompt, or one of each part."""
        key = f"{split} {prompt} {part}"
        if key not in self._encoded:
            rows = getattr(self.loaded.task, split)
            if part is not None:
                rows = by_part(rows)[part]
            found = self.loaded.encode(rows, self.loaded.prompt(prompt))
            if split == "train":
                found = short_enough(found, self.loaded)
            self._encoded[key] = found
        return self._encoded[key]

    def _evaluate(
        self,
        split: str,
        part: str,
        prompt: int | Sequence[int],
        as_it_came: bool,
        name: str,
        keeps: bool,
        lot: Sequence[int],
        step: int,
        scored: Sequence[int],
        answered: Sequence[int],
    ) -> None:
        rows = self._rows(split, prompt, part)[slice(*lot)]
        if step:
            self._advance(step)
        with self.loaded.as_it_came() if as_it_came else nullcontext():
            try:
                bar = self.console.bar("", len(rows))
                known = Part(len(rows), scored, answered)  # what rank 0 has
                is_cached = kept_inputs.is_of(self.loaded, as_it_came)
                with self.loaded.scorer.forward.evaluating(name, keeps, is_cached):
                    evaluate(self.loaded.scorer, rows, bar, self.team.asked, self.team, known)
            except (Stopped, NonFiniteLoss):
                return  # rank 0 knows it, too

    def _steps(self, step: int, until: int, width: int, prompt: int | Sequence[int]) -> None:
        s, team = self.settings, self.team
        train = self._rows("train", prompt)
        method = self._advance(0)  # as it came, like rank 0, if no step was made yet
        if not self._is_checked:  # it also finds where weights must be moved
            self._is_checked = True
            kept_inputs.compute_together(self.loaded, train)
            self.loaded.scorer.model.eval()
            try:
                with self_check.refusing():
                    method.self_check(lambda: self.loaded.scorer.loss(of_one_part(train)[:2]))
            except NonFiniteLoss:
                pass  # rank 0 has met it, too, and says it with the row
            except ValueError as error:
                raise UserError(f"method: {error}.") from error
        self._advance(step)
        batches = batches_of(train, s.batch_size, s.seed, s.batch_order)
        team.begin_steps(until - step, width)
        while team.left > 0:
            step = method.num_steps
            method.set_lr_factor(lr_factor(s.lr_schedule, step, s.steps, s.warmup_steps))
            self.loaded.scorer.model.train(method.mode == "train")
            try:
                self._measure.step(method, *batches.of_step(method, step))
            except NonFiniteLoss:
                return  # rank 0 has it, too

    def _load(self, path: str, sha256: str) -> None:
        """Load weights from the run folder, if it is on this machine; tell all ranks if it is."""
        found = False
        with suppress(UserError):
            found = self._set_weights(Path(path), sha256)
        self.team.add([float(found)])

    def _take(self, name: str, sha256: str) -> None:
        """Load the weights that rank 0 has sent.

        Raises:
            UserError: they did not come whole.
        """
        with self._parcel.opened() as folder:
            if not self._set_weights(folder / name, sha256):
                raise UserError(f"{name} of rank 0 did not come whole: start the ranks again.")

    def _set_weights(self, path: Path, sha256: str) -> bool:
        """Put saved weights into the model; return whether they are those with this digest."""
        saved = Saved(path)
        is_whole = saved.about.get("sha256") == sha256 and saved.is_whole()
        if is_whole:
            self.loaded.set_weights(saved, path)
        return is_whole
