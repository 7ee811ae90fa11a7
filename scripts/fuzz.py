"""Hostile inputs through smezo's own entries: each gives a result or one sentence, nothing else.

    python scripts/fuzz.py --cases 20000 --seed 0 --json fuzz.json     all kinds
    python scripts/fuzz.py --kind gguf --cases 500                     one kind
    python scripts/fuzz.py --kind gguf --case 17 --seed 0              one case, with its traceback

A case is keyed by seed, kind and number alone, and runs in a forked worker under an alarm and a
memory limit. A finding is: a crash or traceback, a refusal that is no single sentence, a case that
lasts longer than the alarm, a worker that dies, a file made, changed or removed outside of the
folders that the case may write to, an unpickled class, a network connection.

Another format gets a kind in a few lines: a function from `Case` to nothing, below `@kind(share)`,
that writes hostile files under `case.folder` and calls `case.smezo(...)` or `case.call(...)`.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALARM_S = 5  # of a case, in seconds of its processor
WAIT_S = 30  # of the clock: a case that waits for something, or a machine that has no time for it
MOST_PLACES = 20_000  # of a tree that is spoiled further
MEMORY_BYTES = 3 << 30  # that a worker may map beyond what it began with

# --- cases -----------------------------------------------------------------------------------


class Finding(Exception):
    """What must not happen has happened."""


class TooLong(BaseException):
    """The alarm; no handler of the product may catch it."""


@dataclass
class Case:
    """One hostile input.

    Attributes:
        rng: keyed by seed, kind and number.
        folder: the current folder, empty at first; the case makes its inputs here.
        fixtures: sound files to spoil copies of: `run`, `adamw` (a run, too), `model`,
            `tiny.gguf`, `tiny.delta`.
    """

    rng: random.Random
    folder: Path
    fixtures: Path
    refused: bool = False
    output: str = ""

    def smezo(self, *words: str, codes: tuple[int, ...] = (0,)) -> None:
        """The command line itself: one of these exit codes, or 2 with one sentence."""
        from smezo_cli.cli.verbs import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        self.output = out.getvalue()
        said = err.getvalue()
        # What is announced while files are fetched or prepared is no refusal.
        told = re.compile(r"out: \d+ results, \d+ of them new")  # by --collect, of what it wrote
        lines = [line for line in said.strip().splitlines() if not told.fullmatch(line)]
        if code not in (*codes, 2) or "Traceback" in said:
            raise Finding(f"exit code {code}: {said[-3000:]}")
        if code == 2 and (len(lines) != 1 or not lines[0].startswith("smezo: ")):
            raise Finding(f"refused in {len(lines)} lines: {said[-3000:]}")
        if code != 2 and lines:
            raise Finding(f"done, with complaints: {said[-3000:]}")
        self.refused |= code == 2

    def call(self, function: Callable[..., Any], *words: Any, **more: Any) -> Any:
        """What a verb calls: a value, or None after a UserError of one line."""
        from smezo_cli.errors import UserError

        try:
            return function(*words, **more)
        except UserError as error:
            self.refused = True
            if "\n" in str(error):
                raise Finding(f"refused in several lines: {error}") from error
            return None


@dataclass(frozen=True)
class Kind:
    """A way to make cases.

    Attributes:
        make: makes and runs one.
        share: of the cases, by weight.
    """

    make: Callable[[Case], None]
    share: float


KINDS: dict[str, Kind] = {}


def kind(share: float) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a kind under the name of its function."""

    def register(make: Callable[[Case], None]) -> Callable[[Case], None]:
        KINDS[make.__name__] = Kind(make, share)
        return make

    return register


# --- spoiling --------------------------------------------------------------------------------

_BIG = "@@a whole number of 5000 digits@@"  # json.dumps will not write it
_DEEP: Any = 0
for _ in range(400):
    _DEEP = [_DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**400, _BIG),
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
    *([], {}, [[]], [None], {"a": 1}, {"": ""}, {"_target_": "os.system"}, [1, "a", None], _DEEP),
)
SNIPPETS = (
    *(b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",", b"\t"),
    *(b"{", b"}", b"[", b"]", b":", b"\\", b"\\ud800", b"1e999", b"9" * 400, b"-", b"NaN"),
    *(b"&a", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"${", b"---\n", b"%"),
)


def hostile(rng: random.Random) -> Any:
    """One of the values; a copy, for a case that changed it would change the cases after it."""
    value = rng.choice(VALUES)
    return value if value is _DEEP else copy.deepcopy(value)


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
            if isinstance(value, dict | list) and value is not _DEEP:
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
    text = json.dumps(tree, **how).replace(f'"{_BIG}"', "7" * 5000)
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


# --- kinds: data -----------------------------------------------------------------------------

