"""Check settings that must agree with each other."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smezo_cli.config.fixed import CONF_DIR, FULL_SAVE_EVERY, load_yaml, usual
from smezo_cli.config.method_keys import trait
from smezo_cli.config.mixture import single_tasks
from smezo_cli.errors import UserError
from smezo_cli.kinds import METRICS
from smezo_cli.zo.ranges import shown

_LEAST_TOKENS = 8  # of a row, as of model.max_length

_FEW = 8  # names of methods, from which only the first are shown


def check_counts(task: Mapping[str, Any]) -> None:
    """Refuse counts of rows that would be ignored beside task.num_per_class."""
    idle = [f"task.{key}" for key in ("num_train", "num_dev") if task[key] is not None]
    if task.get("num_per_class") is not None and idle:
        also = " and ".join(f"{key}={task[key.removeprefix('task.')]}" for key in idle)
        raise UserError(
            f"task.num_per_class={task['num_per_class']} takes as many rows of each class for "
            f"train and again for dev, so {also} would be ignored: add "
            f"{' '.join(f'{key}=null' for key in idle)}, or task.num_per_class=null."
        )


def check_sfc(task: Mapping[str, Any], model: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Refuse a calibration that would be ignored, or whose domain-conditional prompt is unknown."""
    given = task.get("sfc_prompt")
    if not task.get("sfc"):
        if given is not None:
            raise UserError(
                f"task.sfc_prompt={given!r} is the prompt of task.sfc=true, without which it would "
                "be ignored: add task.sfc=true, or leave it out."
            )
        return
    if not trait(method, "scores_words", default=True):
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
    """Return the names of our tasks that have a domain-conditional prompt."""
    files = sorted((CONF_DIR / "task").glob("*.yaml"))
    loaded = {file.stem: load_yaml(file) for file in files}
    return [
        name
        for name, cfg in loaded.items()
        if any("sfc" in node for node in OmegaConf.select(cfg, "prompts") or ())
    ]


