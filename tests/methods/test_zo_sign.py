"""ZO-SGD-Sign: a reference written from its paper, and the rule of its released code."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.zo_sign import ZOSign
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> ZOSign:
    given = {"lr": 1e-2, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return ZOSign(model, **given | more)


def reference(queries: int, decay: float, *, of: str) -> dict[str, Tensor]:
    """Thirty steps in float64: the sign of the mean estimate, or the mean of sign(p) z."""
    theta, lr, eps = weights64(mlp()), 1e-2, 1e-3
    for step in range(30):
        g = {n: torch.zeros_like(x) for n, x in theta.items()}
        for query in range(queries):
            z = z_of(theta, step, query)
            plus, minus = (
                loss64({n: x + s * eps * z[n] for n, x in theta.items()}) for s in (1, -1)
            )
            p = torch.tensor((plus - minus) / (2 * eps), dtype=torch.float64)
            for n in g:
                g[n] += (p if of == "elementwise" else p.sign()) * z[n] / queries
        for n, x in theta.items():
            theta[n] = x - lr * ((g[n].sign() if of == "elementwise" else g[n]) + decay * x)
    return theta


@pytest.mark.parametrize("sign", ["elementwise", "scalar"])
@pytest.mark.parametrize(("queries", "decay"), [(1, 0.0), (1, 0.5), (3, 0.1)])
def test_thirty_steps_are_those_of_the_reference(sign: str, queries: int, decay: float) -> None:
    """But for entries whose mean is next to 0: its sign may differ where p is off by 1e-4."""
    model = mlp()
    opt = made(model, sign=sign, num_queries=queries, weight_decay=decay)
    for _ in range(30):
        opt.step(closure_of(model))
    expected = reference(queries, decay, of=sign)
    off = total = 0
    for name, p in model.named_parameters():
        difference = (p.detach().double() - expected[name]).abs()
        assert difference.max() < 0.05  # two flips at most of 2 lr each
        off += int((difference > 2e-4).sum())
        total += p.numel()
    assert off <= (0.02 * total if queries > 1 and sign == "elementwise" else 0)


def test_every_weight_moves_by_lr() -> None:
    model = mlp()
    before = weights64(model)
    made(model, num_queries=2).step(closure_of(model))
    for name, x in weights64(model).items():
        # Weights of size 1 to 4 are stored to 2.4e-7.
        torch.testing.assert_close(
            (x - before[name]).abs(), torch.full_like(x, 1e-2), atol=3e-7, rtol=0
        )


def test_scalar_is_a_gaussian_step_and_elementwise_is_not() -> None:
    """The released code's formula on the same z: sign(p) z."""
    moves = {}
    for sign in ("scalar", "elementwise"):
        model = mlp()
        before = weights64(model)
        p = torch.tensor(made(model, sign=sign).step(closure_of(model)).projected_grad[0])
        moves[sign] = {n: x - before[n] for n, x in weights64(model).items()}
    for name, z in z_of(before, 0).items():
        torch.testing.assert_close(moves["scalar"][name], -1e-2 * p.sign() * z, atol=3e-7, rtol=0)
        assert (moves["scalar"][name] - moves["elementwise"][name]).abs().max() > 1e-3
        assert torch.equal(moves["scalar"][name].sign(), moves["elementwise"][name].sign())


def test_of_noise_that_is_signs_both_rules_are_one() -> None:
    models = [mlp(), mlp()]
    for model, sign in zip(models, ("scalar", "elementwise"), strict=True):
        opt = made(model, sign=sign, noise="rademacher")
        for _ in range(5):
            opt.step(closure_of(model))
    assert same(*map(weights_of, models))


@pytest.mark.parametrize("sign", ["elementwise", "scalar"])
def test_where_the_losses_are_equal_nothing_moves(sign: str) -> None:
    model = mlp()
    before = weights_of(model)
    made(model, sign=sign).step(lambda: torch.tensor(1.0))
    assert same(weights_of(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("sign", ["elementwise", "scalar"])
def test_other_ways_to_compute_give_the_same_bits(
    sign: str, rounding: str, dtype: torch.dtype
) -> None:
    """Lockstep, kept noise, compiled passes, a replay: weights of low precision, two queries."""
    options = {"sign": sign, "rounding": rounding, "num_queries": 2, "weight_decay": 0.1}
    model = mlp(dtype)
    opt = made(model, **options)
    records = [opt.step(closure_of(model)) for _ in range(3)]
    for way in ({"executor": "lockstep"}, {"backend": "compiled"}):
        again = mlp(dtype)
        other = made(again, **options | way)
        assert [other.step(closure_of(again)) for _ in range(3)] == records
        assert same(weights_of(again), weights_of(model))
    replayed = mlp(dtype)
    other = made(replayed, **options)
    for record in records:
        other.replay(1e-2, record.scalars)
    assert same(weights_of(replayed), weights_of(model))


def test_in_place_and_kept_noise_take_the_same_step() -> None:
    """In place the weights come back only to within some roundings of 1e-7."""
    found = []
    for options in ({}, {"keep_noise": True}, {"executor": "in_place"}):
        model = mlp()
        made(model, **options).step(closure_of(model))
        found.append(weights64(model))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name])
        torch.testing.assert_close(x, found[2][name], atol=1e-6, rtol=0)


def test_another_sign_is_refused() -> None:
    with pytest.raises(ValueError, match="sign=both: one of elementwise, scalar"):
        made(mlp(), sign="both")


@pytest.mark.parametrize("arguments", [{}, {"sign": "scalar", "num_queries": 3}])
def test_a_clip_that_signs_would_not_notice_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="what is cut keeps its sign"):
        ZOSign(mlp(), lr=1e-3, eps=1e-3, clip_projected_grad=1.0, **arguments)
