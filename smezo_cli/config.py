"""From a command line to a run: read it, check it before anything heavy loads, let Hydra launch it.

Hydra composes (conf/train.yaml says in which order). The checks are ours, so that every mistake is
one sentence and exit code 2, in a sweep before its first run.
"""

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import itertools
import os
import pkgutil
import re
import shlex
import shutil
import signal
import string
import sys
import tempfile
import textwrap
import traceback
import typing
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smezo_cli import fork, searchpath, sweep
from smezo_cli.errors import UserError, near, redacted
from smezo_cli.machine import process, streams, torchrun
from smezo_cli.searchpath import SearchPath
from smezo_cli.settings import (
    CONF_DIR,
    INSTALL_TENSORBOARD,
    KNOBS,
    Settings,
    check,
    check_spelling,
    check_target,
    digest,
    lacks,
    plain,
    sentence,
    shown,
)
from smezo_cli.words import quoted

__all__ = [
    "CONF_DIR",
    "Settings",
    "build",
    "check",
    "command",
    "compose",
    "compose_and_say",
    "digest",
    "grid",
    "launch",
    "near",
    "prepare",
    "recipes",
]

_MIN_FREE_BYTES = 256 * 2**20
_VERSION_BASE = "1.3"
# Hydra's parser is slow on what nobody types: seconds for a thousand brackets.
_LONGEST_WORD, _MOST_BRACKETS = 8000, 200


# --- objects from nodes ----------------------------------------------------------------------


def build(node: Mapping[str, Any], key: str = "method", /, **runtime: Any) -> Any:
    """Call the `_target_` of a node with its other keys and what it takes of `runtime`.

    A nested node with a `_target_` becomes a `functools.partial` of its target. The key `name` is
    ours unless the target takes it, and so are `method.adapter` and the `method.objective` of a
    zeroth-order method. `key` is where the node sits, for messages. Targets spell their arguments
    out: there is no check through `**keywords`.

    Raises:
        UserError: a target that is not allowed or not found, a key it does not take, one it needs,
            or its own ValueError.
    """
    values = plain(node)
    target = target_of(values, key)
    parameters = _signature(target)
    given = _keywords(values, key, target, runtime)
    given |= {name: value for name, value in runtime.items() if name in parameters}
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise UserError(f"{key}.{name} is needed by {values['_target_']}: add {key}.{name}=...")
    try:
        return target(**given)
    except ValueError as error:
        raise UserError(f"{key}: {error}.") from error


