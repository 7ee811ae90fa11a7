"""Your own data: every format gives the same rows, every mistake is one sentence with its place."""

import csv
import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.tasks import Task, hub, load_task
from smezo_cli.tasks.labels import label_words
from smezo_cli.tasks.load import check_own
from smezo_cli.words import quoted

NO_CACHE = Path("/nowhere")


def load(kind: str, data: Path | str, *words: str, data_seed: int = 0) -> Task:
    """As `smezo train task=KIND task.data=DATA WORDS`, without composing the whole."""
    node = OmegaConf.load(CONF_DIR / "task" / f"{kind}.yaml")
    given = [f"task.data='{data}'", *map(quoted, words)]
    for override in OverridesParser.create().parse_overrides(given):
        key = override.key_or_group.removeprefix("task.")
        OmegaConf.update(node, key, override.value())
    cfg: Any = OmegaConf.to_container(node, resolve=True)
    return load_task(cfg, data_seed=data_seed, cache=NO_CACHE)


def classify(data: Path | str, *words: str, data_seed: int = 0) -> Task:
    default = {"task.prompt": "'{text} It was'", "task.labels": "{0: terrible, 1: great}"}
    given = {word.partition("=")[0] for word in words}
    more = [f"{key}={value}" for key, value in default.items() if key not in given]
    return load("classification", data, *more, *words, data_seed=data_seed)


def rows(task: Task) -> list[Any]:
    every = (*task.train, *task.dev, *task.test)
    return sorted(every, key=lambda row: int(row.id.split("/")[1]))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in the format that the name ends in."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "," if path.suffix == ".csv" else "\t"
            table = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(records), path)
    return path


TEXTS = ['plain, "quoted"', "two\nlines", "tab\there", "naïve 文", "5", " blank ", "{x}", "it's"]
ROWS = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    task = classify(write(tmp_path / f"reviews.{suffix}", ROWS))
    assert [(row.fields, row.label) for row in rows(task)] == [
        ({"text": text}, i % 2) for i, text in enumerate(TEXTS)
    ]
    assert task.name == "reviews"
    assert task.classes == ("0", "1")
    assert task.prompts[0].candidates(rows(task)[4]) == ("5 It was terrible", "5 It was great")
    assert [len(task.train), len(task.dev), len(task.test)] == [6, 1, 1]
    assert task.source == f"{tmp_path / f'reviews.{suffix}'} (train, dev, test)"


def test_byte_order_mark_crlf_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbftext,label\r\n"a\r\nb",0\r\n\r\nc,1\r\nd,1\r\n'
    (tmp_path / "a.csv").write_bytes(data)
    got = rows(classify(tmp_path / "a.csv"))
    assert [(row.id, row.fields["text"]) for row in got] == [
        ("train/1", "a\r\nb"),
        ("train/2", "c"),
        ("train/3", "d"),
    ]


