"""`smezo ls` and `smezo show`: list the YAML files of a config group, print one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.cli.method_notes import notes
from smezo_cli.config.searchpath import of_line
from smezo_cli.errors import UserError, near

USAGE = """\
smezo ls [GROUP]             the names in a group, or in every group, and what each of them is
smezo show GROUP NAME        the file of one of them: what it is, its values, where they come from;
                             of a method its formula, cost and state, too, as comments
smezo show run RUN           what came of a run, as comments, and its settings

    --config-dir DIR  your own files, which come before smezo's
GROUP is tasks, models, methods, recipes, experiments, tables or loggers.
Examples:
  smezo ls methods
  smezo show method sparse_mezo
  smezo show run runs/default/rte-opt-125m-mezo-s0-1a2b3c4d
"""

GROUPS = ("tasks", "models", "methods", "recipes", "experiments", "tables", "loggers")

#: What the methods of a group have in common; a method's file names its group in its comment.
METHOD_GROUPS = {
    "dense": "all weights along noise, nothing kept that grows with them",
    "masked": "some of the weights along noise",
    "factored": "matrices along products of thin ones",
    "stateful": "numbers of the size of the weights kept from step to step",
    "one-sided": "losses at the weights and on one side of them",
    "few weights": "on at most 100,000 weights",
    "hybrid": "with backpropagation in the same step",
    "adapters": "on adapters beside frozen weights",
    "backpropagation": "by gradients, the baselines that need the memory",
    "untrained": "the model as it is",
    "": "of your own",
}


def main(words: Sequence[str]) -> int:
    """Print the files of one group, or of all, each with its first sentence; return 0.

    Raises:
        UserError: a mistake on the line.
    """
    if shows_help(words, USAGE):
        return 0
    given, roots = _read("ls", words)
    if len(given) > 1:
        raise UserError("smezo ls takes one group at most: smezo ls tasks.")
    for group in [_group(word) for word in given] or GROUPS:
        files = files_of(group, roots)
        width = max((len(name) for name in files), default=0)
        for title, names in parts(group, files):
            print(f"{title}:")
            for name in names:
                print(f"  {name:{width}}  {_headline(files[name])}")
    return 0


def show(words: Sequence[str]) -> int:
    """Print one file of a group as it stands; return 0.

    Raises:
        UserError: a mistake on the line.
    """
    if shows_help(words, USAGE):
        return 0
    given, roots = _read("show", words)
    if len(given) != 2:
        raise UserError("smezo show takes a group and a name: smezo show method sparse_mezo.")
    if given[0] in ("run", "runs"):
        if roots != of_line(None, ()).roots:
            raise UserError("smezo show run reads the run alone: leave out --config-dir.")
        from smezo_cli.cli import show_run  # which reads results, and so numpy

        print(show_run.text(given[1]), end="")
        return 0
    group, name = _group(given[0]), given[1]
    files = files_of(group, roots)
    if name not in files:
        raise UserError(f"there is no {group.removesuffix('s')} {name}{near(name, files)}.")
    print(files[name].read_text(encoding="utf-8"), end="")
    if group == "methods":
        print("".join(f"# {line}".rstrip() + "\n" for line in notes(name, files)), end="")
    return 0


def _read(verb: str, words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return the words less --config-dir, and the folders that settings are read from."""
    parser = Flags(verb)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    given = parser.parse_intermixed_args(list(words))
    return given.words, of_line(given.config_dir, ()).roots


def _group(word: str) -> str:
    group = word if word.endswith("s") else f"{word}s"
    if group not in GROUPS:
        raise UserError(f"there is no group {word}{near(word, GROUPS)}.")
    return group


def files_of(group: str, roots: list[Path]) -> dict[str, Path]:
    """Return the files of a group by name, each from the first folder that has it."""
    found: dict[str, Path] = {}
    for folder in [root / group.removesuffix("s") for root in roots]:
        for file in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]:
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return found


def parts(group: str, files: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield the titles of a listing and the names below each: methods are listed by kind."""
    if group != "methods":
        yield group, list(files)
        return
    found: dict[str, list[str]] = {}
    for name, file in files.items():
        said = re.search(r"^# Group: (.+)$", file.read_text(encoding="utf-8"), re.M)
        kind = said[1] if said and said[1] in METHOD_GROUPS else ""
        found.setdefault(kind, []).append(name)
    for kind, what in METHOD_GROUPS.items():
        if kind in found:
            yield f"methods, {kind + ': ' if kind else ''}{what}", found[kind]


def _headline(file: Path) -> str:
    """Return the first sentence of the comment that opens a file, less what is for Hydra."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            words.append(line.lstrip("# "))
    return re.split(r"(?<=[.?])\s", " ".join(words), maxsplit=1)[0]
