"""Directions of low rank: what they are, what they keep, and that they are the same everywhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.factored import Factored
from smezo_cli.zo.directions.frames import GAUSSIAN, UNIT, inner, on_grid, orthonormal
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.selections.masked import Everything, Masked
from smezo_cli.zo.updates.adam import Adam
from smezo_cli.zo.updates.momentum import Momentum
from smezo_cli.zo.updates.sgd import SGD
from tests.zo.test_optimizer import DTYPES, closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["uv", "uzv", "pz"]


def made(model: nn.Module, kind: str = "uv", **options: Any) -> ZeroOrder:
    """A method whose matrices have rank 2, and new factors at each third step."""
    square, rank = options.pop("square", False), options.pop("rank", 2)
    parts: dict[str, Any] = {
        "selection": Everything(),
        "direction": Factored(kind, rank, 3, is_square=square),
        "estimator": TwoSided(options.pop("num_queries", 1)),
        "update": SGD(),
    }
    common: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "seed": 4, "backend": "eager"}
    common |= {"check": False, "executor": "sequential", "keep_noise": False}
    return ZeroOrder(model, **(parts | common | options))


def numbers(size: int, *stream: Any) -> Tensor:
    return draw(torch.arange(size), size, torch.tensor(stream_key(4, *stream)), "gaussian").double()


def direction_at(opt: ZeroOrder, name: str, step: int, query: int = 0, c: float = 1.0) -> Tensor:
    target = next(t for t in opt.targets if t.name == name)
    mover = opt.direction.mover(step, Move((Term(Key(step, query), c),)))
    return mover.dense(target)[0].view(target.parameter.shape).double()


def test_uv_is_a_new_u_at_each_step_and_a_v_that_stays() -> None:
    opt = made(mlp())  # "0.weight" is (11, 6)
    for step in range(7):
        u = numbers(22, "u", step, 0, "0.weight").view(11, 2)
        v = numbers(12, "v", step // 3, 0, "0.weight").view(2, 6)
        # Two products and a sum in float32, of numbers below 6.7.
        assert (direction_at(opt, "0.weight", step) - u @ v).abs().max().item() < 1e-5


def test_uzv_is_a_new_z_at_each_step_in_frames_that_stay() -> None:
    opt = made(mlp(), "uzv")
    frames = []
    for step in range(6):
        found = direction_at(opt, "0.weight", step) * 2 / math.sqrt(66)
        left, _, right = torch.linalg.svd(found)
        projector = left[:, :2] @ left[:, :2].T, right[:2].T @ right[:2]
        frames.append(projector)
        z = numbers(4, "z", step, 0, "0.weight").view(2, 2)
        wanted = torch.linalg.svdvals(z)  # frames change no singular value
        torch.testing.assert_close(torch.linalg.svdvals(found)[:2], wanted, rtol=1e-5, atol=1e-6)
    for side in (0, 1):
        assert (frames[0][side] - frames[2][side]).abs().max().item() < 1e-5
        assert (frames[2][side] - frames[3][side]).abs().max().item() > 0.1


def test_pz_is_a_new_z_at_each_step_in_a_frame_that_stays() -> None:
    opt = made(mlp(), "pz")
    for step in range(6):
        found = direction_at(opt, "0.weight", step)
        frame = orthonormal(numbers(22, "left", step // 3, 0, "0.weight").view(2, 11).float())
        z = numbers(12, "z", step, 0, "0.weight").view(2, 6)
        # Two products and a sum in float32, of numbers below 6.7.
        assert (found - frame.T @ z).abs().max().item() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_one_dimension_is_perturbed_densely(kind: str) -> None:
    opt = made(mlp(), kind)
    wanted = numbers(11, "z", 5, 1, "0.bias")
    assert torch.equal(direction_at(opt, "0.bias", 5, 1), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_adds_cores_before_it_lifts_them(kind: str) -> None:
    """So the sum of three directions is the direction of the sum, up to rounding."""
    opt = made(mlp(), kind)
    c = [0.5, -2.0, 0.3]
    move = Move(tuple(Term(Key(1, q), a) for q, a in enumerate(c)))
    for target in (t for t in opt.targets if t.parameter.ndim == 2):
        whole = opt.direction.mover(1, move).dense(target)[0].double()
        parts = [a * direction_at(opt, target.name, 1, q).view(-1) for q, a in enumerate(c)]
        # Some ten float32 roundings of numbers below 40.
        assert (whole - torch.stack(parts).sum(0)).abs().max().item() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_opposite_moves_are_opposite_to_the_last_bit(kind: str) -> None:
    opt = made(mlp(), kind)
    for target in opt.targets:
        name = target.name
        assert torch.equal(direction_at(opt, name, 2, c=0.7), -direction_at(opt, name, 2, c=-0.7))


def test_a_uzv_direction_is_as_long_as_dense_noise_on_average() -> None:
    """The mean square of |P|_F^2 / (m n) over 300 draws; its standard deviation is some 0.04."""
    opt = made(nn.Linear(5, 7, bias=False), "uzv", rank=3)
    lengths = [direction_at(opt, "weight", 3 * k).square().mean() for k in range(300)]
    assert abs(torch.stack(lengths).mean().item() - 1) < 0.12


def test_ranks_are_cut_to_the_sides_for_frames_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 8, bias=False), "b": nn.Conv2d(2, 5, 3, bias=False)})
    uv, uzv, pz = (made(model, kind, rank=4) for kind in KINDS)
    for opt, a, b in ((uv, 4 * 8, 4 * 5), (uzv, 3 * 3, 4 * 4), (pz, 4 * 3, 4 * 18)):
        assert [opt.direction.state_size(t) for t in opt.targets] == [a, b]
    assert direction_at(uzv, "a.weight", 0).shape == (8, 3)
    assert torch.linalg.matrix_rank(direction_at(uzv, "b.weight", 0).view(5, 18), tol=1e-4) == 4


def test_entries_may_be_put_into_the_most_square_matrix_first() -> None:
    """Of 5 by 24 that is 10 by 12; rows that a probe picks are those of the whole."""
    embedding = nn.Embedding(5, 24)
    opt = made(embedding, "uzv", square=True)
    found = direction_at(opt, "weight", 0).view(10, 12)
    assert torch.linalg.matrix_rank(found, tol=1e-4) == 2
    mover = opt.mover([0], [0.1])
    whole = torch.empty_like(opt.targets[0].flat)
    mover.whole(embedding.weight, whole)
    rows = torch.tensor([4, 1])
    assert torch.equal(mover.rows(embedding.weight, rows), whole.view(5, 24)[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probes_pick_rows_and_write_both_ways_as_whole_ones(dtype: torch.dtype, kind: str) -> None:
    model = nn.ModuleDict({"e": nn.Embedding(20, 6), "l": nn.Linear(6, 6)}).to(dtype)
    masked = Masked("random", 0.5)
    for selection in (Everything(), masked):
        opt = made(model, kind, selection=selection)
        plus, minus = opt.mover([0], [0.1]), opt.mover([0], [-0.1])
        for target in opt.targets:
            p, flat = target.parameter, target.flat
            a, b, both = torch.empty_like(flat), torch.empty_like(flat), torch.empty(2, len(flat))
            plus.whole(p, a)
            minus.whole(p, b)
            both = both.to(dtype)
            plus.both(p, both[0], both[1])
            assert torch.equal(both, torch.stack([a, b]))
            rows = torch.tensor([3, 0, 2])
            assert torch.equal(plus.rows(p, rows), a.view(p.shape)[rows])
            mask = torch.cat(list(opt.direction.masks(0)))[: len(flat)]
            if target.position == 0 and selection is masked:
                assert torch.equal(a != flat, mask & (a != flat))
                assert 0.3 < mask.float().mean() < 0.7


# -------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 5), (4, 300)])
def test_frames_are_orthonormal_and_their_signs_fixed(shape: tuple[int, int]) -> None:
    """G = L Q with a positive diagonal of L: then Q is uniform where G is Gaussian."""
    g = torch.randn(shape, generator=seeded(5))
    q = orthonormal(g)
    # The Gram matrix squares the condition number of G, here below 1e3.
    assert (q @ q.T - torch.eye(shape[0])).abs().max().item() < 1e-9
    lower = on_grid(g, GAUSSIAN) @ q.T
    assert (lower.triu(1)).abs().max().item() < 1e-6
    assert (lower.diagonal() > 0).all()


@pytest.mark.parametrize("grid", [GAUSSIAN, UNIT])
def test_inner_products_do_not_depend_on_the_order_of_their_sums(grid: float) -> None:
    a = torch.randn(3, 5001, generator=seeded(1))
    b = torch.randn(2, 5001, generator=seeded(2))
    if grid == UNIT:
        a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    order = torch.randperm(5001, generator=seeded(3))
    found = inner(a, b, grid)
    assert torch.equal(found, inner(a[:, order], b[:, order], grid))
    one_by_one = torch.zeros(3, 2, dtype=torch.float64)
    for x, y in zip(on_grid(a, grid).T, on_grid(b, grid).T, strict=True):
        one_by_one += x[:, None] * y
    assert torch.equal(found, one_by_one)
    torch.testing.assert_close(found, a.double() @ b.double().T, rtol=0, atol=5001**0.5 / grid * 4)


# -------------------------------------------------------------------------------- state


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_carried_to_new_factors(kind: str) -> None:
    """uv: N V_old^T V_new / n; uzv and pz: what the new frames hold of the old product."""
    model = nn.Linear(200, 9, bias=False)
    opt = made(model, kind, update=Momentum(0.9))
    (target,), direction = opt.targets, opt.direction
    assert isinstance(direction, Factored)
    assert [s for s in range(10) if direction.refreshes_at(s)] == [3, 6, 9]
    core = torch.randn(direction.state_size(target), generator=seeded(7))

    def lifted(step: int, core: Tensor) -> Tensor:
        direction.begin(step)
        left, right = direction.lifted(target, core)
        return left.double() @ right.double()

    old = lifted(2, core)
    first = direction.factors_of(target)
    now = direction.carry(target, core.clone(), 3)
    new = lifted(3, now)
    frames = direction.factors_of(target)
    if kind == "uv":
        n = core.view(9, 2).double() @ (first[0].double() @ frames[0].double().T) / 200
        # The grid of inner products is 2^-16, of which 200 are added, over 200.
        assert (now.view(9, 2) - n).abs().max().item() < 1e-5
    else:
        left = frames[0].double()
        wanted = left @ left.T @ old
        if kind == "uzv":
            right = frames[1].double()
            wanted = wanted @ right.T @ right / (9 * 200 / 4)  # left is as long as dense noise
        assert (new - wanted).abs().max().item() < 1e-5
    bias = made(nn.Linear(4, 3), kind, update=Momentum(0.9))
    kept = torch.randn(3)
    assert torch.equal(bias.direction.carry(bias.targets[1], kept.clone(), 3), kept)


@pytest.mark.parametrize("update", [Momentum(0.9), Adam([0.9, 0.99], 1e-8)], ids=["mean", "adam"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_as_small_as_the_cores(kind: str, update: Any) -> None:
    model = mlp()  # (11, 6), (3, 11), and 11 + 11 + 11 + 3 in vectors
    opt = made(model, kind, update=update)
    opt.step(closure_of(model))
    cores = {"uv": 2 * 11 + 2 * 3, "uzv": 4 + 4, "pz": 2 * 6 + 2 * 11}[kind]
    factors = {"uv": 2 * 6 + 2 * 11, "uzv": 2 * 17 + 2 * 14, "pz": 2 * 11 + 2 * 3}[kind]
    tensors = opt.snapshot()[1].values()
    assert sum(x.numel() for x in tensors) == len(update.slots) * (cores + 36)
    assert opt.state_bytes == 4 * (len(update.slots) * (cores + 36) + factors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_momentum_of_beta_0_is_a_step_along_the_gradient(kind: str) -> None:
    """The core handed to an update is the one that a plain step lifts, to rounding."""
    a, b = mlp(), mlp()
    plain, mean = made(a, kind, num_queries=3), made(b, kind, num_queries=3, update=Momentum(0.0))
    plain.step(closure_of(a))
    mean.step(closure_of(b))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        # lr times g in one order or the other, of weights of size 1.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------- ways


@pytest.mark.parametrize(
    ("kind", "dtype", "rounding", "backend"),
    [
        *((kind, dtype, "stochastic", "eager") for kind in KINDS for dtype in DTYPES),
        ("uv", torch.float32, "nearest", "compiled"),
        ("uzv", torch.bfloat16, "stochastic", "compiled"),
        ("pz", torch.float32, "stochastic", "compiled"),
    ],
    ids=str,
)
def test_every_way_makes_the_same_steps(
    kind: str, dtype: torch.dtype, rounding: str, backend: str
) -> None:
    """Lockstep or not, compiled or not, noise kept or not."""
    ways: list[dict[str, Any]] = [
        {"keep_noise": "auto"},
        {"backend": backend},
        {"backend": backend, "executor": "lockstep"},
    ]
    found = []
    for way in ways:
        model = mlp(dtype)
        opt = made(
            model, kind, rounding=rounding, weight_decay=0.1, update=Momentum(0.5), lr=0.1, **way
        )
        records = [opt.step(closure_of(model)).projected_grad for _ in range(5)]
        found.append((weights_of(model), records))
    for weights, records in found[1:]:
        assert records == found[0][1]
        assert same(weights, found[0][0])


def test_weights_are_not_moved_in_place() -> None:
    with pytest.raises(ValueError, match=r"^executor=in_place .* does not go with"):
        made(mlp(), executor="in_place")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("vw", 2, 3), "kind=vw: one of uv, uzv"),
        (("uv", 0, 3), "rank=0: must be at least 1"),
        (("uv", 2, 0), "refresh_every=0: must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Factored(*arguments)


def test_directions_of_other_factors_are_not_added() -> None:
    opt = made(mlp())
    with pytest.raises(ValueError, match="a direction of step 2 has other factors than those of"):
        opt.direction.mover(3, Move((Term(Key(2), 1.0),)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_of_some_tensors_moves_these_alone(kind: str) -> None:
    model = mlp()
    opt, before = made(model, kind, update=Momentum(0.5)), weights_of(model)
    only = frozenset({"0.weight", "3.bias"})
    mover = opt.direction.mover(0, Move((Term(Key(0), 0.1, only),)))
    assert mover.only == {id(t.parameter) for t in opt.targets if t.name in only}
    for target in opt.targets:
        plus, minus = torch.empty_like(target.flat), torch.empty_like(target.flat)
        mover.whole(target.parameter, plus)
        assert torch.equal(plus, target.flat) == (target.name not in only)
        mover.both(target.parameter, plus, minus)
        assert torch.equal(plus, minus) == (target.name not in only)
    opt.direction.apply(0, Move((Term(Key(0), 0.1, only),)))
    after = weights_of(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == only


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_may_start_from_a_copy_of_the_weights(kind: str) -> None:
    """Then probes give the moved copy, whole and by rows, whatever the weights are now."""

    class KeepsFirst(SGD):
        copies = ("first",)

    embedding = nn.Embedding(7, 6)
    opt = made(embedding, kind, update=KeepsFirst())
    opt.state_of_update.copy_weights("first", opt.targets)
    wanted = torch.empty_like(opt.targets[0].flat)
    opt.mover([0], [0.1]).whole(embedding.weight, wanted)
    with torch.no_grad():
        embedding.weight.add_(1.0)
    mover = opt.direction.mover(0, Move((Term(Key(0), 0.1),), base="first"))
    found, back = torch.empty_like(wanted), torch.empty_like(wanted)
    mover.whole(embedding.weight, found)
    assert torch.equal(found, wanted)
    mover.both(embedding.weight, found, back)
    assert torch.equal(found, wanted)
    rows = torch.tensor([0, 5])
    assert torch.equal(mover.rows(embedding.weight, rows), wanted.view(7, 6)[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_rests_is_left_alone_and_has_its_state_carried(kind: str) -> None:
    """Whether a tensor rests at a refresh or not, its factors are new then."""
    model = mlp()
    opt = made(model, kind, update=Momentum(0.5))
    for _ in range(3):
        opt.step(closure_of(model))
    resting, other = opt.targets[0], mlp()
    twin = made(other, kind, update=Momentum(0.5))
    for _ in range(3):
        twin.step(closure_of(other))
    before = weights_of(model)
    resting.rests = True
    opt.step(closure_of(model))
    assert {n for n, x in weights_of(model).items() if torch.equal(x, before[n])} == {"0.weight"}
    wanted = twin.direction.carry(
        twin.targets[0], twin.snapshot()[1]["0.weight/momentum"].clone(), 3
    )
    assert torch.equal(opt.snapshot()[1]["0.weight/momentum"], wanted)
