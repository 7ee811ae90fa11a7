"""What is checked of a file of unknown origin before a library reads it.

Libraries trust a file's own numbers (lengths, counts, sizes of a model), follow links and wait for
pipes. Here each claim is compared with the bytes that are there. No torch in this module.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smezo_cli.files.bounded import (
    is_count,
    is_number,
    is_text,
)


def _or_none(rule: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or rule(value)


def _is_figures(value: object) -> bool:
    """Figures of an evaluation by name: numbers, and mappings or lists of numbers."""
    if isinstance(value, dict):
        return all(item is None or is_text(item) or _is_figures(item) for item in value.values())
    if isinstance(value, list):
        return all(map(is_number, value))
    return is_number(value) or isinstance(value, bool)


def _is_tested(value: object) -> bool:
    """Figures with the value of the metric that they are of."""
    return isinstance(value, dict) and _is_figures(value) and is_number(value.get("loss", 0.0))


def _is_scored(value: object) -> bool:
    """Figures of an evaluation that is compared with others."""
    return (
        isinstance(value, dict)
        and _is_tested(value)
        and any(is_number(value.get(name)) for name in ("accuracy", "f1"))
        and is_number(value.get("standard_error", 0.0))
    )


def _is_prompts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_prompt, value))


def _is_prompt(value: object) -> bool:
    return (
        isinstance(value, dict)
        and is_text(value.get("template"))
        and isinstance(labels := value.get("labels"), list)
        and all(map(is_text, labels))
        and _or_none(is_text)(value.get("option"))
        and _or_none(is_text)(value.get("sfc"))
        and _or_none(_is_figures)(value.get("dev"))
        and _or_none(_is_figures)(value.get("dev_calibrated"))
        and isinstance(offsets := value.get("offsets", []), list)
        and all(map(is_number, offsets))
    )


def _is_digests(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() >= {"train", "dev", "test"}
        and all(map(is_text, value.values()))
    )


def _is_noted_weights(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(note, dict) and is_count(note.get("step")) and is_text(note.get("sha256"))
        for note in value.values()
    )


def _is_watch(value: object) -> bool:
    """What the watchdogs have counted, whole."""
    if not isinstance(value, dict) or not value.keys() >= _WATCH.keys() or not _fit(value, _WATCH):
        return False
    if (value["num"] == 0) is not (value["recent"] == []):
        return False
    if not is_count(value.get("unmoved", 0)):  # a run may be older than it
        return False
    return (value["spikes"] == 0) is (value["largest_spike"] is None)


def _is_spike(value: object) -> bool:
    return (
        isinstance(value, dict)
        and is_count(value.get("step"))
        and all(is_number(value.get(name)) for name in ("value", "times_median"))
    )


def _is_best(value: object) -> bool:
    """The best look at dev: its step and its figures."""
    return (
        isinstance(value, dict)
        and _or_none(is_count)(value.get("step"))
        and _is_figures({name: item for name, item in value.items() if name != "step"})
    )


def _is_numerics(value: object) -> bool:
    if not isinstance(value, dict) or not all(map(_or_none(is_number), value.values())):
        return False
    return ("moved_share" in value) == ("rms_move" in value)


def _is_method(value: object) -> bool:
    """A method's own numbers; what they are named after is for the method to say."""
    return isinstance(value, dict) and is_count(value.get("num_steps", 0))


def is_prompt(value: object) -> bool:
    """Could a run have noted this prompt?"""
    return _is_prompt(value)


def is_known(step: object, sha256: object, figures: Sequence[object]) -> bool:
    """Could these be a step, the digest of its weights, and figures of it (None: none known)?"""
    return is_count(step) and is_text(sha256) and all(f is None or _is_tested(f) for f in figures)


_SAVED_NAME = re.compile(r"(weights|optimizer)-[0-9]{1,12}\.safetensors")


def _is_saved(item: tuple[object, object]) -> bool:
    """Name and digest of a tensor file; it lies where the state does, and nowhere else."""
    name, digest = item
    return isinstance(name, str) and _SAVED_NAME.fullmatch(name) is not None and is_text(digest)


Rules = Mapping[str, Callable[[object], bool]]
_WATCH: Rules = {
    "recent": lambda value: (
        isinstance(value, list) and all(isinstance(g, float) and 0 <= g < math.inf for g in value)
    ),
    "num": is_count,
    "squares": lambda value: is_number(value) and isinstance(value, float) and value >= 0,
    "clipped": is_count,
    "spikes": is_count,
    "largest_spike": _or_none(_is_spike),
    "losses": is_number,
    "num_losses": is_count,
    "looks_since": is_count,
    "why": _or_none(is_text),
}
_STATE: Rules = {
    "step": is_count,
    "looked": is_count,
    "best_step": _or_none(is_count),
    "best_loss": _or_none(is_number),
    "method": _is_method,
    "notes": lambda value: isinstance(value, dict),
    "train_seconds": is_number,
    "num_forwards": is_count,
    "peak_memory_bytes": is_count,
    "metrics_bytes": is_count,
    "metrics_sha256": is_text,
    "files": lambda value: isinstance(value, dict) and all(map(_is_saved, value.items())),
}


