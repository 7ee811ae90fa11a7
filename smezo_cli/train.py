"""The one entry point: settings -> task, model, method -> zero-shot -> fit -> test -> result.json.

smezo train [KEY=VALUE ...]        (or: python -m smezo_cli.train ...)
"""

import sys

if __name__ == "__main__":  # the same as `python -m smezo_cli train ...`, before other imports
    import runpy  # is loaded already

    sys.argv.insert(1, "train")
    runpy.run_module("smezo_cli", run_name="__main__", alter_sys=True)

from typing import Any

from omegaconf import DictConfig

from smezo_cli.config.launch import launch
from smezo_cli.config.settings import check
from smezo_cli.run import ranks
from smezo_cli.run.session import _run


def main(argv: list[str] | None = None) -> int:
    """Run ``smezo train``; the exit code: 0, 1 crashed, 2 the user's to mend, 130 stopped."""
    return launch(sys.argv[1:] if argv is None else argv, run)


def run(cfg: DictConfig) -> dict[str, Any]:
    """One run, or what is left of it; the content of result.json.

    Raises:
        UserError: anything that the user can mend.
        KeyboardInterrupt: stopped by a signal; the state is saved.
    """
    settings = check(cfg)
    team = ranks.join(settings)
    if team is not None and team.rank > 0:
        from smezo_cli.run.follower import follow

        follow(settings, team)
        return {}
    try:
        return _run(cfg, settings, team)
    finally:
        if team is not None:
            team.leave()
