"""Tasks of the papers' further tables: the original files, rows by class, runs with tiny twins.

All rows are made up here, written as the benchmarks write theirs.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from smezo_cli import train
from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.plan.planner import plan
from smezo_cli.tasks import Row, Task, load_task
from smezo_cli.tasks.base import Tables, cut, permute
from smezo_cli.tasks.files import lines_of, read_file
from smezo_cli.tasks.load import local_fingerprint
from smezo_cli.tasks.own import unlabelled
from tests import ROOT

CONF = ROOT / "conf" / "task"
NLI = ("entailment", "neutral", "contradiction")


def jsonl(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def snli(label: str, number: int) -> dict[str, Any]:
    return {
        "annotator_labels": [label],
        "captionID": f"{number}.jpg#0",
        "gold_label": label,
        "pairID": f"{number}.jpg#0r1",
        "sentence1": f"Dog {number} runs.",
        "sentence1_binary_parse": "( Dog runs )",
        "sentence2": f"It is {label}.",
    }


def mnli(*labels: str, raters: int) -> str:
    """GLUE's columns; the dev file has more of them than the train file."""
    names = [f"label{k + 1}" for k in range(raters)]
    lines = ["\t".join(["index", "genre", "sentence1", "sentence2", *names, "gold_label"])]
    for number, label in enumerate(labels):
        cells = [str(number), "fiction", f'He said "{number}', "He spoke."]
        lines.append("\t".join([*cells, *[label] * raters, label]))
    return "\n".join(lines) + "\n"


def aqua(correct: str, number: int) -> dict[str, Any]:
    options = ["A)1", "B) 2", "C)3 km", "D)4", "E)none"]
    question = f"How many is {number}?"
    return {"question": question, "options": options, "rationale": "So.", "correct": correct}


GOALS = [{"goal": f"Open {k}", "sol1": f"Turn {k}.", "sol2": "Cry."} for k in range(6)]
SCENES = [
    {"context": f"Ann saw {k}.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c"}
    for k in range(6)
]
TREES = "".join(
    f"({label} (2 Film) ({label} (2 number) (2 {number})))\n"
    for number in range(4)
    for label in range(5)
)
QUESTIONS = "".join(
    f"{label}:other What is {label.lower()} {number} ? \n"
    for number in range(4)
    for label in ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
)
FILES: dict[str, dict[str, str]] = {
    "sst5": {"train.txt": TREES, "test.txt": "(4 (3 Very) (2 -LRB-))\n"},
    "trec": {"train_5500.label": QUESTIONS, "TREC_10.label": "HUM:ind Who is Andr\xe9 ?\n"},
    "snli": {
        "snli_1.0_train.jsonl": jsonl(*(snli(label, k) for k in range(4) for label in (*NLI, "-"))),
        "snli_1.0_dev.jsonl": jsonl(snli("-", 0), snli("neutral", 1)),
    },
    "mnli": {
        "train.tsv": mnli(*NLI * 4, raters=1),
        "dev_matched.tsv": mnli("neutral", raters=5),
    },
    "piqa": {
        "train.jsonl": jsonl(*GOALS),
        "train-labels.lst": "0\n1\n" * 3,
        "dev.jsonl": jsonl(*GOALS[:2]),
        "dev-labels.lst": "1\n0\n",
    },
    "siqa": {
        "train.jsonl": jsonl(*SCENES),
        "train-labels.lst": "1\n2\n3\n" * 2,
        "dev.jsonl": jsonl(*SCENES[:1]),
        "dev-labels.lst": "3\n",
    },
    "aqua": {
        "train.json": jsonl(*(aqua("ABCDE"[k % 5], k) for k in range(6))),
        "test.json": jsonl(aqua("C", 7)),
    },
}
BY_CLASS = ("sst5", "trec", "snli", "mnli")
COUNTS = {"num_train": 3, "num_dev": 2}


def write(folder: Path, name: str, **changes: str) -> Path:
    for file, text in FILES[name].items():
        encoding = "latin-1" if name == "trec" else "utf-8"
        (folder / file).write_text(changes.get(file, text), encoding=encoding)
    return folder


def node(name: str, folder: Path | None, **changes: Any) -> dict[str, Any]:
    cfg: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    small = {"num_per_class": 2} if name in BY_CLASS else COUNTS
    return cfg | small | {"data_dir": folder and str(folder)} | changes  # type: ignore[no-any-return]


