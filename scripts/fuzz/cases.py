"""A case of the fuzzer: what it may do, and the register of the kinds of cases."""

import contextlib
import io
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Finding(Exception):
    """What must not happen has happened."""


class TooLong(BaseException):
    """The alarm; no handler of the product may catch it."""


@dataclass
class Case:
    """One hostile input.

    Attributes:
        rng: keyed by seed, kind and number.
        folder: the current folder, empty at first; the case makes its inputs here.
        fixtures: sound files to spoil copies of: `run`, `adamw` (a run, too), `model`,
            `tiny.gguf`, `tiny.delta`.
    """

    rng: random.Random
    folder: Path
    fixtures: Path
    refused: bool = False
    output: str = ""

    def smezo(self, *words: str, codes: tuple[int, ...] = (0,)) -> None:
        """The command line itself: one of these exit codes, or 2 with one sentence."""
        from smezo_cli.cli.verbs import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        self.output = out.getvalue()
        said = err.getvalue()
        # What is announced while files are fetched or prepared is no refusal.
        told = re.compile(r"out: \d+ results, \d+ of them new")  # by --collect, of what it wrote
        lines = [line for line in said.strip().splitlines() if not told.fullmatch(line)]
        if code not in (*codes, 2) or "Traceback" in said:
            raise Finding(f"exit code {code}: {said[-3000:]}")
        if code == 2 and (len(lines) != 1 or not lines[0].startswith("smezo: ")):
            raise Finding(f"refused in {len(lines)} lines: {said[-3000:]}")
        if code != 2 and lines:
            raise Finding(f"done, with complaints: {said[-3000:]}")
        self.refused |= code == 2

    def call(self, function: Callable[..., Any], *words: Any, **more: Any) -> Any:
        """What a verb calls: a value, or None after a UserError of one line."""
        from smezo_cli.errors import UserError

        try:
            return function(*words, **more)
        except UserError as error:
            self.refused = True
            if "\n" in str(error):
                raise Finding(f"refused in several lines: {error}") from error
            return None


@dataclass(frozen=True)
class Kind:
    """A way to make cases.

    Attributes:
        make: makes and runs one.
        share: of the cases, by weight.
    """

    make: Callable[[Case], None]
    share: float


KINDS: dict[str, Kind] = {}


def kind(share: float) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a kind under the name of its function."""

    def register(make: Callable[[Case], None]) -> Callable[[Case], None]:
        KINDS[make.__name__] = Kind(make, share)
        return make

    return register
