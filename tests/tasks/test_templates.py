"""Prompts of every task: golden strings written from MeZO's templates, on rows made up here."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from smezo_cli.errors import UserError
from smezo_cli.tasks import Prompt, Row
from smezo_cli.tasks.templates import FILTERS, check_template, fields_of, fill
from tests import ROOT

CONF = ROOT / "conf" / "task"


def prompts(name: str, key: str = "prompts") -> list[Prompt]:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    return [
        Prompt(p["template"], tuple(p.get("labels", ())), p.get("option", "{option}"))
        for p in node[key]
    ]


NLI = {"premise": "It rained. ", "hypothesis": "It was wet."}
PAIR = {"premise": "A man naps.", "hypothesis": "He is Tall."}
SCHEMA = {"text": "Ann met Eve. She smiled.", "span1_text": "Ann", "span2_text": "She"}
WORD = {"word": "bank", "sentence1": "The bank lent.", "sentence2": "A river bank."}
PASSAGE = {"paragraph": "A cat sat.", "question": "Who sat?", "answer": "the cat"}


@pytest.mark.parametrize(
    ("task", "fields", "context", "words"),
    [
        ("sst2", {"sentence": " a joy to watch . "}, "a joy to watch . It was", "terrible great"),
        (
            "rte",
            NLI,
            'It rained. \nDoes this mean that "It was wet." is true? Yes or No?\n',
            "Yes No",
        ),
        (
            "cb",
            NLI,
            'Suppose It rained.  Can we infer that "It was wet."? Yes, No, or Maybe?\n',
            "Yes No Maybe",
        ),
        (
            "boolq",
            {"passage": "Ice floats.", "question": "is ice light"},
            "Ice floats. Is ice light?\n",
            "No Yes",
        ),
        (
            "wsc",
            SCHEMA,
            "Ann met Eve. She smiled.\nIn the previous sentence, does the pronoun "
            '"she" refer to Ann? Yes or No?\n',
            "No Yes",
        ),
        (
            "wic",
            WORD,
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
            "The bank lent.\nA river bank.\n",
            "No Yes",
        ),
        (
            "multirc",
            PASSAGE,
            'A cat sat.\nQuestion: Who sat?\nI found this answer "the cat". Is that correct? '
            "Yes or No?\n",
            "No Yes",
        ),
        # Not MeZO's own: of SST-2 with more words, of CB, and ours.
        ("sst5", {"text": "A Joy ."}, "a joy . It was", "terrible bad okay good great"),
        (
            "snli",
            NLI,
            'Suppose It rained.  Can we infer that "It was wet."? Yes, No, or Maybe?\n',
            "Yes Maybe No",
        ),
        (
            "mnli",
            NLI,
            'Suppose It rained.  Can we infer that "It was wet."? Yes, No, or Maybe?\n',
            "Yes Maybe No",
        ),
        (
            "trec",
            {"text": "Who ran ?"},
            "Question: Who ran ?\nType of the answer:",
            "Description Entity Expression Human Location Number",
        ),
    ],
)
def test_classification_prompts_are_those_of_mezo(
    task: str, fields: dict[str, str], context: str, words: str
) -> None:
    (prompt,) = prompts(task)
    row = Row(fields, 0, "train/1")
    assert prompt.context(fields) == context
    blank = "" if context.endswith("\n") else " "
    assert prompt.candidates(row) == tuple(context + blank + word for word in words.split())


@pytest.mark.parametrize(
    ("task", "fields", "context", "words"),
    [
        ("sst2", {"sentence": "a joy . "}, "a joy . It was <m>.", ("terrible", "great")),
        ("rte", PAIR, "A man naps? <m>, he is Tall.", ("Yes", "No")),
        (
            "sst5",
            {"text": "A joy ."},
            "a joy . It was <m>.",
            ("terrible", "bad", "okay", "good", "great"),
        ),
        ("snli", PAIR, "A man naps? <m>, he is Tall.", ("Yes", "Maybe", "No")),
        ("mnli", PAIR, "A man naps? <m>, he is Tall.", ("Yes", "Maybe", "No")),
        (
            "trec",
            {"text": "Who ran ?"},
            "<m>: Who ran ?",
            ("Description", "Entity", "Expression", "Human", "Location", "Number"),
        ),
    ],
)
def test_masked_prompts(
    task: str, fields: dict[str, str], context: str, words: tuple[str, ...]
) -> None:
    """As MeZO's code writes them for RoBERTa-large: Table 13 shows the same with other blanks."""
    (prompt,) = prompts(task, "masked")
    assert prompt.is_masked
    assert not prompts(task)[0].is_masked
    assert prompt.context({**fields, "mask": "<m>"}) == context
    assert prompt.context(fields) == context.replace("<m>", "{mask}")
    filled = tuple(context.replace("<m>", word) for word in words)
    assert prompt.candidates(Row(fields, 0, "train/1")) == filled


