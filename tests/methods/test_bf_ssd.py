"""BF-SSD: thirty steps of a reference written from its paper, its line search, and its rows."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from smezo_cli.methods.bf_ssd import BFSSD, TwoFidelities
from smezo_cli.zo.move import Gradient, Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key
from tests.methods.reference import weights64, z_of
from tests.zo.test_optimizer import X, Y, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = [0, 4, 8, 12]  # of sixteen rows


class Losses:
    """The loss of all rows of a network; under the name "low" that of a few."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.made = 0

    def _loss(self, rows: Sequence[int] | slice) -> Tensor:
        self.made += 1
        return (self._model(X[rows]).double() - Y[rows]).square().mean()

    def __call__(self) -> Tensor:
        return self._loss(slice(None))

    def of(self, objective: str) -> Callable[[], Tensor]:
        assert objective == "low"
        return lambda: self._loss(LOW)


def made(model: nn.Module, **more: Any) -> BFSSD:
    given = {"lr": 0.4, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return BFSSD(model, **given | more)


def reference(
    num: int, lr: float, decay: float, points: int, tries: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Thirty steps in float64, and the factor of lr that each of them took."""
    net, eps, rho, c, beta = mlp().double(), 1e-3, 0.7, 0.3, 0.5

    def loss(at: dict[str, Tensor], rows: Sequence[int] = range(16)) -> float:
        out = functional_call(net, at, X[rows].double())
        return float((out - Y[rows].double()).square().mean().detach())

    theta, factors = weights64(net), []
    for step in range(30):
        here = loss(theta)
        z = [{n: x / num**0.5 for n, x in z_of(theta, step, j).items()} for j in range(num)]
        h = eps * num**0.5  # columns u_j = z_j / sqrt(l), so that E[P P^T] = I
        p = [(loss({n: x + h * u[n] for n, x in theta.items()}) - here) / h for u in z]
        g = {n: sum(a * u[n] for a, u in zip(p, z, strict=True)) for n in theta}
        slope = sum(a * a for a in p)

        def at(
            a: float, theta: dict[str, Tensor] = theta, g: dict[str, Any] = g
        ) -> dict[str, Tensor]:
            return {n: x - a * lr * (g[n] + decay * x) for n, x in theta.items()}

        places = torch.linspace(0, 1, points + 1, dtype=torch.float64)
        rest = [loss(at(float(a))) - rho * loss(at(float(a)), LOW) for a in places]
        chosen = 0.0
        for k in range(tries):
            a = beta**k
            i = min(int(a * points), points - 1)
            r = rest[i] + (a * points - i) * (rest[i + 1] - rest[i])
            if rho * loss(at(a), LOW) + r <= here - c * a * lr * slope:
                chosen = a
                break
        theta = at(chosen)
        factors.append(chosen)
    return theta, factors


@pytest.mark.parametrize(
    ("queries", "lr", "decay", "points", "tries"),
    [(4, 0.4, 0.0, 1, 6), (3, 0.8, 0.05, 3, 3)],
)
def test_thirty_steps_are_those_of_the_paper(
    queries: int, lr: float, decay: float, points: int, tries: int
) -> None:
    """Within 2e-3: eps 1e-3 makes 1e-4 of the rounding of float32 weights in p, and lr is large.

    The factors are the same; both short steps and, with few tries, none at all are among them.
    """
    model, options = mlp(), {"armijo": 0.3, "rho": 0.7, "lr": lr, "weight_decay": decay}
    opt = made(model, num_queries=queries, high_points=points, max_tries=tries, **options)
    closure, found = Losses(model), []
    for _ in range(30):
        closure.made = 0
        record = opt.step(closure)
        assert closure.made == record.num_forwards
        assert len(record.projected_grad) == queries
        found.append(record.scalars[-1])
    expected, factors = reference(queries, lr, decay, points, tries)
    assert found == factors
    assert {1.0, 0.5} <= set(factors) if tries > 3 else 0.0 in factors
    start = weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, expected[name], atol=2e-3, rtol=0)
        assert (x - start[name]).abs().max() > 0.02


class Along:
    """Answers with two losses as functions of how far along a step of lr a point is."""

    eps, step = 1e-3, 0

    def __init__(self, high: Callable[[float], float], low: Callable[[float], float]) -> None:
        self._by_name = {"batch": high, "low": low}
        self.asked: list[tuple[str, float]] = []

    def losses(
        self, groups: Sequence[Sequence[Move]], objective: str = "batch"
    ) -> list[list[float]]:
        found = []
        for (move,) in groups:
            far = -move.terms[0].coefficient if move.terms else 0.0
            self.asked.append((objective, far))
            found.append([self._by_name[objective](far)])
        return found


@pytest.mark.parametrize(
    ("points", "armijo", "factor"), [(1, 0.0, 0.5), (2, 0.0, 0.5), (4, 0.0, 0.5), (2, 0.6, 0.0)]
)
def test_the_search_asks_as_often_as_it_says(points: int, armijo: float, factor: float) -> None:
    """The batch's loss (a - 0.4)^2 is one above its low one, so the stand-in is the loss itself.

    At 1 it is above that at 0, at 0.5 below; a decrease of 0.6 times the slope 1 is had nowhere.
    """
    search = TwoFidelities(0.5, armijo, 5, 1.0, points)
    ask = Along(lambda a: (a - 0.4) ** 2 + 1, lambda a: (a - 0.4) ** 2)
    gradient = Gradient((Term(Key(0), 1.0),), also={"loss": 1.16})
    if armijo:
        gradient = Gradient((Term(Key(0), 1.0),) * 2, also={"loss": 1.16})  # slope 2
    assert search.measure(ask, gradient, 1.0, 0.0) == factor  # type: ignore[arg-type]  # asks for losses alone
    assert search.forwards(factor) == len(ask.asked) == len(set(ask.asked))
    high = [far for objective, far in ask.asked if objective == "batch"]
    assert high == [k / points for k in range(1, points + 1)]


def test_low_rows_are_spread_over_the_batch() -> None:
    """Of a mixture, whose parts follow each other, the low fidelity sees all parts."""
    opt = made(mlp(), low_rows=4)
    assert opt.rows_of("low", 0, list(range(10, 26)), [1] * 40) == [10, 14, 18, 22]
    assert opt.rows_of("low", 0, [3, 9], [1] * 40) == [3, 9]


def test_the_mean_of_the_estimate_is_the_gradient() -> None:
    """On a linear loss, where forward differences are exact, over 20,000 draws of l = 3 columns.

    Within 5 standard errors; the columns z / sqrt(l) have E[P P^T] = I as a Haar frame has.
    """
    gradient = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    key = torch.tensor(stream_key(0, "z", 0, 0, "w"))
    z = draw(torch.arange(240_000), 240_000, key, "gaussian").double().view(20_000, 3, 4)
    estimates = ((z @ gradient)[..., None] * z).mean(1)
    error = estimates.std(0) / 20_000**0.5
    assert ((estimates.mean(0) - gradient).abs() < 5 * error).all()
    opt = made(nn.Linear(4, 1, bias=False), num_queries=3)
    read = opt.estimator.read([1.0, 2.0, 3.0, 9.0], 0)
    assert [t.coefficient / read.divisor for t in read.terms] == [1 / 3, 2 / 3, 1.0]


def test_in_place_it_is_refused() -> None:
    with pytest.raises(ValueError, match="executor=in_place measures two points along one dense"):
        made(mlp(), executor="in_place")
