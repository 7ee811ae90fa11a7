"""Connect the processes that make one run together, and exchange all that they exchange.

torchrun starts them and torch.distributed carries the numbers; nothing is scheduled here. Rank 0 is
the run: it has the folder, the console and the loggers, and tells the others (the followers,
:mod:`smezo_cli.run.follower`) what comes next. Every rank holds all weights and moves them by
itself; in a step the ranks exchange two losses a query, and the gradient of what a method trains by
backpropagation.
"""

import atexit
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from smezo_cli.config.fixed import is_frozen
from smezo_cli.config.method_keys import shared_by, trait
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.machine import torchrun
from smezo_cli.machine.torchrun import VARIABLES, local_rank, mistake_in_variables
from smezo_cli.run.wire import RankLost, Wire, first_line

_joined: "Ranks | None" = None
_ALONE = "unset RANK WORLD_SIZE"

# A rank that dies closes its connections, which the others notice at once. What may take long is
# the work of one rank alone: a checkpoint of a large model, or a trajectory that is replayed.
_TIMEOUT = timedelta(hours=4)


class Left(Exception):
    """Say that rank 0 has ended the run, and why."""


# Seconds; ranks start within a few of each other, unless there are no others.
_PATIENCE = 5.0


def join(settings: Settings) -> "Ranks | None":
    """Connect to the other ranks and return them all; None for a process that runs alone.

    Raises:
        UserError: the settings do not suit so many ranks.
        RankLost: the others cannot be reached.
    """
    global _joined  # a process joins once; the jobs of a sweep follow each other
    if (
        all(os.environ.get(name) for name in VARIABLES)
        and (mistake := mistake_in_variables()) is not None
    ):
        raise UserError(f"{mistake}: start ranks by torchrun, or to run alone: {_ALONE}.")
    if local_rank() is None:
        for key, alone in (("query_ranks", 1), ("rank_backend", "gloo")):
            if (value := getattr(settings, key)) != alone:
                raise UserError(
                    f"{key}={value} is for several ranks: start them by torchrun "
                    f"--nproc-per-node N -m smezo_cli.train ..., or leave {key} out."
                )
        return None
    size = int(os.environ["WORLD_SIZE"])
    _check(settings, size)
    if _joined is None:
        _joined = Ranks(settings.rank_backend)
        torchrun.joined_rank = _joined.rank
    _joined.begin(settings)
    return _joined


def _check(settings: Settings, size: int) -> None:
    of_queries, name = settings.query_ranks, settings.method["name"]
    if settings.eps is None:
        why = "takes no steps" if is_frozen(settings.method) else "would exchange whole gradients"
        raise UserError(
            f"method={name} {why}: ranks exchange losses alone, so start it without torchrun."
        )
    if not trait(settings.method, "shares_steps", default=True):
        raise UserError(
            f"method={name} takes more than losses of a model, and ranks exchange losses alone: "
            "start it without torchrun."
        )
    if settings.model["device_map"] is not None:
        raise UserError(
            "model.device_map spreads the model of one process, and every rank would take the "
            "same GPUs: start it without torchrun, or leave model.device_map out."
        )
    if size % of_queries:
        raise UserError(
            f"query_ranks={of_queries}: the {size} ranks must be a multiple of it; "
            f"query_ranks=1 shares the rows alone."
        )
    shared, queries = shared_by(settings.method)
    if of_queries > 1 and not shared:
        raise UserError(
            f"query_ranks={of_queries}: the losses of a step of method={name} belong together, so "
            "ranks share its rows alone; leave query_ranks out."
        )
    if queries is not None and of_queries > queries:
        there_are = "there is 1 query" if queries == 1 else f"there are {queries} queries"
        more = " or ".join(f"method.{key}" for key in shared)
        raise UserError(
            f"query_ranks={of_queries}: {there_are} to share; raise {more}, or lower query_ranks."
        )
    if size // of_queries > settings.batch_size:
        raise UserError(
            f"batch_size={settings.batch_size}: {size // of_queries} ranks share the rows, and "
            "each needs one; raise batch_size, or start fewer ranks."
        )


