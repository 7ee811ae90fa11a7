"""Tasks: prompts to the letter, cuts that never mix, bad data named by file, line and field."""

import gc
import hashlib
import html
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from smezo_cli.errors import UserError
from smezo_cli.files.fetch import cache_dir
from smezo_cli.tasks import Prompt, Row, Task, hub, load_task
from smezo_cli.tasks.base import Tables, cut, fingerprint, permute
from smezo_cli.tasks.rotten_tomatoes import held_out, plain
from tests import ROOT

CONF = ROOT / "conf" / "task"
NO_CACHE = Path("/nowhere")


def node(name: str, **changes: Any) -> dict[str, Any]:
    """The task node of a YAML file with some keys changed."""
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    assert isinstance(cfg, dict)
    return {str(key): value for key, value in cfg.items()} | changes


def toy(data_seed: int = 0, **changes: Any) -> Task:
    return load_task(node("toy", **changes), data_seed=data_seed, cache=NO_CACHE)


def ids(rows: tuple[Row, ...]) -> list[str]:
    return [row.id for row in rows]


def message_of(call: Callable[[], object]) -> str:
    """The one sentence of the UserError that `call` raises."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---------------------------------------------------------------------------------------- prompts


def prompts(name: str) -> list[Prompt]:
    return [Prompt(p["template"], tuple(p["labels"])) for p in node(name)["prompts"]]


def test_the_prompt_of_rte_is_that_of_mezo() -> None:
    (prompt,) = prompts("rte")
    fields = {"premise": "Cats sleep a lot.", "hypothesis": "Some cats sleep."}
    context = 'Cats sleep a lot.\nDoes this mean that "Some cats sleep." is true? Yes or No?\n'
    assert prompt.context(fields) == context
    assert prompt.candidates(Row(fields, 0, "0"))[0] == context + "Yes"
    assert prompt.candidates(Row(fields, 0, "0"))[1] == context + "No"


def test_the_prompts_of_rotten_tomatoes() -> None:
    review, mezo, opinion = prompts("rotten_tomatoes")
    fields = {"text": "a joy."}
    assert review.candidates(Row(fields, 0, "0"))[0] == "Review: a joy.\nSentiment: negative"
    assert review.candidates(Row(fields, 0, "0"))[1] == "Review: a joy.\nSentiment: positive"
    assert mezo.context(fields) == "a joy. It was"
    assert mezo.candidates(Row(fields, 0, "0"))[0] == "a joy. It was terrible"
    assert mezo.candidates(Row(fields, 0, "0"))[1] == "a joy. It was great"
    assert opinion.candidates(Row(fields, 0, "0"))[1].endswith(
        "a joy.\nThe critic's opinion of the movie is positive"
    )


@pytest.mark.parametrize(
    ("template", "context", "full"),
    [
        ("{text} It was ", "fine It was", "fine It was good"),  # blanks at the end go
        ("  {text}?\n", "fine?\n", "fine?\ngood"),  # newlines stay, and no blank follows them
        ("{text}\t", "fine\t", "fine\tgood"),
        ("\n\t {text}\n\u2003It was", "fine\n\u2003It was", "fine\n\u2003It was good"),
        ("{{{text}}}", "{fine}", "{fine} good"),
    ],
)
def test_blanks_are_stripped_and_newlines_at_the_begin_and_one_is_put_between(
    template: str, context: str, full: str
) -> None:
    """As MeZO's code: all that is blank at the begin of a text, blanks alone at its end."""
    prompt = Prompt(template, ("bad", "good"))
    assert prompt.context({"text": "fine"}) == context
    assert prompt.candidates(Row({"text": "fine"}, 1, "0"))[1] == full


def test_newlines_of_a_row_are_stripped_where_the_text_begins_alone() -> None:
    """Behind demonstrations a row keeps them, as in MeZO's code; so does a masked prompt."""
    row = Row({"text": " \n\tfine"}, 1, "0")
    prompt = Prompt("{text} It was", ("bad", "good"))
    assert prompt.context(row.fields) == "fine It was"
    assert prompt.candidates(row)[1] == "fine It was good"
    shown = replace(prompt, head="dull It was bad\n\n")
    assert shown.context(row.fields) == "dull It was bad\n\n\n\tfine It was"
    assert shown.candidates(row)[1] == "dull It was bad\n\n\n\tfine It was good"
    assert Prompt("{text} {mask}", ("bad", "good")).candidates(row)[1] == "\n\tfine good"


