"""Compose settings from the YAML files and the words of a command line, and check them."""

import contextlib
import difflib
import importlib.util
import itertools
import re
import shlex
import shutil
import tempfile
import typing
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smezo_cli.config import searchpath, sweep
from smezo_cli.config.combinations import lacks
from smezo_cli.config.command_line import Request, parsed, read, searched
from smezo_cli.config.fixed import INSTALL_TENSORBOARD, KNOBS, sentence
from smezo_cli.config.hydra_guard import check_hydra, is_of_launcher, launcher_of
from smezo_cli.config.rules import shown
from smezo_cli.config.searchpath import SearchPath
from smezo_cli.config.settings import Settings, check, check_spelling
from smezo_cli.errors import UserError, near
from smezo_cli.words import quoted

_MIN_FREE_BYTES = 256 * 2**20

VERSION_BASE = "1.3"


class Composer:
    """Compose settings by Hydra, with our messages; a context, because Hydra keeps one global."""

    def __init__(self, search: SearchPath | None = None) -> None:
        self.search = search or SearchPath()

    def __enter__(self) -> "Composer":
        from hydra.core.global_hydra import GlobalHydra

        self._hydra = self.search.initialized()
        self._hydra.__enter__()
        self._loader = GlobalHydra.instance().config_loader()
        self._lists: dict[tuple[str, str], list[str]] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._hydra.__exit__(None, None, None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave Hydra to another composer for a while: of Hydra there is one."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def compose(self, overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
        """Return the composed settings, with or without Hydra's own node.

        Raises:
            UserError: whatever Hydra says, as one sentence.
        """
        import hydra

        try:
            return hydra.compose("train", list(overrides), return_hydra_config=with_hydra)
        except Exception as error:  # Hydra and its parsers raise anything for a malformed file
            raise UserError(sentence(error)) from error

    def options(self, group: str) -> list[str]:
        """Return the choices of a group."""
        return self._listed(group, "CONFIG")

    def below(self, group: str) -> list[str]:
        """Return a group and the groups inside it."""
        return [group, *(f"{group}/{inner}" for inner in self.groups(group))]

    def groups(self, parent: str = "") -> list[str]:
        """Return the groups inside a group; "" is the top."""
        return self._listed(parent, "GROUP")

    def _listed(self, parent: str, kind: str) -> list[str]:
        # Hydra takes milliseconds to list a folder, and each word of the line asks.
        from hydra.core.object_type import ObjectType

        if (parent, kind) not in self._lists:
            found = self._loader.get_group_options(parent, ObjectType[kind])
            self._lists[parent, kind] = sorted(found)
        return self._lists[parent, kind]

    def parse(self, text: str) -> Any:
        """Return a word KEY=VALUE as Hydra reads it, or raise UserError."""
        try:
            override = parsed(text, self._loader)
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

    def is_group(self, override: Any) -> bool:
        """Return whether a word chooses a group; raise UserError for a group that is not there."""
        key = override.key_or_group
        parent, _, name = key.rpartition("/")
        if name in self.groups(parent):
            return True
        if "/" in key:
            known = [f"{parent}/{group}" for group in self.groups(parent)] or self.groups()
            raise UserError(f"there is no config group {key}{near(key, known)}.")
        return False


# --- words ---


def values_of(override: Any, multirun: bool) -> list[str]:
    """Return an override as one line for each of its values; none for an interval."""
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


def check_choice(composer: Composer, override: Any) -> None:
    """Refuse the choice of a group that is left empty, or that no file is named after."""
    group = override.key_or_group
    if override.is_delete() or (not override.is_sweep_override() and override.value() is None):
        if group in ("task", "model", "method", "logger"):
            example = composer.options(group)[0]
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
        if name not in options:
            raise UserError(f"{group}={choice}: there is no such {group}{near(name, options)}.")


def check_keys(composer: Composer, overrides: Sequence[Any], chosen: Sequence[str]) -> None:
    """Refuse keys that the chosen task, model and method do not have."""
    base = composer.compose(chosen, with_hydra=True)
    for override in overrides:
        _check_key(composer, override, base, chosen)


def _check_key(composer: Composer, override: Any, base: DictConfig, chosen: Sequence[str]) -> None:
    key = override.key_or_group
    if override.is_add() or override.is_force_add():
        return  # what is new at the top is refused later, inside a node by build()
    if _has(base, key):
        return
    group = "method" if key in KNOBS else key.partition(".")[0]
    if group in base and group in composer.groups() and group != "hydra":
        others = [
            option
            for option in composer.options(group)
            if _has(cfg := _with_choice(composer, group, option, chosen), key)
            # Variants with an adapter are named for the keys of adapters alone.
            and ("adapter" not in cfg[group] or key.startswith("method.adapter"))
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


# --- runs ---


@dataclass(frozen=True)
class Composed:
    """A run that a command line asks for.

    Attributes:
        cfg: its settings as Hydra composed them.
        settings: the same, checked.
        launcher: what starts the jobs of the sweep.
        replaced: lines that say which files of the user are read in place of smezo's own.
    """

    cfg: DictConfig
    settings: Settings
    launcher: str = "basic"
    replaced: tuple[str, ...] = ()


def prepare(argv: Sequence[str]) -> Request:
    """Read a command line of `smezo train` and check all that can be checked without torch.

    In a sweep every value is checked: each combination of groups, and in it each value of each
    other setting with the rest at their first.

    Raises:
        UserError: the first mistake found.
    """
    request = read(argv)
    if not request.composes:
        return request
    folders: set[Path] = set()
    replaced: dict[str, None] = {}  # in order, each once
    with Composer(request.search) as composer:
        for run in every(composer, request):
            folders.add(Path(run.settings.runs_dir) / run.settings.name)
            if request.starts_runs and run.settings.logger["name"] == "tensorboard":
                _check_tensorboard()
            request = replace(request, launcher=run.launcher)
            replaced |= dict.fromkeys(run.replaced)
    if request.starts_runs:
        for folder in sorted(folders):
            _check_writable(folder)
    return replace(request, replaced=tuple(replaced))


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """Return the settings of one run, checked, as `smezo train OVERRIDES` has them."""
    return _first(overrides, config_dir).cfg


def checked_settings(
    overrides: Sequence[str], config_dir: str | None, say: Callable[[str], object]
) -> Settings:
    """Return the settings of one run in their own types; say which files replace smezo's own."""
    run = _first(overrides, config_dir)
    for line in run.replaced:
        say(line)
    return run.settings


def _first(overrides: Sequence[str], config_dir: str | None) -> Composed:
    search, overrides = searched(overrides, config_dir)
    with Composer(search) as composer:
        return next(every(composer, Request(overrides=tuple(overrides), search=search)))


def grid(
    words: Sequence[str], composer: Composer | None = None
) -> tuple[DictConfig, dict[str, list[Any]]]:
    """Return the checked settings of the first job of a sweep, and the values of each swept key.

    Args:
        words: of the command line.
        composer: that is open already, for many sweeps.

    Raises:
        UserError: a mistake in the words, or a config group that is swept over.
    """
    if composer is None:
        with Composer() as own:
            return grid(words, own)
    overrides = [composer.parse(quoted(word)) for word in words]
    _, swept = _asked_by_experiment(composer, overrides)
    overrides += [composer.parse(line) for line in swept]
    first, values = [], {}
    for override in overrides:
        lines = values_of(override, True)
        is_group = composer.is_group(override)
        if is_group:
            check_choice(composer, override)
        if not lines or (is_group and len(lines) > 1):
            raise UserError(f"{override.input_line}: a cell of a table takes one of these.")
        if len(lines) > 1:
            key = override.key_or_group
            values[key] = [composer.parse(line).value() for line in lines]
        first.append(lines[0])
    cfg = composer.compose(first)
    check(cfg)
    return cfg, values


def every(composer: Composer, request: Request) -> Iterator[Composed]:
    """Yield each run that a command line asks for, checked."""
    if composer.search.folders:
        tops = composer.groups()
        composer.search.check([group for top in tops for group in composer.below(top)])
    try:
        yield from _every(composer, request)
    except UserError as error:
        if (file := composer.search.primary) is None:
            raise
        raise UserError(
            f"{str(error).rstrip('.')}; {file} is read in place of smezo's own train.yaml, so "
            "it must be whole; settings alone go into a file of the group experiment."
        ) from error


def _every(composer: Composer, request: Request) -> Iterator[Composed]:
    overrides = [composer.parse(text) for text in request.overrides]
    multirun, swept = _asked_by_experiment(composer, overrides)
    multirun = multirun or request.multirun
    if swept and not multirun:
        raise UserError(f"the experiment sweeps over {', '.join(swept)}: add -m to run it.")
    overrides += [composer.parse(line) for line in swept]
    groups = [override for override in overrides if composer.is_group(override)]
    keys = [override for override in overrides if override not in groups]
    for override in groups:
        check_choice(composer, override)
    of_launcher = [o for o in overrides if is_of_launcher(o.key_or_group)]
    if of_launcher and request.starts_runs and not multirun:
        raise UserError(
            f"{of_launcher[0].input_line}: a launcher starts the jobs of a sweep; add -m."
        )
    choices = [values_of(override, multirun) for override in groups]
    values = [values_of(override, multirun) for override in keys]
    for line in itertools.chain(*values):
        override = composer.parse(line)
        if not override.is_delete():
            check_spelling(override.key_or_group, line.partition("=")[2], override.value())
    touches_hydra = bool(composer.search.folders) or any(
        override.key_or_group.startswith("hydra") for override in overrides
    )
    asked = _launcher_asked(composer, of_launcher) if touches_hydra else None
    first = [lines[0] for lines in values if lines]
    for chosen in itertools.product(*choices):
        run = _run_of(composer, keys, chosen, first, asked if touches_hydra else ...)
        yield run
        for cfg in _others(composer, run.cfg, chosen, [lines for lines in values if lines]):
            yield replace(run, cfg=cfg, settings=check(cfg))


def _run_of(
    composer: Composer, keys: Sequence[Any], chosen: Sequence[str], first: Sequence[str], asked: Any
) -> Composed:
    """Compose and check one run, and say of a mistake what the words have to do with it.

    Args:
        composer: with the files open.
        keys: the settings of the line.
        chosen: the choices of groups.
        first: the first value of each setting.
        asked: the launcher that the line asks for; ... where nothing touches Hydra.
    """
    line = [*chosen, *first]
    try:
        cfg = composer.compose(line)
    except UserError:
        check_keys(composer, keys, chosen)  # says more of a key that is not there
        check_deleted(composer, keys, line)
        raise
    if len(first) < len(keys):
        check_keys(composer, keys, chosen)  # of an interval, no value was composed
    launcher, replaced = "basic", list[str]()
    if asked is not ...:
        whole = composer.compose(line, with_hydra=True)
        check_hydra(whole)
        if launcher_of(whole) != asked:
            raise UserError(
                "hydra.launcher is set by a file: launchers start programs, so they are "
                "chosen on the command line: hydra/launcher=NAME hydra.launcher.KEY=VALUE."
            )
        made = whole.hydra.runtime.choices
        launcher = str(made["hydra/launcher"])
        replaced = searchpath.replaced(composer.search, made)
    try:
        return Composed(cfg, check(cfg), launcher, tuple(replaced))
    except UserError:
        check_deleted(composer, keys, line)
        raise


def _others(
    composer: Composer, cfg: DictConfig, chosen: Sequence[str], values: Sequence[Sequence[str]]
) -> Iterator[DictConfig]:
    """Yield the settings with each further value of each setting, the others at their first."""
    first = [lines[0] for lines in values]
    for at, lines in enumerate(values):
        for line in lines[1:]:
            override = composer.parse(line)
            if isinstance(override.value(), dict | list):  # would be merged with the first
                yield composer.compose([*chosen, *first[:at], line, *first[at + 1 :]])
            else:
                other, key = cfg.copy(), override.key_or_group
                OmegaConf.update(other, key, override.value(), force_add=True)
                yield other


def _launcher_asked(composer: Composer, given: Sequence[Any]) -> Any:
    """Return the launcher's node by the command line alone; None if that names no launcher."""
    with composer.paused():
        try:
            with Composer() as own:
                return launcher_of(own.compose([o.input_line for o in given], with_hydra=True))
        except UserError:
            return None


def _asked_by_experiment(composer: Composer, overrides: Sequence[Any]) -> tuple[bool, list[str]]:
    """Return whether hydra.mode or an experiment asks for a sweep, and its KEY=VALUES."""
    asking = [o for o in overrides if o.key_or_group in ("hydra.mode", "experiment")]
    if any(o.is_sweep_override() for o in asking) or not asking:
        return False, []
    for override in asking:
        if override.key_or_group == "experiment":
            check_choice(composer, override)
    node = composer.compose([o.input_line for o in asking], with_hydra=True).hydra
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
