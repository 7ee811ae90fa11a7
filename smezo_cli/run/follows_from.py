"""Say what the computations of a model follow from, beside its weights and the rows."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from smezo_cli.models.onednn import num_onednn
from smezo_cli.run.loaded import Loaded

_LIBRARIES = ("smezo", "numerics", "commit", "torch", "transformers")


def machine_and_model(loaded: Loaded, versions: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, machine, dtypes and the model's configuration as plain JSON.

    Args:
        loaded: the model.
        versions: of libraries; those that are not among them are null.
    """
    s, config = loaded.settings, _config(loaded)
    chip = torch.backends.cpu.get_cpu_capability()
    if loaded.device.type == "cuda":
        chip = torch.cuda.get_device_name(loaded.device)
    return {
        "versions": {name: versions.get(name) for name in _LIBRARIES},
        "machine": [loaded.device.type, chip, torch.get_num_threads(), loaded.device_map],
        "dtypes": [s.dtype, s.compute_dtype],
        "model": [type(loaded.model).__name__, loaded.attention, num_onednn(loaded.model)],
        "config": hashlib.sha256(config.encode()).hexdigest(),
    }


def _config(loaded: Loaded) -> str:
    config: Any = loaded.model.config
    told = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    return json.dumps(told, sort_keys=True, default=str)
