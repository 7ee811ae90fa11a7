"""Readers of the benchmarks: files and hub give the same rows, whatever their nesting."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from smezo_cli.errors import UserError
from smezo_cli.scoring import squad
from smezo_cli.tasks import Row, Task, hub, load_task
from smezo_cli.tasks.paths import NotThereError, places_of, value_at
from tests import ROOT

CONF = ROOT / "conf" / "task"
BENCHMARKS = sorted(
    file.stem for file in CONF.glob("*.yaml") if "reader: records" in file.read_text()
)


def load(name: str, folder: Path | None, **changes: Any) -> Task:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    few = {"num_train": 2, "num_dev": 1, "num_test": 1000, "num_per_class": None}
    cfg = node | few | {"data_dir": folder and str(folder)} | changes
    return load_task(cfg, data_seed=0, cache=Path("/nowhere"))


def rows_of(task: Task) -> list[Row]:
    return sorted((*task.train, *task.dev), key=lambda row: int(row.id.split("/")[1]))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ------------------------------------------------------------------------------------------ paths

RECORD = {"a": {"b": [{"c": 1, "d": [{"e": "x"}, {"e": "y"}]}, {"c": 2, "d": []}]}, "t": "top"}


def test_a_path_binds_the_elements_of_the_rows_and_collects_the_others() -> None:
    rows = list(places_of(RECORD, "a.b[]"))
    assert [value_at(row, "a.b[].c") for row in rows] == [1, 2]
    assert [value_at(row, "a.b[].d[].e") for row in rows] == [["x", "y"], []]
    assert [value_at(row, "t") for row in rows] == ["top", "top"]
    assert [row.where for row in rows] == ["a.b[1]", "a.b[2]"]
    (whole,) = places_of(RECORD, "")
    assert value_at(whole, "a.b[].c") == [1, 2]
    assert value_at(whole, "a.b[].d[].e") == ["x", "y"]
    inner = list(places_of(RECORD, "a.b[].d[]"))
    assert [(value_at(row, "a.b[].c"), value_at(row, "a.b[].d[].e")) for row in inner] == [
        (1, "x"),
        (1, "y"),
    ]
    assert [row.where for row in places_of({"p": {"q": [1]}}, "[].q[]")] == ["[1].q[1]"]


@pytest.mark.parametrize(
    ("rows", "path", "says"),
    [
        ("", "z", "field 'z' is missing; there are 'a', 't'"),
        ("", "a.z", "field 'z' is missing in a; there are 'b'"),
        ("", "t.z", "field 'z' is missing in t; there are none"),
        ("", "t[]", "t must be a list and is a str"),
        ("a.b[]", "a.b[].z", r"field 'z' is missing in a.b; there are 'c', 'd'"),
        ("a.t[]", "t", "field 't' is missing in a"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(rows: str, path: str, says: str) -> None:
    with pytest.raises(NotThereError, match=says):
        [value_at(row, path) for row in places_of(RECORD, rows)]


# --------------------------------------------------------------- one row a task, in both layouts

SPANS = [{"start": 0, "end": 2}, {"start": 9, "end": 11}, {"start": 14, "end": 16}]
ARTICLE = {"text": "Ann beat Eve. Ann won.", "entities": SPANS}


STORY = {"context": "A saw B.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c"}


def answer(**given: Any) -> dict[str, Any]:
    return {"number": "", "spans": [], "date": {"day": "", "month": "", "year": ""}} | given


# task -> (record of the file, record of the hub, fields, what else the row has)
SAME: dict[str, tuple[Any, Any, dict[str, str], dict[str, Any]]] = {
    "sst2": ("good \t1", {"sentence": "good ", "label": 1}, {"sentence": "good "}, {"label": 1}),
    "rte": (
        {"premise": "P", "hypothesis": "H", "label": "not_entailment"},
        {"premise": "P", "hypothesis": "H", "label": 1},
        {"premise": "P", "hypothesis": "H"},
        {"label": 1},
    ),
    "cb": (
        {"premise": "P", "hypothesis": "H", "label": "neutral"},
        {"premise": "P", "hypothesis": "H", "label": 2},
        {"premise": "P", "hypothesis": "H"},
        {"label": 2},
    ),
    "boolq": (
        {"passage": "P", "question": "q", "label": True},
        {"passage": "P", "question": "q", "answer": True},
        {"passage": "P", "question": "q"},
        {"label": 1},
    ),
    "wsc": (
        {"text": "T", "target": {"span1_text": "A", "span2_text": "b"}, "label": False},
        {"text": "T", "span1_text": "A", "span2_text": "b", "label": 0},
        {"text": "T", "span1_text": "A", "span2_text": "b"},
        {"label": 0},
    ),
    "wic": (
        {"word": "w", "sentence1": "A", "sentence2": "B", "label": True},
        {"word": "w", "sentence1": "A", "sentence2": "B", "label": 1},
        {"word": "w", "sentence1": "A", "sentence2": "B"},
        {"label": 1},
    ),
    "multirc": (
        {
            "passage": {
                "text": "P",
                "questions": [{"question": "q", "answers": [{"text": "a", "label": 1}]}],
            }
        },
        {"paragraph": "P", "question": "q", "answer": "a", "label": 1},
        {"paragraph": "P", "question": "q", "answer": "a"},
        {"label": 1},
    ),
    "copa": (
        {"premise": "P", "question": "cause", "choice1": "A", "choice2": "B", "label": 1},
        {"premise": "P", "question": "cause", "choice1": "A", "choice2": "B", "label": 1},
        {"premise": "P", "conjunction": "because"},
        {"label": 1, "options": ("A", "B"), "right": frozenset({1})},
    ),
    "record": (
        {"passage": ARTICLE, "qas": [{"query": "@placeholder won", "answers": [{"text": "Ann"}]}]},
        {
            "passage": ARTICLE["text"],
            "query": "@placeholder won",
            "entities": ["Ann", "Eve"],
            "answers": ["Ann"],
        },
        {"passage": "Ann beat Eve. Ann won.", "query": "@placeholder won"},
        {"label": 0, "options": ("Ann", "Eve"), "right": frozenset({0})},
    ),
    "squad": (
        {"context": "C", "qas": [{"question": "q", "answers": [{"text": "a"}, {"text": "b"}]}]},
        {"title": "T", "context": "C", "question": "q", "answers": {"text": ["a", "b"]}},
        {"title": "T", "context": "C", "question": "q"},
        {"label": 0, "answers": ("a", "b")},
    ),
    "drop": (
        {"passage": "P", "qa_pairs": [{"question": "q", "answer": answer(number="4")}]},
        {"passage": "P", "question": "q", "answers_spans": {"spans": ["4"]}},
        {"passage": "P", "question": "q"},
        {"label": 0, "answers": ("4",)},
    ),
    "sst5": (
        "(3 (2 a) (4 (3 fine) (2 film)))",
        {"text": "a fine film", "label": 3, "label_text": "positive"},
        {"text": "a fine film"},
        {"label": 3},
    ),
    "trec": (
        "NUM:date When was it ? ",
        {"text": "When was it ?", "label": 40, "label_coarse_original": "NUM"},
        {"text": "When was it ?"},
        {"label": 5},
    ),
    "snli": (
        {"sentence1": "P", "sentence2": "H", "gold_label": "neutral", "annotator_labels": ["-"]},
        {"premise": "P", "hypothesis": "H", "label": 1},
        {"premise": "P", "hypothesis": "H"},
        {"label": 1},
    ),
    "mnli": (
        'P "q"\tH\tcontradiction',
        {"premise": 'P "q"', "hypothesis": "H", "label": 2, "idx": 0},
        {"premise": 'P "q"', "hypothesis": "H"},
        {"label": 2},
    ),
    "piqa": (
        ({"goal": "G", "sol1": "A", "sol2": "B"}, 1),
        {"goal": "G", "sol1": "A", "sol2": "B", "label": 1},
        {"goal": "G", "sol1": "A", "sol2": "B"},
        {"label": 1, "options": ("A", "B"), "right": frozenset({1})},
    ),
    "siqa": (
        (STORY, 3),
        {**STORY, "label": "3"},
        STORY,
        {"label": 2, "options": ("a", "b", "c"), "right": frozenset({2})},
    ),
    "aqua": (
        {"question": "q", "options": ["A)1", "B) 2", "C)1"], "rationale": "r", "correct": "C"},
        {"question": "q", "options": ["A)1", "B) 2", "C)1"], "rationale": "r", "correct": "C"},
        {"question": "q", "choices": "(A) 1 (B) 2 (C) 1"},
        # An option of the same text is as right.
        {"label": 2, "options": ("1", "2", "1"), "right": frozenset({0, 2})},
    ),
}
NLI_NAMES = ["entailment", "neutral", "contradiction"]
CLASSES = {
    "snli": NLI_NAMES,
    "mnli": NLI_NAMES,
    "piqa": ["0", "1"],
    "sst5": [],  # plain numbers and texts
    "siqa": [],
    "rte": ["entailment", "not_entailment"],
    "sst2": ["negative", "positive"],
    "cb": ["entailment", "contradiction", "neutral"],
    "copa": ["choice1", "choice2"],
}


def write(folder: Path, name: str, records: list[Any]) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    for split in ("train", "test"):
        if name == "sst2":
            text = "sentence\tlabel\n" + "".join(line + "\n" for line in records)
        elif name == "mnli":
            text = "sentence1\tsentence2\tgold_label\n" + "".join(f"{line}\n" for line in records)
        elif name in ("sst5", "trec"):
            text = "".join(f"{line}\n" for line in records)
        elif name in ("piqa", "siqa"):
            text = "".join(json.dumps(record) + "\n" for record, _ in records)
            labels = "".join(f"{label}\n" for _, label in records)
            (folder / node["source"]["files"]["labels"][split]).write_text(labels)
        elif name == "squad":
            text = json.dumps({"data": [{"title": "T", "paragraphs": records}]})
        elif name == "drop":
            text = json.dumps({f"nfl_{i}": record for i, record in enumerate(records)})
        else:
            text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / node["source"]["files"][split]).write_text(text)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that serves the records set here, and remembers what it was asked for."""
    import datasets

    served: dict[str, Any] = {"asked": []}

    def load_dataset(path: str, name: str | None, *, revision: str, split: str) -> Any:
        served["asked"].append((path, name, revision, split))
        table = datasets.Dataset.from_list(served["records"])
        names = served.get("classes")
        return table.cast_column("label", datasets.ClassLabel(names=names)) if names else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    return served


