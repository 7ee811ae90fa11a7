"""The settings of a run: types, ranges, and the digest that names the run.

Types and ranges live here, values and their meaning in conf/. No Hydra and no torch in this module.
"""

import hashlib
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from omegaconf import DictConfig, OmegaConf

from smezo_cli.errors import UserError, near, redacted_tree
from smezo_cli.files.bounded import check_expansion
from smezo_cli.kinds import METRICS
from smezo_cli.words import with_mappings

# In a wheel the files lie inside the package, in a checkout beside it.
_PACKAGED = Path(__file__).resolve().parent / "conf"
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parent.parent / "conf"

INSTALL_TENSORBOARD = "python -m pip install 'tensorboard>=2.18,<3'"  # as in pyproject.toml
# Top-level settings that a method has or has not.
KNOBS = ("lr", "eps", "sparsity")
# Cannot change a result, hence not part of a run's digest.
_NOT_IN_DIGEST = (
    *("name", "runs_dir", "logger", "if_exists", "compile", "hydra", "full_save_every"),
    *("micro_batch_size", "query_ranks", "rank_backend"),
)
_NOT_IN_DIGEST_OF_MODEL = ("device_map",)
# Came later; this value is what runs did before there was such a key, and they keep their digest.
LATER = {
    **dict.fromkeys(("stop_if_diverged", "patience", "clip_projected_grad", "num_per_class")),
    "quoting": None,
    "quantization": None,
    "objective": "loss",
    "zero_shot": True,
    "batch_order": "shuffled",
    "sfc": False,
    "sfc_prompt": None,
}
FULL_SAVE_EVERY = 500  # as conf/train.yaml has it
_LATER_AND_OF_A_MACHINE = {"micro_batch_size": None, "query_ranks": 1, "rank_backend": "gloo"} | {
    "full_save_every": FULL_SAVE_EVERY
}


def shown(value: object) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


class Rule(Protocol):
    """What a value must be."""

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
    """How rows are read: by whom, and what that reader needs."""

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


