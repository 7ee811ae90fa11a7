"""Register the plugin by which Hydra reads folders of the user before smezo's own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class UserFolders(SearchPathPlugin):
    """Put the folders that are in use before the main one when Hydra is initialised."""

    folders: ClassVar[tuple[str, ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folders; Hydra calls this."""
        main = SearchPathQuery(provider="main")
        for folder in self.folders:
            path = folder if "://" in folder else f"file://{folder}"
            search_path.prepend("command-line", path, main)


@contextlib.contextmanager
def used(folders: Sequence[str]) -> Iterator[None]:
    """Have Hydra read from these folders if it is initialised inside the context."""
    Plugins.instance().register(UserFolders)
    before, UserFolders.folders = UserFolders.folders, tuple(folders)
    try:
        yield
    finally:
        UserFolders.folders = before
