"""EGGROLL: a reference written from the released formula, its members and scores, its products."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.eggroll import EGGROLL
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.passes.low_rank import Factors
from smezo_cli.zo.updates.momentum import Momentum
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.zo.test_optimizer import DTYPES, closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def eggroll(model: nn.Module, **options: Any) -> EGGROLL:
    defaults: dict[str, Any] = {"lr": 1e-3, "eps": 1e-2, "rank": 2, "num_queries": 3, "seed": 7}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return EGGROLL(model, **(defaults | options))


def direction_of(name: str, x: Tensor, r: int, step: int, pair: int) -> Tensor:
    """E = A B^T / sqrt(r), or dense noise, by the key that smezo draws by."""
    if x.ndim == 1:
        return numbers(len(x), "z", step, pair, name)
    m, n = x.shape
    both = numbers(r * (m + n), "z", step, pair, name)
    return both[: m * r].view(m, r) @ both[m * r :].view(r, n) / math.sqrt(r)


def reference(
    w: dict[str, Tensor], steps: int, r: int, pairs: int, lr: float, sigma: float, decay: float
) -> dict[str, Tensor]:
    """All members one by one, their z-scores, and the mean of score times direction."""
    for t in range(steps):
        directions, fitness = [], []
        for i in range(2 * pairs):
            sign = 1 - 2 * (i % 2)  # of a member, by its parity
            e = {k: sign * direction_of(k, x, r, t, i // 2) for k, x in w.items()}
            directions.append(e)
            fitness.append(-loss_of({k: x + sigma * e[k] for k, x in w.items()}))
        f = torch.stack(fitness)
        scores = (f - f.mean()) / f.std(correction=0)
        size = 2 * pairs
        ascent = {
            k: sum(s * e[k] for s, e in zip(scores, directions, strict=True)) / size * size**0.5
            for k in w
        }
        w = {k: x + lr * (ascent[k] - decay * x) for k, x in w.items()}
    return w


@pytest.mark.parametrize(("rank", "pairs", "decay"), [(1, 1, 0.0), (2, 4, 0.5), (1, 8, 0.0)])
def test_steps_are_those_of_the_formula(rank: int, pairs: int, decay: float) -> None:
    """30 steps."""
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = eggroll(model, rank=rank, num_queries=pairs, weight_decay=decay)
    for _ in range(30):
        opt.step(model)
    wanted = reference(before, 30, rank, pairs, 1e-3, 1e-2, decay)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.005
        # Weights of size 1 are stored to 6e-8 beside probes of 1e-2: a score, of size 1, is known
        # to some 1e-4, and is multiplied by lr and numbers of some 5, 30 times.
        assert (p.double() - wanted[name]).abs().max().item() < 1e-5


def test_a_step_does_not_hang_on_the_scale_or_the_level_of_losses() -> None:
    """Scores are over the spread of the whole population, which has the mean of none."""
    found = []
    for scale, level in ((1.0, 0.0), (64.0, 0.0), (1.0, -3.0)):
        model = Net()
        opt = eggroll(model, num_queries=4)
        record = opt.step(lambda model=model, a=scale, b=level: a * model() + b)
        scores = record.projected_grad
        assert len(scores) == 4
        assert record.num_forwards == 8
        assert max(map(abs, scores)) <= 8**0.5 * 2  # of N z-scores one is below sqrt(N)
        found.append(weights_of(model))
    for other in found[1:]:
        for name, x in found[0].items():
            torch.testing.assert_close(other[name], x, atol=1e-7, rtol=0)


def test_members_that_score_alike_move_nothing_and_a_floor_bounds_the_step() -> None:
    model = Net()
    before = weights_of(model)
    eggroll(model).step(lambda: torch.tensor(0.5))
    assert same(weights_of(model), before)
    # Rounding of a loss of size 1e-9 is no score.
    opt = eggroll(model, floor=1e-3)
    (score, *_) = opt.step(lambda: model() * 1e-9).projected_grad
    assert abs(score) < 1e-5
    assert opt.identity() != eggroll(Net(), floor=1e-2).identity()


def test_the_sum_over_pairs_is_a_multiple_of_the_gradient_on_average() -> None:
    """E <D, E> E = D over 20,000 draws of both factors, whatever the rank.

    With |D| = 1, entries of the mean differ from D by some 0.02, measured.
    """
    d = torch.randn(12, generator=seeded(1))
    d /= d.norm()
    for rank in (1, 3):
        opt = eggroll(nn.Linear(3, 4, bias=False), rank=rank)
        (target,) = opt.targets
        a = torch.randn(20_000, 4, rank, generator=seeded(2))
        b = torch.randn(20_000, rank, 3, generator=seeded(3))
        cores = torch.cat([a.flatten(1), b.flatten(1)], 1)
        lifted = [opt.direction.lifted(target, core) for core in cores[:50]]  # type: ignore[attr-defined]  # it is factored
        e = (a @ b / rank**0.5).view(-1, 12)
        for one, wanted in zip(lifted, e[:50], strict=True):
            torch.testing.assert_close((one.left @ one.right).view(-1), wanted)
        mean = ((e @ d)[:, None] * e).mean(0)
        assert (mean - d).abs().max().item() < 0.1


def test_pairs_have_factors_of_their_own_and_a_sum_is_one_product() -> None:
    """Of three pairs of rank 2 the update has rank 6, and is the sum of theirs."""
    model = Net()
    opt = eggroll(model)
    target = opt.targets[0]
    terms = [Term(Key(0, pair), c) for pair, c in enumerate((0.5, -2.0, 0.3))]
    whole = opt.direction.mover(0, Move(tuple(terms)))
    parts = [opt.direction.mover(0, Move((term,))).dense(target)[0].double() for term in terms]
    found = whole.dense(target)[0].double()
    # Some ten float32 roundings of numbers below 40.
    assert (found - torch.stack(parts).sum(0)).abs().max().item() < 2e-5
    assert torch.linalg.matrix_rank(found.view(11, 6), tol=1e-4) == 6
    assert torch.linalg.matrix_rank(parts[0].view(11, 6), tol=1e-4) == 2


def test_no_matrix_of_noise_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update gets thin factors, of all pairs side by side."""
    model = nn.Linear(1000, 300, bias=False)
    opt: Any = eggroll(model, num_queries=8, rank=1)
    shapes = list[tuple[int, ...]]()
    passes = opt.direction.update_passes
    move = passes.move

    def watched(weight: Tensor, out: Tensor, factors: Factors, draw: Any) -> None:
        shapes.append((*factors.left.shape, *factors.right.shape))
        move(weight, out, factors, draw)

    monkeypatch.setattr(passes, "move", watched)
    opt.step(lambda: model(torch.ones(1000)).double().square().mean())
    assert shapes == [(300, 8, 8, 1000)]
    assert opt.state_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_makes_the_same_steps(dtype: torch.dtype) -> None:
    """Compiled or not, in lockstep or not, rounded by chance."""
    found = []
    for way in ({}, {"backend": "compiled"}, {"executor": "lockstep"}):
        model = mlp(dtype)
        opt = eggroll(model, rounding="stochastic", lr=1e-2, **way)
        records = [opt.step(closure_of(model)).projected_grad for _ in range(3)]
        found.append((weights_of(model), records))
    for weights, records in found[1:]:
        assert records == found[0][1]
        assert same(weights, found[0][0])


def test_what_changes_sums_of_cores_is_refused() -> None:
    model = Net()
    opt: Any = eggroll(model)
    opt.update = Momentum(0.5)
    with pytest.raises(ValueError, match=r"^kind=ab: sums have no core to be changed: use SGD"):
        opt.step(model)
