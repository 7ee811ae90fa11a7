"""Several ranks at once, forked with the variables that torchrun sets."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.scoring import scorer
from tests.run.processes import Ended, Started
from tests.run.tiny_runs import SMALL, result_of

# Two looks; rows that no number of ranks divides evenly but 1, 2, 4.
RUN = [*SMALL, "steps=6", "eval_every=3", "batch_size=8"]
# With one prompt, which is not scored before training, and a third of the test rows.
SHORT_RUN = [*RUN, "task.prompt=0", "zero_shot=false", "task.num_test=8"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def few_tokens() -> None:
    """Rows are scored some at a time, so that there is something to share."""
    scorer.EVAL_TOKENS = 64


class Group:
    """Ranks under way; also a context that leaves no process behind."""

    def __init__(self, size: int, words: Sequence[str], cwd: Path, **keywords: Any) -> None:
        common = {
            **{"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"},
            **{"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"},
        }
        self.ranks = [
            Started(
                words,
                cwd / ("" if rank == 0 else f"rank{rank}"),
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **keywords,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()

    def wait(self) -> list[Ended]:
        return [rank.wait() for rank in self.ranks]


def together(size: int, words: Sequence[str], cwd: Path, faults: Sequence[Any] = ()) -> list[Ended]:
    """All ranks to their ends; every one of them in a folder of its own."""
    with Group(size, words, cwd, faults=faults) as group:
        return group.wait()


def weights_of(folder: Path) -> Mapping[str, Any]:
    found = result_of(folder)["weights"]
    assert isinstance(found, dict)
    return found
