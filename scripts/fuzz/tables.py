"""Kinds `data` and `data_names`: files of the user's own data, and their names."""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable
from typing import Any

from fuzz import product
from fuzz.cases import Case, kind
from fuzz.fixtures import QUICK, settings_of, tiny_model
from fuzz.hostile import BIG, DEEP, as_json, spoil_bytes, spoil_text, spoil_tree

_OWN: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "classification": (
        [{"text": f"row {i} is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(12)],
        ["task.prompt='{text} It was'", "task.labels={0: bad, 1: good}"],
    ),
    "choice": (
        [{"q": f"q {i}", "a": f"yes {i}", "b": "no", "label": i % 2} for i in range(12)],
        ["task.prompt='{q}'", "task.options=[a,b]"],
    ),
    "generation": (
        [{"q": f"q {i}", "answer": f"a {i}"} for i in range(12)],
        ["task.prompt='{q}'", "task.answer=answer"],
    ),
}
_SUFFIXES = ("csv", "tsv", "jsonl", "json", "parquet")


def write_table(case: Case, rows: list[dict[str, Any]], suffix: str) -> str:
    """Spoiled rows in a file of that kind; its path."""
    import csv

    rows = json.loads(json.dumps(rows))
    file = case.folder / f"data.{suffix}"
    wrecked = case.below(10)
    if wrecked < 6:
        rows = spoil_tree(case, rows)
    if suffix in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="," if suffix == "csv" else "\t")
        some = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        writer.writerow(some[0] if some else ["text"])
        writer.writerows(
            [v if v != BIG else "7" * 5000 for v in map(_short, row.values())] for row in some
        )
        data = text.getvalue().encode("utf-8", "surrogatepass")
    elif suffix == "json":
        data = as_json(rows)
    elif suffix == "jsonl":
        data = b"\n".join(as_json(row) for row in (rows if isinstance(rows, list) else [rows]))
    else:
        data = parquet(case, rows)
    if wrecked >= 5:
        data = spoil_bytes(case, data)
    if case.chance(0.05) and suffix != "parquet":
        with contextlib.suppress(UnicodeError):
            data = data.decode().encode(case.pick(("utf-16", "utf-32", "latin-1", "cp037")))
    file.write_bytes(data)
    return f"./data.{suffix}"


def _short(value: Any) -> Any:
    return "deep" if value is DEEP else value


def parquet(case: Case, rows: Any) -> bytes:
    """A Parquet file: of the rows, of strange types, or one that unpacks to very much."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    sink = io.BytesIO()
    n = 12
    strange: dict[str, Callable[[], Any]] = {
        "bomb": lambda: pa.array(["A" * 5000]).take(pa.array([0] * 20_000)),
        "many": lambda: pa.array(["x"]).take(pa.nulls(400_000, pa.int64()).fill_null(0)),
        "lists": lambda: pa.array([[["a"], []]] * n),
        "struct": lambda: pa.array([{"a": {"b": 1}}] * n),
        "map": lambda: pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
        "bytes": lambda: pa.array([b"\xff\xfe\x00"] * n),
        "time": lambda: pa.array([2**62] * n, pa.timestamp("us")),
        "date": lambda: pa.array([2**31 - 1] * n, pa.date32()),
        "duration": lambda: pa.array([2**62] * n, pa.duration("s")),
        "decimal": lambda: pa.array([1] * n).cast(pa.decimal128(38, 10)),
        "null": lambda: pa.nulls(n),
        "dictionary": lambda: pa.array(["a", "b"] * (n // 2)).dictionary_encode(),
        "nan": lambda: pa.array([math.nan] * n),
        "uint": lambda: pa.array([2**64 - 1] * n, pa.uint64()),
    }
    try:
        if case.chance(0.4):
            array = strange[case.pick(list(strange))]()
            table = pa.table({"text": array, "label": pa.array([0, 1] * (len(array) // 2))})
            if case.chance(0.3):
                table = table.rename_columns([case.pick(("label", "q", "", "a.b")), "text"])
        else:
            table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        codec = case.pick(("none", "snappy", "gzip", "zstd"))
        pq.write_table(table, sink, compression=codec, use_dictionary=case.chance(0.8))
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError, AttributeError):
        pq.write_table(pa.table({"text": ["a"] * n, "label": [0, 1] * (n // 2)}), sink)
    return sink.getvalue()


def read_rows(case: Case, node: dict[str, Any]) -> None:
    """Rows as a run reads them: the task, its fingerprint, its tokens, its lines of output."""
    task = case.call(product.load_task, node, data_seed=0, cache=case.folder / "cache")
    if task is None:
        return
    product.fingerprint([*task.train, *task.dev, *task.test])
    rows = [*task.train[:4], *task.dev[:2], *task.test[:2]]
    tokenizer = tiny_model()[1]
    case.call(
        product.encode,
        rows,
        task.prompts[0],
        tokenizer,
        128,
        task.kind,
        node.get("max_new_tokens", 0),
    )
    lines = [json.dumps({"fields": dict(row.fields)}, ensure_ascii=False) for row in rows]
    (case.folder / "out.jsonl").write_text("\n".join(lines), encoding="utf-8")


@kind(6)
def data(case: Case) -> None:
    """Files of tasks on the user's own data, read as `smezo train` and `smezo predict` do."""
    which = case.pick(list(_OWN))
    suffix = case.pick(_SUFFIXES)
    path = write_table(case, _OWN[which][0], suffix)
    words = (f"task={which}", *_OWN[which][1], "model=tiny-llama")
    node = dict(settings_of(*words, "task.data=x.csv").task) | {"data": path}
    if case.chance(0.04):
        case.smezo("train", *words[:-1], f"task.data={path}", *QUICK)
        return
    if case.chance(0.1):
        template = str(node["prompt"])
        case.call(product.unlabelled, node, product.Prompt(template, ("a", "b"), "{option}"), path)
        return
    read_rows(case, node)


@kind(1)
def data_names(case: Case) -> None:
    """Names of data files that are no ordinary files, or no names."""
    folder = case.folder
    (folder / "good.csv").write_text("text,label\n" + "a,0\nb,1\n" * 6)
    (folder / "dir.csv").mkdir()
    (folder / "link.csv").symlink_to("link.csv")
    (folder / "gone.csv").symlink_to("nowhere.csv")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "null.json").symlink_to("/dev/null")
    (folder / "mem.csv").symlink_to("/proc/self/mem")
    os.mkfifo(folder / "pipe.csv")
    os.mkfifo(folder / "pipe.parquet")
    names = [
        *("dir.csv", "link.csv", "gone.csv", "zero.jsonl", "null.json", "mem.csv", "pipe.csv"),
        *("pipe.parquet", "a\0b.csv", "x" * 300 + ".csv", "/" * 300, "~nobody/x.csv", "good.CSV"),
        *("good.csv/x.csv", ".", "..", "/", "/dev/zero", "/dev/stdin", "\ud800.csv", "\n.csv"),
        *("https://example.org/x.csv", "file:///etc/passwd", "../case/good.csv", "a/b", "a/b/c"),
        *("hf://x/y.csv", "good.csv\0", "-", "--", "x" * 5000, "/".join("y" * 200) + ".csv"),
    ]
    name = case.pick(names)
    if case.chance(0.3):
        name = spoil_text(case, name)
    node = dict(
        settings_of(
            "task=classification", *_OWN["classification"][1], "model=tiny-llama", "task.data=x.csv"
        ).task
    )
    node |= {"data": name}
    if case.chance(0.3):
        node |= {"data": "good.csv", "test_data": name}
    read_rows(case, node)
