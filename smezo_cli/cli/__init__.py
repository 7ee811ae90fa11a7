"""The `smezo` command: a file a verb."""

from smezo_cli.cli.verbs import main

__all__ = ["main"]
