"""SubZero+: a reference written from its rule, and what happens to the moments in new frames."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.subzero_plus import SubZeroPlus
from smezo_cli.zo.directions.factored import Factored
from tests.methods.test_every_method import node_of
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.methods.test_subzero import frame
from tests.zo.test_optimizer import same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def subzero_plus(model: nn.Module, **more: Any) -> SubZeroPlus:
    given: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "refresh_every": 4, "seed": 7}
    given |= {"num_queries": 5, "lr_1d": 4e-3, "backend": "eager", "check": False}
    given |= {"executor": "sequential"}
    return SubZeroPlus(model, **given | more)


def reference(w: dict[str, Tensor], rank: int, every: int, is_square: bool) -> dict[str, Tensor]:
    """Thirty steps in float64, by smezo's keys; eps 1e-2, K 5, a decay of 0.1.

    lr is 1e-2 for matrices, 4e-3 for vectors.
    """
    eps, num, (b1, b2) = 1e-2, 5, (0.9, 0.95)
    m, s = {}, {}
    for t in range(30):
        lift: dict[str, Any] = {}
        size: dict[str, int] = {}
        for name, x in w.items():
            size[name] = x.numel()
            lift[name] = lambda z: z
            if x.ndim == 2:
                rows, n = x.shape
                if is_square:
                    rows = max(k for k in range(1, 30) if x.numel() % k == 0 and k * k <= x.numel())
                    n = x.numel() // rows
                r = min(rank, rows, n)
                u = frame(rows, r, "left", t // every, 0, name)
                v = frame(n, r, "right", t // every, 0, name)
                size[name] = r * r
                lift[name] = lambda z, u=u, v=v, r=r, x=x: (u @ z.view(r, r) @ v.T).view(x.shape)
            if t == 0 or (x.ndim == 2 and t % every == 0):
                m[name], s[name] = (torch.zeros(size[name], dtype=torch.float64) for _ in "ms")
        scale = {n: math.sqrt(x.numel() / size[n]) for n, x in w.items()}  # sqrt(m n) / r, or 1
        g = {n: torch.zeros_like(x) for n, x in m.items()}
        for k in range(num):
            z = {n: numbers(size[n], "z", t, k, n) for n in w}
            there = {n: x + eps * scale[n] * lift[n](z[n]) for n, x in w.items()}
            p = (loss_of(there) - loss_of(w)) / eps
            g = {n: x + p * z[n] / num for n, x in g.items()}
        for n, x in w.items():
            count = (t % every if x.ndim == 2 else t) + 1
            m[n] = b1 * m[n] + (1 - b1) * g[n]
            s[n] = b2 * s[n] + (1 - b2) * g[n] ** 2
            a = m[n] / (1 - b1**count) / ((s[n] / (1 - b2**count)).sqrt() + 1e-8)
            w[n] = x - (1e-2 if x.ndim == 2 else 4e-3) * (lift[n](a) + 0.1 * x)
    return w


@pytest.mark.parametrize(("rank", "square"), [(1, False), (2, True), (4, False)])
def test_thirty_steps_are_those_of_the_rule(rank: int, square: bool) -> None:
    """With seven refreshes; rank 4 is above a side of one matrix.

    Within 1e-3, a tenth of lr: slopes are known to some 1e-5, and the first step in new frames is
    the sign of g, whatever its size.
    """
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = subzero_plus(model, rank=rank, square=square, weight_decay=0.1)
    for _ in range(30):
        assert opt.step(model).num_forwards == 6
    wanted = reference(dict(before), rank, 4, square)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.01
        assert (p.double() - wanted[name]).abs().max().item() < 1e-3


def test_moments_begin_anew_with_the_frames_and_no_square_is_below_0() -> None:
    """Carried as a gradient is, the squares would be below 0 in some entries."""
    model = Net()
    opt: Any = subzero_plus(model)
    for _ in range(4):
        opt.step(model)
    before = {name: x.clone() for name, x in opt.snapshot()[1].items()}
    target = opt.targets[0]
    carried = Factored.carry(opt.direction, target, before["a/exp_avg_sq"], 4)
    assert carried.min() < 0 < before["a/exp_avg_sq"].min()
    record = opt.step(model)
    after = opt.snapshot()[1]
    z = torch.stack([numbers(4, "z", 4, k, "a") for k in range(5)])
    g = torch.tensor(record.projected_grad, dtype=torch.float64) @ z / 5
    torch.testing.assert_close(after["a/exp_avg"].double(), 0.1 * g, atol=0, rtol=1e-4)
    torch.testing.assert_close(after["a/exp_avg_sq"].double(), 0.05 * g**2, atol=0, rtol=1e-4)
    # A vector has no frames: its moments go on.
    z = torch.stack([numbers(11, "z", 4, k, "b") for k in range(5)])
    g = torch.tensor(record.projected_grad, dtype=torch.float64) @ z / 5
    wanted = 0.9 * before["b/exp_avg"].double() + 0.1 * g
    torch.testing.assert_close(after["b/exp_avg"].double(), wanted, atol=1e-5, rtol=1e-4)
    for _ in range(8):
        opt.step(model)
        assert all(x.min() >= 0 for n, x in opt.snapshot()[1].items() if n.endswith("_sq"))


def test_a_run_resumed_between_refreshes_goes_on() -> None:
    model = Net()
    opt = subzero_plus(model)
    for _ in range(6):
        opt.step(model)
    again = Net()
    again.load_state_dict(model.state_dict())
    resumed = subzero_plus(again)
    resumed.restore(opt.snapshot()[0], {n: x.clone() for n, x in opt.snapshot()[1].items()})
    for _ in range(3):
        assert resumed.step(again).scalars == opt.step(model).scalars
    assert same(weights_of(again), weights_of(model))


def test_an_entry_of_a_step_in_the_frames_is_lr() -> None:
    """In the first step, where Adam's is a sign: the matrix moves by lr U A V^T, lr r long."""
    model = nn.Linear(40, 30, bias=False)
    before = model.weight.detach().clone()
    x = torch.linspace(-1, 1, 80).view(2, 40)
    subzero_plus(model, rank=4, lr=1e-3).step(lambda: model(x).double().square().sum())
    moved = (model.weight.detach() - before).double()
    assert moved.norm().item() == pytest.approx(4e-3, rel=1e-3)
    assert torch.linalg.matrix_rank(moved, tol=1e-5) <= 4  # signs (4, 4) may have less


