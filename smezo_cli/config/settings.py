"""Check the settings of a run: their types, their ranges, and that none would be ignored.

Types and ranges live here, values and their meaning in conf/. No Hydra and no torch in this module.
"""

import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf

from smezo_cli.config.combinations import (
    check_codes,
    check_counts,
    check_device_map,
    check_dtypes,
    check_frozen,
    check_method,
    check_objective,
    check_places,
    check_quantization,
    check_sfc,
    check_steps,
)
from smezo_cli.config.fixed import (
    OPTIONAL_SETTINGS,
    WITHOUT_STEPS,
    is_frozen,
    plain,
    usual_eval_every,
)
from smezo_cli.config.groups import (
    GROUP_KEYS,
    GROUP_TYPES,
    checked_adapter,
    checked_group,
    task_keys,
    typed,
)
from smezo_cli.config.method_keys import describe
from smezo_cli.config.mixture import checked_mixture, part_nodes, single_tasks
from smezo_cli.config.types import (
    COUNT,
    DEVICE,
    DTYPE,
    FOLDER_NAME,
    NULLABLE,
    SEED,
    Fixed,
    Node,
    Text,
    checked_value,
)
from smezo_cli.errors import UserError, near, redacted_tree
from smezo_cli.kinds import MIXTURE
from smezo_cli.zo.ranges import Choice, Number, SettingType, Whole, shown

_MOST_BYTES_OF_NAME = 255
_REST_OF_FOLDER = len("--") + len(f"-s{2**63}-") + 8  # of the name of a run's folder


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold the checked settings of one run; conf/train.yaml and conf/method/ say what they mean.

    `lr`, `eps` and `sparsity` are None where the chosen method has no such setting.
    """

    seed: Annotated[int, SEED]
    data_seed: Annotated[int, SEED]
    steps: Annotated[int, Whole(1, example="150")]
    batch_size: Annotated[int, COUNT]
    eval_every: Annotated[int, Whole(1, example="50")]  # null has become a number
    stop_if_diverged: Annotated[float | None, Number(1, above=True, example="2.0")]
    patience: Annotated[int | None, Whole(1, example="5")]
    micro_batch_size: Annotated[int | None, COUNT]
    query_ranks: Annotated[int, Whole(1, example="2")]
    rank_backend: Annotated[str, Choice("gloo", "nccl")]
    batch_order: Annotated[str, Choice("shuffled", "stratified")]
    keep_inputs: Annotated[str | bool, Choice("auto", True, False)]
    lr_schedule: Annotated[str, Choice("constant", "linear", "cosine")]
    warmup_steps: Annotated[int, Whole(0, example="0")]
    keep: Annotated[str, Choice("best", "last", "all")]
    zero_shot: Annotated[bool, Choice(True, False)]
    cache_scores: Annotated[bool, Choice(True, False)]
    cache_inputs: Annotated[bool, Choice(True, False)]
    prompt_rows: Annotated[int | None, Whole(2, example="100")]
    full_save_every: Annotated[int, Whole(1, example="500")]
    device: Annotated[str, DEVICE]
    dtype: Annotated[str, DTYPE]
    compute_dtype: Annotated[str | None, DTYPE]
    compile: Annotated[str | bool, Choice("auto", True, False)]
    name: Annotated[str, FOLDER_NAME]
    runs_dir: Annotated[str, Text(r"(?s).+", "the path of a folder", "runs")]
    if_exists: Annotated[str, Choice("resume", "error", "fresh")]
    task: Annotated[dict[str, Any], Node()]
    model: Annotated[dict[str, Any], Node()]
    method: Annotated[dict[str, Any], Node()]
    logger: Annotated[dict[str, Any], Node()]
    lr: Annotated[float | None, Number(0, above=True, example="1e-4")] = None
    eps: Annotated[float | None, Number(0, above=True, example="1e-3")] = None
    sparsity: Annotated[float | None, Number(0, 1, example="0.75")] = None


SETTINGS: dict[str, SettingType] = {
    key: hint.__metadata__[0]
    for key, hint in typing.get_type_hints(Settings, include_extras=True).items()
}


def check(cfg: DictConfig) -> Settings:
    """Return the checked settings: types, ranges, and that none would be ignored.

    Raises:
        UserError: naming the key, what was got, what is allowed and an example.
    """
    checked = _top_level(_known(cfg))
    checked |= _groups(checked)
    _check_secrets(checked)
    _check_names(checked)
    _check_targets(checked["method"], "method")
    for node in single_tasks(checked["task"]):
        check_counts(node)
        check_sfc(node, checked["model"], checked["method"])
    given = {key: checked[key] for key in OPTIONAL_SETTINGS if key in checked}
    check_method(checked["method"], given)
    method = checked["method"]
    check_objective(method.get("objective", "loss"), checked["task"], method)
    check_quantization(checked["model"], checked["method"], checked["device"])
    check_codes(checked["model"], checked["method"])
    check_places(checked["model"], checked["method"])
    check_device_map(checked["model"], checked["device"])
    check_dtypes(checked["dtype"], checked["compute_dtype"])
    if is_frozen(checked["method"]):
        check_frozen(checked["task"], checked["model"], checked["method"])
        return Settings(**checked | {"eval_every": 1})
    if checked["eval_every"] is None:
        checked["eval_every"] = usual_eval_every(checked["steps"])
    check_steps(checked)
    return Settings(**checked)


def _known(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings as plain values; refuse keys that are missing or unknown."""
    values = plain(cfg)
    if missing := sorted(_missing(values)):
        raise UserError(f"{missing[0]} is needed: add {missing[0]}=VALUE.")
    for key in values:
        if key not in SETTINGS:
            raise UserError(f"there is no setting {key}{near(key, SETTINGS)}.")
    return values


