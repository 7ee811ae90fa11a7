"""Runs in processes of their own, forked from one that has torch imported; faults in them."""

import functools
import itertools
import math
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smezo_cli import train
from smezo_cli.run import best, closing, evaluate, loaded, numerics
from smezo_cli.scoring import scorer as scoring
from smezo_cli.scoring.scorer import Scorer
from tests.run.tiny_runs import BATCH_SIZE


def ctrl_c_with_tee() -> None:
    """Ctrl-C ends `smezo train | tee log` at both ends: who reads our output is gone too."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.kill(os.getpid(), signal.SIGINT)


@dataclass(frozen=True)
class Fault:
    """Send this process a signal (or do something else to it) when `event` happens so often."""

    event: str
    number: int
    action: signal.Signals | Callable[[], None]

    def install(self) -> None:
        """Wrap what makes the event; "any" counts all of them together."""
        loss = Scorer.loss
        places: dict[str, list[tuple[Any, str]]] = {
            "loss": [(Scorer, "loss")],  # inside a probe, or a first-order step
            "load": [(loaded, "load_model")],
            "evaluate": [(evaluate, "evaluate")],
            "rename": [(os, "replace")],  # a file takes its place
            "nan": [(Scorer, "loss")],
            "noise": [(numerics, "loss_noise")],
            "end": [(os, "replace"), (os, "unlink")],  # from where a result is to be written
        }
        places["any"] = [*places["loss"], *places["evaluate"], *places["rename"]]
        count = itertools.count(1)
        is_end = self.event != "end"

        def ending(real: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any) -> Any:
                nonlocal is_end
                is_end = True
                return real(*args)

            return noted

        for module, name in ((best, "report"), (closing, "settle")):
            setattr(module, name, ending(getattr(module, name)))

        def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(real)
            def counted(*args: Any, **keywords: Any) -> Any:
                if real is loss and len(args[1]) != BATCH_SIZE:  # the self-check takes two rows
                    return real(*args, **keywords)
                struck = is_end and next(count) == self.number
                if self.event == "nan":
                    return real(*args, **keywords) * (math.nan if struck else 1)
                if struck and callable(self.action):
                    self.action()
                elif struck:
                    os.kill(os.getpid(), self.action)
                return real(*args, **keywords)

            return counted

        for owner, name in places[self.event]:
            setattr(owner, name, wrap(getattr(owner, name)))


def count_batches(number: float = math.inf, action: signal.Signals = signal.SIGTERM) -> None:
    """Evaluate a few rows at a time; note each batch in a file; send a signal at the n-th of them.

    The batches are those of scores, of hidden states and of answers, together.
    """
    scoring.EVAL_TOKENS, scoring.EVAL_ANSWERS = 96, 4
    count = itertools.count(1)

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            for found in real(*args, **keywords):
                with Path("batches").open("a") as file:
                    file.write(f"{real.__name__} {len(found[0])}\n")
                if next(count) == number:
                    os.kill(os.getpid(), action)
                yield found

        return counted

    for name in ("score_all", "features_all", "generate_all"):
        setattr(Scorer, name, wrap(getattr(Scorer, name)))


def no_model() -> None:
    """From here on, loading a model is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    loaded.load_model = refuse  # type: ignore[assignment]  # in a child process of its own


Program = Callable[[list[str]], int]


def _child(
    program: Program,
    words: Sequence[str],
    cwd: Path,
    out: str,
    err: str,
    env: Mapping[str, str],
    faults: Sequence[Callable[[], None]],
) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115 - for good
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)  # the same sums in every process, and no waiting for other cores
    for fault in faults:
        fault()
    sys.exit(program(list(words)))


@functools.cache
def forkserver() -> Any:
    """Start the process that others are forked from; the context that forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.run.warm", __name__])
    multiprocessing.forkserver.ensure_running()
    return context


@dataclass
class Ended:
    """What a process left."""

    code: int
    out: str
    err: str


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class Started:
    """A run under way in `cwd`; also a context that leaves no process behind.

    `program` is a main function, which a process that is forked must be able to import.
    """

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        *,
        out: str | None = None,
        env: Mapping[str, str] | None = None,
        faults: Sequence[Callable[[], None]] = (),
        program: Program = train.main,
    ) -> None:
        cwd.mkdir(parents=True, exist_ok=True)
        number = len(list(cwd.glob("*.err")))
        self._paths = out or str(cwd / f"{number}.out"), str(cwd / f"{number}.err")
        self._process = forkserver().Process(
            target=_child,
            args=(program, list(words), cwd, *self._paths, dict(env or {}), list(faults)),
        )
        self._process.start()
        self.pid: int = self._process.pid

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> int:
        """SIGKILL, unless it ended already; the exit code."""
        self._process.kill()
        self._process.join()
        return int(self._process.exitcode)

    @property
    def alive(self) -> bool:
        return bool(self._process.is_alive())

    def wait(self, seconds: float = 300) -> Ended:
        """Wait for the end."""
        self._process.join(seconds)
        assert not self.alive, "the run hangs"
        texts = [Path(p).read_text() if Path(p).is_file() else "" for p in self._paths]
        return Ended(self._process.exitcode, *texts)


def smezo(words: Sequence[str], cwd: Path, **keywords: Any) -> Ended:
    """`smezo train WORDS`, or what another program does with them, in `cwd`, to its end."""
    with Started(words, cwd, **keywords) as started:
        return started.wait()


def sentence_of(ended: Ended) -> str:
    """The one sentence on stderr of a refused command."""
    assert ended.code == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("smezo: ")
    return ended.err
