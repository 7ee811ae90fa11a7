"""Compute accuracy, AUC and their standard errors, and fit offsets on a labelled dev set.

A row's metric is 0 or 1 (right or not) or anything between (F1); a split's is their mean.
"""

import math

import torch
from torch import Tensor


def correct(scores: Tensor, right: Tensor) -> Tensor:
    """Say whether the candidate with the highest score (the first of equals) is right: bool (n,).

    Args:
        scores: (n, candidates), -inf where a row has fewer.
        right: labels, int64 (n,); or bool (n, candidates) where several may count as right.
    """
    best = scores.argmax(1)
    return best == right if right.ndim == 1 else right.gather(1, best[:, None])[:, 0]


def accuracy(scores: Tensor, right: Tensor) -> float:
    """Return the fraction of the rows that are :func:`correct`."""
    return float(correct(scores, right).double().mean())


def standard_error(per_row: Tensor) -> float:
    """Return the standard error of the mean of rows' metrics (n,): spread / sqrt(n)."""
    per_row = per_row.double()
    return math.sqrt(float(((per_row - per_row.mean()) ** 2).mean()) / len(per_row))


def paired_gain(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the difference of two means over the same rows, and its paired standard error.

    Args:
        ours: the rows' metrics, (n,).
        theirs: those of the other model on the same rows, (n,).

    Returns:
        ``(gain, standard_error)``: rows on which both do alike cancel.
    """
    difference = ours.double() - theirs.double()
    return float(difference.mean()), standard_error(difference)


def cross_entropy(scores: Tensor, labels: Tensor) -> float:
    """Return the mean of -log softmax(scores)[label], in float64."""
    return float(torch.nn.functional.cross_entropy(scores.double(), labels))


def auc(scores: Tensor, labels: Tensor) -> float | None:
    """Return the area under the ROC curve of two classes (ties count half), else None.

    A moved threshold leaves it as it is: what raises it is a better ranking.
    """
    if scores.shape[1] != 2 or labels.min() == labels.max():
        return None
    margin = (scores[:, 1] - scores[:, 0]).double()
    positive, negative = margin[labels == 1], margin[labels == 0].sort().values
    below = torch.searchsorted(negative, positive, side="left")
    up_to = torch.searchsorted(negative, positive, side="right")
    return float((below + up_to).double().sum() / 2 / (len(positive) * len(negative)))


def fit_offsets(scores: Tensor, labels: Tensor, sweeps: int = 3) -> Tensor:
    """Return the offsets (classes,) that maximise the accuracy of ``scores + offsets``.

    With two classes this is the best threshold, exactly; with more, one class after the other is
    given its best offset while the rest stay. All offsets between two neighbouring rows decide
    alike: their middle stands for them, and beyond the outermost rows the offset at distance 1. Of
    equally good ones the nearest to the present offset is taken.

    Args:
        scores: (n, classes), some of a row -inf where the model rules a class out.
        labels: int64 (n,).
        sweeps: rounds over the classes (two classes need one).
    """
    scores = scores.double()
    classes = scores.shape[1]
    if classes == 2:
        return _climb(scores, labels, torch.zeros(2, dtype=torch.float64), 1)
    # Class after class may get stuck: start from no offsets and from equal class means, too.
    starts = [torch.zeros(classes, dtype=torch.float64)]
    if scores.isfinite().all():  # else there are no such means
        starts.append(scores.mean() - scores.mean(0))
    tried = [_climb(scores, labels, start - start[0], sweeps) for start in starts]
    return max(tried, key=lambda offsets: accuracy(scores + offsets, labels))


def _climb(scores: Tensor, labels: Tensor, offsets: Tensor, sweeps: int) -> Tensor:
    """Give each class in turn its best offset, from a start on; class 0 keeps 0."""
    classes = scores.shape[1]
    offsets = offsets.clone()
    for _ in range(sweeps):
        for k in range(1, classes):
            moved = scores + offsets
            others = moved.clone()
            others[:, k] = -math.inf
            rival, rival_class = others.max(1)
            gap = rival - scores[:, k]  # class k wins where its offset is above
            order = gap.argsort(stable=True)
            order = order[gap[order].isfinite()]  # of others no offset changes anything
            if not len(order):
                continue
            steps = (labels[order] == k).long() - (rival_class[order] == labels[order]).long()
            right = torch.cat([torch.zeros(1, dtype=torch.long), steps.cumsum(0)])
            edges = gap[order]
            pad = torch.tensor([1.0], dtype=torch.float64)
            cuts = torch.cat([edges[:1] - pad, (edges[1:] + edges[:-1]) / 2, edges[-1:] + pad])
            distinct = torch.ones(len(cuts), dtype=torch.bool)
            distinct[1:-1] = edges[1:] > edges[:-1]  # no offset lies between equal gaps
            best = right[distinct].max()
            good = cuts[distinct & (right == best)]
            offsets[k] = good[(good - offsets[k]).abs().argmin()]
    return offsets