@pytest.mark.parametrize("name", BENCHMARKS)
def test_files_and_hub_give_the_same_rows(
    name: str, tmp_path: Path, online: dict[str, Any]
) -> None:
    in_file, on_hub, fields, more = SAME[name]
    write(tmp_path, name, [in_file] * 3)
    online["records"] = [on_hub] * 3
    if "label" in on_hub:
        online["classes"] = CLASSES.get(name, ["False", "True"])
    files, table = load(name, tmp_path), load(name, None)
    assert [(row.fields, row.label) for row in rows_of(files)] == [(fields, more["label"])] * 3
    for key, value in more.items():
        assert [getattr(row, key) for row in rows_of(files)] == [value] * 3
    assert [row.id for row in rows_of(files)] == ["train/1", "train/2", "train/3"]
    # So are the cuts, by the ids.
    assert (files.train, files.dev, files.test) == (table.train, table.dev, table.test)
    assert files.classes == table.classes
    assert (files.classes == ()) == (files.kind != "classification")
    assert len(files.fingerprint) == 64
    # A revision of 40 hex digits is a commit: the data cannot change under a result.
    assert [len(revision) for _, _, revision, _ in online["asked"]] == [40, 40]


# Of tasks whose files are nested, the field of the text that several rows share.
PASSAGES = {"multirc": "paragraph", "record": "passage", "squad": "context", "drop": "passage"}