def test_the_same_rows_are_cut_alike_in_every_format(
    tmp_path: Path, online: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are numbered from 1, whatever the format, its header, blank lines and line breaks."""
    import datasets

    many = [{"text": f"{TEXTS[i % 8]} {i}", "label": i % 2} for i in range(60)]
    tasks = [classify(write(tmp_path / f"a.{suffix}", many)) for suffix in FORMATS]
    for suffix in ("csv", "tsv", "jsonl"):
        plain = (tmp_path / f"a.{suffix}").read_text().replace("two\nlines", "two lines")
        spread = tmp_path / f"b.{suffix}"
        spread.write_text("\n" + plain.replace("\n", "\n\n"))
        tasks.append(classify(spread))
        for split in ("train", "dev", "test"):
            assert [row.id for row in getattr(tasks[-1], split)] == [
                row.id for row in getattr(tasks[0], split)
            ]
        del tasks[-1]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(many))
    tasks.append(classify("me/films"))
    assert [len(tasks[0].train), len(tasks[0].dev), len(tasks[0].test)] == [42, 6, 12]
    for task in tasks:
        assert (task.train, task.dev, task.test) == (tasks[0].train, tasks[0].dev, tasks[0].test)


def test_the_settings_of_a_command_line_are_read(tmp_path: Path) -> None:
    """Checked settings, with every key filled in, give the same task as the bare node."""
    words = ("task.prompt='{text}'", "task.labels=[bad,good]", "task.num_test=2")
    data = write(tmp_path / "a.csv", ROWS)
    settings = check(compose(["task=classification", f"task.data={data}", *words]))
    task = load_task(settings.task, data_seed=0, cache=NO_CACHE)
    assert task == classify(data, *words)
    assert len(task.test) == 2


def test_a_cell_may_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = [{"text": "x" * (limit + 1), "label": 0}] * 3
    got = classify(write(tmp_path / "a.csv", long))
    assert len(got.train[0].fields["text"]) == limit + 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("num_rows", "words", "sizes"),
    [
        (3, (), (1, 1, 1)),
        (50, (), (35, 5, 10)),
        (20000, (), (18500, 500, 1000)),
        (50, ("task.num_test=3",), (42, 5, 3)),
        (50, ("task.num_dev=20",), (20, 20, 10)),
        (50, ("task.num_train=20",), (20, 5, 10)),
        (50, ("task.num_train=20", "task.num_dev=6", "task.num_test=7"), (20, 6, 7)),
    ],
)
def test_one_file_is_cut_in_three(
    tmp_path: Path, num_rows: int, words: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    records = [{"text": f"{i}", "label": 0} for i in range(num_rows)]
    data = write(tmp_path / "a.jsonl", records)
    task = classify(data, *words)
    assert (len(task.train), len(task.dev), len(task.test)) == sizes
    assert len({row.id for row in rows(task)}) == sum(sizes)
    assert classify(data, *words).test == task.test
    if num_rows > 3:
        assert classify(data, *words, data_seed=1).test != task.test


def test_a_second_file_is_the_test_and_copies_are_counted(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", ROWS)
    more = [{"text": text, "label": 1} for text in ("5", "new", "{x}")]
    second = write(tmp_path / "b.jsonl", more)
    task = classify(first, f"task.test_data={second}")
    assert [len(task.train), len(task.dev), len(task.test)] == [7, 1, 3]
    assert {row.id for row in task.test} == {"test/1", "test/2", "test/3"}
    assert task.source == (
        f"{first} (train, dev), {second} (test); 2 of 3 test rows are also among train and dev"
    )


def test_the_content_of_the_files_is_in_the_fingerprint(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.csv", ROWS), write(tmp_path / "b.csv", ROWS[:5])
    one, two = classify(first), classify(first, f"task.test_data={second}")
    assert len(one.fingerprint) == len(two.fingerprint) == 64
    assert one.fingerprint != two.fingerprint
    first.write_bytes(first.read_bytes() + b"more,1\n")
    assert classify(first).fingerprint != one.fingerprint


# ----------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("values", "labels", "classes", "words"),
    [
        ((0, 1), "[bad,good]", ("0", "1"), ("bad", "good")),
        ((0, 1), "{1: good, 0: bad}", ("0", "1"), ("bad", "good")),
        (("0", "1"), "{0: bad, 1: good}", ("0", "1"), ("bad", "good")),
        ((0.0, 1.0), "[bad,good]", ("0", "1"), ("bad", "good")),
        (("neg", "pos"), "{neg: bad, pos: good}", ("neg", "pos"), ("bad", "good")),
        (("neg ", "pos"), "{pos: good, neg: bad}", ("pos", "neg"), ("good", "bad")),
        ((False, True), "{false: bad, true: good}", ("false", "true"), ("bad", "good")),
        (("FALSE", "True"), "{false: bad, true: good}", ("false", "true"), ("bad", "good")),
        ((-1, 1), "{-1: bad, 1: good}", ("-1", "1"), ("bad", "good")),
        ((1, 2), "{2: 5, 1: 4}", ("2", "1"), ("5", "4")),
    ],
)
def test_labels_are_matched_to_the_values_of_their_column(
    tmp_path: Path, values: tuple[Any, Any], labels: str, classes: Any, words: Any
) -> None:
    records = [{"text": f"{i}", "label": values[i % 2]} for i in range(6)]
    task = classify(write(tmp_path / "a.jsonl", records), f"task.labels={labels}")
    assert task.classes == classes
    assert task.prompts[0].labels == words
    for i, row in enumerate(rows(task)):
        assert task.classes[row.label] == str(values[i % 2]).strip().removesuffix(".0").lower()


def test_one_value_with_two_words_is_refused() -> None:
    """In a YAML file 0 and "0" are two keys."""
    message = message_of(lambda: label_words({0: "bad", "0": "good"}))
    assert "gives one value of the label column two words" in message


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    records = [{"Review text": "a", "y": 1, "who": "b"}] * 4
    data = write(tmp_path / "a.csv", records)
    words = ("task.columns={text: Review text, label: y}", "task.prompt='{who|lower}: {text}'")
    for row in rows(classify(data, *words)):
        assert row.fields == {"who": "b", "text": "a"}
        assert row.label == 1
    assert rows(classify(data, "task.label=y", "task.columns={text: Review text}"))[0].label == 1


def test_a_masked_template_is_for_masked_models(tmp_path: Path) -> None:
    task = classify(write(tmp_path / "a.csv", ROWS), "task.prompt='{text} It was {mask} .'")
    assert task.prompts == ()
    assert [prompt.is_masked for prompt in task.masked] == [True]


# --------------------------------------------------------------------------- choice and generation

QUESTIONS = [("1 + 1?", ("2", "3", "4")), ("Sky?", ("red", "blue", "dry")), ("A?", ("A", "b", "C"))]


@pytest.mark.parametrize(
    "labels",
    [
        (0, 1, 2),  # numbers
        ("a", "b", "c"),  # names of columns
        ("2", "blue", "C"),  # texts; the first could be a number, the others not
    ],
)
@pytest.mark.parametrize("suffix", FORMATS)
def test_options_from_columns(tmp_path: Path, suffix: str, labels: tuple[Any, ...]) -> None:
    records = [
        {"q": text, "label": labels[i]} | dict(zip("abc", options, strict=True))
        for i, (text, options) in enumerate(QUESTIONS)
    ]
    task = load(
        "choice",
        write(tmp_path / f"quiz.{suffix}", records),
        r"task.prompt='{q}\nA:'",
        "task.options=[a,b,c]",
    )
    assert task.classes == ()
    for row, (text, options), right in zip(rows(task), QUESTIONS, (0, 1, 2), strict=True):
        assert (row.options, row.label, row.right) == (options, right, frozenset({right}))
        context = f"{text}\nA:"
        assert task.prompts[0].candidates(row) == tuple(f"{context} {o}" for o in options)


@pytest.mark.parametrize("suffix", FORMATS)
def test_options_in_one_column(tmp_path: Path, suffix: str) -> None:
    """Of a CSV the column holds JSON; the letters count from A."""
    flat = suffix in ("csv", "tsv")
    records: list[dict[str, Any]] = [
        {"q": text, "options": json.dumps(options) if flat else list(options), "key": letter}
        for (text, options), letter in zip(QUESTIONS[:2] * 2, "BCAB", strict=True)
    ]
    task = load(
        "choice",
        write(tmp_path / f"quiz.{suffix}", records),
        "task.prompt='{q}'",
        "task.options=options",
        "task.label=key",
        "task.option_template='({option})'",
    )
    assert [row.label for row in rows(task)] == [1, 2, 0, 1]
    assert task.prompts[0].candidates(rows(task)[1])[2] == "Sky? (dry)"


@pytest.mark.parametrize("suffix", FORMATS)
def test_answers(tmp_path: Path, suffix: str) -> None:
    many = suffix in ("jsonl", "json", "parquet")
    records: list[dict[str, Any]] = [
        {"q": f"{i}?", "a": [f"{i} ", "or"] if many else f"{i} "} for i in range(4)
    ]
    task = load(
        "generation",
        write(tmp_path / f"qa.{suffix}", records),
        "task.prompt='{q}'",
        "task.answer=a",
    )
    for i, row in enumerate(rows(task)):
        assert row.answers == ((f"{i}", "or") if many else (f"{i}",))
        assert task.prompts[0].candidates(row) == (f"{i}? {i}\n",)


def test_answers_of_several_lines_are_counted(tmp_path: Path) -> None:
    """Since they are trained on whole, and no answer that is generated has a second line."""
    answers = ["one\ntwo", "three\r\nfour", "five\n", "six", "seven", "eight"]
    data = write(tmp_path / "qa.jsonl", [{"q": f"{i}?", "a": a} for i, a in enumerate(answers)])
    task = load("generation", data, "task.prompt='{q}'", "task.answer=a")
    assert task.notes == (
        "the answers of 2 of 6 rows have several lines: they are trained on whole, and an answer "
        "that is generated ends at its first newline",
    )
    whole = [text for row in rows(task) for text in task.prompts[0].candidates(row)]
    assert whole[0] == "0? one\ntwo\n"


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ('["4", " four "]', ("4", "four")),
        ('["a, b"]', ("a, b",)),
        ("[1, 2]", ("[1, 2]",)),  # a text that is a list of numbers
        ('["a", 1]', ('["a", 1]',)),
        ("[]", ("[]",)),
        ("[see above]", ("[see above]",)),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_cell_with_a_list_of_texts_is_several_answers(
    tmp_path: Path, suffix: str, cell: str, answers: tuple[str, ...]
) -> None:
    """As with options: a CSV holds lists as JSON."""
    data = write(tmp_path / f"qa.{suffix}", [{"q": f"{i}?", "a": cell} for i in range(3)])
    task = load("generation", data, "task.prompt='{q}'", "task.answer=a")
    assert {row.answers for row in rows(task)} == {answers}


def test_blanks_at_the_ends_of_options_are_no_part_of_them(tmp_path: Path) -> None:
    """Behind the commas of a CSV they would make two blanks before each option."""
    file = tmp_path / "quiz.csv"
    file.write_text("q,a,b,label\n" + "".join(f"is it {i}?, yes, no ,no\n" for i in range(3)))
    words = ("task.prompt='{q}'", "task.options=[a,b]")
    task = load("choice", file, *words)
    assert {(row.options, row.label) for row in rows(task)} == {(("yes", "no"), 1)}
    assert task.prompts[0].candidates(rows(task)[0]) == ("is it 0? yes", "is it 0? no")
    file.write_text("q,a,b,label\nis it?, yes,yes ,0\n")
    message = message_of(lambda: load("choice", file, *words))
    assert "line 2: two or more different options are needed, and there are 'yes', 'yes'" in message


def test_letters_of_options_end_at_z(tmp_path: Path) -> None:
    records = [{"q": "0?", "options": [f"o{k}" for k in range(27)], "label": 26}]
    data = write(tmp_path / "quiz.jsonl", records * 3)
    words = ("task.prompt='{q}'", "task.options=options")
    message = message_of(lambda: load("choice", data, *words, "task.option_template='{letter}.'"))
    assert "shows letters, which end at Z, and row train/1 has 27 options: show {number}" in message
    task = load("choice", data, *words, "task.option_template='{number}. {option}'")
    assert task.prompts[0].candidates(rows(task)[0])[26] == "0? 27. o26"


# ----------------------------------------------------------------------------------- from the hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that serves six films, classes neg and pos; a list of what it was asked for."""
    import datasets

    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, *, revision: str, split: str) -> Any:
        asked.append((path, name, revision, split))
        features = datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
        )
        records = [{"text": f"{split} {i}", "label": i % 2} for i in range(6)]
        return datasets.Dataset.from_list(records, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    return asked


@pytest.mark.parametrize("labels", ["[bad,good]", "{0: bad, 1: good}", "{neg: bad, pos: good}"])
def test_a_data_set_of_the_hub_by_number_or_word(online: list[Any], labels: str) -> None:
    splits = "task.splits={train: train, test: dev}"
    task = classify("me/films", f"task.labels={labels}", splits, "task.data_name=small")
    assert [row.label for row in sorted(task.test, key=lambda row: row.id)] == [0, 1] * 3
    assert task.name == "films"
    assert online == [("me/films", "small", "main", split) for split in ("train", "dev")]
    assert len(task.test) == 6
    one = classify("me/films", f"task.labels={labels}", "task.revision=v1")
    assert len(rows(one)) == 6
    assert online[2:] == [("me/films", None, "v1", "train")]


# --------------------------------------------------------------------------- classes without rows


def test_what_rows_of_a_class_are_lacking_is_said(tmp_path: Path) -> None:
    """Of one class alone, by every way of cutting; of a label that no row has."""
    words = "metrics there say nothing of how well classes are told apart"
    many = [{"text": f"{i}", "label": i % 2} for i in range(40)]
    few = [{"text": f"t{i}", "label": 0} for i in range(5)]
    data, second = write(tmp_path / "a.csv", many), write(tmp_path / "b.csv", few)
    assert classify(data).notes == ()
    one = classify(data, "task.num_test=1", "task.num_dev=1")
    labels = [task[0].label for task in (one.dev, one.test)]
    assert one.notes == (
        f"one class alone in dev (1 of 1 rows: label {labels[0]}), test (1 of 1 rows: label "
        f"{labels[1]}): {words}",
    )
    tested = f"one class alone in test (5 of 5 rows: label 0): {words}"
    assert classify(data, f"task.test_data={second}").notes == (tested,)
    k_shot = ("task.num_per_class=2", f"task.test_data={second}")
    assert classify(data, *k_shot).notes == (tested,)
    one = classify(second)
    assert one.notes[0] == "no row has the label 1"
    assert one.notes[1].startswith("one class alone in train (3 of 3 rows: label 0), dev (1 of 1")
    three = classify(data, "task.labels={0: bad, maybe: so, 1: good}")
    assert three.notes == ("no row has the label maybe",)


# ------------------------------------------------------------------------- labels in every format

# A label as Python has it, and as a CSV says it; what the settings may call it.
SPELLED: list[tuple[Any, str, tuple[str, ...]]] = [
    (0, "0", ("0", "0.0", '"0"', '"0.0"', "+0", "'-0'")),
    (1.0, "1.0", ("1", "1.0", "+1", '"1.0"', '"+1"', "1e0")),
    (1, "+1", ("1", "+1", '"+1"')),
    (-1, "-1", ("-1", "-1.0", '"-1"')),
    (0.5, ".50", ("0.5", ".5", '"0.50"')),
    (2**60 + 1, str(2**60 + 1), (str(2**60 + 1), f'"{2**60 + 1}"')),
    (True, "True", ("true", "TRUE", '"True"')),
    ("NaN", "NaN", ("NaN", "nan", '"NaN"')),
    ("null", "null", ("null", '"null"')),
    ("007", "007", ("007", '"007"')),
    ("very good", "very good", ("very good", '"very good"')),
    ("好", "好", ("好", '"好"')),
    ("2024-01-05", "2024-01-05", ("2024-01-05",)),
]


@pytest.mark.parametrize(("value", "said", "keys"), SPELLED, ids=[case[1] for case in SPELLED])
def test_a_label_is_matched_however_file_and_settings_write_it(
    tmp_path: Path, value: Any, said: str, keys: tuple[str, ...]
) -> None:
    """One rule in every format, for words of the command line and keys from Python alike."""
    labels = [value, "other"] * 3
    files = [
        write(
            tmp_path / f"a.{suffix}", [{"text": f"{i}", "label": x} for i, x in enumerate(labels)]
        )
        for suffix in ("jsonl", "json")
    ]
    files.append(tmp_path / "a.csv")
    files[-1].write_text("text,label\n" + "".join(f"{i},{said}\n{i},other\n" for i in range(3)))
    if not isinstance(value, str):
        number = [{"text": f"{i}", "label": value} for i in range(6)]
        files.append(write(tmp_path / "a.parquet", number))
    for file in files:
        for key in keys:
            got = rows(classify(file, f"task.labels={{{key}: bad, other: good}}"))
            assert {row.label for row in got} == ({0} if file.suffix == ".parquet" else {0, 1})
        node: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "task/classification.yaml"))
        node |= {"name": "a", "data": str(file), "prompt": "{text}"}
        for python in (value, said):
            node["labels"] = {python: "bad", "other": "good"}
            task = load_task(node, data_seed=0, cache=NO_CACHE)
            assert [row.label for row in rows(task)] == [row.label for row in got]


