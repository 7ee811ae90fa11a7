"""Sentences of four sources: cut by document, as many of each, in one style."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.config.compose import compose
from smezo_cli.config.fixed import plain as plain_node
from smezo_cli.errors import UserError
from smezo_cli.files.fetch import cache_dir
from smezo_cli.tasks.base import Tables
from smezo_cli.tasks.load import load_task
from smezo_cli.tasks.rotten_tomatoes import letters
from smezo_cli.tasks.snippets import read

MEMBERS = {"film": "a/film.txt", "tweet": "a/tweet.txt"}


def archive(members: Mapping[str, str]) -> bytes:
    """A gzipped tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def packaged(files: Mapping[str, str], cache: Path, rows_of_each: int) -> Tables:
    """What is read of a package with these files, which lies in the cache already."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        inner = archive(files)
        info = tarfile.TarInfo("p/inner.tar.gz")
        info.size = len(inner)
        tar.addfile(info, io.BytesIO(inner))
    content = buffer.getvalue()
    (cache / "packages").mkdir(parents=True, exist_ok=True)
    (cache / "packages" / "p.tar.gz").write_bytes(content)
    node: dict[str, Any] = {"name": "p", "version": "1", "file": "p.tar.gz", "sdist": True}
    node |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    node |= {"archive": "p/inner.tar.gz"}
    source = {"package": node, "members": MEMBERS, "rows_of_each": rows_of_each}
    return read({"source": source}, cache)


def made_up(documents: int, sentences: int, word: str) -> str:
    """Documents of sentences that share no run of three words."""
    return "".join(
        f"{d}_{s}\t0.5\t{word}{d}x{s} one{d}x{s} Two{d}x{s} .\n"
        for d in range(documents)
        for s in range(sentences)
    )


def test_a_document_is_in_one_split_and_a_quarter_of_them_in_test(tmp_path: Path) -> None:
    files = {"a/film.txt": made_up(200, 5, "f"), "a/tweet.txt": made_up(200, 5, "t")}
    found = packaged(files, tmp_path, rows_of_each=1000)
    documents = [{row.id.partition("_")[0] for row in rows} for rows in (found.train, found.test)]
    assert not documents[0] & documents[1]
    assert len(documents[0] | documents[1]) == 400
    # 400 draws with probability 1/4: 100, with a standard deviation of 8.7.
    assert 70 < len(documents[1]) < 130
    assert len(found.train) + len(found.test) == 2000
    assert found.train[0].fields["text"] == found.train[0].fields["text"].lower()
    assert found.classes == ("film", "tweet")


def test_sources_with_more_rows_give_as_many_as_the_others(tmp_path: Path) -> None:
    """The rows are not the first of the file, and are shared between the splits as all are."""
    files = {"a/film.txt": made_up(900, 1, "f"), "a/tweet.txt": made_up(60, 5, "t")}
    found = packaged(files, tmp_path, rows_of_each=300)
    counts = Counter(row.label for row in (*found.train, *found.test))
    assert counts == {0: 300, 1: 300}
    films = sorted(int(r.id[5:-2]) for r in (*found.train, *found.test) if r.label == 0)
    assert films[-1] > 800
    in_test = sum(row.label == 0 for row in found.test) / 300
    assert 0.15 < in_test < 0.35  # a standard deviation of 0.025 around 1/4


def test_copies_are_left_out_and_near_copies_are_not_in_test(tmp_path: Path) -> None:
    files = {
        "a/film.txt": made_up(40, 1, "f") + "99_1\t1\tF0x0 ONE0x0 two0x0!\n",  # a copy of the first
        "a/tweet.txt": made_up(40, 1, "t") + "50_0\t0\t...\n",  # no letters
    }
    found = packaged(files, tmp_path, rows_of_each=1000)
    rows = [*found.train, *found.test]
    assert len(rows) == 80
    assert len({letters(row.fields["text"]) for row in rows}) == 80
    longer = "".join(f"{k}_0\t0\tand so f{k}x0 one{k}x0 two{k}x0 it goes\n" for k in range(40))
    found = packaged({**files, "a/tweet.txt": longer}, tmp_path, rows_of_each=1000)
    train = {row.fields["text"] for row in found.train}
    for row in found.test:
        own = [w for w in row.fields["text"].split() if "x0" in w]
        assert not any(" ".join(own) in text for text in train)


def test_the_real_sentences() -> None:
    cfg = plain_node(compose(["task=snippets"]))["task"]
    try:
        task = load_task({**cfg, "num_train": None}, data_seed=0, cache=cache_dir())
    except UserError as error:
        pytest.skip(f"the real sentences cannot be had here: {error}")
    assert (len(task.train), len(task.dev), len(task.test)) == (10449, 400, 3507)
    assert Counter(row.label for row in task.test) == {0: 852, 1: 906, 2: 810, 3: 939}
    texts = [letters(row.fields["text"]) for row in (*task.train, *task.dev, *task.test)]
    assert len(set(texts)) == len(texts)
