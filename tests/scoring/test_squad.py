"""F1 and exact match of answers against the definitions of SQuAD, counted out word by word."""

import random

import pytest

from smezo_cli.scoring import squad


def words_of(answer: str) -> list[str]:
    """Words of an answer as SQuAD compares them, letter by letter and word by word."""
    kept = [c for c in answer.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
    # An article is a whole run of letters, digits and underscores, not a whole word.
    text, run = "", ""
    for c in [*kept, " "]:
        if c.isalnum() or c == "_":
            run += c
        else:
            text += (" " if run in ("a", "an", "the") else run) + c
            run = ""
    return text.split()


def squad_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it stands."""
    ours, theirs = words_of(prediction), words_of(reference)
    left, shared = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


PIECES = [
    *("a", "an", "the", "The", "AN", "them", "another", "theatre", "A.", "a-the", "the's", "(a)"),
    *(
        "Denver",
        "denver",
        "Broncos",
        "1,000",
        "1000",
        "U.S.",
        "US",
        "\u00e9t\u00e9",
        "\u00c9T\u00c9",
    ),
    *("stra\u00dfe", "\u0130stanbul", "\u4e2d\u6587", "\u2013", "\u201cq\u201d", "$5", "5%"),
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\u00a0",
        "\u2003",
        "...",
        "-",
        "'",
        "_a_",
        "a_b",
        "\u00e4a",
        "a\u0301",
    ),
]


def draw_answers(seed: int, n: int) -> list[str]:
    """Answers of up to six of the pieces, with and without blanks between them."""
    rng = random.Random(seed)
    return [rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randrange(7))) for _ in range(n)]


def test_f1_and_exact_match_are_those_of_squad() -> None:
    """On 6,000 drawn pairs: articles, punctuation, blanks of all sorts, letters of all scripts."""
    pairs = list(zip(draw_answers(0, 6000), draw_answers(1, 6000), strict=True))
    pairs += [(a + " the", "the " + a.upper()) for a, _ in pairs[:500]]
    seen = set()
    for ours, theirs in pairs:
        assert squad.normalise(ours) == " ".join(words_of(ours))
        found = squad.f1(ours, [theirs])
        assert found == pytest.approx(squad_f1(ours, theirs), abs=1e-15)
        assert squad.exact_match(ours, [theirs]) == (words_of(ours) == words_of(theirs))
        assert found == pytest.approx(squad.f1(theirs, [ours]), abs=1e-15)
        seen.add(0 if found == 0 else 1 if found == 1 else 0.5)
    assert seen == {0, 0.5, 1}


def test_the_nearest_reference_counts() -> None:
    """The maximum over the references, each for itself."""
    answers = draw_answers(2, 400)
    for i in range(0, 396, 4):
        ours, *references = answers[i : i + 4]
        best = max(squad_f1(ours, reference) for reference in references)
        assert squad.f1(ours, references) == pytest.approx(best, abs=1e-15)
        same = any(words_of(ours) == words_of(reference) for reference in references)
        assert squad.exact_match(ours, references) == same


@pytest.mark.parametrize(
    ("ours", "theirs", "f1", "exact"),
    [
        ("The Denver Broncos", "denver broncos!", 1, 1),
        ("Denver", "Denver Broncos", 2 / 3, 0),
        ("to be or not to be", "to be", 0.5, 0),
        ("", "x", 0, 0),
        # No word is shared: so MeZO's metric and that of SQuAD 1.1 (in SQuAD 2.0 it would be 1).
        ("the", "A.", 0, 1),
        ("", "", 0, 1),
        ("...", "an", 0, 1),
        ("well-known", "wellknown", 1, 1),
        ("the-atre", "theatre", 1, 1),
        ("a\u00a0b", "b", 1, 1),
        ("12", "1 2", 0, 0),
        # The reference of a question without an answer, as MeZO has it: right or wrong.
        ("no answer", "no answer", 1, 1),
        ("The no answer!", "no answer", 1, 1),
        ("no", "no answer", 0, 0),
        ("no good answer", "no answer", 0, 0),
        ("cannotanswer", "CANNOTANSWER", 1, 1),
        ("no answer", "No answer", 1, 1),
        ("no", "No answer", 2 / 3, 0),
    ],
)
def test_f1_by_hand(ours: str, theirs: str, f1: float, exact: int) -> None:
    assert squad.f1(ours, [theirs]) == pytest.approx(f1, abs=1e-15)
    assert squad.exact_match(ours, [theirs]) == exact


def test_a_question_without_an_answer_has_that_one_reference() -> None:
    """As in MeZO: where the first reference says so, the others do not count; else all do."""
    assert squad.f1("cat", ["no answer", "cat"]) == 0
    assert squad.f1("cat", ["cat", "no answer"]) == 1
    assert squad.f1("no", ["cat", "no answer"]) == pytest.approx(2 / 3)