@pytest.mark.parametrize(
    ("conjunction", "options", "ends"),
    [
        ("so", ("He ran.", "I Ran away."), (" so he ran.", " so I Ran away.")),
        ("because", ("NATO moved.", "I'm late."), (" because nato moved.", " because i'm late.")),
    ],
)
def test_copa(conjunction: str, options: tuple[str, ...], ends: tuple[str, ...]) -> None:
    """The whole first word is lower-cased, unless it is I alone: so MeZO's code.

    And of the premise a full stop goes, whatever blanks are behind it.
    """
    (prompt,) = prompts("copa")
    for premise in ("The dog barked..", "The dog barked.. \n"):
        row = Row({"premise": premise, "conjunction": conjunction}, 0, "train/1", options=options)
        assert prompt.context(row.fields) == f"The dog barked. {conjunction}"
        assert prompt.candidates(row) == tuple("The dog barked." + end for end in ends)


GOAL = {"goal": "Dry a cup.", "sol1": "Wipe it.", "sol2": "Fill it."}
SCENE = {"context": "Ann fell.", "question": "What next?"}
ANSWERS = {"answerA": "rest", "answerB": "run", "answerC": "sing"}
SUM = {"question": "What is 1 + 1?", "choices": "(A) 1 (B) 2"}


@pytest.mark.parametrize(
    ("task", "number", "fields", "options", "context", "ends"),
    [
        (
            "piqa",
            0,
            GOAL,
            ("Wipe it.", "Fill it."),
            "Question: Dry a cup.\nAnswer:",
            (" Wipe it.", " Fill it."),
        ),
        (
            "piqa",
            1,
            GOAL,
            ("Wipe it.", "Fill it."),
            "Please choose the correct solution to the question: Dry a cup.\n\nSolution1: Wipe it."
            "\n\nSolution2: Fill it.\n\nAnswer format: solution1/solution2\n",
            ("the correct answer is solution1", "the correct answer is solution2"),
        ),
        (
            "siqa",
            0,
            SCENE | ANSWERS,
            ("rest", "run", "sing"),
            "Question: Ann fell. What next?\nAnswer:",
            (" rest", " run", " sing"),
        ),
        (
            "siqa",
            1,
            SCENE | ANSWERS,
            ("rest", "run", "sing"),
            "Please choose the correct answer to the question: Ann fell. What next?\n\n"
            "Answer1: rest\n\nAnswer2: run\n\nAnswer3: sing\n\n"
            "Answer format: answer1/answer2/answer3\n",
            tuple(f"the correct answer is answer{k}" for k in (1, 2, 3)),
        ),
        ("aqua", 0, SUM, ("1", "2"), "Question: What is 1 + 1?\nAnswer:", (" 1", " 2")),
        (
            "aqua",
            1,
            SUM,
            ("1", "2"),
            "What is 1 + 1? Answer Choices: (A) 1 (B) 2\nThe answer is",
            (" (A).", " (B)."),
        ),
    ],
)
def test_prompts_of_the_commonsense_tasks(
    task: str,
    number: int,
    fields: dict[str, str],
    options: tuple[str, ...],
    context: str,
    ends: tuple[str, ...],
) -> None:
    prompt = prompts(task)[number]
    row = Row(fields, 0, "train/1", options=options)
    assert prompt.context(fields) == context
    assert prompt.candidates(row) == tuple(context + end for end in ends)


