"""Raise errors for people: one sentence, without secrets and control characters."""

import difflib
import json
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class UserError(Exception):
    """Tell the user in one sentence: the key, what was got, what is allowed, what mends it.

    The command line prints it without a traceback and exits with code 2. Secrets are redacted, and
    line ends and other controls that came with a file's content do not reach the terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


class Diverged(UserError):
    """Say that the losses of a run are no numbers any more."""


_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW(OR)?D|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL",
    re.IGNORECASE,
)

# Values that a secret cannot be, and that stand in every text.
_PLAIN_VALUES = {"true", "false", "none", "null", "auto"}

_LEAST = 4  # characters of a secret

_URL_LOGIN = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s/\"'<>]*@")

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

_LONGEST = 4000  # characters of a message


def redacted(text: str) -> str:
    """Return the text without logins of URLs and values of secret environment variables.

    Secret is what the name says: TOKEN, SECRET, PASSWORD, API_KEY and the like.
    """
    return str(_without(_secrets(), text))


def redacted_tree(value: Any) -> Any:
    """Return mappings and lists with every string in them redacted, keys included."""
    return _without(_secrets(), value)


def _without(secrets: Sequence[tuple[str, str]], value: Any) -> Any:
    """Redact the strings of a value; the environment is read once for all of them."""
    if isinstance(value, Mapping):
        return {_without(secrets, key): _without(secrets, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(secrets, item) for item in value]
    if not isinstance(value, str):
        return value
    for name, secret in secrets:
        value = value.replace(secret, f"[{name}]")
    value = _URL_LOGIN.sub(r"\1[login]@", value)
    return _HUB_TOKEN.sub("[token]", value)


def _secrets() -> list[tuple[str, str]]:
    """Return names and values, as they are and as URLs and JSON spell them, the longest first."""
    found = []
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _LEAST and value not in _PLAIN_VALUES:
            spellings = {value, urllib.parse.quote(value, safe=""), json.dumps(value)[1:-1]}
            found += [(name, spelling) for spelling in spellings]
    return sorted(found, key=lambda pair: -len(pair[1]))


def sentence(text: str) -> str:
    """Return a message in one line: redacted, controls escaped, cut inside if it is very long."""
    text = redacted(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable, text))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, cut to 200 characters.

    Where there is no message, the name of the error's class.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")[:200]


def _printable(character: str) -> str:
    if character.isspace():
        return " "
    # Cc, Cf: controls and what turns the direction of writing; Cs: halves of characters.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs"):
        return character.encode("unicode_escape").decode("ascii")
    return character


def near(word: str, options: Iterable[str]) -> str:
    """Return the end of a sentence: what the word may have meant, and a list of all options."""
    options = sorted(options)
    return f"{meant(word, options)} (there are: {', '.join(options) or 'none'})"


def meant(word: str, options: Iterable[str]) -> str:
    """Return the end of a sentence: what the word may have meant, or ""."""
    close = difflib.get_close_matches(word, sorted(options), n=2, cutoff=0.65)
    return f", did you mean {' or '.join(close)}?" if close else ""
