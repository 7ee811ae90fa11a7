"""Read files of unknown origin within limits: ordinary ones only, of a bounded size and depth."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from io import BufferedRandom, FileIO, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smezo_cli.errors import UserError

_MOST_YAML_BYTES = 1 << 17  # ours have 8 kB at most

_MOST_YAML_NODES = 20_000

_MOST_DEPTH = 50

MOST_JSON_BYTES = 1 << 26

_MOST_EXPANDED = 1 << 18  # characters and nodes of settings after interpolation


# --- files -----------------------------------------------------------------------------------


def check_ordinary(path: Path) -> int:
    """Return the size of an ordinary file: a device or a pipe may have no end, or wait for ever.

    Raises:
        UserError: it is something else.
        OSError: there is none.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no ordinary file (a device, pipe or socket); give a file.")
    return status.st_size


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of an ordinary file.

    Raises:
        UserError: it is something else.
        OSError: it cannot be read.
    """
    check_ordinary(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, most_bytes: int) -> str:
    """Return the text of a small ordinary file.

    Raises:
        UserError: it cannot be read, is larger, or is not UTF-8.
    """
    try:
        size = check_ordinary(path)
        if size > most_bytes:
            raise UserError(f"{path} has {size} bytes, and {most_bytes} are the most that is read.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}).") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing or holds no object.

    One that nests deeper than any file of ours or of a model does is none, either: what walks
    through it would reach the limit of recursion.
    """
    try:
        value = json.loads(read_text(path, MOST_JSON_BYTES))
    except (UserError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not _nests_too_deep(value) else None


def _nests_too_deep(value: object) -> bool:
    level: list[Any] = [value]
    for _ in range(2 * _MOST_DEPTH):
        inside = [item.values() if isinstance(item, dict) else item for item in level]
        level = [x for items in inside for x in items if isinstance(x, dict | list)]
        if not level:
            return False
    return True


def open_own(path: Path) -> TextIO:
    """Open a text file of a run folder to read and append; see :func:`open_own_bytes`."""
    return TextIOWrapper(BufferedRandom(open_own_bytes(path)), encoding="utf-8")


def open_own_bytes(path: Path) -> FileIO:
    """Open a file of a run folder to read and append; a link might lead out of the folder.

    Raises:
        OSError: it cannot be opened, or is a link or no ordinary file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(22, "no ordinary file", str(path))
    return FileIO(handle, "a+")


def is_at(handle: int, path: Path) -> bool:
    """Return whether the name leads to the open file, and not to another one or to none."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def put_back(handle: int, path: Path) -> None:
    """Write an open file again under its name, which no longer leads to it; then open it again.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        place = 0
        while content := os.pread(handle, 1 << 20, place):
            place += file.write(content)
    os.replace(partial, path)


# --- settings --------------------------------------------------------------------------------


def load_yaml(path: Path) -> DictConfig:
    """Return the settings in a YAML file.

    Raises:
        UserError: it cannot be read, is no mapping, or unpacks to far more than it is.
    """
    return parse_yaml(read_yaml(path), path)


def read_yaml(path: Path) -> str:
    """Return the text of a YAML file; raise UserError where it cannot be read."""
    return read_text(path, _MOST_YAML_BYTES)


def parse_yaml(text: str, path: Path) -> DictConfig:
    """Return the settings in YAML text; `path` is where it comes from, for messages.

    Raises:
        UserError: it is no mapping, or unpacks to far more than it is.
    """
    if len(text) > _MOST_YAML_BYTES:
        raise UserError(f"{path}: its settings are longer than {_MOST_YAML_BYTES} characters.")
    _check_yaml(text, path)
    try:
        cfg = OmegaConf.create(text)
    except (OmegaConfBaseException, yaml.YAMLError, *BAD_VALUES) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    except AssertionError as error:  # what OmegaConf makes of a text that is one number
        raise UserError(f"{path} cannot be read (its settings are no mapping).") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} cannot be read (it holds a list).")
    return cfg


# What hostile YAML raises besides YAML's own errors: 1e99999 years, unhashable keys.
BAD_VALUES = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def check_folder(
    folder: Path, groups: Sequence[str], only: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Check the YAML files of some config groups before Hydra opens them.

    Args:
        folder: that the groups are in.
        groups: their names; "" is the folder itself.
        only: of a group the names of the files that matter; of others all do.

    Raises:
        UserError: naming the first file that is damaged or hostile.
    """
    for group in groups:
        for file in sorted((folder / group).glob("*.yaml")):
            if not file.is_dir() and file.stem in (only or {}).get(group, [file.stem]):
                _check_yaml(read_text(file, _MOST_YAML_BYTES), file)


def _check_yaml(text: str, path: Path) -> None:
    """Refuse YAML that unpacks to too many values, counting aliases from the parser's events."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = [(None, 0)]
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for event in yaml.parse(text, Loader=loader):
            size = 0
            anchor = getattr(event, "anchor", None)
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((anchor, 1))
                if len(opened) > _MOST_DEPTH:
                    raise UserError(f"{path} nests deeper than {_MOST_DEPTH} levels.")
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, size = opened.pop()
                if anchor is not None:
                    sizes[anchor] = size
            elif isinstance(event, yaml.ScalarEvent):
                size = 1
                if anchor is not None:
                    sizes[anchor] = size
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in sizes:
                    raise UserError(f"{path}: *{event.anchor} names nothing, or what it lies in.")
                size = sizes[event.anchor]
            name, inside = opened[-1]
            opened[-1] = (name, inside + size)
            if inside + size > _MOST_YAML_NODES:
                raise UserError(
                    f"{path} unpacks to more than {_MOST_YAML_NODES} values; that is no file of "
                    "settings."
                )
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error


_REFERENCE = re.compile(r"[A-Za-z_][\w.\[\]-]*|\.+[\w.]*")

_COMPUTED = re.compile(r"\$\{[^{}:]*\$\{|\$\{oc\.select:[^{}]*\$\{")


def check_expansion(tree: Mapping[str, Any]) -> None:
    """Refuse settings (as written, unresolved) whose interpolations grow without bound.

    Raises:
        UserError: naming the key.
    """
    sizes: dict[str, float] = {}
    under_way: set[str] = set()

    def node_at(path: str) -> Any:
        node: Any = tree
        for part in filter(None, path.split(".")):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    def size(node: Any, path: str) -> float:
        if path in sizes:
            return sizes[path]
        if path in under_way:
            raise UserError(f"{path} refers to itself.")
        if len(under_way) > 10 * _MOST_DEPTH:
            raise UserError(f"{path} stands at the end of too many references.")
        under_way.add(path)
        total = 1.0
        if isinstance(node, Mapping):
            for name, item in node.items():
                total += size(item, f"{path}.{name}".lstrip("."))
        elif isinstance(node, list):
            for at, item in enumerate(node):
                total += size(item, f"{path}[{at}]")
        elif isinstance(node, str):
            total += len(node)
            if "${" in node:
                total += referred(node, path)
        under_way.discard(path)
        sizes[path] = total
        if total > _MOST_EXPANDED and "${" in str(node):
            raise UserError(
                f"{path} unpacks to more than {_MOST_EXPANDED} characters; that is no setting."
            )
        return total

    def referred(text: str, path: str) -> float:
        if _COMPUTED.search(text):
            raise UserError(f"{path}: a reference inside the name of a reference is not followed.")
        if text.count("${") > 100:
            raise UserError(f"{path} holds more than 100 references.")
        total = 0.0
        for piece in text.split("${")[1:]:
            resolver, colon, words = piece.partition("}")[0].partition(":")
            # Of the resolvers, these alone look up what they are given.
            follows = resolver.strip() in ("oc.select", "oc.dict.keys", "oc.dict.values")
            for name in _REFERENCE.findall((words if follows else "") if colon else resolver):
                dots = len(name) - len(name.lstrip("."))
                base = path.split(".")[:-dots] if dots else []
                full = ".".join([*base, name.lstrip(".")]).strip(".")
                node = node_at(full)
                if node is not None:
                    total += size(node, full)
        return total

    for name, item in tree.items():
        size(item, str(name))


# --- single values ---------------------------------------------------------------------------


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 1 << 63


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from 0."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_text(value: object) -> bool:
    """Return whether a value is a text."""
    return isinstance(value, str)