def _missing(value: Any, name: str = "") -> Iterator[str]:
    """Yield the names of the keys that have no value; in a seventh of the time of OmegaConf's."""
    if value == "???":
        yield name
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _missing(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _missing(inner, f"{name}[{place}]")


def _top_level(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those outside the groups in their own types."""
    return {
        key: checked_value(key, values.get(key), type_)
        for key, type_ in _types_for(values.get("method")).items()
        if key in values or key not in OPTIONAL_SETTINGS
    }


def _groups(checked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the groups with their optional keys filled in and all values in their own types."""
    nodes = {group: checked[group] for group in ("task", "model", "method", "logger")}
    for group, (needed, optional) in ({"task": task_keys(nodes["task"])} | GROUP_KEYS).items():
        nodes[group] = checked_group(group, nodes[group], needed, optional)
    if nodes["task"]["kind"] == MIXTURE:
        nodes["task"] = checked_mixture(nodes["task"])
    nodes["method"] = typed("method", nodes["method"])
    nodes["method"] = _method(nodes["method"])
    return nodes


# Keys of a method's node that are not arguments of its class.
_BESIDE_ARGUMENTS = ("name", "_target_", "adapter", "objective")


def _method(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of a method with all values in the types that its class names."""
    checked = dict(node)
    if "adapter" in node:
        checked["adapter"] = checked_adapter(node["adapter"])
    if (known := describe(node)) is None:
        return checked
    for name, value in node.items():
        key = known.keys.get(name)
        if key is None and name not in _BESIDE_ARGUMENTS:
            raise UserError(f"method takes no {name}{near(name, known.keys)}.")
        if key is not None and key.type is not None and name not in OPTIONAL_SETTINGS:
            checked[name] = checked_value(f"method.{name}", value, key.type, key.may_be_null)
    return checked


def check_spelling(key: str, text: str, value: object) -> None:
    """Refuse text that Hydra reads as something else, such as name=nan or model.revision=1e5.

    Args:
        key: of the setting.
        text: as it was written on the command line.
        value: what Hydra read.

    Raises:
        UserError: naming the text, and how it is written.
    """
    type_ = (SETTINGS | GROUP_TYPES).get(key)
    text = text.strip()
    if not isinstance(type_, Text) or not re.fullmatch(type_.pattern, text):
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (is_number and str(value) != text) or isinstance(value, bool):
        what = f"the {'number' if is_number else 'truth value'} {shown(value)}"
    elif value is None and key not in NULLABLE:
        what = "no value"
    elif isinstance(value, float):
        what = "a number"
    else:
        return
    raise UserError(
        f"{key}={text}: {text} is read as {what}, and {key} must be {type_.words}: leave it out, "
        f"or write \"{key}='{text}'\", with both kinds of quotes."
    )


def _check_secrets(checked: Mapping[str, Any]) -> None:
    """Refuse a secret in prompts and in what paths are made of: both are printed and stored."""
    names = ("prompt", "prompts", "labels", "option_template", "sfc_prompt")
    for name, node in itertools.product(names, single_tasks(checked["task"])):
        text = node.get(name)
        if text is not None and redacted_tree(text) != text:
            raise UserError(
                f"task.{name} holds a secret (a login, or the value of an environment variable "
                "that is named like one), and prompts are stored with the run: take it out."
            )
    parts = {key: checked[key] for key in ("name", "runs_dir")}
    parts |= {f"{group}.name": checked[group]["name"] for group in ("task", "model", "method")}
    for key, value in parts.items():
        if redacted_tree(value) != value:
            raise UserError(
                f"{key}={value} holds a secret (a login, or the value of an environment variable "
                f"that is named like one), and the paths of a run are printed and stored: choose "
                f"another {key}, or unset that variable."
            )


def _check_names(checked: Mapping[str, Any]) -> None:
    """Refuse names of which the name of the run's folder would be too long for a file system."""
    names = {f"{group}.name": checked[group]["name"] for group in ("task", "model", "method")}
    longest = max(names, key=lambda key: len(names[key].encode()))
    size = sum(len(name.encode()) for name in names.values()) + _REST_OF_FOLDER
    if size > _MOST_BYTES_OF_NAME:
        raise UserError(
            f"{longest}={names[longest]}: the folder of the run would have a name of {size} bytes, "
            f"and file systems take {_MOST_BYTES_OF_NAME}: give a shorter {longest}."
        )


def check_target(node: Mapping[str, Any], key: str) -> str:
    """Return the `_target_` of a node if it has the form of an allowed one; nothing is imported.

    Raises:
        UserError: it does not.
    """
    name = node.get("_target_")
    if not isinstance(name, str) or not re.fullmatch(_TARGET, name):
        raise UserError(
            f"{key}._target_={shown(name)} is not allowed: it must be a class of "
            "smezo_cli.methods.* or an optimizer of torch.optim.*."
        )
    return name


def _types_for(method: object) -> dict[str, SettingType]:
    if not isinstance(method, Mapping) or not is_frozen(method):
        return SETTINGS
    name = method.get("name")
    return SETTINGS | {key: Fixed(key, v, name) for key, v in WITHOUT_STEPS.items()}


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


def _data_name(data: object, default: str) -> str:
    """Return a folder name for a task on the user's data: Reviews for some/Reviews.csv."""
    stem = Path(str(data or default)).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-") or default


OmegaConf.register_new_resolver("data_name", _data_name, replace=True)
OmegaConf.register_new_resolver("task_parts", part_nodes, replace=True)
