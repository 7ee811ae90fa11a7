"""Find the folder of YAML files, read its nodes, and name the settings that the code knows."""

import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smezo_cli.config.method_keys import trait
from smezo_cli.errors import UserError
from smezo_cli.files.bounded import check_expansion
from smezo_cli.words import with_mappings

# In a wheel the files lie inside the package, in a checkout beside it.
_PACKAGED = Path(__file__).resolve().parent.parent / "conf"

CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parent.parent / "conf"


# Loggers that are packages of their own, and what installs them: as in pyproject.toml.
INSTALL_LOGGER = {
    "tensorboard": "python -m pip install 'tensorboard>=2.18,<3'",
    "trackio": "python -m pip install 'trackio>=0.43,<1'",
}

# Top-level settings that a method has or has not.
OPTIONAL_SETTINGS = ("lr", "eps", "sparsity")

FULL_SAVE_EVERY = 500  # as conf/train.yaml has it

# The values of these for methods that take no steps; another value would be ignored.
WITHOUT_STEPS: dict[str, object] = {
    **{"steps": 0, "batch_size": 0, "eval_every": None, "lr_schedule": "constant"},
    **{"warmup_steps": 0, "stop_if_diverged": None, "patience": None, "keep": "best"},
    "zero_shot": True,
    "micro_batch_size": None,
    "batch_order": "shuffled",
    "keep_inputs": False,
    "full_save_every": FULL_SAVE_EVERY,
}


def is_frozen(method: object) -> bool:
    """Return whether this is the node of a method that takes no steps."""
    return not trait(method, "takes_steps", default=True)


def usual_eval_every(steps: int) -> int:
    """Return the number that eval_every=null is: a tenth of the run, at least 20 (or all)."""
    return min(steps, max(20, math.ceil(steps / 10)))


def usual(group: str) -> str | None:
    """Return the choice of a group that train.yaml makes; None where it makes none."""
    defaults = load_yaml(CONF_DIR / "train.yaml").get("defaults", [])
    return next((entry[group] for entry in defaults if group in entry), None)


def load_yaml(file: Path) -> DictConfig:
    """Return the mapping in a YAML file of ours; an empty one if there is none."""
    loaded = OmegaConf.load(file)
    return loaded if isinstance(loaded, DictConfig) else OmegaConf.create({})


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as plain Python values, with interpolations resolved.

    Raises:
        UserError: an interpolation that cannot be resolved.
    """
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


def sentence(error: BaseException) -> str:
    """Return the first lines of an error of Hydra or OmegaConf as one sentence."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("See http")]
    return "; ".join(dict.fromkeys(lines[:3])) or type(error).__name__
