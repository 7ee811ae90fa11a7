"""AIM-ZO: a reference written from the paper, the bases that it learns, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.aim_zo import AIMZO
from smezo_cli.zo.move import Gradient, Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key, uniform_at
from smezo_cli.zo.step import NonFiniteLoss
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import X, closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def aim_zo(model: nn.Module, **options: Any) -> AIMZO:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "num_queries": 4, "basis_size": 5}
    defaults |= {"columns": 3, "shared_columns": 2, "seed": 7, "executor": "sequential"}
    return AIMZO(model, **(defaults | {"backend": "eager", "check": False} | options))


def gaussian(size: int, *parts: str | int) -> Tensor:
    key = torch.tensor(stream_key(7, *parts))
    return draw(torch.arange(size), size, key, "gaussian").double()


def shuffled(size: int, *parts: str | int) -> Tensor:
    return uniform_at(torch.arange(size), size, torch.tensor(stream_key(7, *parts))).argsort()


def frame(columns: Tensor) -> Tensor:
    """Gram and Schmidt."""
    q: list[Tensor] = []
    for x in columns.T:
        x = x - sum((y * (y @ x) for y in q), torch.zeros_like(x))
        q.append(x / x.norm())
    return torch.stack(q, 1)


def inputs(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the two linear layers of the network are given."""
    x = X.double()
    y = torch.tanh(x @ w["0.weight"].T + w["0.bias"])
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return {"0.weight": x, "3.weight": y * w["2.weight"] + w["2.bias"]}


def reference(
    w: dict[str, Tensor], steps: int, lr: float, eps: float, num: int, every: int, oja: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method as the paper has it, in float64, by smezo's keys; weights and bases."""
    size, k, h = 5, 3, 2
    q = {}
    for name, n in (("0.weight", 6), ("3.weight", 11)):
        q[name] = frame(gaussian(size * n, "basis", 0, 0, name).view(size, n).T)
    for t in range(steps):
        if t % every == 0:
            for name, x in inputs(w).items():
                c = x.T @ x
                q[name] = frame(q[name] + oja * len(c) * c @ q[name] / c.trace())
        z, y = [], []
        for i in range(num):
            z.append(z_of(w, t, i, seed=7))
            for name, x in q.items():
                m = len(w[name])
                ab = gaussian(m + k, "z", t, i, name)
                tail = h + shuffled(size - h, "columns", t, i, name)[: k - h]
                u = torch.outer(ab[:m], torch.cat((x[:, :h], x[:, tail]), 1) @ ab[m:])
                z[-1][name] = u * w[name].numel() ** 0.5 / u.norm()
            y.append(loss64({name: x + eps * z[-1][name] for name, x in w.items()}))
        mean = sum(y) / num
        for name in w:
            g = sum((y[i] - mean) * z[i][name] for i in range(num)) / ((num - 1) * eps)
            w = w | {name: w[name] - lr * g}
    return w, q


@pytest.mark.parametrize(("every", "oja"), [(1, 1.0), (3, 0.3)])
def test_steps_are_those_of_the_paper(every: int, oja: float) -> None:
    """30 steps. Losses in float32 are known to 3e-7, so slopes at eps = 0.01 to 3e-5.

    Then a step of lr = 1e-2 along entries of up to 4 moves a weight by 1e-6 too far at most, and 30
    of them by 4e-5; bases differ by rounding.
    """
    model = mlp()
    before = weights64(model)
    opt = aim_zo(model, basis_every=every, oja=oja)
    for _ in range(30):
        opt.step(closure_of(model))
    wanted, bases = reference(before, 30, 1e-2, 1e-2, 4, every, oja)
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, wanted[name], atol=1e-4, rtol=0)
        assert (x - before[name]).abs().mean() > 1e-2
    tensors = opt.snapshot()[1]
    for name, q in bases.items():
        found = tensors[f"{name}/basis"].view(q.shape[1], -1).T.double()
        torch.testing.assert_close(found, q, atol=1e-3, rtol=0)
    assert tensors["0.bias/basis"].numel() == 0
    assert opt.state_bytes == 4 * 5 * (6 + 11)


def test_probes_are_as_long_as_dense_noise_and_lie_in_the_basis() -> None:
    """To rounding in float32."""
    model = mlp()
    opt: Any = aim_zo(model)
    opt.step(closure_of(model))
    for target in opt.targets:
        if target.name not in ("0.weight", "3.weight"):
            continue
        basis = opt.direction.basis_of(target)
        torch.testing.assert_close(basis @ basis.T, torch.eye(5), atol=1e-6, rtol=0)
        taken = [set(opt.direction.chosen(target, Key(1, i)).tolist()) for i in range(8)]
        assert {len(of) for of in taken} == {3}
        assert set.intersection(*taken) == {0, 1}  # the leading h
        assert set.union(*taken) == {0, 1, 2, 3, 4}
        for i in range(3):
            u = opt.direction.factors_at(target, Key(1, i))
            product = u.left @ u.right
            size = target.parameter.numel() ** 0.5
            assert float(product.norm()) == pytest.approx(size, rel=1e-6)
            inside = product @ basis.T @ basis
            torch.testing.assert_close(inside, product, atol=1e-5, rtol=0)


