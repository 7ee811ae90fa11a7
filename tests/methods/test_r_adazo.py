"""R-AdaZO: thirty steps of a reference, and what tells it from Adam."""

from typing import Any

import pytest
import torch
from torch import nn

from smezo_cli.methods.mezo_adam import MeZOAdam
from smezo_cli.methods.r_adazo import RAdaZO
from tests.methods.reference import loss64, weights64, z_of
from tests.methods.test_every_method import node_of
from tests.zo.test_optimizer import closure_of, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def r_adazo(model: nn.Module, **more: Any) -> RAdaZO:
    given: dict[str, Any] = {"lr": 2e-3, "eps": 1e-2, "backend": "eager", "check": False}
    given |= {"executor": "sequential"}
    return RAdaZO(model, **given | more)


@pytest.mark.parametrize(
    ("queries", "betas", "decay", "corrects"),
    [
        (1, (0.9, 0.999), 0.0, True),
        (3, (0.5, 0.9), 0.1, True),
        (1, (0.5, 0.9), 0.0, False),
        (3, (0.9, 0.9), 0.1, False),
    ],
)
def test_thirty_steps_are_those_of_the_rule(
    queries: int, betas: tuple[float, float], decay: float, corrects: bool
) -> None:
    """Within 1e-3, half of lr: where m is near 0 its sign depends on rounding of 1e-5 in p.

    The released code corrects neither moment for its beginning at 0.
    """
    model = mlp()
    opt = r_adazo(model, num_queries=queries, betas=betas, weight_decay=decay, correct_v=corrects)
    theta, lr, eps, (b1, b2) = weights64(mlp()), 2e-3, 1e-2, betas
    m = {n: torch.zeros_like(x) for n, x in theta.items()}
    v = {n: torch.zeros_like(x) for n, x in theta.items()}
    for step in range(30):
        g = {n: torch.zeros_like(x) for n, x in theta.items()}
        for q in range(queries):
            z = z_of(theta, step, q)
            plus, minus = ({n: x + s * eps * z[n] for n, x in theta.items()} for s in (1, -1))
            p = (loss64(plus) - loss64(minus)) / (2 * eps)
            g = {n: x + p * z[n] / queries for n, x in g.items()}
        for n in theta:
            m[n] = b1 * m[n] + (1 - b1) * g[n]
            v[n] = b2 * v[n] + (1 - b2) * m[n] ** 2
            root = (v[n] / (1 - b2 ** (step + 1) if corrects else 1)).sqrt() + 1e-8
            theta[n] = theta[n] - lr * (m[n] / root + decay * theta[n])
        opt.step(closure_of(model))
    start, kept = weights64(mlp()), opt.snapshot()[1]
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, theta[name], atol=1e-3, rtol=0)
        assert (x - start[name]).abs().max() > 0.02
        for slot, wanted in (("exp_avg", m), ("exp_avg_sq", v)):
            size = wanted[name].abs().max().item()
            found = kept[f"{name}/{slot}"].double().view_as(x)
            torch.testing.assert_close(found, wanted[name], atol=1e-2 * size, rtol=0)


def test_the_second_moment_is_that_of_the_first() -> None:
    """Of noise the square of a mean is some 1/19 of the mean square that Adam keeps."""
    found = []
    for kind in (RAdaZO, MeZOAdam):
        model = mlp()
        # lr 1e-9: both see the same estimates.
        opt = kind(model, lr=1e-9, eps=1e-2, executor="sequential", backend="eager", check=False)
        for _ in range(100):
            opt.step(closure_of(model))
        found.append(sum(x.sum() for n, x in opt.snapshot()[1].items() if n.endswith("_sq")))
    assert 1 / 30 < found[0] / found[1] < 1 / 12


@pytest.mark.parametrize(("corrects", "length"), [(True, 1e-3), (False, 1e-3 / 0.001**0.5)])
def test_every_entry_of_the_first_step_is_as_long(corrects: bool, length: float) -> None:
    """lr, or 1 / sqrt(1 - beta2) times as much."""
    model = mlp()
    opt, before = r_adazo(model, lr=1e-3, correct_v=corrects), weights64(model)
    opt.step(closure_of(model))
    for name, x in weights64(model).items():
        moved = (x - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(x, length), atol=2e-6, rtol=1e-3)


def test_the_default_is_the_rule_of_the_released_code() -> None:
    node = node_of("r_adazo")
    assert not node["correct_v"]
    assert r_adazo(mlp()).identity() == r_adazo(mlp(), correct_v=False).identity()
    assert r_adazo(mlp()).identity() != r_adazo(mlp(), correct_v=True).identity()
