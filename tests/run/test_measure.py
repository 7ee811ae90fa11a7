"""Micro-batches: the same update whatever their size, and half of it where memory is too small."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.machine.out_of_memory import OutOfMemory, detecting_out_of_memory
from smezo_cli.methods.first_order import FirstOrder
from smezo_cli.methods.mezo import MeZO
from smezo_cli.run.measure import Batch, Measure, ShardedBatch
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.optimizer import ZeroOrder
from tests.scoring.test_objectives import KINDS, in_the_mood

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-2


def halves() -> tuple[list[tuple[str, int]], Any]:
    """Where lines about memory go, and what takes them."""
    lines: list[tuple[str, int]] = []
    return lines, lambda line, size: lines.append((line, size))


def setting(kind: str, objective: str = "loss") -> tuple[Any, Scorer, list[Any]]:
    model, tokenizer = in_the_mood("tiny-llama", kind)
    rows = KINDS[kind][2](tokenizer)
    return model, Scorer(model, tokenizer), (rows * 4)[:16]


def mezo(model: Any, **options: Any) -> ZeroOrder:
    return MeZO(model, lr=1e-3, eps=EPS, seed=1, check=False, backend="eager", **options)


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_1_3_and_16_give_the_same_update(kind: str, executor: str) -> None:
    """Of 16 rows; a loss is a float32 sum over rows, 2e-6 of it is 2e-6 / (2 eps) of a gradient."""
    found: dict[int | None, tuple[float, Tensor]] = {}
    for size in (None, 1, 3, 16):
        model, scorer, rows = setting(kind)
        opt = mezo(model, executor=executor)
        record = Measure(scorer, "loss", size, None, halves()[1]).step(opt, rows)
        weights = torch.cat([p.detach().view(-1) for p in model.parameters()])
        found[size] = record.projected_grad[0], weights
        assert record.num_forwards == 2
    loss = 4.0  # more than any of these
    tolerance = 2e-6 * loss / (2 * EPS)
    for size in (1, 3):
        assert found[size][0] == pytest.approx(found[None][0], abs=tolerance)
        moved = (found[size][1] - found[None][1]).abs().max()
        assert moved <= 6 * 1e-3 * tolerance + 1e-7  # lr, the largest z, and a rounding
        assert abs(found[None][0]) > 100 * tolerance  # else the claim says nothing
    assert found[16][0] == found[None][0]
    assert torch.equal(found[16][1], found[None][1])


@pytest.mark.parametrize(("kind", "objective"), [("choice", "accuracy"), ("generation", "f1")])
def test_figures_in_parts_are_those_of_the_whole(kind: str, objective: str) -> None:
    """Multiples of 2^-32 of each part; an accuracy is one, an F1 is rounded to it."""
    _, scorer, rows = setting(kind)
    whole = float(scorer.objective(rows, objective))
    for size in (1, 3, 5):
        assert float(Batch(scorer, rows, objective, size)()) == pytest.approx(whole, abs=2**-30)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_accumulated(kind: str) -> None:
    """First-order methods: the gradient of the batch, part by part; float32 in other orders."""
    grads = {}
    for size in (None, 3, 1):
        model, scorer, rows = setting(kind)
        method = FirstOrder(model, optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
        before = copy.deepcopy(method.trained)
        record = Measure(scorer, "loss", size, None, halves()[1]).step(method, rows)
        moved = [before[name] - p for name, p in method.trained.items()]
        grads[size] = torch.cat([m.detach().view(-1) for m in moved]), record.loss
    for size in (3, 1):
        assert grads[size][1] == pytest.approx(grads[None][1], rel=2e-6)
        largest = float(grads[None][0].abs().max())
        assert torch.allclose(grads[size][0], grads[None][0], rtol=0, atol=2e-5 * largest)


def test_sums_do_not_depend_on_their_order() -> None:
    """Rounded to 2^-32, sums of parts are exact: grouped in any way they are the same float64."""
    _, scorer, rows = setting("classification")
    parts = [float(Batch(scorer, rows, "loss", 2)._sum())]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        quarters = [rows[4 * k : 4 * k + 4] for k in order]
        sums = [float(Batch(scorer, quarter, "loss", 2)._sum()) for quarter in quarters]
        parts += [sum(sums), (sums[0] + sums[3]) + (sums[1] + sums[2])]
    assert len(set(parts)) == 1


class OneOf:
    """A rank among some that share the rows of a query; what it hears are given sums."""

    shares_rows = True

    def __init__(self, rank: int, size: int, sums: Sequence[float] = ()) -> None:
        self._rank, self._size, self._sums = rank, size, sums

    def rows(self, num: int) -> slice:
        return slice(self._rank * num // self._size, (self._rank + 1) * num // self._size)

    def queries(self, num: int) -> Sequence[int]:
        return range(num)

    def add(self, numbers: Sequence[float]) -> list[float]:
        return list(self._sums)

    def measured(self) -> None: ...

    def step_made(self) -> None: ...


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_fewer_rows_than_ranks_add_up(kind: str, executor: str) -> None:
    """Five shards of the four rows of another objective: one is empty, and the sum is exact."""
    model, scorer, rows = setting(kind)
    opt = mezo(model, executor=executor)

    def few(batch: Batch) -> Batch:
        batch.rows_of = lambda _: rows[:4]
        return batch.of("few")

    def losses(batch: Batch) -> list[float]:
        return [float(x) for x in opt.executors.losses(batch, opt._pair(0, EPS))]

    shards = [few(ShardedBatch(scorer, rows, "loss", 1, OneOf(rank, 5))) for rank in range(5)]
    found = [losses(shard) for shard in shards]
    assert [0.0, 0.0] in found
    heard = OneOf(0, 5, [sum(of_point) for of_point in zip(*found, strict=True)])
    whole = few(ShardedBatch(scorer, rows, "loss", 1, heard))
    assert isinstance(whole, ShardedBatch)
    alone = losses(few(Batch(scorer, rows, "loss", 1)))
    assert whole.join({0: found[0]}, [2]) == [alone]
    assert alone[0] != alone[1]


class Small:
    """Memory for so many rows in a forward, counted where the model begins."""

    def __init__(self, model: Any, rows: int, error: Exception) -> None:
        self.rows, self.error, self.seen = rows, error, list[int]()
        model.get_input_embeddings().register_forward_pre_hook(self.check)

    def check(self, _: Any, args: tuple[Tensor]) -> None:
        self.seen.append(len(args[0]))
        if len(args[0]) > self.rows:
            raise self.error


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("make", ["sequential", "lockstep", "auto", "in_place", "sgd"])
def test_memory_that_is_too_small_halves_the_parts(make: str, error: Exception) -> None:
    """Said once a halving; the update is that of micro-batches of that size from the start."""

    def method(model: Any) -> Any:
        if make == "sgd":
            return FirstOrder(model, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
        return mezo(model, executor=make)

    kind = "choice"  # a row is a forward of three sequences at least: no split by length
    model, scorer, rows = setting(kind)
    small = Small(model, 4 * len(rows[0].full), error)
    lines, halved = halves()
    measure = Measure(scorer, "loss", None, None, halved)
    steps = method(model)
    records = [measure.step(steps, rows) for _ in range(2)]
    assert [size for _, size in lines] == [8, 4][: len(lines)]
    assert "out of memory with 16 rows at once: goes on with micro_batch_size=8" in lines[0][0]
    assert max(small.seen) > small.rows
    other, scorer, rows = setting(kind)
    steps = method(other)
    fixed = Measure(scorer, "loss", measure.size, None, halved)
    assert records == [fixed.step(steps, rows) for _ in range(2)]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_row_that_does_not_fit_ends_the_run() -> None:
    model, scorer, rows = setting("classification")
    Small(model, 0, ERRORS[0])
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(UserError, match="too small for a forward over one row"):
        Measure(scorer, "loss", None, None, halves()[1]).step(mezo(model), rows)
    assert all(map(torch.equal, before, model.parameters()))


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), detecting_out_of_memory():
        raise RuntimeError("shapes do not match")
    with pytest.raises(OutOfMemory, match="can't allocate memory"), detecting_out_of_memory():
        torch.empty(1 << 50)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_rows_have_the_loss_of_the_batch_as_their_mean(
    kind: str, size: int | None
) -> None:
    """Each row once, in any micro-batches and on any ranks; float32 sums of up to 16 losses."""
    _, scorer, rows = setting(kind)
    whole = Batch(scorer, rows, "loss", size)
    shards = [ShardedBatch(scorer, rows, "loss", size, OneOf(rank, 3)) for rank in range(3)]
    for batches in ([whole], shards):
        found: dict[int, float] = {}
        for batch in batches:
            assert batch.num_rows == len(rows)
            for forward in batch.by_row():
                assert set(forward.sequences) == set(forward.rows)
                assert not found.keys() & set(forward.rows)
                found |= zip(forward.rows, forward.losses().tolist(), strict=True)
        assert sorted(found) == list(range(len(rows)))
        mean = sum(found.values()) / len(rows)
        assert mean == pytest.approx(float(whole().detach()), rel=2e-6)
        if kind == "classification":  # its loss is a mean over rows
            for i in (0, 7, 15):
                alone = float(Batch(scorer, [rows[i]], "loss", None)().detach())
                assert found[i] == pytest.approx(alone, rel=2e-6)


def test_losses_of_rows_of_a_mixture_are_weighted_as_its_parts() -> None:
    """Rows of two parts in turns, five and three of them, with weights of 1/4 and 3/4."""
    _, scorer, rows = setting("classification")
    mixed = [dataclasses.replace(row, part="ab"[i in (1, 4, 6)]) for i, row in enumerate(rows[:8])]
    weights = {"a": 0.25, "b": 0.75}
    for size in (None, 2):
        batch = Batch(scorer, mixed, "loss", size, weights)
        found: dict[int, float] = {}
        for forward in batch.by_row():
            found |= zip(forward.rows, forward.losses().tolist(), strict=True)
        assert sum(found.values()) / 8 == pytest.approx(float(batch()), rel=2e-6)
        for i, row in enumerate(mixed):
            share = weights[row.part] / (3 if row.part == "b" else 5)
            alone = float(Batch(scorer, [row], "loss", None)().detach())
            assert found[i] == pytest.approx(8 * share * alone, rel=2e-6)
