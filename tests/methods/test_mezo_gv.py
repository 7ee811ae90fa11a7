"""MeZO-GV: thirty steps of a reference, and that v is what was probed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.mezo_gv import BestLessWorst, MeZOGV
from smezo_cli.zo.noise import draw, stream_key
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def mezo_gv(model: nn.Module, **more: Any) -> MeZOGV:
    given: dict[str, Any] = {"lr": 1e-3, "eps": 1e-2, "backend": "eager", "check": False}
    given |= {"executor": "sequential"}
    return MeZOGV(model, **given | more)


@pytest.mark.parametrize(("num", "decay"), [(3, 0.0), (5, 0.1)])
def test_thirty_steps_are_those_of_the_paper(num: int, decay: float) -> None:
    """With the same best and worst; within 1e-4: p is known to some 1e-5 at eps 1e-2."""
    model = mlp()
    opt = mezo_gv(model, num_candidates=num, weight_decay=decay)
    theta, lr, eps = weights64(mlp()), 1e-3, 1e-2
    for step in range(30):
        z = [z_of(theta, step, k) for k in range(num)]
        losses = [loss64({n: x + eps * z[k][n] for n, x in theta.items()}) for k in range(num)]
        best, worst = losses.index(min(losses)), losses.index(max(losses))
        v = {n: z[best][n] - z[worst][n] for n in theta}
        plus, minus = ({n: x + s * eps * v[n] for n, x in theta.items()} for s in (1, -1))
        p = (loss64(plus) - loss64(minus)) / (2 * eps)
        theta = {n: x - lr * (p * v[n] + decay * x) for n, x in theta.items()}
        record = opt.step(closure_of(model))
        assert record.scalars[1:] == (best, worst)
        assert record.projected_grad == (record.scalars[0], -record.scalars[0])
        assert record.num_forwards == num + 2
    start = weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, theta[name], atol=1e-4, rtol=0)
        assert (x - start[name]).abs().max() > 0.01


class Alike(nn.Module):
    """Several matrices of one shape, as the layers of a model have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(6))
        self.seen: list[list[Tensor]] = []

    def forward(self) -> Tensor:
        x = torch.eye(12)
        self.seen.append([layer(x).T.detach().double().flatten() for layer in self.layers])
        y = torch.linspace(-1, 1, 12)
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return y.double().square().sum()


def test_v_is_the_difference_of_what_was_probed_in_every_tensor() -> None:
    """The released code's is in the first tensor alone: over 24 alike the cosine is 1/24."""
    model = Alike()
    eps, lr = 0.5, 1e-2
    opt = mezo_gv(model, eps=eps, lr=lr)
    before = [layer.weight.detach().double().flatten() for layer in model.layers]  # type: ignore[operator]  # a parameter
    record = opt.step(model)
    p, best, worst = record.scalars
    moved = [
        [(x - w) / eps for x, w in zip(point, before, strict=True)] for point in model.seen[:6]
    ]
    z, (plus, minus) = moved[:4], moved[4:]
    for i, w in enumerate(before):
        v = z[int(best)][i] - z[int(worst)][i]
        # Copies of weights are float32.
        torch.testing.assert_close(plus[i], v, atol=1e-5, rtol=0)
        torch.testing.assert_close(minus[i], -v, atol=1e-5, rtol=0)
        after = model.layers[i].weight.detach().double().flatten()  # type: ignore[operator]  # a parameter
        torch.testing.assert_close(after - w, -lr * p * v, atol=1e-6, rtol=1e-3)
    v_all = torch.cat(plus)
    assert v_all.square().mean() == pytest.approx(2, rel=0.2)  # |v|^2 = 2 d, d = 864
    # Tensors of one shape have directions of their own: cosines of 144 entries.
    assert all(abs(float(torch.cosine_similarity(plus[0], x, 0))) < 0.5 for x in plus[1:])


@pytest.mark.parametrize(("num", "multiple"), [(3, 2 + 3 * math.sqrt(3) / math.pi), (4, 5.013)])
def test_the_mean_of_the_estimate_is_a_known_multiple_of_the_gradient(
    num: int, multiple: float
) -> None:
    """On a linear loss, over 20,000 steps within 5 standard errors: E[R^2], R the range of K.

    That of three is 2 + 3 sqrt(3) / pi; of four 0.7741 + 2.0588^2, the variance and the mean.
    """
    steps, g = 20_000, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    keys = [[stream_key(0, "z", t, k, "w") for k in range(num)] for t in range(steps)]
    words = torch.tensor(keys).permute(2, 0, 1)[..., None]
    z = draw(torch.arange(4), 4, words, "gaussian").double()
    slopes = (z @ g).tolist()

    class Linear:
        eps, step = 1e-3, 0

        def losses(self, groups: Any) -> list[list[float]]:
            of = slopes[self.step]
            return [
                [sum(t.coefficient * of[t.key.query] for t in m.terms) for m in p] for p in groups
            ]

    estimator, ask = BestLessWorst(num), Linear()
    found = torch.zeros(steps, 4, dtype=torch.float64)
    for step in range(steps):
        ask.step = step
        for term in estimator.read(estimator.measure(ask), step).terms:  # type: ignore[arg-type]  # asks for losses alone
            found[step] += term.coefficient * z[step, term.key.query]
    error = found.std(0) / steps**0.5
    assert ((found.mean(0) - multiple * g).abs() < 5 * error).all()
    assert error.norm() < 0.05 * multiple * g.norm()


def test_equal_losses_have_a_best_and_a_worst_and_move_nothing() -> None:
    model = mlp()
    opt, before = mezo_gv(model), weights_of(model)
    assert opt.step(lambda: torch.ones(()).double()).scalars == (0.0, 0.0, 3.0)
    assert same(weights_of(model), before)


def test_lockstep_gives_the_same_steps() -> None:
    found = []
    for executor in ("sequential", "lockstep"):
        model = mlp()
        opt = mezo_gv(model, executor=executor)
        found.append(([opt.step(closure_of(model)) for _ in range(3)], weights_of(model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_candidates": 2}, "num_candidates=2: must be at least 3"),
        ({"executor": "in_place"}, "executor=in_place measures two points"),
        ({"keep_noise": True}, "keep_noise=true needs num_queries=1"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mezo_gv(mlp(), **options)
