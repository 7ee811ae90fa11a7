"""Block-wise ZO-SGD: its blocks, their noise, and a reference written from its paper."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.zo_block import ZOBlock, blocks_of
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.targets import select
from tests.methods.reference import weights64, z_of
from tests.methods.test_lezo import Chain, noise_of_steps
from tests.zo.test_optimizer import same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> ZOBlock:
    given = {"lr": 1e-2, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return ZOBlock(model, **given | more)


def reference(blocks: list[list[str]], queries: int, decay: float) -> dict[str, Tensor]:
    """Thirty steps in float64: two losses for each block and query, all at the same weights."""
    net, lr, eps = Chain().double(), 1e-2, 1e-3
    theta = weights64(net)
    for step in range(30):
        move = {n: decay * x for n, x in theta.items()}
        for query in range(queries):
            z = z_of(theta, step, query)
            for block in blocks:
                inside = {n: z[n] if any(n.startswith(b) for b in block) else 0 * z[n] for n in z}
                points = [{n: x + s * eps * inside[n] for n, x in theta.items()} for s in (1, -1)]
                plus, minus = (float(functional_call(net, point, ())) for point in points)
                for n in move:
                    move[n] = move[n] + (plus - minus) / (2 * eps) * inside[n] / queries
        theta = {n: x - lr * move[n] for n, x in theta.items()}
    return theta


@pytest.mark.parametrize(
    ("num_blocks", "blocks", "queries", "decay"),
    [
        (None, [["embed"], *([f"layers.{i}."] for i in range(5))], 1, 0.0),
        (
            2,
            [["embed"], ["layers.0.", "layers.1."], ["layers.2.", "layers.3.", "layers.4."]],
            3,
            0.3,
        ),
    ],
    ids=["layers", "groups"],
)
def test_thirty_steps_are_those_of_the_paper(
    num_blocks: int | None, blocks: list[list[str]], queries: int, decay: float
) -> None:
    """Within 2e-4: eps 1e-3 makes 1e-4 of the rounding of float32 weights in p."""
    model = Chain()
    opt = made(model, num_blocks=num_blocks, num_queries=queries, weight_decay=decay)
    for _ in range(30):
        record = opt.step(model)
        assert len(record.scalars) == len(record.projected_grad) == len(blocks) * queries
        assert record.num_forwards == 2 * len(record.scalars)
    expected, start = reference(blocks, queries, decay), weights64(Chain())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, expected[name], atol=2e-4, rtol=0)
        assert (x - start[name]).abs().max() > 1e-3


def test_blocks_of_equal_shapes_have_different_noise() -> None:
    """The released code seeds every block alike; of 20 numbers of two layers here none is equal."""
    opt = made(Chain())
    move = Move(
        tuple(term._replace(coefficient=1.0) for term in opt.estimator.read([1.0] * 6, 0).terms)
    )
    z = {}
    for target in opt.targets:
        out = torch.empty_like(target.flat)
        opt.direction.mover(0, move).whole(target.parameter, out)
        z[target.name] = out - target.flat
    layers = [torch.cat([z[f"layers.{i}.weight"], z[f"layers.{i}.bias"]]) for i in range(5)]
    for i, one in enumerate(layers):
        for other in layers[:i]:
            assert (one - other).abs().min() > 1e-6


def test_a_block_is_probed_alone() -> None:
    """Two forwards each, in which the layers of the block alone are wrapped."""
    model = Chain(8)
    wrapped = []

    def closure() -> Tensor:
        model.wrapped = 0
        loss: Tensor = model()
        wrapped.append(model.wrapped)
        return loss

    made(model, num_blocks=3).step(closure)
    assert wrapped == [0, 0, 2, 2, 3, 3, 3, 3]  # the block without a number comes first


def test_the_blocks_of_a_model() -> None:
    """Layers in the order of their numbers; frozen tensors are in none."""
    targets = select(Chain(12), ["layers.3.*", "*bias"], [])
    alone = blocks_of(targets, None)
    assert alone[0] == {"embed.weight"}
    assert alone[1:] == [{f"layers.{i}.weight"} for i in range(12) if i != 3]
    first, *groups = blocks_of(targets, 4)
    assert first == {"embed.weight"}
    assert list(map(len, groups)) == [2, 3, 3, 3]
    assert groups[-1] == {f"layers.{i}.weight" for i in (9, 10, 11)}
    assert blocks_of(select(nn.Linear(2, 2), [], []), None) == [{"weight", "bias"}]
    assert len(blocks_of(select(nn.Sequential(nn.Linear(2, 2)), [], []), None)) == 1
    with pytest.raises(ValueError, match=r"num_blocks=12: 11 trained layers have a number"):
        made(Chain(12), num_blocks=12, freeze=["layers.3.*"])


class Quadratic(nn.Module):
    """A sum of squares of three tensors, two of them layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.Linear(3, 2) for _ in range(2)])
        self.rest = nn.Linear(3, 1)

    def forward(self) -> Tensor:
        outs = [part(torch.ones(3)).double() for part in (*self.parts, self.rest)]
        return torch.cat(outs).square().sum()


