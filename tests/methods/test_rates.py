"""How fast every method of conf/method/ comes down a quadratic."""

import pytest
import torch
from torch import Tensor, nn

from tests.methods.rates import DIMENSIONS, FASTER, LR, RATES, SETTINGS, STEPS, bounds_of
from tests.methods.test_every_method import ZEROTH_ORDER, Losses, made, node_of
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_a_quadratic_is_descended(name: str) -> None:
    """In 30 dimensions at lr 1e-2, at the rate that tests/methods/rates.py states for the method.

    A sum of estimates with momentum 0.9 would go ten times as far, more than these dimensions bear,
    and so would steps that a curvature of less than 10 divides.
    """
    target = torch.randn(DIMENSIONS, generator=seeded(5), dtype=torch.float64)

    class Part(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(DIMENSIONS // 2, generator=seeded(seed)))

        def forward(self, goal: Tensor) -> Tensor:
            return (self.w.double() - goal).square().sum() / 2

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Part(6), Part(7)])

        def forward(self) -> Tensor:
            first, second = self.layers
            return first(target[: DIMENSIONS // 2]) + second(target[DIMENSIONS // 2 :])  # type: ignore[no-any-return]  # a module's

    model = Quadratic()
    faster = FASTER.get(name, 1)
    given = dict.fromkeys(("lr", "lr_1d", "tail_lr"), LR * faster)
    given |= {"sparsity": 0.0, "momentum": 0.5, "bound": 10.0}
    given |= {"num_queries": node_of(name).get("num_queries", 1)} | SETTINGS.get(name, {})
    opt = made(name, model, **given)
    first = model().item()
    for _ in range(STEPS // faster):
        opt.step(Losses(model))
    low, high, why = bounds_of(name)
    assert low < model().item() / first < high, why


def test_a_rate_is_stated_for_every_row() -> None:
    assert RATES.keys() == set(ZEROTH_ORDER)
