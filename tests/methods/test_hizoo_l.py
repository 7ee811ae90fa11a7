"""HiZOO-L: a reference of our choice of its low rank, what it keeps, and its exact sums."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.hizoo import HiZOO
from smezo_cli.methods.hizoo_l import Factors, HiZOOL, Sums
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def given(**more: Any) -> Any:
    common = {"lr": 2e-3, "eps": 1e-2, "backend": "eager", "executor": "sequential", "check": False}
    return common | more


def reference(steps: int, alpha: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and H in float64; of matrices H is the product of row and column means."""
    theta = weights64(mlp())
    h = {n: torch.ones_like(x) for n, x in theta.items()}
    r = {n: torch.ones(len(x)).double() for n, x in theta.items()}
    c = {n: torch.ones(x[0].numel()).double() for n, x in theta.items()}
    for t in range(steps):
        z = z_of(theta, t)
        u = {n: z[n] / h[n].sqrt() for n in theta}
        plus, minus = (loss64({n: theta[n] + s * 1e-2 * u[n] for n in theta}) for s in (1, -1))
        second = abs(plus + minus - 2 * loss64(theta)) / 2e-4
        for n in theta:
            new = second * h[n] * z[n] ** 2
            theta[n] = theta[n] - 2e-3 * (plus - minus) / 2e-2 * u[n]
            if new.ndim == 1:
                h[n] = (1 - alpha) * h[n] + alpha * new
                continue
            r[n] = (1 - alpha) * r[n] + alpha * new.mean(1)
            c[n] = (1 - alpha) * c[n] + alpha * new.mean(0)
            h[n] = torch.outer(r[n], c[n]) / r[n].mean()
    return theta, h


def test_thirty_steps_are_those_of_the_rule() -> None:
    """Weights within 2e-4, H within 1%, as for HiZOO."""
    model = mlp()
    opt: Any = HiZOOL(model, **given(alpha=0.05))
    for _ in range(30):
        opt.step(closure_of(model))
    theta, h = reference(30, 0.05)
    for target in opt.targets:
        found = target.parameter.detach().double()
        torch.testing.assert_close(found, theta[target.name], rtol=0, atol=2e-4)
        (kept,) = opt.state_of_update.of(target)
        if found.ndim == 1:
            own = kept.double() + 1
        else:
            own = Factors.of(kept, tuple(found.shape), 1e-8).at(slice(None)).double()
        torch.testing.assert_close(own.view(found.shape), h[target.name], rtol=1e-2, atol=1e-2)
    assert max(float(x.max()) for x in h.values()) > 1.2


def test_what_it_keeps_is_the_sides_of_a_matrix() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.Conv1d(4, 6, 5))
    opt = HiZOOL(model, **given())
    assert opt.state_bytes == 4 * (300 + 200 + 200 + (6 + 4 * 5) + 6)
    assert HiZOO(model, **given()).state_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_without_a_curvature_it_is_hizoo_without_one() -> None:
    a, b = mlp(), mlp()
    for opt, model in ((HiZOOL(a, **given(alpha=0.0)), a), (HiZOO(b, **given(alpha=0.0)), b)):
        for _ in range(3):
            opt.step(closure_of(model))
    assert same(weights_of(a), weights_of(b))


def test_parts_rows_and_places_of_the_factors_agree() -> None:
    """Bit for bit, whichever part of the flat matrix is asked for."""
    kept = torch.rand(7 + 5, generator=seeded(0))
    factors = Factors.of(kept, (7, 5), 1e-8)
    r, c = kept[:7].double() + 1, kept[7:].double() + 1
    whole = factors.at(slice(None))
    exact = (torch.outer(r, c) / r.mean()).view(-1)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=0)
    for start in range(35):
        for stop in range(start + 1, 36):
            assert torch.equal(factors.at(slice(start, stop)), whole[start:stop])
    index = torch.tensor([34, 0, 17])
    assert torch.equal(factors.at(index), whole[index])


def test_sums_of_parts_in_any_order_are_those_of_the_whole() -> None:
    entries = torch.rand(35, generator=seeded(1)) * 100

    def summed(parts: list[slice]) -> Sums:
        found = Sums(torch.zeros(7).double(), torch.zeros(5).double())
        for part in parts:
            found.add(part, entries[part])
        return found

    cuts = [slice(i, min(i + 3, 35)) for i in range(0, 35, 3)]
    whole, cut, back = summed([slice(None)]), summed(cuts), summed(cuts[::-1])
    torch.testing.assert_close(whole.rows, entries.double().view(7, 5).sum(1), rtol=1e-8, atol=0)
    torch.testing.assert_close(whole.columns, entries.double().view(7, 5).sum(0), rtol=1e-8, atol=0)
    for other in (cut, back):
        assert torch.equal(whole.rows, other.rows)
        assert torch.equal(whole.columns, other.columns)


def test_what_it_keeps_is_bounded_from_below() -> None:
    """A flat loss has no curvature, so H falls: to least, to float32."""
    model = mlp()
    opt: Any = HiZOOL(model, **given(alpha=0.5, least=0.25))
    for _ in range(4):
        opt.step(lambda: torch.zeros(()))
    for target in opt.targets:
        (kept,) = opt.state_of_update.of(target)
        torch.testing.assert_close(kept + 1, torch.full_like(kept, 0.25), rtol=1e-6, atol=0)
    plain: Any = HiZOOL(mlp(), **given())  # H is 1
    plain.num_steps = opt.num_steps
    for target, other in zip(opt.targets, plain.targets, strict=True):
        scaled = opt.mover([0], [1.0]).dense(target)[0]
        z = plain.mover([0], [1.0]).dense(other)[0]
        torch.testing.assert_close(scaled, 2 * z, rtol=1e-6, atol=0)
