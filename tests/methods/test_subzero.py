"""SubZero: a reference written from the paper, and what the released code gets wrong or leaves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.subzero import SubZero
from smezo_cli.zo.directions.factored import Factored
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def subzero(model: nn.Module, **options: Any) -> SubZero:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "refresh_every": 4, "seed": 7}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return SubZero(model, **(defaults | options))


def frame(size: int, r: int, *stream: Any) -> Tensor:
    """Q of G = Q R with a positive diagonal of R, by LAPACK; the columns are a uniform frame."""
    q, upper = torch.linalg.qr(numbers(size * r, *stream).view(r, size).T)
    return q * upper.diagonal().sign()


def reference(
    w: dict[str, Tensor], steps: int, lr: float, eps: float, rank: int, every: int, is_square: bool
) -> dict[str, Tensor]:
    """The method as the paper and the scale of the code have it, in float64, by smezo's keys."""
    for t in range(steps):
        p = {}
        for name, x in w.items():
            if x.ndim == 2:
                m, n = x.shape
                if is_square:
                    m = max(k for k in range(1, m * n + 1) if m * n % k == 0 and k * k <= m * n)
                    n = x.numel() // m
                r = min(rank, m, n)
                u = frame(m, r, "left", t // every, 0, name)
                v = frame(n, r, "right", t // every, 0, name)
                z = numbers(r * r, "z", t, 0, name).view(r, r)
                p[name] = (math.sqrt(m * n / r**2) * u @ z @ v.T).view(x.shape)
            else:
                p[name] = numbers(x.numel(), "z", t, 0, name)
        plus = loss_of({k: x + eps * p[k] for k, x in w.items()})
        minus = loss_of({k: x - eps * p[k] for k, x in w.items()})
        rho = (plus - minus) / (2 * eps)
        w = {k: x - lr * rho * p[k] for k, x in w.items()}
    return w


@pytest.mark.parametrize(("rank", "square"), [(1, False), (2, True), (4, False)])
def test_steps_are_those_of_the_paper(rank: int, square: bool) -> None:
    """30 steps with seven refreshes. Rank 4 is above a side of one matrix, which has three rows."""
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = subzero(model, rank=rank, square=square)
    for _ in range(30):
        opt.step(model)
    wanted = reference(before, 30, 1e-2, 1e-2, rank, 4, square)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.01
        # Weights of size 1 are stored to 6e-8; a projected gradient is known to 6e-8 / eps of the
        # gradient's length (some 10), and is multiplied by lr and numbers of some 3, 30 times.
        # Frames are those of Gaussian numbers rounded to 2^-16, which turns them by some 1e-5.
        assert (p.double() - wanted[name]).abs().max().item() < 2e-4


def test_the_estimate_is_the_gradient_on_average() -> None:
    """Over 20,000 draws, 20 of Z in each of 1,000 frames: E <G, P> P = G, whatever the rank.

    With |G| = 1, entries of the mean differ from G by some 0.03, measured.
    """
    for rank in (1, 2):
        opt = subzero(nn.Linear(3, 4, bias=False), rank=rank, refresh_every=1)
        (target,), direction = opt.targets, opt.direction
        assert isinstance(direction, Factored)
        gradient = torch.randn(12, generator=seeded(1))
        gradient /= gradient.norm()
        found = torch.zeros(12)
        for t in range(1000):
            direction.begin(t)
            left, right = direction.factors_of(target)
            z = torch.randn(20, rank, rank, generator=seeded(t))
            p = (left @ z @ right).view(20, 12)
            found += ((p @ gradient)[:, None] * p).sum(0) / 20_000
        assert (found - gradient).abs().max().item() < 0.15


def test_a_run_resumed_between_refreshes_has_its_frames() -> None:
    """The released code makes them at each T0-th step alone."""
    model = Net()
    opt = subzero(model, refresh_every=10)
    for _ in range(4):
        opt.step(model)
    there = {name: p.detach().clone() for name, p in model.named_parameters()}
    numbers_kept, tensors = opt.snapshot()
    assert not tensors
    wanted = [opt.step(model).projected_grad for _ in range(3)]
    again = Net()
    again.load_state_dict(there)
    resumed = subzero(again, refresh_every=10)
    resumed.restore(numbers_kept, tensors)
    assert [resumed.step(again).projected_grad for _ in range(3)] == wanted


def test_several_queries_share_frames_and_make_one_step() -> None:
    """The released code refuses more than one."""
    model = Net()
    opt = subzero(model, num_queries=3)
    before = model.a.detach().clone()
    record = opt.step(model)
    assert len(record.projected_grad) == 3
    assert record.num_forwards == 6
    # Each query moves within the frames, so the sum of three does, too.
    assert torch.linalg.matrix_rank((model.a.detach() - before).double(), tol=1e-5) == 2
