"""HELENE against a reference written from its paper."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.helene import Helene
from smezo_cli.zo.sums import sum_of_squares
from tests.methods.reference import loss64, weights64, z_of
from tests.methods.test_every_method import node_of
from tests.zo.test_optimizer import closure_of, mlp, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

ARGUMENTS = {
    "beta1": 0.8,
    "beta2": 0.9,
    "anneal_steps": 7.0,
    "curvature_every": 3,
    "curvature_rows": 4.0,
    "gamma": 2.0,
    "bound": 0.7,
    "least": 1e-3,
}


def reference(steps: int, lr: float, eps: float) -> dict[str, Tensor]:
    """The paper's update in float64."""
    a = ARGUMENTS
    theta = weights64(mlp())
    bound = {n: a["bound"] * x.norm() / (2 * math.sqrt(x.numel())) for n, x in theta.items()}
    m = {n: torch.zeros_like(x) for n, x in theta.items()}
    h = {n: torch.zeros_like(x) for n, x in theta.items()}
    for t in range(steps):
        z = z_of(theta, t)
        plus, minus = ({n: theta[n] + s * eps * z[n] for n in theta} for s in (1, -1))
        p = (loss64(plus) - loss64(minus)) / (2 * eps)
        new = a["beta1"] + (1 - a["beta1"]) * math.exp(-t / a["anneal_steps"])
        for n in theta:
            g = p * z[n]
            m[n] = a["beta1"] * m[n] + new * g
            if t % a["curvature_every"] == 0:
                h[n] = a["beta2"] * h[n] + (1 - a["beta2"]) * a["curvature_rows"] * g**2
            theta[n] = theta[n] - lr * m[n] / (
                a["gamma"] * torch.maximum(h[n], bound[n]) + a["least"]
            )
    return theta


def made(model: nn.Module, **more: Any) -> Helene:
    given = {"lr": 2e-3, "eps": 1e-3, "backend": "eager", "executor": "sequential"}
    return Helene(model, **ARGUMENTS | given | more)  # type: ignore[arg-type]  # mixed


def test_thirty_steps_are_those_of_the_paper() -> None:
    """Within 1e-4: float32 weights leave some 1e-4 of rounding in p, times lr, m and 1 / h."""
    model = mlp()
    start = weights64(model)
    opt = made(model)
    for _ in range(30):
        opt.step(closure_of(model))
    expected = reference(30, 2e-3, 1e-3)
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)
        assert (expected[name] - start[name]).abs().max() > 5e-3


def test_bounds_are_those_of_the_first_step_also_after_a_restart() -> None:
    model = mlp()
    opt = made(model)
    opt.step(closure_of(model))
    bounds = opt.snapshot()[0]["state"]["bounds"]
    first = mlp()
    for name, p in first.named_parameters():
        assert bounds[name] == pytest.approx(
            0.7 * float(p.detach().norm()) / (2 * p.numel() ** 0.5)
        )
    opt.step(closure_of(model))
    assert opt.snapshot()[0]["state"]["bounds"] == bounds


def test_a_tensor_of_zeros_has_the_bound_of_all_weights() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.bias)
    start = model.weight.detach().clone()
    opt = made(model, check=False)
    opt.step(lambda: model(torch.ones(3)).double().square().sum())
    rms = float(start.square().sum() / 8) ** 0.5  # of 6 weights and 2 zeros
    assert opt.snapshot()[0]["state"]["bounds"]["bias"] == pytest.approx(0.7 * rms / 2, rel=1e-6)
    assert model.bias.isfinite().all()


def test_a_sum_of_squares_does_not_hang_on_the_order() -> None:
    x = torch.randn(3_000_000, generator=seeded(0))
    expected = float(x.double().square().sum())
    assert sum_of_squares(x) == pytest.approx(expected, rel=1e-9)
    assert sum_of_squares(x) == sum_of_squares(x.flip(0)) == sum_of_squares(x.sort().values)


def test_steps_fall_a_hundredfold_to_the_size_that_the_yaml_states() -> None:
    """A typical weight's at |p| = 5 of either sign: 2 lr / (B |p|) at last, within a third.

    At first h is a hundredth of B p^2 z^2, so that the step is p z over that.
    """
    node = node_of("helene")
    model = nn.Linear(100, 30, bias=False)
    start = torch.randn(30, 100, generator=seeded(2)) * 0.01
    with torch.no_grad():
        model.weight.copy_(start)
    names = ("beta1", "beta2", "anneal_steps", "curvature_every", "gamma", "bound", "least")
    opt = Helene(
        model,
        lr=1e-3,
        eps=1e-3,
        curvature_rows=16.0,
        backend="eager",
        check=False,
        executor="sequential",
        **{name: node[name] for name in names},
    )
    signs = torch.randn(3000, generator=seeded(3)).sign().tolist()
    sizes = []
    for sign in signs:
        before = model.weight.detach().clone()
        opt.replay(1e-3, [5 * sign])
        sizes.append((model.weight.detach() - before).abs().median().item() / 1e-3)
    first, last = sizes[0], sum(sizes[-200:]) / 200
    # The median of |m| is 0.67 of its root mean square, and of 1 / |z| it is 1.48.
    assert first == pytest.approx(1.48 * 5 / (0.01 * 16 * 25), rel=0.1)
    assert last == pytest.approx(0.67 * 2 / (16 * 5), rel=0.33)
    assert 50 < first / last < 200
