"""Give lm-evaluation-harness the rows of a task, and decide them by smezo's scores.

`smezo export --lm-eval` writes this file beside the tasks: it runs where smezo is not installed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def rows(file: str, **_: Any) -> dict[str, Any]:
    """Return the rows of a JSONL file beside this one, as lm-eval reads a data set: split test."""
    from datasets import Dataset  # type: ignore[import-untyped]  # the library ships no types

    # Texts may hold other ends of a line, such as U+2028, as they are.
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").split("\n")
    return {"test": Dataset.from_list([json.loads(line) for line in lines if line])}


def decide(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the accuracy of a row: 1 if the best of its candidates counts as right, else 0."""
    found = scores(doc, [log_p for log_p, _ in results])
    return {"acc": float(found.index(max(found)) in doc["right"])}


def scores(doc: Mapping[str, Any], log_p: Sequence[float]) -> list[float]:
    """Return the mean log-probability of each candidate's tokens, by which smezo decides.

    Args:
        doc: a line of the rows.
        log_p: of each of its choices. The last choice is the end of the prompt by itself, where
            lm-eval counts that in: it moves white space, and what a tokenizer joins with it, from
            the end of a prompt to the choices.
    """
    counts = doc["num_tokens"]
    less = log_p[len(counts)] if len(log_p) > len(counts) else 0.0
    return [(value - less) / count for value, count in zip(log_p, counts, strict=False)]