def target_of(node: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """The class that the `_target_` of a node names: a method of smezo, an optimizer of torch.

    A name leads to a module that is listed in one of the two packages and to a class in it, never
    through what a module has imported, so that settings from elsewhere run no code but these.

    Raises:
        UserError: the name leads to anything else.
    """
    name = check_target(node, key)
    package = importlib.import_module(".".join(name.split(".")[:2]))
    *inside, word = name.split(".")[2:]
    module = package
    if inside:
        known = [found.name for found in pkgutil.iter_modules(package.__path__)]
        if inside[0] not in known:
            raise UserError(f"{key}._target_={name} is not there{near(inside[0], known)}.")
        module = importlib.import_module(f"{package.__name__}.{inside[0]}")
    target = vars(module).get(word)
    if target is None:
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(f"{key}._target_={name} is not there{near(word, classes)}.")
    if package.__name__ == "torch.optim":
        from torch.optim import Optimizer

        allowed = inspect.isclass(target) and issubclass(target, Optimizer)
    else:
        allowed = inspect.isclass(target) and target.__module__ == module.__name__
    if not allowed:
        what = "class" if inspect.isclass(target) else type(target).__name__
        raise UserError(
            f"{key}._target_={name} is a {what} and neither a method of smezo_cli.methods nor an "
            "optimizer of torch.optim, the only ones allowed."
        )
    return typing.cast(Callable[..., Any], target)


def _keywords(
    node: Mapping[str, Any], key: str, target: Callable[..., Any], runtime: Collection[str] = ()
) -> dict[str, Any]:
    parameters = _signature(target)
    taken = [name for name in parameters if name not in runtime]
    keywords: dict[str, Any] = {}
    for name, value in node.items():
        if name == "_target_" or (name == "name" and name not in parameters):
            continue
        if f"{key}.{name}" == "method.adapter":  # is in the model already
            continue
        if f"{key}.{name}" == "method.objective" and _compares_losses(target):  # the scorer's
            continue
        if name not in taken:
            raise UserError(f"{key} takes no {name}{near(name, taken)}.")
        if isinstance(value, Mapping) and "_target_" in value:
            inner = target_of(value, f"{key}.{name}")
            value = partial(inner, **_keywords(value, f"{key}.{name}", inner))
        keywords[name] = value
    return keywords


def _compares_losses(target: Callable[..., Any]) -> bool:
    """Is it a method that asks for no gradient, so that any figure may be its objective?"""
    from smezo_cli.zo.optimizer import ZeroOrder

    return inspect.isclass(target) and issubclass(target, ZeroOrder)


def _signature(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target).parameters


# --- the command line ------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A command line that was read: Hydra's flags first, then KEY=VALUE.

    `config_dir` and `hydra.searchpath` are in `search` alone.
    """

    flags: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    search: SearchPath = field(default_factory=SearchPath)
    multirun: bool = False
    package: str | None = None  # the node alone that --cfg shows
    starts_runs: bool = True  # not so with --help, --cfg and the like
    composes: bool = True  # not so with --version, a bare --help and the like
    launcher: str = "basic"  # what starts the jobs of a sweep; known once it is composed
    replaced: tuple[str, ...] = ()  # whose files are read; known then, too


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; smezo train --help shows the flags.")


def _read(argv: Sequence[str]) -> Request:
    parser = _Flags(prog="smezo train", add_help=False, allow_abbrev=False)
    alone = {
        "help": ("--help", "-h"),
        "hydra_help": ("--hydra-help",),
        "version": ("--version",),
        "shell_completion": ("--shell-completion", "-sc"),
        "run": ("--run", "-r"),
        "multirun": ("--multirun", "-m"),
        "resolve": ("--resolve",),
    }
    for name, spellings in alone.items():
        parser.add_argument(*spellings, dest=name, action="store_true")
    infos = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=infos)
    parser.add_argument("--package", "-p")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("overrides", nargs="*")
    # Intermixed, so that KEY=VALUE may stand on both sides of a flag.
    known, unknown = parser.parse_known_intermixed_args(_with_info(argv))
    if unknown:
        usual = [*itertools.chain(*alone.values()), "--cfg", "--info", "--package", "--config-dir"]
        raise UserError(f"unknown flag {unknown[0]}{near(unknown[0], usual)}.")
    acts = ("run", "multirun", "cfg", "info", "shell_completion")
    asked = [name for name in acts if getattr(known, name)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} exclude each other: give one of them.")
    if known.resolve and not (known.cfg or known.help):
        raise UserError("--resolve goes with --cfg job or --help.")
    if known.package is not None and not known.cfg:
        raise UserError("--package goes with --cfg job.")
    flags = [alone[name][0] for name in alone if getattr(known, name)]
    for name in ("cfg", "info", "package"):
        if getattr(known, name) is not None:
            flags.append(f"--{name}={getattr(known, name)}")
    silent = known.hydra_help or known.version or known.shell_completion
    # --help alone: nothing to check, and Hydra composes once more anyway.
    silent = silent or (known.help and len(argv) == 1)
    search, overrides = _searched(known.overrides, known.config_dir)
    return Request(
        flags=tuple(flags),
        overrides=tuple(overrides),
        search=search,
        multirun=known.multirun,
        package=known.package,
        starts_runs=not (silent or known.help or known.cfg or known.info),
        composes=not (silent or (known.help and not known.overrides)),
    )


def _searched(words: Sequence[str], config_dir: str | None) -> tuple[SearchPath, list[str]]:
    """The folders that settings are read from, and the words that do not name one."""
    overrides, given = list(map(quoted, words)), list[Any]()
    for word in [w for w in overrides if w.partition("=")[0] == "hydra.searchpath"]:
        try:
            value = _parsed(word).value()
        except Exception as error:  # Hydra's, and what its parser lets through
            raise UserError(f"cannot read {shlex.quote(word)}: {sentence(error)}.") from error
        given = value if isinstance(value, list) else [] if value is None else [value]
        overrides.remove(word)
    return searchpath.of_line(config_dir, given), overrides


def _parsed(text: str, loader: Any = None) -> Any:
    """A word of the line as Hydra's parser reads it.

    Raises:
        UserError: it is longer than anybody types.
        Exception: Hydra's, and what its parser lets through.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if len(text) > _LONGEST_WORD or sum(map(text.count, "([{")) > _MOST_BRACKETS:
        raise UserError(
            f"{text[:60]}... has more than {_LONGEST_WORD} characters or {_MOST_BRACKETS} "
            "brackets: put it into a file of --config-dir."
        )
    return OverridesParser.create(loader).parse_overrides([text])[0]


def _with_info(argv: Sequence[str]) -> list[str]:
    """A bare --info before KEY=VALUE would swallow it."""
    words = list(argv)
    for at, word in enumerate(words):
        if word in ("--info", "-i") and "=" in "".join(words[at + 1 : at + 2]):
            words[at] = "--info=all"
    return words


def prepare(argv: Sequence[str]) -> Request:
    """Read a command line of `smezo train` and check all that can be checked without torch.

    In a sweep every value is checked: each combination of groups, and in it each value of each
    other setting with the rest at their first.

    Raises:
        UserError: the first mistake found.
    """
    request = _read(argv)
    if not request.composes:
        return request
    folders: set[Path] = set()
    with _Composer(request.search) as composer:
        for _, settings in composer.every(request):
            folders.add(Path(settings.runs_dir) / settings.name)
            if request.starts_runs and settings.logger["name"] == "tensorboard":
                _check_tensorboard()
        request = replace(
            request, launcher=composer.launcher, replaced=tuple(dict.fromkeys(composer.replaced))
        )
    if request.starts_runs:
        for folder in sorted(folders):
            _check_writable(folder)
    return request


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """The settings of one run, checked, as `smezo train OVERRIDES` has them."""
    return compose_and_say(overrides, config_dir, lambda line: None)


def compose_and_say(
    overrides: Sequence[str], config_dir: str | None, say: Callable[[str], object]
) -> DictConfig:
    """As :func:`compose`; says whose files are read where the user's replace smezo's own."""
    search, overrides = _searched(overrides, config_dir)
    with _Composer(search) as composer:
        request = Request(overrides=tuple(overrides), search=search)
        cfg = next(cfg for cfg, _ in composer.every(request))
        for line in composer.replaced:
            say(line)
        return cfg


def grid(words: Sequence[str]) -> tuple[DictConfig, dict[str, list[Any]]]:
    """The checked settings of the first job of a sweep, and the values of each key swept over.

    Raises:
        UserError: a mistake in the words, or a config group that is swept over.
    """
    with _Composer() as composer:
        return composer.grid(words)


def _help(request: Request) -> str:
    """The help text: what may be chosen, and conf/train.yaml (with KEY=VALUE: what they give).

    From the files, because Hydra takes seconds to list a hundred of them.
    """
    roots = request.search.roots
    node = yaml.safe_load((CONF_DIR / "hydra" / "smezo.yaml").read_text(encoding="utf-8"))
    groups = []
    for group in sorted({d.name for root in roots for d in root.iterdir() if d.is_dir()}):
        if group not in ("hydra", "recipe", "table"):
            names = sorted({f.stem for root in roots for f in (root / group).glob("*.yaml")})
            line = f"{group}: {', '.join(names)}"
            groups.append(textwrap.fill(line, 110, subsequent_indent=" " * (len(group) + 2)))
    if request.overrides:
        with _Composer(request.search) as composer:
            cfg = next(cfg for cfg, _ in composer.every(request))
        settings = OmegaConf.to_yaml(cfg, resolve="--resolve" in request.flags)
    else:
        file = request.search.primary or CONF_DIR / "train.yaml"
        text = file.read_text(encoding="utf-8")
        settings = text.partition("hydra: smezo\n\n")[2] or text
    return string.Template(node["help"]["template"]).substitute(
        APP_CONFIG_GROUPS="\n".join(groups), CONFIG=settings
    )


class _Composer:
    """Hydra's composition with our messages; a context, because Hydra keeps one global."""

    def __init__(self, search: SearchPath | None = None) -> None:
        self.search = search or SearchPath()
        self.launcher = "basic"  # of the command line that was last checked
        self.replaced: list[str] = []  # whose files it reads

    def __enter__(self) -> "_Composer":
        from hydra.core.global_hydra import GlobalHydra

        self._hydra = self.search.initialized()
        self._hydra.__enter__()
        self._loader = GlobalHydra.instance().config_loader()
        self._lists: dict[tuple[str, str], list[str]] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._hydra.__exit__(None, None, None)

    def compose(self, overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
        """Compose, with or without Hydra's own node; its errors become sentences."""
        import hydra

        try:
            return hydra.compose("train", list(overrides), return_hydra_config=with_hydra)
        except Exception as error:  # Hydra and its parsers raise anything for a malformed file
            raise UserError(sentence(error)) from error

    def options(self, group: str) -> list[str]:
        """The choices of a group."""
        return self._listed(group, "CONFIG")

    def _below(self, group: str) -> list[str]:
        return [group, *(f"{group}/{inner}" for inner in self.groups(group))]

    def groups(self, parent: str = "") -> list[str]:
        """The groups inside a group; "" is the top."""
        return self._listed(parent, "GROUP")

    def _listed(self, parent: str, kind: str) -> list[str]:
        """Hydra takes milliseconds to list a folder, and each word of the line asks."""
        from hydra.core.object_type import ObjectType

        if (parent, kind) not in self._lists:
            found = self._loader.get_group_options(parent, ObjectType[kind])
            self._lists[parent, kind] = sorted(found)
        return self._lists[parent, kind]

    def every(self, request: Request) -> Iterator[tuple[DictConfig, Settings]]:
        """Check the runs that a command line asks for."""
        if self.search.folders:
            self.search.check([group for top in self.groups() for group in self._below(top)])
        try:
            yield from self._every(request)
        except UserError as error:
            if (file := self.search.primary) is None:
                raise
            raise UserError(
                f"{str(error).rstrip('.')}; {file} is read in place of smezo's own train.yaml, so "
                "it must be whole; settings alone go into a file of the group experiment."
            ) from error

    def _every(self, request: Request) -> Iterator[tuple[DictConfig, Settings]]:
        overrides = [self._parse(text) for text in request.overrides]
        multirun, swept = self._asked_by_experiment(overrides)
        multirun = multirun or request.multirun
        if swept and not multirun:
            raise UserError(f"the experiment sweeps over {', '.join(swept)}: add -m to run it.")
        overrides += [self._parse(line) for line in swept]
        groups = [override for override in overrides if self._is_group(override)]
        keys = [override for override in overrides if override not in groups]
        for override in groups:
            self._check_choice(override)
        of_launcher = [o for o in overrides if _is_of_launcher(o.key_or_group)]
        if of_launcher and request.starts_runs and not multirun:
            raise UserError(
                f"{of_launcher[0].input_line}: a launcher starts the jobs of a sweep; add -m."
            )
        choices = [self._values(override, multirun) for override in groups]
        values = [self._values(override, multirun) for override in keys]
        for line in itertools.chain(*values):
            override = self._parse(line)
            if not override.is_delete():
                check_spelling(override.key_or_group, line.partition("=")[2], override.value())
        first = [lines[0] for lines in values if lines]
        touches_hydra = bool(self.search.folders) or any(
            override.key_or_group.startswith("hydra") for override in overrides
        )
        asked = self._launcher_asked(of_launcher) if touches_hydra else None
        for chosen in itertools.product(*choices):
            try:
                cfg = self.compose([*chosen, *first])
            except UserError:
                self._check_keys(keys, chosen)  # says more of a key that is not there
                self._check_deleted(keys, [*chosen, *first])
                raise
            if len(first) < len(keys):
                self._check_keys(keys, chosen)  # of an interval, no value was composed
            if touches_hydra:
                whole = self.compose([*chosen, *first], with_hydra=True)
                _check_hydra(whole)
                if _launcher_of(whole) != asked:
                    raise UserError(
                        "hydra.launcher is set by a file: launchers start programs, so they are "
                        "chosen on the command line: hydra/launcher=NAME hydra.launcher.KEY=VALUE."
                    )
                choices_made = whole.hydra.runtime.choices
                self.launcher = str(choices_made["hydra/launcher"])
                self.replaced += searchpath.replaced(self.search, choices_made)
            try:
                settings = check(cfg)
            except UserError:
                self._check_deleted(keys, [*chosen, *first])
                raise
            yield cfg, settings
            for at, lines in enumerate(filter(None, values)):
                for line in lines[1:]:
                    override = self._parse(line)
                    if isinstance(override.value(), dict | list):  # would be merged with the first
                        other = self.compose([*chosen, *first[:at], line, *first[at + 1 :]])
                    else:
                        other, key = cfg.copy(), override.key_or_group
                        OmegaConf.update(other, key, override.value(), force_add=True)
                    yield other, check(other)

    def _launcher_asked(self, given: Sequence[Any]) -> Any:
        """The launcher as the command line alone has it; None where a file must be its source."""
        self.__exit__()  # of Hydra there is one
        try:
            with _Composer() as own:
                return _launcher_of(own.compose([o.input_line for o in given], with_hydra=True))
        except UserError:
            return None
        finally:
            self.__enter__()

    def grid(self, words: Sequence[str]) -> tuple[DictConfig, dict[str, list[Any]]]:
        """See :func:`grid`."""
        overrides = [self._parse(quoted(word)) for word in words]
        _, swept = self._asked_by_experiment(overrides)
        overrides += [self._parse(line) for line in swept]
        first, values = [], {}
        for override in overrides:
            lines = self._values(override, True)
            is_group = self._is_group(override)
            if is_group:
                self._check_choice(override)
            if not lines or (is_group and len(lines) > 1):
                raise UserError(f"{override.input_line}: a cell of a table takes one of these.")
            if len(lines) > 1:
                key = override.key_or_group
                values[key] = [self._parse(line).value() for line in lines]
            first.append(lines[0])
        cfg = self.compose(first)
        check(cfg)
        return cfg, values

    def _asked_by_experiment(self, overrides: Sequence[Any]) -> tuple[bool, list[str]]:
        """Is a sweep asked for by hydra.mode or an experiment, and over what (KEY=VALUES)?"""
        asking = [o for o in overrides if o.key_or_group in ("hydra.mode", "experiment")]
        if any(o.is_sweep_override() for o in asking) or not asking:
            return False, []
        for override in asking:
            if override.key_or_group == "experiment":
                self._check_choice(override)
        node = self.compose([o.input_line for o in asking], with_hydra=True).hydra
        given = {o.key_or_group for o in overrides}
        try:
            swept = {k: v for k, v in (node.sweeper.params or {}).items() if k not in given}
            return str(node.mode).endswith("MULTIRUN"), [f"{k}={v}" for k, v in swept.items()]
        except OmegaConfBaseException as error:
            asked = " ".join(o.input_line for o in asking)
            said = str(error).splitlines()[0]
            raise UserError(
                f"{asked}: hydra.mode and hydra.sweeper.params cannot be read ({said}); write "
                "MULTIRUN or RUN, and values."
            ) from error

    def _parse(self, text: str) -> Any:
        try:
            override = _parsed(text, self._loader)
        except UserError:
            raise
        except Exception as error:  # HydraException, and what Hydra's parser lets through
            raise UserError(self._unreadable(text, sentence(error))) from error
        if not override.key_or_group:
            raise UserError(self._unreadable(text, "the key is missing"))
        return override

    def _unreadable(self, text: str, why: str) -> str:
        key, equals, value = text.partition("=")
        if equals and not key.isascii():
            group = re.match(r"[+]*([\w.]*)\.", key, re.ASCII)
            name = key[group.end() :] if group else "KEY"
            written = f"{group[1]}={{{name}: {value}}}" if group else f"GROUP={{KEY: {value}}}"
            return f"cannot read {shlex.quote(text)}: write {shlex.quote(written)}."
        for sign in value:  # of a keyboard that writes wide ones
            narrow = unicodedata.normalize("NFKC", sign)
            if sign != narrow and narrow in ":,{}[]":
                why = f"{sign} is a letter here, and what parts keys and values is {narrow}"
        if equals:
            return f"cannot read {shlex.quote(text)}: {why}; quote values with blanks or brackets."
        homes = [f"{group}={text}" for group in self.groups() if text in self.options(group)]
        hint = f"; did you mean {homes[0]}?" if homes else ", such as steps=150."
        return f"{shlex.quote(text)} is not of the form KEY=VALUE{hint}"

    def _values(self, override: Any, multirun: bool) -> list[str]:
        """The override once for each of its values."""
        text = override.input_line
        if not override.is_sweep_override():
            return [text]
        if not multirun:
            raise UserError(
                f"{text} names several values: add -m to run each of them, or write "
                f"{override.get_key_element()}=[...] for a list."
            )
        if not override.is_discrete_sweep():
            return []  # an interval: what it stands for is the sweeper's affair
        from hydra.errors import HydraException

        key = override.get_key_element()
        try:
            lines = [f"{key}={value}" for value in override.sweep_string_iterator()]
        except HydraException as error:
            raise UserError(f"cannot read {shlex.quote(text)}: {sentence(error)}.") from error
        if not lines:
            raise UserError(f"{text} names no value at all.")
        return lines

    def _is_group(self, override: Any) -> bool:
        key = override.key_or_group
        parent, _, name = key.rpartition("/")
        if name in self.groups(parent):
            return True
        if "/" in key:
            known = [f"{parent}/{group}" for group in self.groups(parent)] or self.groups()
            raise UserError(f"there is no config group {key}{near(key, known)}.")
        return False

    def _check_choice(self, override: Any) -> None:
        group = override.key_or_group
        if override.is_delete() or (not override.is_sweep_override() and override.value() is None):
            if group in ("task", "model", "method", "logger"):
                example = self.options(group)[0]
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
            options = self.options(f"{group}/{folder}".rstrip("/"))
            if name in sweep.INSTALL and name not in options and group == "hydra/launcher":
                raise UserError(
                    f"{group}={choice} needs a package that is not installed: "
                    f"python -m pip install {sweep.INSTALL[name]}."
                )
            if name not in options:
                raise UserError(f"{group}={choice}: there is no such {group}{near(name, options)}.")

    def _check_keys(self, overrides: Sequence[Any], chosen: Sequence[str]) -> None:
        base = self.compose(chosen, with_hydra=True)
        for override in overrides:
            self._check_key(override, base, chosen)

    def _check_key(self, override: Any, base: DictConfig, chosen: Sequence[str]) -> None:
        """Refuse a key that the chosen task, model and method do not have."""
        key = override.key_or_group
        if override.is_add() or override.is_force_add():
            return  # what is new at the top is refused later, inside a node by build()
        if _has(base, key):
            return
        group = "method" if key in KNOBS else key.partition(".")[0]
        if group in base and group in self.groups() and group != "hydra":
            others = [
                option
                for option in self.options(group)
                if _has(cfg := self._with_choice(group, option, chosen), key)
                # Variants with an adapter are named for the keys of adapters alone.
                and ("adapter" not in cfg[group] or key.startswith("method.adapter"))
            ]
            if others and group == "method":
                raise UserError(lacks(key, base.method.name, others))
            if others:
                # Keys that any model takes and few files name.
                is_free = key in ("model.bos_token", "model.quantization")
                more = (
                    f"; with a plus any model takes it: +{override.input_line}" if is_free else ""
                )
                raise UserError(
                    f"{group} {base[group].get('name')} has no {key}; {', '.join(others)} "
                    f"{'has' if len(others) == 1 else 'have'}{more}."
                )
        paths = list(_paths(_unresolved(base)))
        word = key.rpartition(".")[2]
        same = [path for path in paths if path.rpartition(".")[2] == word]
        close = same[:3] or difflib.get_close_matches(key, paths, n=2, cutoff=0.65)
        hint = f", did you mean {' or '.join(close)}?" if close else ""
        parent = key.rpartition(".")[0]
        inside = [p for p in paths if p.rpartition(".")[0] == parent] or [
            p for p in paths if "." not in p
        ]
        node = OmegaConf.select(base, parent) if parent else None
        target = node.get("_target_") if isinstance(node, DictConfig) else None
        # Ours by their class alone: the line must stay one that is read.
        owner = re.sub(r"^smezo_cli\..*\.", "", str(target))
        more = f"; another argument of {owner}: +{override.input_line}" if target else ""
        raise UserError(f"there is no setting {key}{hint} (there are: {', '.join(inside)}){more}.")

    def _check_deleted(self, keys: Sequence[Any], lines: Sequence[str]) -> None:
        """Refuse a key that ~ takes out of the settings, where it is that what they lack."""
        deleted = [override.input_line for override in keys if override.is_delete()]
        others = [line for line in lines if line not in deleted]
        for line in deleted:
            key = line[1:].partition("=")[0]
            try:
                base = self.compose(others)
                check(base)
            except UserError:
                return  # something else is wrong, too
            try:
                check(self.compose([*others, line]))
            except UserError as error:
                value: Any = OmegaConf.to_container(base, resolve=False)
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                is_plain = not isinstance(value, dict | list) and "${" not in str(value)
                example = f", or set it: {key}={shown(value)}" if is_plain else ""
                raise UserError(
                    f"{line} takes {key} out, which is needed: leave {line} out{example}."
                ) from error

    def _with_choice(self, group: str, option: str, chosen: Sequence[str]) -> DictConfig:
        kept = [
            line
            for line in chosen
            if line.partition("=")[0].partition("/")[0] not in (group, "recipe")
        ]
        return self.compose([*kept, f"{group}={option}"])


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


def _is_of_launcher(key: str) -> bool:
    return key == "hydra/launcher" or key.startswith("hydra.launcher.")


def _launcher_of(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg.hydra.launcher, resolve=False)


def _check_hydra(cfg: DictConfig) -> None:
    """Refuse what would make Hydra call or write anything but what smezo asks it to.

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
            if name == "_target_":
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


_PLUGIN = r"hydra(\._internal\.core_plugins|_plugins)\.[\w.]+"


def _check_plugin(name: object, key: str) -> None:
    """A launcher or sweeper of Hydra, or of a plugin of Hydra's that is installed."""
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


def _unresolved(cfg: DictConfig) -> dict[str, Any]:
    tree = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    tree.pop("hydra", None)
    return tree


def _has(cfg: DictConfig, key: str) -> bool:
    node: object = OmegaConf.to_container(cfg, resolve=False)
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


def _check_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "logger=tensorboard writes with the package tensorboard, which is not installed: "
            f"{INSTALL_TENSORBOARD}."
        )


def _check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in a folder (it is made) and there is room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}): choose another folder by "
            "runs_dir=PATH."
        ) from error
    if free < _MIN_FREE_BYTES:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB left and a run needs {_MIN_FREE_BYTES >> 20} "
            "MiB or more: make room, or choose another disk by runs_dir=PATH."
        )