def test_a_field_of_the_row_goes_before_the_number_of_an_option() -> None:
    prompt = Prompt("{q}", option="{number}{letter} {option}")
    row = Row({"q": "Q", "number": "n", "option": "x"}, 0, "1", options=("a", "b"))
    assert prompt.candidates(row) == ("Q nA a", "Q nB b")


def test_record() -> None:
    (prompt,) = prompts("record")
    fields = {
        "passage": "Ann won.\n@highlight\nAnn beat Eve\n@highlight\nIn Rome",
        "query": "The cup went to @placeholder, and @placeholder wept.",
    }
    row = Row(fields, 0, "train/1", options=("Ann", "Eve"))
    context = "Ann won.\n- Ann beat Eve\n- In Rome\n-"
    assert prompt.context(fields) == context
    assert prompt.candidates(row) == (
        context + " The cup went to Ann, and Ann wept.",
        context + " The cup went to Eve, and Eve wept.",
    )


@pytest.mark.parametrize(
    ("task", "fields", "context"),
    [
        (
            "squad",
            {"title": "Cats", "context": "Cats nap.", "question": "Who naps?"},
            "Title: Cats\nContext: Cats nap.\nQuestion: Who naps?\nAnswer:",
        ),
        (
            "squad",
            {"title": "Cats ", "context": "Cats nap.\n", "question": " \tWho naps? \n"},
            "Title: Cats \nContext: Cats nap.\n\nQuestion: Who naps?\nAnswer:",
        ),
        (
            "drop",
            {"passage": "Two cats nap.", "question": "How many?"},
            "Passage: Two cats nap.\nQuestion: How many?\nAnswer:",
        ),
        (
            "drop",
            {"passage": " Two cats nap. ", "question": "How many? "},
            "Passage:  Two cats nap. \nQuestion: How many?\nAnswer:",
        ),
    ],
)
def test_generation(task: str, fields: dict[str, str], context: str) -> None:
    """Of the question alone blanks and newlines at its ends go, as in MeZO's code."""
    (prompt,) = prompts(task)
    row = Row(fields, 0, "train/1", answers=("cats", "the cats"))
    assert prompt.context(fields) == context
    assert prompt.candidates(row) == (context + " cats\n",)


# ---------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("filters", "text", "result"),
    [
        ("strip", "\n a \t", "a"),
        ("rstrip", "\n a \t", "\n a"),
        ("lower", "ÄB", "äb"),
        ("question", "is it", "Is it?"),
        ("question", "Why?", "Why?"),
        ("no_period", "So.", "So"),
        ("no_period", "So. ", "So. "),
        ("lower_first", "The Cat", "the Cat"),
        ("lower_first", "I am", "I am"),
        ("uncapital", "I AM", "i AM"),
        ("uncapital", "", ""),
        ("less_last", "So? ", "So?"),
        ("highlights", "a\n@highlight\nb", "a\n- b"),
        ("strip|no_period|lower", " A. ", "a"),  # from the left to the right
        ("lower | strip", " A ", "a"),
    ],
)
def test_filters(filters: str, text: str, result: str) -> None:
    assert fill(f"{{t|{filters}}}", {"t": text}) == result


def test_the_question_filter_bears_a_text_of_any_length() -> None:
    assert fill("{t|question}", {"t": ""}) == "?"


def test_fields_of_a_template() -> None:
    assert fields_of("{a|strip} {mask} {b}{{c}} {a}") == ["a", "b"]


def test_text_that_looks_like_a_template_stays() -> None:
    assert fill("{a|strip}", {"a": "{b|lower} {mask}", "b": "B"}) == "{b|lower} {mask}"


def test_an_option_template_must_show_the_option() -> None:
    known = ("query", "option")
    for template in ("{option}", "{query|with_option}", "x {option|lower_first}"):
        check_template(template, known, key="task.option_template", needed=("option",))
    with pytest.raises(UserError, match="does not show the option"):
        check_template("{query}", known, key="task.option_template", needed=("option",))


def test_every_filter_is_used_by_a_prompt_of_ours() -> None:
    text = "".join(file.read_text() for file in CONF.glob("*.yaml"))
    assert [name for name in FILTERS if f"|{name}" not in text] == []
