"""ConMeZO against a reference written from its paper, and what its released code gets wrong."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.conmezo import ConMeZO
from smezo_cli.methods.mezo import MeZO
from smezo_cli.zo.schedule import between
from smezo_cli.zo.sums import squares_in_units
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> ConMeZO:
    given = {"lr": 2e-3, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return ConMeZO(model, **(given | more))  # type: ignore[arg-type]  # mixed


def reference(
    steps: int, phi: float, betas: tuple[float, float], ends: tuple[int, int], queries: int
) -> dict[str, Tensor]:
    """The paper's steps in float64, lr 2e-3 and eps 1e-3."""
    theta = weights64(mlp())
    m = {n: torch.zeros_like(x) for n, x in theta.items()}
    d = sum(x.numel() for x in theta.values())
    for t in range(steps):
        share = min(max((t - ends[0]) / (ends[1] - ends[0]), 0), 1)
        beta = betas[0] + (betas[1] - betas[0]) * share
        norm = math.sqrt(sum(float(x.square().sum()) for x in m.values()))
        g = {n: torch.zeros_like(x) for n, x in theta.items()}
        for q in range(queries):
            x = z_of(theta, t, q)
            if norm:
                along = math.sqrt(d) * math.cos(phi) / norm
                x = {n: along * m[n] + math.sin(phi) * x[n] for n in theta}
            plus, minus = (loss64({n: theta[n] + s * 1e-3 * x[n] for n in theta}) for s in (1, -1))
            g = {n: g[n] + (plus - minus) / 2e-3 / queries * x[n] for n in theta}
        m = {n: beta * m[n] + (1 - beta) * g[n] for n in theta}
        theta = {n: theta[n] - 2e-3 * g[n] for n in theta}
    return theta


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("phi", [1.35, 0.8])
def test_thirty_steps_are_those_of_the_paper(phi: float, queries: int) -> None:
    """Within 2e-4: float32 weights make 1e-4 of p at eps 1e-3, which adds up over the steps."""
    model = mlp()
    start = weights64(model)
    more = {"beta_start": 0.1, "beta": 0.9, "warmup_from": 5, "warmup_to": 20}
    opt = made(model, phi=phi, num_queries=queries, **more)
    for _ in range(30):
        opt.step(closure_of(model))
    expected = reference(30, phi, (0.1, 0.9), (5, 20), queries)
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-4)
        assert (expected[name] - start[name]).abs().max() > 2e-2


