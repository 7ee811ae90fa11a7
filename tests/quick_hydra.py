"""Have Hydra remember what it made of the choices of groups: that is most of a composition's time.

The tests compose settings some thousand times, of the same few files. Remembered is what comes of
files that no test changes, smezo's own and Hydra's; the values of a line are set anew each time,
and what fails is never remembered. tests/test_quick_hydra.py compares both ways.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from smezo_cli.config.composer import Composer
from smezo_cli.config.fixed import CONF_DIR

_compose = config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list
_load = ConfigRepository.load_config
_begin = CachingConfigRepository.__init__
_list = Composer._listed
_parse = OverridesParser.parse_rule
_FIXED = {("pkg", "hydra.conf"), ("file", str(CONF_DIR)), ("structured", "")}


def _is_fixed(repo: Any) -> bool:
    """Whether no test changes the files that settings are read from."""
    return {(source.scheme(), source.path) for source in repo.get_sources()} <= _FIXED


def remember() -> Callable[[], None]:
    """Begin to remember; return what ends it.

    As bytes: a tree is read from them in a sixth of the time of a copy, and they are nothing that
    the garbage collector looks at.
    """
    lists: dict[str, DefaultsList] = {}
    composed: dict[str, bytes] = {}
    files: dict[str, bytes] = {}
    folders: dict[tuple[str, str], list[str]] = {}
    words: dict[tuple[str, str], bytes] = {}

    def read(self: Any, config_path: str) -> Any:
        if not _is_fixed(self):
            return _load(self, config_path)
        if config_path not in files:
            loaded = _load(self, config_path)
            files[config_path] = pickle.dumps(loaded)
            return loaded
        return pickle.loads(files[config_path])

    def listed(repo: Any, config_name: str, overrides_list: list[Any], **how: bool) -> DefaultsList:
        if not _is_fixed(repo):
            return create_defaults_list(repo, config_name, overrides_list, **how)
        asked = Overrides(repo, overrides_list)  # the values are among config_overrides
        chosen = [v for k, v in vars(asked).items() if k != "config_overrides"]
        key = repr((config_name, how, chosen))
        if key not in lists:
            lists[key] = create_defaults_list(repo, config_name, overrides_list, **how)
        found = copy.copy(lists[key])
        found.config_overrides = asked.config_overrides
        return found

    def tree(self: Any, defaults: list[Any], repo: Any) -> DictConfig:
        if not _is_fixed(repo):
            return _compose(self, defaults, repo)
        key = repr(defaults)
        if key not in composed:
            whole = _compose(self, defaults, repo)
            composed[key] = pickle.dumps(whole)
            return whole
        found: DictConfig = pickle.loads(composed[key])
        return found

    def begin(self: Any, delegate: Any) -> None:
        """Hydra copies all that its sources refer to; it only puts others in the list's place."""
        self.delegate, self.cache = copy.copy(delegate), {}

    def names(self: Composer, parent: str, kind: str) -> list[str]:
        if not _is_fixed(self._loader):
            return _list(self, parent, kind)
        if (parent, kind) not in folders:
            folders[parent, kind] = _list(self, parent, kind)
        return [*folders[parent, kind]]

    def word(self: Any, s: str, rule_name: str) -> Any:
        if (s, rule_name) not in words:
            parsed = _parse(self, s, rule_name)
            words[s, rule_name] = pickle.dumps(parsed)
            return parsed
        return pickle.loads(words[s, rule_name])

    def end() -> None:
        Composer._listed = _list
        OverridesParser.parse_rule = _parse
        CachingConfigRepository.__init__ = _begin
        ConfigRepository.load_config = _load
        config_loader_impl.create_defaults_list = create_defaults_list
        config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list = _compose

    Composer._listed = names
    OverridesParser.parse_rule = word
    CachingConfigRepository.__init__ = begin
    ConfigRepository.load_config = read
    config_loader_impl.create_defaults_list = listed
    config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list = tree
    return end
