"""Choose test rows for a report: answered otherwise than before training, or wrongly both times."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from smezo_cli.errors import UserError
from smezo_cli.files import bounded
from smezo_cli.report.runs import Floats, Run
from smezo_cli.report.series import MOST_BYTES

_MOST_ROWS = 3  # of each kind
_MOST_LETTERS = 600  # of a text
_ENOUGH = 0.5  # of F1: less is a wrong answer


@dataclass(frozen=True)
class Answer:
    """Hold what a model answered, and whether that is right (of generation its F1)."""

    text: str
    verdict: str

    @property
    def is_right(self) -> bool:
        """Return whether it counts as right."""
        return self.verdict == "right"


@dataclass(frozen=True)
class Sample:
    """Hold a test row, the right answer, and those before and after training."""

    id: str
    fields: tuple[tuple[str, str], ...]
    gold: str
    before: Answer | None
    after: Answer


@dataclass
class Samples:
    """Hold the samples of a run, by kind: a heading, how many such rows there are, some of them."""

    label: str
    run: str
    kinds: list[tuple[str, int, list[Sample]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def samples(run: Run, label: str) -> Samples:
    """Return samples of a finished run; what cannot be read is a note."""
    found = Samples(label, str(run.path))
    try:
        lines = _lines(run, "predictions-test.jsonl")
        outcomes = run.outcomes()
        scores = _zero_shot(run)
        base = _lines(run, "predictions-test-base.jsonl", optional=True)
    except UserError as error:
        found.notes.append(str(error))
        return found
    after, before = outcomes["test"], outcomes.get("zero_shot")
    if len(lines) != len(after):
        found.notes.append(
            f"{run.path}/predictions-test.jsonl has {len(lines)} rows and the scores have "
            f"{len(after)}: smezo eval {run.path} writes it anew."
        )
        return found
    if before is None:
        found.notes.append("There is no zero-shot score to compare with (zero_shot=false).")
    if not any(isinstance(line.get("fields"), dict) for line in lines):
        found.notes.append(
            f"Texts of rows are not kept by runs of before: smezo eval {run.path} writes them."
        )
    if base is not None and len(base) != len(lines):
        base = None
    rows = _Rows(run, lines, base, scores, after, before)
    for title, places in _chosen(after, before):
        some = [rows.sample(k) for k in places[:_MOST_ROWS]]
        found.kinds.append((title, len(places), some))
    return found


def _chosen(after: Floats, before: Floats | None) -> list[tuple[str, list[int]]]:
    """Return headings, and the rows below each: the largest differences first, then in order."""
    known = [k for k in range(len(after)) if not math.isnan(after[k])]
    if before is None:
        return [("Wrong after training", [k for k in known if after[k] < _ENOUGH])]

    def by_gap(sign: int) -> list[int]:
        gaps = {k: sign * float(after[k] - before[k]) for k in known}
        return sorted((k for k in known if gaps[k] > 0), key=lambda k: (-gaps[k], k))

    wrong = [k for k in known if after[k] < _ENOUGH and before[k] < _ENOUGH]
    same = [k for k in wrong if after[k] == before[k]]
    return [
        ("Better after training", by_gap(1)),
        ("Worse after training", by_gap(-1)),
        ("Wrong before and after", same),
    ]


@dataclass(frozen=True)
class _Rows:
    """Make samples of the rows of a run."""

    run: Run
    lines: Sequence[Mapping[str, Any]]
    base: Sequence[Mapping[str, Any]] | None
    scores: Floats | None
    after: Floats
    before: Floats | None

    def sample(self, k: int) -> Sample:
        line = self.lines[k]
        words = self._label_words(line)
        texts = line.get("fields")
        fields = texts.items() if isinstance(texts, dict) else ()
        before = None
        if self.before is not None:
            before = Answer(self._before(k, line, words), self._verdict(self.before[k]))
        return Sample(
            str(line.get("id", k)),
            tuple((str(name), _cut(str(text))) for name, text in fields),
            self._gold(line, words),
            before,
            Answer(_answer(line, words), self._verdict(self.after[k])),
        )

    def _verdict(self, outcome: float) -> str:
        if self.run.metric == "f1" and 0 < outcome < 1:
            return f"F1 {outcome:.2f}"
        return "not scored" if math.isnan(outcome) else "right" if outcome >= _ENOUGH else "wrong"

    def _label_words(self, line: Mapping[str, Any]) -> list[str]:
        """Return the words of the classes; none of tasks whose rows have options of their own."""
        prompts = self.run.result.get("prompt")
        if isinstance(prompts, list):
            part = [p for p in prompts if p.get("part") == line.get("part")]
            prompts = part[0] if part else None
        is_class = isinstance(line.get("label"), int)
        return list(prompts["labels"]) if prompts and is_class else []

    def _gold(self, line: Mapping[str, Any], words: Sequence[str]) -> str:
        if isinstance(answers := line.get("answers"), list):
            return _cut(" / ".join(map(str, answers)))
        label = line.get("label")
        if isinstance(label, int) and 0 <= label < len(words):
            return words[label]
        of_row = label if isinstance(label, list) else [label]
        return " or ".join(f"option {k + 1}" if isinstance(k, int) else "?" for k in of_row)

    def _before(self, k: int, line: Mapping[str, Any], words: Sequence[str]) -> str:
        if self.base is not None:
            return _answer(self.base[k], words)
        if "answers" in line:
            return f"(smezo eval {self.run.path} --base writes what it was)"
        if self.scores is None or k >= len(self.scores):
            return "?"
        best = int(np.argmax(self.scores[k]))
        if best == line.get("prediction"):
            return _answer(line, words)
        return words[best] if best < len(words) else f"option {best + 1}"


def _answer(line: Mapping[str, Any], words: Sequence[str]) -> str:
    said, word = line.get("prediction"), line.get("word")
    if isinstance(said, int) and not words:
        return f"option {said + 1}" + (f": {_cut(str(word))}" if word is not None else "")
    return _cut(str(word if word is not None else said))


def _cut(text: str) -> str:
    lost = len(text) - _MOST_LETTERS
    return text if lost <= 0 else f"{text[:_MOST_LETTERS]}… ({lost} more characters)"


def _zero_shot(run: Run) -> Floats | None:
    """Return the scores of candidates before training, (n, most candidates), if they are kept."""
    path = run.path / "scores.safetensors"
    try:
        bounded.check_ordinary(path)
        scores = load_file(path).get("zero_shot")
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if scores is None or scores.ndim != 2 or scores.shape[1] == 0:
        return None
    return scores.astype(np.float64)


def _lines(run: Run, name: str, optional: bool = False) -> Any:
    """Return the predictions in a file of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    path = run.path / name
    if optional and not path.is_file():
        return None
    try:
        # Texts may hold other ends of a line, such as U+2028, as they are.
        written = bounded.read_text(path, MOST_BYTES).split("\n")
        found = [json.loads(line) for line in written if line]
        if not all(isinstance(line, dict) for line in found):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: it is damaged; smezo eval {run.path} writes it anew."
        ) from error
    return found
