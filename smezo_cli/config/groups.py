"""Define the keys of each config group, and their types."""

from collections.abc import Mapping
from typing import Any

from smezo_cli.config.peft_fields import checked_peft, kinds
from smezo_cli.config.types import (
    COUNT,
    DTYPE,
    FILE,
    FOLDER_NAME,
    WORD,
    Arguments,
    DeviceMap,
    NamesOrName,
    Pairs,
    SomeNames,
    Source,
    Template,
    Text,
    Weights,
    checked_value,
)
from smezo_cli.errors import UserError, near
from smezo_cli.kinds import MIXTURE
from smezo_cli.zo.ranges import Choice, Number, SettingType, Whole, shown

# Settings inside the groups, checked where they are present.
GROUP_TYPES: dict[str, SettingType] = {
    # Names of run folders are made of these.
    "task.name": FOLDER_NAME,
    "model.name": FOLDER_NAME,
    "method.name": FOLDER_NAME,
    "task.num_train": COUNT,
    "task.num_dev": COUNT,
    "task.num_test": COUNT,
    "task.num_per_class": COUNT,
    "task.max_train_tokens": COUNT,
    "task.max_new_tokens": COUNT,
    "model.path": Text(r"(?s).+", "a folder, a GGUF file or a hub id", "facebook/opt-125m"),
    "model.revision": Text(r"\S+", "a branch, a tag or a commit", "main"),
    "model.bos_token": Text(r"(?s).+", "a token", "'<s>'"),
    "model.family": Choice("causal", "masked"),
    "model.trust_remote_code": Choice(True, False),
    "model.quantization": Text("4bit", "4bit", "4bit"),
    "model.device_map": DeviceMap(),
    "model.dtype": DTYPE,
    "model.compute_dtype": DTYPE,
    "model.attention": Choice(
        *("auto", "sdpa", "eager"), *("flash_attention_2", "flash_attention_3", "flex_attention")
    ),
    "task.kind": Choice("classification", "choice", "generation", MIXTURE),
    "task.weights": Weights(),
    "task.source": Source(),
    "task.test_from": Choice("test", "train"),
    "task.prompt": Template(),
    "task.option_template": Text(r"(?s).+", "a template in quotes", '"{option}"'),
    "task.sfc": Choice(True, False),
    "task.sfc_prompt": Text(r"(?s).*", "a template in quotes, which may be empty", '"It was"'),
    "task.data_dir": Text(r"(?s).+", "the path of a folder", "PATH"),
    "task.data": Text(r"(?s).+", "the path of a file or the id of a data set", "my.csv"),
    "task.test_data": FILE,
    "task.columns": Pairs(),
    "task.quoting": Choice("minimal", "none"),
    "task.label": WORD,
    "task.answer": WORD,
    "task.options": NamesOrName(),
    "task.data_name": WORD,
    "task.revision": WORD,
    "task.splits": Pairs(),
    "model.config": Arguments(),
    "model.max_length": Whole(8, example="2048"),
    "method.objective": Choice("loss", "accuracy", "f1"),
    "logger.mode": Choice("offline", "online"),
}

# The keys of the groups that build() does not see: those that are needed, and the others with their
# defaults.
GROUP_KEYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
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

# Of a mixture these hold for every part; null: what the part has.
MIXTURE_COUNTS: dict[str, Any] = {"num_train": None, "num_dev": None, "num_test": None} | {
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

DATA_EXAMPLES = {
    "data": "task.data=my.csv (.csv, .tsv, .jsonl, .json, .parquet, or the id of a data set)",
    "prompt": "'task.prompt=\"{text} It was\"', with columns of your data in braces",
    "labels": "'task.labels={0: terrible, 1: great}', a word for each value of the label column",
    "options": "task.options=[a,b], the columns of the options or one that holds a list",
}

# What each kind of `method.adapter` of smezo's own takes, all of it needed; those of peft have a
# config (peft_fields.py).
_ADAPTER_KINDS = Choice("lora", "lora_fa", "prefix", "tensor_train")

_LORA_KEYS: dict[str, SettingType] = {
    "r": Whole(1, example="8"),
    "alpha": Number(0, above=True, example="16"),
    "targets": SomeNames(),
}
_ADAPTER_KEYS: dict[str, dict[str, SettingType]] = {
    "lora": _LORA_KEYS,
    "lora_fa": _LORA_KEYS,
    "prefix": {"num_tokens": Whole(1, example="5")},
    "tensor_train": {
        "bottleneck": Whole(1, example="64"),
        "rank": Whole(1, example="5"),
        "bias": Choice(True, False),
    },
}


def task_keys(task: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the keys that a task needs, and its other keys with their defaults."""
    kind = checked_value("task.kind", task.get("kind"), GROUP_TYPES["task.kind"])
    if kind == MIXTURE:
        return ("name", "kind", "parts"), MIXTURE_COUNTS | {"nodes": {}, "weights": None}
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


def checked_group(
    group: str, node: Mapping[str, Any], needed: tuple[str, ...], optional: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a group with its optional keys filled in and all values in their own types."""
    for name in needed:
        if node.get(name) is None:
            own = "data" in needed
            examples = DATA_EXAMPLES if own else {"parts": "task.parts=[sst2,rte]"}
            raise UserError(
                f"{group}.{name} is needed by {group}={node['kind' if own else 'name']}: add "
                f"{examples.get(name, 'it there')}."
            )
    for name in node:
        if name not in needed and name not in optional:
            raise UserError(f"there is no {group}.{name}{near(name, {*needed, *optional})}.")
    return typed(group, {**optional, **node})


def typed(group: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with the values that :data:`GROUP_TYPES` names in their own types."""
    checked = dict(node)
    for key, type_ in GROUP_TYPES.items():
        of, _, name = key.partition(".")
        if of == group and name in checked:
            checked[name] = checked_value(key, checked[name], type_)
    return checked


def checked_adapter(node: object) -> dict[str, Any]:
    """Return the node of an adapter with its values in their own types."""
    if not isinstance(node, Mapping):
        raise UserError(
            f"method.adapter={shown(node)}: it must be a mapping with a kind; a method without an "
            "adapter is chosen by its name, such as method=mezo."
        )
    kind = node.get("kind")
    small = kind.lower() if isinstance(kind, str) else kind  # other letters are told of there
    if "config" in node or (small not in (*_ADAPTER_KEYS,) and small in (*kinds(),)):
        return checked_peft(node)
    kind = checked_value("method.adapter.kind", kind, _ADAPTER_KINDS)
    types = _ADAPTER_KEYS[kind]
    for name in node:
        if name != "kind" and name not in types:
            raise UserError(f"there is no method.adapter.{name} of kind {kind}{near(name, types)}.")
    return {"kind": kind} | {
        name: checked_value(f"method.adapter.{name}", node.get(name), type_)
        for name, type_ in types.items()
    }
