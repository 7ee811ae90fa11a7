"""Check whether a run folder holds the finished run that is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import is_frozen
from smezo_cli.config.method_keys import trait
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError, redacted_tree
from smezo_cli.files import bounded
from smezo_cli.files.atomic import write_text
from smezo_cli.store.folder import RunFolder, State
from smezo_cli.store.trajectory import Damaged, read
from smezo_cli.tasks.load import local_fingerprint


def finished(
    folder: RunFolder,
    settings: Settings,
    config: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Return the result of a run that is done and whole; None where it is to begin or go on.

    Raises:
        UserError: the folder has another run than the settings ask for.
    """
    path, done, state = folder.path, folder.result(), folder.load_state()
    if done is not None and settings.if_exists == "error":
        raise UserError(
            f"{path} exists already; add if_exists=resume or if_exists=fresh, or name=NAME."
        )
    if state is not None and state.step > settings.steps:
        raise UserError(
            f"steps={settings.steps}: {path} has done {state.step} steps already; a shorter "
            "run needs a name of its own: add name=NAME."
        )
    if done is None or done.get("status") != "done" or done["steps"] != settings.steps:
        if state is not None:
            _check_kept(state, settings, path)
        if done is not None and done.get("status") == "done":
            # What it goes on from was a result; the longer run may never end.
            folder.write_result(done, f"result-{done['steps']}.json")
        return None
    _check_done(done, settings, path)
    if state is not None and "reopened" in state.notes:
        say(f"{path}: done, but its mending was broken off: goes on")
        return None
    if damaged := _damaged(folder, done["step"]):
        say(f"{path}: done, but {' and '.join(damaged)} damaged: mended")
        return None
    if not has_config(folder, config):
        write_config(folder, config)
    return done


def _check_done(done: Mapping[str, Any], settings: Settings, path: Path) -> None:
    """Refuse to call a run done that asks for more than the finished one has."""
    now = local_fingerprint(settings.task)
    if now is not None and done.get("data_fingerprint") not in (None, now):
        raise UserError(
            f"{path} is done, and its data has changed since: start over with if_exists=fresh, or "
            "give the new run a name, name=NAME."
        )
    if settings.keep == "all" != done.get("keep"):
        raise UserError(
            f"keep=all: {path} is done, and the weights of its evaluations are gone; repeat it "
            "with if_exists=fresh."
        )


def _check_kept(state: State, settings: Settings, path: Path) -> None:
    """Refuse keep=all where weights of evaluations are gone, and no trajectory makes them again."""
    method = settings.method
    if settings.keep != "all" or is_frozen(method) or trait(method, "replays", default=False):
        return
    every = state.notes.get("eval_every", settings.eval_every)
    gone = set(range(every, state.looked + 1, every)) - {*state.weights()}
    if gone:
        raise UserError(
            f"keep=all: {path} has evaluated dev at step {min(gone)} and not kept those weights; "
            "go on with the keep that it began with, or start over with if_exists=fresh."
        )


def _damaged(folder: RunFolder, steps: int) -> list[str]:
    """Return the names of files of a finished run that are there and not what was written."""
    found, path = folder.damaged(), folder.path / "trajectory.bin"
    if path.exists():
        state = folder.load_state()
        found += folder.damaged_weights(state) if state is not None else []
        try:
            records = read(path)
            if records.damage or len(records) < steps:
                found.append(path.name)
        except Damaged:
            found.append(path.name)
    return found


def write_config(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Write config.yaml: the resolved settings, without secrets."""
    folder.config = OmegaConf.to_yaml(OmegaConf.create(redacted_tree(dict(config))))
    write_text(folder.path / "config.yaml", folder.config)


def has_config(folder: RunFolder, config: Mapping[str, Any]) -> bool:
    """Say whether config.yaml is there, and is that of a run with these settings."""
    try:
        text = bounded.read_yaml(folder.path / "config.yaml")
        if text == folder.config:
            return True
        found = bounded.parse_yaml(text, folder.path / "config.yaml")
        return digest(found) == digest(redacted_tree(dict(config)))
    except (OmegaConfBaseException, UserError):
        return False