def with_momentum(model: nn.Module, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    """The method after two steps, and its m."""
    opt: Any = made(model, beta_start=0.5, **more)
    for _ in range(2):
        opt.step(closure_of(model))
    return opt, {n: x.double().clone() for n, x in opt.snapshot()[1].items()}


def test_the_norm_is_measured() -> None:
    """To 1e-5, as entries are rounded to some 1e-4 of their size.

    The released code divides by a norm that m has on average, whatever m is.
    """
    opt, m = with_momentum(mlp())
    norm = math.sqrt(sum(float(x.square().sum()) for x in m.values()))
    assert opt.snapshot()[0]["state"]["norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1


def test_there_is_one_cone_and_not_one_a_tensor() -> None:
    """What lies along m is sqrt(d) cos(phi) long over all tensors together.

    Each tensor's part of it is as large as its part of m, where cones of their own would give each
    sqrt(d_i) cos(phi).
    """
    phi = 0.5
    opt, m = with_momentum(mlp(), phi=phi)
    mover = opt.mover([0], [1.0])
    z = z_of(weights64(mlp()), opt.num_steps)
    norm = opt.snapshot()[0]["state"]["norm"]
    d, shares = 0, []
    for target in opt.targets:
        own = m[f"{target.name}/momentum"]
        along = mover.dense(target)[0].double() - math.sin(phi) * z[target.name].view(-1)
        d += target.parameter.numel()
        shares.append(float(along.norm()) / math.sqrt(target.parameter.numel()))
        found = float(along.norm()) / float(own.norm())
        assert found == pytest.approx(float(along @ own) / float(own @ own), rel=1e-5)
        assert found * norm / math.cos(phi) == pytest.approx(
            math.sqrt(sum(t.parameter.numel() for t in opt.targets)), rel=1e-5
        )
    assert max(shares) > 1.5 * min(shares)


def test_the_first_step_is_mezo() -> None:
    """m is 0, so x is z with its whole length. The released m is random at first."""
    a, b = mlp(), mlp()
    made(a).step(closure_of(a))
    MeZO(b, lr=2e-3, eps=1e-3, backend="eager", executor="sequential", check=False).step(
        closure_of(b)
    )
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)  # lr p z in another order


def test_frozen_tensors_do_not_count() -> None:
    """d and |m| are of what is trained."""
    opt, _ = with_momentum(mlp(), phi=0.1, freeze=["0.*"])
    mover = opt.mover([0], [1.0])
    size = sum(float(mover.dense(t)[0].double().square().sum()) for t in opt.targets)
    d = sum(t.parameter.numel() for t in opt.targets)
    # cos(0.1)^2 d of it lie along m; what is left of z is 1% of it, and its product with m 2 * 10%.
    assert size == pytest.approx(d, rel=0.3)
    assert d == 11 + 11 + 36


def test_the_mean_of_the_estimate_is_longer_along_the_momentum() -> None:
    """E[(g . x) x] = d cos^2 (g . n) n + sin^2 g with n = m / |m|: within five standard errors."""
    model = nn.Linear(4, 20_000, bias=False)  # each row is a draw
    opt: Any = made(model, phi=1.0)
    (target,) = opt.targets
    m = torch.tensor([1.0, 2.0, -2.0, 4.0])
    opt.state_of_update.of(target)[0].copy_(m.repeat(20_000))
    opt.state_of_update.numbers["norm"] = 5.0 * 20_000**0.5
    x = opt.mover([0], [1.0]).dense(target)[0].view(-1, 4).double()
    g, n = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64), m.double() / 5
    found = (x @ g)[:, None] * x
    wanted = 4 * math.cos(1.0) ** 2 * (g @ n) * n + math.sin(1.0) ** 2 * g
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() < 5 * error).all()
    assert float((wanted - g).norm()) > 20 * float(error.norm())


def test_the_norm_is_the_same_in_any_order_of_tensors_and_parts() -> None:
    x = torch.randn(300_001, generator=seeded(0)) * 3e-5
    unit = 2.0**-27
    whole = squares_in_units(x, unit)
    assert whole == sum(squares_in_units(part, unit) for part in x.split(777))
    assert whole == squares_in_units(x.sort().values, unit)
    assert whole * unit**2 == pytest.approx(float(x.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_slopes_of_any_size_are_measured(scale: float) -> None:
    """m may be tiny or huge; the norm is that of m to 1e-5."""
    model = mlp()
    opt: Any = made(model, lr=1e-20, beta_start=0.5)
    loss = closure_of(model)
    for _ in range(3):
        opt.step(lambda: loss() * scale)
    m = [x.double() for x in opt.snapshot()[1].values()]
    norm = math.sqrt(sum(float(x.square().sum()) for x in m))
    assert norm > 0
    assert opt.snapshot()[0]["state"]["norm"] == pytest.approx(norm, rel=1e-5)


def test_a_flat_loss_leaves_the_weights_where_they_are() -> None:
    model = mlp()
    opt: Any = made(model)
    before = weights_of(model)
    for _ in range(3):
        opt.step(lambda: torch.zeros(()))
    assert same(weights_of(model), before)
    assert opt.snapshot()[0]["state"]["norm"] == 0


def test_the_decay_warms_up_on_a_straight_line() -> None:
    found = [between(0.1, 0.9, step, 4, 8) for step in (0, 4, 5, 6, 8, 100)]
    assert found == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.9, 0.9])
    assert [between(0.1, 0.9, step, 3, 3) for step in (2, 3)] == [0.1, 0.9]
    with pytest.raises(ValueError, match="warmup_to=3: at least warmup_from, which is 4"):
        made(mlp(), warmup_from=4, warmup_to=3)
