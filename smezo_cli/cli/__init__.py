"""Answer the `smezo` command line; each verb has a file of its own."""

from smezo_cli.cli.verbs import main

__all__ = ["main"]