def test_labels_may_be_what_is_missing_elsewhere(tmp_path: Path) -> None:
    """Named in task.labels, null, NaN and an empty cell are labels as others are."""
    records = [{"text": f"{i}", "label": [None, "x"][i % 2]} for i in range(6)]
    for suffix in ("jsonl", "json", "parquet"):
        task = classify(write(tmp_path / f"a.{suffix}", records), "task.labels={null: a, x: b}")
        assert [row.label for row in rows(task)] == [0, 1] * 3
    empty = write(tmp_path / "a.csv", records)
    assert [r.label for r in rows(classify(empty, 'task.labels={"": a, x: b}'))] == [0, 1] * 3
    assert "the label is empty" in message_of(lambda: classify(empty, "task.labels={y: a, x: b}"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_list_of_words_is_for_numbers_from_0_or_from_1(tmp_path: Path, suffix: str) -> None:
    def of(*labels: Any) -> Task:
        records = [{"text": f"{i}", "label": label} for i, label in enumerate(labels)]
        return classify(write(tmp_path / f"a.{suffix}", records), "task.labels=[a,b,c]")

    assert of(0, 2, 1, 2).classes == ("0", "1", "2")
    assert of(1, 3, 2, 3).classes == ("1", "2", "3")
    assert [row.label for row in rows(of(1, 3, 2, 3))] == [0, 2, 1, 2]
    assert of(1, 2, 2, 1).classes == ("0", "1", "2")  # as documented, where both would do
    assert "label is" in message_of(lambda: of(0, 1, 3, 1))


def test_the_parts_of_a_mixture_are_numbered_by_line_where_a_task_would_be(tmp_path: Path) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "task/classification.yaml"))
    (tmp_path / "a.csv").write_text("text,label\na,0\n\nb,1\nc,0\n")
    node |= {"name": "a", "data": str(tmp_path / "a.csv"), "prompt": "{text}", "labels": ["x", "y"]}
    mixture = {"name": "mixed", "kind": "mixture", "nodes": {"one": node}}
    for by_line, numbers in ((False, (1, 2, 3)), (True, (2, 4, 5))):
        task = load_task(mixture, data_seed=0, cache=NO_CACHE, by_line=by_line)
        every = {row.id for row in (*task.train, *task.dev, *task.test)}
        assert every == {f"one/train/{number}" for number in numbers}


