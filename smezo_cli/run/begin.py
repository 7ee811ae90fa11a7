"""Begin a run: gather what all its stages are given, and say on the console what it is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from smezo_cli.config.describe import recipes, replaced
from smezo_cli.config.fixed import is_frozen
from smezo_cli.config.settings import Settings
from smezo_cli.files.bounded import is_count
from smezo_cli.machine import memory
from smezo_cli.machine.device import all_devices
from smezo_cli.machine.stop import Stopped, StopRequest
from smezo_cli.run.console import Console
from smezo_cli.run.finished import write_config
from smezo_cli.run.ranks import Ranks
from smezo_cli.store import versions
from smezo_cli.store.folder import RunFolder, State
from smezo_cli.store.notes import Notes


@dataclass(frozen=True)
class Run:
    """Hold what all stages of a run are given.

    Attributes:
        settings: the checked ones.
        config: the same as they were given, in plain values.
        folder: of the run, locked.
        state: where it stands.
        console: where it speaks.
        stop: whether a signal asked it to stop.
        team: the ranks that this one leads; None: this process is alone.
        device: that it computes on.
        memory: its peak.
        started: when, as text.
        versions: of the libraries that make it.
        recipes: names of those that set its values.
    """

    settings: Settings
    config: dict[str, Any]
    folder: RunFolder
    state: State
    console: Console
    stop: StopRequest
    team: Ranks | None
    device: torch.device
    memory: memory.PeakMemory
    started: str
    versions: dict[str, Any]
    recipes: list[str]

    @property
    def notes(self) -> Notes:
        """Return what the state notes beside steps."""
        return self.state.notes

    @property
    def objective(self) -> str:
        """Return what steps lower: "loss", or 1 less the "accuracy" or "f1"."""
        return str(self.settings.method.get("objective", "loss"))

    def say(self, line: str) -> None:
        """Write a line to the console."""
        self.console.say(line)

    def lost(self, line: str) -> None:
        """Say that a file was taken from the run, which writes it anew if the folder is its own.

        Raises:
            UserError: the folder is another's now.
        """
        self.folder.check_mine()
        self.console.say(line)

    def stopped(self) -> bool:
        """Say whether this rank or another one was asked to stop."""
        return self.stop.asked or (self.team is not None and self.team.stop_asked)

    def check_stop(self) -> None:
        """Raise Stopped if the run was asked to stop."""
        if self.stopped():
            raise Stopped


def begin(
    settings: Settings,
    config: dict[str, Any],
    folder: RunFolder,
    console: Console,
    stop: StopRequest,
    device: str,
    team: Ranks | None,
) -> Run:
    """Return what the stages are given, with the state of an earlier start if there is one."""
    device_map = settings.model["device_map"]
    devices = [device] if device_map is None else all_devices(device_map)
    write_config(folder, config)
    state = folder.load_state() or State()
    return Run(
        _as_begun(settings, config, folder, state),
        config,
        folder,
        state,
        console,
        stop,
        team,
        torch.device(device),
        memory.PeakMemory(*map(torch.device, devices)),
        versions.now(),
        versions.versions(),
        recipes(),
    )


def _as_begun(
    settings: Settings, config: Mapping[str, Any], folder: RunFolder, state: State
) -> Settings:
    """Return the settings with the number that eval_every=null stood for when the run began.

    It follows from the steps, of which a run that is extended has more by now.
    """
    if config.get("eval_every") is not None or is_frozen(settings.method):
        return settings
    every: Any = state.notes.get("eval_every")
    if every is None and state.looked:  # an older version has not noted it
        every = (folder.result() or {}).get("eval_every")
    if not is_count(every) or not every:
        every = settings.eval_every
    state.notes["eval_every"] = every
    return replace(settings, eval_every=every)


def announce(run: Run) -> None:
    """Say what is run, where, and from which step on."""
    s = run.settings
    knobs = "".join(
        f" {knob}={value:g}"
        for knob in ("lr", "eps", "sparsity")
        if (value := getattr(s, knob)) is not None
    )
    objective = "" if run.objective == "loss" else f" objective={run.objective}"
    length = "" if is_frozen(s.method) else f"steps={s.steps} batch_size={s.batch_size} "
    run.say(
        f"{s.task['name']} | {s.model['name']} | {s.method['name']}{knobs}{objective} | "
        f"{length}seed={s.seed} | {s.dtype} on {run.device}"
    )
    run.say(f"  folder  {run.folder.path}")
    if s.model.get("trust_remote_code"):
        run.say("  remote code  Python files of the model are executed, as asked")
    if run.recipes:
        run.say(f"  recipe  {' and '.join(run.recipes)}")
    for line in replaced():
        run.say(f"  file    {line}")
    if run.state.step:
        run.say(f"  going on from step {run.state.step}")
