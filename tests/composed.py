"""Settings for tests that ask about something else: the same words are composed once a process."""

import copy
import functools

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import Settings, check


@functools.cache
def _checked(words: tuple[str, ...]) -> Settings:
    return check(compose(words))


def settings_of(*words: str) -> Settings:
    """Return the settings of one run, checked; a copy, so that no test sees what another writes."""
    return copy.deepcopy(_checked(words))
