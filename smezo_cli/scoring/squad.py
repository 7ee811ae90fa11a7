"""Compare generated answers with references, as SQuAD does; with the standard library alone.

`smezo export --lm-eval` writes this file beside the tasks of lm-evaluation-harness, which runs it
where smezo is not installed.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(answer: str) -> str:
    """Return an answer as SQuAD compares it: lower case, no ASCII punctuation, no articles.

    Rajpurkar et al., 2016 (arXiv 1606.05250), the official evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the prediction equals a reference, both normalised as SQuAD does, else 0."""
    return float(normalise(prediction) in {normalise(reference) for reference in references})


# References by which a data set says that a question has no answer.
_NO_ANSWER = ("no answer", "CANNOTANSWER")


def f1(prediction: str, references: Sequence[str]) -> float:
    """Return the word F1 with the nearest reference, all normalised as SQuAD does.

    As in MeZO: for a question without an answer (its first reference says so) the exact match.
    """
    if references[0] in _NO_ANSWER:
        return exact_match(prediction, references[:1])
    return max(_f1(normalise(prediction).split(), normalise(r).split()) for r in references)


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def compare(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return F1 and exact match of a generated text, as a task of lm-eval asks for them."""
    answer = results[0].partition("\n")[0].strip()
    return {"f1": f1(answer, doc["answers"]), "exact_match": exact_match(answer, doc["answers"])}
