"""A case of the fuzzer: what it may do, and the register of the kinds of cases."""

import contextlib
import io
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import product

CHOICE_BYTES = 1 << 15  # Hypothesis gives up where a quarter of it is drawn


class Finding(Exception):
    """What must not happen has happened."""


class TooLong(BaseException):
    """The alarm; no handler of the product may catch it."""


@dataclass
class Case:
    """One hostile input.

    Attributes:
        folder: the current folder, empty at first; the case makes its inputs here.
        fixtures: sound files to spoil copies of: `run`, `adamw` (a run, too), `model`,
            `tiny.gguf`, `tiny.delta`.
        data: draws from Hypothesis' strategies, by the case's key.
        refused: whether some call was refused in one sentence.
    """

    folder: Path
    fixtures: Path
    data: st.DataObject = field(init=False)
    refused: bool = False

    def draw(self, values: st.SearchStrategy[Any]) -> Any:
        """Draw a value of this strategy."""
        return self.data.draw(values)

    def pick(self, some: Sequence[Any]) -> Any:
        """Return one of these, each as often."""
        return self.data.draw(st.sampled_from(some))

    def below(self, end: int) -> int:
        """Return a whole number from 0 to `end - 1`."""
        return self.data.draw(st.integers(0, end - 1))

    def chance(self, part: float) -> bool:
        """Return True in this part of the cases."""
        return self.below(1000) < 1000 * part

    def smezo(self, *words: str, codes: tuple[int, ...] = (0,)) -> None:
        """The command line itself: one of these exit codes, or 2 with one sentence."""
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = product.main(words)
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
        try:
            return function(*words, **more)
        except product.UserError as error:
            self.refused = True
            if "\n" in str(error):
                raise Finding(f"refused in several lines: {error}") from error
            return None


def once(test: Callable[[st.DataObject], None], key: str) -> None:
    """Call the test once, with choices that follow from the key and Hypothesis' version alone.

    `fuzz_one_input` runs a test on bytes from elsewhere, here from a generator of the key. (To run
    it as `@seed` does would first try the simplest case, and look into whatever is imported.)
    """
    choices = random.Random(key).randbytes(CHOICE_BYTES)
    depth = sys.getrecursionlimit()

    def shallow(data: st.DataObject) -> None:
        deeper = sys.getrecursionlimit()
        sys.setrecursionlimit(depth)  # as it is for a user
        try:
            test(data)
        finally:
            sys.setrecursionlimit(deeper)

    target = settings(database=None)(given(data=st.data())(shallow)).hypothesis.fuzz_one_input
    if target(choices) is None:
        raise Finding("the case makes more choices than Hypothesis keeps: draw smaller values")


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
