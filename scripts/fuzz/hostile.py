"""Make hostile values, and spoil sound bytes, trees and files."""

import contextlib
import copy
import json
import math
import random
from typing import Any

MOST_PLACES = 20_000  # of a tree that is spoiled further


BIG = "@@a whole number of 5000 digits@@"  # json.dumps will not write it
DEEP: Any = 0
for _ in range(400):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**400, BIG),
    *(0.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "x",
        "1",
        "true",
        "null",
        "\x00",
        "a\x00b",
        "\ud800",
        "\u2028",
        "\u202e",
        "\r",
        "\n",
    ),
    *("A" * 70_000, "../../outside/keep.txt", "/etc/passwd", "~", "file:///etc/passwd", "NaN"),
    *("{text}", "{text!r}", "{text.__class__}", "{", "}", "%s", "${oc.env:HOME}", "${steps}"),
    *("${oc.decode:'${oc.env:HOME}'}", "${task}", "${hydra:runtime.cwd}", "???", "${", "<s>"),
    *([], {}, [[]], [None], {"a": 1}, {"": ""}, {"_target_": "os.system"}, [1, "a", None], DEEP),
)
SNIPPETS = (
    *(b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",", b"\t"),
    *(b"{", b"}", b"[", b"]", b":", b"\\", b"\\ud800", b"1e999", b"9" * 400, b"-", b"NaN"),
    *(b"&a", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"${", b"---\n", b"%"),
)


def hostile(rng: random.Random) -> Any:
    """One of the values; a copy, for a case that changed it would change the cases after it."""
    value = rng.choice(VALUES)
    return value if value is DEEP else copy.deepcopy(value)


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few mutations of bytes."""
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64, 1000)))
        match rng.randrange(8):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[end:]
            case 2:
                data = data[:at] + rng.randbytes(end - at) + data[end:]
            case 3 | 4:
                data = data[:at] + rng.choice(SNIPPETS) + data[at:]
            case 5:
                data = data[:end] + data[at:]
            case 6:
                data = data[:at] + data[at:end] * rng.choice((2, 100)) + data[end:]
            case _:
                if at < len(data):
                    flipped = data[at] ^ (1 << rng.randrange(8))
                    data = data[:at] + bytes([flipped]) + data[at + 1 :]
    return data


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree of dicts and lists."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo and len(found) <= MOST_PLACES:  # a bomb has no end
        node = todo.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(pairs):
            found.append((node, key))
            if isinstance(value, dict | list) and value is not DEEP:
                todo.append(value)
    return found


def spoil_tree(rng: random.Random, tree: Any) -> Any:
    """A few mutations of a tree of dicts and lists, in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = places(tree)
        if len(found) > MOST_PLACES:
            return tree
        if not found:
            return hostile(rng)
        node, key = rng.choice(found)
        match rng.randrange(8):
            case 0:
                del node[key]
            case 1:
                other, name = rng.choice(found)
                with contextlib.suppress(LookupError):
                    node[key] = json.loads(json.dumps(other[name]))
            case 2 if isinstance(node, dict):
                node[rng.choice(("", "x", "name", "_target_", "../x", "\x00", "path"))] = node.pop(
                    key
                )
            case 3 if isinstance(node, list):
                node.extend(node[:1] * rng.choice((1, 50)))
            case _:
                node[key] = hostile(rng)
    return tree


def as_json(tree: Any, **how: Any) -> bytes:
    """JSON, with numbers and surrogates that no writer would let through."""
    text = json.dumps(tree, **how).replace(f'"{BIG}"', "7" * 5000)
    return text.encode("utf-8", "surrogatepass")


def as_yaml(tree: Any) -> bytes:
    """YAML of a tree; JSON is nearly a part of it."""
    import yaml

    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return as_json(tree)


def number(rng: random.Random, bits: int = 64) -> int:
    """An integer as headers hold them: small, at a power of two, or anything."""
    top = (1 << bits) - 1
    some = (0, 1, 2, 7, 8, 255, 65536, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62, top, top - 7)
    return rng.choice((*some, rng.getrandbits(bits))) & top


def bomb(rng: random.Random) -> bytes:
    """YAML that is short and unpacks to very much, or never ends."""
    lines = {
        "anchors": ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)],
        "merges": ["a0: &a0 {x: 1}"]
        + [f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}, m: *a{i - 1}}}" for i in range(1, 24)],
        "text": ["a0: '${a1}${a1}${a1}'"]
        + [f"a{i}: '${{a{i + 1}}}${{a{i + 1}}}'" for i in range(1, 40)]
        + ["a40: xxxxxxxxxx"],
        "cycle": ["a: &a [*a]"],
        "loop": ["a: ${b}", "b: ${a}"],
        "self": ["a: '${a}'"],
        "parent": ["a: {b: '${a}'}"],
        "deep": ["a: " + "[" * 3000 + "]" * 3000],
        "indents": [" " * i + "a:" for i in range(900)],
        "long": ["a: " + "x" * 3_000_000],
        "many": [f"k{i}: {i}" for i in range(40_000)],
        "quotes": ["a: '" + "''" * 50_000 + "'"],
        "env": ["a: ${oc.env:" + "${oc.env:" * 200 + "HOME" + "}" * 201],
        "nested": ["a: " + "${oc.decode:" * 300 + "1" + "}" * 300],
    }
    return "\n".join(lines[rng.choice(list(lines))]).encode() + b"\n"


def reseal(rng: random.Random, tree: Any) -> Any:
    """A spoiled state.json or result.json with a checksum that is right, most of the time."""
    from smezo_cli.files.sealed import sealed

    if not isinstance(tree, dict) or rng.random() < 0.1:
        return tree
    with contextlib.suppress(ValueError, TypeError):
        # As it will be read: what JSON cannot tell apart (1 and True as keys) is one already.
        tree = json.loads(as_json(tree))
        return sealed(tree) if isinstance(tree, dict) else tree
    return tree


def spoil_notes(rng: random.Random, tree: Any) -> Any:
    """A spoiled tree of JSON; in most cases one of its larger parts alone, such as the notes."""
    if not isinstance(tree, dict) or rng.random() < 0.4:
        return spoil_tree(rng, tree)
    notes = tree.get("notes") if isinstance(tree.get("notes"), dict) else tree
    parts = [name for name, part in notes.items() if isinstance(part, dict | list) and part]
    if parts and rng.random() < 0.7:
        name = rng.choice(parts)
        notes[name] = spoil_tree(rng, notes[name])
    elif notes:
        notes[rng.choice(list(notes))] = hostile(rng)
    return tree
