"""ZORO-FA: the decoding, a reference from its paper, and what its released code gets wrong."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods import zoro_fa
from smezo_cli.methods.zoro_fa import Round, ZoroFA, cosamp, rounds_of, solve
from smezo_cli.zo.move import Key
from tests.methods.reference import z_of
from tests.zo.test_optimizer import closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = torch.tensor([3, 77, 120, 199])  # of the 200 weights, those that the loss reads
CURVES = torch.tensor([3.0, 0.1, 0.1, 0.1], dtype=torch.float64)
GOALS = torch.tensor([1.0, -20.0, 15.0, 25.0], dtype=torch.float64)


def loss_at(flat: Tensor) -> Tensor:
    return (CURVES * (flat.double()[PLACES] - GOALS).square()).sum() / 2


class Sparse(nn.Module):
    """A loss of 200 weights in two tensors with a gradient of four entries."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(10, 15, dtype=dtype))
        self.a = nn.Parameter(torch.zeros(50, dtype=dtype))

    def flat(self) -> Tensor:
        return torch.cat([self.a, self.b.view(-1)])

    def forward(self) -> Tensor:
        return loss_at(self.flat())


def made(model: nn.Module, **more: Any) -> ZoroFA:
    given = {"lr": 0.9, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return ZoroFA(model, **given | {"oversampling": 1.5} | more)


def textbook_cosamp(a: Tensor, y: Tensor, s: int, iterations: int) -> Tensor:
    """CoSaMP of Needell and Tropp, by LAPACK's least squares."""
    x = torch.zeros(a.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        proxy = (a.T @ (y - a @ x)).abs()
        support = torch.cat([proxy.topk(2 * s).indices, x.nonzero()[:, 0]]).unique()
        b = torch.linalg.lstsq(a[:, support], y[:, None]).solution[:, 0]
        kept = b.abs().topk(s).indices
        x = torch.zeros_like(x)
        x[support[kept]] = b[kept]
    return x


def reference(lr: float, decay: float) -> tuple[Tensor, list[int]]:
    """Thirty steps in float64: all of a round is measured and decoded anew, Z scaled as in it."""
    shapes, eps, tolerance = Sparse(), 1e-3, 1e-3
    theta, taken = shapes.flat().detach().double(), []
    for step in range(30):
        here = float(loss_at(theta))
        for j in range(5):
            s = 4 * 2**j
            m = math.ceil(1.5 * s * math.log(200))
            z = [
                z_of(dict(shapes.named_parameters()), step, q, noise="rademacher") for q in range(m)
            ]
            signs = torch.stack([torch.cat([x["a"], x["b"].view(-1)]) for x in z])
            y = [(float(loss_at(theta + eps * x)) - here) / (eps * m**0.5) for x in signs]
            g = textbook_cosamp(signs / m**0.5, torch.tensor(y, dtype=torch.float64), s, 4)
            sigma = 2**j / lr
            there = theta - (g + decay * theta) / sigma
            if here - float(loss_at(there)) >= tolerance**2 / (2 * sigma):
                theta = there
                break
        taken.append(j)
    return theta, taken


def test_thirty_steps_are_those_of_the_paper() -> None:
    """Within 2e-3 after moves of up to 25.

    Slopes are off by eps times half the curvature, 2e-3, and the entries that are recovered beside
    the four true ones are of that size times lr; float32 decides which ones these are.
    """
    model = Sparse()
    opt = made(model, weight_decay=0.01)
    found = []
    for _ in range(30):
        record = opt.step(model)
        found.append(int(record.scalars[0]))
    expected, taken = reference(0.9, 0.01)
    assert found == taken
    assert {0, 1} <= set(found)
    torch.testing.assert_close(model.flat().detach().double(), expected, rtol=0, atol=2e-3)
    assert float(expected[PLACES].abs().max()) > 10


def test_a_sparse_vector_is_recovered_and_a_dense_one_by_least_squares() -> None:
    """To 1e-9: numbers are kept to 40 bits."""
    signs = torch.randint(0, 2, (60, 500), generator=seeded(1), dtype=torch.int8) * 2 - 1
    truth = torch.zeros(500, dtype=torch.float64)
    truth[[4, 99, 321]] = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    places, values = cosamp(signs, signs.double() @ truth, 5, 4)
    found = torch.zeros(500, dtype=torch.float64).index_put((places,), values)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-9)
    few, g = signs[:, :20], torch.randn(20, generator=seeded(2), dtype=torch.float64)
    noisy = few.double() @ g + torch.randn(60, generator=seeded(3), dtype=torch.float64)
    places, values = cosamp(few, noisy, 20, 4)
    best = torch.linalg.lstsq(few.double(), noisy[:, None]).solution[:, 0]
    assert places.tolist() == list(range(20))
    torch.testing.assert_close(values, best, rtol=0, atol=1e-9)


def test_the_order_of_sums_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order, and in other blocks, as other libraries would add them."""
    signs = torch.randint(0, 2, (60, 300), generator=seeded(1), dtype=torch.int8) * 2 - 1
    y = torch.randn(60, generator=seeded(2), dtype=torch.float64)
    places, values = cosamp(signs, y, 6, 4)
    order = torch.randperm(60, generator=seeded(3))
    monkeypatch.setattr(zoro_fa, "_CHUNK", 7 * 300)
    again = cosamp(signs[order], y[order], 6, 4)
    assert torch.equal(places, again[0])
    assert torch.equal(values, again[1])


def test_columns_that_say_nothing_new_get_nothing() -> None:
    a = torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, -1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    x = solve(a.T @ a, a.T @ torch.tensor([3.0, 1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(x, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))


def test_the_gradient_is_not_divided_by_the_root_of_the_measurements() -> None:
    """The released code probes delta z / sqrt(m) and divides by delta sqrt(m), under z / sqrt(m).

    So it decodes g / sqrt(m); with this mended, its formula and one step here are the same. The
    loss is quadratic: within 4e-3, eps times the curvature and rounding.
    """
    model = Sparse()
    opt = made(model, lr=0.1)
    record = opt.step(model)
    m = opt.estimator.rounds[0].measurements
    assert record.num_forwards == m + 2
    signs = opt.direction.signs([Key(0, q) for q in range(m)]).double()  # type: ignore[attr-defined]  # its own
    start, delta = torch.zeros(200, dtype=torch.float64), 1e-3 * m**0.5
    phi = signs / m**0.5
    differences = [float(loss_at(start + delta * x) - loss_at(start)) for x in phi]
    y = torch.tensor(differences, dtype=torch.float64) / (delta * m**0.5)
    official, mended = (textbook_cosamp(phi, y * by, 4, 4) for by in (1.0, m**0.5))
    gradient = torch.zeros(200, dtype=torch.float64)
    gradient[PLACES] = -CURVES * GOALS
    ours = -model.flat().detach().double() / 0.1
    torch.testing.assert_close(ours, gradient, rtol=0, atol=4e-3)
    torch.testing.assert_close(mended, gradient, rtol=0, atol=4e-3)
    assert float((official - gradient).norm()) > 0.5 * float(gradient.norm())


def test_where_nothing_is_lower_the_weights_stay() -> None:
    """Rounds end at max_rounds, and measure no more than is allowed."""
    model = Sparse()
    opt = made(model, max_rounds=4, max_measurements=70)
    assert opt.estimator.rounds == [Round(4, 32), Round(8, 64), Round(8, 64), Round(8, 64)]
    before, calls = weights_of(model), [0]

    def rising() -> Tensor:
        calls[0] += 1
        return model() + calls[0] * 1e3

    record = opt.step(rising)
    assert record.scalars[0] == 4
    assert record.num_forwards == calls[0] == 1 + 64 + 4
    assert len(record.scalars) == opt.num_scalars == 65
    assert same(weights_of(model), before)


def test_the_rounds_of_a_step() -> None:
    """Sparsity doubles until measurements run out; where all can be solved for, all are."""
    assert rounds_of(20_000, 4, 1.0, 100, 4) == [Round(4, 40), Round(8, 80), *[Round(8, 80)] * 2]
    assert rounds_of(30, 4, 1.0, 256, 4) == [Round(4, 14), Round(8, 28), *[Round(30, 60)] * 2]
    assert rounds_of(1, 4, 1.0, 256, 1) == [Round(1, 2)]
    with pytest.raises(
        ValueError, match=r"max_measurements=30: num_entries=4 of 20,000 weights need 40"
    ):
        rounds_of(20_000, 4, 1.0, 30, 4)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_replay_decodes_the_same_bits(dtype: torch.dtype, rounding: str) -> None:
    """Also clipped, with decay, and by passes that are compiled."""
    options = {"rounding": rounding, "weight_decay": 0.1, "clip_projected_grad": 1.0, "lr": 0.1}
    model, again, compiled = mlp(dtype), mlp(dtype), mlp(dtype)
    opt, other = made(model, **options), made(again, **options)
    third = made(compiled, **options | {"backend": "compiled"})
    for _ in range(3):
        record = opt.step(closure_of(model))
        other.replay(0.1, record.scalars)
        assert third.step(closure_of(compiled)) == record
    assert same(weights_of(model), weights_of(again))
    assert same(weights_of(model), weights_of(compiled))
    assert not same(weights_of(model), weights_of(mlp(dtype)))


def test_more_weights_than_it_can_take_are_refused() -> None:
    large = nn.Linear(1000, 101, bias=False)
    with pytest.raises(ValueError, match=r"101,000 weights are trained.*at most 100,000.*freeze"):
        made(large)
    made(nn.Sequential(large, nn.Linear(3, 3)), freeze=["0.*"])
    with pytest.raises(ValueError, match="max_measurements=4001: at most 4000"):
        made(mlp(), max_measurements=4001)