def test_braces_in_a_text_are_only_text() -> None:
    prompt = Prompt("{text} It was", ("bad", "good"))
    assert prompt.context({"text": "{x} {0.__class__} }{"}) == "{x} {0.__class__} }{ It was"


def test_one_prompt_can_be_chosen_by_number_or_written() -> None:
    assert len(toy().prompts) == 2
    assert toy(prompt=1).prompts == (toy().prompts[1],)
    written = toy(prompt="{text}?", labels=["No", "Yes"]).prompts
    assert written == (Prompt("{text}?", ("No", "Yes")),)
    by_index = toy(prompt=0, labels={1: "good", 0: "bad"}).prompts
    assert by_index == (Prompt(toy().prompts[0].template, ("bad", "good")),)


WORDS = {"labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": 2}, "the prompts of task toy are 0 to 1"),
        ({"prompt": -1}, "the prompts of task toy are 0 to 1"),
        ({"prompt": "{text}?"}, "add task.labels"),
        (
            {"prompt": "{txt}?", "labels": ["a", "b"]},
            "{txt} is no field of the rows, did you mean {text}?",
        ),
        ({"prompt": "{text.x}", "labels": ["a", "b"]}, "{text.x} is no field of the rows"),
        ({"prompt": "{text!r}", "labels": ["a", "b"]}, "is no field"),
        ({"prompt": "{}?", "labels": ["a", "b"]}, "{} is no field"),
        ({"prompt": "{text", "labels": ["a", "b"]}, "any other brace twice"),
        ({"prompt": "It was", "labels": ["a", "b"]}, "shows nothing of a row"),
        ({"labels": ["a", "b"]}, "give task.prompt too"),
        ({"prompt": 0, "labels": ["a"]}, "2 classes is needed, all different"),
        ({"prompt": 0, "labels": ["a", "a"]}, "2 classes is needed, all different"),
        ({"prompt": 0, "labels": {1: "a", 2: "b"}}, "gives no word for each class"),
        ({"prompt": 0, "labels": [True, False]}, "quotes around yes, no"),
        ({"prompt": 0, "labels": "ab"}, "gives no word for each class"),
        ({"kind": "choice"}, "the rows of task toy have no options"),
        ({"kind": "generation"}, "the rows of task toy have no answers"),
        ({"kind": "regression"}, "task.kind=regression is not known"),
        ({"prompt": "{text|lowr}?"} | WORDS, "there is no filter lowr, did you mean lower?"),
        ({"prompt": "{text|}?"} | WORDS, "there is no filter "),
        ({"prompt": "{text|with_option}"} | WORDS, "the filter with_option is for task.option_t"),
        ({"prompt": "{mask}"} | WORDS, "shows nothing of a row"),
        ({"prompt": "{text} {mask} {mask}"} | WORDS, "{mask} stands there more than once"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    assert says in message_of(lambda: toy(**changes))


# ------------------------------------------------------------------------------------------- cuts


def tables(num_train: int, num_test: int = 5) -> Tables:
    """Rows as many files have them: all of class 0 first."""
    train = [Row({"text": f"{i}"}, int(2 * i >= num_train), f"train/{i}") for i in range(num_train)]
    test = [Row({"text": f"{i}"}, i % 2, f"test/{i}") for i in range(num_test)]
    return Tables(train, test, ("text",), 2, "made here")


def counts(num_train: Any, num_dev: Any, num_test: Any) -> dict[str, Any]:
    return {"name": "made", "num_train": num_train, "num_dev": num_dev, "num_test": num_test}


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ((6, 3, 4), (6, 3, 4)),
        ((7, 3, None), (7, 3, 5)),
        ((None, 3, 5), (7, 3, 5)),
        ((6, None, 1), (6, 4, 1)),
        ((6, 3, 1000), (6, 3, 5)),  # as MeZO on RTE: 1,000 asked, 277 there
        ((8, 3, 5), (7, 3, 5)),  # as MeZO on WSC: dev is served first, 54 are left to train on
    ],
)
def test_null_is_all_that_are_left_and_num_test_a_limit(
    asked: tuple[Any, Any, Any], got: tuple[int, int, int]
) -> None:
    parts = cut(tables(10), counts(*asked), data_seed=0)
    assert tuple(map(len, parts)) == got


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((8, 10, 5), "has 10 rows for the two together"),
        ((None, 10, 5), "has 10 rows for the two together"),
        ((11, None, 5), "has 10 rows for the two together"),
        ((None, None, 5), "give one of them a number"),
        ((0, 3, 5), "task.num_train=0 is no row count"),
        ((6, -1, 5), "task.num_dev=-1 is no row count"),
        ((6, 3, 2.5), "task.num_test=2.5 is no row count"),
        ((True, 3, 5), "task.num_train=True is no row count"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_numbers(
    asked: tuple[Any, Any, Any], says: str
) -> None:
    assert says in message_of(lambda: cut(tables(10), counts(*asked), data_seed=0))


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ((4, 3, 2), (4, 3, 2)),
        ((9, 3, 2), (5, 3, 2)),
        ((None, 3, 2), (5, 3, 2)),
        ((4, None, 2), (4, 4, 2)),
        ((4, 3, None), (4, 3, 3)),
    ],
)
def test_without_a_test_file_the_train_rows_are_cut_in_three(
    asked: tuple[Any, Any, Any], got: tuple[int, int, int]
) -> None:
    cfg = counts(*asked) | {"test_from": "train"}
    parts = cut(tables(10, num_test=0), cfg, data_seed=7)
    assert tuple(map(len, parts)) == got
    order = [row.id for row in permute(tables(10).train, data_seed=7)]
    assert [row.id for part in parts for row in part] == order[: sum(got)]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((4, 7, 3), "task.num_dev=7 and task.num_test=3 do not fit: task made has 10 rows for the"),
        ((7, 3, None), "task.num_test=null do not fit"),
        ((None, 3, 7), "10 rows for the three together"),
        ((None, None, 3), "give one of them a number"),
        ((None, None, None), "give two of them a number"),
    ],
)
def test_three_counts_that_do_not_fit_are_refused(asked: tuple[Any, Any, Any], says: str) -> None:
    cfg = counts(*asked) | {"test_from": "train"}
    assert says in message_of(lambda: cut(tables(10), cfg, data_seed=0))


