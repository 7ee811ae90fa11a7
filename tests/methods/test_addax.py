"""Addax against a reference in float64, its batches, and the memory of its gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.errors import UserError
from smezo_cli.methods.addax import Addax
from smezo_cli.zo.step import NonFiniteLoss
from tests.methods.reference import weights64, z_of
from tests.zo.test_optimizer import X, Y, bits, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


class Losses:
    """Squared error over the first rows ("short") or the last ones ("long")."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self) -> Tensor:
        raise AssertionError("the run's own batch is not asked for")

    def of(self, objective: str) -> Callable[[], Tensor]:
        rows = {"short": slice(0, 3), "long": slice(3, None)}[objective]

        def loss() -> Tensor:
            dtype = next(self._model.parameters()).dtype
            return (self._model(X[rows].to(dtype)).double() - Y[rows]).square().mean()

        return loss


def made(model: nn.Module, **more: Any) -> Addax:
    given = {"lr": 2e-2, "eps": 1e-3, "alpha": 0.3, "backend": "eager", "check": False}
    return Addax(model, **given | {"executor": "sequential"} | more)


def test_thirty_steps_are_those_of_the_paper() -> None:
    """alpha of MeZO's estimate on long rows, the rest of the gradient on short ones, at theta_t."""
    model, twin = mlp(), mlp().double()
    opt = made(model, weight_decay=0.1)
    for step in range(30):
        record = opt.step(Losses(model))
        assert record.num_forwards == 3
        named = dict(twin.named_parameters())
        gradients = torch.autograd.grad(Losses(twin).of("short")(), list(named.values()))
        start, z, losses = weights64(twin), z_of(weights64(twin), step), []
        with torch.no_grad():
            for sign in (1, -1):
                for name, p in named.items():
                    p.copy_(start[name] + sign * 1e-3 * z[name])
                losses.append(float(Losses(twin).of("long")()))
            slope = (losses[0] - losses[1]) / 2e-3
            for (name, p), g in zip(named.items(), gradients, strict=True):
                move = 0.3 * slope * z[name] + 0.7 * g + 0.1 * start[name]
                p.copy_(start[name] - 2e-2 * move)
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, weights64(twin)[name], rtol=0, atol=3e-4)
        assert (found - weights64(mlp())[name]).abs().max() > 1e-2


def test_a_gradient_is_dropped_as_soon_as_its_tensor_has_moved() -> None:
    """While one tensor moves, no other holds a gradient: that of the model is never whole."""
    model = mlp()
    opt = made(model)
    held: list[int] = []
    hooks = [
        p.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(q.grad is not None for q in model.parameters()))
        )
        for p in model.parameters()
    ]
    opt.step(Losses(model))
    assert len(held) == len(hooks)
    assert max(held) == 1
    assert all(p.grad is None for p in model.parameters())


LENGTHS = [5, 30, 8, 41, 12, 33, 7, 50]


def test_long_and_short_rows_are_told_apart_and_all_come_up() -> None:
    opt = made(mlp(), long_above=20, long_rows=3, short_rows=2)
    drawn = {"long": list[int](), "short": list[int]()}
    for step in range(4):
        for kind, size in (("long", 3), ("short", 2)):
            rows = opt.rows_of(kind, step, [0], LENGTHS)
            assert len(rows) == size
            drawn[kind] += rows
    assert set(drawn["long"]) == {1, 3, 5, 7}
    assert set(drawn["short"]) == {0, 2, 4, 6}
    assert sorted(drawn["long"][:4]) == [1, 3, 5, 7]  # an epoch
    again = made(mlp(), long_above=20, long_rows=3, short_rows=2)
    assert list(again.rows_of("long", 3, [0], LENGTHS)) == drawn["long"][9:]


def test_without_the_split_both_take_all_rows() -> None:
    opt = made(mlp(), long_rows=8, short_rows=8)
    assert sorted(opt.rows_of("long", 0, [0], LENGTHS)) == list(range(8))
    assert sorted(opt.rows_of("short", 0, [0], LENGTHS)) == list(range(8))
    assert opt.rows_of("long", 0, [0], LENGTHS) != opt.rows_of("short", 0, [0], LENGTHS)


def test_a_length_that_no_row_has_is_one_sentence() -> None:
    opt = made(mlp(), long_above=100)
    with pytest.raises(UserError, match=r"no train row is long; they have 5 to 50 tokens"):
        opt.rows_of("long", 0, [0], LENGTHS)


def test_half_precision_and_a_kept_order_of_writes() -> None:
    """In bfloat16 two runs are equal bit for bit, and the weights move."""
    found = []
    for _ in range(2):
        model = mlp(torch.bfloat16)
        opt = made(model)
        for _ in range(3):
            opt.step(Losses(model))
        found.append([bits(p) for p in model.parameters()])
    assert all(map(torch.equal, *found))
    assert not any(map(torch.equal, found[0], (bits(p) for p in mlp(torch.bfloat16).parameters())))


def test_all_weights_are_active_once() -> None:
    assert made(mlp()).active_share() == 1.0


def test_float16_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"0.weight is float16, which has no room for gradients"):
        made(mlp(torch.float16))


def test_stochastic_rounding_moves_what_is_below_half_an_ulp() -> None:
    """Weights that nearest rounding leaves where they are move by chance; the same ones again."""
    moved: dict[str, list[Tensor]] = {}
    for rounding in ("nearest", "stochastic", "stochastic"):
        model = mlp(torch.bfloat16)
        made(model, lr=3e-3, alpha=0.0, rounding=rounding).step(Losses(model))
        found = torch.cat([bits(p).view(-1) for p in model.parameters()])
        start = torch.cat([bits(p).view(-1) for p in mlp(torch.bfloat16).parameters()])
        moved.setdefault(rounding, []).append(found != start)
    assert (moved["stochastic"][0] & ~moved["nearest"][0]).any()
    assert torch.equal(*moved["stochastic"])


def test_a_gradient_that_is_not_finite_ends_the_step() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self) -> Tensor:
            return self.w.double().abs().sqrt().sum()

    class OfRoot:
        def __init__(self, model: Root) -> None:
            self._model = model

        def __call__(self) -> Tensor:
            return self._model()  # type: ignore[no-any-return]  # a module's

        def of(self, objective: str) -> Callable[[], Tensor]:
            return lambda: self._model() if objective == "short" else torch.ones(())

    model = Root()
    with pytest.raises(NonFiniteLoss, match="the gradient of w at step 0 is not finite"):
        made(model).step(OfRoot(model))
    assert not model.w.any()
    assert model.w.grad is None
