"""Loops that draw, round and move at once: the bits of draws with operations around them."""

import math

import pytest
import torch
from torch import nn

from smezo_cli.methods.quzo import QuZO, num_weights
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.passes.choose import NoCompiler
from smezo_cli.zo.passes.rounded import EagerDraws, NumbaDraws, Pair, Stream, choose_draws
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_loop_in_two_threads_moves_as_draws_and_operations_do() -> None:
    """Codes whose last group is short, and floats of an odd number: probes and the update."""
    torch.set_num_threads(2)  # the fixture puts it back
    found = []
    for backend in ("eager", "compiled"):
        layers = [nn.Linear(300, 400, bias=False), nn.Linear(7, 5, bias=False)]
        for layer, gain in zip(layers, (0.1, 1.0), strict=True):
            nn.init.normal_(layer.weight, 0.0, gain, generator=seeded(1))
        opt = QuZO(nn.ModuleList(layers), lr=1e-3, eps=1e-3, group_size=16, backend=backend)
        mover = opt.direction.mover(3, Move((Term(Key(3), 0.5),)))
        outs = []
        for target in opt.targets:
            size = num_weights(target)
            one, plus, minus = (torch.full((size,), math.nan) for _ in range(3))
            mover.whole(target.parameter, one)
            mover.both(target.parameter, plus, minus)
            assert torch.equal(one, plus)
            before = target.flat.clone()
            mover.update(target)
            assert not torch.equal(before, target.flat)
            outs += [plus, minus, target.flat.clone()]
        found.append(outs)
    assert len(found[0]) == 6
    assert all(map(torch.equal, *found))


def test_draws_of_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tried out against eager ones; one number in thousands that differs is enough."""

    def wrong(
        self: NumbaDraws, start: int, stop: int, device: torch.device, stream: Stream
    ) -> Pair:
        first, second = EagerDraws(self.step).pair(start, stop, device, stream)
        second[-1] += self.step
        return first, second

    monkeypatch.setattr(NumbaDraws, "pair", wrong)
    draws, why = choose_draws(0.5, "auto", torch.device("cpu"))
    assert draws.name == "eager"
    assert "the bits of numba draws are not the eager ones" in why
    with pytest.raises(NoCompiler, match="not the eager ones"):
        choose_draws(0.5, "compiled", torch.device("cpu"))
