"""Define the types and ranges of settings, and the sentence on a value that is outside."""

import re
from dataclasses import dataclass
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.zo.ranges import Choice, Names, Number, SettingType, Whole, shown


@dataclass(frozen=True)
class Text:
    """Accept a string that matches a pattern as a whole."""

    pattern: str
    words: str
    example: str

    def __call__(self, value: object) -> str:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or not re.fullmatch(self.pattern, text):
            raise ValueError
        return text


class SomeNames(Names):
    """Accept a list of strings that is not empty."""

    words = "a list of names, at least one"
    example = "[q_proj,v_proj]"

    def __call__(self, value: object) -> list[str]:
        if not (names := super().__call__(value)):
            raise ValueError
        return names


class NamesOrName(Names):
    """Accept a list of strings, or one."""

    words = "a name or a list of names"
    example = "[a,b]"

    def __call__(self, value: object) -> list[str]:
        return super().__call__([value] if isinstance(value, str) else value)


class Pairs:
    """Accept a mapping of strings to strings."""

    words = "a mapping of names to names"
    example = "{text: sentence}"

    def __call__(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ValueError
        return {str(key): item for key, item in value.items()}


class Arguments:
    """Accept a mapping of names to any values."""

    words = "a mapping of names to values"
    example = "{hidden_size: 64}"

    def __call__(self, value: object) -> dict[str, object]:
        if not isinstance(value, dict):
            raise ValueError
        return {str(key): item for key, item in value.items()}


class DeviceMap:
    """Accept how accelerate is to choose GPUs for a model's layers, or the device of each module.

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


class Weights:
    """Accept a list of numbers above 0."""

    words = "a list of numbers above 0, one for each of task.parts"
    example = "[1,2]"

    def __call__(self, value: object) -> list[float]:
        if not isinstance(value, list) or not value:
            raise ValueError
        return [Number(0, above=True, example="1")(one) for one in value]


class Source:
    """Accept the name of the reader of the rows, and what that reader needs."""

    words = "a mapping that names its reader"
    example = "{reader: records}"

    def __call__(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or not isinstance(value.get("reader"), str):
            raise ValueError
        return value


class Template:
    """Accept a template of a prompt, or the number of one."""

    words = "a template in quotes, the number of a prompt of the task"
    example = '"{text} It was"'

    def __call__(self, value: object) -> str | int:
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError
        return value


class Node:
    """Accept a config group: a mapping with a name."""

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
    "prompt_rows",
    "model.bos_token",
    "model.compute_dtype",
    "model.config",
    "model.device_map",
    "model.path",
    "model.quantization",
    "model.revision",
    "task.num_train",
    "task.num_dev",
    "task.num_test",
    "task.num_per_class",
    "task.max_train_tokens",
    "task.weights",
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
}


@dataclass(frozen=True)
class Fixed:
    """Accept one value alone, where a method that takes no steps would ignore any other."""

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


def checked_value(
    key: str, value: object, type_: SettingType, may_be_null: bool | None = None
) -> Any:
    """Return a value in its own type, or raise UserError with what is allowed.

    Args:
        key: of the setting.
        value: as it was given.
        type_: what it has to be.
        may_be_null: None: if the key is in :data:`NULLABLE`.
    """
    may_be_null = key in NULLABLE if may_be_null is None else may_be_null
    if value is None and may_be_null and not isinstance(type_, Fixed):
        return None
    try:
        return type_(value)
    except ValueError:
        null = " or null" if may_be_null else ""
        got = shown(value)
        got = got if len(got) <= 200 else got[:197] + "..."
        raise UserError(
            f"{key}={got}: {key} must be {type_.words}{null}, for example {key}={type_.example}."
        ) from None