def test_vectors_have_a_step_size_that_follows_the_schedule() -> None:
    whole, half = Net(), Net()
    first = subzero_plus(whole, lr=1e-2, lr_1d=1e-3)
    second = subzero_plus(half, lr=2e-2, lr_1d=2e-3)
    second.set_lr_factor(0.5)
    before = whole.b.detach().clone()
    first.step(whole)
    second.step(half)
    assert same(weights_of(whole), weights_of(half))
    # In the first step Adam's is a sign.
    torch.testing.assert_close((whole.b - before).abs(), torch.full((11,), 1e-3), atol=1e-6, rtol=0)
    assert subzero_plus(Net(), lr_1d=1e-4).identity() != first.identity()


def test_the_default_moves_entries_of_vectors_about_as_far_as_those_of_a_matrix() -> None:
    """By lr r / sqrt(m n) in one of 2048 x 2048, where A has entries of some 1."""
    node = node_of("subzero_plus")
    assert node["lr"] * node["rank"] / 2048 == pytest.approx(node["lr_1d"], rel=0.3)


def test_what_it_keeps_are_two_cores_and_the_frames() -> None:
    opt = subzero_plus(nn.Linear(300, 200), rank=8)
    # M and S (8, 8), U (200, 8) and V (300, 8) of the matrix, and both moments of the bias.
    assert opt.state_bytes == 4 * (2 * 64 + 8 * 500 + 2 * 200)