def test_labels_that_are_taken_for_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1.1\nb,1.10\nc,2\nd,2\n")
    task = classify(tmp_path / "a.csv", "task.labels={1.1: a, 2: b}")
    assert task.notes[0] == "the labels '1.1', '1.10' are read as one class, 1.1"


@pytest.mark.parametrize("second", [False, True])
def test_numbers_of_right_options_may_begin_at_1(tmp_path: Path, second: bool) -> None:
    """Decided over all rows, those of the second file too; where both would do, that is said."""
    quiz = [{"q": f"{i}", "a": "x", "b": "y", "label": 1 + i % 2} for i in range(6)]
    data = write(tmp_path / "a.csv", quiz)
    words = ["task.prompt='{q}'", "task.options=[a,b]"]
    if second:
        words.append(f"task.test_data={write(tmp_path / 'b.csv', quiz[:1] * 3)}")
    task = load("choice", data, *words)
    assert {row.label for row in rows(task)} == {0, 1}
    assert {row.label for row in task.test} == ({0} if second else {1})
    assert task.notes == ()
    unclear = load("choice", write(tmp_path / "c.csv", quiz[:1] * 3), *words[:2])
    assert {row.label for row in rows(unclear)} == {1}
    assert "no row has the label 0" in unclear.notes[0]


