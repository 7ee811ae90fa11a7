"""Compose settings from the YAML files and the words of a command line, and check them."""

import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smezo_cli.config import search, searchpath
from smezo_cli.config.command_line import Request, read, searched
from smezo_cli.config.composer import Composer, without_hydra
from smezo_cli.config.fixed import INSTALL_LOGGER
from smezo_cli.config.hydra_guard import check_hydra, is_of_launcher, launcher_of
from smezo_cli.config.overrides import (
    check_choice,
    check_deleted,
    check_keys,
    check_params,
    values_of,
)
from smezo_cli.config.settings import Settings, check, check_spelling
from smezo_cli.errors import UserError
from smezo_cli.files.space import check_space
from smezo_cli.machine import torchrun
from smezo_cli.words import quoted

_LEAST_FREE_BYTES = 250_000_000


@dataclass(frozen=True)
class Composed:
    """Hold the settings of a run that a command line asks for.

    Attributes:
        cfg: its settings as Hydra composed them.
        settings: the same, checked.
        launcher: what starts the jobs of the sweep.
        is_search: optuna says which jobs there are.
        replaced: lines that say which files of the user are read in place of smezo's own.
        alone: `cfg` with Hydra's own node, for a single run that asks nothing of Hydra.
    """

    cfg: DictConfig
    settings: Settings
    launcher: str = "basic"
    is_search: bool = False
    replaced: tuple[str, ...] = ()
    alone: DictConfig | None = None


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
            if request.starts_runs:
                _check_logger(run.settings.logger["name"])
            request = replace(
                request, launcher=run.launcher, is_search=run.is_search, alone=run.alone
            )
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
    _, swept, _ = _asked_by_experiment(composer, overrides)
    overrides += [composer.parse(line) for line in swept]
    first, values = [], {}
    for override in overrides:
        lines = values_of(override, True, False)
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
    """Yield each run, without a word on whose train.yaml it is."""
    overrides = [composer.parse(text) for text in request.overrides]
    multirun, swept, is_search = _asked_by_experiment(composer, overrides)
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
    if is_search:
        if request.starts_runs and not multirun:
            raise UserError("hydra/sweeper=optuna searches over many runs: add -m.")
        search.check_searched(overrides)
    choices = [values_of(override, multirun, is_search) for override in groups]
    values = [values_of(override, multirun, is_search) for override in keys]
    for line in itertools.chain(*values):
        override = composer.parse(line)
        if not override.is_delete():
            check_spelling(override.key_or_group, line.partition("=")[2], override.value())
    touches_hydra = bool(composer.search.folders) or any(
        override.key_or_group.startswith("hydra") for override in overrides
    )
    asked = _launcher_asked(composer, of_launcher) if touches_hydra else None
    first = [lines[0] for lines in values]
    for chosen in itertools.product(*choices):
        run = _run_of(composer, keys, chosen, first, asked if touches_hydra else ...)
        if multirun or touches_hydra:
            run = replace(run, alone=None)
        yield run
        for cfg in _others(composer, run.cfg, chosen, values):
            yield replace(run, cfg=cfg, settings=check(cfg))


def _run_of(
    composer: Composer, keys: Sequence[Any], chosen: Sequence[str], first: Sequence[str], asked: Any
) -> Composed:
    """Compose and check one run; for a mistake, name the word that made it.

    Args:
        composer: with the files open.
        keys: the settings of the line.
        chosen: the choices of groups.
        first: the first value of each setting.
        asked: the launcher that the line asks for; ... where nothing touches Hydra.
    """
    line = [*chosen, *first]
    try:
        whole = composer.compose(line, with_hydra=True)
    except UserError:
        check_keys(composer, keys, chosen)  # says more of a key that is not there
        check_deleted(composer, keys, line)
        raise
    launcher, replaced = "basic", list[str]()
    if asked is not ...:
        check_hydra(whole)
        if launcher_of(whole) != asked:
            raise UserError(
                "hydra.launcher is set by a file: launchers start programs, so they are "
                "chosen on the command line: hydra/launcher=NAME hydra.launcher.KEY=VALUE."
            )
        made = whole.hydra.runtime.choices
        launcher = str(made["hydra/launcher"])
        replaced = searchpath.replaced(composer.search, made)
    is_search = search.asked(whole.hydra)
    if is_search:
        search.check_node(whole.hydra.sweeper, torchrun.local_rank() is not None)
    cfg = without_hydra(whole)
    try:
        return Composed(cfg, check(cfg), launcher, is_search, tuple(replaced), whole)
    except UserError:
        check_deleted(composer, keys, line)
        raise


def _others(
    composer: Composer, cfg: DictConfig, chosen: Sequence[str], values: Sequence[Sequence[str]]
) -> Iterator[DictConfig]:
    """Yield the settings with each further value of each key, the other keys at their first."""
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


def _asked_by_experiment(
    composer: Composer, overrides: Sequence[Any]
) -> tuple[bool, list[str], bool]:
    """Return whether a sweep is asked for, its KEY=VALUES by an experiment, and whether to search.

    hydra.mode asks for a sweep, or an experiment; the line asks for a search, too.
    """
    asking = [
        o
        for o in overrides
        if o.key_or_group in ("hydra.mode", "experiment", "hydra/sweeper")
        or o.key_or_group.startswith("hydra.sweeper.params")
    ]
    for override in asking:
        check_params(override)
    if any(o.is_sweep_override() for o in asking) or not asking:
        return False, [], False
    for override in asking:
        if override.key_or_group in ("experiment", "hydra/sweeper"):
            check_choice(composer, override)
    try:
        node = composer.hydra_of([o.input_line for o in asking])
    except UserError as error:
        if "hydra/sweeper/sampler" in str(error):  # of an experiment that searches
            search.check_installed("hydra/sweeper", search.NAME)
        raise
    given = {o.key_or_group for o in overrides}
    try:
        params = node.sweeper.params or {}
        lines = [quoted(f"{k}={v}") for k, v in params.items() if k.lstrip("+") not in given]
        is_search = search.asked(node)
        return str(node.mode).endswith("MULTIRUN"), lines, is_search
    except OmegaConfBaseException as error:
        asked = " ".join(o.input_line for o in asking)
        said = str(error).splitlines()[0]
        raise UserError(
            f"{asked}: hydra.mode and hydra.sweeper.params cannot be read ({said}); write "
            "MULTIRUN or RUN, and values."
        ) from error


def _check_logger(name: str) -> None:
    if name in INSTALL_LOGGER and importlib.util.find_spec(name) is None:
        raise UserError(
            f"logger={name} writes with the package {name}, which is not installed: "
            f"{INSTALL_LOGGER[name]}."
        )


def _check_writable(folder: Path) -> None:
    """Make a folder; raise UserError unless files can be made in it and the disk has room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        check_space(folder, _LEAST_FREE_BYTES, "a run")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}): choose another folder by "
            "runs_dir=PATH."
        ) from error
