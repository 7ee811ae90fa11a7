"""Read what torchrun tells a process: its rank, and so whether it prints messages."""

import os
from collections.abc import Iterable

from smezo_cli.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets


def local_rank() -> int | None:
    """Return the number of this process on its machine; None if it is the only one."""
    if not all(os.environ.get(name) for name in VARIABLES) or mistake_in_variables() is not None:
        return None
    return None if int(os.environ["WORLD_SIZE"]) == 1 else int(os.environ.get("LOCAL_RANK", "0"))


def mistake_in_variables() -> str | None:
    """Return what is wrong with the variables of a rank, which are all set; None if nothing is."""
    for name in (*(v for v in VARIABLES if v != "MASTER_ADDR"), "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            return f"{name}={value} is no whole number"
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if int(size) == 0 or int(rank) >= int(size):
        return f"RANK={rank} must be less than WORLD_SIZE={size}"
    if int(os.environ["MASTER_PORT"]) >= 1 << 16:
        return f"MASTER_PORT={os.environ['MASTER_PORT']} is no port (0 to 65535)"
    return None


# The rank of this process, once it has joined the others.
joined_rank: int | None = None


def speaker() -> str | None:
    """Return the prefix of messages; None: this process is silent, as rank 0 says the same."""
    if local_rank() is None or os.environ["RANK"] == "0":
        return ""
    return None if joined_rank is None else f"rank {joined_rank}: "


def check_launcher(words: Iterable[str]) -> None:
    """Refuse a launcher of a sweep that starts processes of its own.

    Args:
        words: of the command line.

    Raises:
        UserError: among ranks there is one.
    """
    for word in words:
        key, _, name = word.partition("=")
        if key == "hydra/launcher" and name != "basic" and local_rank() is not None:
            raise UserError(
                f"{word} starts processes of its own, and torchrun's ranks are there already: "
                "leave hydra/launcher out, or start without torchrun."
            )
