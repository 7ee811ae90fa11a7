"""Remembered draws are those that are drawn."""

import torch
from torch import Tensor

from smezo_cli.zo import noise
from tests.quick_noise import remembering


def test_what_is_remembered_is_what_is_drawn() -> None:
    """By key, counters and kind; it is drawn once, and what one caller writes no other sees."""
    asked = []

    def pair(counter: Tensor, key: noise.Words, kind: str) -> tuple[Tensor, Tensor]:
        asked.append(kind)
        return noise.pair(counter, key, kind)

    quick = remembering(pair)
    cases = [
        (torch.arange(start, stop), key, kind)
        for start, stop in ((0, 7), (0, 8), (7, 8))
        for key in (torch.tensor([3, 4]), torch.tensor([3, 5]), (3, -4))
        for kind in noise.KINDS
    ]
    for _ in range(2):
        for case in cases:
            found = quick(*case)
            assert all(map(torch.equal, found, noise.pair(*case)))
            found[0].zero_()
            found[1].zero_()
    assert len(asked) == len(cases)


def test_where_somebody_looks_it_is_drawn() -> None:
    """Compiled, vectorised, in many dimensions or long, nothing is remembered."""
    counter, keys = torch.arange(5), torch.tensor([[1, 2], [3, 4]])
    quick = remembering(noise.pair)

    def one(key: Tensor) -> Tensor:
        return torch.stack(quick(counter, key, "gaussian"))

    wanted = torch.stack([one(key) for key in keys])
    assert torch.equal(torch.vmap(one)(keys), wanted)
    assert torch.equal(torch.compile(one, fullgraph=True, backend="eager")(keys[0]), wanted[0])
    together = torch.stack(quick(counter[:, None], keys.T[:, None], "gaussian"))
    assert torch.equal(together, wanted.permute(1, 2, 0))
    long = torch.arange(100)
    assert torch.equal(quick(long, keys[0], "gaussian")[0][:5], wanted[0, 0])
