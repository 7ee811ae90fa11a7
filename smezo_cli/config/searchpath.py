"""Find the folders that settings are read from: those of the user first, then smezo's own.

Hydra takes a file from the first folder that has one of its name. So the user's file wins, even
`train.yaml`, and a line says which files of smezo it replaces.
"""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.errors import UserError, redacted
from smezo_cli.files import bounded

PRIMARY = "train"  # the file that names all groups, train.yaml
_PACKAGE = "pkg://"
VERSION_BASE = "1.3"  # of Hydra, whose defaults these are


@dataclass(frozen=True)
class SearchPath:
    """Hold folders of the user, the first before the others; absolute, or pkg://MODULE."""

    folders: tuple[str, ...] = ()

    @property
    def as_typed(self) -> list[str]:
        """Return the words of a command line that name these folders."""
        flag = [folder for folder in self.folders[:1] if not folder.startswith(_PACKAGE)]
        words = ["--config-dir", *flag] if flag else []
        others = self.folders[len(flag) :]
        return [
            *words,
            *([f"hydra.searchpath=[{','.join(map(_quoted, others))}]"] if others else []),
        ]

    @property
    def roots(self) -> list[Path]:
        """Return all folders as paths, smezo's own last."""
        return [*(root for folder in self.folders if (root := _root(folder))), CONF_DIR]

    @property
    def primary(self) -> Path | None:
        """Return the user's own train.yaml, or None."""
        files = [root / f"{PRIMARY}.yaml" for root in self.roots[:-1]]
        return next((file for file in files if file.is_file()), None)

    def used(self) -> AbstractContextManager[None]:
        """Have Hydra read from here if it is initialised inside the context."""
        from smezo_cli.config import user_folders

        return user_folders.used(self.folders)

    @contextlib.contextmanager
    def initialized(self) -> Iterator[None]:
        """Initialise Hydra to read from here as long as the context is open."""
        from hydra import initialize_config_dir

        with self.used(), initialize_config_dir(str(CONF_DIR), "smezo", VERSION_BASE):
            yield

    def check(self, groups: Sequence[str]) -> None:
        """Check the user's files before Hydra opens them.

        Raises:
            UserError: naming the first file that is damaged or hostile.
        """
        for root in self.roots[:-1]:
            bounded.check_folder(root, [*groups, ""], only={"": [PRIMARY]})
        if (file := self.primary) is None:
            return
        node = bounded.load_yaml(file).get("hydra")
        if isinstance(node, Mapping) and "searchpath" in node:
            raise UserError(f"{file}: hydra.searchpath is set on the command line alone.")


def of_line(config_dir: str | None, given: Sequence[object]) -> SearchPath:
    """Return the folders of --config-dir and of hydra.searchpath.

    Raises:
        UserError: there is no such folder or package.
    """
    flag = "--config-dir"
    named = [] if config_dir is None else [(flag, config_dir)]
    for folder in given:
        if not isinstance(folder, str):
            raise UserError(f"hydra.searchpath={folder}: it must be a list of folders: [mine].")
        named.append(("hydra.searchpath", folder.removeprefix("file://")))
    for where, folder in named:
        if not folder:  # else it would be the current folder
            raise UserError(f"{where} is empty: give a folder of settings.")
        is_package = folder.startswith(_PACKAGE) and where != flag
        if "://" in folder and not is_package:
            raise UserError(f"{where} {folder}: it must be a folder or pkg://MODULE.")
        if _root(folder if is_package else os.path.abspath(folder)) is None:
            raise UserError(
                f"{where} {folder}: there is no such {'package' if is_package else 'folder'}."
            )
    found = (f if f.startswith(_PACKAGE) else os.path.abspath(f) for _, f in named)
    return SearchPath(tuple(found))


def of_run(sources: Sequence[Any]) -> SearchPath:
    """Return the folders that Hydra recorded of a job, hydra.runtime.config_sources."""
    return SearchPath(
        tuple(
            f"{_PACKAGE}{source.path}" if source.schema == "pkg" else str(source.path)
            for source in sources
            if source.provider == "command-line"
        )
    )


def replaced(search: SearchPath, choices: Mapping[str, Any]) -> list[str]:
    """Return a line for each chosen file that several folders have: which one is read.

    Args:
        search: the folders.
        choices: what was chosen of each group, hydra.runtime.choices.
    """
    if not search.folders:
        return []
    names = [PRIMARY]
    for group, chosen in choices.items():
        several = isinstance(chosen, Sequence) and not isinstance(chosen, str)
        names += [f"{group.partition('@')[0]}/{name}" for name in (chosen if several else [chosen])]
    hydra = _root(f"{_PACKAGE}hydra.conf")
    roots = [*([hydra] if hydra else []), *search.roots]
    owner = {hydra: "Hydra's own", CONF_DIR: "smezo's own"}
    lines = []
    for name in dict.fromkeys(names):
        having = [root for root in roots if (root / f"{name}.yaml").is_file()]
        for other in having[1:]:
            first = owner.get(having[0], f"that of {having[0]}")
            if other == CONF_DIR and having[0] not in owner:
                lines.append(f"{name}.yaml is {first}, in place of smezo's own")
            else:
                lines.append(f"{other}/{name}.yaml is not read: {first} comes first")
    return lines


def say(line: str) -> None:
    """Print a line of :func:`replaced` beside the output of a verb."""
    print(f"smezo: {redacted(line)}", file=sys.stderr)


def _root(folder: str) -> Path | None:
    """Return the folder as a path, or None if there is none."""
    if not folder.startswith(_PACKAGE):
        return Path(folder) if os.path.isdir(folder) else None
    try:
        found = importlib.util.find_spec(folder.removeprefix(_PACKAGE).replace("/", "."))
    except (ImportError, ValueError):
        return None
    places = found.submodule_search_locations if found is not None else None
    return Path(next(iter(places))) if places else None


def _quoted(path: str) -> str:
    """Return a path in quotes for Hydra's parser, which halves backslashes before a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", path)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"'{escaped}'"
