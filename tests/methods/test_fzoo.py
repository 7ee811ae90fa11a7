"""FZOO: its rule on the same signs, what the released code gets wrong, and its reuse of losses."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.fzoo import FZOO
from smezo_cli.zo.points import NotBatched
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import bits, closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def fzoo(model: nn.Module, **more: Any) -> FZOO:
    given: dict[str, Any] = {"lr": 5e-3, "eps": 1e-3, "backend": "eager", "check": False}
    given |= {"executor": "sequential"}
    return FZOO(model, **given | more)


def reference(num: int, floor: float, decay: float, reuse: bool) -> tuple[Any, list[float]]:
    """Thirty steps in float64, with the sigma of each; signs are those of smezo's keys."""
    theta, lr, eps, sigmas = weights64(mlp()), 5e-3, 1e-3, list[float]()
    before = torch.zeros(0, dtype=torch.float64)
    for step in range(30):
        u = [z_of(theta, step, i, noise="rademacher") for i in range(num)]
        losses = [loss64({n: x + eps * u[i][n] for n, x in theta.items()}) for i in range(num)]
        d = torch.tensor(losses, dtype=torch.float64) - loss64(theta)
        sigmas.append(float(torch.cat([before, d]).std(correction=0)))
        if reuse:
            before = d
        divisor = num * max(sigmas[-1], floor)
        theta = {
            n: x - lr * (sum(d[i] * u[i][n] for i in range(num)) / divisor + decay * x)
            for n, x in theta.items()
        }
    return theta, sigmas


@pytest.mark.parametrize(
    ("queries", "floor", "decay", "reuse"),
    [(8, 1e-4, 0.0, False), (3, 2e-3, 0.05, False), (8, 1e-4, 0.0, True)],
)
def test_thirty_steps_are_those_of_the_rule(
    queries: int, floor: float, decay: float, reuse: bool
) -> None:
    """The baseline, 1/N, the population's sigma: the released code's rule, with a floor.

    Within 1e-3: float32 weights leave 1e-4 of rounding in a difference over eps, and sigma, of
    slopes of some 1, divides it; lr is 5e-3.
    """
    model = mlp()
    opt = fzoo(
        model, num_queries=queries, sigma_floor=floor, weight_decay=decay, reuse_losses=reuse
    )
    records = [opt.step(closure_of(model)) for _ in range(30)]
    num = queries // 2 if reuse else queries
    assert all(r.num_forwards == num + 1 and len(r.projected_grad) == num for r in records)
    wanted, sigmas = reference(num, floor, decay, reuse)
    assert min(sigmas) < floor < max(sigmas) if floor == 2e-3 else floor < min(sigmas)
    start = weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, wanted[name], atol=1e-3, rtol=0)
        assert (x - start[name]).abs().max() > 0.01


def test_what_is_probed_and_what_is_moved_are_the_same_signs() -> None:
    """The released parallel code draws signs without a seed, so its update has others."""
    model = nn.Linear(6, 4, bias=False)
    before = model.weight.detach().clone()
    opt: Any = fzoo(model, num_queries=2, lr=1e-3)
    probed: list[Tensor] = []
    x = torch.ones(3, 6)

    def loss() -> Tensor:
        (y,) = model(x)[:1]
        probed.append((model(torch.eye(6)).T.detach() - before) / 1e-3)
        return y.double().square().sum()

    record = opt.step(loss)
    u = [torch.round(p) for p in probed[1:]]
    assert not probed[0].any()
    assert all((a.abs() == 1).all() for a in u)
    d = [1e-3 * p for p in record.projected_grad]
    sigma = abs(d[0] - d[1]) / 2
    moved = -1e-3 * (d[0] * u[0] + d[1] * u[1]) / (2 * sigma)
    torch.testing.assert_close(model.weight.detach() - before, moved, atol=1e-6, rtol=1e-4)


