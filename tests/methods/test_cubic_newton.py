"""Cubic Newton: the step in k directions, its solver, and thirty steps of a reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.cubic_newton import CubicNewton, cubic_step, eigen
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> CubicNewton:
    given = {"lr": 0.5, "eps": 1e-2, "backend": "eager", "executor": "sequential", "check": False}
    return CubicNewton(model, **given | more)


def value(s: Tensor, g: Tensor, h: Tensor, cubic: float) -> Tensor:
    """The model that a step minimises, at rows of s."""
    return s @ g + ((s @ h) * s).sum(-1) / 2 + cubic / 6 * s.norm(dim=-1) ** 3


def minimum(g: Tensor, h: Tensor, cubic: float) -> Tensor:
    """Its minimum, by solving (H + a I) s = -g for the a that is M |s| / 2 (bisection)."""
    eye = torch.eye(len(g), dtype=torch.float64)
    low = max(0.0, -float(torch.linalg.eigvalsh(h)[0]))
    high = low + 1e3
    for _ in range(200):
        a = (low + high) / 2
        s = -torch.linalg.solve(h + a * eye, g)
        low, high = (low, a) if float(s.norm()) * cubic / 2 <= a else (a, high)
    return -torch.linalg.solve(h + high * eye, g)


def reference(k: int, lr: float, eps: float, cubic: float, decay: float) -> dict[str, Tensor]:
    """Thirty steps in float64, with unit directions u = z / sqrt(d) and probes of length h."""
    theta = weights64(mlp())
    root = math.sqrt(sum(x.numel() for x in theta.values()))
    h = eps * root
    for step in range(30):
        u = [{n: x / root for n, x in z_of(theta, step, i).items()} for i in range(k)]

        def loss(
            *c: float, theta: dict[str, Tensor] = theta, u: list[dict[str, Tensor]] = u
        ) -> float:
            return loss64(
                {n: x + sum(a * v[n] for a, v in zip(c, u, strict=True)) for n, x in theta.items()}
            )

        e = (h * torch.eye(k, dtype=torch.float64)).unbind()
        zero = 0 * e[0]
        g = torch.tensor([(loss(*x) - loss(*-x)) / (2 * h) for x in e], dtype=torch.float64)
        hessian = torch.zeros(k, k, dtype=torch.float64)
        for i, x in enumerate(e):
            hessian[i, i] = (loss(*x) - 2 * loss(*zero) + loss(*-x)) / h**2
            for j, y in enumerate(e[:i]):
                four = loss(*x + y) - loss(*x - y) - loss(*y - x) + loss(*-x - y)
                hessian[i, j] = hessian[j, i] = four / (4 * h**2)
        s = minimum(g, hessian, cubic)
        theta = {
            n: x + lr * (sum(a * v[n] for a, v in zip(s, u, strict=True)) - decay * x)
            for n, x in theta.items()
        }
    return theta


@pytest.mark.parametrize(("k", "cubic", "decay"), [(1, 0.1, 0.0), (3, 1.0, 0.01)])
def test_thirty_steps_are_those_of_the_paper(k: int, cubic: float, decay: float) -> None:
    """Within 1e-4: rounding of float32 weights makes 1e-5 of H; later steps feel earlier ones."""
    model = mlp()
    opt = made(model, num_queries=k, cubic=cubic, weight_decay=decay)
    for _ in range(30):
        record = opt.step(closure_of(model))
        assert record.num_forwards == 1 + 2 * k * k
        assert len(record.scalars) == k + k * (k + 1) // 2
        assert len(record.projected_grad) == k
    expected, start = reference(k, 0.5, 1e-2, cubic, decay), weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, expected[name], atol=1e-4, rtol=0)
        assert (x - start[name]).abs().max() > 0.05


class Quadratic(nn.Module):
    """w.A w / 2 + b.w in five weights, indefinite."""

    def __init__(self) -> None:
        super().__init__()
        raw = torch.randn(5, 5, generator=seeded(1), dtype=torch.float64)
        self.a, self.b = raw + raw.T, torch.randn(5, generator=seeded(2), dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(5, generator=seeded(3)))

    def forward(self) -> Tensor:
        w = self.w.double()
        return w @ self.a @ w / 2 + self.b @ w


def test_the_scalars_are_slopes_and_curvatures() -> None:
    """Of a quadratic up to rounding: weights are float32, h is 0.2, so 1e-7 / h^2 = 3e-6 each."""
    model = Quadratic()
    opt = made(model, num_queries=3, eps=0.1)
    with torch.no_grad():
        slope = model.a @ model.w.double() + model.b
    scalars = opt.step(model).scalars
    u = [z_of({"w": model.w}, 0, i)["w"] / math.sqrt(5) for i in range(3)]
    pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
    expected = [float(x @ slope) for x in u]
    expected += [float(u[i] @ model.a @ u[j]) for i, j in pairs]
    assert scalars == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.5


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_the_step_is_the_minimum_of_its_model(k: int) -> None:
    """Against another solver, to 1e-8, and below 4000 points around it; H is indefinite."""
    for seed in range(4):
        raw = torch.randn(k, k, generator=seeded(seed), dtype=torch.float64)
        g = torch.randn(k, generator=seeded(seed + 9), dtype=torch.float64)
        h, cubic = raw + raw.T, 0.1 * 4**seed
        s = torch.tensor(cubic_step(g.tolist(), h.tolist(), cubic), dtype=torch.float64)
        torch.testing.assert_close(s, minimum(g, h, cubic), atol=1e-8, rtol=1e-6)
        around = s + torch.randn(4000, k, generator=seeded(5), dtype=torch.float64) * s.norm()
        assert (value(around, g, h, cubic) >= value(s[None], g, h, cubic)).all()


def test_a_saddle_is_left_though_the_gradient_says_nothing() -> None:
    """At g = 0, and where g has no share along negative curvature: there |s| = 2 a / M."""
    assert cubic_step([0.0, 0.0], [[1.0, 0.0], [0.0, -3.0]], 2.0) == pytest.approx([0.0, 3.0])
    s = cubic_step([1.0, 0.0], [[2.0, 0.0], [0.0, -4.0]], 2.0)
    assert s[0] == pytest.approx(-1 / 6)
    assert math.hypot(*s) == pytest.approx(4.0)
    assert cubic_step([0.0, 0.0], [[1.0, 0.0], [0.0, 3.0]], 2.0) == [0.0, 0.0]
    assert cubic_step([2.0], [[0.0]], 1.0) == pytest.approx([-2.0])  # g + M |s| s / 2 = 0


def test_eigenvectors_make_the_matrix() -> None:
    raw = torch.randn(16, 16, generator=seeded(7), dtype=torch.float64)
    matrix = raw + raw.T
    values, vectors = (torch.tensor(x, dtype=torch.float64) for x in eigen(matrix.tolist()))
    torch.testing.assert_close(vectors.T @ torch.diag(values) @ vectors, matrix, atol=1e-12, rtol=0)


def test_more_weights_than_it_can_take_are_refused() -> None:
    large = nn.Linear(1000, 101, bias=False)
    with pytest.raises(ValueError, match=r"101,000 weights are trained.*at most 100,000.*freeze"):
        made(large)
    made(nn.Sequential(large, nn.Linear(3, 3)), freeze=["0.*"])
    with pytest.raises(ValueError, match="num_queries=17: 1 to 16"):
        made(mlp(), num_queries=17)