def test_what_is_missing_to_num_train_is_said() -> None:
    assert "not 128" not in toy().source
    assert "72 rows to train on, not 128: of 200 dev takes 128" in toy(num_dev=128).source


def test_dev_is_the_end_of_the_chosen_rows() -> None:
    order = [row.id for row in permute(tables(10).train, data_seed=7)]
    train, dev, _ = cut(tables(10), counts(4, 3, 5), data_seed=7)
    assert ids(train) + ids(dev) == order[:7]


def test_the_cut_depends_on_data_seed_and_not_on_the_order_of_the_file() -> None:
    sorted_by_label = tables(1000)
    mixed = Tables(sorted_by_label.train[::-1], sorted_by_label.test, ("text",), 2, "")
    first, again, other = (
        cut(source, counts(400, 200, 5), data_seed=seed)
        for source, seed in ((sorted_by_label, 0), (mixed, 0), (sorted_by_label, 1))
    )
    assert first == again
    assert first != other
    for rows in first[:2]:  # five standard errors of a fair coin
        share = sum(row.label for row in rows) / len(rows)
        assert abs(share - 0.5) < 2.5 / len(rows) ** 0.5


def test_the_permutation_is_the_recorded_one() -> None:
    """A change here changes every number that was ever reported."""
    order = [row.id for row in permute(tables(6).train, data_seed=0)]
    assert order == [f"train/{i}" for i in (1, 4, 0, 5, 3, 2)]


# -------------------------------------------------------------------------------------------- toy


def test_the_toy_task_is_balanced_and_never_repeats_a_sentence() -> None:
    task = toy(num_train=None)
    rows = task.train + task.dev + task.test
    assert len(rows) == len({row.fields["text"] for row in rows}) == 300
    assert Counter(row.label for row in rows) == {0: 150, 1: 150}
    assert toy(data_seed=1).train != toy().train


# ----------------------------------------------------------------------------------- RTE, records

GOOD = [
    {"premise": f"P{i}.", "hypothesis": f"H{i}.", "label": label, "idx": i}
    for i, label in enumerate(["entailment", "not_entailment"] * 5)
]


@pytest.fixture
def rte_folder(tmp_path: Path) -> Path:
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return tmp_path


def rte(folder: Path | None) -> Task:
    cfg = node("rte", data_dir=None if folder is None else str(folder), num_train=6, num_dev=4)
    return load_task(cfg, data_seed=0, cache=NO_CACHE)


def test_rte_reads_the_files_of_the_benchmark(rte_folder: Path) -> None:
    task = rte(rte_folder)
    assert sorted(ids(task.train + task.dev)) == sorted(f"train/{i}" for i in range(1, 11))
    for row in task.train + task.test:
        number = int(row.id.split("/")[1]) - 1  # ids count rows from 1
        assert row.fields == {"premise": f"P{number}.", "hypothesis": f"H{number}."}
        assert row.label == number % 2  # 0 is entailment
    assert len(task.classes) == 2
    assert str(rte_folder) in task.source


