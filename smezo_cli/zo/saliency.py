"""Score every weight by gradients, once before the training, and name those of the highest score.

found = gradients(model, parameters, losses)          # of one sequence each
index = largest(found.squares, sparsity=0.999)        # for selections.named.Named
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smezo_cli.zo.selections.masks import CHUNK, kth_magnitude
from smezo_cli.zo.step import Closure, NonFiniteLoss
from smezo_cli.zo.targets import check, one_of


@dataclass(frozen=True)
class Gradients:
    """Sum up what gradients of several losses have in common, by parameter name (float32).

    Attributes:
        squares: mean of the squared gradients, entry by entry: the diagonal of the empirical
            Fisher information, where each loss is that of one sequence.
        means: mean of the gradients; empty where that was not asked for.
    """

    squares: dict[str, Tensor]
    means: dict[str, Tensor]


@torch.inference_mode(False)
@torch.enable_grad()
def gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    losses: Iterable[Closure],
    *,
    with_means: bool = False,
) -> Gradients:
    """Return the mean of squared gradients over some losses, by one backpropagation each.

    A gradient is dropped as soon as it is counted, so that one tensor's is held at a time beside
    the sums.

    Args:
        model: owns the parameters, which stay as they are.
        parameters: by name.
        losses: each computes the loss of one sequence at the present weights.
        with_means: keep the mean of the gradients, too.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite.
        ValueError: no loss is given, one has no gradient, or a gradient is not finite.
    """
    squares = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    means = {n: torch.zeros_like(s) for n, s in squares.items() if with_means}
    names = {id(p): name for name, p in parameters.items()}

    @torch.no_grad()
    def count(parameter: Tensor) -> None:
        assert parameter.grad is not None
        name, g, parameter.grad = names[id(parameter)], parameter.grad.float(), None
        squares[name].addcmul_(g, g)
        if with_means:
            means[name].add_(g)

    num = 0
    with _asking(model, parameters, count):
        for closure in losses:
            loss = closure()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteLoss(f"loss {value} in a backpropagation for the mask")
            check(loss.requires_grad, "the loss has no gradient, from which the mask is made")
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            num += 1
    check(num > 0, "there is no loss to make a mask from")
    for name, sums in squares.items():
        check(bool(sums.isfinite().all()), f"a gradient of {name} is NaN or infinite")
    for sums in (*squares.values(), *means.values()):
        sums.div_(num)
    return Gradients({n: s.detach() for n, s in squares.items()}, means)


@contextmanager
def _asking(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], count: Callable[[Tensor], None]
) -> Iterator[None]:
    """Inside, these parameters alone have gradients, each handed on as soon as it is known."""
    mine = {id(p) for p in parameters.values()}
    asked = [(p, p.requires_grad) for p in model.parameters()]
    hooks = []
    try:
        for p, _ in asked:
            p.requires_grad_(id(p) in mine)
        hooks = [
            p.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]  # untyped in torch
            for p in parameters.values()
        ]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, was in asked:
            p.requires_grad_(was)
            p.grad = None


def largest(
    scores: Mapping[str, Tensor], sparsity: float, scope: str = "global"
) -> dict[str, Tensor]:
    """Return the places of the highest scores, by name: int64, sorted; names without any are left.

    Of equal scores at the border, those of the first names and places are taken; an entry of score
    0 never is.

    Args:
        scores: float32, not negative.
        sparsity: fraction that is left out; at least one entry is taken.
        scope: "global": of all tensors together; "tensor": of each tensor.

    Raises:
        ValueError: another scope, a sparsity out of range, or every score is 0.
    """
    one_of("scope", scope, ("global", "tensor"))
    check(0 <= sparsity < 1, f"sparsity={sparsity}: the fraction NOT perturbed, in [0, 1)")
    names = sorted(scores)
    groups = [names] if scope == "global" else [[name] for name in names]
    found: dict[str, Tensor] = {}
    for group in groups:
        found |= _largest([(name, scores[name].reshape(-1)) for name in group], sparsity)
    check(bool(found), "no weight has a gradient, so there is none to choose a mask by")
    return {name: found[name] for name in names if name in found}


def _largest(flats: list[tuple[str, Tensor]], sparsity: float) -> dict[str, Tensor]:
    total = sum(len(flat) for _, flat in flats)
    kept = max(1, total - round(sparsity * total))
    border = kth_magnitude([flat for _, flat in flats], total - kept + 1)
    left = kept - sum(int((flat > border).count_nonzero()) for _, flat in flats)
    found = {}
    for name, flat in flats:
        chosen = flat > border
        if border > 0 and left:
            ties = (flat == border).nonzero().view(-1)[:left]
            left -= len(ties)
            chosen[ties] = True
        if len(places := chosen.nonzero().view(-1)):
            found[name] = places
    return found


def largest_of_rows(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return the places of the highest scores of each row, by name: int64, sorted.

    A row is what belongs to one number of the first dimension; a vector is one row. Of equal scores
    the first places are taken.

    Args:
        scores: float32, not negative.
        sparsity: fraction of a row that is left out; at least one entry of it is taken.

    Raises:
        ValueError: a sparsity out of range.
    """
    check(0 <= sparsity < 1, f"sparsity={sparsity}: the fraction NOT perturbed, in [0, 1)")
    return {name: _of_rows(rows_of(score), sparsity) for name, score in scores.items()}


def _of_rows(rows: Tensor, sparsity: float) -> Tensor:
    width = rows.shape[1]
    kept = max(1, width - round(sparsity * width))
    found = []
    for start, some in _some_rows(rows):
        order = some.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        first = torch.arange(start, start + len(some), device=rows.device) * width
        found.append((first[:, None] + order).view(-1).sort().values)
    return torch.cat(found)


def rows_of(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix of the rows that :func:`largest_of_rows` means."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)


def _some_rows(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield rows, some at a time: a sort takes twelve bytes an entry."""
    size = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]