def test_labels_that_could_name_two_options_are_counted(tmp_path: Path) -> None:
    """No setting says whether a number is a place or the text of an option: it is said instead."""
    words = ["task.prompt='{q}'", "task.options=[a,b]"]
    quiz = [{"q": f"{i}", "a": "01"[i % 2], "b": "10"[i % 2], "label": 1} for i in range(6)]
    task = load("choice", write(tmp_path / "a.csv", quiz[1:5:2] + quiz), *words)
    assert {row.label for row in rows(task)} == {1}
    assert [note for note in task.notes if "as the text of an option" in note] == [
        "the labels in column 'label' are each read as a number from 0; as the text of an option "
        "they would name another option in 5 of 8 rows: where that is meant, give the right option "
        "by its letter from A"
    ]
    # As a letter it is one option alone; so is a text that no other reading takes.
    for label in ("A", "yes"):
        quiz = [{"q": f"{i}", "a": "yes", "b": "no", "label": label} for i in range(6)]
        task = load("choice", write(tmp_path / "b.csv", quiz), *words)
        assert ({row.label for row in rows(task)}, task.notes) == ({0}, ())


def test_right_options_are_found_by_texts_that_look_like_numbers_or_booleans(
    tmp_path: Path,
) -> None:
    for options, right in ((("True", "False"), "True"), (("3.0", "4.0"), "3.0"), (("5", "9"), 5.0)):
        quiz = [{"q": f"{i}", "a": options[0], "b": options[1], "y": right} for i in range(3)]
        for suffix in ("csv", "jsonl", "parquet"):
            data = write(tmp_path / f"a.{suffix}", quiz)
            words = ("task.prompt='{q}'", "task.options=[a,b]", "task.label=y")
            assert {row.label for row in load("choice", data, *words).train} == {0}


# --------------------------------------------------------------------------------- odd tables


def test_a_column_without_a_name_is_ignored_unless_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "index.csv").write_text(",text,label\n7,a,0\n8,b,1\n9,c,0\n")
    (tmp_path / "comma.csv").write_text("text,label,\na,0,\nb,1\nc,0,\n")
    (tmp_path / "both.csv").write_text(",text,label,,\n7,a,0,,\n8,b,1,,\n9,c,0,,\n")
    (tmp_path / "rows.csv").write_text("text,label\na,0,\nb,1,,\nc,0\n")
    for name in ("index", "comma", "both", "rows"):
        got = rows(classify(tmp_path / f"{name}.csv"))
        assert [(row.fields, row.label) for row in got] == [
            ({"text": text}, label) for text, label in (("a", 0), ("b", 1), ("c", 0))
        ]
    words = ("task.prompt='{id} {text}'", 'task.columns={id: ""}')
    got = rows(classify(tmp_path / "index.csv", *words))
    assert [row.fields["id"] for row in got] == ["7", "8", "9"]
    message = message_of(lambda: classify(tmp_path / "both.csv", *words))
    assert "has no column '' (of id) (there are: label, text)" in message


STRAY = 'text\tlabel\na\t0\n"b\t1\nc\t0\nd\t1\ne"\t0\nf "g" h\t1\n'


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_rows_that_a_stray_quotation_mark_swallows_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_text(STRAY.replace("\t", "," if suffix == "csv" else "\t"))
    message = message_of(lambda: classify(file))
    assert "line 3: a quotation mark makes one row of lines 3 to 6" in message
    assert "add task.quoting=none, else task.quoting=minimal" in message
    got = rows(classify(file, "task.quoting=none"))
    assert [row.fields["text"] for row in got] == ["a", '"b', "c", "d", 'e"', 'f "g" h']
    assert [row.label for row in got] == [0, 1, 0, 1, 0, 1]
    assert len(rows(classify(file, "task.quoting=minimal"))) == 3


def test_empty_cells_are_no_sign_of_a_swallowed_row(tmp_path: Path) -> None:
    """A text whose first line ends in a comma, beside a column that is empty at times."""
    file = tmp_path / "notes.csv"
    file.write_text('text,note\n"Dear Sir,\nthank you",\nfoo,\nbar,x\n')
    task = load("generation", file, "task.prompt='{text}'", "task.answer=text", "task.num_test=1")
    assert "Dear Sir,\nthank you" in {row.fields["text"] for row in rows(task)}