def check_method(method: Mapping[str, Any], given: Mapping[str, float]) -> None:
    """Refuse what the method would ignore or contradict.

    Args:
        method: the node of the method.
        given: lr, eps and sparsity, where they are given at the top level.
    """
    node = {key: value for key, value in method.items() if key != "adapter"}
    for key, value in given.items():
        used = list(_values_of(node, key))
        if not used:
            raise UserError(lacks(key, method["name"], _methods_with(key)))
        for other in used:
            if other != value:
                raise UserError(
                    f"method has {key}={shown(other)} beside {key}={value:g}: "
                    f"set {key}=VALUE at the top level alone."
                )
    mask = method.get("mask")
    if mask == "none" and given.get("sparsity"):
        raise UserError(
            f"method.mask=none perturbs every weight, so sparsity={given['sparsity']:g} would be "
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


def check_quantization(model: Mapping[str, Any], method: Mapping[str, Any], device: str) -> None:
    """Refuse 4-bit weights that would be trained, or that cannot be had."""
    if model["quantization"] is None:
        return
    out = "or leave model.quantization out"
    adapter = method.get("adapter") or {}
    if adapter.get("kind") not in ("lora", "lora_fa") or "config" in adapter:
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


def check_places(model: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Refuse an adapter that takes so many positions that no row fits behind them."""
    adapter = method.get("adapter") or {}
    config = adapter.get("config") or {}
    for key, places in (
        ("method.adapter.num_tokens", adapter.get("num_tokens", 0)),
        ("method.adapter.config.num_virtual_tokens", config.get("num_virtual_tokens", 0)),
    ):
        if (most := model["max_length"] - _LEAST_TOKENS) < places:
            raise UserError(
                f"{key}={places} stand before each row within model.max_length="
                f"{model['max_length']}, which leaves no room for a row: give {most} or fewer."
            )


def check_codes(model: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Refuse what does not go with a method whose linear layers hold integers."""
    if method.get("frozen_bits") is not None:
        bits = f"method.frozen_bits={method['frozen_bits']}"
        if method.get("adapter") is not None:
            raise UserError(f"{bits} beside method.adapter: leave one of them out.")
        if model["device_map"] is not None:
            raise UserError(
                f"model.device_map beside {bits}: a model of codes lies on one device so far; "
                "leave one of them out."
            )
    if not trait(method, "holds_codes", default=False):
        return
    name = method["name"]
    if method.get("adapter") is not None:
        raise UserError(
            f"method.adapter beside method={name}, which trains the linear layers themselves, held "
            "as integers: leave it out, or choose method=mezo_lora."
        )
    if model["device_map"] is not None:
        raise UserError(
            f"model.device_map beside method={name}: a model of integers lies on one device so "
            "far; leave model.device_map out."
        )
    if method.get("executor") == "in_place" and trait(method, "moves_codes", default=False):
        raise UserError(
            f"method.executor=in_place moves the weights themselves by eps, and those of "
            f"method={name} are integers: use method.executor=auto, sequential or lockstep."
        )


def check_device_map(model: Mapping[str, Any], device: str) -> None:
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


def check_objective(objective: str, task: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Refuse an objective that is not the metric of the task, or has no gradient to be taken."""
    if objective != "loss" and trait(method, "needs_gradient", default=False):
        raise UserError(
            f"method.objective={objective}: method={method['name']} takes derivatives, which "
            f"{objective} has none of: leave method.objective out, or choose method=mezo."
        )
    metric = METRICS[task["kind"]]
    if objective not in ("loss", metric):
        raise UserError(
            f"method.objective={objective}: task {task['name']} is of kind {task['kind']}, whose "
            f"metric is {metric}: add method.objective={metric}, or leave it out."
        )


def check_dtypes(dtype: str, compute_dtype: str | None) -> None:
    """Refuse products in a higher precision than the weights have."""
    if compute_dtype == "float32" != dtype:
        raise UserError(
            f"compute_dtype=float32 beside dtype={dtype}: products are computed in the "
            "weights' precision or a lower one; add dtype=float32, or leave compute_dtype out."
        )


def check_frozen(
    task: Mapping[str, Any], model: Mapping[str, Any], method: Mapping[str, Any]
) -> None:
    """Refuse a model or a task that a method without steps is not made for."""
    if model["family"] == "masked" and trait(method, "shows_demonstrations", default=False):
        raise UserError(
            f"model={model['name']} fills masks, and method {method['name']} is for models that go "
            "on from demonstrations: choose a causal model, or method=zero_shot."
        )
    if not trait(method, "scores_words", default=True) and task["kind"] != "classification":
        raise UserError(
            f"task={task['name']} is of kind {task['kind']}, and method {method['name']} tells "
            "classes apart: choose a task of kind classification, or method=zero_shot."
        )


def check_steps(checked: Mapping[str, Any]) -> None:
    """Refuse what would be ignored on the way through the steps of a run.

    Args:
        checked: the settings of a method that takes steps.
    """
    task, method, steps = checked["task"], checked["method"], checked["steps"]
    kinds = {node["kind"] for node in single_tasks(task)}
    if checked["batch_order"] == "stratified" and kinds != {"classification"}:
        raise UserError(
            f"batch_order=stratified gives a batch its share of each class, and "
            f"task={task['name']} is of kind {' and '.join(sorted(kinds))}: leave it out."
        )
    num_rows = method.get("num_rows", checked["batch_size"])
    if num_rows != checked["batch_size"]:
        raise UserError(
            f"method.num_rows={num_rows}: each row of a batch has a direction of its own, and "
            f"batch_size={checked['batch_size']}: leave it out."
        )
    num_parts = len(task.get("nodes", "1"))
    if checked["batch_size"] < num_parts:
        raise UserError(
            f"batch_size={checked['batch_size']}: a batch holds rows of each of the {num_parts} "
            f"parts of a mixture: add batch_size={num_parts} or more."
        )
    records_steps = trait(method, "replays", default=False)
    if checked["full_save_every"] != FULL_SAVE_EVERY and not records_steps:
        raise UserError(
            f"full_save_every={checked['full_save_every']}: the steps of "
            f"{method['name']} are not recorded: it saves its weights at each evaluation, and "
            "full_save_every would be ignored: leave it out, and set eval_every."
        )
    if checked["warmup_steps"] >= steps:
        raise UserError(
            f"warmup_steps={checked['warmup_steps']} leaves nothing of steps={steps}: "
            "set it below the steps."
        )
    evaluations = math.ceil(steps / checked["eval_every"])
    if checked["patience"] is not None and checked["patience"] + 1 >= evaluations:
        raise UserError(
            f"patience={checked['patience']} cannot end a run of {evaluations} evaluations "
            "early (the first is always the best so far): lower patience or eval_every, or "
            "set patience=null."
        )


def _values_of(node: object, name: str) -> Iterator[object]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == name:
                yield value
            yield from _values_of(value, name)


def _methods_with(key: str) -> list[str]:
    """Return the names of our methods that have a setting at the top level."""
    files = sorted((CONF_DIR / "method").glob("*.yaml"))
    loaded = {file.stem: load_yaml(file) for file in files}
    # Those with an adapter are variants of the others, and would make the line long.
    return [name for name, cfg in loaded.items() if key in cfg and not _is_variant(cfg)]


def _is_variant(cfg: DictConfig) -> bool:
    return OmegaConf.select(cfg, "method.adapter") is not None


def lacks(key: str, method: object, others: Sequence[str]) -> str:
    """Return a sentence that the method has no such setting, and which methods have it.

    It advises the default method, if that has it, else the one whose name is nearest.
    """
    have = "has" if len(others) == 1 else "have"
    if not others:
        return f"method {method} has no {key}: leave {key} out."
    variants = [name for name in others if name.startswith(f"{method}_")]
    alike = difflib.get_close_matches(str(method), others, n=1, cutoff=0.0)
    default = usual("method")
    advised = default if default in others else [*variants, *alike][0]
    named = list(others)
    if len(others) > _FEW:
        named = [*others[: _FEW - 1], f"{len(others) - _FEW + 1} others"]
    return (
        f"method {method} has no {key}; {', '.join(named)} {have}: add method={advised}, or leave "
        f"{key} out."
    )
