"""Read sentences of four sources (Hutto and Gilbert, 2014): which one is each from?

Film reviews, product reviews, tweets and newspaper editorials lie in one package, in styles of
their own; all are rewritten to one style, so that capitals and spacing do not give a source away.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smezo_cli.files.fetch import fetch_package
from smezo_cli.tasks.base import Row, Tables
from smezo_cli.tasks.rotten_tomatoes import held_out, letters, plain, rated


def read(cfg: Mapping[str, Any], cache: Path) -> Tables:
    """Return rows of the package of `cfg.source`: `text`, label by source, as many of each.

    All sentences of a review or an editorial are either in train or in test, a quarter of the
    documents in test; copies and near-copies of train sentences are not in test.
    """
    source = cfg["source"]
    node, members = source["package"], source["members"]
    sdist = fetch_package(node, cache=cache)
    seen = set[str]()
    train, test = list[Row](), list[Row]()
    for label, (name, member) in enumerate(members.items()):
        found = list[tuple[bytes, bool, Row]]()
        for number, _, text in rated(sdist, {**node, "member": member}):
            text = plain(text)
            key = letters(text)
            if not key or key in seen:
                continue
            seen.add(key)
            document = _hash("document", name, number.partition("_")[0])
            row = Row({"text": text}, label, f"{name}/{number}")
            found.append((_hash(name, number), document[0] < 64, row))
        found.sort(key=lambda item: item[0])
        for _, is_test, row in found[: source["rows_of_each"]]:
            (test if is_test else train).append(row)
    new = held_out([row.fields["text"] for row in test], [row.fields["text"] for row in train])
    return Tables(
        train=train,
        test=[row for row, kept in zip(test, new, strict=True) if kept],
        fields=("text",),
        classes=tuple(members),
        source=f"{node['name']} {node['version']} (test: other documents, clean of train)",
    )


def _hash(*words: str) -> bytes:
    return hashlib.sha256("/".join(words).encode()).digest()