# --- running ---------------------------------------------------------------------------------


_BY_SEVERITY = (0, 2, 1)  # done, refused, crashed


def launch(argv: Sequence[str], run: Callable[[DictConfig], object]) -> int:
    """Check a command line, then let Hydra call `run` once, or for each job of a sweep.

    Jobs of a sweep have processes of their own (smezo_cli/fork.py), unless torch is loaded here.
    A job that fails does not stop the others. Returns 0, 1 (a crash), 2 (the user's or the
    machine's fault) or 130 (interrupted); of a sweep the worst of its jobs, whatever launches them.
    """
    try:
        request = prepare(argv)
        if "--help" in request.flags:
            print(_help(request), end="")
            return 0
        torchrun.check_launcher(request.overrides)
    except UserError as error:
        _say(str(error))
        return 2
    if not request.starts_runs:  # else each run says it, in its console.log, too
        for said_once in request.replaced:
            _say(said_once)
    if request.starts_runs:
        streams.guard()
        streams.outlast()
    if request.launcher != "basic":
        process.interruptible()  # it has other processes to end
    import hydra
    from hydra.core.hydra_config import HydraConfig

    codes = [0]
    said = io.StringIO()
    parent, reader = sweep.here(), sweep.reader()

    def attempt(cfg: DictConfig) -> tuple[int, str]:
        """Exit code and what was said."""
        try:
            _redact_sweep()
            run(cfg)
        except UserError as error:
            words = f"{_which_job()}{error}"
            _say(words)
            return 2, words
        except Exception as error:  # the boundary of a job: the other jobs of a sweep go on
            sys.stderr.write(traceback.format_exc())
            _say(f"{_which_job()}crashed; the error is above.")
            name = type(error).__name__
            return 1, f"{_which_job()}crashed ({name}): see {sweep.log_file()}."
        return 0, ""

    def job(cfg: DictConfig) -> sweep.Ended | None:
        if sweep.here() != parent:
            streams.guard()
            streams.outlast()
            code, words = attempt(cfg)
            return sweep.Ended(code, "" if sweep.reader() == reader else words) if code else None
        if _is_sweep() and fork.can_fork():
            code = fork.in_own_process(lambda: attempt(cfg)[0])
            if code < 0:
                name = signal.Signals(-code).name
                memory = " (is there memory enough?)" if name == "SIGKILL" else ""
                _say(f"{_which_job()}ended by {name}{memory}; {sweep.GO_ON}")
                code = 1
        else:
            code, _ = attempt(cfg)
        codes.append(code)
        return None

    try:
        start = hydra.main(
            config_path=str(CONF_DIR), config_name="train", version_base=_VERSION_BASE
        )
        quiet = contextlib.redirect_stderr(said) if request.package else contextlib.nullcontext()
        waiting = sweep.waiting(request.launcher)
        line = [*request.flags, *request.overrides]
        with _as_command_line(line), quiet, waiting, request.search.used():
            start(job)()
    except UserError as error:
        _say(str(error))
        return 2
    except BrokenProcessPool:
        _say(f"a worker process was killed, and {request.launcher} ended the others: {sweep.GO_ON}")
        codes.append(1)
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        _say(sentence(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        if said.getvalue():  # by Hydra, of a node that is not there
            _say(
                f"--package {request.package}: the settings have no such node, or nothing in it; "
                "smezo train --cfg job shows them."
            )
            return 2
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:  # not of a job, which catches its own
        if request.launcher == "basic":
            raise
        _say(f"hydra/launcher={request.launcher}: {sentence(error)}")
        codes.append(2)
    finally:
        HydraConfig.instance().cfg = None  # else a later run in this process would read it
        for ended in sweep.settle():
            codes.append(ended.code)
            if ended.words:
                _say(ended.words)
    return max(codes, key=_BY_SEVERITY.index)


def _say(text: str) -> None:
    if (who := torchrun.speaker()) is not None:
        # In one piece: the jobs of a sweep may speak at once.
        sys.stderr.write(f"smezo: {who}{redacted(text)}\n")
        sys.stderr.flush()


def _is_sweep() -> bool:
    """Does the job that runs now belong to a sweep?"""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _redact_sweep() -> None:
    """Take secrets out of the multirun.yaml that Hydra has written of the command line."""
    from hydra.core.hydra_config import HydraConfig

    if not _is_sweep():
        return
    file = Path(HydraConfig.get().sweep.dir) / "multirun.yaml"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    if (clean := redacted(text)) != text:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(clean, encoding="utf-8")
        os.replace(partial, file)


@contextlib.contextmanager
def _as_command_line(argv: Sequence[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and swallows errors unless it is told to raise them."""
    old_argv, old_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = old_argv
        if old_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_full


def _which_job() -> str:
    """Say "job 2 (seed=1): " in a sweep, nothing in a single run."""
    from hydra.core.hydra_config import HydraConfig

    if not _is_sweep():
        return ""
    node = HydraConfig.get()
    return f"job {node.job.num} ({' '.join(node.overrides.task)}): "


def command() -> str:
    """The command line of the job that runs now (in a sweep: of that job alone), or ""."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return ""
    node = HydraConfig.get()
    search = searchpath.of_run(node.runtime.config_sources)
    return shlex.join(["smezo", "train", *search.as_typed, *node.overrides.task])


def replaced() -> list[str]:
    """Whose files the job that runs now was read from, where the user's replace smezo's own."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    runtime = HydraConfig.get().runtime
    return searchpath.replaced(searchpath.of_run(runtime.config_sources), runtime.choices)


def recipes() -> list[str]:
    """Names of the recipes in the settings of the job that runs now, as read: the later wins."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    runtime = HydraConfig.get().runtime
    names = [
        f"{prefix}{name}"
        for group, prefix in (("recipe/shared", "shared/"), ("recipe", ""))
        if (name := runtime.choices.get(group)) is not None
    ]
    # Hydra records an optional default as chosen even where there is no such file.
    folders = [Path(source.path, "recipe") for source in runtime.config_sources]
    return [n for n in names if any((folder / f"{n}.yaml").is_file() for folder in folders)]