def test_blank_lines_a_byte_order_mark_and_line_separators_in_a_text_do_no_harm(
    rte_folder: Path,
) -> None:
    row = {"premise": "one\u2028two\x85three", "hypothesis": "h", "label": "entailment"}
    line = json.dumps(row, ensure_ascii=False).encode()
    (rte_folder / "val.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\n\n")
    test = rte(rte_folder).test
    assert sorted(ids(test)) == ["test/1", "test/2"]
    assert test[0].fields["premise"] == "one\u2028two\x85three"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{not json}", "line 3: not JSON in UTF-8"),
        (b'{"premise": "\xff"}', "line 3: not JSON in UTF-8"),
        (b'["P", "H", "entailment"]', "line 3: a record of fields in braces is needed, not a list"),
        (b'{"premise": "P", "label": "entailment"}', "line 3: field 'hypothesis' is missing"),
        (b'{"premise": "P", "hypothesis": "H"}', "line 3: field 'label' is missing"),
        (b'{"premise": 5, "hypothesis": "H", "label": "x"}', "line 3: field 'premise' must be a"),
        (b'{"premise": " ", "hypothesis": "H", "label": "x"}', "line 3: field 'premise' must be a"),
        (
            b'{"premise": "P", "hypothesis": "H", "label": "maybe"}',
            "line 3: field 'label' is 'maybe'; allowed are 'entailment', 'not_entailment'",
        ),
        (b'{"premise": "P", "hypothesis": "H", "label": 1}', "line 3: field 'label' is 1; allowed"),
        (b'{"premise": "P", "hypothesis": "H", "label": []}', "line 3: field 'label' is []"),
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl"])
def test_a_bad_line_is_named_by_file_line_and_field(
    rte_folder: Path, name: str, line: bytes, says: str
) -> None:
    lines = (rte_folder / name).read_bytes().splitlines(keepends=True)
    lines[2] = line + b"\n"
    (rte_folder / name).write_bytes(b"".join(lines))
    message = message_of(lambda: rte(rte_folder))
    assert message.startswith(f"{rte_folder / name}, ")
    assert says in message


def test_missing_data_is_named(rte_folder: Path) -> None:
    (rte_folder / "val.jsonl").write_text("\n\n")
    assert "val.jsonl has no rows" in message_of(lambda: rte(rte_folder))
    (rte_folder / "val.jsonl").unlink()
    message = message_of(lambda: rte(rte_folder))
    assert f"task.data_dir={rte_folder}: there is no val.jsonl in it" in message
    assert "train.jsonl and val.jsonl" in message
    assert "there is no such folder" in message_of(lambda: rte(rte_folder / "no"))


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    message = message_of(lambda: rte(None))
    assert message.startswith("task rte: the hub cannot be reached for aps/super_glue")
    assert "task.data_dir=PATH" in message