def load(name: str, folder: Path, data_seed: int = 0, **changes: Any) -> Task:
    cfg = node(name, folder, **changes)
    return load_task(cfg, data_seed=data_seed, cache=Path("/nowhere"))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# --------------------------------------------------------------------------------- original files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sst5", Row({"text": "Very -LRB-"}, 4, "test/1")),
        ("trec", Row({"text": "Who is Andr\xe9 ?"}, 3, "test/1")),
        ("snli", Row({"premise": "Dog 1 runs.", "hypothesis": "It is neutral."}, 1, "test/2")),
        ("mnli", Row({"premise": 'He said "0', "hypothesis": "He spoke."}, 1, "test/1")),
        ("piqa", Row(GOALS[0], 1, "test/1", ("Turn 0.", "Cry."), frozenset({1}))),
        ("siqa", Row(SCENES[0], 2, "test/1", ("a", "b", "c"), frozenset({2}))),
        (
            "aqua",
            Row(
                {
                    "question": "How many is 7?",
                    "choices": "(A) 1 (B) 2 (C) 3 km (D) 4 (E) none",
                },
                2,
                "test/1",
                ("1", "2", "3 km", "4", "none"),
                frozenset({2}),
            ),
        ),
    ],
)
def test_the_benchmarks_own_files_are_read(name: str, expected: Row, tmp_path: Path) -> None:
    task = load(name, write(tmp_path, name))
    assert sorted(task.test, key=lambda row: row.id)[0] == expected
    assert local_fingerprint(node(name, tmp_path)) == task.fingerprint
    with (tmp_path / list(FILES[name])[-1]).open("a") as file:
        file.write("\n")
    assert local_fingerprint(node(name, tmp_path)) != task.fingerprint


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_aqua_to_predict_are_read_as_its_own(number: int, tmp_path: Path) -> None:
    """From a file or from the command line, with the letters that stand before the options."""
    task = load("aqua", write(tmp_path, "aqua"), prompt=number)
    (prompt,), wanted = task.prompts, task.test[0]
    given = {key: value for key, value in aqua("C", 7).items() if key in ("question", "options")}
    (tmp_path / "new.jsonl").write_text(jsonl(given))
    texts = given | {"options": json.dumps(given["options"])}
    for data in (str(tmp_path / "new.jsonl"), texts):
        (row,) = unlabelled(node("aqua", None, prompt=number), prompt, data)
        assert (row.fields, row.options, row.label) == (wanted.fields, wanted.options, -1)
        assert prompt.candidates(row) == prompt.candidates(wanted)
    with pytest.raises(UserError, match="an option is empty behind its prefix"):
        unlabelled(node("aqua", None), prompt, texts | {"options": '["A) 1", "B)"]'})


@pytest.mark.parametrize("name", BY_CLASS)
def test_each_class_has_its_word(name: str, tmp_path: Path) -> None:
    """By name: what a label means is said by the rows, not by the order of two lists."""
    words = {
        "sst5": dict(zip("01234", ("terrible", "bad", "okay", "good", "great"), strict=True)),
        "trec": {
            "desc": "Description",
            "enty": "Entity",
            "abbr": "Expression",
            "hum": "Human",
            "loc": "Location",
            "num": "Number",
        },
        "snli": {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
        "mnli": {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
    }[name]
    label_of: dict[str, Callable[[str], str]] = {
        "sst5": lambda line: line[1],
        "trec": lambda line: line.split(":")[0].lower(),
        "snli": lambda line: str(json.loads(line)["gold_label"]),
        "mnli": lambda line: line.split("\t")[-1],
    }
    task = load(name, write(tmp_path, name))
    given = {row.id: row for row in task.train + task.dev}
    files = [path for path in FILES[name] if "train" in path]
    text = (tmp_path / files[0]).read_text().splitlines()
    shift = 1 if name == "mnli" else 0
    for identity, row in given.items():
        known = label_of[name](text[int(identity.split("/")[1]) - 1 + shift])
        for prompt in (*task.prompts, *task.masked):
            assert prompt.labels[row.label] == words[known]


def test_rows_of_snli_without_a_majority_are_left_out_and_counted(tmp_path: Path) -> None:
    task = load("snli", write(tmp_path, "snli"), num_per_class=None, num_train=10, num_dev=2)
    assert [len(task.train), len(task.dev), len(task.test)] == [10, 2, 1]
    assert "4 of train and 1 of test" in task.source


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("piqa", {"train-labels.lst": "0\n1\n"}, "train-labels.lst has 2 labels, and "),
        ("piqa", {"train-labels.lst": "0\n" * 9}, "has 9 labels for 6 records"),
        ("piqa", {"train-labels.lst": "2\n" * 6}, "field 'label' is '2'; allowed are '0', 0, '1'"),
        ("trec", {"train_5500.label": "Who ?\n"}, "train_5500.label, line 1: 'Who ?' is not of"),
        ("sst5", {"train.txt": "a plain line\n"}, "train.txt, line 1: 'a plain line' is no tree"),
        ("sst5", {"train.txt": "(3 (2 a) (2 b)\n"}, "is no tree such as (3 (2 A) (4 film))"),
        ("sst5", {"train.txt": ""}, "train.txt has no rows"),
        ("aqua", {"train.json": jsonl(aqua("F", 0))}, "field 'correct' is 'F'; allowed are 'A'"),
    ],
)
def test_a_file_of_another_form_is_named(
    name: str, changes: dict[str, str], says: str, tmp_path: Path
) -> None:
    assert says in message_of(lambda: load(name, write(tmp_path, name, **changes)))


