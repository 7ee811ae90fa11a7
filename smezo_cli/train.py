"""Train and test one run: checked settings in, result.json out.

smezo train [KEY=VALUE ...]        (or: python -m smezo_cli.train ...)
"""

import sys

if __name__ == "__main__":  # the same as `python -m smezo_cli train ...`, before other imports
    import importlib  # is loaded already

    sys.argv.insert(1, "train")
    importlib.import_module("smezo_cli.__main__")

from typing import Any

from omegaconf import DictConfig

from smezo_cli.config.digest import folder_of
from smezo_cli.config.fixed import plain
from smezo_cli.config.launch import launch
from smezo_cli.config.settings import check
from smezo_cli.machine import torchrun
from smezo_cli.machine.device import choose_device
from smezo_cli.machine.waiting import waiting
from smezo_cli.run import ranks
from smezo_cli.tasks.load import check_own


def main(argv: list[str] | None = None) -> int:
    """Run ``smezo train``; return 0, 1 (a crash), 2 (the user's to mend) or 130 (stopped)."""
    return launch(sys.argv[1:] if argv is None else argv, run)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Make one run, or what is left of it; return the content of result.json.

    A rank other than 0 follows rank 0, and returns nothing.

    Raises:
        UserError: anything that the user can mend.
        KeyboardInterrupt: stopped by a signal; the state is saved.
    """
    settings, config = check(cfg), plain(cfg)
    # Ranks tell each other what is wrong, once they have joined. A finished run is of its rows.
    is_alone = torchrun.local_rank() is None
    if is_alone and not (folder_of(settings, config) / "result.json").exists():
        check_own(settings.task)
    team = ranks.join(settings)
    if team is not None and team.rank > 0:
        from smezo_cli.run.follower import follow

        follow(settings, team)
        return {}
    try:
        device_map = settings.model["device_map"]
        device = choose_device(settings.device, device_map, torchrun.local_rank())
        # This imports torch, which takes seconds: every cheap check lies above.
        with waiting("loading torch and transformers"):
            from smezo_cli.run.start import make

        return make(settings, config, device, team)
    finally:
        if team is not None:
            team.leave()