def test_a_text_of_several_lines_is_no_swallowed_row(tmp_path: Path) -> None:
    """Nor where each of its lines has a comma; but where nothing tells, it is said."""
    texts = ["one,two\nthree", "four", "five\nsix, seven", "eight,\nnine,\n"]
    task = classify(
        write(tmp_path / "a.csv", [{"text": x, "label": i % 2} for i, x in enumerate(texts)])
    )
    assert [row.fields["text"] for row in rows(task)] == texts
    answers = [{"q": f"what {i}", "a": f"it is {i}"} for i in range(3)]
    data = write(tmp_path / "b.csv", [*answers, {"q": "who,she\nwhen,then\nwhy", "a": "so"}])
    task = load("generation", data, "task.prompt='{q}'", "task.answer=a")
    assert len(rows(task)) == 4
    assert any("makes one row of lines 5 to 7" in note for note in task.notes)


def test_quoting_is_no_news_to_a_run_without_it(tmp_path: Path) -> None:
    words = ["task=classification", "task.data=a.csv", "task.prompt='{text}'", "task.labels=[a,b]"]
    plain = digest(compose(words))
    assert plain == digest(compose([*words, "task.quoting=null"])) == "d89b6527"
    assert digest(compose([*words, "task.quoting=none"])) != plain


