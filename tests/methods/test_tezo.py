"""TeZO: a reference written from the paper, the length of its directions, the span of its steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.tezo import TeZO
from smezo_cli.zo.directions.factored import Factored
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

#: Takes the estimate in the coordinates of the factors, and returns what is added.
Rule = Callable[[str, Tensor, int], Tensor]


def tezo(model: nn.Module, **options: Any) -> TeZO:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 3, "seed": 7}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return TeZO(model, **(defaults | options))


def factors(name: str, shape: torch.Size, r: int) -> tuple[Tensor, Tensor]:
    """U (m, r) over sqrt(r), and V^T (r, n), as they are drawn once."""
    left, right = (numbers(r * n, side, 0, 0, name).view(r, n)
                   for side, n in zip(("left", "right"), shape, strict=True))  # fmt: skip
    return left.T / r**0.5, right


def reference(
    w: dict[str, Tensor],
    steps: int,
    r: int,
    queries: int = 1,
    change: Callable[..., Tensor] = lambda name, g, u, v, t: -1e-2 * (u * g) @ v,
    eps: float = 1e-2,
) -> dict[str, Tensor]:
    """The method as the paper has it, in float64; ``change`` is its update of a matrix.

    A vector is the matrix (n, 1) whose factors have rank n and are the identity and ones.
    """
    for t in range(steps):
        frames, g = {}, {}
        for k, x in w.items():
            ones = torch.eye(x.numel()).double(), torch.ones(x.numel(), 1).double()
            frames[k] = factors(k, x.shape, r) if x.ndim == 2 else ones
            g[k] = torch.zeros(r if x.ndim == 2 else x.numel()).double()
        for q in range(queries):
            tau = {k: numbers(len(x), "z", t, q, k) for k, x in g.items()}
            z = {k: ((u * tau[k]) @ v).view(w[k].shape) for k, (u, v) in frames.items()}
            plus = loss_of({k: x + eps * z[k] for k, x in w.items()})
            minus = loss_of({k: x - eps * z[k] for k, x in w.items()})
            g = {k: x + (plus - minus) / (2 * eps) * tau[k] / queries for k, x in g.items()}
        w = {k: x + change(k, g[k], *frames[k], t).view(x.shape) for k, x in w.items()}
    return w


def difference(opt: Any, model: nn.Module, steps: int, **given: Any) -> float:
    """The largest difference of the weights after some steps; all tensors have moved."""
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for _ in range(steps):
        opt.step(model)
    wanted = reference(before, steps, **given)
    moved = [(wanted[k] - before[k]).abs().max().item() for k in before]
    assert min(moved) > 0.01
    found = {name: p.detach().double() for name, p in model.named_parameters()}
    return max((found[k] - wanted[k]).abs().max().item() for k in before)


@pytest.mark.parametrize(("rank", "queries"), [(1, 1), (3, 2), (12, 1)])
def test_steps_are_those_of_the_paper(rank: int, queries: int) -> None:
    """30 steps. Rank 12 is above all sides of the matrices."""
    model = Net()
    opt = tezo(model, rank=rank, num_queries=queries)
    # Weights of size 1 are stored to 6e-8; a projected gradient is known to 6e-8 / eps of the
    # gradient's length (some 10), and is multiplied by lr and numbers of some 3, 30 times.
    assert difference(opt, model, 30, r=rank, queries=queries) < 2e-5


@pytest.mark.parametrize("rank", [1, 4])
def test_the_estimate_is_the_gradient_on_average(rank: int) -> None:
    """Over 20,000 draws of U, V and tau: E <D, Z> Z = D, whatever the rank.

    Rows of a matrix (80, 3) by twos have U of their own; V and tau are new in 500 seeds. With
    |D| = 1, entries of the mean differ from D by some 0.05 at rank 1, measured.
    """
    d = torch.randn(6, generator=seeded(1))
    d /= d.norm()
    total, lengths = torch.zeros(6), []
    for seed in range(500):
        opt = tezo(nn.Linear(3, 80, bias=False), rank=rank, seed=seed)
        (target,) = opt.targets
        z = opt.mover([0], [1.0]).dense(target)[0].view(40, 6)
        total += ((z @ d)[:, None] * z).sum(0) / 20_000
        lengths.append(z.square().mean())
    assert (total - d).abs().max().item() < 0.3
    # As long as dense noise: 240 numbers of mean square 1, some 3% in 500 seeds.
    assert abs(torch.stack(lengths).mean().item() - 1) < 0.15


def test_what_a_run_adds_lies_in_the_span_of_r_fixed_matrices() -> None:
    """The pitfall of factors that are never renewed; 50 steps of two models have one span."""
    added = []
    for scale in (1.0, 3.0):
        model = Net()
        before = model.a.detach().double().clone()
        opt = tezo(model, rank=3, lr=3e-2)
        for _ in range(50):
            opt.step(lambda model=model, scale=scale: model() * scale)
            added.append((model.a.detach().double() - before).flatten())
    singular = torch.linalg.svdvals(torch.stack(added))
    assert singular[2] > 0.05
    # Float32 weights of size 1 are rounded 50 times.
    assert singular[3] < 1e-4
    u, v = factors("a", torch.Size((11, 6)), 3)
    basis = torch.linalg.qr(torch.einsum("is,sj->ijs", u, v).flatten(0, 1)).Q
    out = torch.stack(added) - torch.stack(added) @ basis @ basis.T
    assert out.abs().max().item() < 2e-5


def test_two_factors_are_all_that_is_kept() -> None:
    opt = tezo(nn.Linear(300, 200), rank=5)
    assert not opt.keeps_state
    assert opt.state_bytes == 4 * 5 * (300 + 200)
    assert not any(opt.direction.refreshes_at(step) for step in range(5000))


@pytest.mark.parametrize(("kind", "every"), [("cp", 3), ("uv", None)])
def test_factors_that_stay_are_not_renewed_and_others_are(kind: str, every: Any) -> None:
    with pytest.raises(ValueError, match=f"^refresh_every={every}: "):
        Factored(kind, 2, every)
