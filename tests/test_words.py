# ruff: noqa: RUF001 (wide punctuation is what some keyboards write)
"""Words of a command line reach the settings as they were written, also where Hydra's grammar ends.

Its lexer knows ASCII letters alone, and its mappings take no quotes around their keys.
"""

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from smezo_cli.config.compose import compose, prepare
from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import plain
from smezo_cli.config.launch import launch
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.words import mapping_of, quoted, value_of

OWN = ["task=classification", "task.data=a.csv", "task.prompt='{text}'"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(word: str) -> Any:
    """The value that Hydra's own parser gives for a word."""
    (override,) = OverridesParser.create().parse_overrides([quoted(word)])
    return override.value()


@pytest.mark.parametrize(
    "text",
    [
        *(
            "评论.csv",
            "Größe",
            "ß",
            "données/été 1.csv",
            "😀",
            "👩🏽‍🔬",
            "ａ，ｂ：ｃ｛ｄ｝",
            "数据(1).csv",
        ),
        *(
            "data (1).csv",
            "R&D",
            "it's",
            "a=b",
            "é， ü",
            "C:\\数据\\a.csv",
            'x "é"',
        ),
        *("<5", "#1", "no-break\u00a0space", "e\u0301", "שלום"),
    ],
)
def test_any_characters_are_a_text(text: str) -> None:
    assert read(f"task.label={text}") == text
    assert read(f"task.options=[{text},b]") == [text, "b"]
    assert read(f"task.columns={{a: {text}, b: c}}") == {"a": text, "b": "c"}
    assert quoted(quoted(f"task.label={text}")) == quoted(f"task.label={text}")
    assert compose([*OWN, "task.labels=[a,b]", f"task.label={text}"]).task.label == text


@pytest.mark.parametrize(
    ("written", "keys"),
    [
        ("{差: a, 好: b}", ["差", "好"]),
        ("{😀: a, ß: b}", ["😀", "ß"]),
        ("{très bon: a, n/a: b}", ["très bon", "n/a"]),
        ("{\"0.0\": a, '1.0': b}", ["0.0", "1.0"]),
        ("{null: a, n/a: b}", ["null", "n/a"]),
        ('{"no, thanks": a, "a: b": b}', ["no, thanks", "a: b"]),
        ("{don't: a, can't: b}", ["don't", "can't"]),
        ("{<5: a, >=5: b}", ["<5", ">=5"]),
        (r'{"say \"é\"": a, b\:c: b}', ['say "é"', "b:c"]),
        ("{好，坏: a, 好：坏: b}", ["好，坏", "好：坏"]),
        ('[["好",a],["坏",b]]', ["好", "坏"]),
    ],
)
def test_any_words_are_keys_of_labels_and_columns(written: str, keys: list[str]) -> None:
    cfg = compose([*OWN, f"task.labels={written}"])
    assert check(cfg).task["labels"] == dict(zip(keys, ["a", "b"], strict=True))
    assert plain(cfg)["task"]["labels"] == check(cfg).task["labels"]
    assert check(compose([*OWN, "task.labels=[a,b]", f"task.columns={written}"])).task[
        "columns"
    ] == dict(zip(keys, ["a", "b"], strict=True))


def test_what_hydra_reads_stays_letter_for_letter() -> None:
    for word in (
        *("lr=1e-4", "seed=0,1", "seed=range(0,3)", "seed=range(start=0,stop=3)", "~task", "steps"),
        *("task.labels={0: bad, 1: good}", "task.labels={NaN: a, +1: b}", "task.label=", "name=[a"),
        *(
            "method.freeze=['*é*']",
            "lr=choice(1e-3, 1e-4)",
            "runs_dir=${oc.env:HOME}/runs",
            "a=b c",
        ),
        *("task.labels={差}", "task.labels={: a}", "x=" + "[" * 5000, "model.path=C:\\models"),
    ):
        assert quoted(word) == word


def test_a_mapping_with_quotes_names_the_same_run() -> None:
    """Runs have the digest that they had, and the quoting of a number does not matter."""
    one = digest(compose([*OWN, "task.labels={0: bad, 1: good}"]))
    assert digest(compose([*OWN, 'task.labels={"0": bad, "1": good}'])) == one
    assert one == "d6024722"  # of the version before these words were read
    assert digest(compose([*OWN, "task.labels={0.0: bad, 1.0: good}"])) == "5d527f44"
    assert digest(compose([*OWN, "task.labels={+1: a, -1: b}"])) == "65e22be6"


def test_a_key_that_is_given_twice_is_refused() -> None:
    for labels in ("{a: x, a: y}", "{1: x, 1.0: y}", '{é: x, "é": y}'):
        with pytest.raises(UserError, match=r"gives .* twice"):
            prepare([*OWN, f"task.labels={labels}"])
    with pytest.raises(UserError, match="twice"):
        mapping_of([["a", 1], ["a", 2]], "task.labels")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("task.labels={差：a}", "： is a letter here, and what parts keys and values is :"),
        ("task.labels.差=a", "write 'task.labels={差: a}'"),
        ("été=1", "cannot read 'été=1'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(word: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare([*OWN, word])
    assert says in str(caught.value)
    assert "Lexer" not in str(caught.value)


def test_a_sweep_over_any_words() -> None:
    """Hydra splits and writes them once more before each job."""
    seen: list[Any] = []

    def job(cfg: DictConfig) -> None:
        seen.append((cfg.task.data, plain(cfg)["task"]["labels"]))

    words = ["task.data=评论.csv,é.csv", "task.labels={差: a, 好: b},{0: 差, 1: b}"]
    assert launch(["-m", OWN[0], OWN[2], "task.label=标签", *words], job) == 0
    labels = [{"差": "a", "好": "b"}, {0: "差", 1: "b"}]
    assert seen == [(data, label) for data in ("评论.csv", "é.csv") for label in labels]


@pytest.mark.parametrize(
    "word",
    [
        *("0", "-0", "+1", "1_000", "0.0", "1.", ".5", "1e5", "-1.5E-3", "NaN", "-inf", "null"),
        *(
            "NULL",
            "True",
            "FALSE",
            "007",
            "1e",
            "e5",
            "1.2.3",
            "infa",
            "0x1",
            "a b",
            "-",
            "1_",
            "_1",
        ),
    ],
)
def test_a_word_without_quotes_is_read_as_by_hydra(word: str) -> None:
    ours, theirs = value_of(word), read(f"a={word}")
    assert repr(ours) == repr(theirs)
