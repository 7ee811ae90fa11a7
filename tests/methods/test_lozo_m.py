"""LOZO-M: a reference written from the paper, what it keeps, and its limits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.lozo import LOZO
from smezo_cli.methods.lozo_m import LOZOM
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.zo.test_optimizer import mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def lozo_m(model: nn.Module, **options: Any) -> LOZOM:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "refresh_every": 4, "seed": 7}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return LOZOM(model, **(defaults | options))


def reference(
    w: dict[str, Tensor], steps: int, lr: float, eps: float, r: int, nu: int, beta: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method as the paper has it, in float64, by smezo's keys; weights and means."""
    kept: dict[str, Tensor] = {}
    v: dict[str, Tensor] = {}
    for t in range(steps):
        z, core = {}, {}
        for name, x in w.items():
            if x.ndim == 2:
                m, n = x.shape
                new = numbers(n * r, "v", t // nu, 0, name).view(r, n).T
                if t and t % nu == 0:
                    kept[name] = kept[name] @ v[name].T @ new / n
                v[name] = new
                core[name] = numbers(m * r, "u", t, 0, name).view(m, r)
                z[name] = core[name] @ new.T
            else:
                core[name] = z[name] = numbers(x.numel(), "z", t, 0, name)
        plus = loss_of({k: x + eps * z[k] for k, x in w.items()})
        minus = loss_of({k: x - eps * z[k] for k, x in w.items()})
        c = (plus - minus) / (2 * eps)
        for k, x in core.items():
            kept[k] = beta * kept.get(k, torch.zeros_like(x)) + (1 - beta) * c * x
        moved = {k: kept[k] @ v[k].T if k in v else kept[k] for k in w}
        w = {k: x - lr * moved[k] for k, x in w.items()}
    return w, kept


@pytest.mark.parametrize(("rank", "beta"), [(1, 0.9), (2, 0.5), (4, 0.7)])
def test_steps_are_those_of_the_paper(rank: int, beta: float) -> None:
    """30 steps with seven new V, to which the mean is carried."""
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = lozo_m(model, rank=rank, beta=beta)
    for _ in range(30):
        opt.step(model)
    wanted, kept = reference(before, 30, 1e-2, 1e-2, rank, 4, beta)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.01
        # As for LOZO; new means are known to 2^-16 of the old ones besides.
        assert (p.double() - wanted[name]).abs().max().item() < 5e-5
        mean = opt.snapshot()[1][f"{name}/momentum"].double()
        scale = kept[name].abs().max().item()
        assert (mean - kept[name].flatten()).abs().max().item() < 1e-3 * scale


def test_without_decay_of_the_mean_it_is_lozo() -> None:
    """To rounding: lr times g is taken in another order."""
    a, b = mlp(), mlp()
    mean, plain = lozo_m(a, beta=0.0), LOZO(b, lr=1e-2, eps=1e-2, rank=2, refresh_every=4, seed=7)
    assert mean.state_bytes > plain.state_bytes  # that of V alone
    for opt, model in ((mean, a), (plain, b)):
        for _ in range(10):
            opt.step(lambda model=model: model(torch.ones(2, 6)).double().square().mean())
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_what_it_keeps_is_as_small_as_u() -> None:
    model = nn.Linear(300, 200)
    opt = lozo_m(model)
    # N (200, 2) and V (300, 2) of the matrix, and the mean of the bias.
    assert opt.state_bytes == 4 * (2 * 200 + 2 * 300 + 200)


def test_a_mean_in_the_old_factors_is_not_one_in_the_new() -> None:
    """Were it not carried, the weights would go along N_old V_new^T: the reference sees that."""
    model = Net()
    opt: Any = lozo_m(model, refresh_every=2)
    opt.step(model)
    opt.step(model)
    before = opt.snapshot()[1]["a/momentum"].clone().view(11, 2)
    opt.step(model)
    after = opt.snapshot()[1]["a/momentum"].view(11, 2)
    u = numbers(22, "u", 2, 0, "a").view(11, 2)
    # What beta times the old mean left behind: (after - 0.1 g u) / 0.9 = N V_old^T V_new / n.
    left = torch.linalg.lstsq(torch.cat([before.double(), u], dim=1), after.double()).solution[:2]
    v = [numbers(12, "v", k, 0, "a").view(2, 6) for k in (0, 1)]
    assert (left / 0.9 - v[0] @ v[1].T / 6).abs().max().item() < 1e-3
