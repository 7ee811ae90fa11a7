"""LOZO: a reference written from the paper, the refresh that the released code gets wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.lozo import LOZO
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key
from tests.zo.test_optimizer import X, Y, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def loss_of(weights: Mapping[str, Tensor]) -> Tensor:
    """Squared error of a network with one hidden layer, in float64."""
    w = {name: x.double() for name, x in weights.items()}
    hidden = torch.tanh(X.double() @ w["a"].T + w["b"])
    return (hidden @ w["c"].T - Y).square().mean()


class Net(nn.Module):
    """Two matrices and a vector, of which it computes the loss in float64; it notes one."""

    def __init__(self) -> None:
        super().__init__()
        g = seeded(11)
        self.a = nn.Parameter(torch.randn(11, 6, generator=g) * 0.5)
        self.b = nn.Parameter(torch.randn(11, generator=g) * 0.5)
        self.c = nn.Parameter(torch.randn(3, 11, generator=g) * 0.5)
        self.seen: list[Tensor] = []

    def forward(self) -> Tensor:
        self.seen.append(self.a.detach().double())
        return loss_of({"a": self.a, "b": self.b, "c": self.c})


def numbers(size: int, *stream: Any) -> Tensor:
    """Keyed Gaussian numbers of seed 7."""
    return draw(torch.arange(size), size, torch.tensor(stream_key(7, *stream)), "gaussian").double()


def reference(
    w: dict[str, Tensor], steps: int, lr: float, eps: float, r: int, nu: int, decay: float
) -> dict[str, Tensor]:
    """The method as the paper has it, in float64, with U and V of the keys that smezo draws by."""
    for t in range(steps):
        z = {}
        for name, x in w.items():
            if x.ndim == 2:
                m, n = x.shape
                v = numbers(n * r, "v", t // nu, 0, name).view(r, n)  # new at each nu-th step
                z[name] = numbers(m * r, "u", t, 0, name).view(m, r) @ v
            else:
                z[name] = numbers(x.numel(), "z", t, 0, name)
        plus = loss_of({k: x + eps * z[k] for k, x in w.items()})
        minus = loss_of({k: x - eps * z[k] for k, x in w.items()})
        c = (plus - minus) / (2 * eps)
        w = {k: x - lr * (c * z[k] + decay * x) for k, x in w.items()}
    return w


def lozo(model: nn.Module, **options: Any) -> LOZO:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "refresh_every": 4, "seed": 7}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return LOZO(model, **(defaults | options))


@pytest.mark.parametrize(("rank", "decay"), [(1, 0.0), (2, 0.1), (4, 0.0)])
def test_steps_are_those_of_the_paper(rank: int, decay: float) -> None:
    """30 steps with seven new V. Rank 4 is above a side of one matrix, which has three rows."""
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = lozo(model, rank=rank, weight_decay=decay)
    for _ in range(30):
        opt.step(model)
    wanted = reference(before, 30, 1e-2, 1e-2, rank, 4, decay)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.01
        # Weights of size 1 are stored to 6e-8; a projected gradient is known to 6e-8 / eps of
        # the gradient's length (some 10), and is multiplied by lr and numbers of some 3, 30 times.
        assert (p.double() - wanted[name]).abs().max().item() < 5e-5


def test_the_update_of_a_refresh_goes_along_the_probed_direction() -> None:
    """The released code probes U and updates along another one there: a cosine of about 0."""
    model, eps, lr = Net(), 0.1, 0.01
    opt = lozo(model, eps=eps, lr=lr, refresh_every=2)
    for _ in range(6):
        before = model.a.detach().double()
        model.seen.clear()
        (g,) = opt.step(model).projected_grad
        probed = (model.seen[0] - model.seen[1]) / (2 * eps)
        updated = (model.a.detach().double() - before) / (-lr * g)
        # Numbers below 8 are stored to 2.4e-7, seen through eps and lr g.
        assert (probed - updated).abs().max().item() < 5 * 2.4e-7 * (1 / eps + 1 / abs(lr * g))
        assert torch.linalg.matrix_rank(probed, tol=1e-4) == 2


def test_the_estimate_is_on_average_the_rank_times_the_gradient() -> None:
    """Of a matrix (2, 3), over 20,000 draws: E <G, U V^T> U V^T = r G; the paper divides by r.

    Pairs of rows of a matrix (40, 3) have U of their own and one V in common: 20 draws of U for
    each of 1,000 V. With |G| = 1, entries of the mean differ from r G by some 0.05, measured.
    """
    opt = lozo(nn.Linear(3, 40, bias=False), rank=2, refresh_every=1)
    (target,) = opt.targets
    gradient = torch.tensor([0.5, -0.1, 0.3, 0.7, -0.2, 0.35])
    gradient /= gradient.norm()
    drawn = [
        opt.direction.mover(t, Move((Term(Key(t), 1.0),))).dense(target)[0] for t in range(1000)
    ]
    u = torch.stack(drawn).view(-1, 6)
    assert len(u) == 20_000
    mean = ((u @ gradient)[:, None] * u).mean(0)
    assert (mean - 2 * gradient).abs().max().item() < 0.2


def test_the_direction_is_new_at_each_step_and_v_at_each_nu_th() -> None:
    opt = lozo(Net(), refresh_every=3)
    direction: Any = opt.direction
    target = opt.targets[0]

    def space(t: int) -> Tensor:
        """The projector on the rows of U V^T."""
        found = direction.mover(t, Move((Term(Key(t), 1.0),))).dense(target)[0].view(11, 6)
        rows = torch.linalg.svd(found.double()).Vh[:2]
        return rows.T @ rows

    spaces = [space(t) for t in range(6)]
    for t in range(1, 6):
        is_old = (spaces[t] - spaces[t - 1]).abs().max().item() < 1e-5
        assert is_old == (t != 3)
