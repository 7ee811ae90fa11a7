"""Say why losses or scores are not finite, and what to do about it."""

import torch

from smezo_cli.run.begin import Run
from smezo_cli.run.evaluator import SplitNotFinite
from smezo_cli.run.loaded import Loaded
from smezo_cli.scoring.objectives import NonFiniteScore
from smezo_cli.zo.step import NonFiniteLoss, UpdateOverflow


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


def diverged(run: Run, loaded: Loaded, error: NonFiniteLoss) -> str:
    """Return the sentence that ends a run whose losses, or scores, were not finite."""
    best, step, what = run.state.best_step, run.state.step, str(error)
    split = error.split if isinstance(error, SplitNotFinite) else ""
    if split:
        at = f" at step {step}" if step else ""
        what = f"{split} loss is not finite{at}: {what}"
    # Of the tested weights the dev scores were finite: it is the row that is another.
    if isinstance(error, NonFiniteScore) and (not step or split == "test"):
        return f"{what}; {why_not_finite(loaded)}."
    came_spoilt = not step and not isinstance(error, UpdateOverflow)
    if came_spoilt and (why := spoilt_weight(loaded)):
        return f"{what}; {why}."
    good = "no checkpoint was good"
    if best is not None:
        good = f"the last good checkpoint is step {best}"
    lr, eps = run.settings.lr, run.settings.eps
    if isinstance(error.__cause__, ZeroDivisionError) and eps is not None:
        return f"{what}; {good} in {run.folder.path}; eps={eps:g} is too small here: raise it."
    advice = f"lr={lr:g} is too large here: lower it, e.g. lr={lr / 3:.1g}" if lr else "lower lr"
    if best is None:
        advice += ", or eps" if eps is not None else ""
        advice += ", or use dtype=float32" if run.settings.dtype != "float32" else ""
    return f"{what}; {good} in {run.folder.path}; {advice}."