def _meet(rank: int, size: int) -> Any:
    """Wait for all ranks, say what is waited for, and return their store.

    A process that inherits the variables from an earlier start would else wait in silence.

    Raises:
        RuntimeError: rank 0 cannot listen or has ended, or a rank does not come in time.
    """
    from torch import distributed

    stores: Any = distributed  # which does not export them for a type checker
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # With torchrun it is its agent that listens.
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    start, said = time.monotonic(), ""

    def wait(what: str) -> None:
        nonlocal said
        waited = time.monotonic() - start
        if waited > _TIMEOUT.total_seconds():
            raise RuntimeError(what)
        if waited >= _PATIENCE and what != said:
            said = what
            sys.stderr.write(
                f"smezo: rank {rank} waits for the others: {what} (RANK={rank}, WORLD_SIZE={size}, "
                f"MASTER_ADDR={host} and MASTER_PORT={port} are set, as torchrun does); to run "
                f"alone: {_ALONE}\n"
            )
            sys.stderr.flush()
        time.sleep(0.05)

    while not listens:
        try:  # a store that cannot connect writes traces of torch's source to the terminal
            socket.create_connection((host, port), _PATIENCE).close()
            break
        except OSError:
            wait(f"nobody answers at {host}:{port}, where rank 0 is to be")
    server = stores.TCPStore(
        host, port, size, listens, _TIMEOUT, wait_for_workers=False, multi_tenant=True
    )
    store = stores.PrefixStore(f"smezo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    come = store.add("come", 1)
    while come < size:
        wait(f"{come} of {size} have come to {host}:{port}")
        come = store.add("come", 0)
    return store


class Ranks(Wire):
    """Exchange numbers among all ranks of a run; a collective that fails ends it on every rank.

    Args:
        backend: "gloo", or "nccl" with one CUDA device for each rank.

    Attributes:
        asked: says whether this rank was asked to stop.
        stop_asked: whether some rank was asked to stop; known to all after a step.
        of_rows: number of ranks that share the rows of a query.
        of_queries: number of groups of such ranks, which share the queries.
        left: steps that the followers take before they ask rank 0 what comes next.
        most_queries: that there were to share at once so far.
    """

    def __init__(self, backend: str) -> None:
        import torch

        # Its functions take the group of their import as a default, and so would keep ours alive
        # past its end: gloo's threads then outlive Python, which may abort the process.
        import torch.distributed.nn.functional
        from torch import distributed

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.backend, self.lost = backend, False
        # gloo sends numbers from the host, where losses are read anyway.
        self._device = torch.device("cpu" if backend == "gloo" else f"cuda:{local_rank()}")
        try:
            store = _meet(self.rank, self.size)
            distributed.init_process_group(
                backend, timeout=_TIMEOUT, world_size=self.size, rank=self.rank, store=store
            )
        except (RuntimeError, ValueError) as error:
            raise RankLost(
                f"rank {self.rank} cannot join the others ({first_line(error)}): see torchrun's "
                "--rdzv-endpoint and --master-addr, and of machines with several networks "
                "GLOO_SOCKET_IFNAME."
            ) from error
        atexit.register(self._close)

    def begin(self, settings: Settings) -> None:
        """Start a run: decide how its steps are shared, and forget the run before."""
        if self.lost:
            raise RankLost("the ranks have lost each other; start them again.")
        self.of_queries, self.of_rows = settings.query_ranks, self.size // settings.query_ranks
        self.stop_asked, self.left, self._width = False, 0, 0
        self.most_queries = 0
        self.asked: Callable[[], bool] = lambda: False  # was this rank asked to stop?
        self._expected: int | None = None  # numbers in the sum that the followers wait in
        self._adds_gradients = False  # so that the followers wait in the sum of a tensor
        self._stage = "before"

    # --- shards -------------------------------------------------------------------------------

    @property
    def shares_rows(self) -> bool:
        """Say whether several ranks measure a query, each on rows of its own."""
        return self.of_rows > 1

    def rows(self, num: int) -> slice:
        """Return which of so many rows this rank measures."""
        place = self.rank % self.of_rows
        return slice(place * num // self.of_rows, (place + 1) * num // self.of_rows)

    def queries(self, num: int) -> Sequence[int]:
        """Return which of so many queries this rank measures."""
        self.most_queries = max(self.most_queries, num)
        return range(self.rank // self.of_rows, num, self.of_queries)

    # --- what is exchanged --------------------------------------------------------------------

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Return sums over the ranks: an exchange of a step, which may have several.

        Two more numbers go with them: whether a rank was asked to stop, and whether rank 0 leaves.
        All exchanges of steps are of one length, so that rank 0 may leave at any of them.

        Raises:
            Left: rank 0 ends the run.
            RankLost: a rank is gone.
        """
        padding = [0.0] * (self._width - len(numbers))
        *sums, stop, leaving = self._add([*numbers, *padding, float(self.asked()), 0.0])
        self._expected, self._adds_gradients = None, False
        if leaving:
            raise Left
        self.stop_asked = self.stop_asked or stop > 0
        if not all(map(math.isfinite, sums)):
            self._end_steps()  # all ranks know it, and wait for rank 0's next command
        elif self.stop_asked:
            self.left = min(self.left, 1)  # likewise, once this step is made
        if self.left > 0:
            self._expected = len(sums)
        return sums[: len(numbers)]

    def measured(self) -> None:
        """Take note that the present step has all its losses, before the weights are moved."""
        self._adds_gradients = False
        if self.left <= 1:  # the followers wait for a command next, whatever happens here
            self._expected = None

    def step_made(self) -> None:
        """Take note that a step is made, of those that the followers make with rank 0."""
        self.left -= 1
        if self.left <= 0:
            self._end_steps()

    def _end_steps(self) -> None:
        self.left, self._expected, self._width = 0, None, 0

    def goes_on(self, has_scored: bool) -> bool:
        """Return whether any rank has just scored a batch of an evaluation.

        It raises as :meth:`add` does. After False, or a stop, no other exchange of this kind
        follows.
        """
        self.left = 2  # another may follow, whatever comes of this one
        goes_on = self.add([float(has_scored)])[0] > 0
        if not goes_on or self.stop_asked:
            self._end_steps()
        return goes_on

    def add_gradient(self, tensor: Any) -> Any:
        """Do as :meth:`add_tensor`, of a step: between :meth:`add` and :meth:`measured`.

        Rank 0 cannot end the run for the others between two of them, but by :meth:`abandon`.
        """
        self._adds_gradients = True
        return self.add_tensor(tensor)

    # --- rank 0 -------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the followers load task and model."""
        self.tell("start")
        self._stage = "agreeing"

    def agree(self, facts: Mapping[str, Any], error: str | None = None) -> list[dict[str, Any]]:
        """Return what every rank says of itself; refuse ranks that differ from rank 0.

        Args:
            facts: of this rank; its "same" must equal rank 0's.
            error: why it cannot take part.

        Raises:
            UserError: on rank 0, a rank cannot take part.
            Left: on the others, for the same reason.
        """
        content = json.dumps({**facts, "error": error}).encode()
        self._stage = "commands"
        said: list[dict[str, Any]] = [json.loads(part) for part in self.gather(content)]
        wrong = [f"rank {k}: {one['error']}" for k, one in enumerate(said) if one["error"]]
        for rank, one in enumerate(said if not wrong else []):
            for what, value in said[0]["same"].items():
                if one["same"].get(what) != value:
                    wrong.append(
                        f"rank {rank} has another {what} than rank 0: every machine must have "
                        "the same command, data, model and smezo."
                    )
        if wrong and self.rank == 0:
            raise UserError(wrong[0])
        if wrong:
            raise Left
        return said

    def tell(self, do: str, content: bytes = b"", **about: Any) -> None:
        """Send the followers a command, with numbers and bytes about it."""
        head = json.dumps({"do": do, **about}).encode()
        self._send([len(head), len(content)])
        self._send_bytes(head + content)

    def take_steps(self, step: int, until: int, width: int, **about: Any) -> None:
        """Let the followers take the steps from ``step`` on with this rank, unless they do.

        Args:
            step: the first of them.
            until: the one after the last.
            width: losses in an exchange, at most.
            about: what else they must know.
        """
        if self.left <= 0:
            self.tell("steps", step=step, until=until, width=width, **about)
            self.begin_steps(until - step, width)

    def begin_steps(self, num: int, width: int) -> None:
        """Be ready for the exchanges of so many steps, of so many losses at most."""
        self.left, self._expected, self._width = num, width, width

    def evaluate(self, **about: Any) -> None:
        """Let the followers score their shard of some rows; see :func:`evaluate`."""
        self.tell("evaluate", **about)
        self._expected = 1  # number in each exchange of `goes_on`

    def hand_out(self, path: str, sha256: str) -> bool:
        """Let the followers load a file of weights; return whether all of them have it."""
        self.tell("weights", path=path, sha256=sha256)
        self._expected = 1
        return self.add([1.0])[0] == self.size

    def memory(self) -> list[dict[str, Any]]:
        """Return of each follower its `peak` in bytes, its `micro_batch_size`, and if `halved`."""
        self.tell("memory")
        return [json.loads(part) for part in self.gather(b"")[1:]]

    def leave(self) -> None:
        """End the run for the followers, wherever they are, if they are not gone."""
        if self.lost or self._stage == "ended":
            return
        if self._adds_gradients:
            self.abandon()
            return
        try:
            if self._stage == "agreeing":
                self.gather(json.dumps({"error": "rank 0 has ended the run"}).encode())
            elif self._expected is not None:
                self._add([*([0.0] * self._expected), 0.0, 1.0])
            self.tell("end")
        except RankLost:
            return
        finally:
            self._stage = "ended"

    # --- followers ----------------------------------------------------------------------------

    def told(self) -> tuple[dict[str, Any], bytes]:
        """Return rank 0's next command, and its bytes."""
        head, content = self._send([0, 0])
        text = self._send_bytes(bytes(head + content))
        message: dict[str, Any] = json.loads(text[:head])
        return message, text[head:]
