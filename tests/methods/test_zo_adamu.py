"""ZO-AdaMU against a reference written from its paper, and what its released code gets wrong."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.zo_adamu import ZOAdaMU
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

PHASES: dict[str, Any] = {"alpha": [0.9, 0.4], "beta1": [0.8, 0.5], "beta2": [0.95, 0.7]}
ENDS: dict[str, Any] = {"anneal_from": 5, "anneal_to": 20}


def made(model: nn.Module, **more: Any) -> ZOAdaMU:
    given = {"lr": 2e-4, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return ZOAdaMU(model, **(given | PHASES | ENDS | more))  # type: ignore[arg-type]  # mixed


def at(step: int) -> tuple[float, float, float]:
    share = min(max((step - 5) / 15, 0), 1)
    a, b1, b2 = (x + (y - x) * share for x, y in PHASES.values())
    return a, b1, b2


def reference(steps: int, lr: float, eps: float, least: float) -> tuple[dict[str, Tensor], ...]:
    """The paper's steps in float64; weights and m."""
    theta = weights64(mlp())
    m = {n: torch.zeros_like(x) for n, x in theta.items()}
    for t in range(steps):
        a, b1, b2 = at(t)
        z, other = z_of(theta, t), z_of(theta, t, purpose="z around m")
        z1 = {n: math.sqrt(a) * z[n] for n in theta}
        z2 = {n: m[n] + math.sqrt(1 - a) * other[n] for n in theta}
        u = {n: b1 * z1[n] + (1 - b1) * z2[n] for n in theta}
        plus, minus = (loss64({n: theta[n] + s * eps * u[n] for n in theta}) for s in (1, -1))
        p = (plus - minus) / (2 * eps)
        for n in theta:
            v = b2 * z1[n] ** 2 + (1 - b2) * z2[n] ** 2
            theta[n] = theta[n] - lr * p * u[n] / (v + least).sqrt()
            m[n] = math.copysign(1.0, p) * u[n]
    return theta, m


@pytest.mark.parametrize("least", [1e-8, 0.1])
def test_thirty_steps_are_those_of_the_paper(least: float) -> None:
    """Through all three phases; within 1e-4: float32 weights make 1e-4 of p at eps 1e-3."""
    model = mlp()
    start = weights64(model)
    opt = made(model, least=least)
    for _ in range(30):
        opt.step(closure_of(model))
    expected, m = reference(30, 2e-4, 1e-3, least)
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)
        assert (expected[name] - start[name]).abs().max() > 1e-3
        kept = opt.snapshot()[1][f"{name}/momentum"].double().view(found.shape)
        torch.testing.assert_close(kept, m[name], rtol=0, atol=1e-5)


def test_the_step_is_made_of_what_was_probed() -> None:
    """m after a step is the u of its probe, bit for bit but for its sign: one mix, one schedule.

    The released probe would mix by 0.9 and 0.1, its step by the annealed beta1.
    """
    model = mlp()
    opt: Any = made(model, anneal_from=0, anneal_to=4)
    for _ in range(6):
        mover = opt.mover([0], [1.0])
        u = {t.name: mover.dense(t)[0] for t in opt.targets}
        (p,) = opt.step(closure_of(model)).projected_grad
        for target in opt.targets:
            (m,) = opt.state_of_update.of(target)
            assert torch.equal(m, u[target.name] * math.copysign(1.0, p))


def test_the_schedule_is_that_of_the_step_and_not_of_the_tensor() -> None:
    """All tensors of a step share one beta1; the released one goes on once a tensor."""
    opt: Any = made(mlp(), anneal_from=0, anneal_to=2)
    mover, a, b1 = opt.mover([0], [1.0]), 0.9, 0.8
    z, other = (z_of(weights64(mlp()), 0, purpose=x) for x in ("z", "z around m"))
    for target in opt.targets:
        u = b1 * math.sqrt(a) * z[target.name] + (1 - b1) * math.sqrt(1 - a) * other[target.name]
        found = mover.dense(target)[0].double()
        torch.testing.assert_close(found, u.view(-1), rtol=0, atol=1e-6)


def test_no_weight_moves_by_more_than_its_share_of_the_slope() -> None:
    """|u| / sqrt(v) is at most sqrt(b1^2 / b2 + (1 - b1)^2 / (1 - b2)), by Cauchy and Schwarz."""
    model = mlp()
    opt, most = made(model), 0.0
    for step in range(10):
        before = weights64(model)
        (p,) = opt.step(closure_of(model)).projected_grad
        _, b1, b2 = at(step)
        bound = 2e-4 * abs(p) * math.sqrt(b1**2 / b2 + (1 - b1) ** 2 / (1 - b2))
        moved = max(float((x - before[n]).abs().max()) for n, x in weights64(model).items())
        assert moved <= bound * (1 + 1e-5) + 2e-7  # rounding of the weights
        most = max(most, moved / bound)
    assert most > 0.9


def test_a_step_without_a_slope_forgets_the_momentum() -> None:
    """The sign of 0 is 0."""
    model = mlp()
    opt: Any = made(model)
    opt.step(closure_of(model))
    opt.step(lambda: torch.zeros(()))
    assert not any(x.any() for x in opt.snapshot()[1].values())


def test_the_mean_of_the_estimate_is_longer_along_the_momentum() -> None:
    """E[(g . u) u] = (1 - b1)^2 (g . m) m + [b1^2 a + (1 - b1)^2 (1 - a)] g: five errors."""
    model = nn.Linear(4, 20_000, bias=False)  # each row is a draw
    opt: Any = made(model)
    (target,) = opt.targets
    m = torch.tensor([1.0, 2.0, -2.0, 4.0])
    opt.state_of_update.of(target)[0].copy_(m.repeat(20_000))
    u = opt.mover([0], [1.0]).dense(target)[0].view(-1, 4).double()
    g, (a, b1, _) = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64), at(0)
    found = (u @ g)[:, None] * u
    along = (1 - b1) ** 2 * (g @ m.double()) * m.double()
    wanted = along + (b1**2 * a + (1 - b1) ** 2 * (1 - a)) * g
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() < 5 * error).all()
    assert float(along.norm()) > 10 * float(error.norm())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"beta1": [0.9, 0.0]}, r"beta1=\[0.9, 0.0\]: two numbers above 0 and below 1"),
        ({"anneal_to": 2}, "anneal_to=2: at least anneal_from, which is 5"),
        ({"keep_noise": True}, "keep_noise=true keeps one draw of noise, and a probe of this"),
    ],
)
def test_what_is_out_of_range_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(mlp(), **more)
