"""The types and ranges of settings, and the sentence on a value that is outside."""

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

from smezo_cli.errors import UserError


def shown(value: object) -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


class SettingType(Protocol):
    """The type of a setting: its range, and the words for it."""

    @property
    def words(self) -> str:
        """Ends the sentence "KEY must be ..."."""

    @property
    def example(self) -> str:
        """A value that is allowed."""

    def __call__(self, value: object) -> object:
        """Return the value in its own type, or raise ValueError."""


@dataclass(frozen=True)
class Whole:
    """A whole number of at least `low` and below `end`; 2e4 counts as one."""

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
        if not self.low <= value < self.end:
            raise ValueError
        return int(value)


@dataclass(frozen=True)
class Number:
    """A finite number between two bounds; `above` leaves the lower one out, the upper is out."""

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
        return float(value)


class Choice:
    """One of a few words; `true` and `false` among them are booleans."""

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


@dataclass(frozen=True)
class Text:
    """A string that matches a pattern as a whole."""

    pattern: str
    words: str
    example: str

    def __call__(self, value: object) -> str:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or not re.fullmatch(self.pattern, text):
            raise ValueError
        return text


class Betas:
    """The two decays of Adam."""

    words = "a list of two numbers in [0, 1)"
    example = "[0.9,0.999]"

    def __call__(self, value: object) -> list[float]:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError
        return [Number(0, 1)(item) for item in value]


class Names:
    """A list of strings."""

    words = 'a list of strings, such as ["*embed_tokens*"]'
    example = "[]"

    def __call__(self, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError
        return value


class SomeNames(Names):
    """A list of strings that is not empty."""

    words = "a list of names, at least one"
    example = "[q_proj,v_proj]"

    def __call__(self, value: object) -> list[str]:
        if not (names := super().__call__(value)):
            raise ValueError
        return names


class NamesOrName(Names):
    """A list of strings, or one."""

    words = "a name or a list of names"
    example = "[a,b]"

    def __call__(self, value: object) -> list[str]:
        return super().__call__([value] if isinstance(value, str) else value)


class Pairs:
    """A mapping of strings to strings."""

    words = "a mapping of names to names"
    example = "{text: sentence}"

    def __call__(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ValueError
        return {str(key): item for key, item in value.items()}


class DeviceMap:
    """How accelerate is to choose GPUs for the layers of a model, or the device of each module.

    Devices are returned as "cuda:N", "cpu" or "disk"; which of them can be had is said elsewhere.
    """

    ways = ("auto", "balanced", "balanced_low_0", "sequential")
    words = f"{', '.join(ways)} or a mapping of module names to the numbers of GPUs"
    example = "auto"

    def __call__(self, value: object) -> str | dict[str, str]:
        if isinstance(value, str) and value in self.ways:
            return value
        if not isinstance(value, dict) or not value:
            raise ValueError
        return {str(name): self._device(device) for name, device in value.items()}

    @staticmethod
    def _device(value: object) -> str:
        text = str(value) if not isinstance(value, bool) else ""
        if text in ("cpu", "disk"):
            return text
        if not (found := re.fullmatch(r"(?:cuda:)?(\d{1,3})", text)):
            raise ValueError
        return f"cuda:{int(found[1])}"


class Source:
    """The name of the reader of the rows, and what that reader needs."""

    words = "a mapping that names its reader"
    example = "{reader: records}"

    def __call__(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or not isinstance(value.get("reader"), str):
            raise ValueError
        return value


class Template:
    """A template of a prompt, or the number of one."""

    words = "a template in quotes, the number of a prompt of the task"
    example = '"{text} It was"'

    def __call__(self, value: object) -> str | int:
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError
        return value


class Node:
    """A config group: a mapping with a name."""

    words = "a group choice, a mapping with a name"
    example = "NAME"

    def __call__(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError
        return value


COUNT = Whole(1, example="16")

FILE = Text(r"(?s).+", "the path of a file", "my.csv")

WORD = Text(r"(?s).+", "a name", "label")

DEVICE = Text(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N", "cpu")

DTYPE = Choice("float32", "bfloat16", "float16")

FOLDER_NAME = Text(
    r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "a folder name of letters, digits, dots, - and _, its first a letter or a digit",
    "default",
)

SEED = Whole(0, 2**63, example="0")

# null is a value of these ("not limited", "the default").
NULLABLE = {
    "eval_every",
    "stop_if_diverged",
    "patience",
    "compute_dtype",
    "micro_batch_size",
    "model.bos_token",
    "model.compute_dtype",
    "model.device_map",
    "model.path",
    "model.quantization",
    "model.revision",
    "task.num_train",
    "task.num_dev",
    "task.num_test",
    "task.num_per_class",
    "task.max_train_tokens",
    "task.prompt",
    "task.option_template",
    "task.sfc_prompt",
    "task.data_dir",
    "task.test_data",
    "task.columns",
    "task.quoting",
    "task.splits",
    "task.data_name",
    "task.revision",
    "method.max_grad_norm",
    "method.clip_projected_grad",
}


@dataclass(frozen=True)
class Fixed:
    """A value that a method which takes no steps would ignore: this one alone."""

    key: str
    value: object
    method: object

    words = example = ""  # its message is its own

    def __call__(self, value: object) -> object:
        if value != self.value:
            raise UserError(
                f"{self.key}={shown(value)}: method {self.method} takes no training steps, and "
                f"{self.key} would be ignored: leave it out."
            )
        return value


def checked_value(key: str, value: object, type_: SettingType) -> Any:
    """Return a value in its own type, or raise UserError with what is allowed."""
    if value is None and key in NULLABLE and not isinstance(type_, Fixed):
        return None
    try:
        return type_(value)
    except ValueError:
        null = " or null" if key in NULLABLE else ""
        got = shown(value)
        got = got if len(got) <= 200 else got[:197] + "..."
        raise UserError(
            f"{key}={got}: {key} must be {type_.words}{null}, for example {key}={type_.example}."
        ) from None