_ROWS = [{"text": f"row {i} is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(12)]
_OWN = {
    "classification": ([], _ROWS, ["task.prompt='{text} It was'", "task.labels={0: bad, 1: good}"]),
    "choice": (
        [],
        [{"q": f"q {i}", "a": f"yes {i}", "b": "no", "label": i % 2} for i in range(12)],
        ["task.prompt='{q}'", "task.options=[a,b]"],
    ),
    "generation": (
        [],
        [{"q": f"q {i}", "answer": f"a {i}"} for i in range(12)],
        ["task.prompt='{q}'", "task.answer=answer"],
    ),
}
_SUFFIXES = ("csv", "tsv", "jsonl", "json", "parquet")
_QUICK = (
    *("model=tiny-llama", "device=cpu", "steps=1", "batch_size=2", "compile=false"),
    *("task.num_train=4", "task.num_dev=2", "task.num_test=2", "method.executor=sequential"),
)


def write_table(case: Case, rows: list[dict[str, Any]], suffix: str) -> str:
    """Spoiled rows in a file of that kind; its path."""
    import csv

    rng = case.rng
    rows = json.loads(json.dumps(rows))
    file = case.folder / f"data.{suffix}"
    wrecked = rng.random()
    if wrecked < 0.6:
        rows = spoil_tree(rng, rows)
    if suffix in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="," if suffix == "csv" else "\t")
        some = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        writer.writerow(some[0] if some else ["text"])
        writer.writerows(
            [v if v != _BIG else "7" * 5000 for v in map(_short, row.values())] for row in some
        )
        data = text.getvalue().encode("utf-8", "surrogatepass")
    elif suffix == "json":
        data = as_json(rows)
    elif suffix == "jsonl":
        data = b"\n".join(as_json(row) for row in (rows if isinstance(rows, list) else [rows]))
    else:
        data = parquet(rng, rows)
    if wrecked >= 0.5:
        data = spoil_bytes(rng, data)
    if rng.random() < 0.05 and suffix != "parquet":
        with contextlib.suppress(UnicodeError):
            data = data.decode().encode(rng.choice(("utf-16", "utf-32", "latin-1", "cp037")))
    file.write_bytes(data)
    return f"./data.{suffix}"


def _short(value: Any) -> Any:
    return "deep" if value is _DEEP else value


def parquet(rng: random.Random, rows: Any) -> bytes:
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
        if rng.random() < 0.4:
            array = strange[rng.choice(list(strange))]()
            table = pa.table({"text": array, "label": pa.array([0, 1] * (len(array) // 2))})
            if rng.random() < 0.3:
                table = table.rename_columns([rng.choice(("label", "q", "", "a.b")), "text"])
        else:
            table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        codec = rng.choice(("none", "snappy", "gzip", "zstd"))
        pq.write_table(table, sink, compression=codec, use_dictionary=rng.random() < 0.8)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError, AttributeError):
        pq.write_table(pa.table({"text": ["a"] * n, "label": [0, 1] * (n // 2)}), sink)
    return sink.getvalue()


_settings: dict[str, Any] = {}


def settings_of(*words: str) -> Any:
    """Checked settings, composed once a worker."""
    from smezo_cli.config import compose, launch

    key = repr(words)
    if key not in _settings:
        _settings[key] = launch.check(compose.compose(words))
    return _settings[key]


def tiny_model() -> tuple[Any, Any]:
    """tiny-llama and its tokenizer, loaded once a worker."""
    import torch

    from smezo_cli.models.load import load_model

    if "model" not in _settings:
        node = settings_of("task=toy", "model=tiny-llama").model
        _settings["model"] = load_model(
            node, dtype=torch.float32, device=torch.device("cpu"), cache=Path("cache")
        )
    return _settings["model"]


def read_rows(case: Case, node: dict[str, Any]) -> None:
    """Rows as a run reads them: the task, its fingerprint, its tokens, its lines of output."""
    from smezo_cli.scoring.candidates import encode
    from smezo_cli.tasks import load_task
    from smezo_cli.tasks.base import fingerprint

    task = case.call(load_task, node, data_seed=0, cache=case.folder / "cache")
    if task is None:
        return
    fingerprint([*task.train, *task.dev, *task.test])
    rows = [*task.train[:4], *task.dev[:2], *task.test[:2]]
    tokenizer = tiny_model()[1]
    case.call(
        encode, rows, task.prompts[0], tokenizer, 128, task.kind, node.get("max_new_tokens", 0)
    )
    lines = [json.dumps({"fields": dict(row.fields)}, ensure_ascii=False) for row in rows]
    (case.folder / "out.jsonl").write_text("\n".join(lines), encoding="utf-8")


@kind(6)
def data(case: Case) -> None:
    """Files of tasks on the user's own data, read as `smezo train` and `smezo predict` do."""
    from smezo_cli.tasks import own

    rng = case.rng
    which = rng.choice(list(_OWN))
    suffix = rng.choice(_SUFFIXES)
    path = write_table(case, _OWN[which][1], suffix)
    words = (f"task={which}", *_OWN[which][2], "model=tiny-llama")
    node = dict(settings_of(*words, "task.data=x.csv").task) | {"data": path}
    if rng.random() < 0.04:
        case.smezo("train", *words[:-1], f"task.data={path}", *_QUICK)
        return
    if rng.random() < 0.1:
        from smezo_cli.tasks import Prompt

        template = str(node["prompt"])
        case.call(own.unlabelled, node, Prompt(template, ("a", "b"), "{option}"), path)
        return
    read_rows(case, node)


@kind(1)
def data_names(case: Case) -> None:
    """Names of data files that are no ordinary files, or no names."""
    rng = case.rng
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
    name = rng.choice(names)
    if rng.random() < 0.3:
        name = spoil_bytes(rng, name.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    node = dict(
        settings_of(
            "task=classification", *_OWN["classification"][2], "model=tiny-llama", "task.data=x.csv"
        ).task
    )
    node |= {"data": name}
    if rng.random() < 0.3:
        node |= {"data": "good.csv", "test_data": name}
    read_rows(case, node)


_BENCHMARKS: dict[str, list[dict[str, Any]]] = {
    "rte": [
        {"premise": f"p {i}", "hypothesis": "h", "label": "entailment", "idx": i} for i in range(8)
    ],
    "boolq": [{"passage": "p", "question": f"q {i}", "label": i % 2 == 0} for i in range(8)],
    "copa": [
        {"premise": "p.", "choice1": "a", "choice2": f"b {i}", "question": "cause", "label": i % 2}
        for i in range(8)
    ],
    "multirc": [
        {
            "passage": {
                "text": "t",
                "questions": [{"question": "q", "answers": [{"text": f"a {i}", "label": 1}]}],
            }
        }
        for i in range(8)
    ],
    "record": [
        {
            "passage": {
                "text": "Ann met Bob.\n@highlight\nx",
                "entities": [{"start": 0, "end": 2}],
            },
            "qas": [{"query": "@placeholder met", "answers": [{"text": "Ann"}]}],
        }
        for _ in range(8)
    ],
    "wsc": [
        {
            "text": "Ann met Bob",
            "label": True,
            "target": {"span1_text": "Ann", "span2_text": "Bob", "span1_index": 0},
        }
        for _ in range(8)
    ],
}


@kind(3)
def benchmarks(case: Case) -> None:
    """The benchmarks' own files below task.data_dir."""
    rng = case.rng
    name = rng.choice(list(_BENCHMARKS))
    node = dict(settings_of(f"task={name}", "model=tiny-llama", "task.data_dir=in").task)
    node |= {"num_train": 4, "num_dev": 2, "num_test": 2, "data_dir": "in"}
    folder = case.folder / "in"
    for split in ("train", "test"):
        rows = json.loads(json.dumps(_BENCHMARKS[name]))
        if split == "train" or rng.random() < 0.2:
            rows = spoil_tree(rng, rows)
        data = b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows]))
        if rng.random() < 0.4:
            data = spoil_bytes(rng, data)
        file = folder / node["source"]["files"][split]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    read_rows(case, node)


# --- kinds: settings -------------------------------------------------------------------------

_KEYS = (
    *("steps", "lr", "eps", "sparsity", "seed", "batch_size", "name", "device", "dtype", "task"),
    *("model", "method", "logger", "hydra", "task.prompt", "task.labels", "task.name", "keep"),
    *("model.name", "model.path", "model.config", "model.config.hidden_size", "model.tiny.seed"),
    *("model.config.num_hidden_layers", "model.config.vocab_size", "model.max_length"),
    *("method.mask", "method.freeze", "method._target_", "method.optimizer", "lr_schedule"),
    *("method.optimizer._target_", "method.num_queries", "logger.tags", "hydra.mode", "recipe"),
    *("hydra/launcher", "hydra.launcher._target_", "hydra.callbacks", "hydra.job.name", "x.y"),
    *("hydra.callbacks.x._target_", "hydra.job_logging", "hydra.searchpath", "hydra.sweeper"),
    *("experiment", "hydra/sweeper", "hydra.verbose", "hydra.output_subdir", "model.trust"),
    *("task@x", "task@_global_", "hydra.job.env_set", "model.revision", "task.num_train"),
)
_WORDS = (
    *("", "null", "1", "-1", "1e999", "nan", "inf", "0x10", "1_000", "true", "{}", "[]", "a b"),
    *("{a: 1}", "[1,2", "'", '"', "\\", "${steps}", "${oc.env:HOME}", "${lr}${lr}", "${.}", "???"),
    *("range(0,3)", "choice(1,2)", "interval(0,1)", "sort(3,1)", "glob(*)", "1,2,3", "a=b", "=="),
    *("${oc.decode:'[1]'}", "${model}", "\x00", "\u202e", "é", "\ud800", "x" * 10_000, "(" * 300),
    *(
        "[" * 300,
        "{" * 300,
        "os.system",
        "smezo_cli.files.atomic.write_text",
        "torch.optim.lr_scheduler.os",
    ),
    *("torch.optim.Adam", "builtins.eval", "../../outside/keep.txt", "mezo", "toy", "joblib"),
    *(
        "smezo_cli.config.launch.shutil.rmtree",
        "9" * 5000,
        "${hydra:runtime.cwd}",
        "${oc.create:{a: 1}}",
    ),
    *("100000000000000000000", "['a','b']", "str(1)", "json_str({})", "extend_list(1)", "@", "*"),
)


_ODD_FLAGS = (
    *("--", "-x", "--cfg", "--info", "-m", "--resolve", "--package=x", "--config-dir=."),
    *("--help", "--hydra-help=1", "-c=job", "-mr"),
)


def override(rng: random.Random) -> str:
    """A word of the command line."""
    match rng.randrange(10):
        case 0:
            word = "".join(
                chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x300))))
                for _ in range(rng.randrange(1, 30))
            )
        case 1:
            word = rng.choice(_WORDS)
        case 2:
            word = rng.choice(_ODD_FLAGS)
        case _:
            word = rng.choice(("", "", "", "+", "++", "~")) + rng.choice(_KEYS)
            word += rng.choice(("=", "=", "=", "=", "", "==", ":=")) + rng.choice(_WORDS)
    if rng.random() < 0.15:
        word = spoil_bytes(rng, word.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return word


_BASE = ("task=toy", "model=tiny-llama")


@kind(2)
def overrides(case: Case) -> None:
    """Words on the command line, through the real parser; nothing is trained."""
    rng = case.rng
    words = [override(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    # A folder of the user's choice is the user's; settings are shown, and a plan is made of some.
    if rng.random() < 0.2:
        words = [w for w in words if not w.startswith("-")]
        case.smezo("plan", *_BASE, *words)
    else:
        case.smezo("train", *_BASE, *words, "--cfg", "job")


@kind(0.5)
def verbs(case: Case) -> None:
    """Words for the other verbs."""
    rng = case.rng
    shutil.copytree(case.fixtures / "run", case.folder / "runs" / "a")
    verb = rng.choice(
        ("runs", "eval", "predict", "export", "replay", "ls", "show", "completion", "bench")
    )
    odd = ("--sort", "--mean", "--compare", "--json", "--step", "-1", "--out", "no/out.jsonl", "x")
    words = [rng.choice((*odd, override(rng))) for _ in range(rng.choice((1, 2, 3)))]
    if verb == "bench":
        words = ["task=toy", "model=nothing", *words]
    if verb in ("eval", "predict", "export", "replay"):
        words = ["runs/a", *words]
    if any(word.startswith(("/", "..")) for word in words):
        return
    case.smezo(verb, *words, codes=(0, 1) if verb == "replay" else (0,))


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


@kind(2)
def configs(case: Case) -> None:
    """YAML files of --config-dir: a task, a model, a method, an experiment, Hydra's own."""
    import yaml

    from smezo_cli.config.fixed import CONF_DIR

    rng = case.rng
    group = rng.choice(("task", "model", "method", "experiment", "logger", "hydra/launcher"))
    sample = {
        "task": "task/toy.yaml",
        "model": "model/tiny-llama.yaml",
        "method": rng.choice(("method/sparse_mezo.yaml", "method/adamw.yaml")),
        "experiment": "experiment/embedded.yaml",
        "logger": "logger/jsonl.yaml",
        "hydra/launcher": "logger/wandb.yaml",
    }[group]
    text = (CONF_DIR / sample).read_text(encoding="utf-8")
    tree = yaml.safe_load(text) or {}
    head = "".join(line + "\n" for line in text.splitlines()[:1] if "@package" in line).encode()
    if group == "experiment":
        head = b"# @package _global_\n"
        tree = {
            "steps": 2,
            "hydra": {"mode": "RUN"},
            "defaults": [{"override /model": "tiny-llama"}],
        }
    if group == "hydra/launcher":
        tree = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
    if rng.random() < 0.75:
        tree = spoil_tree(rng, tree)
    written = as_yaml(tree)
    if rng.random() < 0.4:
        written = spoil_bytes(rng, written)
    if rng.random() < 0.2:
        written += bomb(rng)
    file = case.folder / "conf" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(head + written)
    base = [word for word in _BASE if not word.startswith(f"{group}=")]
    words = ["--config-dir", "conf", *base, f"{group}=mine"]
    if rng.random() < 0.2:
        # Run it, as far as it goes: to the construction of what the file names.
        quick = [w for w in _QUICK if not w.startswith(("model=", "method."))]
        case.smezo("train", *words, *quick)
    elif rng.random() < 0.3:
        case.smezo("train", *words, "--cfg", "all")
    else:
        case.smezo("train", *words, "--cfg", "job", *(["--resolve"] if rng.random() < 0.5 else []))


# --- kinds: run folders ----------------------------------------------------------------------


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


def spoil_tensors(rng: random.Random, file: Path) -> None:
    """Other tensors, and other words beside them, under digests that are right."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from smezo_cli.store.saved import tensors_digest

    with safe_open(file, framework="pt") as saved:
        about = json.loads((saved.metadata() or {}).get("smezo", "{}"))
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(tensors))
        was = tensors[name]
        some: list[Callable[[], Any]] = [
            lambda was=was: torch.full_like(was, math.nan) if was.is_floating_point() else -was,
            lambda was=was: was * 1e38 if was.is_floating_point() else was + 2**40,
            lambda was=was: was.double(),
            lambda was=was: was.to(rng.choice((torch.int8, torch.bool, torch.bfloat16))),
            lambda was=was: was.reshape(-1)[: rng.randrange(3)].clone(),
            lambda was=was: was[None].clone(),
            lambda: torch.zeros(()),
            lambda: torch.zeros(0, 7),
        ]
        tensors[name] = rng.choice(some)()
        if rng.random() < 0.3:
            tensors[rng.choice(("x", "../x", "dev", "test", "labels"))] = tensors.pop(name)
    if rng.random() < 0.5:
        about = spoil_tree(rng, about)
    if isinstance(about, dict):
        about["sha256"] = tensors_digest(tensors)
    words = as_json(about).decode("utf-8", "replace")
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, {"smezo": words})
    state = file.parent / "state.json"
    if not state.is_file():  # a pipe would wait for ever
        return
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        tree = json.loads(state.read_text())
        tree["files"][file.name] = about["sha256"]
        state.write_bytes(as_json(reseal(rng, tree)))


def spoil_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A hostile header in front of the tensors."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, struct.error):  # it is spoiled already
        return spoil_bytes(rng, data)
    match rng.randrange(6):
        case 0:
            return struct.pack("<Q", number(rng)) + data[8:]
        case 1:
            return spoil_bytes(rng, data)
        case _:
            for _ in range(rng.choice((1, 2))):
                names = [name for name in header if name != "__metadata__"]
                entry = header[rng.choice(names)] if names else {}
                match rng.randrange(7):
                    case 0:
                        entry["dtype"] = rng.choice(
                            ("F64", "BF16", "F8_E4M3", "I64", "BOOL", "X", "")
                        )
                    case 1:
                        entry["shape"] = [number(rng) for _ in range(rng.randrange(5))]
                    case 2:
                        entry["data_offsets"] = [number(rng), number(rng)]
                    case 3:
                        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
                    case 4:
                        header[rng.choice(("", "../x", "x" * 1000, "\x00"))] = entry
                    case 5 if names:
                        del header[names[0]]
                    case _:
                        spoil_tree(rng, header)
                        break
            if not isinstance(header, dict):
                header = {"x": header}
            text = as_json(header)
            text += b" " * (-len(text) % 8)
            return struct.pack("<Q", len(text)) + text + rest


@kind(5)
def run_folders(case: Case) -> None:
    """Run folders from elsewhere: state, result, settings, metrics, tensors, links."""
    rng = case.rng
    run = case.folder / "runs" / "g" / "r"
    which = rng.choice(("run", "run", "adamw"))
    shutil.copytree(case.fixtures / which, run)
    for _ in range(rng.choice((1, 1, 2))):
        files = [f for f in sorted(run.rglob("*")) if f.is_file() and not f.is_symlink()]
        if not files:
            break
        heavier = [f for f in files if f.suffix == ".json" or f.name == "config.yaml"]
        file = rng.choice((*files, *heavier))
        match rng.randrange(12):
            case 0:
                file.unlink()
                file.symlink_to(
                    rng.choice(("/dev/zero", "../../../../outside/keep.txt", "/", "/proc/self/mem"))
                )
            case 1:
                name = rng.choice(
                    (
                        ".result.json.partial",
                        ".config.yaml.partial",
                        "console.log",
                        "metrics.jsonl",
                        ".lock",
                        ".predictions-test.jsonl.partial",
                        "predictions-test.jsonl",
                    )
                )
                with contextlib.suppress(IsADirectoryError, FileExistsError):
                    (run / name).unlink(missing_ok=True)
                    (run / name).symlink_to("../../../../outside/keep.txt")
            case 2:
                file.unlink()
                file.mkdir()
            case 3:
                if rng.random() < 0.5:
                    file.unlink()
                    os.mkfifo(file)
                elif (run / "checkpoint").is_dir() and not (run / "checkpoint").is_symlink():
                    shutil.rmtree(run / "checkpoint")
                    (run / "checkpoint").symlink_to("../../../../outside")
            case 4 | 5 | 6 | 7 if file.suffix == ".safetensors":
                with contextlib.suppress(Exception):  # where it is spoiled already
                    spoil_tensors(rng, file)
            case _ if file.suffix == ".safetensors":
                file.write_bytes(spoil_safetensors(rng, file.read_bytes()))
            case 4 if file.suffix in (".json", ".yaml", ".jsonl", ".log"):
                file.write_bytes(spoil_bytes(rng, file.read_bytes()))
            case 6 if file.name == "config.yaml":
                file.write_bytes(file.read_bytes() + bomb(rng))
            case _ if file.suffix == ".json":
                with contextlib.suppress(ValueError, OSError):
                    tree = spoil_notes(rng, json.loads(file.read_text()))
                    file.write_bytes(as_json(reseal(rng, tree)))
            case _ if file.name == "config.yaml":
                import yaml

                with contextlib.suppress(yaml.YAMLError, ValueError, UnicodeError):
                    file.write_bytes(as_yaml(spoil_tree(rng, yaml.safe_load(file.read_text()))))
            case _:
                file.write_bytes(spoil_bytes(rng, file.read_bytes()))
    if rng.random() < 0.2:
        (run / "result.json").unlink() if (run / "result.json").is_file() else None
    match rng.randrange(13):
        case 0 | 1:
            case.smezo("runs")
            case.smezo("runs", "--mean")
        case 12:
            sort = rng.choice(("curve", "sparsity", "lr", "memory", "active"))
            case.smezo("plot", sort, "--out", "out.svg")
        case 2:
            shutil.copytree(case.fixtures / "run", case.folder / "runs" / "g" / "s")
            case.smezo("runs", "--compare", "runs/g/r", "runs/g/s", "--json")
        case 3:
            case.smezo("runs", "--sort", rng.choice(("score", "lr", "test.auc", "versions.torch")))
        case 4:
            case.smezo("export", "runs/g/r", "out/model")
        case 5:
            (case.folder / "rows.jsonl").write_text('{"text": "a fine film"}\n')
            case.smezo("predict", "runs/g/r", "rows.jsonl", "--out", "out.jsonl")
        case 6 | 7 | 8:
            train(case, run, which)
        case 9:
            if rng.random() < 0.5:
                case.smezo("export", "runs/g/r", "out.delta", "--delta")
            else:
                case.smezo("replay", "runs/g/r", codes=(0, 1))
        case 10:
            base = rng.random() < 0.3
            case.smezo("eval", "runs/g/r", *(["--base"] if base else ["--step", "2"]))
        case _:
            other = ["task.num_test=2", "--out", "out.jsonl"] if rng.random() < 0.3 else []
            case.smezo("eval", "runs/g/r", *other)


@functools.cache
def cells() -> list[dict[str, Any]]:
    """Settings that some cell of table small/1 asks for."""
    from smezo_cli.config.compose import grid
    from smezo_cli.config.fixed import plain
    from smezo_cli.report.table import load

    table = load("small/1")
    asked = [(table.rows[0], []), (next(r for r in table.rows if r.name == "MeZO"), ["lr=1e-3"])]
    return [
        plain(grid([*(table.words(row, table.columns[0]) or ()), "seed=0", *more])[0])
        for row, more in asked
    ]


@kind(2)
def results(case: Case) -> None:
    """Results from elsewhere, as a table reads them: spoiled, and sealed again."""
    rng = case.rng
    result = json.loads((case.fixtures / "run" / "result.json").read_text())
    for name in ("a", "b")[: rng.choice((1, 2))]:
        tree: Any = {"schema": 1, "command": ["smezo", "train"], "settings": rng.choice(cells())}
        tree |= {"looks": [[2, 0.5], [4, 0.75]], "result": copy.deepcopy(result)}
        file = case.folder / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        if rng.random() < 0.8:
            part = rng.choice(("result", "result", "settings", "looks", None))
            spoiled = spoil_notes(rng, copy.deepcopy(tree if part is None else tree[part]))
            tree = spoiled if part is None else tree | {part: spoiled}
        file.write_bytes(as_json(reseal(rng, tree)))
        if rng.random() < 0.15:
            file.write_bytes(spoil_bytes(rng, file.read_bytes()))
    form = rng.choice(("markdown", "latex", "csv", "json"))
    more = ["--collect", "out"] if rng.random() < 0.4 else []
    case.smezo("table", "small/1", "--results", "results", "--format", form, *more)


_RUN = (
    *("task=toy", "method=sparse_mezo", "lr=1e-3", "steps=4", "eval_every=2", "keep=all"),
    *(word for word in _QUICK if word != "steps=1"),
)
_ADAMW = (
    *("task=toy", "method=adamw", "lr=1e-3", "lr_schedule=constant", "steps=4", "eval_every=2"),
    *(w for w in _QUICK if w not in ("steps=1", "compile=false", "method.executor=sequential")),
)


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


def train(case: Case, run: Path, which: str) -> None:
    """The command that trained a fixture, in the folder of a copy."""
    (case.folder / "runs" / "default").mkdir(parents=True)
    name = (case.fixtures / f"{which}.name").read_text()
    shutil.move(run, case.folder / "runs" / "default" / name)
    longer = ["steps=5"] if which == "adamw" and case.rng.random() < 0.5 else []
    case.smezo("train", *(_RUN if which == "run" else _ADAMW), *longer)


# --- kinds: trajectories ---------------------------------------------------------------------

_FLOATS = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, 1e-320),
    *(1e38, 3.5e38, 1e30, 1e150, 2.0**53),
)


def floats(rng: random.Random, data: bytearray, form: str, places: Sequence[int]) -> None:
    """Some hostile numbers at some of the places."""
    for at in rng.sample(list(places), min(len(places), rng.choice((1, 1, 2, 9)))):
        with contextlib.suppress(OverflowError):
            struct.pack_into(form, data, at, rng.choice(_FLOATS))


def rechained(header: bytes, rows: Sequence[bytes], length: int | None = None) -> bytes:
    """A trajectory.bin with checksums that are right."""
    start = struct.pack("<8sII", b"SMEZOTRJ", 1, len(header) if length is None else length)
    crc = zlib.crc32(start + header)
    content = start + header + struct.pack("<I", crc)
    for row in rows:
        crc = zlib.crc32(row, crc)
        content += row + struct.pack("<I", crc)
    return content


def spoil_trajectory(rng: random.Random, data: bytes) -> bytes:
    """A trajectory.bin that is not what a run has written."""
    (length,) = struct.unpack_from("<I", data, 12)
    header, content = data[16 : 16 + length], data[20 + length :]
    rows = [content[at : at + 32] for at in range(0, len(content), 36)]
    how = rng.randrange(10)
    if how < 2:
        return spoil_bytes(rng, data)
    if how == 2:
        spoiled = bytearray(data)
        struct.pack_into("<I", spoiled, rng.choice((8, 12, 16 + length)), number(rng, 32))
        return bytes(spoiled)
    if how in (3, 4):
        tree = json.loads(header)
        if rng.random() < 0.3:
            tree["identity"]["num_queries"] = rng.choice((0, -1, 2, 7, 4096, 4097, 2**40, 1.0))
        elif rng.random() < 0.5:
            tree[rng.choice(list(tree))] = hostile(rng)
        else:
            tree = spoil_tree(rng, tree)
        header = as_json(tree)
    if how == 5:
        header = spoil_bytes(rng, header)
    if how in (6, 7) and rows:
        for _ in range(rng.choice((1, 4))):
            at = rng.randrange(len(rows))
            row = bytearray(rows[at])
            if rng.random() < 0.2:
                struct.pack_into("<I", row, 0, number(rng, 32))
            elif rng.random() < 0.2:
                struct.pack_into("<f", row, 20, rng.choice((math.nan, math.inf, 3e38, -3e38, -1.0)))
            else:
                floats(rng, row, "<d", (4, 12, 24))
            rows[at] = bytes(row)
    if how == 8:
        count = rng.choice((0, 1, 3, 5, 40, 300))
        rows = [struct.pack("<I", at) + rows[at % len(rows)][4:] for at in range(count)]
    if how == 9:
        rng.shuffle(rows)
        rows += rows[: rng.randrange(3)]
    return rechained(header, rows)


@kind(2.5)
def trajectory(case: Case) -> None:
    """trajectory.bin of a run folder from elsewhere, through all that reads it."""
    rng = case.rng
    run = case.folder / "runs" / "g" / "r"
    shutil.copytree(case.fixtures / "run", run)
    file, checkpoint = run / "trajectory.bin", run / "checkpoint"
    if rng.random() < 0.1:
        file.unlink()
        match rng.randrange(4):
            case 0:
                file.mkdir()
            case 1:
                os.mkfifo(file)
            case _:
                file.symlink_to(
                    rng.choice(("/dev/zero", "../../../../outside/keep.txt", "nowhere", "/"))
                )
    else:
        file.write_bytes(spoil_trajectory(rng, file.read_bytes()))
    # The steps are applied where weights, or what was known of later ones, are gone.
    if rng.random() < 0.5:
        for weights in checkpoint.glob("*.safetensors"):
            if rng.random() < 0.6:
                weights.unlink()
    if rng.random() < 0.4:
        state = json.loads((checkpoint / "state.json").read_text())
        state["step"] = state["looked"] = rng.choice((0, 1, 2, 3, 4))
        if rng.random() < 0.7:
            state["best_step"] = rng.choice((0, 1, 2, state["step"], None))
        (checkpoint / "state.json").write_bytes(as_json(reseal(rng, state)))
    if rng.random() < 0.4:
        (run / "result.json").unlink()
    step = ["--step", str(rng.choice((0, 1, 2, 3, 4, 5, -1, 10**30)))]
    step = step if rng.random() < 0.7 else []
    match rng.randrange(8):
        case 0 | 1:
            split = ["--split", rng.choice(("none", "dev", "test"))]
            case.smezo("replay", "runs/g/r", *step, *split, codes=(0, 1))
        case 2:
            case.smezo("replay", "runs/g/r", *step, "--out", "m", codes=(0, 1))
        case 3 | 4:
            case.smezo("eval", "runs/g/r", *step)
        case 5:
            case.smezo("export", "runs/g/r", "out.delta", "--delta", *step)
        case _:
            train(case, run, "run")


def spoil_delta(rng: random.Random, data: bytes) -> bytes:
    """A delta that is not what `smezo export` has written; its digest is right in most cases."""
    import yaml

    (length,) = struct.unpack_from("<I", data, 12)
    about, packed = json.loads(data[16 : 16 + length]), data[16 + length : -32]
    columns = bytearray(zlib.decompress(packed))
    told = None
    match rng.randrange(12):
        case 0:
            return spoil_bytes(rng, data)
        case 1:
            content = spoil_bytes(rng, data[:-32])
            return content + hashlib.sha256(content).digest()
        case 2:
            about = spoil_tree(rng, about)
        case 3:
            about[rng.choice(list(about))] = hostile(rng)
        case 4 | 5:
            name = rng.choice([k for k, v in about.items() if isinstance(v, dict) and v])
            about[name] = spoil_tree(rng, about[name])
        case 6:
            tree = spoil_tree(rng, yaml.safe_load(about["config"]))
            about["config"] = as_yaml(tree).decode("utf-8", "replace")
        case 7:
            bad = spoil_bytes(rng, about["config"].encode())
            bad = rng.choice((bad, about["config"].encode() + bomb(rng)))
            about["config"] = bad.decode("utf-8", "replace")
        case 8:
            # By significance: a number's eight bytes lie apart.
            steps = len(columns) // 16
            whole = [
                bytearray(columns[(c * 8 + b) * steps + s] for b in range(8))
                for c in (0, 1)
                for s in range(steps)
            ]
            for value in rng.sample(whole, rng.choice((1, 2, len(whole)))):
                floats(rng, value, "<d", (0,))
            columns = bytearray(
                whole[c * steps + s][b] for c in (0, 1) for b in range(8) for s in range(steps)
            )
        case 9:
            about["step"] = rng.choice((0, 1, 3, 5, 4_194_304, 2**31, 2**63, -1, True, 4.0, "4"))
            if rng.random() < 0.7 and isinstance(about["step"], int) and 0 <= about["step"] < 2**23:
                columns = bytearray(16 * about["step"])
        case 10:
            about["header"]["identity"]["num_queries"] = rng.choice((0, 2, 4096, 4097, 2**40, "1"))
            columns = bytearray(rng.choice((columns, bytes(1 << 26), b"", bytes(4097 * 8 * 4))))
        case _:
            told = number(rng, 32)
    text = as_json(about)
    content = struct.pack("<8sII", b"SMEZODLT", 1, len(text) if told is None else told) + text
    packed = zlib.compress(bytes(columns))
    if rng.random() < 0.1:
        packed = rng.choice((packed[:-3], packed + b"x" * 9, spoil_bytes(rng, packed), b""))
    content += packed
    return content + hashlib.sha256(content).digest()


@kind(2.5)
def delta(case: Case) -> None:
    """Deltas from elsewhere: numbers, settings, prompt and figures that somebody made up."""
    rng = case.rng
    data = (case.fixtures / "tiny.delta").read_bytes()
    (case.folder / "x.delta").write_bytes(spoil_delta(rng, data))
    words = [["--split", rng.choice(("none", "dev"))], []][rng.randrange(2)]
    if rng.random() < 0.2:
        words += ["--step", str(rng.choice((0, 1, 4, 5, -1, 10**30)))]
    if rng.random() < 0.1:
        words += ["--out", "m"]
    if rng.random() < 0.1:
        words += [rng.choice(("task.num_test=2", "model.path=x", "device=cpu", "steps=9", "x=1"))]
    case.smezo("replay", "x.delta", *words, codes=(0, 1))


# --- kinds: models ---------------------------------------------------------------------------


@kind(2.5)
def gguf(case: Case) -> None:
    """GGUF files: headers, strings, arrays, tensors and offsets that are not as they say."""
    rng = case.rng
    data = bytearray((case.fixtures / "tiny.gguf").read_bytes())
    match rng.randrange(6):
        case 0:
            struct.pack_into("<Q", data, rng.choice((8, 16)), number(rng))
        case 1:
            struct.pack_into("<I", data, rng.choice((0, 4)), number(rng, 32))
        case 2:
            data = bytearray(hostile_gguf(rng))
        case 3 | 4:
            end = data.find(b"output_norm.weight") + 64  # in the header, most of the time
            for _ in range(rng.choice((1, 1, 2, 4))):
                at = rng.randrange(4, max(5, min(len(data) - 8, end)))
                width, form = rng.choice(((1, "B"), (4, "<I"), (8, "<Q")))
                struct.pack_into(form, data, at, number(rng, 8 * width))
        case _:
            data = bytearray(spoil_bytes(rng, bytes(data)))
    (case.folder / "x.gguf").write_bytes(data)
    _load(case, "x.gguf")


def hostile_gguf(rng: random.Random) -> bytes:
    """A header made from nothing."""

    def text(value: bytes) -> bytes:
        length = len(value) if rng.random() < 0.9 else number(rng)
        return struct.pack("<Q", length) + value

    def value(depth: int = 0) -> bytes:
        form = rng.choice((0, 4, 6, 7, 8, 9, 9, 10, 12, 13, 99))
        content = rng.randbytes(8)
        if form == 8:
            content = text(rng.choice((b"llama", b"gpt2", b"\xff", b"")))
        if form == 9:
            inner = value(depth + 1) if depth < 40 else rng.randbytes(12)
            kind_of = inner[:4]
            content = kind_of + struct.pack("<Q", rng.choice((0, 1, 3, number(rng)))) + inner[4:]
        return struct.pack("<I", form) + content

    keys = [
        *(b"general.architecture", b"general.alignment", b"llama.block_count", b"llama.vocab_size"),
        *(b"llama.embedding_length", b"tokenizer.ggml.model", b"tokenizer.ggml.tokens", b"\xff"),
    ]
    pairs = b"".join(text(rng.choice(keys)) + value() for _ in range(rng.randrange(6)))
    pairs = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama") + pairs
    tensors = b"".join(
        text(rng.choice((b"token_embd.weight", b"output_norm.weight", b"x")))
        + struct.pack("<I", (dims := rng.choice((0, 1, 2, 4, number(rng, 32)))))
        + b"".join(struct.pack("<Q", number(rng)) for _ in range(min(dims, 8)))
        + struct.pack("<IQ", rng.choice((0, 1, 2, 8, 99)), number(rng))
        for _ in range(rng.randrange(4))
    )
    counts = struct.pack("<QQ", rng.choice((0, 1, 3, number(rng))), rng.choice((1, 3, number(rng))))
    return b"GGUF" + struct.pack("<I", rng.choice((2, 3, 3, 3))) + counts + pairs + tensors


@kind(2.5)
def model_folders(case: Case) -> None:
    """Saved models: config.json, the tokenizer's files, the header of the weights."""
    rng = case.rng
    folder = case.folder / "m"
    shutil.copytree(case.fixtures / "model", folder)
    for _ in range(rng.choice((1, 1, 2))):
        names = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json")
        file = folder / rng.choice((*names, "model.safetensors", "generation_config.json"))
        if file.suffix == ".safetensors":
            file.write_bytes(spoil_safetensors(rng, file.read_bytes()))
            continue
        tree = None
        with contextlib.suppress(ValueError):  # where it is spoiled already
            tree = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(tree, dict):
            continue
        if file.name == "config.json" and rng.random() < 0.5:
            key = rng.choice([k for k, v in tree.items() if isinstance(v, int)])
            tree[key] = rng.choice((0, -1, 1, 7, 10**5, 10**7, 2**31, 2**40, 10**30))
        elif file.name == "config.json" and rng.random() < 0.2:
            tree["model_type"] = rng.choice(
                ("gpt2", "opt", "bert", "t5", "mamba", "clip", "x", "../x")
            )
        elif rng.random() < 0.1:
            tree["auto_map"] = {
                "AutoConfig": "evil.Evil",
                "AutoModelForCausalLM": "evil.Evil",
                "AutoTokenizer": ["evil.Evil", None],
            }
            tree["model_type"] = rng.choice((tree.get("model_type"), "evil"))
            (folder / "evil.py").write_text("open('../outside/keep.txt', 'w').write('evil')\n")
        else:
            tree = spoil_tree(rng, tree)
        written = as_json(tree)
        file.write_bytes(spoil_bytes(rng, written) if rng.random() < 0.15 else written)
    if rng.random() < 0.15:
        (folder / "model.safetensors").unlink()
        name = rng.choice(("pytorch_model.bin", "model.safetensors.index.json"))
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../outside/keep.txt"}}
        pickled = b"\x80\x04cos\nsystem\n."
        listed = as_json(spoil_tree(rng, index))
        (folder / name).write_bytes(pickled if name.endswith("bin") else listed)
    _load(case, "m")


def _load(case: Case, path: str) -> None:
    import torch

    from smezo_cli.models.load import load_model

    node = dict(settings_of("task=toy", "model=own", "model.path=m", "model.max_length=16").model)
    loaded = case.call(
        load_model,
        node | {"path": f"./{path}"},
        dtype=torch.float32,
        device=torch.device("cpu"),
        cache=case.folder / "cache",
    )
    if loaded is not None and case.rng.random() < 0.1:
        case.smezo(
            *("train", "task=toy", *_QUICK[1:], "model=own", f"model.path=./{path}"),
            "model.max_length=16",
        )


# --- workers ---------------------------------------------------------------------------------


class Watch:
    """What a case did through Python that no case may do; an audit hook, which stays for ever."""

    def __init__(self, allowed: Sequence[Path]) -> None:
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, words: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("pickle.find_class", "os.system", "socket.connect", "code.__new__"):
            if event != "socket.connect" or isinstance(words[1], tuple):
                self.seen.append(f"{event} {words!r}"[:300])
        elif event == "subprocess.Popen" and os.path.basename(str(words[0])) != "git":
            self.seen.append(f"{event} {words!r}"[:300])
        elif event == "open":
            path, _mode, flags = words
            if flags & os.O_NOFOLLOW and os.path.islink(path):
                return  # it is about to fail
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._check(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink"):
            self._check(event, words[1 if event == "os.symlink" else 0])
        elif event in ("os.rename", "os.link"):
            self._check(event, words[0])
            self._check(event, words[1])

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        with contextlib.suppress(OSError, ValueError):
            real = os.path.realpath(os.fsdecode(path))
            parent = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
            real = os.path.join(parent, os.path.basename(real)) if event != "open" else real
            inside = any(real == top or real.startswith(top + os.sep) for top in self.allowed)
            # Where nothing is kept; the latter sets back the peak of memory (see proc(5)).
            nothing = real.startswith("/dev/") or real.endswith("/clear_refs")
            if not inside and not nothing:
                self.seen.append(f"{event} of {real}")


def snapshot(folder: Path, but: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with its mode, size and time of change, less one folder's."""
    found: dict[str, tuple[int, int, int]] = {}
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.path.join(top, name) != str(but)]
        for name in (*files, *folders):
            status = os.lstat(os.path.join(top, name))
            size = 0 if name in folders else status.st_size
            when = 0 if name in folders else status.st_mtime_ns
            found[os.path.join(top, name)] = (status.st_mode, size, when)
    return found


def run_case(name: str, seed: int, at: int, scratch: Path, watch: Watch) -> dict[str, Any]:
    """One case in this process; its record."""
    import hydra.core.global_hydra
    import torch

    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    before = snapshot(scratch, folder)
    case = Case(random.Random(f"{seed}/{name}/{at}"), folder, scratch / "fixtures")
    finding = None

    def alarm(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGPROF, alarm)
    signal.alarm(WAIT_S)
    signal.setitimer(signal.ITIMER_PROF, ALARM_S)
    start = time.process_time()
    watch.seen.clear()
    try:
        # Anything that a library would print past Python's streams goes nowhere.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watch.on = True
            KINDS[name].make(case)
    except TooLong:
        frames = "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
        finding = f"longer than {ALARM_S} s\n{frames}"
    except Finding as error:
        finding = str(error)
    except BaseException as error:
        finding = "".join(traceback.format_exception(error))[-3000:]
    finally:
        watch.on = False
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start
    os.chdir(scratch)
    torch.set_grad_enabled(True)
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    after = snapshot(scratch, folder)
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        finding = f"changed outside of its folder: {changed[:5]}"
        restore(scratch)
    elif watch.seen and finding is None:
        finding = f"did what no case may: {watch.seen[:3]}"
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "kind": name,
        "case": at,
        "seconds": round(seconds, 3),
        "refused": case.refused,
        "finding": finding,
    }


def restore(scratch: Path) -> None:
    """The surroundings as they were."""
    for name in ("outside", "home", "cache"):
        shutil.rmtree(scratch / name, ignore_errors=True)
        (scratch / name).mkdir()
    (scratch / "outside" / "keep.txt").write_text("keep\n")


def prepare(scratch: Path) -> None:
    """Sound files to spoil: finished runs, a saved model, a delta, a GGUF file."""
    import gguf as library
    import torch

    from smezo_cli.cli.verbs import main

    torch.set_num_threads(1)
    restore(scratch)
    (scratch / "tmp").mkdir()
    fixtures = scratch / "fixtures"
    fixtures.mkdir()
    os.chdir(fixtures)
    with contextlib.redirect_stdout(io.StringIO()):
        for name, words in (("run", _RUN), ("adamw", _ADAMW)):
            if main(["train", *words]) != 0:
                raise SystemExit("fuzz: the run to be spoiled cannot be made; see above.")
            (run,) = Path("runs/default").iterdir()
            Path(f"{name}.name").write_text(run.name)
            shutil.move(run, name)
        for words in (("run", "model"), ("run", "tiny.delta", "--delta")):
            if main(["export", *words]) != 0:
                raise SystemExit("fuzz: the model to be spoiled cannot be made; see above.")
    shutil.rmtree("runs")
    net = tiny_model()[0]
    writer = library.GGUFWriter("tiny.gguf", "llama")
    launch = net.config
    writer.add_context_length(launch.max_position_embeddings)
    writer.add_embedding_length(launch.hidden_size)
    writer.add_feed_forward_length(launch.intermediate_size)
    writer.add_block_count(launch.num_hidden_layers)
    writer.add_head_count(launch.num_attention_heads)
    writer.add_head_count_kv(launch.num_key_value_heads)
    writer.add_layer_norm_rms_eps(launch.rms_norm_eps)
    writer.add_vocab_size(launch.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["a", "b", "ab", *(f"t{k}" for k in range(3, launch.vocab_size))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    parts |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm"}
    parts |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts |= {"model.layers.": "blk."}
    for name, tensor in net.state_dict().items():
        if name != "lm_head.weight":
            for old, new in parts.items():
                name = name.replace(old, new)
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def work(jobs: Sequence[tuple[str, int]], seed: int, scratch: Path, pipe: int) -> None:
    """The cases of one worker; a line to the pipe before and after each."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY_BYTES, own + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    watch = Watch([scratch / "case", scratch / "tmp"])
    with os.fdopen(pipe, "w", encoding="utf-8", errors="backslashreplace") as out:
        for name, at in jobs:
            print(json.dumps({"kind": name, "case": at}), file=out, flush=True)
            record = run_case(name, seed, at, scratch, watch)
            print(json.dumps(record), file=out, flush=True)


def records(jobs: Sequence[tuple[str, int]], seed: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """The record of every case; a worker that dies or hangs ends its case alone."""
    jobs = list(jobs)
    while jobs:
        reader, pipe = os.pipe()
        worker = os.fork()
        if not worker:
            code = 1
            try:
                os.close(reader)
                work(jobs, seed, scratch, pipe)
                code = 0
            finally:
                os._exit(code)
        os.close(pipe)
        begun: dict[str, Any] | None = None
        buffer = b""
        dead = ""
        while not dead:
            # The alarm waits for Python; what hangs below it is killed.
            ready = select.select([reader], [], [], 2 * WAIT_S)[0]
            chunk = os.read(reader, 1 << 16) if ready else b""
            if not ready:
                os.kill(worker, signal.SIGKILL)
                dead = f"longer than {2 * WAIT_S} s, below Python"
            elif not chunk:
                dead = "ended"
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                record = json.loads(line)
                if "seconds" in record:
                    begun = None
                    jobs.pop(0)
                    yield record
                else:
                    begun = record
        os.close(reader)
        status = os.waitpid(worker, 0)[1]
        if begun is not None:
            jobs.pop(0)
            how = f"{dead}: the worker ended with status {os.waitstatus_to_exitcode(status)}"
            restore(scratch)
            yield {**begun, "seconds": 0.0, "refused": False, "finding": how}
        elif jobs and dead != "ended":
            raise SystemExit("fuzz: a worker hung between two cases.")


def planned(cases: int, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """So many cases of the kinds, by their shares, at least one of each, in turns."""
    total = sum(KINDS[name].share for name in kinds)
    counts = {name: max(1, round(cases * KINDS[name].share / total)) for name in kinds}
    jobs = [(name, at) for name, count in counts.items() for at in range(count)]
    return sorted(jobs, key=lambda job: (job[1] / counts[job[0]], job[0]))


def fuzz(
    cases: int,
    seed: int,
    kinds: Sequence[str] = (),
    only: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Records of so many cases: kind, case, seconds, refused, and finding (None for none)."""
    kinds = list(kinds) or list(KINDS)
    before = Path.cwd()
    environment = dict(os.environ)
    scratch = Path(tempfile.mkdtemp(prefix="smezo-fuzz-")).resolve()
    names = {"HOME": "home", "SMEZO_CACHE": "cache", "HF_HOME": "home/hf", "TMPDIR": "tmp"}
    os.environ |= {name: str(scratch / folder) for name, folder in names.items()}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
    found = []
    sys.dont_write_bytecode = True
    try:
        # A worker is forked with all that is slow to import.
        import datasets  # noqa: F401
        import matplotlib.font_manager  # noqa: F401  # which writes its cache once, below HOME
        import pyarrow.parquet  # noqa: F401

        prepare(scratch)
        jobs = planned(cases, kinds) if only is None else [(kinds[0], only)]
        for record in records(jobs, seed, scratch):
            found.append(record)
            if record["finding"] is not None:
                say(f"{record['kind']} {record['case']}: {record['finding']}")
            if len(found) % 1000 == 0:
                say(f"{len(found)} of {len(jobs)} cases")
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ |= environment
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def summary(found: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Counts by kind."""
    kinds = {}
    for name in sorted({record["kind"] for record in found}):
        of = [record for record in found if record["kind"] == name]
        kinds[name] = {
            "cases": len(of),
            "refused": sum(record["refused"] for record in of),
            "findings": sum(record["finding"] is not None for record in of),
            "slowest_s": max(record["seconds"] for record in of),
        }
    total = {key: sum(of[key] for of in kinds.values()) for key in ("cases", "refused", "findings")}
    return {"kinds": kinds, "total": total, "seconds": round(seconds, 1)}


def main() -> int:
    """Fuzz as the command line says; 1 where there is a finding."""
    parser = argparse.ArgumentParser(description="hostile inputs through smezo's own entries")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), default=[])
    parser.add_argument("--case", type=int, help="this case of one --kind alone")
    parser.add_argument("--json", help="the counts and findings as a file")
    given = parser.parse_args()
    say = functools.partial(print, flush=True)
    start = time.monotonic()
    found = fuzz(given.cases, given.seed, given.kind, given.case, say)
    report = summary(found, time.monotonic() - start)
    for name, of in (*report["kinds"].items(), ("all", report["total"])):
        print(f"{name:14}", "  ".join(f"{key} {value}" for key, value in of.items()))
    print(f"{report['seconds']} s, seed {given.seed}")
    if given.json:
        report |= {"seed": given.seed, "found": [r for r in found if r["finding"] is not None]}
        Path(given.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if report["total"]["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
