"""Rewrite KEY=VALUE so that Hydra's grammar reads what was written on the command line.

That grammar knows ASCII letters, digits and a few signs outside quotes, and no quotes around the
keys of a mapping. What it would refuse as text is put in quotes, and a mapping with such keys is
written as a list of pairs, which :func:`mapping_of` undoes. All else stays as it is.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from smezo_cli.errors import UserError

# Settings whose mappings may be pairs; their keys are the user's own words.
MAPPINGS = ("task.labels", "task.columns", "task.splits", "model.device_map")
# Keys below this one are fields of peft, of which the YAML names none: Hydra adds them.
_FREE = "method.adapter.config."
_TEMPLATES = ("task.prompt", "task.option_template", "task.sfc_prompt")
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)
_INTERPOLATION = re.compile(r"\$\{[^}]+\}")
_ESCAPE = r"\\[\\()\[\]{}:=, \t]"
# What Hydra takes without quotes, as a value and as a key of a mapping.
_PLAIN = re.compile(rf"(?:{_ESCAPE}|\$\{{[^}}]+\}}|[\w/\-\\+.$%*@?|: \t])*", re.ASCII)
_PLAIN_KEY = re.compile(rf"(?:{_ESCAPE}|[\w/\-\\+.$%*@?| \t])+", re.ASCII)
_FUNCTION = re.compile(r"(int|str|bool|float|choice|range|interval|glob|tag|sort|shuffle)[ \t]*\(")
_ARGUMENT = re.compile(r"[A-Za-z_]\w*[ \t]*=", re.ASCII)
_DEEPEST = 50
_DIGITS = "[0-9](?:_?[0-9])*"
_WHOLE = "(?:0|[1-9](?:_?[0-9])*)"
_INT = re.compile(rf"[+-]?{_WHOLE}")
_FLOAT = re.compile(
    rf"[+-]?(?:(?:{_WHOLE}\.|{_WHOLE}?\.{_DIGITS}|{_WHOLE}(?=e))(?:e[+-]?{_DIGITS})?|inf|nan)",
    re.IGNORECASE,
)
_MOST_DIGITS = 4000  # Python reads no more


def value_of(word: str) -> str | int | float | bool | None:
    """Return what Hydra reads a word without quotes as: 0.0 and 1e5 are numbers, NULL is null."""
    word = word.strip(" \t")
    if word.lower() in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[word.lower()]
    if len(word) <= _MOST_DIGITS:
        if _INT.fullmatch(word):
            return int(word)
        if _FLOAT.fullmatch(word):
            return float(word)
    return word


def quoted(override: str) -> str:
    """Return KEY=VALUE in words that Hydra can read.

    A template of a prompt is put in quotes that the shell has eaten, since to Hydra braces open a
    mapping: task.prompt={text} It was -> task.prompt="{text} It was". What Hydra reads as it is,
    or what is malformed in its grammar, is returned as it is.

    Raises:
        UserError: a mapping gives a key twice, of which Hydra would take the last.
    """
    if override.startswith(_FREE):
        override = f"++{override}"
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if name in _TEMPLATES and "{" in value:
        one = rf"\s*(?:{_QUOTED.pattern})\s*"
        if value.startswith("$") or re.fullmatch(f"{one}(?:,{one})*", value, re.DOTALL):
            return override
        return f"{key}={_in_quotes(value)}"
    if not equals:
        return override
    reader = _Reader(value, name)
    try:
        written = reader.values()
    except _MalformedError:
        return override
    return f"{key}={written}" if reader.has_changed else override


def typed(override: str) -> str:
    """Return KEY=VALUE, or KEY, without the plus signs that :func:`quoted` puts before it."""
    return override.removeprefix("++") if override.startswith(f"++{_FREE}") else override


def mapping_of(value: Any, key: str) -> Any:
    """Return a list of pairs as the mapping that it stands for, and any other value as it is.

    Raises:
        UserError: a key is given twice.
    """
    is_pairs = isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and not isinstance(pair[0], list | dict)
        for pair in value
    )
    if not value or not is_pairs:
        return value
    _check_once([str(name) for name, _ in value], key)
    return {str(name): item for name, item in value}


def with_mappings(values: Mapping[str, Any]) -> None:
    """Replace pairs by mappings in settings of plain Python, in place."""
    for key in MAPPINGS:
        group, _, name = key.partition(".")
        node = values.get(group)
        if isinstance(node, dict) and isinstance(node.get(name), list):
            node[name] = mapping_of(node[name], key)


def _check_once(keys: Collection[Any], setting: str) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise UserError(
                f"{setting} gives {key!r} twice; write each key of the mapping once, in quotes "
                'where two words are one number, as {"1.1": a, "1.10": b}.'
            )
        seen.add(key)


def _in_quotes(text: str) -> str:
    # Hydra halves backslashes before a quote, and only there.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", escaped) + '"'


def _out_of_quotes(text: str) -> str:
    halved = rf"(\\+)({text[0]}|\Z)"
    return re.sub(halved, lambda m: m[0][1::2] if m[2] else m[1][::2], text[1:-1])


def _unescaped(text: str) -> str:
    return re.sub(
        rf"\$\{{[^}}]+\}}|{_ESCAPE}", lambda m: m[0][-1] if m[0][0] == "\\" else m[0], text
    )


class _MalformedError(Exception):
    """Say that Hydra's grammar has no such value; its own message says why."""


