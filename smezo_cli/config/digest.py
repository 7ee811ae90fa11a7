"""Compute the digest of settings, which names a run, and fill in settings that came later."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from smezo_cli.config.fixed import FULL_SAVE_EVERY, plain
from smezo_cli.config.method_keys import trait
from smezo_cli.config.settings import SETTINGS, Settings

# Cannot change a result, hence not part of a run's digest.
NOT_IN_DIGEST = (
    *("name", "runs_dir", "logger", "if_exists", "compile", "hydra", "full_save_every"),
    *("micro_batch_size", "query_ranks", "rank_backend", "cache_scores"),
    "cache_inputs",
)

_NOT_IN_DIGEST_OF_MODEL = ("device_map",)

# Settings that were added after runs had been made, with the value that those runs used implicitly.
# At this value a setting is no part of the digest, so the runs keep their names.
ADDED_LATER = {
    **dict.fromkeys(("stop_if_diverged", "patience", "clip_projected_grad", "num_per_class")),
    "prompt_rows": None,
    "quoting": None,
    "quantization": None,
    "objective": "loss",
    "zero_shot": True,
    "batch_order": "shuffled",
    "keep_inputs": False,
    "sfc": False,
    "sfc_prompt": None,
    "layers": None,
}

_ADDED_LATER_OF_MACHINES = {
    **{"micro_batch_size": None, "query_ranks": 1, "rank_backend": "gloo", "cache_scores": False},
    "cache_inputs": False,
    "full_save_every": FULL_SAVE_EVERY,
}


def is_extensible(lr_schedule: object) -> bool:
    """Return whether a finished run may be extended: its lr does not depend on the steps."""
    return lr_schedule == "constant"


def digest(cfg: DictConfig | Mapping[str, Any]) -> str:
    """Return eight hex digits for the resolved settings that can change a result.

    A run that can be extended keeps its name when ``steps`` grows.
    """
    values = without_later_keys(
        {key: value for key, value in plain(cfg).items() if key not in NOT_IN_DIGEST}
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


def folder_of(settings: Settings, config: Mapping[str, Any]) -> Path:
    """Return the folder of a run, from its checked settings and the same in plain values."""
    s = settings
    name = f"{s.task['name']}-{s.model['name']}-{s.method['name']}-s{s.seed}-{digest(config)}"
    return Path(s.runs_dir) / s.name / name


def without_later_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that were added later and have the value used before."""
    kept = {
        key: without_later_keys(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in ADDED_LATER or value != ADDED_LATER[key]
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
    """Fill in settings that were added after the run was made, with the values it used implicitly.

    And reset what is refused for its method now, but was ignored then.
    """
    for key, value in (ADDED_LATER | _ADDED_LATER_OF_MACHINES).items():
        if key in SETTINGS and key not in cfg:
            cfg[key] = value
    if isinstance(task := cfg.get("task"), DictConfig) and "data" in task and "quoting" not in task:
        task.quoting = ADDED_LATER["quoting"]
    if isinstance(method := cfg.get("method"), DictConfig) and not trait(
        {"_target_": method.get("_target_")}, "replays", default=False
    ):
        cfg.full_save_every = FULL_SAVE_EVERY


def _canonical(value: object) -> object:
    """Return a value in which 1 and 1.0 are equal and the keys of mappings are strings."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
