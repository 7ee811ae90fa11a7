"""Say whether two runs are the same experiment but for what may differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from smezo_cli.config.digest import ADDED_LATER, NOT_IN_DIGEST, digest, without_later_keys
from smezo_cli.config.fixed import usual_eval_every
from smezo_cli.report.runs import Run

# Where weights and data lie, and what computes, does not change what is asked; rows and the model's
# fingerprint are compared instead.
_PLACES = {
    "task": ("data_dir",),
    "model": ("path", "revision", "device_map"),
    "method": ("keep_noise",),
}


def identity(values: Mapping[str, Any]) -> str:
    """Return what runs of one cell and seed have in common: a digest without paths and devices."""
    return digest(stripped(values)) + f" {values.get('steps')}"


def stripped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without what may differ between equal experiments; eval_every a number."""
    kept = {key: value for key, value in values.items() if key != "device"}
    if isinstance(steps := kept.get("steps"), int) and steps and not kept.get("eval_every", ...):
        kept["eval_every"] = usual_eval_every(steps)
    model = values.get("model")
    masked = isinstance(model, Mapping) and model.get("family") == "masked"
    # Prompts for the other family of models are never asked.
    other = "prompts" if masked else "masked"
    for group, dropped in (_PLACES | {"task": (*_PLACES["task"], other)}).items():
        given = kept.get(group)
        if not isinstance(given, Mapping):
            continue
        node = {k: v for k, v in given.items() if k not in dropped}
        if group == "task" and isinstance(parts := node.get("nodes"), Mapping):
            node.pop("parts", None)  # as they were written; the nodes are what they stand for
            node["nodes"] = {
                name: {k: v for k, v in part.items() if k not in dropped}
                for name, part in parts.items()
            }
        if group == "method" and node.get("executor") in ("sequential", "lockstep"):
            node["executor"] = "auto"  # the same numbers
        if group == "model" and node.get("attention") == "auto":
            node["attention"] = "sdpa"  # the same numbers
        kept[group] = node
    return kept


def dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting by its dotted key; an empty mapping is a value."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values that :func:`identity` compares."""
    for key, value in dotted(without_later_keys(stripped(values))):
        if key.partition(".")[0] not in NOT_IN_DIGEST and value != {}:
            yield key, value


def differences(its: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    """Return a line for each setting in which two runs differ."""
    keys = [key for key in {**ours, **its} if its.get(key) != ours.get(key)]
    before = {key: ADDED_LATER.get(key.rpartition(".")[2]) for key in keys}
    return [
        f"{key}={its.get(key, before[key])} where the table has {ours.get(key, before[key])}"
        for key in keys
    ]


def version(run: Run) -> str:
    """Return the version of smezo and of its arithmetic, with which numbers may change."""
    versions = run.result.get("versions") or {}
    numerics = versions.get("numerics")
    return f"{versions.get('smezo')}" + ("" if numerics is None else f", numerics {numerics}")
