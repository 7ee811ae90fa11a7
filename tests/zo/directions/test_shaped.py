"""Directions that follow from the state: probes, rows, named entries and updates agree."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.shaped import Shape, Shaped
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, Key, Move, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.selections.layers import SomeLayers
from smezo_cli.zo.selections.masked import Everything, Masked
from smezo_cli.zo.selections.named import Named
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.base import Update, WeightWriter
from tests.zo.test_optimizer import bits, closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Line(Shaped):
    """u = s + 2 z, with s of the state."""

    def shape(self, target: Target, step: int, total: float) -> Shape:
        (shift,) = self.state.read(target)
        return lambda part, z: z * 2 + shift[part] * total


class Keeps(Update):
    """SGD that adds up what it has moved along, after it has read it."""

    slots = ("shift",)

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        def change(g: Tensor, shift: Tensor) -> Tensor:
            shift.add_(g)
            return g * -lr

        weights.elementwise(gradient, change, lr * weights.weight_decay)


def made(model: nn.Module, selection: Any = None, **more: Any) -> Any:
    given = {"lr": 1e-2, "eps": 1e-2, "backend": "eager", "executor": "sequential", "check": False}
    opt = ZeroOrder(
        model,
        selection=selection or Everything(),
        direction=Line(),
        estimator=TwoSided(2),
        update=Keeps(),
        **(given | more),
    )
    for target in opt.targets:  # a state that is known
        (shift,) = opt.state_of_update.of(target)
        shift.copy_(torch.randn(len(shift), generator=seeded(target.position + 9)))
    return opt


def terms(*only: str) -> tuple[Term, ...]:
    first = Term(Key(0, 0), 0.5, frozenset(only) if only else None)
    return (first, Term(Key(0, 1), -0.25))


def wanted(opt: Any, target: Target, own: tuple[Term, ...]) -> Tensor:
    """The sum of c u by the book, float64, of the weights of a target that are trained."""
    from smezo_cli.zo.noise import draw, stream_key

    numel = target.parameter.numel()
    at = torch.arange(numel) if target.index is None else target.index
    shift = opt.state_of_update.of(target)[0].double()
    total = torch.zeros(len(at), dtype=torch.float64)
    for term in own:
        if term.only is None or target.name in term.only:
            key = torch.tensor(stream_key(0, "z", term.key.step, term.key.query, target.name))
            z = draw(at, numel, key, "gaussian").double()
            total += term.coefficient * (shift + 2 * z)
    return total


def copies(opt: Any, move: Move) -> Iterator[tuple[Target, Tensor]]:
    mover = opt.direction.mover(opt.num_steps, move)
    for target in opt.targets:
        out = torch.empty_like(target.flat)
        mover.whole(target.parameter, out)
        yield target, out


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_moved_copy_is_the_weights_plus_the_terms(dtype: torch.dtype, backend: str) -> None:
    """Some terms of one tensor alone, less a decay: to float32, stored to nearest."""
    model = mlp(dtype)
    opt = made(model, backend=backend)
    own = terms("0.weight")
    for target, found in copies(opt, Move(own, decay=0.1)):
        start = target.flat.double()
        exact = start + wanted(opt, target, own) - 0.1 * start
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)
        assert (found != target.flat).float().mean() > 0.9


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_sides_and_rows_are_those_of_whole_copies(
    dtype: torch.dtype, keep: bool, backend: str
) -> None:
    """Bit for bit, from one draw, with noise that is kept or not."""
    model = mlp(dtype)
    opt = made(model, backend=backend)
    opt.direction.keeps = keep
    move = Move((Term(Key(0, 0), 0.5),))
    opt.direction.begin(0)
    plus, minus = (dict((t.name, x) for t, x in copies(opt, m)) for m in (move, move.negated()))
    mover = opt.direction.mover(0, move)
    for target in opt.targets:
        found = torch.empty_like(target.flat), torch.empty_like(target.flat)
        mover.both(target.parameter, *found)
        assert torch.equal(bits(found[0]), bits(plus[target.name]))
        assert torch.equal(bits(found[1]), bits(minus[target.name]))
        rows = torch.tensor([2, 0])
        whole = plus[target.name].view(target.parameter.shape)
        assert torch.equal(bits(mover.rows(target.parameter, rows)), bits(whole[rows]))
    opt.direction.end()


def test_named_entries_are_moved_alone_by_their_own_state() -> None:
    model = mlp()
    names = [name for name, _ in model.named_parameters()]
    index = {name: torch.tensor([0, 2]) for name in names} | {"0.weight": torch.tensor([3, 7, 40])}
    opt = made(model, Named(index))
    own = terms()
    for target, found in copies(opt, Move(own)):
        expected = target.flat.double().clone()
        expected[target.index] += wanted(opt, target, own)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
        rows = torch.tensor([1, 0])
        mover = opt.direction.mover(0, Move(own))
        whole = found.view(target.parameter.shape)
        assert torch.equal(mover.rows(target.parameter, rows), whole[rows])
        pair = torch.empty_like(target.flat), torch.empty_like(target.flat)
        mover.both(target.parameter, *pair)
        assert torch.equal(pair[0], found)
    before = weights_of(model)
    opt.step(closure_of(model))
    for name, now in weights_of(model).items():
        assert set((now != before[name]).view(-1).nonzero().view(-1).tolist()) == set(
            index[name].tolist()
        )


@pytest.mark.parametrize("executor", ["sequential", "lockstep", "batched"])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_an_update_is_along_what_was_probed_with_the_state_of_the_probe(
    executor: str, backend: str
) -> None:
    """Though it writes to that state; and a probe before the first step makes no state."""
    model = mlp()
    opt = made(model, executor=executor, backend=backend, weight_decay=0.1)
    probed = opt.direction.mover(0, Move((Term(Key(0, 0), 1.0),)))
    u = {t.name: wanted(opt, t, (Term(Key(0, 0), 1.0),)) for t in opt.targets}
    v = {t.name: wanted(opt, t, (Term(Key(0, 1), 1.0),)) for t in opt.targets}
    for target in opt.targets:
        found = probed.dense(target)[0].double()
        torch.testing.assert_close(found, u[target.name], rtol=0, atol=2e-6)
    before = {t.name: t.flat.double().clone() for t in opt.targets}
    shift = {t.name: opt.state_of_update.of(t)[0].clone().double() for t in opt.targets}
    p, q = opt.step(closure_of(model)).projected_grad
    for t in opt.targets:
        g = (p * u[t.name] + q * v[t.name]) / 2
        moved = before[t.name] - 1e-2 * g - 1e-3 * before[t.name]
        torch.testing.assert_close(t.flat.double(), moved, rtol=1e-5, atol=1e-5)
        kept = opt.state_of_update.of(t)[0].double() - shift[t.name]
        torch.testing.assert_close(kept, g, rtol=1e-4, atol=1e-4)


def test_a_probe_makes_no_state() -> None:
    model = mlp()
    opt = made(model)
    opt.state_of_update.restore({}, opt.targets)
    opt.losses_at(closure_of(model), 0)
    assert not opt.state_of_update
    opt.num_steps = 3  # weights of step 3 without what belongs to them
    with pytest.raises(ValueError, match="moments of step 3 were not restored"):
        opt.step(closure_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_move_of_the_weights_themselves_rounds_as_asked(dtype: torch.dtype) -> None:
    """To nearest it is the moved copy; by chance one of the two neighbours of the exact value."""
    move = Move((Term(Key(0, 0), 0.5),))
    for rounding in ("nearest", "stochastic"):
        model = mlp(dtype)
        opt = made(model, rounding=rounding)
        copied = {t.name: x for t, x in copies(opt, move)}
        exact = {t.name: t.flat.double() + wanted(opt, t, move.terms) for t in opt.targets}
        opt.direction.apply(0, move)
        differ = 0
        for target in opt.targets:
            size = exact[target.name].abs().clamp(min=1e-3) * torch.finfo(dtype).eps
            assert ((target.flat.double() - exact[target.name]).abs() <= size).all()
            differ += int((target.flat != copied[target.name]).sum())
        assert (differ > 20) == (rounding == "stochastic")


def test_a_move_may_start_from_a_copy_of_the_weights() -> None:
    model = mlp()
    opt = made(model)
    opt.state_of_update.copies = ("anchor",)
    opt.state_of_update.copy_weights("anchor", opt.targets)
    move = Move((Term(Key(0, 0), 0.5),))
    there = {t.name: x for t, x in copies(opt, move)}
    for target in opt.targets:
        target.flat.zero_()
    for target, found in copies(opt, replace(move, base="anchor")):
        assert torch.equal(found, there[target.name])


def test_tensors_rest() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    opt = made(Net(), SomeLayers(0.5))
    opt.selection.begin(opt.targets, 0, 0)
    assert 0 < sum(t.rests for t in opt.targets) < len(opt.targets)
    for target, found in copies(opt, Move(terms())):
        assert torch.equal(found, target.flat) == target.rests


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask does not go with it"):
        made(mlp(), Masked("small", 0.5))


def test_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="executor=in_place measures two points along one dense"):
        made(mlp(), executor="in_place")


def test_steps_are_the_same_whatever_draws() -> None:
    found = []
    for more in ({}, {"backend": "compiled"}, {"executor": "lockstep"}):
        model = mlp()
        opt = made(model, **more)
        for _ in range(4):
            opt.step(closure_of(model))
        found.append(weights_of(model))
    assert same(found[0], found[1])
    assert same(found[0], found[2])
