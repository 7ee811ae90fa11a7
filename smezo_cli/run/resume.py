"""Check what a run folder has before a run goes on from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError

if TYPE_CHECKING:
    from smezo_cli.store.folder import RunFolder


def check_done(done: Mapping[str, Any], settings: Settings, path: Path) -> None:
    """Refuse to call a run done that asks for more than the finished one has."""
    from smezo_cli.tasks.load import local_fingerprint

    now = local_fingerprint(settings.task)
    if now is not None and done.get("data_fingerprint") not in (None, now):
        raise UserError(
            f"{path} is done, and its data has changed since: start over with if_exists=fresh, or "
            "give the new run a name, name=NAME."
        )
    if settings.keep == "all" != done.get("keep"):
        raise UserError(
            f"keep=all: {path} is done, and the weights of its looks are gone; repeat it with "
            "if_exists=fresh."
        )


def _damaged(folder: "RunFolder", steps: int) -> list[str]:
    """Names of files of a finished run that are there and not what was written."""
    from smezo_cli.store.trajectory import Damaged, read

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
