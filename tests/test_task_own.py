"""Your own data: every format gives the same rows, every mistake is one sentence with its place."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from smezo_cli.config import compose
from smezo_cli.errors import UserError
from smezo_cli.settings import CONF_DIR, check
from smezo_cli.tasks import Task, hub, load_task
from smezo_cli.tasks.own import _labels

NO_CACHE = Path("/nowhere")


def load(kind: str, data: Path | str, *words: str, data_seed: int = 0) -> Task:
    """As `smezo train task=KIND task.data=DATA WORDS`, without composing the whole."""
    node = OmegaConf.load(CONF_DIR / "task" / f"{kind}.yaml")
    for override in OverridesParser.create().parse_overrides([f"task.data='{data}'", *words]):
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
    message = message_of(lambda: _labels({0: "bad", "0": "good"}))
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
    ("c", "a.csv", "text,\na,0\n", (), "'an empty name' stands there"),
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
    tmp_path: Path, kind: str, name: str, data: bytes | str, words: tuple[str, ...], says: str
) -> None:
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
        (("task.labels=[a,b,c]", "task.label=text"), "the label is 'train 0'"),
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