def numbered(name: str, number: int, rows: int = 1) -> Any:
    """The record of SAME with so many rows, and a passage of its own where it has one."""
    record = copy.deepcopy(SAME[name][0])
    if name in ("multirc", "record"):
        record["passage"]["text"] += f" That was {number}."
    elif name in PASSAGES:
        record[PASSAGES[name]] += f" That was {number}."
    if name in PASSAGES:
        inside = record["passage"]["questions"][0] if name == "multirc" else record
        key = {"multirc": "answers", "drop": "qa_pairs"}.get(name, "qas")
        inside[key] *= rows
    return record


@pytest.mark.parametrize("name", BENCHMARKS)
def test_test_rows_can_come_from_the_train_file(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, [numbered(name, k) for k in range(6)])
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    missing = tmp_path / node["source"]["files"]["test"]
    missing.unlink()
    message = message_of(lambda: load(name, tmp_path))
    assert f"there is no {missing.name} in it" in message
    assert "task.test_from=train" in message
    task = load(name, tmp_path, test_from="train", num_test=3, num_train=1000)
    assert [len(task.train), len(task.dev), len(task.test)] == [2, 1, 3]
    assert len({row.id for row in (*task.train, *task.dev, *task.test)}) == 6
    assert "2 rows to train on, not 1000: of 6 dev takes 1 and test 3" in task.source


