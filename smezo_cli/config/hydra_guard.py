"""Check what a command line asks of Hydra itself: its logging, launchers and plugins."""

import importlib.util
import inspect
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smezo_cli.errors import UserError

# What Hydra is told by conf/hydra/smezo.yaml; other values would write elsewhere than a run may.
_FIXED: dict[str, Any] = {
    "run.dir": ".",
    "sweep.dir": "${runs_dir}/${name}",
    "sweep.subdir": ".",
    "output_subdir": None,
    "job.chdir": False,
    "job.env_set": {},
    "callbacks": {},
}

_LOG_HANDLERS = ("logging.StreamHandler", "logging.NullHandler")

_LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def is_of_launcher(key: str) -> bool:
    """Return whether a key of the command line is about the launcher."""
    return key == "hydra/launcher" or key.startswith("hydra.launcher.")


def launcher_of(cfg: DictConfig) -> Any:
    """Return the launcher's node as plain values."""
    return OmegaConf.to_container(cfg.hydra.launcher, resolve=False)


def check_hydra(cfg: DictConfig) -> None:
    """Refuse settings of Hydra that would make it call or write anything of their own.

    Raises:
        UserError: naming the key.
    """
    node = OmegaConf.to_container(cfg.hydra, resolve=False)
    for key, fixed in _FIXED.items():
        value: Any = node
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value != fixed and not (fixed == {} and value is None):
            raise UserError(
                f"hydra.{key} is smezo's own and must stay as it is; results lie in runs_dir/name, "
                "and environment variables are set before the command."
            )
    _check_hydra_node(node, "hydra")


def _check_hydra_node(node: object, key: str) -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            at = f"{key}.{name}"
            if at == "hydra.sweeper.sampler._target_":
                if not re.fullmatch(_SAMPLER, str(value)):
                    raise UserError(f"{at}={value} is not allowed: it must be a sampler of optuna.")
            elif name == "_target_":
                _check_plugin(value, at)
            elif name == "()" or (name == "class" and value not in _LOG_HANDLERS):
                raise UserError(
                    f"{at}={value} is not allowed: log handlers are {' and '.join(_LOG_HANDLERS)}."
                )
            _check_hydra_node(value, at)
    elif isinstance(node, list):
        for value in node:
            _check_hydra_node(value, key)
    elif isinstance(node, str) and "ext://" in node and node not in _LOG_STREAMS:
        raise UserError(f"{key}={node} is not allowed: streams are {' and '.join(_LOG_STREAMS)}.")


_SAMPLER = r"optuna\.samplers\.(TPE|Random|CmaEs|NSGAII|MOTPE)Sampler"
_PLUGIN = r"hydra(\._internal\.core_plugins|_plugins)\.[\w.]+"


def _check_plugin(name: object, key: str) -> None:
    """Refuse a class that is no launcher or sweeper of Hydra or of an installed plugin of Hydra."""
    from hydra.plugins.plugin import Plugin

    plugin: object = None
    if isinstance(name, str) and re.fullmatch(_PLUGIN, name):
        module, _, word = name.rpartition(".")
        try:
            plugin = vars(importlib.import_module(module)).get(word)
        except ImportError as error:
            raise UserError(f"{key}={name} is not there ({error}).") from error
        if getattr(plugin, "__module__", None) != module:
            plugin = None
    if not (inspect.isclass(plugin) and issubclass(plugin, Plugin)):
        raise UserError(
            f"{key}={name} is not allowed: it must be a launcher or sweeper of Hydra or of an "
            "installed plugin of Hydra."
        )
