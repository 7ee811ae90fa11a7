"""Check the words KEY=VALUE of a command line against the groups and settings that there are."""

import difflib
import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smezo_cli.config import search, sweep
from smezo_cli.config.combinations import lacks
from smezo_cli.config.composer import Composer
from smezo_cli.config.fixed import OPTIONAL_SETTINGS, sentence, usual
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError, meant, near
from smezo_cli.zo.ranges import shown

# What is said to somebody who gives a file, a folder or a hub id as the choice of a group.
_OF_A_PATH = {
    "task": "; for a file of your own: task=classification task.data=FILE (or choice, generation)",
    "model": "; for a folder or an id of the hub: model=own model.path=PATH",
}

_PARAMS = "hydra.sweeper.params."  # the ranges of a file

_MANY = 40  # names, from which a command that lists them is shown in their place


def values_of(override: Any, multirun: bool, is_search: bool) -> list[str]:
    """Return an override as one line for each of its values; of an interval, for both ends."""
    text = override.input_line
    if not override.is_sweep_override():
        return [text]
    if not multirun:
        raise UserError(
            f"{text} names several values: add -m to run each of them, or write "
            f"{override.get_key_element()}=[...] for a list."
        )
    if not override.is_discrete_sweep():
        if not is_search:
            raise UserError(
                f"{text}: an interval is what a search chooses from: add hydra/sweeper=optuna, or "
                "name the values."
            )
        return search.ends_of(override)
    from hydra.errors import HydraException

    key = override.get_key_element()
    try:
        lines = [f"{key}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise UserError(f"cannot read {shlex.quote(text)}: {sentence(error)}.") from error
    if not lines:
        raise UserError(f"{text} names no value at all.")
    return lines


def check_params(override: Any) -> None:
    """Refuse hydra.sweeper.params.KEY=RANGE: Hydra reads it as a sweep of its own key."""
    key = override.key_or_group.removeprefix(_PARAMS)
    if override.is_sweep_override() and key != override.key_or_group:
        text = override.input_line
        word = shlex.quote(f"{key}={text.partition('=')[2]}")
        raise UserError(f"{text}: on the line the range of {key} is given to {key}: write {word}.")


def check_choice(composer: Composer, override: Any) -> None:
    """Refuse the choice of a group that is left empty, or that no file is named after."""
    group = override.key_or_group
    if override.is_delete() or (not override.is_sweep_override() and override.value() is None):
        if group in ("task", "model", "method", "logger"):
            example = usual(group) or composer.options(group)[0]
            raise UserError(f"{group} must be chosen, for example {group}={example}.")
        if not override.is_delete():
            raise UserError(f"{group}=null: leave the group out by ~{group}.")
        return
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: of {group} there is no interval.")
        chosen = [str(value) for value in override.sweep_string_iterator()]
    else:
        value = override.value()
        chosen = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    for choice in chosen:
        folder, _, name = choice.removesuffix(".yaml").rpartition("/")
        options = composer.options(f"{group}/{folder}".rstrip("/"))
        if name in sweep.INSTALL and name not in options and group == "hydra/launcher":
            raise UserError(
                f"{group}={choice} needs a package that is not installed: "
                f"python -m pip install {sweep.INSTALL[name]}."
            )
        if (group == "hydra/sweeper" and name in (search.NAME, search.FILE)) or (
            group == "hydra/sweeper/sampler"
        ):
            search.check_installed(group, name)
        if name not in options:
            known = near(name, options)
            if len(options) > _MANY:
                known = f"{meant(name, options)} (smezo ls {group}s lists all {len(options)})"
            own = _OF_A_PATH.get(group, "") if "/" in choice or Path(choice).exists() else ""
            raise UserError(f"{group}={choice}: there is no such {group}{known}{own}.")


def check_keys(composer: Composer, overrides: Sequence[Any], chosen: Sequence[str]) -> None:
    """Refuse keys that the chosen task, model and method do not have."""
    base = composer.compose(chosen, with_hydra=True)
    for override in overrides:
        _check_key(composer, override, base, chosen)


def _check_key(composer: Composer, override: Any, base: DictConfig, chosen: Sequence[str]) -> None:
    key = override.key_or_group
    if override.is_add() or override.is_force_add():
        return  # what is new at the top is refused later, inside a node by build()
    if _has(_plain(base), key):
        return
    group = "method" if key in OPTIONAL_SETTINGS else key.partition(".")[0]
    if group in base and group in composer.groups() and group != "hydra":
        others = [
            option
            for option in composer.options(group)
            if _offers(composer, group, option, key, chosen)
        ]
        if others and group == "method":
            raise UserError(lacks(key, base.method.name, others))
        if others:
            # Keys that any model takes and few files name.
            is_free = key in ("model.bos_token", "model.quantization")
            more = f"; with a plus any model takes it: +{override.input_line}" if is_free else ""
            raise UserError(
                f"{group} {base[group].get('name')} has no {key}; {', '.join(others)} "
                f"{'has' if len(others) == 1 else 'have'}{more}."
            )
    paths = list(_paths(_unresolved(base)))
    word = key.rpartition(".")[2]
    same = [path for path in paths if path.rpartition(".")[2] == word]
    close = same[:3] or difflib.get_close_matches(key, paths, n=2, cutoff=0.65)
    if not close and (far := _elsewhere(composer, key, chosen)):
        close = [far]
    hint = f", did you mean {' or '.join(close)}?" if close else ""
    parent = key.rpartition(".")[0]
    inside = [p for p in paths if p.rpartition(".")[0] == parent] or [
        p for p in paths if "." not in p
    ]
    inside = [path for path in inside if not path.endswith("._target_")]  # nobody's to set
    node = OmegaConf.select(base, parent) if parent else None
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    # Ours by their class alone: the line must stay one that is read.
    owner = re.sub(r"^smezo_cli\..*\.", "", str(target))
    more = f"; another argument of {owner}: +{override.input_line}" if target else ""
    raise UserError(f"there is no setting {key}{hint} (there are: {', '.join(inside)}){more}.")


def _elsewhere(composer: Composer, key: str, chosen: Sequence[str]) -> str:
    """Return the key inside a group that other choices of it have, and these; "" if none has."""
    for group in ("task", "model", "method") if "." not in key else ():
        inside = f"{group}.{key}"
        options = composer.options(group)
        if found := [one for one in options if _offers(composer, group, one, inside, chosen)]:
            return f"{inside} (with {group}={' or '.join(found[:3])})"
    return ""


def check_deleted(composer: Composer, keys: Sequence[Any], lines: Sequence[str]) -> None:
    """Refuse a key that ~ takes out of the settings although it is needed."""
    deleted = [override.input_line for override in keys if override.is_delete()]
    others = [line for line in lines if line not in deleted]
    for line in deleted:
        key = line[1:].partition("=")[0]
        try:
            base = composer.compose(others)
            check(base)
        except UserError:
            return  # something else is wrong, too
        try:
            check(composer.compose([*others, line]))
        except UserError as error:
            value: Any = OmegaConf.to_container(base, resolve=False)
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            is_plain = not isinstance(value, dict | list) and "${" not in str(value)
            example = f", or set it: {key}={shown(value)}" if is_plain else ""
            raise UserError(
                f"{line} takes {key} out, which is needed: leave {line} out{example}."
            ) from error


def _with_choice(composer: Composer, group: str, option: str, chosen: Sequence[str]) -> DictConfig:
    kept = [
        line for line in chosen if line.partition("=")[0].partition("/")[0] not in (group, "recipe")
    ]
    return composer.compose([*kept, f"{group}={option}"])


def _offers(composer: Composer, group: str, option: str, key: str, chosen: Sequence[str]) -> bool:
    """Return whether a choice has a key, and is to be named for it."""
    parts = composer.parts_of(group, option)
    if parts is None:
        parts = [_plain(_with_choice(composer, group, option, chosen))]
    # Variants with an adapter are named for the keys of adapters alone.
    has_adapter = any("adapter" in (part.get(group) or ()) for part in parts)
    is_named = not has_adapter or key.startswith("method.adapter")
    return is_named and any(_has(part, key) for part in parts)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def _unresolved(cfg: DictConfig) -> dict[str, Any]:
    tree = _plain(cfg)
    tree.pop("hydra", None)
    return tree


def _has(node: object, key: str) -> bool:
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, dict):
            names = {str(name): value for name, value in node.items()}
            if part not in names:
                return False
            node = names[part]
        elif isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                return False
            node = node[int(part)]
        else:
            # Into an interpolation or ??? one cannot look; a plain value has nothing inside.
            return isinstance(node, str) and (node.startswith("${") or node == "???")
    return True


def _paths(node: object, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from _paths(value, f"{prefix}{name}.")
