"""KerZOO: its kernel, thirty steps of a reference, and the bias that it takes away."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.kerzoo import KerZOO, RandomRadii, kernel
from smezo_cli.methods.mezo import MeZO
from smezo_cli.zo.move import Key
from smezo_cli.zo.noise import draw, stream_key
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

# Over [-1, 1] as a mean; exact for polynomials up to r^15.
NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
WEIGHTS = _WEIGHTS / 2


def kerzoo(model: nn.Module, **more: Any) -> KerZOO:
    given: dict[str, Any] = {"lr": 5e-3, "eps": 1e-2, "backend": "eager", "check": False}
    given |= {"executor": "sequential"}
    return KerZOO(model, **given | more)


def test_the_moments_of_the_kernel() -> None:
    """By Gauss and Legendre's quadrature, to rounding."""
    k = np.array([kernel(r) for r in NODES])
    for power, expected in ((1, 1.0), (3, 0.0), (0, 0.0), (2, 0.0)):
        assert WEIGHTS @ (NODES**power * k) == pytest.approx(expected, abs=1e-12)
    assert WEIGHTS @ (NODES * k) ** 2 == pytest.approx(6.25, rel=1e-12)


def test_radii_are_uniform_and_of_their_keys() -> None:
    """Of 20,000 the mean, the mean square 1/3 and the fourths lie within 5 standard errors."""
    estimator: Any = kerzoo(mlp(), num_queries=2, seed=3).estimator
    r = np.array([estimator.radius(Key(step, q)) for step in range(10_000) for q in range(2)])
    assert -1 <= r.min() < -0.999 < 0.999 < r.max() <= 1
    for found, mean, deviation in (
        (r, 0, 3**-0.5),
        (r**2, 1 / 3, (1 / 5 - 1 / 9) ** 0.5),
        (r < 0.5, 0.75, (3 / 16) ** 0.5),
        (r[::2] * r[1::2], 0, 1 / 3),
    ):
        assert abs(found.mean() - mean) < 5 * deviation / len(found) ** 0.5
    assert estimator.radius(Key(4, 1)) == stream_key(3, "radius", 4, 1)[0] / 2**63


@pytest.mark.parametrize(("queries", "decay"), [(1, 0.0), (3, 0.1)])
def test_thirty_steps_are_those_of_the_paper(queries: int, decay: float) -> None:
    """Within 2e-4: float32 weights leave some 1e-5 of rounding in d at eps 1e-2; K is up to 7.5."""
    model = mlp()
    opt = kerzoo(model, num_queries=queries, weight_decay=decay)
    theta, lr, eps = weights64(mlp()), 5e-3, 1e-2
    for step in range(30):
        record = opt.step(closure_of(model))
        assert record.num_forwards == 2 * queries
        g = {n: torch.zeros_like(x) for n, x in theta.items()}
        for q in range(queries):
            u, r = z_of(theta, step, q), stream_key(0, "radius", step, q)[0] / 2**63
            plus, minus = ({n: x + s * eps * r * u[n] for n, x in theta.items()} for s in (1, -1))
            d = (loss64(plus) - loss64(minus)) / (2 * eps)
            weight = 3.75 * r * (5 - 7 * r**2)
            g = {n: x + d * weight * u[n] / queries for n, x in g.items()}
            assert record.projected_grad[q] == pytest.approx(d * weight, abs=5e-2)
        theta = {n: x - lr * (g[n] + decay * x) for n, x in theta.items()}
    start = weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, theta[name], atol=2e-4, rtol=0)
        assert (x - start[name]).abs().max() > 0.01


class Quartic(nn.Module):
    """w^4 + w at 1, where the gradient is 5 and the third derivative 24."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self) -> Tensor:
        return (self.w.double() ** 4 + self.w.double()).sum()


def test_the_bias_of_eps_squared_is_gone_on_average() -> None:
    """Exactly: one sign, of which the estimate is free, and the mean over r by quadrature.

    MeZO's is 24 eps^2 / 6 = 0.25 off at eps 1/4; float32 weights leave 1e-6.
    """
    model = Quartic()
    options: dict[str, Any] = {"noise": "rademacher", "eps": 0.25, "lr": 1e-3}
    opt: Any = kerzoo(model, **options)
    opt._begin()
    ask, found = opt.meter(model), []
    for r in NODES:
        opt.estimator.radius = lambda key, r=float(r): r
        (term,) = opt.estimator.read(opt.estimator.measure(ask), 0).terms
        u, _ = opt.mover([0], [1.0]).dense(opt.targets[0])
        found.append(term.coefficient * u.item())
    assert WEIGHTS @ np.array(found) == pytest.approx(5.0, abs=1e-5)

    mezo: Any = MeZO(model, executor="sequential", backend="eager", check=False, **options)
    mezo._begin()
    (p,) = mezo.estimator.measure(mezo.meter(model))
    assert p * u.item() == pytest.approx(5.25, abs=1e-5)


def test_the_mean_of_the_estimate_is_the_gradient() -> None:
    """On a linear loss, over 20,000 directions, within 5 standard errors; noisier than MeZO's.

    Its second moment is 6.25 times MeZO's, whose is (d + 2) |g|^2: less the mean, in d = 4.
    """
    g = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    keys = torch.tensor([stream_key(0, "z", 0, q, "w") for q in range(20_000)])
    u = draw(torch.arange(4), 4, keys.T[..., None], "gaussian").double()
    slopes = (u @ g).tolist()

    class Linear:
        eps, step = 0.125, 0

        def losses(self, groups: Any) -> list[list[float]]:
            pairs = [[move.terms[0] for move in pair] for pair in groups]
            return [[t.coefficient * slopes[t.key.query] for t in pair] for pair in pairs]

    estimator, ask = RandomRadii(20_000, 0), Linear()
    gradient = estimator.read(estimator.measure(ask), 0)  # type: ignore[arg-type]  # asks for losses alone
    found = torch.tensor([t.coefficient for t in gradient.terms])[:, None] * u
    error = found.std(0) / 20_000**0.5
    assert ((found.mean(0) - g).abs() < 5 * error).all()
    # Of fourth powers of normals times (r K)^2: 20,000 draws know it to some 3%.
    assert found.square().sum(1).mean() == pytest.approx(6.25 * 6 * float(g @ g), rel=0.1)


def test_in_place_it_is_refused() -> None:
    with pytest.raises(ValueError, match="executor=in_place measures two points along one dense"):
        kerzoo(mlp(), executor="in_place")
