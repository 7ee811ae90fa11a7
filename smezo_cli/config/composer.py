"""Compose settings by Hydra, with messages of one sentence."""

import contextlib
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smezo_cli.config import search as optuna_search
from smezo_cli.config.command_line import parsed
from smezo_cli.config.fixed import sentence
from smezo_cli.config.searchpath import SearchPath
from smezo_cli.errors import UserError, near


class Composer:
    """Compose settings by Hydra, with our messages; a context, because Hydra keeps one global."""

    def __init__(self, search: SearchPath | None = None) -> None:
        self.search = search or SearchPath()

    def __enter__(self) -> "Composer":
        from hydra.core.global_hydra import GlobalHydra

        self._hydra = self.search.initialized()
        self._hydra.__enter__()
        optuna_search.register()  # the plugin has registered its own by now
        self._loader = GlobalHydra.instance().config_loader()
        self._lists: dict[tuple[str, str], list[str]] = {}
        self._nodes: dict[tuple[str, ...], DictConfig] = {}
        self._words: dict[str, Any] = {}
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

    def hydra_of(self, words: Sequence[str]) -> DictConfig:
        """Return Hydra's own node as some words have it; the same words are composed once."""
        key = tuple(words)
        if key not in self._nodes:
            self._nodes[key] = self.compose(words, with_hydra=True).hydra
        return self._nodes[key]

    def options(self, group: str) -> list[str]:
        """Return the choices of a group."""
        return self._listed(group, "CONFIG")

    def parts_of(self, group: str, option: str) -> list[dict[str, Any]] | None:
        """Return what the file of a choice holds, and those that it begins with, each by itself.

        That takes a tenth of the time of a composition. None where a composition alone can tell.
        """
        for source in self._loader.get_sources():
            if not source.is_config(f"{group}/{option}"):
                continue
            found = source.load_config(f"{group}/{option}")
            held: Any = OmegaConf.to_container(found.config, resolve=False)
            package = found.header.get("package") or group
            if not isinstance(held, dict) or package not in ("_global_", group):
                return None
            parts = [held if package == "_global_" else {group: held}]
            for base in held.pop("defaults", ()):
                if not isinstance(base, str) or "/" in base:
                    return None
                below = self.parts_of(group, base) if base != "_self_" else []
                if below is None:
                    return None
                parts += below
            return parts
        return None

    def below(self, group: str) -> list[str]:
        """Return a group and the groups inside it."""
        return [group, *(f"{group}/{inner}" for inner in self.groups(group))]

    def groups(self, parent: str = "") -> list[str]:
        """Return the groups inside a group; "" is the top."""
        return self._listed(parent, "GROUP")

    def _listed(self, parent: str, kind: str) -> list[str]:
        # Each word of the line asks. The sources are asked, as the loader copies them all first.
        from hydra.core.object_type import ObjectType

        if (parent, kind) not in self._lists:
            found = {
                name
                for source in self._loader.get_sources()
                if source.is_group(parent)
                for name in source.list(parent, ObjectType[kind])
            }
            self._lists[parent, kind] = sorted(found)
        return self._lists[parent, kind]

    def parse(self, text: str) -> Any:
        """Return a word KEY=VALUE as Hydra reads it, or raise UserError; a word is read once."""
        if text not in self._words:
            self._words[text] = self._read(text)
        return self._words[text]

    def _read(self, text: str) -> Any:
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
        """Return a sentence on a word that is no KEY=VALUE, and what to type instead."""
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


def without_hydra(whole: DictConfig) -> DictConfig:
    """Return a copy of composed settings without Hydra's own node."""
    cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    OmegaConf.set_struct(cfg, OmegaConf.is_struct(whole))  # the flag is not copied
    return cfg
