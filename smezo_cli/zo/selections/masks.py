"""Select which weights of a tensor are perturbed and updated (True), from one threshold h.

``sparsity`` is always the fraction NOT perturbed. A mask is taken at the unperturbed weights:

* ``small``  |w| <= h, h the (1 - sparsity) quantile: Sparse-MeZO (arXiv 2402.15751, GetMask);
* ``large``  |w| >= h, h the sparsity quantile: the paper's motivation study;
* ``random`` u < h with u a keyed uniform and h = 1 - sparsity: R-MeZO.

Sparsity 0 is ``small`` with h = infinity: MeZO, by the same code.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _small(magnitude: Tensor, h: Tensor) -> Tensor:
    return magnitude <= h


def _large(magnitude: Tensor, h: Tensor) -> Tensor:
    return magnitude >= h


def _random(uniform: Tensor, h: Tensor) -> Tensor:
    return uniform < h


# Functions, not lambdas: Triton reads their source.
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "small": _small,
    "large": _large,
    "random": _random,
}
_EVERYTHING = {"small": math.inf, "large": 0.0, "random": 2.0}
_NOTHING = {"small": -1.0, "large": math.inf, "random": -1.0}
CHUNK = 1 << 20  # entries looked at together, so that no full-size copy is made


def threshold(weight: Tensor, rule: str, sparsity: float, constant_tensors: str = "dense") -> float:
    """Return h of a tensor, exact: the k-th smallest (largest) magnitude, never an interpolation.

    Args:
        weight: any floating dtype and shape.
        rule: a key of :data:`RULES`.
        sparsity: fraction NOT perturbed, in [0, 1); 0 perturbs everything, also what grows later.
        constant_tensors: "dense" or "frozen". All magnitudes of such a tensor are ties (a norm's
            gains, the zero-initialised B of LoRA): a quantile would perturb them all at the first
            step and almost none after one update. So it is where h would be 0 for zeros alone.

    Returns:
        h, to be compared with magnitudes (``random``: with uniforms) in float32. Of a tensor
        without entries it is that of sparsity 0.

    Raises:
        ValueError: a weight is not finite.
    """
    if sparsity == 0.0 or not weight.numel():
        return _EVERYTHING[rule]
    low, high = extremes(weight)
    if not math.isfinite(high):
        raise ValueError("a weight is NaN or infinite, so that its tensor has no mask")
    if low == high:
        return (_EVERYTHING if constant_tensors == "dense" else _NOTHING)[rule]
    if rule == "random":
        return 1.0 - sparsity
    numel = weight.numel()
    kept = max(1, numel - round(sparsity * numel))  # entries perturbed
    h = kth_magnitude(weight, kept if rule == "small" else numel - kept + 1)
    if rule == "small" and h == low == 0.0:  # zeros alone are small: after one update none would be
        return (_EVERYTHING if constant_tensors == "dense" else _NOTHING)[rule]
    return h


def takes_all(rule: str, h: float) -> bool:
    """Return whether the mask of a threshold takes every weight, whatever it becomes."""
    return h == _EVERYTHING[rule]


def extremes(weight: Tensor) -> tuple[float, float]:
    """Return the smallest and largest magnitude; NaN where a weight is NaN."""
    parts = [chunk.abs().aminmax() for chunk in _chunks(weight)]
    low = torch.stack([p.min for p in parts]).min()
    high = torch.stack([p.max for p in parts]).max()
    return float(low), float(high)


def kth_magnitude(weight: Tensor | Sequence[Tensor], k: int) -> float:
    """Return the k-th smallest |w| (k from 1) of tensors of one dtype; exact, in chunks.

    Magnitudes order like their bit patterns, so two histograms (upper 16 bits, then the lower ones
    within the bucket that holds the k-th) find the value without a sort or a full-size copy.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    dtype, device = weights[0].dtype, weights[0].device
    assert 1 <= k <= sum(w.numel() for w in weights)
    if dtype == torch.float32:
        view, lower_bits = torch.int32, 15
    elif dtype in (torch.bfloat16, torch.float16):
        view, lower_bits = torch.int16, 0
    else:
        raise ValueError(f"dtype {dtype} has no mask: float32, bfloat16, float16")
    upper = torch.zeros(1 << 16, dtype=torch.int64, device=device)
    for chunk in itertools.chain.from_iterable(map(_chunks, weights)):
        bits = chunk.abs().view(view).to(torch.int64) >> lower_bits
        upper += torch.bincount(bits, minlength=1 << 16).to(device)
    bucket, below = _bucket_of(upper, k)
    pattern = bucket
    if lower_bits:
        lower = torch.zeros(1 << lower_bits, dtype=torch.int64, device=device)
        for chunk in itertools.chain.from_iterable(map(_chunks, weights)):
            bits = chunk.abs().view(view)
            inside = bits[bits >> lower_bits == bucket] & ((1 << lower_bits) - 1)
            lower += torch.bincount(inside.to(torch.int64), minlength=1 << lower_bits).to(device)
        pattern = (bucket << lower_bits) | _bucket_of(lower, k - below)[0]
    return float(torch.tensor(pattern, dtype=view).view(dtype))


def _bucket_of(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bucket that holds the k-th entry, and how many entries lie in those before it."""
    total = counts.cumsum(0)
    bucket = int(torch.searchsorted(total, k))
    return bucket, int(total[bucket] - counts[bucket])


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split(weight.detach().reshape(-1), CHUNK)
    return parts