def test_a_basis_finds_the_directions_of_most_variance() -> None:
    """Two of eight inputs vary ten times as much: within 30 forwards the basis is theirs.

    An error falls by (1 + 8 * 0.01 / 2) / (1 + 8 / 2) a forward, so that rounding is left.
    """
    model = nn.Linear(8, 3)
    x = torch.randn(500, 8, generator=seeded(5)) * torch.tensor([1, 10, 1, 1, 1, 10, 1, 1]) / 10
    opt: Any = aim_zo(model, basis_size=2, columns=2, lr=1e-8)
    for _ in range(30):
        opt.step(lambda: model(x).square().mean())
    found = opt.direction.basis_of(opt.targets[0])
    _, vectors = torch.linalg.eigh(x.T.double() @ x.double())
    cosines = torch.linalg.svdvals(found.double() @ vectors[:, -2:])
    assert cosines.min() > 1 - 1e-6


def test_micro_batches_are_seen_together() -> None:
    """Sums over tokens do not depend on who computes them, but for rounding in float32."""
    found = []
    for parts in (1, 4):
        model = mlp()
        opt: Any = aim_zo(model)
        with torch.no_grad(), opt.direction.watching():
            for part in X.chunk(parts):
                model(part)
        found.append({name: q.clone() for name, q in opt.direction.made.items()})
    for name, q in found[0].items():
        torch.testing.assert_close(q, found[1][name], atol=1e-5, rtol=0)


def test_a_forward_is_watched_in_every_so_many_steps_alone() -> None:
    model = mlp()
    opt = aim_zo(model, basis_every=3)
    kept, forwards = [], []
    for _ in range(6):
        forwards.append(opt.step(closure_of(model)).num_forwards)
        kept.append({name: x.clone() for name, x in opt.snapshot()[1].items()})
    assert forwards == [5, 4, 4, 5, 4, 4]
    assert same(kept[0], kept[2])
    assert same(kept[3], kept[5])
    assert not same(kept[2], kept[3])


def test_a_step_that_fails_keeps_the_basis_before() -> None:
    model = mlp()
    opt, closure, calls = aim_zo(model), closure_of(model), [0]
    opt.step(closure)
    before = {name: x.clone() for name, x in opt.snapshot()[1].items()}

    def failing() -> Tensor:
        calls[0] += 1
        return closure() * (float("nan") if calls[0] == 4 else 1.0)

    with pytest.raises(NonFiniteLoss):
        opt.step(failing)
    assert same(opt.snapshot()[1], before)
    again = mlp()
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    other = aim_zo(again)
    other.restore(*opt.snapshot())
    assert opt.step(closure) == other.step(closure_of(again))
    assert same(weights_of(model), weights_of(again))


@pytest.mark.parametrize("executor", ["side_path", "batched"])
def test_executors_without_copies_take_the_same_steps(executor: str) -> None:
    """To rounding of losses in float32, which is 1e-4 of a slope at eps = 0.01."""
    found = []
    for name in ("sequential", executor):
        model = mlp()
        opt = aim_zo(model, executor=name)
        found.append([opt.step(closure_of(model)).projected_grad for _ in range(3)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=5e-4)


def test_backends_move_weights_alike() -> None:
    found = []
    for backend in ("eager", "compiled"):
        model = mlp(torch.bfloat16)
        opt = aim_zo(model, backend=backend, rounding="stochastic")
        terms = Term(Key(0, 0), 0.1), Term(Key(0, 1), -0.2)
        opt.direction.apply(0, Gradient(terms, 3).move(-0.1, 0.01))
        found.append(weights_of(model))
    assert same(*found)


def test_what_does_not_fit_is_refused() -> None:
    for options, words in (
        ({"num_queries": 1}, "num_queries=1: must be at least 2"),
        ({"columns": 6}, "columns=6: at least shared_columns=2, and at most basis_size=5"),
        ({"shared_columns": 4}, "columns=3: at least shared_columns=4"),
        ({"executor": "in_place"}, "executor=in_place measures two points"),
    ):
        with pytest.raises(ValueError, match=words):
            aim_zo(mlp(), **options)
    with pytest.raises(ValueError, match="sums of directions alone"):
        aim_zo(mlp()).direction.change(0, Move(()), lambda target: lambda part, total: total)