def is_batching(value: object) -> bool:
    """Say whether this is a :class:`smezo_cli.scoring.batching.Found` in plain values, or None."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"scores", "answers", "difference"}:
        return False
    each = value["scores"], value["answers"]
    return _or_none(is_number)(value["difference"]) and all(
        isinstance(of, dict)
        and of.keys() == {"pads", "caches", "together"}
        and all(isinstance(flag, bool) for flag in of.values())
        for of in each
    )


_NOTES: Rules = {
    "batching": lambda value: value is not None and is_batching(value),
    "prompts": _is_prompts,
    "prompt": is_count,
    "rows": _is_digests,
    "model": is_text,
    "zero_shot": _is_scored,
    "zero_shot_calibrated": _is_scored,
    "truncated": is_count,
    "active_share": _or_none(is_number),
    "final_share": _or_none(is_number),
    "num_trained": is_count,
    "executor": _or_none(is_text),
    "micro_batch_size": lambda value: is_count(value) and value != 0,
    "best_look": _is_scored,
    "lowest_loss": _or_none(is_number),
    "highest_metric": is_number,
    "watch": _is_watch,
    "numerics": _is_numerics,
    "weights": _is_noted_weights,
    "dev_loss_before": is_number,
    "stopped_early": lambda value: isinstance(value, dict),
    "unsettled": lambda value: (
        isinstance(value, dict) and isinstance(value.get("goes_on"), bool) and len(value) == 1
    ),
    "demonstrations": lambda value: (
        isinstance(value, dict)
        and all(is_count(value.get(name)) for name in ("asked", "used", "tokens"))
        and is_text(value.get("text"))
    ),
}
_RESULT: Rules = {
    "batching": is_batching,
    "status": is_text,
    "task": is_text,
    "model": is_text,
    "method": is_text,
    "metric": lambda value: value in ("accuracy", "f1"),
    "test": _or_none(_is_tested),
    "zero_shot": _or_none(_is_tested),
    "zero_shot_calibrated": _or_none(_is_tested),
    "sparsity": lambda value: (
        isinstance(value, dict) and all(_or_none(is_number)(share) for share in value.values())
    ),
    "lr": _or_none(is_number),
    "eps": _or_none(is_number),
    "steps": is_count,
    "step": is_count,
    "seed": is_count,
    "train_seconds": is_number,
    "peak_memory_bytes": is_count,
    "keep": is_text,
    "prompt": _or_none(_is_prompt),
    "weights": _or_none(_is_noted_weights),
    "model_commit": _or_none(is_text),
    "dev": _or_none(
        lambda value: isinstance(value, dict) and _or_none(_is_best)(value.get("best"))
    ),
    "versions": lambda value: isinstance(value, dict),
}
# Of a finished run, what is computed with.
_DONE = ("task", "model", "method", "test", "steps", "seed", "train_seconds", "peak_memory_bytes")


def _fit(values: Mapping[str, Any], rules: Rules) -> bool:
    return all(rule(values[name]) for name, rule in rules.items() if name in values)


def is_sound_state(saved: Mapping[str, Any]) -> bool:
    """Could a run have written this state.json? Its numbers are names of files later."""
    if not _fit(saved, _STATE) or saved.keys() != _STATE.keys():
        return False
    notes = saved["notes"]
    if not _fit(notes, _NOTES):
        return False
    if max(saved["best_step"] or 0, saved["looked"]) > saved["step"]:
        return False
    if saved["looked"] and saved["best_step"] is None:  # the first look is the best so far
        return False
    return "prompt" not in notes or notes["prompt"] < len(notes.get("prompts", ()))


def is_looks(value: object) -> bool:
    """Steps and the figure on dev at each, as pairs?"""
    return isinstance(value, list) and all(
        isinstance(look, list) and len(look) == 2 and is_count(look[0]) and is_number(look[1])
        for look in value
    )


def is_sound_result(result: Mapping[str, Any]) -> bool:
    """Could a run have written this result.json?"""
    if "status" not in result or not _fit(result, _RESULT):
        return False
    if result["status"] != "done":
        return True
    if any(result.get(name) is None for name in _DONE):
        return False
    test = result["test"]
    metric = result.get("metric", "accuracy")
    gains = [value for name, value in test.items() if name.startswith("over_")]
    return (
        is_number(test.get(metric))
        and all(_or_none(is_number)(test.get(name)) for name in ("standard_error", "auc"))
        and all(isinstance(gain, dict) for gain in gains)
    )
