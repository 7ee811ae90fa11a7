"""ZO-Muon: a reference written from the paper, its Newton-Schulz steps, the frame of a refresh."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.zo_muon import ZOMuon, msign
from smezo_cli.zo.move import Key, Move, Term
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.methods.test_subzero import frame
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def zo_muon(model: nn.Module, **options: Any) -> ZOMuon:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "rank": 4, "refresh_every": 4, "seed": 7}
    defaults |= {"num_queries": 3, "lr_1d": 1e-3}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return ZOMuon(model, **(defaults | options))


def newton_schulz(g: Tensor) -> Tensor:
    """The five steps as they are written, in float64."""
    x = g / g.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def reference(w: dict[str, Tensor], steps: int, rank: int, every: int, q: int) -> dict[str, Tensor]:
    """The method as the paper has it, in float64, by the keys that smezo draws by."""
    lr, eps, lr_1d = 1e-2, 1e-3, 1e-3
    for t in range(steps):
        here, g, p = loss_of(w), {k: torch.zeros_like(x) for k, x in w.items()}, {}
        core = {}
        for name, x in w.items():
            if x.ndim == 2:
                r = min(rank, len(x))
                p[name] = frame(len(x), r, "left", t // every, 0, name)  # one for all queries
                core[name] = torch.zeros(r, x.shape[1], dtype=torch.float64)
        for i in range(q):
            u = {k: numbers((core.get(k, x)).numel(), "z", t, i, k) for k, x in w.items()}
            u = {k: x.view(core.get(k, w[k]).shape) for k, x in u.items()}
            there = {k: x + eps * (p[k] @ u[k] if k in p else u[k]) for k, x in w.items()}
            slope = (loss_of(there) - here) / eps
            for k in w:
                (core if k in p else g)[k] += slope * u[k] / q
        moved = {k: p[k] @ newton_schulz(core[k]) if k in p else g[k] for k in w}
        w = {k: x - (lr if k in p else lr_1d) * moved[k] for k, x in w.items()}
    return w


@pytest.mark.parametrize(("rank", "queries"), [(1, 1), (2, 4), (4, 3)])
def test_steps_are_those_of_the_paper(rank: int, queries: int) -> None:
    """30 steps with seven new P. Rank 4 is above the rows of one matrix, which has three."""
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = zo_muon(model, rank=rank, num_queries=queries)
    for _ in range(30):
        opt.step(model)
    wanted = reference(before, 30, rank, 4, queries)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.003
        # Weights of size 1 are stored to 6e-8, so that a slope is known to some 1e-4 of its size.
        # A step is known as well, up to the spread of singular values; times lr, 30 times.
        assert (p.double() - wanted[name]).abs().max().item() < 3e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 40), (40, 7), (16, 16)])
def test_singular_values_become_alike_and_vectors_stay(shape: tuple[int, int]) -> None:
    """Against an SVD. The polynomial takes [0.01, 1] to [0.66, 1.21] in five steps."""
    g = torch.randn(shape, generator=seeded(3)) * 1e4
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    assert (s / s.norm()).min() > 0.01
    found = u.T @ msign(g).double() @ vh.T
    sizes = found.diagonal()
    assert sizes.min() > 0.66
    assert sizes.max() < 1.21
    # Of entries rounded to 2^-24, through steps that raise small singular values 3.4-fold.
    assert (found - sizes.diag()).abs().max().item() < 1e-4
    assert (msign(g) - newton_schulz(g.double())).abs().max().item() < 1e-4


def test_a_step_is_the_same_whatever_the_losses_are_times() -> None:
    assert torch.equal(msign(torch.zeros(2, 3)), torch.zeros(2, 3))
    g = torch.randn(5, 8, generator=seeded(4))
    for scale in (2.0**-80, 2.0**60):
        assert torch.equal(msign(g * scale), msign(g))


def test_at_a_refresh_all_queries_and_the_update_have_one_frame() -> None:
    """The released code probes each query in a P of its own, and lifts the update by the last."""
    model, eps = Net(), 0.1
    opt = zo_muon(model, rank=3, refresh_every=2, num_queries=4, eps=eps)
    for step in range(6):
        before = model.a.detach().double()
        model.seen.clear()
        opt.step(model)
        probed = [(seen - before) / eps for seen in model.seen[1:]]
        assert len(probed) == 4
        together = torch.cat([*probed, model.a.detach().double() - before], dim=1)
        # Columns of the four probes and of the step lie in the three dimensions of P.
        assert torch.linalg.matrix_rank(together, tol=1e-4) == 3
        space = torch.linalg.svd(together).U[:, :3]
        p = frame(11, 3, "left", step // 2, 0, "a")
        # Numbers below 8 are stored to 2.4e-7, seen through eps.
        assert (p.T @ space @ space.T @ p - torch.eye(3)).abs().max().item() < 1e-4


def test_the_estimate_is_on_average_the_gradient_in_the_subspace() -> None:
    """E <D, P Psi> P Psi = r/m D, of a matrix (4, 3): 20 draws of Psi in each of 1,000 frames.

    With |D| = 1, entries of the mean differ by some 0.02, measured.
    """
    opt = zo_muon(nn.Linear(3, 4, bias=False), rank=2, refresh_every=1, num_queries=20)
    (target,) = opt.targets
    d = torch.randn(12, generator=seeded(1))
    d /= d.norm()
    found = torch.zeros(12)
    for t in range(1000):
        for q in range(20):
            u = opt.direction.mover(t, Move((Term(Key(t, q), 1.0),))).dense(target)[0]
            found += (u @ d) * u / 20_000
    assert (found - d * 2 / 4).abs().max().item() < 0.1


def test_tensors_of_one_dimension_have_a_step_size_that_follows_the_schedule() -> None:
    model, half = Net(), Net()
    whole, other = zo_muon(model, lr_1d=1e-3), zo_muon(half, lr=2e-2, lr_1d=2e-3)
    other.set_lr_factor(0.5)
    for _ in range(2):
        whole.step(model)
        other.step(half)
    for a, b in zip(model.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)
    assert zo_muon(Net(), lr_1d=1e-4).identity() != whole.identity()


def test_weight_decay_goes_by_the_step_size_of_a_tensor() -> None:
    plain, model = Net(), Net()
    with torch.no_grad():
        decayed = {name: p.detach().clone() for name, p in model.named_parameters()}
    zo_muon(plain, lr=1e-2, lr_1d=1e-3).step(plain)
    zo_muon(model, lr=1e-2, lr_1d=1e-3, weight_decay=0.5).step(model)
    rates = {"a": 1e-2, "b": 1e-3, "c": 1e-2}
    for name, p in model.named_parameters():
        wanted = plain.get_parameter(name) - 0.5 * rates[name] * decayed[name]
        torch.testing.assert_close(p.detach(), wanted.detach(), atol=3e-7, rtol=0)


def test_one_frame_is_all_that_is_kept() -> None:
    model = nn.Linear(300, 200)
    opt = zo_muon(model, rank=8)
    assert not opt.keeps_state
    assert opt.state_bytes == 4 * 200 * 8