def test_the_hub_and_the_files_give_the_same_task(
    rte_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str, *, revision: str, split: str) -> Any:
        asked.append((path, name, len(revision), split))
        features = datasets.Features(
            premise=datasets.Value("string"),
            hypothesis=datasets.Value("string"),
            idx=datasets.Value("int32"),
            label=datasets.ClassLabel(names=["entailment", "not_entailment"]),
        )
        return datasets.Dataset.from_list(GOOD, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    table, files = rte(None), rte(rte_folder)
    assert (table.train, table.dev, table.test) == (files.train, files.dev, files.test)
    # A revision of 40 hex digits is a commit: the data cannot change under a result.
    assert asked == [("aps/super_glue", "rte", 40, split) for split in ("train", "validation")]


# -------------------------------------------------------------------------------- rotten tomatoes


@pytest.mark.parametrize(
    ("tokenised", "printed"),
    [
        ("escapism in its purest form .", "Escapism in its purest form."),
        ('the rock\'s new " conan " , really', "The Rock's new ''Conan'', really"),
        ("far-fetched -- and dull . . . [a] mess", "Far fetched   and dull...(A) mess"),
        ("j . r . r . tolkien's \x96 clichés", "J.R.R. Tolkien's \u2013 clichés"),
        ("bread & butter ( mostly ) ?", "Bread &amp; butter (mostly)?"),
    ],
)
def test_the_two_files_come_out_in_one_style(tokenised: str, printed: str) -> None:
    assert plain(tokenised) == plain(printed)


def test_copies_near_copies_and_repetitions_are_not_held_out() -> None:
    train = ["bread & butter , done well .", "been there done that .", "terrible"]
    texts = {
        "Bread &amp; butter, done well!": False,  # a copy, in other clothes
        "Been there, done that... a thousand times already.": False,  # contains one
        "there done that": False,  # contained in one
        "A terrible waste of a good cast.": True,  # shares a word with one
        "A new sentence about a film.": True,
        "a NEW sentence about a film": False,  # seen above
        "Terrible.": False,
    }
    assert held_out(list(texts), train) == list(texts.values())


@pytest.fixture(scope="module")
def sentences() -> Task:
    """The whole real task, with every train sentence in train or dev."""
    try:
        cfg = node("rotten_tomatoes", num_train=None)
        return load_task(cfg, data_seed=0, cache=cache_dir())
    except UserError as error:
        pytest.skip(f"the real sentences cannot be had here: {error}")


def normal(text: str) -> str:
    """Independent of the code under test: decoded, lower case, letters and digits only."""
    keep = string.ascii_lowercase + string.digits
    return "".join(c for c in html.unescape(text).lower() if c in keep)


def test_test_sentences_are_disjoint_from_all_train_sentences(sentences: Task) -> None:
    parts = [[normal(r.fields["text"]) for r in getattr(sentences, p)] for p in PARTS]
    assert [len(part) for part in parts] == [8128, 400, 1976]
    every = [text for part in parts for text in part]
    assert len(every) == len(set(every))
    assert all(every)


PARTS = ("train", "dev", "test")


def test_no_test_sentence_contains_or_sits_in_a_longer_run_of_a_train_sentence(
    sentences: Task,
) -> None:
    def words(row: Row) -> str:
        return " " + " ".join(re.findall(r"[a-z0-9]+", row.fields["text"].replace("'", ""))) + " "

    train = [w for w in map(words, sentences.train + sentences.dev) if w.count(" ") > 4]
    test = [w for w in map(words, sentences.test) if w.count(" ") > 4]
    all_train, all_test = "\n".join(train), "\n".join(test)
    assert not [w for w in test if w in all_train]
    assert not [w for w in train if w in all_test]


def test_the_real_sentences_are_balanced_and_in_one_style(sentences: Task) -> None:
    for rows, classes in (
        (sentences.train + sentences.dev, {0: 4264, 1: 4264}),
        (sentences.test, {0: 987, 1: 989}),
    ):
        assert Counter(row.label for row in rows) == classes
        for row in rows:
            text = row.fields["text"]
            assert text == text.lower().strip()
            assert not re.search(r'  |["\[\]\n]| [.,]| \)|\( |&amp;', text), text
        # Both files end most sentences alike, and no part is much longer than the other.
        ends = sum(row.fields["text"][-1] in ".!?" for row in rows) / len(rows)
        assert ends > 0.9
    lengths = [sorted(len(r.fields["text"]) for r in getattr(sentences, p)) for p in PARTS]
    medians = [part[len(part) // 2] for part in lengths]
    assert max(medians) < 1.1 * min(medians)


def test_default_sizes(sentences: Task) -> None:
    task = load_task(node("rotten_tomatoes"), data_seed=0, cache=cache_dir())
    assert (len(task.train), len(task.dev), len(task.test)) == (2000, 400, 1976)
    assert sorted(ids(task.test)) == sorted(ids(sentences.test))
    fields: Mapping[str, str] = task.train[0].fields
    assert set(fields) == {"text"}


def test_a_fingerprint_is_of_the_rows_as_json() -> None:
    """The digests of the runs that there are were made by json.dumps."""
    rows = [
        Row({"b": '\u00e9\n\u2028"\\', "a": "\U0001f600"}, 1, "x", ("o", "p"), frozenset({3, 1})),
        Row({"text": "\x00\x7f"}, -1, "\u00e9", answers=("a", "b")),
        Row({}, 0, ""),
    ]
    digest = hashlib.sha256()
    for row in rows:
        parts = [row.id, row.label, row.fields, row.options, sorted(row.right), row.answers]
        digest.update(json.dumps(parts, sort_keys=True).encode())
    assert fingerprint(rows) == digest.hexdigest()[:12]


def test_reading_leaves_the_garbage_collector_on() -> None:
    toy()
    with pytest.raises(UserError):
        toy(kind="nothing")
    assert gc.isenabled()