_COUNT = Whole(1, example="16")
_FILE = Text(r"(?s).+", "the path of a file", "my.csv")
_WORD = Text(r"(?s).+", "a name", "label")
_DEVICE = Text(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N", "cpu")
_DTYPE = Choice("float32", "bfloat16", "float16")
_FOLDER_NAME = Text(
    r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "a folder name of letters, digits, dots, - and _, its first a letter or a digit",
    "default",
)
_SEED = Whole(0, 2**63, example="0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The checked settings of one run; conf/train.yaml and conf/method/ say what they mean.

    `lr`, `eps` and `sparsity` are the knobs of the chosen method: None where it has none.
    """

    seed: Annotated[int, _SEED]
    data_seed: Annotated[int, _SEED]
    steps: Annotated[int, Whole(1, example="150")]
    batch_size: Annotated[int, _COUNT]
    eval_every: Annotated[int, Whole(1, example="50")]  # null has become a tenth of the steps
    stop_if_diverged: Annotated[float | None, Number(1, above=True, example="2.0")]
    patience: Annotated[int | None, Whole(1, example="5")]
    micro_batch_size: Annotated[int | None, _COUNT]
    query_ranks: Annotated[int, Whole(1, example="2")]
    rank_backend: Annotated[str, Choice("gloo", "nccl")]
    batch_order: Annotated[str, Choice("shuffled", "stratified")]
    lr_schedule: Annotated[str, Choice("constant", "linear", "cosine")]
    warmup_steps: Annotated[int, Whole(0, example="0")]
    keep: Annotated[str, Choice("best", "last", "all")]
    zero_shot: Annotated[bool, Choice(True, False)]
    full_save_every: Annotated[int, Whole(1, example="500")]
    device: Annotated[str, _DEVICE]
    dtype: Annotated[str, _DTYPE]
    compute_dtype: Annotated[str | None, _DTYPE]
    compile: Annotated[str | bool, Choice("auto", True, False)]
    name: Annotated[str, _FOLDER_NAME]
    runs_dir: Annotated[str, Text(r"(?s).+", "the path of a folder", "runs")]
    if_exists: Annotated[str, Choice("resume", "error", "fresh")]
    task: Annotated[dict[str, Any], Node()]
    model: Annotated[dict[str, Any], Node()]
    method: Annotated[dict[str, Any], Node()]
    logger: Annotated[dict[str, Any], Node()]
    lr: Annotated[float | None, Number(0, above=True, example="1e-4")] = None
    eps: Annotated[float | None, Number(0, above=True, example="1e-3")] = None
    sparsity: Annotated[float | None, Number(0, 1, example="0.75")] = None


_SETTINGS: dict[str, Rule] = {
    key: hint.__metadata__[0]
    for key, hint in typing.get_type_hints(Settings, include_extras=True).items()
}
# Settings inside the groups, checked where they are present.
_NODE_RULES: dict[str, Rule] = {
    # Names of run folders are made of these.
    "task.name": _FOLDER_NAME,
    "model.name": _FOLDER_NAME,
    "method.name": _FOLDER_NAME,
    "task.num_train": _COUNT,
    "task.num_dev": _COUNT,
    "task.num_test": _COUNT,
    "task.num_per_class": _COUNT,
    "task.max_train_tokens": _COUNT,
    "task.max_new_tokens": _COUNT,
    "model.path": Text(r"(?s).+", "a folder, a GGUF file or a hub id", "facebook/opt-125m"),
    "model.revision": Text(r"\S+", "a branch, a tag or a commit", "main"),
    "model.bos_token": Text(r"(?s).+", "a token", "'<s>'"),
    "model.family": Choice("causal", "masked"),
    "model.trust_remote_code": Choice(True, False),
    "model.quantization": Text("4bit", "4bit", "4bit"),
    "model.device_map": DeviceMap(),
    "model.dtype": _DTYPE,
    "model.compute_dtype": _DTYPE,
    "model.attention": Choice(
        *("auto", "sdpa", "eager"), *("flash_attention_2", "flash_attention_3", "flex_attention")
    ),
    "task.kind": Choice("classification", "choice", "generation"),
    "task.source": Source(),
    "task.test_from": Choice("test", "train"),
    "task.prompt": Template(),
    "task.option_template": Text(r"(?s).+", "a template in quotes", '"{option}"'),
    "task.sfc": Choice(True, False),
    "task.sfc_prompt": Text(r"(?s).*", "a template in quotes, which may be empty", '"It was"'),
    "task.data_dir": Text(r"(?s).+", "the path of a folder", "PATH"),
    "task.data": Text(r"(?s).+", "the path of a file or the id of a data set", "my.csv"),
    "task.test_data": _FILE,
    "task.columns": Pairs(),
    "task.quoting": Choice("minimal", "none"),
    "task.label": _WORD,
    "task.answer": _WORD,
    "task.options": NamesOrName(),
    "task.data_name": _WORD,
    "task.revision": _WORD,
    "task.splits": Pairs(),
    "model.max_length": Whole(8, example="2048"),
    "method.num_queries": _COUNT,
    "method.weight_decay": Number(0, example="0.0"),
    "method.clip_projected_grad": Number(0, above=True, example="100.0"),
    "method.objective": Choice("loss", "accuracy", "f1"),
    "method.betas": Betas(),
    "method.adam_eps": Number(0, above=True, example="1e-8"),
    "method.mask": Choice("small", "large", "random", "none"),
    "method.mask_refresh_every": Whole(0, example="0"),
    "method.mask_resample": Choice("run", "step"),
    "method.constant_tensors": Choice("dense", "frozen"),
    "method.noise": Choice("gaussian", "rademacher"),
    "method.rounding": Choice("nearest", "stochastic"),
    "method.executor": Choice("auto", "sequential", "lockstep", "in_place"),
    "method.keep_noise": Choice("auto", True, False),
    "method.num_demonstrations": Whole(1, example="32"),
    "method.l2": Number(0, above=True, example="1.0"),
    "method.max_grad_norm": Number(0, above=True, example="1.0"),
    "method.freeze": Names(),
    "method.dense": Names(),
    "logger.mode": Choice("offline", "online"),
}
# What the groups that build() does not see take: keys without which nothing goes, and the others
# with the value that leaving them out means.
_NODE_KEYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "model": (
        ("name",),
        {"package": None, "path": None, "tiny": None, "revision": None, "family": "causal"}
        | {"config": None, "bos_token": None, "dtype": "float32", "compute_dtype": None}
        | {"attention": "auto", "max_length": 2048, "trust_remote_code": False}
        | {"quantization": None, "device_map": None},
    ),
    "logger": (
        ("name",),
        {"mode": "offline", "project": "smezo", "entity": None, "tags": []},
    ),
}
_TASK_KEYS = {"prompt": None, "num_train": None, "num_dev": None, "num_test": None} | {
    "max_train_tokens": None,
}
_SFC_KEYS: dict[str, Any] = {"sfc": False, "sfc_prompt": None}
_TASK_KEYS_OF_KIND: dict[str, dict[str, Any]] = {
    "classification": {"labels": None, "num_per_class": None} | _SFC_KEYS,
    "choice": {"option_template": None} | _SFC_KEYS,
    "generation": {"max_new_tokens": 50},
}
# Of a task with data of its own, and of one for the user's data.
_SOURCE_KEYS: dict[str, Any] = {"data_dir": None, "masked": [], "test_from": "test"}
_DATA_KEYS: dict[str, Any] = {"test_data": None, "columns": None, "quoting": None} | {
    "data_name": None,
    "revision": None,
    "splits": None,
}
_DATA_KEYS_OF_KIND = {
    # needed beside data and prompt, and optional
    "classification": (("labels",), {"label": "label"}),
    "choice": (("options",), {"label": "label"}),
    "generation": ((), {"answer": "answer"}),
}
_DATA_EXAMPLES = {
    "data": "task.data=my.csv (.csv, .tsv, .jsonl, .json, .parquet, or the id of a data set)",
    "prompt": "'task.prompt=\"{text} It was\"', with columns of your data in braces",
    "labels": "'task.labels={0: terrible, 1: great}', a word for each value of the label column",
    "options": "task.options=[a,b], the columns of the options or one that holds a list",
}
# What these are for methods that take no steps; another value would be ignored.
WITHOUT_STEPS: dict[str, object] = {
    **{"steps": 0, "batch_size": 0, "eval_every": None, "lr_schedule": "constant"},
    **{"warmup_steps": 0, "stop_if_diverged": None, "patience": None, "keep": "best"},
    "zero_shot": True,
    "micro_batch_size": None,
    "batch_order": "shuffled",
    "full_save_every": FULL_SAVE_EVERY,
}
# What each kind of `method.adapter` takes, all of it needed.
_ADAPTER_KINDS = Choice("lora", "prefix")
_ADAPTER_KEYS: dict[str, dict[str, Rule]] = {
    "lora": {
        "r": Whole(1, example="8"),
        "alpha": Number(0, above=True, example="16"),
        "targets": SomeNames(),
    },
    "prefix": {"num_tokens": Whole(1, example="5")},
}
# null is a value of these ("not limited", "the default").
_NULLABLE = {
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


def check(cfg: DictConfig) -> Settings:
    """Check types, ranges and that no setting would be ignored.

    Raises:
        UserError: naming the key, what was got, what is allowed and an example.
    """
    values = plain(cfg)  # before the next line, which stumbles over a bad interpolation
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} is needed: add {missing[0]}=VALUE.")
    for key in values:
        if key not in _SETTINGS:
            raise UserError(f"there is no setting {key}{near(key, _SETTINGS)}.")
    checked = {
        key: _checked(key, values.get(key), rule)
        for key, rule in _rules_for(values.get("method")).items()
        if key in values or key not in KNOBS
    }
    keys = {"task": _task_keys(checked["task"])} | _NODE_KEYS
    for group, (needed, optional) in keys.items():
        node = checked[group]
        for name in needed:
            if node.get(name) is None:
                own = "data" in needed
                raise UserError(
                    f"{group}.{name} is needed by {group}={node['kind' if own else 'name']}: add "
                    f"{_DATA_EXAMPLES[name] if own else 'it there'}."
                )
        for name in node:
            if name not in needed and name not in optional:
                raise UserError(f"there is no {group}.{name}{near(name, {*needed, *optional})}.")
        checked[group] = optional | node
    for key, rule in _NODE_RULES.items():
        group, _, name = key.partition(".")
        if name in checked[group]:
            checked[group][name] = _checked(key, checked[group][name], rule)
    for name in ("prompt", "prompts", "labels", "option_template", "sfc_prompt"):
        text = checked["task"].get(name)
        if text is not None and redacted_tree(text) != text:
            raise UserError(
                f"task.{name} holds a secret (a login, or the value of an environment variable "
                "that is named like one), and prompts are stored with the run: take it out."
            )
    _check_paths(checked)
    _check_targets(checked["method"], "method")
    _check_counts(checked["task"])
    _check_sfc(checked["task"], checked["model"], checked["method"])
    _check_method(checked["method"], {knob: checked[knob] for knob in KNOBS if knob in checked})
    _check_objective(checked["method"].get("objective", "loss"), checked["task"])
    if "adapter" in checked["method"]:
        checked["method"]["adapter"] = _checked_adapter(checked["method"]["adapter"])
    _check_quantization(checked["model"], checked["method"], checked["device"])
    _check_device_map(checked["model"], checked["device"])
    if checked["compute_dtype"] == "float32" != checked["dtype"]:
        raise UserError(
            f"compute_dtype=float32 beside dtype={checked['dtype']}: products are computed in the "
            "weights' precision or a lower one; add dtype=float32, or leave compute_dtype out."
        )
    if is_frozen(checked["method"]):
        if checked["model"]["family"] == "masked" and "num_demonstrations" in checked["method"]:
            raise UserError(
                f"model={checked['model']['name']} fills masks, and method "
                f"{checked['method']['name']} is for models that go on from demonstrations: "
                "choose a causal model, or method=zero_shot."
            )
        if "l2" in checked["method"] and checked["task"]["kind"] != "classification":
            raise UserError(
                f"task={checked['task']['name']} is of kind {checked['task']['kind']}, and method "
                f"{checked['method']['name']} tells classes apart: choose a task of kind "
                "classification, or method=zero_shot."
            )
        return Settings(**checked | {"eval_every": 1})
    if checked["batch_order"] == "stratified" and checked["task"]["kind"] != "classification":
        raise UserError(
            f"batch_order=stratified gives a batch its share of each class, and "
            f"task={checked['task']['name']} is of kind {checked['task']['kind']}: leave it out."
        )
    if checked["full_save_every"] != FULL_SAVE_EVERY and "eps" not in checked["method"]:
        raise UserError(
            f"full_save_every={checked['full_save_every']}: {checked['method']['name']} is no "
            "zeroth-order method, whose steps are recorded: it saves its weights at each look, and "
            "full_save_every would be ignored: leave it out, and set eval_every."
        )
    if checked["warmup_steps"] >= checked["steps"]:
        raise UserError(
            f"warmup_steps={checked['warmup_steps']} leaves nothing of steps={checked['steps']}: "
            "set it below the steps."
        )
    if checked["eval_every"] is None:
        checked["eval_every"] = math.ceil(checked["steps"] / 10)
    looks = math.ceil(checked["steps"] / checked["eval_every"])
    if checked["patience"] is not None and checked["patience"] + 1 >= looks:
        raise UserError(
            f"patience={checked['patience']} cannot end a run of {looks} looks early (the first is "
            "always the lowest so far): lower patience or eval_every."
        )
    return Settings(**checked)


def check_spelling(key: str, text: str, value: object) -> None:
    """Refuse text that Hydra reads as something else, such as name=nan or model.revision=1e5.

    Args:
        key: of the setting.
        text: as it was written on the command line.
        value: what Hydra read.

    Raises:
        UserError: naming the text, and how it is written.
    """
    rule = (_SETTINGS | _NODE_RULES).get(key)
    text = text.strip()
    if not isinstance(rule, Text) or not re.fullmatch(rule.pattern, text):
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (is_number and str(value) != text) or isinstance(value, bool):
        what = f"the {'number' if is_number else 'truth value'} {shown(value)}"
    elif value is None and key not in _NULLABLE:
        what = "no value"
    elif isinstance(value, float):
        what = "a number"
    else:
        return
    raise UserError(
        f"{key}={text}: {text} is read as {what}, and {key} must be {rule.words}: leave it out, or "
        f"write \"{key}='{text}'\", with both kinds of quotes."
    )


def _check_paths(checked: Mapping[str, Any]) -> None:
    """Refuse a secret in what paths are made of: they are printed and stored, but secrets not."""
    parts = {key: checked[key] for key in ("name", "runs_dir")}
    parts |= {f"{group}.name": checked[group]["name"] for group in ("task", "model", "method")}
    for key, value in parts.items():
        if redacted_tree(value) != value:
            raise UserError(
                f"{key}={value} holds a secret (a login, or the value of an environment variable "
                f"that is named like one), and the paths of a run are printed and stored: choose "
                f"another {key}, or unset that variable."
            )


def check_target(node: Mapping[str, Any], key: str) -> str:
    """The `_target_` of a node where it has the form of an allowed one; nothing is imported.

    Raises:
        UserError: it has not.
    """
    name = node.get("_target_")
    if not isinstance(name, str) or not re.fullmatch(_TARGET, name):
        raise UserError(
            f"{key}._target_={shown(name)} is not allowed: it must be a class of "
            "smezo_cli.methods.* or an optimizer of torch.optim.*."
        )
    return name


def is_frozen(method: object) -> bool:
    """Is it the node of a method that takes no steps and leaves the model as it is?"""
    target = method.get("_target_") if isinstance(method, Mapping) else None
    return isinstance(target, str) and target.startswith("smezo_cli.methods.frozen.")


@dataclass(frozen=True)
class _Fixed:
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


def _rules_for(method: object) -> dict[str, Rule]:
    if not isinstance(method, Mapping) or not is_frozen(method):
        return _SETTINGS
    name = method.get("name")
    return _SETTINGS | {key: _Fixed(key, v, name) for key, v in WITHOUT_STEPS.items()}


# A class, or a class in a module; a longer walk would lead into what a module has imported.
_TARGET = r"(smezo_cli\.methods|torch\.optim)\.([a-z][a-z_]*\.)?[A-Za-z]\w*"


def _check_targets(node: object, key: str) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node or key == "method":
            check_target(node, key)
        for name, value in node.items():
            _check_targets(value, f"{key}.{name}")
    elif isinstance(node, list):
        for value in node:
            _check_targets(value, key)


def _task_keys(task: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The keys that a task node needs, and the others with what leaving them out means."""
    kind = _checked("task.kind", task.get("kind"), _NODE_RULES["task.kind"])
    optional = _TASK_KEYS | _TASK_KEYS_OF_KIND[kind]
    if "source" in task or "data" not in task:
        for name in ("data", "test_data", "columns"):
            if task.get(name):
                raise UserError(
                    f"task.{name} is for data of your own, and task={task['name']} brings its "
                    "data: choose task=classification, choice or generation, or leave it out."
                )
        return ("name", "kind", "source", "prompts"), optional | _SOURCE_KEYS
    needed, more = _DATA_KEYS_OF_KIND[kind]
    return ("name", "kind", "data", "prompt", *needed), optional | _DATA_KEYS | more


def _data_name(data: object, default: str) -> str:
    """A name for a task on the user's data, fit for a folder: reviews of some/Reviews.csv."""
    stem = Path(str(data or default)).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-") or default


OmegaConf.register_new_resolver("data_name", _data_name, replace=True)


def _checked(key: str, value: object, rule: Rule) -> Any:
    if value is None and key in _NULLABLE and not isinstance(rule, _Fixed):
        return None
    try:
        return rule(value)
    except ValueError:
        null = " or null" if key in _NULLABLE else ""
        got = shown(value)
        got = got if len(got) <= 200 else got[:197] + "..."
        raise UserError(
            f"{key}={got}: {key} must be {rule.words}{null}, for example {key}={rule.example}."
        ) from None


def _check_counts(task: Mapping[str, Any]) -> None:
    """Refuse counts that others leave nothing to do."""
    idle = [f"task.{key}" for key in ("num_train", "num_dev") if task[key] is not None]
    if task.get("num_per_class") is not None and idle:
        also = " and ".join(f"{key}={task[key.removeprefix('task.')]}" for key in idle)
        raise UserError(
            f"task.num_per_class={task['num_per_class']} takes as many rows of each class for "
            f"train and again for dev, so {also} would be ignored: add "
            f"{' '.join(f'{key}=null' for key in idle)}, or task.num_per_class=null."
        )


def _check_sfc(
    task: Mapping[str, Any], model: Mapping[str, Any], method: Mapping[str, Any]
) -> None:
    """Refuse a calibration that would be ignored, or whose domain-conditional prompt is unknown."""
    given = task.get("sfc_prompt")
    if not task.get("sfc"):
        if given is not None:
            raise UserError(
                f"task.sfc_prompt={given!r} is the prompt of task.sfc=true, without which it would "
                "be ignored: add task.sfc=true, or leave it out."
            )
        return
    if "l2" in method:
        raise UserError(
            f"task.sfc=true: method {method['name']} scores no label words that could be "
            "calibrated: leave task.sfc out."
        )
    masked = model["family"] == "masked"
    if given is not None:
        if masked != bool(re.search(r"\{mask\b", given)):
            raise UserError(
                f"task.sfc_prompt={given!r}: model={model['name']} "
                + ("fills masks: give a template with" if masked else "fills no masks: leave out")
                + " its place, {mask}."
            )
        return
    prompt, nodes = task["prompt"], task.get("masked" if masked else "prompts") or []
    if isinstance(prompt, int) and not masked:
        nodes = nodes[prompt : prompt + 1] if prompt >= 0 else []
    known = [isinstance(node, Mapping) and node.get("sfc") is not None for node in nodes]
    if isinstance(prompt, str) or not known or not all(known):
        raise UserError(
            "task.sfc=true: no domain-conditional prompt is known for this prompt of task "
            f"{task['name']} (for causal models {', '.join(_tasks_with_sfc())} have one): give it "
            "by task.sfc_prompt=TEMPLATE, which may be empty, or leave task.sfc out."
        )


def _tasks_with_sfc() -> list[str]:
    """Names of our tasks of which a prompt has a domain-conditional one."""
    files = sorted((CONF_DIR / "task").glob("*.yaml"))
    loaded = {file.stem: _load_yaml(file) for file in files}
    return [
        name
        for name, cfg in loaded.items()
        if any("sfc" in node for node in OmegaConf.select(cfg, "prompts") or ())
    ]


def _check_method(method: Mapping[str, Any], knobs: Mapping[str, float]) -> None:
    """Refuse what the method would ignore or contradict."""
    for knob, value in knobs.items():
        used = list(_values_of(method, knob))
        if not used:
            raise UserError(lacks(knob, method["name"], _methods_with(knob)))
        for other in used:
            if other != value:
                raise UserError(
                    f"method has {knob}={shown(other)} beside {knob}={value:g}: "
                    f"set {knob}=VALUE at the top level alone."
                )
    mask = method.get("mask")
    if mask == "none" and knobs.get("sparsity"):
        raise UserError(
            f"method.mask=none perturbs every weight, so sparsity={knobs['sparsity']:g} would be "
            "ignored: add sparsity=0, or choose method.mask=small, large or random."
        )
    if mask is not None and mask != "random" and method.get("mask_resample") == "step":
        raise UserError(
            f"method.mask_resample=step is for method.mask=random, the mask is {mask}: add "
            "method.mask=random, or leave mask_resample out."
        )
    if mask in ("random", "none") and method.get("mask_refresh_every"):
        raise UserError(
            f"method.mask_refresh_every={method['mask_refresh_every']} renews the thresholds of "
            f"method.mask=small or large, and method.mask={mask} has none: set it to 0."
        )


def _check_quantization(model: Mapping[str, Any], method: Mapping[str, Any], device: str) -> None:
    """Refuse 4-bit weights that would be trained, or that cannot be had."""
    if model["quantization"] is None:
        return
    out = "or leave model.quantization out"
    if (method.get("adapter") or {}).get("kind") != "lora":
        raise UserError(
            f"model.quantization=4bit is for a model that stays frozen beside LoRA, and method is "
            f"{method['name']}: choose method=lora, mezo_lora or sparse_mezo_lora, {out}."
        )
    if device == "cpu":
        raise UserError(
            f"model.quantization=4bit needs CUDA, and device=cpu: choose device=cuda, {out}."
        )
    if model["tiny"] is not None or str(model["path"]).lower().endswith(".gguf"):
        raise UserError(
            f"model.quantization=4bit quantises weights as safetensors hold them, and model="
            f"{model['name']} is {'random' if model['tiny'] is not None else 'a GGUF file'}: give "
            f"model.path=FOLDER, {out}."
        )


def _check_device_map(model: Mapping[str, Any], device: str) -> None:
    """Refuse weights outside GPUs, and what a map would contradict."""
    device_map = model["device_map"]
    if device_map is None:
        return
    if device != "auto":
        raise UserError(
            f"device={device} beside model.device_map, which says where the model lies: leave out "
            "one of them (device=auto goes with a map; model.device_map=null is none)."
        )
    if model["quantization"] is not None:
        raise UserError(
            f"model.device_map beside model.quantization={model['quantization']}: 4-bit weights "
            "lie on one GPU so far; leave out one of them."
        )
    if isinstance(device_map, str) or set(device_map.values()) == {"cpu"}:
        return
    outside = [name for name, place in device_map.items() if place in ("cpu", "disk")]
    if outside:
        named = ", ".join(repr(name) for name in outside[:3]) + ", ..." * (len(outside) > 3)
        raise UserError(
            f"model.device_map has {named} on {device_map[outside[0]]}: weights outside GPUs "
            "(offload) cannot be trained so far; give every module the number of a GPU, or spread "
            "the model by model.device_map=auto."
        )


def _check_objective(objective: str, task: Mapping[str, Any]) -> None:
    """Refuse an objective that the rows of the task have no figure for."""
    metric = METRICS[task["kind"]]
    if objective not in ("loss", metric):
        raise UserError(
            f"method.objective={objective}: task {task['name']} is of kind {task['kind']}, whose "
            f"figure is {metric}: add method.objective={metric}, or leave it out."
        )


def _checked_adapter(node: object) -> dict[str, Any]:
    """The node of an adapter with its values in their own types."""
    if not isinstance(node, Mapping):
        raise UserError(
            f"method.adapter={shown(node)}: it must be a mapping with a kind; a method without an "
            "adapter is chosen by its name, such as method=mezo."
        )
    kind = _checked("method.adapter.kind", node.get("kind"), _ADAPTER_KINDS)
    rules = _ADAPTER_KEYS[kind]
    for name in node:
        if name != "kind" and name not in rules:
            raise UserError(f"there is no method.adapter.{name} of kind {kind}{near(name, rules)}.")
    values = {n: _checked(f"method.adapter.{n}", node.get(n), rule) for n, rule in rules.items()}
    return {"kind": kind} | values


def _values_of(node: object, name: str) -> Iterator[object]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == name:
                yield value
            yield from _values_of(value, name)


def _methods_with(knob: str) -> list[str]:
    """Names of our methods that have a top-level knob."""
    files = sorted((CONF_DIR / "method").glob("*.yaml"))
    loaded = {file.stem: _load_yaml(file) for file in files}
    # Those with an adapter are variants of the others, and would make the line long.
    return [name for name, cfg in loaded.items() if knob in cfg and not _is_variant(cfg)]


def _is_variant(cfg: DictConfig) -> bool:
    return OmegaConf.select(cfg, "method.adapter") is not None


def _load_yaml(file: Path) -> DictConfig:
    loaded = OmegaConf.load(file)
    return loaded if isinstance(loaded, DictConfig) else OmegaConf.create({})


def lacks(key: str, method: object, others: Sequence[str]) -> str:
    """Say that the method has no such setting, and which methods have."""
    have = "has" if len(others) == 1 else "have"
    return f"method {method} has no {key}" + (
        f"; {', '.join(others)} {have}: add method={others[-1]}, or leave {key} out."
        if others
        else f": leave {key} out."
    )


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Containers of plain Python with interpolations resolved."""
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    try:
        check_expansion(typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False)))
        values = OmegaConf.to_container(cfg, resolve=True)
    except UserError:
        raise
    except Exception as error:  # OmegaConf's own, and what its parser and resolvers let through
        raise UserError(sentence(error)) from error
    found = typing.cast(dict[str, Any], values)
    with_mappings(found)
    return found


def is_extensible(lr_schedule: object) -> bool:
    """May a finished run go on to more steps? Only where its lr did not depend on their number."""
    return lr_schedule == "constant"


def digest(cfg: DictConfig | Mapping[str, Any]) -> str:
    """Eight hex digits of the resolved settings, less those that cannot change a result.

    A run that can be extended keeps its name when ``steps`` grows.
    """
    values = without_later_keys(
        {key: value for key, value in plain(cfg).items() if key not in _NOT_IN_DIGEST}
    )
    if is_extensible(values.get("lr_schedule")):
        values.pop("steps", None)
    if isinstance(model := values.get("model"), Mapping):
        values["model"] = {k: v for k, v in model.items() if k not in _NOT_IN_DIGEST_OF_MODEL}
        if model.get("attention") == "auto":  # what runs did before there was this value
            values["model"]["attention"] = "sdpa"
    if isinstance(task := values.get("task"), Mapping) and task.get("quoting") == "minimal":
        values["task"] = {k: v for k, v in task.items() if k != "quoting"}  # as without it
    if values.get("keep") == "all":
        values["keep"] = "best"  # the test is on the same weights
    text = json.dumps(_canonical(values), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def without_later_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings less those that came later and say what runs did before: equal for equal runs."""
    kept = {
        key: without_later_keys(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in LATER or value != LATER[key]
    }
    if isinstance(prompts := values.get("prompts"), list) and not values.get("sfc"):
        # Of a task without calibration nothing asks for these.
        kept["prompts"] = [
            {key: value for key, value in node.items() if key != "sfc"}
            if isinstance(node, Mapping)
            else node
            for node in prompts
        ]
    return kept


def with_later_keys(cfg: DictConfig) -> None:
    """Give the settings of a run that is there what they lack because it came after the run.

    And take from them what is refused for its method now, but was ignored then.
    """
    for key, value in (LATER | _LATER_AND_OF_A_MACHINE).items():
        if key in _SETTINGS and key not in cfg:
            cfg[key] = value
    if isinstance(task := cfg.get("task"), DictConfig) and "data" in task and "quoting" not in task:
        task.quoting = LATER["quoting"]
    if isinstance(method := cfg.get("method"), DictConfig) and "eps" not in method:
        cfg.full_save_every = FULL_SAVE_EVERY


def _canonical(value: object) -> object:
    """1 and 1.0 are one value; the keys of a mapping are strings."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def sentence(error: BaseException) -> str:
    """The first lines of an error of Hydra or OmegaConf as one sentence."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("See http")]
    return "; ".join(dict.fromkeys(lines[:3])) or type(error).__name__
