"""Hostile values as Hypothesis' strategies; sound bytes, trees and files spoiled with them."""

import contextlib
import copy
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from fuzz import product
from fuzz.cases import Case

MOST_PLACES = 20_000  # of a tree that is spoiled further
BIG = "@@a whole number of 5000 digits@@"  # json.dumps will not write it
DEEP: Any = 0
for _ in range(400):
    DEEP = [DEEP]

# Texts that mean something to what reads them: a template, OmegaConf, a path, YAML.
MEANT = (
    *("../../outside/keep.txt", "/etc/passwd", "~", "file:///etc/passwd", "NaN"),
    *("{text}", "{text!r}", "{text.__class__}", "%s", "${oc.env:HOME}", "${steps}", "true", "1"),
    *("${oc.decode:'${oc.env:HOME}'}", "${task}", "${hydra:runtime.cwd}", "???", "<s>", "null"),
)
SIGNS = "{}[]()<>'\"\\/,:;=&*!%$#@~|-+.0ax \t\r\n\0\u2028\u202e\ufeff\ud800\u00e9"
ANY_TEXT = st.text(SIGNS, max_size=12) | st.text(st.characters(exclude_categories=()), max_size=12)
TEXTS = st.sampled_from(MEANT) | ANY_TEXT
FLOATS = st.floats() | st.sampled_from(
    (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 5e-324, 1e-320, 1e38, 3.5e38, 1e308)
)
NUMBERS = (
    st.integers(-2, 9) | st.integers() | FLOATS | st.sampled_from((2**31, 2**63, 10**400, BIG))
)
TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.just("A" * 70_000),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(ANY_TEXT, some, max_size=3),
    max_leaves=6,
)
VALUES = TREES | st.just(DEEP) | st.just({"_target_": "os.system"})
SNIPPETS = (
    *(sign.encode("utf-8", "surrogatepass") for sign in SIGNS),
    *(b"\xff", b"\xfe\xff", b"\\ud800", b"1e999", b"9" * 400, b"NaN", b"---\n", b"\n\n"),
    *(b"&a", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"${"),
)
BYTES = st.sampled_from(SNIPPETS) | st.binary(max_size=32)


def hostile(case: Case) -> Any:
    """Draw a hostile value; a copy, for a case that changed it would change the cases after it."""
    value = case.draw(VALUES)
    return value if value is DEEP else copy.deepcopy(value)


def some_of(items: Sequence[Any]) -> st.SearchStrategy[list[Any]]:
    """Some of these, one to nine."""
    return st.lists(st.sampled_from(items), min_size=1, max_size=9)


def whole(bits: int = 64) -> st.SearchStrategy[int]:
    """Integers as headers hold them: small, at a power of two, or anything."""
    top = (1 << bits) - 1
    some = (0, 1, 2, 7, 8, 255, 65536, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62, top, top - 7)
    return st.sampled_from([each & top for each in some]) | st.integers(0, top)


def spoil_bytes(case: Case, data: bytes) -> bytes:
    """Cut, replace, insert, repeat or flip a few parts of bytes."""
    for _ in range(case.pick((1, 1, 2, 3, 8))):
        at = case.below(len(data) + 1)
        end = min(len(data), at + case.pick((1, 1, 2, 8, 64, 1000)))
        part = data[at:end]
        flipped = bytes(byte ^ (1 << case.below(8)) for byte in part[:1]) + part[1:]
        new = case.draw(BYTES | st.sampled_from((b"", part * 2, part * 100, flipped)))
        data = data[:at] + new + data[case.pick((at, end, end, end, len(data))) :]
    return data


def spoil_text(case: Case, text: str) -> str:
    """Spoil the bytes of a text; what is no text then is replaced."""
    data = spoil_bytes(case, text.encode("utf-8", "surrogatepass"))
    return data.decode("utf-8", "replace")


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


def spoil_tree(case: Case, tree: Any) -> Any:
    """Remove, copy, rename, repeat or replace a few parts of a tree, in place."""
    for _ in range(case.pick((1, 1, 1, 2, 4))):
        found = places(tree)
        if len(found) > MOST_PLACES:
            return tree
        if not found:
            return hostile(case)
        node, key = case.pick(found)
        match case.below(8):
            case 0:
                del node[key]
            case 1:
                other, name = case.pick(found)
                with contextlib.suppress(LookupError):
                    node[key] = json.loads(json.dumps(other[name]))
            case 2 if isinstance(node, dict):
                names = st.sampled_from(("name", "_target_", "../x", "path")) | ANY_TEXT
                node[case.draw(names)] = node.pop(key)
            case 3 if isinstance(node, list):
                node.extend(node[:1] * case.pick((1, 50)))
            case _:
                node[key] = hostile(case)
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


def spoil_safetensors(case: Case, data: bytes) -> bytes:
    """Put a hostile header in front of the tensors."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, struct.error):  # it is spoiled already
        header, rest = None, b""
    how = case.below(6)
    if how == 0:
        return struct.pack("<Q", case.draw(whole())) + data[8:]
    if how == 1 or not isinstance(header, dict):
        return spoil_bytes(case, data)
    for _ in range(case.pick((1, 2))):
        names = [name for name, at in header.items() if isinstance(at, dict) and "shape" in at]
        entry = header[case.pick(names)] if names else {}
        match case.below(7):
            case 0:
                entry["dtype"] = case.pick(("F64", "BF16", "F8_E4M3", "I64", "BOOL", "X", ""))
            case 1:
                entry["shape"] = case.draw(st.lists(whole(), max_size=4))
            case 2:
                entry["data_offsets"] = [case.draw(whole()), case.draw(whole())]
            case 3 if names:
                entry["data_offsets"] = header[case.pick(names)].get("data_offsets")
            case 4:
                header[case.pick(("", "../x", "x" * 1000, "\x00"))] = entry
            case 5 if names:
                del header[names[0]]
            case _:
                header = spoil_tree(case, header)
                break
    text = as_json(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def bomb(case: Case) -> bytes:
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
    return "\n".join(lines[case.pick(list(lines))]).encode() + b"\n"


def reseal(case: Case, tree: Any) -> Any:
    """A spoiled state.json or result.json with a checksum that is right, most of the time."""
    if not isinstance(tree, dict) or case.chance(0.1):
        return tree
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        # As it will be read: what JSON cannot tell apart (1 and True as keys) is one already. What
        # nests too deep for a checksum stays without one.
        tree = json.loads(as_json(tree))
        return product.sealed(tree) if isinstance(tree, dict) else tree
    return tree


def spoil_notes(case: Case, tree: Any) -> Any:
    """A spoiled tree of JSON; in most cases one of its larger parts alone, such as the notes."""
    if not isinstance(tree, dict) or case.chance(0.4):
        return spoil_tree(case, tree)
    notes = tree.get("notes") if isinstance(tree.get("notes"), dict) else tree
    parts = [name for name, part in notes.items() if isinstance(part, dict | list) and part]
    if parts and case.chance(0.7):
        name = case.pick(parts)
        notes[name] = spoil_tree(case, notes[name])
    elif notes:
        notes[case.pick(list(notes))] = hostile(case)
    return tree
