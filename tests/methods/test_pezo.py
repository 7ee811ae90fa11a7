"""PeZO against a reference written from its paper, and what its pool can reach."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.pezo import PeZO
from smezo_cli.zo.directions.pool import TAPS, Pool, register_states
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import hash64, stream_key, uniform_at
from tests.methods.reference import loss64, weights64
from tests.zo.test_optimizer import closure_of, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> PeZO:
    given = {"lr": 1e-3, "eps": 1e-3, "bits": 5, "backend": "eager", "executor": "sequential"}
    return PeZO(model, **given | more)


def direction_of(opt: PeZO, step: int, query: int = 0) -> Tensor:
    """u of the whole model as one vector, tensors by name: read from what a move adds to zeros."""
    parts = []
    opt.direction.begin(step)
    for target in sorted(opt.targets, key=lambda t: t.name):
        kept, out = target.flat.clone(), torch.empty_like(target.flat)
        target.flat.zero_()
        opt.direction.mover(step, Move((Term(Key(step, query), 1.0),))).whole(target.parameter, out)
        target.flat.copy_(kept)
        parts.append(out)
    return torch.cat(parts).double()


def reference(steps: int, bits: int, queries: int, lr: float, eps: float) -> dict[str, Tensor]:
    """MeZO in float64 along a pool of uniforms that rolls on from direction to direction."""
    theta = weights64(mlp())
    names, size = sorted(theta), 2**bits - 1
    d = sum(x.numel() for x in theta.values())
    drawn = uniform_at(torch.arange(size), size, torch.tensor(stream_key(0, "pool")))
    pool = drawn.double() * 2 - 1
    length = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    for t in range(steps):
        move = {n: torch.zeros_like(x) for n, x in theta.items()}
        for q in range(queries):
            u = pool[((t * queries + q) * d + torch.arange(d)) % size]
            split = torch.split(u * length / u.norm(), [theta[n].numel() for n in names])
            z = {n: part.view(theta[n].shape) for n, part in zip(names, split, strict=True)}
            plus, minus = ({n: theta[n] + s * eps * z[n] for n in theta} for s in (1, -1))
            p = (loss64(plus) - loss64(minus)) / (2 * eps)
            move = {n: move[n] + p * z[n] / queries for n in theta}
        theta = {n: theta[n] - lr * move[n] for n in theta}
    return theta


@pytest.mark.parametrize("queries", [1, 3])
def test_thirty_steps_are_those_of_the_paper(queries: int) -> None:
    """Within 1e-4: float32 weights leave some 1e-4 of rounding in p, times lr in every step."""
    model = mlp()
    start = weights64(model)
    opt = made(model, num_queries=queries)
    for _ in range(30):
        opt.step(closure_of(model))
    expected = reference(30, 5, queries, 1e-3, 1e-3)
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)
        assert (found - start[name]).abs().max() > 2e-3


@pytest.mark.parametrize(("bits", "generators"), [(4, 0), (4, 3), (5, 2)])
def test_directions_span_no_more_than_is_said(bits: int, generators: int) -> None:
    """And that much, but for one dimension a register: its numbers add up to 0 over a period."""
    opt = made(mlp(), bits=bits, generators=generators)
    found = torch.stack([direction_of(opt, step) for step in range(150)])
    size = (2**bits - 1) * max(1, generators)
    assert opt.remark.startswith(f"its directions span at most {size:,} of the ")
    rank = int(torch.linalg.matrix_rank(found, rtol=1e-5))
    assert size - generators <= rank <= size


def test_the_length_is_that_of_gaussian_noise() -> None:
    opt = made(mlp(), bits=6)
    d = opt.num_weights
    expected = math.sqrt(d) * (1 - 1 / (4 * d))  # E |N(0, I_d)|, to 1 / d^2
    for step in range(20):
        assert float(direction_of(opt, step).norm()) == pytest.approx(expected, rel=1e-4)
    shifted = made(mlp(), bits=6, modulus="power_of_two")
    pool = Pool(6, 0, "power_of_two", 1)
    assert pool.modulus == "power_of_two"
    for step in range(5):
        ratio = float(direction_of(shifted, step).norm()) / expected
        assert 2**-0.51 <= ratio <= 2**0.51
        assert math.log2(shifted.direction.scale(Key(step))).is_integer()  # type: ignore[attr-defined]  # a Pool's


def test_what_it_keeps_is_the_pool_three_times_over() -> None:
    """Once for places one by one, and twice end to end for passes that read on."""
    assert made(mlp(), bits=6).state_bytes == 12 * 63
    assert made(mlp(), bits=4, generators=3).state_bytes == 12 * 15


def test_consecutive_directions_roll_on() -> None:
    """The next one begins where the last one ended; none is met again before N directions."""
    opt = made(mlp(), bits=5)
    pool = opt.direction
    assert isinstance(pool, Pool)
    starts = [pool._offset(Key(step)) for step in range(31)]
    assert starts[0] == 0
    assert {(b - a) % 31 for a, b in itertools.pairwise(starts)} == {opt.num_weights % 31}
    assert len(set(starts)) == 31


def test_a_pool_whose_length_divides_the_weights_still_rolls() -> None:
    model = nn.Linear(15, 1, bias=False)
    opt = made(model, bits=4)
    pool = opt.direction
    assert isinstance(pool, Pool)
    assert len({pool._offset(Key(step)) for step in range(15)}) == 15
    assert not torch.equal(direction_of(opt, 0), direction_of(opt, 1))


@pytest.mark.parametrize("bits", TAPS)
def test_registers_run_through_all_numbers_but_zero(bits: int) -> None:
    states = register_states(bits)
    assert sorted(states) == list(range(1, 2**bits))


def test_registers_take_turns() -> None:
    """Weight i reads number i // G of register (i + i // G) mod G."""
    opt = made(mlp(), bits=6, generators=3)
    pool = opt.direction
    assert isinstance(pool, Pool)
    states = torch.tensor(register_states(6), dtype=torch.float64)
    numbers = (states * 2 - 64) / 64
    key = stream_key(0, "z", 4, 0)[0]
    starts = (hash64(torch.arange(3), torch.tensor([key, key])) % 63).tolist()
    u = direction_of(opt, 4) / pool.scale(Key(4))
    for i in range(len(u)):
        turn = i // 3
        expected = numbers[(turn + starts[(i + turn) % 3]) % 63]
        assert float(u[i]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_compiled_steps_have_the_bits_of_eager_ones(queries: int) -> None:
    found = []
    for backend in ("eager", "compiled"):
        model = mlp()
        opt = made(model, backend=backend, num_queries=queries, weight_decay=0.1)
        assert opt.passes.name == {"eager": "eager", "compiled": "numba"}[backend]
        records = [opt.step(closure_of(model)).projected_grad for _ in range(4)]
        found.append((records, torch.cat([p.detach().view(-1) for p in model.parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_over_all_starts_the_estimate_is_nearly_the_gradient() -> None:
    """mean of u (u g) = C g, with C the pool's autocorrelation: the identity within 6 / sqrt(N)."""
    opt = made(nn.Linear(1000, 1, bias=False), bits=12)
    u = torch.stack([direction_of(opt, step)[:10] for step in range(4095)])
    found = u.mT @ u / len(u)
    assert (found - torch.eye(10, dtype=torch.float64)).abs().max() < 6 / 4095**0.5
