"""Compute metrics and predictions from the scores of the rows of a split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smezo_cli.kinds import METRICS
from smezo_cli.scoring import metrics, squad
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.objectives import check_scores, of_answers, outcomes


@dataclass
class Evaluation:
    """Hold a model's scores and answers on the rows of a split; all metrics follow from them.

    Attributes:
        rows: the split.
        scores: float32 (n, most candidates of a row), -inf where a row has fewer; in generation
            the mean log-probability of the first answer's tokens.
        texts: in generation the model's answers, row by row.
        bases: in a calibrated choice task, float32 (n,), what the score of each row's gold
            candidate lacks of the log-probability that is trained on.

    Raises:
        NonFiniteScore: a score is not finite, or there is no answer for that reason.
    """

    rows: Sequence[Candidates]
    scores: Tensor
    texts: Sequence[str] = ()
    bases: Tensor | None = None

    def __post_init__(self) -> None:
        check_scores(self.rows, self.scores, self.texts)

    @classmethod
    def joined(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Return the evaluation of rows that were evaluated in several lots, in their order."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.scores.shape[1] for part in parts)
        scores = [
            F.pad(part.scores, (0, width - part.scores.shape[1]), value=-math.inf) for part in parts
        ]
        bases = [part.bases for part in parts if part.bases is not None]
        return cls(
            [row for part in parts for row in part.rows],
            torch.cat(scores),
            [text for part in parts for text in part.texts],
            torch.cat(bases) if bases else None,
        )

    @property
    def kind(self) -> str:
        """Return the kind of the task."""
        return self.rows[0].kind

    @property
    def metric(self) -> str:
        """Return the name of the metric that counts: accuracy, or for generation f1."""
        return METRICS[self.kind]

    @property
    def labels(self) -> Tensor:
        """Return the labels, int64 (n,); -1 where one is not known."""
        return torch.tensor([row.label for row in self.rows])

    def with_scores(self, rows: Sequence[Candidates], scores: Tensor) -> "Evaluation":
        """Return the evaluation of other rows of the task by their scores."""
        return Evaluation(rows, scores)

    def fit_offsets(self) -> Any:
        """Return the label offsets that suit these rows best; None where they can tell nothing.

        They are for classification alone, and for rows of more than one class: of one class alone
        any offset that favours it is right in all rows.
        """
        if self.kind != "classification" or len(set(self.labels.tolist())) == 1:
            return None
        return metrics.fit_offsets(self.scores, self.labels)

    def gain(self, theirs: Tensor) -> tuple[float, float]:
        """Return how much better these rows did than in another evaluation, and the paired error.

        Args:
            theirs: what :meth:`per_row` gave there, (n,).
        """
        return metrics.paired_gain(self.per_row(), theirs)

    def per_row(self, offsets: Any = None) -> Tensor:
        """Return the metric of each row, float64 (n,); nan where nothing is known to compare with.

        Args:
            offsets: (classes,), added to the scores.
        """
        scores = self.scores if offsets is None else self.scores + offsets
        return outcomes(self.rows, scores, self.texts)

    def figures(self, offsets: Any = None) -> dict[str, Any]:
        """Return the metric, its standard error, n and the loss over the labelled rows.

        The loss is the training objective on the split. Classification adds the AUC (None unless
        there are two classes), generation the exact match.

        Args:
            offsets: (classes,), added to the scores of a classification task.

        Raises:
            ValueError: no row has a label.
        """
        labelled = self._labelled
        if not labelled.any():
            raise ValueError("no row has a label to compare with")
        per_row = self.per_row(offsets)[labelled]
        figures: dict[str, Any] = {
            self.metric: float(per_row.mean()),
            "standard_error": metrics.standard_error(per_row),
            "n": len(per_row),
        }
        if self.kind == "classification":
            scores = self.scores if offsets is None else self.scores + offsets
            scores, labels = scores[labelled], self.labels[labelled]
            figures["loss"] = metrics.cross_entropy(scores, labels)
            return figures | {"auc": metrics.auc(scores, labels)}
        gold = [(i, row.gold, row) for i, row in enumerate(self.rows) if row.gold >= 0]
        counts = torch.tensor([row.num_option[k] for _, k, row in gold])
        means = torch.stack([self.scores[i, k] for i, k, _ in gold]).double()
        sums = means * counts
        if self.bases is not None:
            sums = means + torch.stack([self.bases[i] for i, _, _ in gold])
        figures["loss"] = -float(sums.sum() / counts.sum())
        if self.kind == "generation":
            exact = of_answers(self.rows, self.texts, squad.exact_match)[labelled]
            figures["exact_match"] = float(exact.mean())
        return figures

    def predictions(self, offsets: Any = None) -> list[dict[str, Any]]:
        """Return what was predicted for each row, in plain values for a line of JSON.

        The scores of classification are log-probabilities among the labels, those of choice mean
        log-probabilities of a token (of a calibrated prompt sums over the tokens, less the base's).
        """
        lines = []
        scores = self.scores if offsets is None else self.scores + offsets
        texts = self.texts
        exact = of_answers(self.rows, texts, squad.exact_match) if texts else None
        for i, (row, value) in enumerate(zip(self.rows, self.per_row(offsets), strict=True)):
            line: dict[str, Any] = {"id": row.id}
            if exact is not None:
                line |= {"prediction": self.texts[i], "answers": list(row.answers)}
                if row.is_labelled:
                    line |= {"f1": float(value), "exact_match": float(exact[i])}
            else:
                of_row = scores[i, : len(row.full)].double()
                if self.kind == "classification":
                    of_row = of_row.log_softmax(0)
                best = int(of_row.argmax())
                line |= {"prediction": best, "word": row.words[best], "label": None}
                if row.is_labelled:
                    line |= {"label": sorted(row.correct), "correct": bool(value)}
                    if self.kind == "classification":
                        line["label"] = row.label
                line["scores"] = of_row.tolist()
            lines.append(line)
        return lines

    @property
    def _labelled(self) -> Tensor:
        return torch.tensor([row.is_labelled for row in self.rows])
