"""Read the words of `smezo train`: Hydra's flags, and KEY=VALUE."""

import argparse
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from omegaconf import DictConfig

from smezo_cli.config import searchpath
from smezo_cli.config.fixed import sentence
from smezo_cli.config.searchpath import SearchPath
from smezo_cli.errors import UserError, near
from smezo_cli.words import quoted

# Hydra's parser is slow on what nobody types: seconds for a thousand brackets.
_LONGEST_WORD, _MOST_BRACKETS = 8000, 200


@dataclass(frozen=True)
class Request:
    """Hold a command line that was read: Hydra's flags first, then KEY=VALUE.

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
    is_search: bool = False  # optuna says which jobs there are; known then, too
    replaced: tuple[str, ...] = ()  # whose files are read; known then, too
    alone: DictConfig | None = None  # the settings, where Hydra has nothing more to do with them


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; smezo train --help shows the flags.")


def read(argv: Sequence[str]) -> Request:
    """Return what the words of `smezo train` ask for; raise UserError for a mistake."""
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
        raise UserError(
            f"unknown flag {unknown[0]}{near(unknown[0], usual)}; settings have no dashes, as in "
            "steps=100."
        )
    acts = ("run", "multirun", "cfg", "info", "shell_completion")
    asked = [name for name in acts if getattr(known, name)]
    if len(asked) > 1 and "multirun" in asked and (known.cfg or known.info):
        _refuse_to_show_many(known)
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
    search, overrides = searched(known.overrides, known.config_dir)
    if known.hydra_help:  # Hydra composes its own node alone, which no setting belongs to
        overrides = [word for word in overrides if word.startswith("hydra")]
    return Request(
        flags=tuple(flags),
        overrides=tuple(overrides),
        search=search,
        multirun=known.multirun,
        package=known.package,
        starts_runs=not (silent or known.help or known.cfg or known.info),
        composes=not (silent or (known.help and not known.overrides)),
    )


def _refuse_to_show_many(known: argparse.Namespace) -> NoReturn:
    """Refuse --cfg and --info of a sweep, which Hydra does not show either.

    Raises:
        UserError: it has the line that shows the first run.
    """
    flag = f"--cfg {known.cfg}" if known.cfg else f"--info {known.info}"
    more = [] if known.package is None else ["--package", known.package]
    more += ["--resolve"] * known.resolve
    more += [] if known.config_dir is None else ["--config-dir", known.config_dir]
    first = shlex.join([*map(_first_of, known.overrides), *flag.split(), *more])
    raise UserError(
        f"{flag} shows a single run, and -m asks for several: leave out -m and give each setting "
        f"one value, as in smezo train {first}."
    )


def _first_of(word: str) -> str:
    """Return KEY=VALUE with the first of its values, or as it is where that is not to be told."""
    try:
        override = parsed(quoted(word))
        if not (override.is_sweep_override() and override.is_discrete_sweep()):
            return word
        return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    except Exception:  # Hydra's, and what its parser lets through: said when the line is composed
        return word


def searched(words: Sequence[str], config_dir: str | None) -> tuple[SearchPath, list[str]]:
    """Return the folders that settings are read from, and the words that do not name one."""
    overrides, given = list(map(quoted, words)), list[Any]()
    for word in [w for w in overrides if w.partition("=")[0] == "hydra.searchpath"]:
        try:
            value = parsed(word).value()
        except Exception as error:  # Hydra's, and what its parser lets through
            raise UserError(f"cannot read {shlex.quote(word)}: {sentence(error)}.") from error
        given = value if isinstance(value, list) else [] if value is None else [value]
        overrides.remove(word)
    return searchpath.of_line(config_dir, given), overrides


def parsed(text: str, loader: Any = None) -> Any:
    """Return a word of the line as Hydra's parser reads it.

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
    """Return the words with a bare --info spelt out: it would swallow the KEY=VALUE behind it."""
    words = list(argv)
    for at, word in enumerate(words):
        if word in ("--info", "-i") and "=" in "".join(words[at + 1 : at + 2]):
            words[at] = "--info=all"
    return words