def test_columns_of_parquet_are_texts_and_numbers_as_in_a_csv(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def fields_of(column: Any) -> list[str]:
        table = pa.table({"text": column, "label": pa.array([0, 1, 0])})
        parquet.write_table(table, tmp_path / "a.parquet")
        return [row.fields["text"] for row in rows(classify(tmp_path / "a.parquet"))]

    days = [datetime.date(2024, 1, day) for day in (5, 6, 7)]
    assert fields_of(pa.array(["x", "y", "x"]).dictionary_encode()) == ["x", "y", "x"]
    assert fields_of(pa.array([b"x", "ü".encode(), b"z"])) == ["x", "ü", "z"]
    assert fields_of(pa.array([0.1, 1.0, 2.5], pa.float32())) == ["0.1", "1", "2.5"]
    assert fields_of(pa.array([2**63 + 1, 0, 1], pa.uint64())) == [str(2**63 + 1), "0", "1"]
    assert fields_of(pa.array(days)) == ["2024-01-05", "2024-01-06", "2024-01-07"]
    assert fields_of(pa.array([Decimal("1.50")] * 3)) == ["1.50"] * 3
    for broken in (pa.array([1.0, float("nan"), 2.0]), pa.array(["a", None, "b"])):
        assert "row 2, column 'text': the cell is empty" in message_of(partial(fields_of, broken))
    assert "a text is needed and b'\\xff'" in message_of(lambda: fields_of(pa.array([b"\xff"] * 3)))


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "'text' stands there twice" in message_of(lambda: classify(tmp_path / "a.parquet"))


FRAME = {f"r{i}": {"text": f"t{i}", "label": i % 2} for i in range(4)}
FRAMES: dict[str, Any] = {
    "wrapped": {"data": list(FRAME.values())},
    "wrapped beside others": {"version": "1.1", "rows": list(FRAME.values()), "count": 4},
    "one list": {"films": list(FRAME.values())},
    "columns": {c: {str(i): r[c] for i, r in enumerate(FRAME.values())} for c in ("text", "label")},
    "columns with names of rows": {
        c: {k: r[c] for k, r in FRAME.items()} for c in ("text", "label")
    },
    "index": {str(i): r for i, r in enumerate(FRAME.values())},
    "index of names": FRAME,
    "split": {
        "columns": ["text", "label"],
        "index": list(FRAME),
        "data": [list(r.values()) for r in FRAME.values()],
    },
    "table": {
        "schema": {"fields": [{"name": "index", "type": "integer"}], "primaryKey": ["index"]},
        "data": [{"index": i} | r for i, r in enumerate(FRAME.values())],
    },
    "lists": {c: [r[c] for r in FRAME.values()] for c in ("text", "label")},
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("form", FRAMES)
def test_a_data_frame_or_a_wrapped_list_is_read_as_its_rows(
    tmp_path: Path, form: str, suffix: str
) -> None:
    """As pandas' to_json writes it by any orient that names the columns."""
    (tmp_path / f"a.{suffix}").write_text(json.dumps(FRAMES[form]))
    task = classify(tmp_path / f"a.{suffix}")
    assert [(row.id, row.fields, row.label) for row in rows(task)] == [
        (f"train/{i + 1}", {"text": f"t{i}"}, i % 2) for i in range(4)
    ]
    renamed = classify(tmp_path / f"a.{suffix}", "task.prompt='{x}'", "task.columns={x: text}")
    assert [row.fields["x"] for row in rows(renamed)] == ["t0", "t1", "t2", "t3"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
STAND_INS = [
    (POINTER, "is a git-lfs pointer, which stands for the data where it was not fetched: run git"),
    (b"/annex/objects/MD5E-s12--0a.csv\n", "is a git-annex pointer"),
    (b"\n<!DOCTYPE html>\n<html><head>", "is a web page: fetch the data itself"),
]
PACKED = [
    (b"\x1f\x8b\x08\x00", "is compressed by gzip: unpack it"),
    (b"PK\x03\x04\x14", "is a zip archive or an Excel table"),
    ("text,label\n".encode("utf-16"), "is in UTF-16: save it as UTF-8"),
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_stands_in_for_a_file_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    for content, says in STAND_INS + (PACKED if suffix != "parquet" else []):
        file.write_bytes(content)
        assert f"a.{suffix} {says}" in message_of(lambda: classify(file))


# -------------------------------------------------------------------------------------- mistakes

GOOD = "text,label\na,0\nb,1\nc,0\n"
QUIZ = "q,a,b,label\nx,1,2,0\ny,3,4,1\nz,5,6,0\n"
BROKEN: list[tuple[str, str, bytes | str, tuple[str, ...], str]] = [
    # kind, name of the file, what is in it, more words, what the sentence says
    ("c", "a.csv", "", (), "a.csv has no rows"),
    ("c", "a.csv", "text,label\n", (), "a.csv has no rows"),
    ("c", "a.jsonl", "\n\n", (), "a.jsonl has no rows"),
    ("c", "a.json", "[]", (), "a.json has no rows"),
    ("c", "a.csv", "text,label\na,0,x\n", (), "line 2: 3 cells, and the first line names 2"),
    ("c", "a.tsv", "text\tlabel\na\n", (), "line 2: 1 cells, and the first line names 2"),
    ("c", "a.csv", "text,text\na,0\n", (), "line 1: the first line must name each column once"),
    ("c", "a.csv", "text,\na,0\n", (), "has no column 'label' (there are: text)"),
    ("c", "a.csv", "text,label\na,0,x,\n", (), "line 2: 4 cells, and the first line names 2"),
    ("c", "a.csv", "text,label\na\n", (), "line 2: 1 cells, and the first line names 2"),
    ("c", "a.csv", 'text,label\n"a,0\n', (), "are ordinary characters, add task.quoting=none"),
    ("c", "a.csv", GOOD, ("task.labels={0: a}",), "for fewer than two classes"),
    ("c", "a.csv", GOOD, ("task.labels=[a]",), "for fewer than two classes"),
    ("c", "a.csv", GOOD, ("task.labels={0: a, 0.0: b}",), "twice"),
    ("c", "a.jsonl", '{"text": "a", "label": NaN}\n', (), "'label': the label is empty"),
    ("c", "a.jsonl", '{"text": NaN, "label": 0}\n', (), "'text': the cell is empty"),
    ("c", "a.jsonl", '{"text": "a", "text": "b"}\n', (), "line 1: key 'text' stands twice"),
    ("c", "a.json", '[{"text": "a", "label": 0, "label": 1}]', (), "key 'label' stands twice"),
    ("c", "a.jsonl", '[\n{"text": "a"}]', (), "one JSON text: let its name end in .json"),
    ("c", "a.json", '[["a", 0], ["b", 1]]', (), 'write it as {"text": "a film", "label": 1}'),
    ("c", "a.json", '{"train": [{"text": "a"}], "test": [{}]}', (), "holds the lists train, test"),
    ("c", "a.json", '{"text": ["a", "b"], "label": [0]}', (), "unlike length (text: 2, label: 1)"),
    ("c", "a.json", '{"columns": ["text", "label"], "data": [["a"]]}', (), "a list of 2 cells"),
    ("c", "a.json", '{"columns": ["text", "text"], "data": []}', (), "names a column twice"),
    ("c", "a.json", '{"columns": ["text"], "data": []}', (), "a.json has no rows"),
    ("c", "a.jsonl", GOOD, ("task.quoting=none",), "task.quoting=none is for .csv and .tsv"),
    ("c", "a.csv", 'text,label\n"a,0\n', (), "line 2: unexpected end of data; a quoted cell"),
    ("c", "a.csv", 'text,label\n"a"b,0\n', (), "line 2: ',' expected after '\"'"),
    ("c", "a.csv", b"text,label\na,0\n\xff,1\n", (), "line 3: not UTF-8 (byte 0xff)"),
    ("c", "a.csv", "text,label\na,0\n ,1\nc,0\n", (), "line 3, column 'text': the cell is empty"),
    ("c", "a.csv", "text,label\na,0\nb,\nc,0\n", (), "line 3, column 'label': the label is empty"),
    ("c", "a.csv", "text,label\na,0\nb,2\n", (), "the label is '2' and task.labels has words for"),
    ("c", "a.csv", "text,label\na,neg\nb,pos\n", (), "(neg, pos), as {neg: terrible, ...}"),
    ("c", "a.csv", "sentence,label\na,0\n", (), "has no column 'text'"),
    ("c", "a.csv", "txt,label\na,0\n", (), "did you mean txt?"),
    ("c", "a.csv", "text;label\na;0\n", (), "(there are: text;label)"),
    ("c", "a.csv", GOOD, ("task.label=lable",), "task.label=lable: "),
    ("c", "a.csv", GOOD, ("task.columns={text: txt}",), "has no column 'txt' (of text), did you"),
    ("c", "a.csv", GOOD, ("task.columns={tex: text}",), "task.columns names tex, which neither"),
    ("c", "a.csv", GOOD, ("task.prompt='{text'",), "any other brace twice"),
    ("c", "a.csv", GOOD, ("task.prompt='Hello'",), "shows nothing of a row"),
    ("c", "a.csv", GOOD, ("task.prompt=0",), "lists no prompts to choose from"),
    ("c", "a.csv", GOOD, ("task.prompt='{text|uper}'",), "no filter uper"),
    ("c", "a.csv", GOOD, ("task.labels=[a,a]",), "2 classes is needed, all different"),
    ("c", "a.csv", GOOD, ("task.labels=a",), "task.labels=a gives no word for each class"),
    ("c", "a.csv", GOOD, ("task.labels={0: true, 1: false}",), "with quotes around yes, no"),
    ("c", "a.csv", GOOD, ("task.num_train=3", "task.num_dev=3"), "a has 3 rows for the three"),
    ("c", "a.csv", "text,label\na,0\nb,1\n", (), "a has 2 rows for the three"),
    ("c", "a.csv", GOOD, ("task.revision=main",), "task.revision is for a data set of the hub"),
    ("c", "a.csv", GOOD, ("task.test_data={folder}/no.csv",), "there is no such file"),
    ("c", "a.csv", GOOD, ("task.test_data={folder}/a.csv",), "is the file of task.data too"),
    ("c", "a.csv", GOOD, ("task.test_data={folder}",), "is a folder; give a file, one of .csv"),
    ("c", "a.jsonl", '{"text": "a"}\n{\n', (), "line 2: not JSON in UTF-8"),
    ("c", "a.jsonl", "[1]\n", (), "line 1: a record of columns is needed, not a list"),
    ("c", "a.jsonl", '{"text": ["a"], "label": 0}\n', (), "a text is needed and ['a'] stands"),
    ("c", "a.jsonl", '{"text": null, "label": 0}\n', (), "line 1, column 'text': the cell is em"),
    ("c", "a.json", '{"a": 1}\n{"a": 2}\n', (), "line 2, column 1: not JSON (Extra data); if each"),
    ("c", "a.json", "[{", (), "line 1, column 3: not JSON"),
    ("c", "a.parquet", "text", (), "a.parquet is no Parquet file that can be read"),
    ("c", "a.xlsx", "text", (), "files of this kind are not read; give a .csv, .tsv"),
    ("q", "a.csv", QUIZ, ("task.options=[a,c]",), "task.options=c: "),
    ("q", "a.csv", QUIZ, ("task.options=a",), "it must hold a list of texts"),
    ("q", "a.csv", QUIZ.replace("3,4", "3,3"), (), "line 3: two or more different options"),
    ("q", "a.csv", QUIZ.replace("3,4,1", "3,4,2"), (), "line 3, column 'label': the label is '2'"),
    ("q", "a.csv", QUIZ.replace("3,4,1", "3,,1"), (), "line 3, column 'b': the cell is empty"),
    ("q", "a.csv", QUIZ.replace("3,4,1", "3,4," + "7" * 5000), (), "the label is '777"),
    ("q", "a.csv", QUIZ, ("task.option_template='{q}'",), "does not show the option"),
    ("q", "a.csv", QUIZ, ("task.option_template='{c}'",), "has no column 'c'"),
    ("g", "a.csv", "q,a\nx,\n", (), "line 2, column 'a': the cell is empty"),
    ("g", "a.jsonl", '{"q": "x", "a": []}\n', (), "the list is empty; give an answer"),
    ("g", "a.jsonl", '{"q": "x", "a": [{}]}\n', (), "a text is needed and {} stands there"),
]


@pytest.mark.parametrize(
    ("kind", "name", "data", "words", "says"), BROKEN, ids=[case[-1] for case in BROKEN]
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    name: str,
    data: bytes | str,
    words: tuple[str, ...],
    says: str,
) -> None:
    """The same one by the first rows, before anything heavy is loaded."""
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    words = tuple(word.replace("{folder}", str(tmp_path)) for word in words)
    given = {word.partition("=")[0] for word in words}
    quiz = [] if "task.options" in given else ["task.options=[a,b]"]

    def call() -> Task:
        if kind == "c":
            return classify(file, *words)
        if kind == "q":
            return load("choice", file, "task.prompt='{q}'", *quiz, *words)
        return load("generation", file, "task.prompt='{q}'", "task.answer=a", *words)

    message = message_of(call)
    assert says in message
    assert name.partition(".")[0] in message or "task." in message
    if not says.endswith("rows for the three"):  # which only all rows tell
        monkeypatch.setitem(globals(), "load_task", lambda cfg, **_: check_own(cfg))
        assert message_of(call) == message


def test_the_first_rows_alone_refuse_nothing_that_later_ones_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that comes later is no mistake of the settings: the row that lacks it is."""
    monkeypatch.setitem(globals(), "load_task", lambda cfg, **_: check_own(cfg))
    for size, says in ((99, "a.jsonl has no column 'text'"), (101, "line 1, column 'text': the")):
        rows = [{"txt": f"film {k}", "label": k % 2} for k in range(size)]
        rows.append({"text": "the last", "label": 0} if size > 100 else {"label": 0})
        message = message_of(lambda rows=rows: classify(write(tmp_path / "a.jsonl", rows)))
        assert says in message
    classify(write(tmp_path / "b.csv", [*ROWS, *ROWS * 30, {"text": "a", "label": 7}]))  # far down


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("reviws.csv", "task.data=reviws.csv: there is no such file, did you mean reviews.csv?"),
        ("sub/reviews.csv", "task.data=sub/reviews.csv: there is no such file."),
        (".", "task.data=. is a folder"),
    ],
)
def test_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "reviews.csv", ROWS)
    assert says in message_of(lambda: classify(data))


def test_the_second_file_must_have_the_columns_too(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", ROWS)
    second = write(tmp_path / "b.csv", [{"text": "a", "lable": 1}])
    message = message_of(lambda: classify(first, f"task.test_data={second}"))
    assert f"{second} has no column 'label', did you mean lable?" in message


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("task.test_data=b.csv",), "task.test_data=b.csv goes with a file"),
        (("task.splits={test: a}",), "name the split to train on"),
        (("task.splits={train: a, dev: b}",), "name the split to train on"),
        (
            ("task.labels=[a,b,c]", "task.label=text"),
            "me/films train, row 1, column 'text': the label is 'train 0'",
        ),
    ],
)
def test_mistakes_with_the_hub(online: list[Any], words: tuple[str, ...], says: str) -> None:
    assert says in message_of(lambda: classify("me/films", *words))


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    message = message_of(lambda: classify("me/films"))
    assert message.startswith("task films: the hub cannot be reached for me/films")
    assert "check that task.data=me/films is a file" in message
