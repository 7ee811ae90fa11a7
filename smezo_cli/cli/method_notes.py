"""Say of a method what its file does not: what a step does, its cost, its state, its source."""

import inspect
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.config.method_keys import describe

#: Forwards, state, cost and source of each method; scripts/methods_page.py writes it.
COSTS = Path(__file__).parent / "method_costs.json"
#: Points of each method less MeZO's, with their error, by bed; scripts/arena_page.py writes it.
ARENA = Path(__file__).parent / "arena.json"
_TABLE = CONF_DIR / "table" / "arena" / "1.yaml"


def notes(name: str, files: Mapping[str, Path]) -> Iterator[str]:
    """Yield the lines on a method: formula, forwards, state, cost and source, as far as known.

    Args:
        name: of the method.
        files: all methods' files by name; one may begin with the keys of another.
    """
    found = describe({"_target_": _target(name, files)})
    costs = json.loads(COSTS.read_text(encoding="utf-8"))
    known = costs["methods"].get(name)
    if found is not None and found.doc:
        yield ""
        yield "What a step does:"
        yield from (f"  {line}" for line in about(found.doc).splitlines())
    compared = list(against_mezo(name))
    if known is not None or compared:
        yield ""
    if known is not None:
        yield from _cost(known, costs["measured"])
    yield from compared


def _cost(known: Mapping[str, Any], measured: str) -> Iterator[str]:
    yield f"Forwards a step: {known['forwards']}"
    yield f"State: {known['state']} bytes a trained weight, on a network of two small layers"
    if known["cost"] is not None:
        yield (
            f"Cost: a step takes {known['cost']:.2f} times its forwards, and "
            f"{known['peak']:.2f} times the memory of one ({measured})"
        )
    if known["source"]:
        yield f"Source: {known['source']}"


def against_mezo(name: str) -> Iterator[str]:
    """Yield what papers print of a method against MeZO, and what the arena has measured."""
    rows = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))["rows"]
    of_method = {
        row: node for row, node in rows.items() if f"method={name}" in shlex.split(node["command"])
    }
    if not of_method:
        return
    for row, node in of_method.items():
        if "claim" in node:
            yield f"In print, {row}: {node['claim']}"
    plain = min(of_method, key=lambda row: len(shlex.split(of_method[row]["command"])))
    measured = json.loads(ARENA.read_text(encoding="utf-8"))["methods"].get(name, {})
    against = {bed: found for bed, found in measured.items() if found != [0.0, 0.0]}
    if against:
        beds = ", ".join(f"{x:+.1f} +- {error:.1f} on {bed}" for bed, (x, error) in against.items())
        yield f"In the arena (docs/results/arena.md), {plain}: points over MeZO {beds}"
    elif not measured:
        yield f"In the arena (docs/results/arena.md), {plain}: not run yet"


def about(doc: str) -> str:
    """Return the docstring of a method's class up to its arguments, without markup."""
    text = re.split(r"\n(?:Args|Raises|Attributes):", inspect.cleandoc(doc))[0]
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`").strip()


def _target(name: str, files: Mapping[str, Path]) -> Any:
    """Return the class that a method's file names, or the file that it begins with."""
    while name in files:
        node = yaml.safe_load(files[name].read_text(encoding="utf-8")) or {}
        target = (node.get("method") or {}).get("_target_")
        others = [word for word in node.get("defaults", ()) if word != "_self_"]
        if target is not None or not others:
            return target
        name = others[0]
    return None
