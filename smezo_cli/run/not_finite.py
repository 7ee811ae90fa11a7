"""Say why losses or scores are not finite, and what to do about it."""

import torch

from smezo_cli.run.loaded import Loaded


def spoilt_weight(loaded: Loaded) -> str:
    """Return a clause that names a weight which is NaN or infinite; empty if there is none."""
    for name, p in loaded.model.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            return (
                f"{name} of model={loaded.settings.model['name']} holds numbers that are not "
                "finite: get the model anew, or choose another"
            )
    return ""


def why_not_finite(loaded: Loaded) -> str:
    """Return a clause on the likely cause of scores that are not finite, and what to do."""
    if why := spoilt_weight(loaded):
        return why
    name, s = loaded.settings.model["name"], loaded.settings
    low = [f"{key}={getattr(s, key)}" for key in ("dtype", "compute_dtype")]
    low = [word for word in low if word.endswith("float16")]
    if low:
        return f"{' '.join(low)} may be too narrow: add dtype=float32 compute_dtype=null"
    return f"model={name} gives none for it: choose another model or task.prompt"
