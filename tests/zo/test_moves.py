"""Moves of some tensors, of named entries, and from a copy of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Dense, DenseAlone
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient, Key, Move, Term, keys
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.selections.layers import SomeLayers, layer_of
from smezo_cli.zo.selections.masked import Everything, Masked
from smezo_cli.zo.targets import Target
from smezo_cli.zo.updates.adam import Adam
from smezo_cli.zo.updates.base import Update, WeightWriter
from smezo_cli.zo.updates.momentum import Momentum
from smezo_cli.zo.updates.sgd import SGD
from tests.zo.test_optimizer import bits, closure_of, mlp, same, watched, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Picked(Everything):
    """Every third entry of each tensor."""

    def set_thresholds(self, targets: Sequence[Target]) -> None:
        super().set_thresholds(targets)
        for target in targets:
            target.index = torch.arange(0, target.parameter.numel(), 3)


def made(model: nn.Module, **parts: Any) -> ZeroOrder:
    given = {
        "selection": Everything(),
        "direction": Dense(),
        "estimator": TwoSided(),
        "update": SGD(),
        **{"lr": 1e-2, "eps": 1e-3, "executor": "sequential", "backend": "eager", "check": False},
    }
    return ZeroOrder(model, **given | parts)  # type: ignore[arg-type]  # parts and Common mixed


class WithTokens(nn.Module):
    """An embedding, whose rows are looked up, and a layer of an odd size."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(11, 5), nn.Linear(5, 3)
        self.to(dtype)

    def forward(self) -> Tensor:
        hidden = self.embed(torch.tensor([[1, 4], [4, 9]])).mean(1)
        return self.out(hidden).double().square().sum()


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_named_entries_are_those_of_a_whole_move(
    executor: str, dtype: torch.dtype, backend: str
) -> None:
    """The same z at the same places, the others as they were; losses are those of such weights."""
    model = WithTokens(dtype)
    start = weights_of(model)
    opt = made(model, selection=Picked(), executor=executor, backend=backend, check=True)
    record = opt.step(model)
    whole = made(WithTokens(dtype))
    whole.replay(1e-2, record.scalars)
    for target in whole.targets:
        expected = start[target.name].view(-1).clone()
        expected[::3] = bits(target.flat)[::3]
        assert torch.equal(bits(opt.targets[target.position].flat), expected)
    probed = WithTokens(dtype)
    twin = made(probed, selection=Picked())
    losses = []
    for sign in (1, -1):
        point = Move((Term(Key(0), sign * 1e-3),))
        with placed(twin, point):
            losses.append(float(probed().detach()))
    assert record.scalars == ((losses[0] - losses[1]) / 2e-3,)


@contextmanager
def placed(opt: ZeroOrder, move: Move) -> Iterator[None]:
    """The weights themselves moved, for a while."""
    before = {t.name: t.flat.clone() for t in opt.targets}
    mover = opt.direction.mover(0, move)
    for target in opt.targets:
        mover.whole(target.parameter, out := torch.empty_like(target.flat))
        target.flat.copy_(out)
    yield
    for target in opt.targets:
        target.flat.copy_(before[target.name])


def test_the_state_of_named_entries_is_no_larger_than_they_are() -> None:
    """Adam on them is Adam on all, at those places."""
    model, whole = WithTokens(), WithTokens()
    start = weights_of(model)
    opt = made(model, selection=Picked(), update=Adam((0.9, 0.99), 1e-8))
    dense = made(whole, update=Adam((0.9, 0.99), 1e-8))
    for _ in range(3):
        dense.replay(1e-2, opt.step(model).scalars)
    for target in opt.targets:
        name, places = target.name, target.index
        assert places is not None
        moved, expected = (weights_of(m)[name].view(-1) for m in (model, whole))
        assert torch.equal(moved[places], expected[places])
        rest = torch.ones_like(moved, dtype=torch.bool)
        rest[places] = False
        assert torch.equal(moved[rest], start[name].view(-1)[rest])
        assert [x.numel() for x in opt.state_of_update.of(target)] == [len(places)] * 2
    assert opt.state_bytes == 8 * sum(t.num_trained for t in opt.targets)


