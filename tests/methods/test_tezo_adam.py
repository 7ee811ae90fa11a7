"""TeZO-Adam: a reference written from the paper, its blocks of rows, and what it keeps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.tezo_adam import TeZOAdam
from smezo_cli.zo.passes.low_rank import Factors
from tests.methods.test_lozo import Net
from tests.methods.test_tezo import difference
from tests.zo.test_optimizer import DTYPES, closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def tezo_adam(model: nn.Module, **options: Any) -> TeZOAdam:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 3, "seed": 7}
    defaults |= {"betas": [0.8, 0.95], "adam_eps": 1e-3}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return TeZOAdam(model, **(defaults | options))


@pytest.mark.parametrize(("rank", "queries"), [(1, 2), (3, 1), (12, 1)])
def test_steps_are_those_of_the_paper(rank: int, queries: int) -> None:
    """30 steps, entry by entry from moments of r numbers; a vector's are Adam's own."""
    m: dict[str, Tensor] = {}
    s: dict[str, Tensor] = {}

    def change(name: str, g: Tensor, u: Tensor, v: Tensor, t: int) -> Tensor:
        m[name] = 0.8 * m.get(name, 0 * g) + 0.2 * g
        s[name] = 0.95 * s.get(name, 0 * g) + 0.05 * g**2
        mean = (u * m[name]) @ v / (1 - 0.8 ** (t + 1))
        square = (u**2 * s[name]) @ v**2 / (1 - 0.95 ** (t + 1))
        return -1e-2 * mean / (square.sqrt() + 1e-3)

    model = Net()
    opt = tezo_adam(model, rank=rank, num_queries=queries)
    # Projected gradients are known to 6e-8 / eps of some 10; where the root of S is near adam_eps,
    # as for entries of U or V near 0, errors are divided by it and multiplied by lr.
    assert difference(opt, model, 30, r=rank, queries=queries, change=change) < 1e-3


def test_no_matrix_is_written_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of up to 2^16 entries are made, of a matrix of 300,000."""
    model = nn.Linear(1000, 300, bias=False)
    opt: Any = tezo_adam(model)
    before = model.weight.detach().clone()
    sizes = list[int]()
    passes = opt.direction.probe_passes
    multiply = passes.product

    def watched(factors: Factors) -> Tensor:
        sizes.append(math.prod(factors.shape))
        return multiply(factors)

    monkeypatch.setattr(passes, "product", watched)
    opt.step(lambda: model(torch.ones(1000)).double().square().mean())
    assert sum(sizes) == 2 * 300_000
    assert max(sizes) <= 1 << 16
    assert (model.weight != before).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_makes_the_same_steps(dtype: torch.dtype) -> None:
    """Compiled or not, in lockstep or not, rounded by chance and with decay."""
    found = []
    for way in ({}, {"backend": "compiled"}, {"executor": "lockstep"}):
        model = mlp(dtype)
        opt = tezo_adam(model, rounding="stochastic", weight_decay=0.1, **way)
        records = [opt.step(closure_of(model)).projected_grad for _ in range(4)]
        found.append((weights_of(model), records))
    for weights, records in found[1:]:
        assert records == found[0][1]
        assert same(weights, found[0][0])


def test_weight_decay_is_apart_from_the_moments() -> None:
    plain, model = Net(), Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tezo_adam(plain).step(plain)
    tezo_adam(model, weight_decay=0.5).step(model)
    for name, p in model.named_parameters():
        wanted = plain.get_parameter(name) - 1e-2 * 0.5 * before[name]
        torch.testing.assert_close(p, wanted, atol=3e-7, rtol=0)


def test_what_it_keeps_beside_the_factors_is_two_r_numbers_a_matrix() -> None:
    model = nn.Linear(300, 200)
    opt = tezo_adam(model, rank=5)
    assert opt.state_bytes == 4 * (5 * (300 + 200) + 2 * 5 + 2 * 200)
    opt.step(lambda: model(torch.ones(300)).double().square().mean())
    tensors = opt.snapshot()[1]
    assert {k: x.numel() for k, x in tensors.items() if k.startswith("weight")} == {
        "weight/exp_avg": 5,
        "weight/exp_avg_sq": 5,
    }
