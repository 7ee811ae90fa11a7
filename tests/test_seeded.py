"""What a test draws from a global generator does not hang on the tests before it."""

import random

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("again", [False, True])
def test_global_generators_begin_with_the_same_seed(again: bool) -> None:
    """The second finds what the first found, not what it left."""
    torch_too = torch.rand(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(2), torch_too)
    assert np.random.random() == np.random.RandomState(0).random()
    assert random.random() == random.Random(0).random()


@pytest.fixture(scope="module")
def drawn() -> float:
    return float(torch.rand(1))


def test_fixtures_of_a_module_draw_alike_whoever_asks_first(drawn: float) -> None:
    assert drawn == float(torch.rand(1, generator=torch.Generator().manual_seed(0)))
