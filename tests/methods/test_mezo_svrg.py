"""MeZO-SVRG against a reference written from its paper, and what its released code gets wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.mezo_svrg import MeZOSVRG
from smezo_cli.zo.noise import draw, stream_key
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = torch.randn(24, 6, generator=seeded(1), dtype=torch.float64)
GOALS = torch.randn(24, generator=seeded(2), dtype=torch.float64)


class Net(nn.Module):
    """Two tensors, a loss over some of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, generator=seeded(3)))
        self.b = nn.Parameter(torch.randn(1, generator=seeded(4)))

    def forward(self, rows: Sequence[int]) -> Tensor:
        x = torch.tanh(ROWS[rows] @ self.w.double() + self.b.double())
        return (x - GOALS[rows]).square().mean()


class Losses:
    """The loss of a batch; of all rows under the name "full"."""

    def __init__(self, model: nn.Module, batch: Sequence[int]) -> None:
        self._model, self._batch = model, batch

    def __call__(self) -> Tensor:
        return self._model(self._batch)  # type: ignore[no-any-return]  # a module's

    def of(self, objective: str) -> Callable[[], Tensor]:
        assert objective == "full"
        return lambda: self._model(range(24))


def batch_of(step: int) -> list[int]:
    return [(5 * step + i) % 24 for i in range(4)]


def normal(numel: int, key: Tensor) -> Tensor:
    return draw(torch.arange(numel), numel, key, "gaussian")


def z_of(model: nn.Module, step: int, query: int = 0) -> dict[str, Tensor]:
    return {
        name: normal(p.numel(), torch.tensor(stream_key(0, "z", step, query, name))).double()
        for name, p in model.named_parameters()
    }


def reference(
    steps: int, every: int, queries: int, lr: float, factor: float, eps: float
) -> dict[str, Tensor]:
    """Algorithm 1 in float64, with a true copy as the anchor and one z at both points."""
    net = Net()
    theta = {name: p.detach().double() for name, p in net.named_parameters()}

    def loss(at: dict[str, Tensor], rows: Sequence[int]) -> float:
        x = torch.tanh(ROWS[rows] @ at["w"] + at["b"])
        return float((x - GOALS[rows]).square().mean())

    def spsa(at: dict[str, Tensor], rows: Sequence[int], z: dict[str, Tensor]) -> dict[str, Tensor]:
        plus, minus = ({n: at[n] + s * eps * z[n] for n in at} for s in (1, -1))
        p = (loss(plus, rows) - loss(minus, rows)) / (2 * eps)
        return {n: p * z[n] for n in at}

    anchor, g_anchor = theta, theta
    for step in range(steps):
        if step % every == 0:
            anchor = {n: x.clone() for n, x in theta.items()}
            found = [spsa(anchor, range(24), z_of(net, step, q)) for q in range(queries)]
            g_anchor = {n: sum(g[n] for g in found) / queries for n in theta}  # type: ignore[misc]  # tensors
            theta = {n: theta[n] - lr * g_anchor[n] for n in theta}
        else:
            z, rows = z_of(net, step), batch_of(step)
            here, there = spsa(theta, rows, z), spsa(anchor, rows, z)
            theta = {n: theta[n] - lr * factor * (here[n] - there[n] + g_anchor[n]) for n in theta}
    return theta


def made(model: nn.Module, **more: Any) -> MeZOSVRG:
    given = {"lr": 0.02, "eps": 1e-3, "backend": "eager", "executor": "sequential"}
    return MeZOSVRG(model, **given | more)


@pytest.mark.parametrize(("every", "queries"), [(2, 1), (5, 3), (1, 1)])
def test_thirty_steps_are_those_of_the_paper(every: int, queries: int) -> None:
    """Within 2e-4: weights are float32, and eps 1e-3 makes 1e-4 of their rounding in p."""
    model = Net()
    opt = made(model, anchor_every=every, num_queries=queries, batch_lr_factor=0.5)
    for step in range(30):
        opt.step(Losses(model, batch_of(step)))
    expected = reference(30, every, queries, 0.02, 0.5, 1e-3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=0, atol=2e-4)
        start = Net().get_parameter(name).detach().double()
        assert (expected[name] - start).abs().max() > 0.02  # and they have moved


def test_the_anchor_is_a_copy() -> None:
    """The released code's is a list of the live parameters, which move with the weights."""
    model = Net()
    opt = made(model, anchor_every=4)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        opt.step(Losses(model, batch_of(step)))
    for target in opt.targets:
        kept = opt.state_of_update.weights("anchor", target)
        assert torch.equal(kept, start[target.name].view(-1))
        assert not torch.equal(kept, target.flat)


def test_at_the_anchor_itself_a_batch_adds_no_noise() -> None:
    """One direction at both points: they cancel. The released code's two do not."""
    model = Net()
    opt = made(model, anchor_every=2, lr=1e-12)  # the weights stay at the anchor
    opt.step(Losses(model, batch_of(0)))
    record = opt.step(Losses(model, batch_of(1)))
    assert abs(record.scalars[0]) > 1e-2
    assert record.scalars[0] == record.scalars[1]
    assert record.projected_grad == (0.0,)


def test_between_anchors_the_difference_of_both_slopes_is_cut() -> None:
    """Each of the two may be far above the limit."""
    cut, free = Net(), Net()
    limited, unlimited = made(cut, clip_projected_grad=0.5), made(free)
    for opt in (limited, unlimited):
        opt.replay(0.02, [0.25, 0.0])
    limited.replay(0.02, [7.0, 6.0])
    unlimited.replay(0.02, [6.5, 6.0])
    for name, p in cut.named_parameters():
        torch.testing.assert_close(p, free.get_parameter(name), rtol=0, atol=1e-7)


def test_a_closure_of_one_loss_is_refused() -> None:
    model = Net()
    opt = made(model, check=False)
    with pytest.raises(TypeError, match=r"the closure has no of\(\)"):
        opt.step(lambda: model(range(4)))


def test_rows_of_the_anchor_are_a_fixed_draw() -> None:
    some = made(Net(), full_rows=7, seed=3)
    lengths = [1] * 24
    drawn = some.rows_of("full", 0, [0], lengths)
    assert len(set(drawn)) == 7
    assert list(drawn) == sorted(drawn) != list(range(7))
    assert drawn == some.rows_of("full", 4, [1], lengths)
    assert list(made(Net()).rows_of("full", 0, [0], lengths)) == list(range(24))


def test_the_anchor_estimate_is_unbiased_and_more_directions_are_quieter() -> None:
    """On a quadratic, over 20,000 draws of z: the mean is the gradient within 4 standard errors."""
    gradient = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    z = normal(80_000, torch.tensor(stream_key(0, "z", 0, 0, "w"))).double().view(20_000, 4)
    estimates = (z @ gradient)[:, None] * z
    error = estimates.std(0) / 20_000**0.5
    assert ((estimates.mean(0) - gradient).abs() < 4 * error).all()
    four = estimates.view(5_000, 4, 4).mean(1)
    assert (four.std(0) < 0.55 * estimates.std(0)).all()
