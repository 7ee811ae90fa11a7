"""LeZO: which layers rest, what they cost, and a reference written from its paper."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from smezo_cli.methods.lezo import LeZO
from smezo_cli.methods.mezo import MeZO
from smezo_cli.zo.noise import draw, stream_key
from smezo_cli.zo.selections.layers import layer_of
from tests.methods.reference import weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> LeZO:
    given = {"lr": 1e-2, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return LeZO(model, **given | more)


class Chain(nn.Module):
    """Layers after a layer that has no number; notes forwards of layers that are wrapped."""

    def __init__(self, num_layers: int = 5) -> None:
        super().__init__()
        self.wrapped = 0
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(num_layers)])

    def forward(self) -> Tensor:
        weight = self.embed.weight
        x = self.embed(torch.linspace(-1, 1, 6, dtype=weight.dtype).view(2, 3))
        for layer in self.layers:
            self.wrapped += getattr(layer.forward, "is_probe", False)
            x = torch.tanh(layer(x))
        return x.double().square().sum()


def reference(sparsity: float, queries: int, decay: float) -> dict[str, Tensor]:
    """Thirty steps in float64: m_t is 0 on layers drawn by step, and on no others."""
    net, lr, eps = Chain().double(), 1e-2, 1e-3
    theta = weights64(net)
    names = [f"layers.{i}" for i in range(5)]
    for step in range(30):
        drawn = sorted(names, key=lambda name: stream_key(0, "layers", step, name))
        resting = drawn[: round(sparsity * 5)]
        move = {n: torch.zeros_like(x) for n, x in theta.items()}
        for query in range(queries):
            z = z_of(theta, step, query)
            for name in theta:
                z[name] *= not any(name.startswith(f"{layer}.") for layer in resting)
            points = [{n: x + s * eps * z[n] for n, x in theta.items()} for s in (1, -1)]
            plus, minus = (float(functional_call(net, point, ())) for point in points)
            for name in theta:
                move[name] += (plus - minus) / (2 * eps) * z[name] / queries
        for name, x in theta.items():
            active = not any(name.startswith(f"{layer}.") for layer in resting)
            theta[name] = x - lr * active * (move[name] + decay * x)
    return theta


@pytest.mark.parametrize(("sparsity", "queries", "decay"), [(0.6, 1, 0.0), (0.2, 3, 0.3)])
def test_thirty_steps_are_those_of_the_paper(sparsity: float, queries: int, decay: float) -> None:
    """Within 2e-4: eps 1e-3 makes 1e-4 of the rounding of float32 weights in p."""
    model = Chain()
    opt = made(model, sparsity=sparsity, num_queries=queries, weight_decay=decay)
    for _ in range(30):
        opt.step(model)
    expected, start = reference(sparsity, queries, decay), weights64(Chain())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, expected[name], atol=2e-4, rtol=0)
        assert (x - start[name]).abs().max() > 1e-3  # each layer's turn has come


@contextmanager
def passes_counted(opt: LeZO) -> Iterator[list[str]]:
    """Notes each pass over a tensor, of probes and of updates."""
    passes, calls = opt.direction.passes, list[str]()
    inner = {name: getattr(passes, name) for name in ("move", "move_both")}

    def counted(name: str, *args: Any) -> None:
        calls.append(name)
        inner[name](*args)

    for name in inner:
        setattr(passes, name, partial(counted, name))
    yield calls
    for name in inner:
        delattr(passes, name)


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
def test_a_layer_at_rest_costs_no_pass_no_wrapped_forward_and_no_update(executor: str) -> None:
    """Of 8 layers 2 are active, and the layer without a number: 3 times weight and bias."""
    model = Chain(8)
    opt = made(model, executor=executor, keep_noise=False)
    seen = set()
    for _ in range(12):
        before, model.wrapped = weights_of(model), 0
        with passes_counted(opt) as calls:
            opt.step(model)
        now = weights_of(model)
        active = {layer_of(n) for n, x in now.items() if not torch.equal(x, before[n])}
        assert "" in active
        assert len(active) == 3
        seen |= active
        assert model.wrapped == 2 * 2
        probes = {"sequential": 2, "lockstep": 1}[executor]  # one draw is for both
        assert len(calls) == (probes + 1) * 6
        assert opt.active_share() == pytest.approx((16 + 2 * 20) / (16 + 8 * 20))
    assert len(seen) == 9


def test_with_nothing_at_rest_it_is_mezo() -> None:
    models = [mlp(), mlp()]
    for cls, model, more in ((LeZO, models[0], {"sparsity": 0.0}), (MeZO, models[1], {})):
        opt = cls(model, lr=1e-2, eps=1e-3, backend="eager", check=False, **more)
        for _ in range(3):
            opt.step(closure_of(model))
    assert same(*map(weights_of, models))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_replay_lets_the_same_layers_rest(dtype: torch.dtype) -> None:
    """Whichever step an optimizer has made before, and however passes are computed."""
    first, second = Chain().to(dtype), Chain().to(dtype)
    opt = made(first, sparsity=0.6, num_queries=2, rounding="stochastic")
    other = made(second, sparsity=0.6, num_queries=2, rounding="stochastic", backend="compiled")
    for _ in range(4):
        other.active_share()
        other.replay(1e-2, opt.step(first).scalars)
    assert same(*map(weights_of, (first, second)))


def test_in_place_layers_rest_too() -> None:
    found = []
    for executor in ("sequential", "in_place"):
        model = Chain()
        opt = made(model, sparsity=0.6, executor=executor)
        before = weights_of(model)
        opt.step(model)
        changed = {n for n, x in weights_of(model).items() if not torch.equal(x, before[n])}
        found.append((weights64(model), {layer_of(name) for name in changed}))
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 3
    for name, x in found[0][0].items():
        # The probes leave roundings of 1e-7 in the weights.
        torch.testing.assert_close(x, found[1][0][name], atol=1e-6, rtol=0)


def test_equal_losses_wake_no_layer() -> None:
    """They have parameters checked in the middle of a step, for which every layer is asked."""
    model = Chain()
    opt = made(model, sparsity=0.6, num_queries=2, weight_decay=1.0, check=True)
    opt.step(model)
    before, calls = weights_of(model), [0]

    def closure() -> Tensor:
        calls[0] += 1
        return torch.tensor(1.0) if calls[0] <= 2 else model()

    record = opt.step(closure)
    assert record.projected_grad[0] == 0 != record.projected_grad[1]
    assert calls[0] > record.num_forwards  # so it was asked
    changed = {n for n, x in weights_of(model).items() if not torch.equal(x, before[n])}
    assert len({layer_of(name) for name in changed}) == 3


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (nn.Linear(3, 2), "none"),
        (nn.ModuleDict({"h": nn.ModuleList([nn.Linear(3, 2)])}), "only h.0"),
    ],
    ids=["none", "one"],
)
def test_a_model_without_two_layers_is_refused_in_a_sentence(model: nn.Module, known: str) -> None:
    with pytest.raises(ValueError, match=f"and here is {known}: choose method=mezo$"):
        made(model)
    made(model, sparsity=0.0)


def noise_of_steps(name: str, numel: int, steps: int) -> Tensor:
    """z of a tensor in each step: float64 (steps, numel)."""
    keys = torch.tensor([stream_key(0, "z", step, 0, name) for step in range(steps)])
    return draw(torch.arange(numel), numel, keys.T[:, :, None], "gaussian").double()


def test_the_mean_of_the_estimate_is_the_gradient_of_each_layer_times_its_share() -> None:
    """On a quadratic p = sum_l m_l z_l . g_l exactly, so the estimate of a layer is p m_l z_l.

    Over 20,000 steps; of 4 layers 1 is active, so its mean is g / 4, and that of the rest is g. An
    entry has variance of at most |g|^2 + g_i^2, 11 here: 5 sigma of the mean are 0.12.
    """
    steps = 20_000
    model = nn.ModuleDict({"rest": nn.Linear(2, 1, bias=False)})
    model["layers"] = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(4)])
    opt = made(model, sparsity=0.75)
    g = {t.name: torch.tensor([0.5, -1.5]) * (1 + i / 8) for i, t in enumerate(opt.targets)}
    active = torch.ones(steps, len(opt.targets), dtype=torch.float64)
    for step in range(steps):
        opt.selection.begin(opt.targets, step, 0)
        active[step] -= torch.tensor([t.rests for t in opt.targets], dtype=torch.float64)
    z = {
        t.name: noise_of_steps(t.name, 2, steps) * active[:, i : i + 1]
        for i, t in enumerate(opt.targets)
    }
    p = sum((z[name] * g[name]).sum(1, keepdim=True) for name in z)
    for name in z:
        share = 1.0 if name.startswith("rest") else 0.25
        torch.testing.assert_close(
            (p * z[name]).mean(0), share * g[name].double(), atol=0.12, rtol=0
        )