@pytest.mark.parametrize("name", PASSAGES)
def test_rows_of_one_passage_are_not_in_train_and_test(
    name: str, tmp_path: Path, online: dict[str, Any]
) -> None:
    """Where test rows are cut from the train rows; eight passages of three rows each."""

    def parts(folder: Path | None, **counts: Any) -> tuple[list[int], Task]:
        task = load(name, folder, test_from="train", **counts)
        shown = [{row.fields[PASSAGES[name]] for row in of} for of in (task.train, task.dev)]
        assert not {row.fields[PASSAGES[name]] for row in task.test} & (shown[0] | shown[1])
        assert "test rows share no passage with rows of train and dev" in task.source
        return [len(task.train), len(task.dev), len(task.test)], task

    write(tmp_path, name, [numbered(name, k, 3) for k in range(8)])
    sizes, files = parts(tmp_path, num_train=7, num_dev=4, num_test=5)
    assert sizes == [7, 4, 5]
    # Of the 13 rows that 24 less 11 leave, one is of a passage that the test has.
    assert parts(tmp_path, num_train=None, num_dev=1, num_test=10)[0] == [11, 1, 10]
    assert parts(tmp_path, num_train=6, num_dev=2, num_test=None)[0] == [6, 2, 15]
    online["records"] = [
        SAME[name][1] | {PASSAGES[name]: f"{SAME[name][1][PASSAGES[name]]} That was {k}."}
        for k in range(8)
        for _ in range(3)
    ]
    if "label" in SAME[name][1]:
        online["classes"] = ["False", "True"]
    _, table = parts(None, num_train=7, num_dev=4, num_test=5)
    assert (files.train, files.dev, files.test) == (table.train, table.dev, table.test)
    whole = load(name, tmp_path, num_train=7, num_dev=4)  # with a file of its own the test is that
    assert len(whole.test) == 24
    write(tmp_path, name, [numbered(name, 0, 6)])
    message = message_of(lambda: load(name, tmp_path, test_from="train", num_test=2))
    assert "rows of one passage are not parted, and the 6 rows of task" in message
    assert "are of 1, too few for task.num_dev=1 and test rows" in message


def test_rows_of_one_passage_are_not_parted_by_class_either(tmp_path: Path) -> None:
    records = [numbered("multirc", k, 2) for k in range(12)]
    for k, record in enumerate(records):
        record["passage"]["questions"][0]["answers"][0] = {"text": "b", "label": k % 2}
    write(tmp_path, "multirc", records)
    none = {"num_train": None, "num_dev": None, "num_test": None}
    task = load("multirc", tmp_path, test_from="train", num_per_class=2, **none)
    assert [len(task.train), len(task.dev)] == [4, 4]
    seen = {row.fields["paragraph"] for row in (*task.train, *task.dev)}
    assert task.test
    assert not seen & {row.fields["paragraph"] for row in task.test}


# ----------------------------------------------------------------------------------- what is odd


