"""Describe a perturbation or an update as a combination of directions: theta + sum c u(key)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple


class Key(NamedTuple):
    """Names one draw: with a tensor's name it is the stream (seed, purpose, step, query, name)."""

    step: int
    query: int = 0
    purpose: str = "z"


class Term(NamedTuple):
    """c * u(key)."""

    key: Key
    coefficient: float


@dataclass(frozen=True)
class Move:
    """The weights plus a sum of terms, less ``decay`` times the weights, on what is selected.

    A point to probe, or an update.
    """

    terms: tuple[Term, ...]
    decay: float = 0.0

    def negated(self) -> "Move":
        """Return the move the other way: exactly the same numbers with the other sign."""
        return replace(self, terms=tuple(Term(key, -c) for key, c in self.terms))


@dataclass(frozen=True)
class Gradient:
    """What an estimator makes of the scalars of a step: a sum of terms over ``divisor``.

    Attributes:
        terms: one for each direction that was probed; a coefficient is a projected gradient.
        divisor: the number that the sum is divided by. It stands apart because a coefficient of an
            update is ``scale * c / divisor`` in this order, to the last bit.
        also: other numbers that an update of the method reads, such as a curvature.
    """

    terms: tuple[Term, ...]
    divisor: float = 1.0
    also: Mapping[str, float] = field(default_factory=dict)

    def clipped(self, limit: float) -> "Gradient":
        """Return it with coefficients of at most ``limit`` in size."""
        cut = tuple(Term(key, max(-limit, min(c, limit))) for key, c in self.terms)
        return replace(self, terms=cut)

    def move(self, scale: float, decay: float = 0.0) -> Move:
        """Return the move of ``scale`` times the gradient."""
        return Move(tuple(Term(key, scale * c / self.divisor) for key, c in self.terms), decay)