def test_a_missing_file_of_labels_is_named(tmp_path: Path) -> None:
    write(tmp_path, "siqa")
    (tmp_path / "dev-labels.lst").unlink()
    message = message_of(lambda: load("siqa", tmp_path))
    assert "there is no dev-labels.lst in it" in message
    assert "train.jsonl, dev.jsonl, train-labels.lst and dev-labels.lst" in message
    assert len(load("siqa", tmp_path, test_from="train", num_test=1).test) == 1


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\x85b\r\n\nc".encode())
    assert lines_of(path) == ["a\x85b", "", "c"]
    records = list(read_file(path, line="(?P<x>.*)"))
    assert [(record.number, record.line, record.value) for record in records] == [
        (1, 1, {"x": "a\x85b"}),
        (2, 3, {"x": "c"}),
    ]
    path.write_bytes(b"\xff")
    assert "a.txt: not UTF-8" in message_of(lambda: lines_of(path))
    assert "cannot be read" in message_of(lambda: lines_of(tmp_path / "none"))


# ----------------------------------------------------------------------------------- rows by class


def tables(*sizes: int, num_test: int = 4) -> Tables:
    """Train rows of so many a class."""
    rows = [
        Row({"text": "t"}, label, f"train/{label}/{number}")
        for label, size in enumerate(sizes)
        for number in range(size)
    ]
    test = [Row({"text": "t"}, 0, f"test/{number}") for number in range(num_test)]
    return Tables(rows, test, ("text",), tuple(f"c{k}" for k in range(len(sizes))), "made here")


def by_class(size: Any, num_test: int | None = None, **more: Any) -> dict[str, Any]:
    counts = {"num_train": None, "num_dev": None, "num_test": num_test, "num_per_class": size}
    return {"name": "made"} | counts | more


@pytest.mark.parametrize("data_seed", [13, 21, 42, 87, 100])
def test_train_and_dev_get_exactly_so_many_of_each_class(data_seed: int) -> None:
    source = tables(40, 200, 35)
    train_rows, dev, test = cut(source, by_class(16), data_seed)
    for rows in (train_rows, dev):
        assert Counter(row.label for row in rows) == {0: 16, 1: 16, 2: 16}
    assert not {row.id for row in train_rows} & {row.id for row in dev}
    assert len(test) == 4
    # They are the first of each class in the recorded permutation.
    order = permute(source.train, data_seed)
    for label in range(3):
        ids = [row.id for row in order if row.label == label]
        assert [row.id for row in train_rows if row.label == label] == ids[:16]
        assert [row.id for row in dev if row.label == label] == ids[16:32]
    # A function of data_seed and the rows alone, whatever their order in the file.
    turned = Tables(source.train[::-1], source.test, ("text",), source.classes, "")
    assert cut(turned, by_class(16), data_seed) == (train_rows, dev, test)
    assert cut(source, by_class(16), data_seed + 1)[0] != train_rows


def test_more_rows_of_each_class_keep_those_of_fewer() -> None:
    few, many = (cut(tables(90, 90), by_class(k), 13)[0] for k in (4, 16))
    assert {row.id for row in few} < {row.id for row in many}


def test_test_rows_are_those_behind_train_and_dev() -> None:
    source = tables(6, 10, num_test=0)
    parts = cut(source, by_class(2, 5, test_from="train"), 0)
    assert [len(part) for part in parts] == [4, 4, 5]
    assert len({row.id for part in parts for row in part}) == 13
    assert len(cut(source, by_class(2, test_from="train"), 0)[2]) == 8


