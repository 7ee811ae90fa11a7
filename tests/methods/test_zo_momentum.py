"""ZO-SGD-MMT: torch's SGD with momentum on a gradient written out."""

from typing import Any

import pytest
import torch
from torch import nn

from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.zo_momentum import ZOMomentum
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import bits, closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> ZOMomentum:
    given = {"lr": 2e-3, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return ZOMomentum(model, **given | more)


@pytest.mark.parametrize(("queries", "momentum"), [(1, 0.9), (3, 0.9), (2, 0.0)])
def test_thirty_steps_are_those_of_torchs_sgd(queries: int, momentum: float) -> None:
    """In float64, within 2e-4: eps 1e-3 makes 1e-4 of the rounding of float32 weights in p."""
    theta = {name: nn.Parameter(x) for name, x in weights64(mlp()).items()}
    theirs = torch.optim.SGD(theta.values(), lr=2e-3, momentum=momentum)
    model = mlp()
    opt = made(model, num_queries=queries, momentum=momentum)
    for step in range(30):
        opt.step(closure_of(model))
        for p in theta.values():
            p.grad = torch.zeros_like(p)
        for query in range(queries):
            now = {name: p.detach() for name, p in theta.items()}
            z = z_of(now, step, query)
            plus, minus = (
                loss64({n: x + s * 1e-3 * z[n] for n, x in now.items()}) for s in (1, -1)
            )
            for name, p in theta.items():
                assert p.grad is not None
                p.grad += (plus - minus) / 2e-3 * z[name] / queries
        theirs.step()
    start = weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, theta[name].detach(), atol=2e-4, rtol=0)
        assert (x - start[name]).abs().max() > 0.02  # and they have moved


def test_the_first_step_is_mezos_and_the_second_goes_on_with_it() -> None:
    """m = g at first, as torch's SGD has it; a mean would begin with a tenth of it."""
    model, other = mlp(), mlp()
    opt = made(model)
    mezo = MeZO(other, lr=2e-3, eps=1e-3, backend="eager", executor="sequential", check=False)
    assert opt.step(closure_of(model)) == mezo.step(closure_of(other))
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, weights64(other)[name], atol=3e-7, rtol=0)
    before = weights64(model)
    opt.step(lambda: torch.tensor(1.0))  # where g = 0
    start = weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(
            x - before[name], 0.9 * (before[name] - start[name]), atol=6e-7, rtol=0
        )


def test_weight_decay_is_apart_from_the_sum() -> None:
    """After a step without a gradient the weights have shrunk by lr weight_decay, and m is 0."""
    model = mlp()
    before = weights64(model)
    opt = made(model, weight_decay=5.0)
    opt.step(lambda: torch.tensor(1.0))
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, 0.99 * before[name], atol=3e-7, rtol=0)
    assert not any(m.count_nonzero() for m in opt.snapshot()[1].values())
    assert opt.state_bytes == 4 * opt.num_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_other_ways_to_compute_give_the_same_bits(rounding: str, dtype: torch.dtype) -> None:
    """Lockstep, compiled passes, a replay: the weights and the sum, whatever the weights' dtype."""
    options = {"rounding": rounding, "num_queries": 2, "weight_decay": 0.1}
    model = mlp(dtype)
    opt = made(model, **options)
    records = [opt.step(closure_of(model)) for _ in range(3)]
    for way in ({"executor": "lockstep"}, {"backend": "compiled"}, {}):
        again = mlp(dtype)
        other = made(again, **options | way)
        for record in records:
            if way:
                assert other.step(closure_of(again)) == record
            else:
                other.replay(2e-3, record.scalars)
        assert same(weights_of(again), weights_of(model))
        assert same(*({n: bits(m) for n, m in o.snapshot()[1].items()} for o in (opt, other)))


def test_in_place_takes_the_same_steps() -> None:
    """But for roundings of 1e-7 that the probes leave in the weights, and what p makes of them."""
    found = []
    for executor in ("sequential", "in_place"):
        model = mlp()
        opt = made(model, executor=executor)
        for _ in range(3):
            opt.step(closure_of(model))
        found.append(weights64(model))
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], atol=1e-5, rtol=0)


def test_momentum_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"momentum=1.0: a number in \[0, 1\)"):
        made(mlp(), momentum=1.0)
