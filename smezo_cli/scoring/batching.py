"""Decide which rows share a forward, so that a row's scores do not depend on the rows beside it.

A causal model whose attention hides padding scores a row in a batch as it does alone. Others do
not: attention with a window counts padding as tokens, recurrent states take it in, and a
key-value cache may forget where a window began. Which models these are is not read off a name: a
few rows of the run are scored together and alone, and what differs by more than rounding is kept
apart.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batching:
    """Say which sequences share a forward.

    Attributes:
        pads: those of unlike length; the shorter ones are padded.
        caches: what they have in common is computed once, and what has been generated is kept.
        together: any at all.
    """

    pads: bool = True
    caches: bool = True
    together: bool = True

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the numbers of the sequences that share a forward, from their lengths."""
        if not self.together:
            return [[i] for i in range(len(lengths))]
        if self.pads:
            return [list(range(len(lengths)))]
        of_length: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            of_length.setdefault(length, []).append(i)
        return list(of_length.values())

    def in_forwards(
        self, sequences: Sequence[Sequence[int]], compute: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """Return what ``compute`` gives for sequences (by number), forward by forward, in order."""
        groups = self.groups(list(map(len, sequences)))
        if len(groups) == 1:
            return compute(groups[0])
        found = torch.cat([compute(chosen) for chosen in groups])
        order = torch.tensor([i for chosen in groups for i in chosen], device=found.device)
        return found[order.argsort()]

    @property
    def words(self) -> str:
        """Return what is done, for a line of the console; "" where nothing is kept apart."""
        if not self.together:
            return "one row a forward"
        if not self.pads:
            return "rows of one length a forward" + ("" if self.caches else ", without a cache")
        return "" if self.caches else "no cache of what rows have in common"


ALONE = Batching(pads=False, caches=False, together=False)
ONE_LENGTH = Batching(pads=False, caches=False)


class Batched(Protocol):
    """Describe what a batching is set on: a :class:`smezo_cli.scoring.scorer.Scorer`."""

    batching: Batching
    batching_of_answers: Batching


@dataclass(frozen=True)
class Found:
    """Hold which batching was found to be right for a model and some rows.

    Attributes:
        scores: how sequences are scored (and their losses computed).
        answers: how answers are generated.
        difference: the largest between a row's scores or logits in a batch and alone.
    """

    scores: Batching = Batching()
    answers: Batching = Batching()
    difference: float = 0.0

    def to(self, scorer: Batched) -> None:
        """Make a scorer batch as was found."""
        scorer.batching, scorer.batching_of_answers = self.scores, self.answers

    def stricter(self, other: "Found") -> "Found":
        """Return a batching that separates whatever either of the two separates."""
        return Found(
            _stricter(self.scores, other.scores),
            _stricter(self.answers, other.answers),
            max(self.difference, other.difference),
        )

    @property
    def line(self) -> str:
        """Return a line for the console; "" where rows may share forwards freely."""
        said = [
            f"{of.words} ({what})"
            for what, of in (("scores", self.scores), ("answers", self.answers))
            if of.words
        ]
        if not said:
            return ""
        much = f"by up to {self.difference:.2g}" if self.is_finite else "infinitely"
        return f"  batches  rows together differ {much} from rows alone, so: {', '.join(said)}"

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity."""
        return asdict(self) | {"difference": self.difference if self.is_finite else None}

    @property
    def is_finite(self) -> bool:
        """Return False if a score was finite only alone, or only in a batch."""
        return self.difference < float("inf")

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Found":
        """Rebuild it from what :meth:`plain` returned."""
        scores, answers = (Batching(**plain[name]) for name in ("scores", "answers"))
        difference = plain["difference"]
        return cls(scores, answers, float("inf") if difference is None else difference)


def _stricter(a: Batching, b: Batching) -> Batching:
    return Batching(a.pads and b.pads, a.caches and b.caches, a.together and b.together)


def batches_of_like_length(
    tokens: Sequence[int],
    most_tokens: int,
    first: int = 0,
    every: int = 1,
    done: Collection[int] = (),
) -> Iterator[list[int]]:
    """Yield the indices of the rows of each batch, the longest rows first.

    Args:
        tokens: that a forward takes for each row.
        most_tokens: padded, in a batch, unless one row has more.
        first: number of the first batch that is wanted.
        every: of how many batches one is.
        done: indices of rows that are not needed; a batch of such alone does not count.
    """
    finished = frozenset(done)
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    start = number = 0
    while start < len(order):
        size = max(1, most_tokens // tokens[order[start]])
        chosen = order[start : start + size]
        start += size
        if finished.issuperset(chosen):
            continue
        if number % every == first:
            yield chosen
        number += 1
