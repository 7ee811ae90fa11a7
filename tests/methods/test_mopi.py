"""MOPI: a reference written from what is known of the paper, its power iteration, its mean."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.mopi import MOPI, leading
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.methods.test_subzero import frame
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def mopi(model: nn.Module, **options: Any) -> MOPI:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "rank": 4, "refresh_every": 8, "seed": 7}
    defaults |= {"num_queries": 3, "beta": 0.8, "steps_rank": 2, "iterations": 2, "lr_1d": 1e-3}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return MOPI(model, **(defaults | options))


def orth(x: Tensor) -> Tensor:
    q, upper = torch.linalg.qr(x)
    return q * upper.diagonal().sign()


def reference(w: dict[str, Tensor], steps: int, k: int, every: int) -> dict[str, Tensor]:
    """The method in float64, by the keys that smezo draws by."""
    lr, eps, lr_1d, beta, queries = 1e-2, 1e-3, 1e-3, 0.8, 3
    shapes = {n: (min(4, len(x)), x.shape[1]) if x.ndim == 2 else x.shape for n, x in w.items()}
    p: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}
    for t in range(steps):
        here, g = loss_of(w), {n: torch.zeros(shape).double() for n, shape in shapes.items()}
        for n, x in w.items():
            if x.ndim == 2:
                new = frame(len(x), shapes[n][0], "left", t // every, 0, n)
                if t and t % every == 0:
                    mean[n] = new.T @ p[n] @ mean[n]
                p[n] = new
        for i in range(queries):
            u = {n: numbers(x.numel(), "z", t, i, n).view(x.shape) for n, x in g.items()}
            there = {n: x + eps * (p[n] @ u[n] if n in p else u[n]) for n, x in w.items()}
            g = {n: x + (loss_of(there) - here) / eps * u[n] / queries for n, x in g.items()}
        mean = {n: beta * mean.get(n, 0 * x) + (1 - beta) * x for n, x in g.items()}
        step = dict(mean)
        for n in p:
            r, q = shapes[n][0], min(k, *shapes[n])
            left = orth(numbers(q * r, "power", t, 0, n).view(q, r).T)
            for _ in range(2):
                right = orth(mean[n].T @ left)
                left = orth(mean[n] @ right)
            step[n] = p[n] @ left @ right.T
        w = {n: x - (lr if n in p else lr_1d) * step[n] for n, x in w.items()}
    return w


@pytest.mark.parametrize("k", [1, 2, 5])
def test_steps_are_those_of_the_reference(k: int) -> None:
    """30 steps with three new P. k = 5 is more than the rows of any core."""
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = mopi(model, steps_rank=k)
    for _ in range(30):
        opt.step(model)
    wanted = reference(before, 30, k, 8)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.003
        # Weights of size 1 are stored to 6e-8, so that a slope is known to some 1e-4 of its size;
        # a step is known as well, up to the spread of singular values; times lr, 30 times.
        assert (p.double() - wanted[name]).abs().max().item() < 5e-5


@pytest.mark.parametrize(("shape", "k"), [((6, 20), 3), ((20, 6), 3), ((5, 5), 5), ((1, 7), 1)])
def test_many_iterations_find_the_leading_singular_vectors(shape: Any, k: int) -> None:
    """Of values 2^-i the error falls by four an iteration; few leave singular values of 1, too."""
    u, _, vh = torch.linalg.svd(
        torch.randn(shape, generator=seeded(5)).double(), full_matrices=False
    )
    sizes = 0.5 ** torch.arange(min(shape), dtype=torch.float64)
    matrix = (1e5 * (u * sizes) @ vh).float()
    start = torch.randn(k, shape[0], generator=seeded(6))
    # Rows are rounded to 2^-17 beside entries of up to 4.
    found = leading(matrix, start, 40).double()
    assert (found - u[:, :k] @ vh[:k]).abs().max().item() < 1e-4
    few = leading(matrix, start, 1).double()
    ones = torch.linalg.svdvals(few)
    assert (ones[:k] - 1).abs().max().item() < 1e-5
    assert ones[k:].sum().item() < 1e-5
    assert (few * matrix).sum() > 0


def test_nothing_measured_is_no_step() -> None:
    assert torch.equal(leading(torch.zeros(2, 3), torch.ones(1, 2), 2), torch.zeros(2, 3))
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mopi(model).step(lambda: torch.tensor(0.5))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_frame_and_mean_are_what_is_kept() -> None:
    model = nn.Linear(300, 200)
    opt = mopi(model, rank=8)
    # P (200, 8), M (8, 300) of the matrix, and the mean of the bias.
    assert opt.state_bytes == 4 * (8 * 200 + 8 * 300 + 200)


def test_a_mean_of_one_step_has_no_past() -> None:
    """The scale of a mean does not matter, so with beta 0 and 0.9 first steps of matrices agree."""
    models = Net(), Net()
    for model, beta in zip(models, (0.0, 0.9), strict=True):
        mopi(model, beta=beta).step(model)
    for name in ("a", "c"):
        a, b = (model.get_parameter(name).detach() for model in models)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
