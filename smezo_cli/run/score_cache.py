"""Say what scores of an untouched model follow from, and where they are kept for other runs."""

import hashlib
import json
from typing import Any

import torch

from smezo_cli.files.fetch import cache_dir
from smezo_cli.models.onednn import num_onednn
from smezo_cli.run import mask
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.store.saved import tensors_digest
from smezo_cli.store.score_cache import ScoreCache


def of(run: Run, loaded: Loaded) -> ScoreCache | None:
    """Return where scores are kept, if the run asks for it and the weights are those that came.

    With an adapter, with weights that are codes, with a probe in place of the output layer and with
    Python files that the model brings nothing is kept: no other run would have it, or know it.
    """
    is_other = loaded.adapter is not None or loaded.of_base is not None or mask.holds_codes(loaded)
    is_other = is_other or loaded.scorer.probe is not None
    if not run.settings.cache_scores or is_other or run.settings.model["trust_remote_code"]:
        return None
    return ScoreCache(cache_dir() / "scores", _about(run, loaded))


def _about(run: Run, loaded: Loaded) -> dict[str, Any]:
    s, scorer, batching = run.settings, loaded.scorer, run.notes["batching"]
    config: Any = loaded.model.config
    told = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    text = json.dumps(told, sort_keys=True, default=str)
    chip = torch.backends.cpu.get_cpu_capability()
    if loaded.device.type == "cuda":
        chip = torch.cuda.get_device_name(loaded.device)
    libraries = ("smezo", "numerics", "commit", "torch", "transformers")
    return {
        "versions": {name: run.versions.get(name) for name in libraries},
        "machine": [loaded.device.type, chip, torch.get_num_threads(), loaded.device_map],
        "dtypes": [s.dtype, s.compute_dtype],
        "model": [type(loaded.model).__name__, loaded.attention, num_onednn(loaded.model)],
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": tensors_digest(dict(loaded.model.state_dict())),
        "batching": [batching["scores"], batching["answers"]],
        "forwards": [scorer.most_tokens, scorer.holds_common, scorer.always_caches],
    }