def test_a_field_that_lists_options_has_letters_to_z(tmp_path: Path) -> None:
    record = SAME["aqua"][0] | {"options": [f"A){k}" for k in range(27)]}
    write(tmp_path, "aqua", [record])
    message = message_of(lambda: load("aqua", tmp_path))
    assert "line 1: field 'choices' shows letters, which end at Z, and there are 27" in message


def test_record_options_are_the_spans_without_repetition(tmp_path: Path) -> None:
    query = {"query": "@placeholder", "answers": [{"text": "Eve"}, {"text": "Ann"}]}
    none = {"query": "@placeholder", "answers": [{"text": "Bob"}]}
    write(tmp_path, "record", [{"passage": ARTICLE, "qas": [query, none, query]}] * 2)
    task = load("record", tmp_path)
    for row in rows_of(task):
        assert row.options == ("Ann", "Eve")
        assert (row.label, row.right) == (0, frozenset({0, 1}))  # trained on the first answer
    assert "2 of train and 2 of test" in task.source


def test_record_is_trained_on_the_same_answer_from_files_and_from_the_hub(
    tmp_path: Path, online: dict[str, Any]
) -> None:
    """The hub's copy has the answers once and in the order of characters: "Eve" before "eve"."""
    given = ["eve", "Bob", "Eve", "eve"]
    text = "eve met Ann and Eve"
    spans = [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 16, "end": 18}]
    passage = {"text": text, "entities": spans}
    query = {"query": "@placeholder", "answers": [{"text": one} for one in given]}
    write(tmp_path, "record", [{"passage": passage, "qas": [query]}] * 3)
    on_hub = {"passage": text, "query": "@placeholder", "entities": ["eve", "Ann", "Eve"]}
    online["records"] = [on_hub | {"answers": sorted(set(given))}] * 3
    files, table = load("record", tmp_path), load("record", None)
    assert [row.options[row.label] for row in rows_of(files)] == ["Eve"] * 3
    assert {row.right for row in rows_of(files)} == {frozenset({0, 2})}
    assert (files.train, files.dev, files.test) == (table.train, table.dev, table.test)


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        (answer(number="4"), ("4",)),
        (answer(spans=["a b", "c"]), ("a b", "c")),
        (answer(date={"day": "3", "month": "May", "year": "1999"}), ("3 May 1999",)),
        (answer(date={"day": "", "month": "May", "year": "1999"}), ("May 1999",)),
        ({"spans": ["c"]}, ("c",)),
    ],
)
def test_drop_answers(tmp_path: Path, given: dict[str, Any], answers: tuple[str, ...]) -> None:
    pair = {"question": "q", "answer": given}
    write(tmp_path, "drop", [{"passage": "P", "qa_pairs": [pair, pair]}] * 2)
    assert {row.answers for row in rows_of(load("drop", tmp_path))} == {answers}


def test_drop_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    pairs = [{"question": "q", "answer": answer(number=n)} for n in ("1", "", "2", "3")]
    write(tmp_path, "drop", [{"passage": "P", "qa_pairs": pairs}])
    task = load("drop", tmp_path)
    assert [row.answers for row in rows_of(task)] == [("1",), ("2",), ("3",)]
    assert "1 of train and 1 of test" in task.source


def test_drop_counts_the_answers_of_all_who_checked_a_dev_question(tmp_path: Path) -> None:
    """Each is a reference of the dev file; what is trained on is the one answer of the train file.

    As in the data set's own scripts.
    """
    checked = [
        answer(number="5"),
        answer(spans=["five", "six"]),
        answer(date={"day": "", "month": "May", "year": "1999"}),
        answer(number="4"),
        {"spans": ["a few"]},
        answer(),
    ]
    pair = {"question": "q", "answer": answer(number="4"), "validated_answers": checked}
    bare = {"question": "q", "answer": answer(number="7"), "validated_answers": []}
    write(tmp_path, "drop", [{"passage": "P", "qa_pairs": [pair, bare, pair]}])
    task = load("drop", tmp_path)
    assert [row.answers for row in rows_of(task)] == [("4",), ("7",), ("4",)]
    tested = sorted(task.test, key=lambda row: row.id)
    of_all = ("4", "5", "five", "six", "May 1999", "a few")
    assert [row.answers for row in tested] == [of_all, ("7",), of_all]
    assert squad.f1("six", tested[0].answers) == 1