def test_a_class_with_fewer_rows_gives_what_it_has_and_it_is_said(tmp_path: Path) -> None:
    """TREC has 86 abbreviations, and MeZO takes 512 of each class."""
    train_rows, dev, _ = cut(tables(3, 9, 5), by_class(4), 0)
    assert Counter(row.label for row in train_rows) == {0: 3, 1: 4, 2: 4}
    assert Counter(row.label for row in dev) == {1: 4, 2: 1}
    # Four of each class there.
    task = load("snli", write(tmp_path, "snli"), num_per_class=3)
    for name in NLI:
        assert f"3 rows of class {name} asked for, 3 there for train and 1 for dev" in task.source
    assert "asked for" not in load("snli", tmp_path, num_per_class=2).source


@pytest.mark.parametrize(
    ("source", "cfg", "says"),
    [
        (tables(9, 0), by_class(2), "task made has no train rows of class c1"),
        (tables(4, 3), by_class(4), "task.num_per_class=4 leaves no rows for dev"),
        (tables(4, 3), by_class(4), "has 4 rows of a class at most"),
        (tables(4, 4), by_class(2, test_from="train"), "leaves no rows for test"),
        (tables(9, 9), by_class(0), "task.num_per_class=0 is no row count"),
        (tables(9, 9), by_class(True), "task.num_per_class=True is no row count"),
    ],
)
def test_rows_by_class_that_do_not_fit_are_refused(
    source: Tables, cfg: dict[str, Any], says: str
) -> None:
    assert says in message_of(lambda: cut(source, cfg, 0))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task=sst5", "task.num_train=100"], "task.num_train=100 would be ignored: add task.num_"),
        (["task=rte", "task.num_per_class=16"], "so task.num_train=1000 and task.num_dev=500"),
        (["task=rte", "task.num_per_class=0"], "task.num_per_class must be a whole number"),
        (["task=copa", "task.num_per_class=16"], "task copa has no task.num_per_class"),
        (["task=copa", "+task.num_per_class=16"], "there is no task.num_per_class"),
        (["task=squad", "+task.num_per_class=16"], "there is no task.num_per_class"),
    ],
)
def test_rows_by_class_beside_what_they_would_ignore_are_refused(
    words: list[str], says: str
) -> None:
    assert says in message_of(lambda: check(compose([*words, "model=tiny-llama"])))


def test_rows_by_class_are_in_the_digest_only_where_they_are_asked_for() -> None:
    free = ["task=toy", "model=tiny-llama", "task.num_train=null", "task.num_dev=null"]
    none, some = (compose([*free, f"task.num_per_class={k}"]) for k in ("null", 16))
    before = OmegaConf.to_container(none, resolve=True)
    assert isinstance(before, dict)
    del before["task"]["num_per_class"]
    assert digest(before) == digest(none) != digest(some)


def test_the_plan_counts_dev_rows_by_class() -> None:
    words = ["task=sst5", "model=tiny-roberta", "steps=10", "eval_every=1", "device=cpu"]
    found = plan(check(compose(words)), capacity=10**9, tokens=64)
    assert found.work["rows in evaluations, at most"] == (10 + 1) * 16 * 5 + 2 * 1000


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "model"),
    [(name, "tiny-llama") for name in FILES] + [(name, "tiny-roberta") for name in BY_CLASS],
)
def test_each_task_trains_two_steps_with_a_tiny_twin(name: str, model: str, tmp_path: Path) -> None:
    words = [f"task={name}", f"model={model}", f"task.data_dir={write(tmp_path, name)}"]
    if name in BY_CLASS:
        words += ["task.num_per_class=1"]
    else:
        words += [f"task.{key}={value}" for key, value in COUNTS.items()]
    if model == "tiny-roberta":
        # The words of its tokenizer, one token each.
        known = ["terrible", "bad", "Maybe", "good", "great", "Yes"]
        words += [f"task.labels=[{','.join(known[: {'sst5': 5, 'trec': 6}.get(name, 3)])}]"]
    short = ["steps=2", "batch_size=2", "eval_every=2", "device=cpu", "compile=false"]
    result = train.run(compose([*words, *short, f"runs_dir={tmp_path}/runs"]))
    assert (result["status"], result["step"]) == ("done", 2)
    assert result["test"]["n"] == (2 if name == "piqa" else 1)