def test_stochastic_rounding_of_named_entries_is_that_of_all() -> None:
    model, whole = WithTokens(torch.bfloat16), WithTokens(torch.bfloat16)
    for update in (SGD(), Adam((0.9, 0.99), 1e-8)):
        opt = made(model, selection=Picked(), rounding="stochastic", update=update)
        dense = made(whole, rounding="stochastic", update=update)
        dense.replay(1e-2, opt.step(model).scalars)
        for target in opt.targets:
            moved, expected = (weights_of(m)[target.name].view(-1)[::3] for m in (model, whole))
            assert torch.equal(bits(moved), bits(expected))


class Blocks(TwoSided):
    """One query for each tensor, which moves it alone."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(len(names))
        self.names = [frozenset([name]) for name in names]

    def measure(self, ask: Any) -> list[float]:
        pairs = []
        for key, only in zip(keys(ask.step, self.num_scalars), self.names, strict=True):
            there = Move((Term(key, ask.eps, only),))
            pairs.append((there, there.negated()))
        return [(plus - minus) / (2 * ask.eps) for plus, minus in ask.losses(pairs)]

    def read(self, scalars: Sequence[float], step: int) -> Gradient:
        terms = zip(keys(step, self.num_scalars), scalars, self.names, strict=True)
        return Gradient(tuple(Term(*term) for term in terms))


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_terms_of_some_tensors_move_these_alone(executor: str, backend: str) -> None:
    model = mlp()
    names = [name for name, _ in model.named_parameters()]
    opt = made(model, estimator=Blocks(names), executor=executor, backend=backend)
    closure, start = closure_of(model), weights_of(model)
    found = opt.step(closure).scalars
    for query, name in enumerate(names):
        alone = mlp()
        one = made(
            alone,
            freeze=[other for other in names if other != name],
            estimator=TwoSided(len(names)),
        )
        expected = one.step(closure_of(alone)).scalars[query]
        assert found[query] == expected
        moved = mlp()
        mover = made(moved).direction.mover(0, Move((Term(Key(0, query), -1e-2 * expected),)))
        mover.whole(moved.get_parameter(name), out := torch.empty(start[name].numel()))
        assert torch.equal(weights_of(model)[name].view(-1), bits(out))


class FromAnchor(Update):
    """Copies the weights in every second step, and moves them in every one."""

    copies = ("anchor",)

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        if weights.step % 2 == 0:
            weights.copy_weights("anchor")
            weights.state.numbers["at"] = weights.step
        weights.move(gradient, -lr)


class AtAnchor(TwoSided):
    """Asks at the copy of the weights once there is one."""

    def measure(self, ask: Any) -> list[float]:
        return ask.two_sided(keys(ask.step, self.num_scalars), base="anchor" if ask.step else "")  # type: ignore[no-any-return]


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
def test_a_copy_of_the_weights_is_probed_as_the_weights_would_be(executor: str) -> None:
    model = mlp()
    opt = made(model, estimator=AtAnchor(), update=FromAnchor(), executor=executor)
    closure = closure_of(model)
    opt.step(closure)
    record = opt.step(closure)
    alone = made(twin := mlp(), estimator=TwoSided())  # the weights of before the first step
    alone.num_steps = 1
    assert alone.step(closure_of(twin)).scalars == record.scalars
    numbers, tensors = opt.snapshot()
    assert numbers["state"] == {"at": 0}
    again = made(copy := mlp(), estimator=AtAnchor(), update=FromAnchor(), executor=executor)
    copy.load_state_dict(model.state_dict())
    again.restore(numbers, tensors)
    assert again.step(closure_of(copy)).scalars == opt.step(closure).scalars
    assert same(weights_of(model), weights_of(copy))
    assert opt.state_bytes == sum(4 * t.parameter.numel() for t in opt.targets)


def stack(num_layers: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(num_layers)]
    return nn.ModuleDict({"embed": nn.Linear(4, 4), "layers": nn.ModuleList(layers)})


def loss_of(model: nn.ModuleDict, calls: list[str] | None = None) -> Any:
    def closure() -> Tensor:
        x = model["embed"](torch.linspace(-1, 1, 8).view(2, 4))
        for layer in model["layers"]:  # type: ignore[attr-defined]  # a ModuleList
            if calls is not None and getattr(layer.forward, "is_probe", False):
                calls.append("wrapped")
            x = torch.tanh(layer(x))
        return x.double().square().sum()

    return closure


def test_a_layer_is_the_name_up_to_its_first_number() -> None:
    assert layer_of("model.layers.3.mlp.up_proj.weight") == "model.layers.3"
    assert layer_of("layers.0.weight") == "layers.0"
    assert layer_of("0.weight") == "0"
    assert layer_of("model.embed_tokens.weight") == ""
    assert layer_of("h2.weight") == ""


def test_layers_at_rest_cost_nothing_and_stay_as_they_are() -> None:
    model = stack(8)
    opt = made(model, selection=SomeLayers(0.75))
    at_rest = set()
    for _ in range(12):
        before, calls = weights_of(model), list[str]()
        opt.step(loss_of(model, calls))
        changed = {n for n, x in weights_of(model).items() if not torch.equal(x, before[n])}
        layers = {layer_of(name) for name in changed}
        assert len(layers - {""}) == 2
        assert "" in layers
        assert len(calls) == 2 * 2  # two losses, two layers
        at_rest.add(frozenset(layers))
    assert len(at_rest) > 6
    assert opt.active_share() == pytest.approx(3 / 9)


def test_layers_that_had_no_turn_yet_go_on_from_a_snapshot() -> None:
    """Their moments are zeros, in a snapshot as in the run that goes on."""
    model, twin = stack(8), stack(8)
    first, again = (
        made(m, selection=SomeLayers(0.75), update=Adam((0.9, 0.99), 1e-8)) for m in (model, twin)
    )
    assert first.snapshot()[1] == {}
    first.step(loss_of(model))
    twin.load_state_dict(model.state_dict())
    again.restore(*first.snapshot())
    for _ in range(4):
        assert again.step(loss_of(twin)) == first.step(loss_of(model))
    assert same(weights_of(twin), weights_of(model))


@pytest.mark.parametrize(
    "update",
    [SGD(), Momentum(0.0), Adam((0.0, 0.0), 1e-8)],
    ids=lambda update: type(update).__name__,
)
def test_in_place_updates_what_the_mask_took_before_its_writes(update: Update) -> None:
    """In bfloat16 weights do not come back exactly: some of them beyond the threshold."""
    model = watched(2000).to(torch.bfloat16)
    opt = made(
        model,
        selection=Masked("small", 0.5),
        direction=Dense("rademacher"),
        update=update,
        executor="in_place",
        **{"eps": 5.3, "lr": 0.5, "clip_projected_grad": 1.0},
    )
    before, h = model.w.detach().clone(), opt.targets[0].h
    with torch.no_grad():
        opt.executors.used.losses(model, opt._pair(0, 5.3))
        assert ((model.w.abs() <= h) != (before.abs() <= h)).any()
        model.w.copy_(before)
    opt.direction.end()
    opt.step(model)
    moved = (model.w.detach() - before).abs() > 0.25  # by 0.5, and by rounding
    assert torch.equal(moved, before.abs() <= h)


def test_named_entries_among_rows_in_any_order() -> None:
    """Label words come as the task has them, not sorted."""
    model = WithTokens()
    opt = made(model, selection=Picked())
    mover = opt.direction.mover(0, Move((Term(Key(0), 1e-2),)))
    whole = torch.empty(55)
    mover.whole(model.embed.weight, whole)
    for rows in ([7, 2, 9], [0, 10, 5, 3], [4]):
        found = mover.rows(model.embed.weight, torch.tensor(rows))
        assert torch.equal(found, whole.view(11, 5)[rows])


def test_a_direction_alone_is_what_a_move_adds() -> None:
    """Of whole tensors and of named entries; tensors that the move leaves out are zeros."""
    for selection in (Everything(), Picked()):
        model = mlp()
        opt = made(model, selection=selection)
        direction = opt.direction
        assert isinstance(direction, Dense)
        only = frozenset(target.name for target in opt.targets[1:])
        mover = direction.mover(0, Move((Term(Key(0), 0.25, only),)))
        of = DenseAlone(direction, mover)
        for target in opt.targets:
            alone = torch.full_like(target.flat, 7.0)
            of.whole(target.parameter, alone)
            rows = torch.arange(target.parameter.shape[0]).flip(0)
            found = of.rows(target.parameter, rows)
            assert torch.equal(found, alone.view(target.parameter.shape)[rows])
            target.parameter.data.zero_()  # so that a moved copy is exactly what is added
            moved = torch.empty_like(target.flat)
            mover.whole(target.parameter, moved)
            assert torch.equal(alone, moved)
            assert bool(alone.any()) == (target.name in only)