def test_drop_rows_that_the_hub_lacks_take_no_number(tmp_path: Path) -> None:
    """Its script leaves out answers of no kind and of two: rows behind them keep their split."""
    both = answer(number="3", spans=["three"])
    given = [answer(number="1"), both, answer(number="2"), answer(), answer(number="3")]
    pairs = [{"question": "q", "answer": one} for one in given]
    write(tmp_path, "drop", [{"passage": "P", "qa_pairs": pairs}])
    task = load("drop", tmp_path)
    assert [(row.id, row.answers) for row in rows_of(task)] == [
        ("train/1", ("1",)),
        ("train/2", ("2",)),
        ("train/3", ("3",)),
    ]
    assert "2 of train and 2 of test" in task.source


def test_quotes_in_the_tsv_of_glue_are_characters(tmp_path: Path) -> None:
    lines = ['" frailty\t1', 'a "b" c\t0', "it's\t1"]
    write(tmp_path, "sst2", lines)
    assert [(row.fields["sentence"], row.label) for row in rows_of(load("sst2", tmp_path))] == [
        ('" frailty', 1),
        ('a "b" c', 0),
        ("it's", 1),
    ]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("copa", {"question": "reason"}, "field 'question' is 'reason'; allowed are 'effect', 'ca"),
        ("copa", {"label": 2}, "field 'label' is 2; allowed are 0, 'choice1', 1, 'choice2'"),
        ("copa", {"choice2": " "}, "an option must be a text and is ' '"),
        ("boolq", {"label": 1}, "field 'label' is 1; allowed are False, True"),
        ("wsc", {"target": {"span1_text": "A"}}, "field 'span2_text' is missing in target"),
        ("wsc", {"target": "A"}, "field 'span1_text' is missing in target; there are none"),
        ("multirc", {"passage": {"text": "P"}}, "field 'questions' is missing in passage"),
        ("record", {"passage": {"text": "P", "entities": ["Ann"]}}, "must hold spans, {start, end"),
        ("rte", {"premise": " "}, "field 'premise' must be a text and is ' '"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, change: dict[str, Any], says: str) -> None:
    write(tmp_path, name, [SAME[name][0], SAME[name][0] | change])
    message = message_of(lambda: load(name, tmp_path))
    assert message.startswith(f"{tmp_path / 'train.jsonl'}, line 2")
    assert says in message


def test_the_place_of_a_bad_row_in_a_nested_file_is_named(tmp_path: Path) -> None:
    good, bad = ({"question": q, "answers": [{"text": "a"}]} for q in ("q", 5))
    write(
        tmp_path, "squad", [{"context": "C", "qas": [good, good]}, {"context": "C", "qas": [bad]}]
    )
    message = message_of(lambda: load("squad", tmp_path))
    assert message.startswith(f"{tmp_path / 'train-v1.1.json'}, data[1].paragraphs[2].qas[1]: ")
    assert "must be a text and is 5" in message


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    write(tmp_path, "rte", [SAME["rte"][0]] * 3)
    before = load("rte", tmp_path).fingerprint
    assert load("rte", tmp_path).fingerprint == before
    with (tmp_path / "val.jsonl").open("a") as file:
        file.write("\n")
    assert load("rte", tmp_path).fingerprint != before


def test_the_commit_that_the_hub_served_is_recorded(online: dict[str, Any]) -> None:
    import datasets

    online["records"] = [SAME["boolq"][1]] * 3
    served = datasets.load_dataset

    def with_commit(*args: Any, **keywords: Any) -> Any:
        table = served(*args, **keywords)
        table.info.download_checksums = {f"hf://datasets/a/b@{'c0' * 20}/x.parquet": {}}
        return table

    datasets.load_dataset = with_commit
    try:
        task = load("boolq", None)
    finally:
        datasets.load_dataset = served
    assert task.fingerprint == "c0" * 20
    assert task.source == f"hub google/boolq at {'c0' * 20}"
