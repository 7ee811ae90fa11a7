"""AGZO: a reference written from the paper, the directions that it finds, and their estimate."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.agzo import AGZO
from smezo_cli.zo.move import Key
from tests.methods.reference import loss64, weights64, z_of
from tests.methods.test_aim_zo import frame, gaussian, inputs
from tests.zo.test_optimizer import X, Y, closure_of, mlp, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def agzo(model: nn.Module, **options: Any) -> AGZO:
    defaults: dict[str, Any] = {"lr": 1e-3, "eps": 1e-2, "seed": 7, "executor": "sequential"}
    return AGZO(model, **(defaults | {"backend": "eager", "check": False} | options))


def reference(
    w: dict[str, Tensor], steps: int, lr: float, eps: float, r: int, num: int, times: int
) -> dict[str, Tensor]:
    """The method as the paper has it, in float64, by smezo's keys."""
    for t in range(steps):
        a, here = {}, loss64(w)
        for name, x in inputs(w).items():
            a[name] = frame(gaussian(r * x.shape[1], "basis", 0, 0, name).view(r, -1).T)
            for _ in range(times):
                a[name] = frame(x.T @ x @ a[name])
        g = {name: torch.zeros_like(x) for name, x in w.items()}
        for q in range(num):
            z = z_of(w, t, q, seed=7)
            for name in a:
                m = len(w[name])
                z[name] = gaussian(m * r, "z", t, q, name).view(m, r) @ a[name].T
            slope = (loss64({name: x + eps * z[name] for name, x in w.items()}) - here) / eps
            g = {name: x + slope * z[name] / num for name, x in g.items()}
        w = {name: x - lr * g[name] for name, x in w.items()}
    return w


@pytest.mark.parametrize(("rank", "queries", "times"), [(1, 1, 3), (2, 3, 1)])
def test_steps_are_those_of_the_paper(rank: int, queries: int, times: int) -> None:
    """30 steps. Losses in float32 are known to 3e-7, so slopes at eps = 0.01 to 3e-5.

    Then a step of lr = 1e-3 along entries of up to 4 moves a weight by 1e-7 too far at most.
    """
    model = mlp()
    before = weights64(model)
    opt = agzo(model, rank=rank, num_queries=queries, iterations=times)
    for _ in range(30):
        record = opt.step(closure_of(model))
    assert record.num_forwards == queries + 1
    wanted = reference(before, 30, 1e-3, 1e-2, rank, queries, times)
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, wanted[name], atol=2e-5, rtol=0)
        assert (x - before[name]).abs().mean() > 1e-3


def test_power_iterations_find_the_top_direction_of_the_inputs() -> None:
    """One of eight inputs varies four times as much: an error falls by 16 an iteration."""
    model = nn.Linear(8, 3)
    x = torch.randn(500, 8, generator=seeded(5)) * torch.tensor([1, 4, 1, 1, 1, 1, 1, 1])
    _, vectors = torch.linalg.eigh(x.T.double() @ x.double())
    found = []
    for times in (1, 3):
        opt: Any = agzo(model, iterations=times)
        with torch.no_grad(), opt.direction.watching():
            model(x)
        basis = opt.direction.basis_of(opt.targets[0]).double()
        assert float(basis.norm()) == pytest.approx(1, abs=1e-6)
        found.append(1 - float((basis @ vectors[:, -1:]).abs()))
    assert found[1] < 1e-4
    assert found[1] < found[0] / 100


def test_the_estimate_is_on_average_the_gradient_along_the_inputs() -> None:
    """G A A^T of a layer's weight; one-sided differences of a quadratic have no bias.

    600 queries of one step; five standard errors are allowed.
    """
    model = nn.Linear(6, 3)
    opt: Any = agzo(model, num_queries=600, eps=1e-3)
    with torch.no_grad(), opt.direction.watching():
        model(X)
    (model.double()(X.double()) - Y).square().mean().backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.float()
    a = opt.direction.basis_of(opt.targets[0]).double()
    each = [opt.direction.product_at(opt.targets[0], Key(0, q)).left[:, 0] for q in range(600)]
    with torch.no_grad():
        opt._begin()
        scalars = opt.estimator.measure(opt.meter(closure_of(model)))
    slopes = torch.tensor(scalars[:-1], dtype=torch.float64)
    estimates = slopes[:, None] * torch.stack(each)  # of G A, as A is the same for all
    wanted = (gradient[0] @ a.T)[:, 0]
    error = estimates.std(0) / 600**0.5
    assert ((estimates.mean(0) - wanted).abs() <= 5 * error).all()
    assert error.norm() < 0.2 * wanted.norm()


def test_a_layer_of_fewer_inputs_than_the_rank_has_as_many_directions() -> None:
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3))
    opt: Any = agzo(model, rank=4)
    opt.step(closure_of(model))
    assert [opt.direction.thin_rank(t) for t in opt.targets] == [4, None, 2, None]


@pytest.mark.parametrize("executor", ["side_path", "batched"])
def test_executors_without_copies_take_the_same_steps(executor: str) -> None:
    """To rounding of losses in float32, which is 1e-4 of a slope at eps = 0.01."""
    found = []
    for name in ("sequential", executor):
        model = mlp()
        opt = agzo(model, executor=name, rank=2, num_queries=2)
        found.append([opt.step(closure_of(model)).projected_grad for _ in range(3)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=5e-4)