class Bowl(nn.Module):
    """1/2 |w|^2 at its least: along any signs the loss rises by eps^2 d / 2, alike."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(32))

    def forward(self) -> Tensor:
        return self.w.double().square().sum() / 2


def test_a_flat_start_does_not_destroy_the_weights() -> None:
    """Differences of 1.6e-5 with no spread: the official formula divides by 0, or by rounding."""
    flat = Bowl()
    opt = fzoo(flat, lr=1e-2)
    record = opt.step(flat)
    differences = torch.tensor(record.projected_grad) * 1e-3
    assert differences.mean() == pytest.approx(1.6e-5, rel=1e-3)
    assert differences.std(correction=0) < 1e-11
    # At most lr times a difference over the floor, where all signs agree.
    assert 0 < flat.w.abs().max() <= 1e-2 * 1.6e-5 / 1e-4 * 1.01
    bare = Bowl()
    fzoo(bare, lr=1e-2, sigma_floor=1e-300).step(bare)
    assert not bare.w.abs().max() < 1e3

    model = mlp()
    opt, before = fzoo(model), weights_of(model)
    opt.step(lambda: torch.ones(()).double())  # sigma and all differences are 0
    assert same(weights_of(model), before)


def test_losses_of_the_step_before_enter_sigma_and_are_kept() -> None:
    """In the released code `losses` stays None. What is kept is plain JSON, and a replay has it."""
    model, other = mlp(), mlp()
    opt, replayed = fzoo(model, reuse_losses=True), fzoo(other, reuse_losses=True)
    first = opt.step(closure_of(model))
    kept = json.loads(json.dumps(opt.snapshot()[0]))
    assert kept["state"]["differences"] == [1e-3 * p for p in first.projected_grad]
    at_one = {n: p.detach().clone() for n, p in model.named_parameters()}
    second = opt.step(closure_of(model))
    for record in (first, second):
        replayed.replay(5e-3, record.scalars)
    assert same(weights_of(model), weights_of(other))

    def second_step_after(differences: list[float]) -> dict[str, Tensor]:
        again = mlp()
        again.load_state_dict(at_one)
        resumed = fzoo(again, reuse_losses=True)
        resumed.restore(kept | {"state": {"differences": differences}}, {})
        assert resumed.step(closure_of(again)).scalars == second.scalars
        return {name: bits(p) for name, p in again.named_parameters()}

    found = second_step_after(kept["state"]["differences"])
    assert same(found, weights_of(model))
    assert not same(second_step_after([10 * d for d in kept["state"]["differences"]]), found)


class Short(nn.Module):
    """A network that has no memory for the rows of more than so many points."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.net, self.most = mlp(), most
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x) // 16)
        if len(x) > 16 * self.most:
            raise MemoryError
        return self.net(x)  # type: ignore[no-any-return]  # a module's


def short(most: int) -> tuple[Short, Callable[[], Tensor]]:
    model = Short(most)
    x, y = torch.linspace(-1, 1, 96).view(16, 6), torch.ones(16, 3)
    return model, lambda: (model(x).double() - y).square().mean()


def test_a_batch_of_all_points_is_halved_where_memory_is_short() -> None:
    """The weights and eight points; then half as many, and so on; then as many as fitted."""
    found = []
    for most, executor in ((9, "batched"), (3, "batched"), (9, "sequential")):
        model, closure = short(most)
        opt = fzoo(model, executor=executor)
        found.append([opt.step(closure) for _ in range(2)])
        if most == 3:
            assert [n for n in model.seen if n > 1] == [2, 9, 5, 3, 3, 3, 3, 3, 3]
    for batched in found[:2]:
        for a, b in zip(batched, found[2], strict=True):
            # To rounding of losses of some 1, over eps.
            assert a.projected_grad == pytest.approx(b.projected_grad, abs=1e-3)
    assert FZOO(mlp(), lr=1e-3, eps=1e-3).executor == "batched"


def test_a_model_that_cannot_be_batched_is_refused_with_the_way_out() -> None:
    model = mlp()
    opt, before = fzoo(model, executor="batched"), weights_of(model)
    with pytest.raises(NotBatched, match=r"executor=batched cannot be used.*executor=sequential$"):
        opt.step(lambda: model(torch.ones(6)).double().mean())  # no rows
    assert same(weights_of(model), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_queries": 1}, "one loss has no spread"),
        ({"num_queries": 5, "reuse_losses": True}, "give an even number of at least 4"),
        ({"num_queries": 2, "reuse_losses": True}, "give an even number of at least 4"),
        ({"sigma_floor": 0.0}, "must be above 0"),
        ({"executor": "in_place"}, "executor=in_place measures two points"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fzoo(mlp(), **options)
