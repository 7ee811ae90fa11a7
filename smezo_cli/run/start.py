"""Open the folder of a run, and start what is left of it."""

import shlex
from typing import Any

from smezo_cli.config.describe import command, is_sweep
from smezo_cli.config.digest import folder_of
from smezo_cli.config.settings import Settings
from smezo_cli.machine.stop import Stopped, StopRequest
from smezo_cli.machine.waiting import waiting
from smezo_cli.run.console import Console
from smezo_cli.run.finished import finished
from smezo_cli.run.ranks import Ranks
from smezo_cli.store.folder import UNSETTLED, RunFolder


def make(
    settings: Settings, config: dict[str, Any], device: str, team: Ranks | None
) -> dict[str, Any]:
    """Make a run, or what is left of it; return the content of result.json.

    Args:
        settings: the checked ones.
        config: the same as they were given, in plain values.
        device: that the run computes on.
        team: the ranks that this one leads; None: this process is alone.

    Raises:
        UserError: anything that the user can mend.
        KeyboardInterrupt: stopped by a signal; the state is saved.
    """
    s = settings
    folder, console = RunFolder(folder_of(s, config)), Console()

    def work(done: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do what is left of the run, or of a run that was killed behind its result `done`."""
        console.keep(folder.path / "console.log", folder.check_mine)
        with StopRequest(console.say, patient=False) as stop:
            # This takes seconds, which a finished run does not need.
            with waiting("loading torch and transformers"):
                from smezo_cli.run.begin import begin
                from smezo_cli.run.closing import settle
                from smezo_cli.run.session import finish

            try:
                run = begin(s, config, folder, console, stop, device, team)
                return finish(run) if done is None else settle(run, done)
            except (Stopped, KeyboardInterrupt):  # the latter where nothing was to be saved
                words = [w for w in shlex.split(command()) if not w.startswith("if_exists=")]
                same = "the same command goes on from here"
                if is_sweep():
                    same = "the same sweep goes on from here; this run alone is"
                console.say(f"stopped; {same}:\n  {shlex.join(words)}")
                raise KeyboardInterrupt from None

    try:
        if s.if_exists == "fresh":
            folder.clear()
        elif (done := finished(folder, s, config, console.say)) is not None:
            if (state := folder.load_state()) is not None and UNSETTLED in state.notes:
                work(done)
            metric = done.get("metric", "accuracy")
            console.say(
                f"{folder.path}: done already, test {metric} {done['test'][metric]:.4f} "
                "(if_exists=fresh repeats it)"
            )
            return done
        return work()
    finally:
        console.close()
        folder.close()
