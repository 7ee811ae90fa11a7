"""Put the evaluations of the parts of a mixture together: each part, and the mean over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smezo_cli.kinds import MIXTURE
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.parts import by_part


@dataclass
class MixedEvaluation(Evaluation):
    """Hold a model's scores on a split of a mixture.

    Its metric is the mean of the metrics of the parts, whatever their sizes; its loss is the mean
    of their losses by the weights of the training. Label offsets are a mapping from the names of
    the parts that have them.

    Attributes:
        parts: the evaluation of each part by name; `rows` and `scores` are theirs, part after part.
        weights: of the losses by part; they add up to 1.
    """

    parts: Mapping[str, Evaluation] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, Evaluation], weights: Mapping[str, float]) -> "MixedEvaluation":
        """Return the evaluation that these of the parts make."""
        widest = max(part.scores.shape[1] for part in parts.values())
        scores = [
            torch.nn.functional.pad(
                part.scores, (0, widest - part.scores.shape[1]), value=-math.inf
            )
            for part in parts.values()
        ]
        rows = [row for part in parts.values() for row in part.rows]
        return cls(rows, torch.cat(scores), parts=parts, weights=weights)

    @property
    def kind(self) -> str:
        """Return the kind of the task."""
        return MIXTURE

    def with_scores(self, rows: Sequence[Candidates], scores: Tensor) -> "MixedEvaluation":
        """Return the evaluation of other rows of the parts by their scores."""
        parts, start = {}, 0
        for name, of_part in by_part(rows).items():
            widest = max(1, *(len(row.full) for row in of_part))
            own = scores[start : start + len(of_part), :widest]
            parts[name] = Evaluation(of_part, own)
            start += len(of_part)
        return MixedEvaluation.of(parts, self.weights)

    def fit_offsets(self) -> Any:
        """Return the label offsets of each part that can have them; None if none can."""
        fitted = {name: part.fit_offsets() for name, part in self.parts.items()}
        return {name: found for name, found in fitted.items() if found is not None} or None

    def gain(self, theirs: Tensor) -> tuple[float, float]:
        """Return the mean of the gains of the parts, and its standard error."""
        gains, start = [], 0
        for part in self.parts.values():
            gains.append(part.gain(theirs[start : start + len(part.rows)]))
            start += len(part.rows)
        return _mean([gain for gain, _ in gains]), _error_of_mean([error for _, error in gains])

    def per_row(self, offsets: Any = None) -> Tensor:
        """Return the metric of each row, float64 (n,)."""
        own = offsets or {}
        return torch.cat([part.per_row(own.get(name)) for name, part in self.parts.items()])

    def figures(self, offsets: Any = None) -> dict[str, Any]:
        """Return the mean over the parts, and the metrics of each part under `parts`.

        Raises:
            ValueError: a part has no row with a label.
        """
        own = offsets or {}
        found = {name: part.figures(own.get(name)) for name, part in self.parts.items()}
        return {
            self.metric: _mean([of[self.metric] for of in found.values()]),
            "standard_error": _error_of_mean([of["standard_error"] for of in found.values()]),
            "n": sum(of["n"] for of in found.values()),
            "loss": math.fsum(self.weights[name] * of["loss"] for name, of in found.items()),
            "parts": found,
        }

    def predictions(self, offsets: Any = None) -> list[dict[str, Any]]:
        """Return what was predicted for each row, with the name of its part."""
        own = offsets or {}
        return [
            {"id": line["id"], "part": name, **line}
            for name, part in self.parts.items()
            for line in part.predictions(own.get(name))
        ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _error_of_mean(errors: Sequence[float]) -> float:
    """Return the standard error of a mean of independent means."""
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