class _Reader:
    """Reads the value of an override by Hydra's grammar, but takes any character as text."""

    def __init__(self, text: str, setting: str) -> None:
        self.text, self.setting = text, setting
        self.at = self.depth = 0
        self.has_changed = False

    def values(self) -> str:
        """Return the value, or those of a sweep."""
        found = [self._element(",")] if self.text.strip(" \t") else []
        while self._takes(","):
            found.append(self._element(","))
        if self.at < len(self.text):
            raise _MalformedError
        return ",".join(found)

    def _blanks(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1

    def _takes(self, sign: str) -> bool:
        self._blanks()
        if self.text[self.at : self.at + 1] != sign:
            return False
        self.at += 1
        return True

    def _needs(self, sign: str) -> None:
        if not self._takes(sign):
            raise _MalformedError

    def _quotes(self, ends: str) -> str | None:
        """Return a word in quotes, if it is all that stands before the next of `ends`."""
        if match := _QUOTED.match(self.text, self.at):
            rest = self.text[match.end() :].lstrip(" \t")
            if not rest or rest[0] in ends:
                self.at = match.end()
                self._blanks()
                return match[0]
        return None

    def _raw(self, ends: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in ends:
            skipped = _INTERPOLATION.match(self.text, self.at)
            escaped = self.text[self.at] == "\\" and re.match(_ESCAPE, self.text[self.at :][:2])
            self.at = skipped.end() if skipped else self.at + (2 if escaped else 1)
        return self.text[start : self.at].strip(" \t")

    def _element(self, ends: str) -> str:
        self._blanks()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _MalformedError
        try:
            if self.text.startswith("[", self.at):
                return self._list()
            if self.text.startswith("{", self.at):
                return self._mapping()
            if (word := self._quotes(ends)) is not None:
                return word
            if _FUNCTION.match(self.text, self.at):
                return self._function()
            return self._words(ends)
        finally:
            self.depth -= 1

    def _words(self, ends: str) -> str:
        raw = self._raw(ends)
        if not raw:
            raise _MalformedError
        if _PLAIN.fullmatch(raw):
            return raw
        self.has_changed = True
        return _in_quotes(_unescaped(raw))

    def _function(self) -> str:
        start = self.at
        self.at = self.text.index("(", start) + 1
        name = self.text[start : self.at]
        found: list[str] = []
        while not self._takes(")"):
            if found:
                self._needs(",")
            self._blanks()
            named = _ARGUMENT.match(self.text, self.at)
            self.at = named.end() if named else self.at
            found.append((named[0] if named else "") + self._element(",)"))
        return f"{name}{','.join(found)})"

    def _list(self) -> str:
        self._needs("[")
        found: list[str] = []
        while not self._takes("]"):
            if found:
                self._needs(",")
            found.append(self._element(",]"))
        return f"[{','.join(found)}]"

    def _mapping(self) -> str:
        self._needs("{")
        found: list[tuple[str, bool, str]] = []  # key, does Hydra read it as one, value
        while not self._takes("}"):
            if found:
                self._needs(",")
            self._blanks()
            word = self._quotes(":")
            key = self._raw(":{}[],") if word is None else _out_of_quotes(word)
            reads = word is None and _PLAIN_KEY.fullmatch(key) and value_of(key) is not None
            if word is None and not key:
                raise _MalformedError
            if word is None and not reads:
                key = _unescaped(key)
            self._needs(":")
            found.append((key, bool(reads), self._element(",}")))
        _check_once([value_of(key) if reads else key for key, reads, _ in found], self.setting)
        if all(reads for _, reads, _ in found):
            return "{" + ",".join(f"{key}:{value}" for key, _, value in found) + "}"
        if self.setting not in MAPPINGS:
            raise _MalformedError
        self.has_changed = True
        pairs = (f"[{_in_quotes(_unescaped(k) if r else k)},{value}]" for k, r, value in found)
        return f"[{','.join(pairs)}]"
