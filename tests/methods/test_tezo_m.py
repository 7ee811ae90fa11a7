"""TeZO-m: a reference written from the paper, and what it keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.tezo_m import TeZOM
from tests.methods.test_lozo import Net
from tests.methods.test_tezo import difference, tezo
from tests.zo.test_optimizer import closure_of, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def tezo_m(model: nn.Module, **options: Any) -> TeZOM:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 3, "seed": 7}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return TeZOM(model, **(defaults | options))


@pytest.mark.parametrize(("rank", "beta"), [(1, 0.9), (3, 0.5)])
def test_a_mean_of_cores_is_a_mean_of_whole_matrices(rank: int, beta: float) -> None:
    """30 steps beside a reference that keeps the latter."""
    kept: dict[str, Tensor] = {}

    def change(name: str, g: Tensor, u: Tensor, v: Tensor, t: int) -> Tensor:
        z = (u * g) @ v
        kept[name] = beta * kept.get(name, torch.zeros_like(z)) + (1 - beta) * z
        return -1e-2 * kept[name]

    model = Net()
    opt = tezo_m(model, rank=rank, beta=beta)
    # As for TeZO.
    assert difference(opt, model, 30, r=rank, change=change) < 2e-5


def test_without_decay_of_the_mean_it_is_tezo() -> None:
    """To rounding: lr times g is taken in another order."""
    a, b = mlp(), mlp()
    for opt, model in ((tezo_m(a, beta=0.0), a), (tezo(b), b)):
        for _ in range(10):
            opt.step(closure_of(model))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_what_it_keeps_beside_the_factors_is_r_numbers_a_matrix() -> None:
    model = nn.Linear(300, 200)
    opt = tezo_m(model, rank=5)
    assert opt.state_bytes == 4 * (5 * (300 + 200) + 5 + 200)
    opt.step(lambda: model(torch.ones(300)).double().square().mean())
    assert opt.snapshot()[1]["weight/momentum"].shape == (5,)
