"""Define the types and ranges of arguments, with the words that a message about them uses.

Signatures of methods name them (``rank: Count = 2``), so the range of an argument stands once. No
torch in this module: settings are checked without it.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol


def shown(value: object) -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


class SettingType(Protocol):
    """Describe the type of a setting: its range, and the words for it."""

    @property
    def words(self) -> str:
        """Return what ends the sentence "KEY must be ..."."""

    @property
    def example(self) -> str:
        """Return a value that is allowed."""

    def __call__(self, value: object) -> object:
        """Return the value in its own type, or raise ValueError."""


@dataclass(frozen=True)
class Whole:
    """Accept a whole number of at least `low` and below `end`; 2e4 counts as one."""

    low: int = 0
    end: float = math.inf
    example: str = "1"

    @property
    def words(self) -> str:
        end = f" and below 2^{math.log2(self.end):g}" if self.end < math.inf else ""
        return f"a whole number of at least {self.low}{end}"

    def __call__(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise ValueError
        if not self.low <= value < min(self.end, 2**63):  # beyond are no numbers of anything
            raise ValueError
        return int(value)


@dataclass(frozen=True)
class Number:
    """Accept a finite number between two bounds; the upper is out, with `above` the lower too."""

    low: float
    high: float = math.inf
    above: bool = False
    example: str = "0.5"

    @property
    def words(self) -> str:
        if self.high < math.inf:
            return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g})"
        return f"a number {'above' if self.above else 'of at least'} {self.low:g}"

    def __call__(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not self.low <= value < self.high or (self.above and value == self.low):
            raise ValueError  # nan and inf end here too
        try:
            return float(value)
        except OverflowError:  # a whole number of hundreds of digits
            raise ValueError from None


class Choice:
    """Accept one of a few words; `true` and `false` among them are booleans."""

    def __init__(self, *options: str | bool) -> None:
        self.options = options
        words = [shown(option) for option in options]
        self.words = f"{', '.join(words[:-1])} or {words[-1]}"
        self.example = words[0]

    def __call__(self, value: object) -> str | bool:
        for option in self.options:
            if value == option and isinstance(value, bool) == isinstance(option, bool):
                return option
        raise ValueError


class Sizes:
    """Accept one of a few whole numbers."""

    def __init__(self, *options: int) -> None:
        self.options = options
        self.words = f"{', '.join(map(str, options[:-1]))} or {options[-1]}"
        self.example = str(options[0])

    def __call__(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value not in self.options:
            raise ValueError
        return value


class Betas:
    """Accept the two decays of Adam."""

    words = "a list of two numbers in [0, 1)"
    example = "[0.9,0.999]"

    def __call__(self, value: object) -> list[float]:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError
        return [Number(0, 1)(item) for item in value]


class Names:
    """Accept a list of strings."""

    words = 'a list of strings, such as ["*embed_tokens*"]'
    example = "[]"

    def __call__(self, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError
        return value


class BlockNumbers:
    """Accept "dominant", a block number, a range of them with both ends, or a list."""

    words = 'dominant, a block number, a range such as "16-29", or a list such as [16,17]'
    example = "[16,17]"

    def __call__(self, value: object) -> str | list[int]:
        if value == "dominant":
            return "dominant"
        number = Whole(0, end=2**20)
        if isinstance(value, str) and (ends := re.fullmatch(r"(\d{1,6})-(\d{1,6})", value)):
            first, last = (number(int(end)) for end in ends.groups())
            value = list(range(first, last + 1))
        found = sorted({number(item) for item in (value if isinstance(value, list) else [value])})
        if not found:
            raise ValueError
        return found


class Text:
    """Accept a text of at least one character."""

    words = "a text"
    example = "runs/default/RUN"

    def __call__(self, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value


# --- names for signatures ---------------------------------------------------------------------

Count = Annotated[int, Whole(1, example="16")]
Epochs = Annotated[int, Whole(2, example="160")]
Several = Annotated[int, Whole(2, example="8")]
Candidates = Annotated[int, Whole(3, example="4")]
ProjectEvery = Annotated[int, Whole(2, example="50")]
Shown = Annotated[int, Whole(1, example="32")]
StepsBetween = Annotated[int, Whole(0, example="0")]
Generators = Annotated[int, Whole(0, end=2**10, example="0")]
PoolBits = Annotated[int, Whole(4, end=17, example="12")]
Modulus = Annotated[str, Choice("exact", "power_of_two")]
Blocks = Annotated[int, Whole(0, example="1")]
Rows = Annotated[int, Whole(0, example="0")]
Positive = Annotated[float, Number(0, above=True, example="1.0")]
NotNegative = Annotated[float, Number(0, example="0.0")]
Fraction = Annotated[float, Number(0, 1, example="0.9")]
Shrink = Annotated[float, Number(0, 1, above=True, example="0.5")]
Frame = Annotated[int, Whole(1, end=17, example="4")]
Sparsity = Annotated[float, Number(0, 1, example="0.75")]
StepSize = Annotated[float, Number(0, above=True, example="1e-4")]
Angle = Annotated[float, Number(0, 1.5708, above=True, example="1.35")]
Radius = Annotated[float, Number(0, above=True, example="1e-3")]
Epsilon = Annotated[float, Number(0, above=True, example="1e-8")]
Limit = Annotated[float, Number(0, above=True, example="100.0")]
Decays = Annotated[Sequence[float], Betas()]
Globs = Annotated[Iterable[str], Names()]
Layers = Annotated[str | int | Sequence[int], BlockNumbers()]
MaskRule = Annotated[str, Choice("small", "large", "random", "none")]
Resample = Annotated[str, Choice("run", "step")]
ConstantTensors = Annotated[str, Choice("dense", "frozen")]
Scope = Annotated[str, Choice("global", "tensor")]
Place = Annotated[str, Text()]
Noise = Annotated[str, Choice("gaussian", "rademacher")]
SignOf = Annotated[str, Choice("elementwise", "scalar")]
YesNo = Annotated[bool, Choice(True, False)]
RoundingMode = Annotated[str, Choice("nearest", "stochastic")]
ExecutorName = Annotated[
    str, Choice("auto", "sequential", "lockstep", "in_place", "side_path", "batched")
]
Others = Annotated[str, Choice("frozen", "trained")]
WeightBits = Annotated[int, Sizes(8, 4)]
PerturbBits = Annotated[int, Sizes(8, 7, 6, 5, 4, 3, 2)]
KeepNoise = Annotated[bool | str, Choice("auto", True, False)]
