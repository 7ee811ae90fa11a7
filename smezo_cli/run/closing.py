"""Close a run: its files, its loggers, and what it no longer needs."""

import contextlib
from collections.abc import Mapping
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.run import kept_inputs
from smezo_cli.run.begin import Run
from smezo_cli.run.finished import has_config, write_config
from smezo_cli.run.loggers import Loggers, open_loggers
from smezo_cli.run.result import SoFar
from smezo_cli.store.folder import UNSETTLED
from smezo_cli.store.partial_scores import NAME, PartialScores


def loggers_of(run: Run) -> Loggers:
    """Open the loggers of a run, where its state left them."""
    kept = run.state.metrics_bytes
    return open_loggers(run.settings.logger, run.folder.path, run.config, kept, run.lost)


def keep_scores(run: Run, partial: PartialScores | None) -> None:
    """Keep what evaluations have scored whose results are not saved."""
    # The run ends for another reason, which is told; a device that failed gives nothing.
    with contextlib.suppress(UserError, RuntimeError, MemoryError):
        if partial is not None and (count := partial.keep()):
            run.say(f"  kept the scores of {count} rows")


def close(run: Run, so_far: SoFar, result: dict[str, Any]) -> None:
    """Close what is open, and write result.json."""
    if so_far.recorder is not None:
        so_far.recorder.close()
    if so_far.loaded is not None:
        kept_inputs.end(so_far.loaded)
    with contextlib.ExitStack() as stack:  # all are closed, whatever cannot be written
        if so_far.loggers is not None:
            stack.callback(so_far.loggers.close, result, run.say)
        run.folder.write_result(result)
        if not has_config(run.folder, run.config):
            write_config(run.folder, run.config)


def settle(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Do what a run that was killed right behind its result has not done any more."""
    loggers_of(run).close(result, run.say)
    clean(run, result)
    return result


def clean(run: Run, result: Mapping[str, Any]) -> None:
    """Remove what a finished run does not need of its checkpoint, and its partial scores."""
    for left in (run.folder.path / NAME, run.folder.path / f".{NAME}.partial"):
        left.unlink(missing_ok=True)
    run.folder.settle(run.state, result["keep"], run.notes["unsettled"]["goes_on"])
    del run.state.notes[UNSETTLED]  # only now: all that is not named is gone
    run.folder.save_state(run.state)
