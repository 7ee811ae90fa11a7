"""Describe a perturbation or an update as a combination of directions: theta + sum c u(key)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple


class Key(NamedTuple):
    """Names one draw: with a tensor's name it is the stream (seed, purpose, step, query, name)."""

    step: int
    query: int = 0
    purpose: str = "z"


def keys(step: int, count: int) -> list[Key]:
    """Return the keys of the first ``count`` directions of a step."""
    return [Key(step, query) for query in range(count)]


class Term(NamedTuple):
    """Hold c * u(key), on all targets or on those named in ``only``."""

    key: Key
    coefficient: float
    only: frozenset[str] | None = None


@dataclass(frozen=True)
class Move:
    """Hold a move: the weights plus a sum of terms, less ``decay`` times what is selected of them.

    A point to probe, or an update.

    Attributes:
        terms: what is added; none: the weights as they are.
        decay: fraction of the weights that is taken off.
        base: name of the copy of the weights that it starts from (see
            :meth:`smezo_cli.zo.state.State.copy_weights`); "": from the weights themselves.
    """

    terms: tuple[Term, ...]
    decay: float = 0.0
    base: str = ""

    def negated(self) -> "Move":
        """Return the move the other way: exactly the same numbers with the other sign."""
        return replace(
            self, terms=tuple(t._replace(coefficient=-t.coefficient) for t in self.terms)
        )


@dataclass(frozen=True)
class Gradient:
    """Holds what an estimator makes of the scalars of a step: a sum of terms over ``divisor``.

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
        cut = [t._replace(coefficient=max(-limit, min(t.coefficient, limit))) for t in self.terms]
        return replace(self, terms=tuple(cut))

    def on(self, names: frozenset[str]) -> "Gradient":
        """Return its part on the targets of these names."""
        own = [t._replace(only=names if t.only is None else t.only & names) for t in self.terms]
        return replace(self, terms=tuple(own))

    def move(self, scale: float, decay: float = 0.0) -> Move:
        """Return the move of ``scale`` times the gradient."""
        divisor = self.divisor
        scaled = [t._replace(coefficient=scale * t.coefficient / divisor) for t in self.terms]
        return Move(tuple(scaled), decay)