def test_the_projected_gradients_of_the_blocks_add_up_to_mezos() -> None:
    """On a quadratic, up to 1e-3, what rounding to float32 makes of differences of 1e-3."""
    model = Quadratic()
    options: dict[str, Any] = {"lr": 1e-9, "eps": 1e-2, "backend": "eager", "check": False}
    of_blocks = made(model, **options).step(model).projected_grad
    (whole,) = MeZO(model, **options).step(model).projected_grad
    assert len(of_blocks) == 3
    assert sum(of_blocks) == pytest.approx(whole, abs=1e-3)
    assert abs(whole) > 0.1


def test_the_mean_of_the_estimate_is_the_gradient() -> None:
    """On a quadratic p_b = z_b . g_b exactly, so the estimate of a block is p_b z_b.

    Over 20,000 steps: an entry has variance |g_b|^2 + g_i^2, at most 6; 5 sigma are 0.09. Of MeZO
    it would have |g|^2 of all blocks.
    """
    opt = made(Quadratic())
    names = [t.name for t in opt.targets]
    g = {
        n: torch.linspace(-1, 1, 2, dtype=torch.float64) * (1 + i / 8) for i, n in enumerate(names)
    }
    z = {name: noise_of_steps(name, 2, 20_000) for name in names}
    for block in opt.estimator.blocks:  # type: ignore[attr-defined]  # EachBlock
        p = sum((z[name] * g[name]).sum(1, keepdim=True) for name in block)
        for name in block:
            torch.testing.assert_close((p * z[name]).mean(0), g[name], atol=0.09, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 2])
def test_other_ways_to_compute_give_the_same_bits(queries: int, dtype: torch.dtype) -> None:
    """Lockstep, noise kept or not, compiled passes, a replay."""
    model = Chain().to(dtype)
    options = {"num_queries": queries, "weight_decay": 0.1, "keep_noise": False}
    opt = made(model, **options)
    records = [opt.step(model) for _ in range(4)]
    ways: list[dict[str, Any]] = [{"executor": "lockstep"}, {"backend": "compiled"}]
    ways += [{"keep_noise": True}, {"keep_noise": True, "executor": "lockstep"}] * (queries == 1)
    for way in ways:
        again = Chain().to(dtype)
        other = made(again, **options | way)
        assert [other.step(again) for _ in range(4)] == records, way
        assert same(weights_of(again), weights_of(model)), way
    replayed = Chain().to(dtype)
    other = made(replayed, **options)
    for record in records:
        other.replay(1e-2, record.scalars)
    assert same(weights_of(replayed), weights_of(model))


def test_each_projected_gradient_is_clipped_by_itself() -> None:
    model, other = Chain(), Chain()
    record = made(model, clip_projected_grad=0.5).step(model)
    cut = [max(-0.5, min(p, 0.5)) for p in record.projected_grad]
    assert record.clipped == sum(abs(p) > 0.5 for p in record.projected_grad)
    assert 0 < record.clipped < 6
    made(other).replay(1e-2, cut)
    assert same(weights_of(model), weights_of(other))


def test_in_place_it_is_refused() -> None:
    with pytest.raises(ValueError, match="executor=in_place measures two points along one dense"):
        made(Chain(), executor="in_place")


def test_a_key_is_drawn_in_a_step_alone() -> None:
    estimator = made(Chain(), num_queries=2).estimator
    for step in (0, 7):
        terms = estimator.read(range(12), step).terms
        assert {term.key for term in terms} == {Key(step, 0), Key(step, 1)}
        assert [term.coefficient for term in terms] == list(range(12))
        assert all(isinstance(term, Term) and term.only for term in terms)
