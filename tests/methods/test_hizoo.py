"""HiZOO against a reference written from its released code, with the H of the probe in the step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.hizoo import HiZOO
from smezo_cli.methods.mezo import MeZO
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> HiZOO:
    given = {"lr": 2e-3, "eps": 1e-2, "backend": "eager", "executor": "sequential", "check": False}
    return HiZOO(model, **(given | more))  # type: ignore[arg-type]  # mixed


def reference(
    steps: int, lr: float, eps: float, alpha: float, least: float, *, new_h: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and H in float64; ``new_h``: the step goes along the changed H, as released."""
    theta = weights64(mlp())
    h = {n: torch.ones_like(x) for n, x in theta.items()}
    for t in range(steps):
        z = z_of(theta, t)
        u = {n: z[n] / h[n].sqrt() for n in theta}
        plus, minus = (loss64({n: theta[n] + s * eps * u[n] for n in theta}) for s in (1, -1))
        second = abs(plus + minus - 2 * loss64(theta)) / (2 * eps**2)
        p = (plus - minus) / (2 * eps)
        for n in theta:
            h[n] = ((1 - alpha) * h[n] + alpha * second * h[n] * z[n] ** 2).clamp(min=least)
            step = z[n] / h[n].sqrt() if new_h else u[n]
            theta[n] = theta[n] - lr * p * step
    return theta, h


@pytest.mark.parametrize(("alpha", "least"), [(0.02, 1e-8), (0.1, 0.8)])
def test_thirty_steps_are_those_of_the_code_along_what_was_probed(
    alpha: float, least: float
) -> None:
    """Weights within 2e-4, H within 1%.

    Weights in float32 make some 1e-5 of p at eps 1e-2, and 1e-3 of the second difference.
    """
    model = mlp()
    opt = made(model, alpha=alpha, least=least)
    for _ in range(30):
        opt.step(closure_of(model))
    theta, h = reference(30, 2e-3, 1e-2, alpha, least)
    released, _ = reference(30, 2e-3, 1e-2, alpha, least, new_h=True)
    far = 0.0
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, theta[name], rtol=0, atol=2e-4)
        kept = opt.snapshot()[1][f"{name}/excess_curvature"].double().view(found.shape) + 1
        torch.testing.assert_close(kept, h[name], rtol=1e-2, atol=1e-2)
        far = max(far, float((released[name] - theta[name]).abs().max()))
    assert far > 2e-3  # the released order is another one
    assert max(float(x.max()) for x in h.values()) > 1.2


def test_without_a_curvature_it_is_mezo() -> None:
    """alpha=0: H stays 1, and u is z to the bit; the third forward changes nothing."""
    a, b = mlp(), mlp()
    opt, mezo = made(a, alpha=0.0), MeZO(b, lr=2e-3, eps=1e-2, backend="eager", check=False)
    for _ in range(5):
        opt.step(closure_of(a))
        mezo.step(closure_of(b))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # lr times p times z in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_alpha_1e_8_adds_is_kept(dtype: torch.dtype) -> None:
    """In any dtype of the weights. The released code's H in float16 stays 1 or overflows."""
    model = mlp(dtype)
    opt = made(model, alpha=1e-8)
    for _ in range(3):
        opt.step(closure_of(model))
    for name, kept in opt.snapshot()[1].items():
        assert kept.dtype == torch.float32, name
        assert 0 < float(kept.abs().max()) < 1e-4
        assert len(kept.unique()) == len(kept)


def test_there_are_three_forwards_a_step() -> None:
    """The released code makes four."""
    model = mlp()
    opt, closure, calls = made(model), closure_of(model), [0]

    def counted() -> Tensor:
        calls[0] += 1
        return closure()

    record = opt.step(counted)
    assert calls[0] == record.num_forwards == 3
    assert len(record.projected_grad) == 1
    assert record.scalars[1] >= 0


def test_the_mean_of_the_estimate_is_the_gradient_over_the_curvature() -> None:
    """E[(g . u) u] = g / H, here over 20,000 directions, within five standard errors."""
    model = nn.Linear(4, 20_000, bias=False)  # each row is a draw
    opt: Any = made(model)
    (target,) = opt.targets
    h = torch.tensor([0.25, 1.0, 4.0, 16.0])
    opt.state_of_update.of(target)[0].copy_((h - 1).repeat(20_000))
    u = opt.mover([0], [1.0]).dense(target)[0].view(-1, 4).double()
    g = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    found = (u @ g)[:, None] * u
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - g / h).abs() < 5 * error).all()
    assert (error < 0.1 * (g / h).abs()).all()


def test_a_clipped_slope_leaves_the_curvature_as_it_was_measured() -> None:
    a, b = mlp(), mlp()
    free, cut = made(a, alpha=0.1), made(b, alpha=0.1, clip_projected_grad=1e-3)
    free.step(closure_of(a))
    cut.step(closure_of(b))
    kept = [{n: x.clone() for n, x in opt.snapshot()[1].items()} for opt in (free, cut)]
    assert same(*kept)
    assert not same(weights_of(a), weights_of(b))
