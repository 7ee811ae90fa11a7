"""Blocks that are trained alone: by number, and which one is dominant."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.quzo import QuZO
from smezo_cli.zo.outliers import blocks_of, dominant, ratios
from smezo_cli.zo.ranges import BlockNumbers
from smezo_cli.zo.selections.layers import frozen
from tests.zo.test_optimizer import bits, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(4, 6, generator=seeded(1))


class Block(nn.Module):
    """Adds to what enters; its output comes in a tuple, as that of a decoder layer may."""

    def __init__(self, spike: float = 0.0) -> None:
        super().__init__()
        self.up, self.spike = nn.Linear(6, 6), spike

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = x + self.up(x)
        if self.spike:
            y = y + self.spike * torch.eye(6)[2]
        return (y,)


class Net(nn.Module):
    """An embedding, numbered blocks and a head; a second stack of fewer blocks is another part."""

    def __init__(self, spikes: tuple[float, ...] = (0.0,) * 12) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.layers = nn.ModuleList([Block(spike) for spike in spikes])
        self.extra = nn.ModuleList([nn.Linear(2, 2)])
        self.head = nn.Linear(6, 1)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=seeded(i)) * 0.1)

    def forward(self) -> Tensor:
        x = self.embed(X)
        for block in self.layers:
            (x,) = block(x)
        return self.head(x).double().square().mean()  # type: ignore[no-any-return]  # a module's


def mezo(model: nn.Module, **more: Any) -> MeZO:
    return MeZO(model, **{"lr": 1e-2, "eps": 1e-3, "check": False, "executor": "sequential"} | more)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("dominant", "dominant"),
        (3, [3]),
        ([4, 2, 4], [2, 4]),
        ("9-11", [9, 10, 11]),
        ("7-7", [7]),
        *((bad, None) for bad in ("", "3", "5-4", "a-b", "1-", [], [-1], -1, 1.5, True, [True])),
        *((bad, None) for bad in (["3"], {}, "9-11 ")),
    ],
)
def test_block_numbers(given: object, found: object) -> None:
    if found is None:
        with pytest.raises(ValueError, match=r"^$"):
            BlockNumbers()(given)
    else:
        assert BlockNumbers()(given) == found


@pytest.mark.parametrize(
    ("layers", "numbers"), [([2, 10], {2, 10}), ("9-11", {9, 10, 11}), (1, {1})]
)
def test_only_these_blocks_are_trained(layers: Any, numbers: set[int]) -> None:
    """Block 1 is not block 10, and what belongs to no block or to another stack stays."""
    model = Net()
    opt = mezo(model, layers=layers)
    names = {f"layers.{n}.up.{kind}" for n in numbers for kind in ("weight", "bias")}
    assert set(opt.trained) == names
    before = weights_of(model)
    opt.step(model)
    moved = {name for name, x in weights_of(model).items() if not torch.equal(x, before[name])}
    assert moved == names


def test_it_is_the_run_that_freezes_all_else() -> None:
    """The same weights to the last bit, and the same identity, as by globs; freeze goes on top."""
    ours, theirs = Net(), Net()
    first = mezo(ours, layers=[3], freeze=["*.bias"])
    rest = [name for name, _ in theirs.named_parameters() if name != "layers.3.up.weight"]
    second = mezo(theirs, freeze=rest)
    for _ in range(3):
        first.step(ours)
        second.step(theirs)
    assert same(weights_of(ours), weights_of(theirs))
    assert first.identity() == second.identity()


def test_stacks_count_their_blocks_apart() -> None:
    """Block 0 of each stack: parameters are named by the first number in their names."""
    assert set(mezo(Net(), layers=0).trained) == {
        *("layers.0.up.weight", "layers.0.up.bias", "extra.0.weight", "extra.0.bias")
    }


def test_codes_have_blocks_as_weights_have() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    opt = QuZO(Wide(), lr=1e-3, eps=1e-3, layers=[1])
    assert list(opt.layers) == ["layers.1.weight"]


def test_frozen_names_each_glob_once() -> None:
    found = frozen(Net(), {"freeze": ["head.*"], "layers": [3]})
    assert frozen(Net(), {"freeze": found, "layers": [3]}) == found
    assert found[0] == "head.*"
    assert frozen(Net(), {"freeze": ["head.*"], "layers": None}) == ["head.*"]
    assert frozen(Net(), {}) == []


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([3, 12], "layers has block 12, and tensors that may be trained are of blocks 0 to 11"),
        ("dominant", "layers=dominant: zo/outliers.py finds which one that is"),
        ("5-4", "layers=5-4: must be dominant, a block number, a range such as"),
    ],
)
def test_what_is_no_block_is_refused(layers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        mezo(Net(), layers=layers)
    with pytest.raises(ValueError, match="no tensor that may be trained is of a numbered block"):
        mezo(nn.Linear(2, 2), layers=[0])


# --- the dominant layer -------------------------------------------------------------------------


def test_ratios_are_those_of_the_outputs() -> None:
    model = Net((0.0, 5.0, 0.0))
    found = ratios(model, [model])
    x, wanted = model.embed(X), {}
    for number, block in enumerate(model.layers):
        (x,) = block(x)
        size = x.detach().abs().flatten()
        wanted[number] = float(size.max() / size.median())
    assert found == pytest.approx(wanted, rel=1e-6)
    assert list(blocks_of(model)) == [0, 1, 2]  # of the longest stack
    assert not any(block._forward_hooks for block in model.layers)


def test_of_several_rows_the_largest_ratio_counts() -> None:
    model = Net((0.0, 1.0))
    first = ratios(model, [model])

    def larger() -> Tensor:
        model.layers[1].spike = 50.0
        return model()

    assert ratios(model, [model, larger])[1] > 5 * first[1]
    assert ratios(model, [model, larger])[0] == first[0]


def test_the_first_block_with_an_outlier_is_dominant() -> None:
    """Not the one with the largest: an outlier stays in the sums of the blocks behind it."""
    model = Net((0.0, 0.0, 3000.0, 0.0))
    found = ratios(model, [model])
    assert found[2] > 1000 > max(found[0], found[1])
    assert dominant(found) == 2
    assert dominant({0: 40.0, 1: 2000.0, 2: 9000.0}) == 1
    assert dominant({0: 40.0, 1: 2000.0, 2: 9000.0}, factor=3000.0) == 2
    words = "above 1000 times its median (block 1 comes to 700), so none is dominant"
    with pytest.raises(ValueError, match=re.escape(words)):
        dominant({0: 40.0, 1: 700.0, 2: 5.0})


def test_weights_and_modes_stay_as_they_are() -> None:
    model = Net().train()
    before = weights_of(model)
    ratios(model, [model])
    assert same(weights_of(model), before)
    assert model.training
    assert all(bits(p).dtype == torch.int32 for p in model.parameters())


def test_a_model_without_blocks_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no parameter of the model belongs to a block"):
        ratios(model, [lambda: model(torch.ones(2)).sum()])
