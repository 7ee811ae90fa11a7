"""AdaZeta: a reference written from the paper, the schedule of the released code, what is kept."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.config.compose import compose
from smezo_cli.config.fixed import plain
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.methods.adazeta import AdaZeta, GrowingQueries
from smezo_cli.plan.planner import plan
from smezo_cli.zo.move import Key
from smezo_cli.zo.noise import draw, stream_key
from tests.zo.test_optimizer import X, Y, closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

# One, two, ... queries within 30 steps: int(0.9 e^1.04) for e = step // 4.
GROWS: dict[str, Any] = {"num_queries": 5, "query_scale": 0.9, "last_queries": 8} | {
    "num_epochs": 8,
    "schedule_steps": 32,
}


SMALL = ("task=toy", "model=tiny-llama", "device=cpu", "method=adazeta")


def node_of(*words: str) -> dict[str, Any]:
    return dict(plain(compose([*SMALL, *words]))["method"])


def adazeta(model: nn.Module, **options: Any) -> AdaZeta:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "seed": 5, "backend": "eager"}
    defaults |= {"check": False, "executor": "sequential"} | GROWS
    return AdaZeta(model, **(defaults | options))


class Reference:
    """The paper's step in float64, on the noise of smezo: perturb in place, measure, put back."""

    def __init__(self, model: nn.Module, lr: float, eps: float, decay: float) -> None:
        self.model, self.lr, self.eps, self.decay = model.double(), lr, eps, decay
        self.step_number = 0

    def z(self, name: str, p: Tensor, query: int) -> Tensor:
        key = torch.tensor(stream_key(5, "z", self.step_number, query, name))
        return draw(torch.arange(p.numel()), p.numel(), key, "gaussian").double().view(p.shape)

    def loss(self) -> float:
        return float((self.model(X.double()) - Y).square().mean())

    @torch.no_grad()
    def step(self) -> int:
        epoch = self.step_number // 4
        b = math.log(8 / 0.9) / math.log(8)
        queries = min(max(int(0.9 * epoch**b), 1), 5)
        named = dict(self.model.named_parameters())
        gradient = {name: torch.zeros_like(p) for name, p in named.items()}
        for q in range(queries):
            losses = []
            for factor in (1, -2, 1):
                for name, p in named.items():
                    p.add_(factor * self.eps * self.z(name, p, q))
                losses.append(self.loss())
            found = (losses[0] - losses[1]) / (2 * self.eps)
            for name, p in named.items():
                gradient[name] += found * self.z(name, p, q) / queries
        for name, p in named.items():
            p.sub_(self.lr * (gradient[name] + self.decay * p))
        self.step_number += 1
        return queries


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_thirty_steps_are_those_of_a_reference_in_float64(decay: float) -> None:
    model, double = mlp(), mlp()
    opt, reference = adazeta(model, weight_decay=decay), Reference(double, 1e-2, 1e-3, decay)
    queries = []
    for _ in range(30):
        record = opt.step(closure_of(model))
        queries.append(reference.step())
        assert len(record.projected_grad) == queries[-1]
        assert record.num_forwards == 2 * queries[-1]
    assert queries[0] == 1
    assert set(queries) == {1, 2, 3, 4, 5}
    for (name, p), q in zip(model.named_parameters(), double.parameters(), strict=True):
        # A loss of float32 activations is known to some 1e-7, so a projected gradient to 1e-4; 30
        # steps move a weight by lr times 1e-4 times a z of size 1 each, in any direction.
        assert (p.double() - q).abs().max().item() < 3e-5, name


def test_the_schedule_is_that_of_the_released_script() -> None:
    """LLaMA-2-7B: inc_rate = log(NUM / SHRINK) / log(epochs); 10,000 steps of 16 of 1000 rows.

    An epoch of these has 63 steps, the last of 8 rows.
    """
    queries = GrowingQueries(15, 0.85, 20, 160, 160 * 63)
    rate = math.log((1 / 0.85) * 20) / math.log(10_000 / (1000 / 16))
    for epoch in range(200):
        wanted = min(max(int(0.85 * (epoch**rate)), 1), 15)
        assert {queries.num_queries(63 * epoch + i) for i in (0, 62)} == {wanted}
    found = [queries.num_queries(step) for step in range(10_000)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, 15)
    assert GrowingQueries(15, 1.0, 10**9, 2, 1).num_queries(10**12) == 15  # beyond floats


def schedule_of(*words: str) -> GrowingQueries:
    """That of the settings of a run."""
    node = node_of(*words)
    names = ("num_queries", "query_scale", "last_queries", "num_epochs", "schedule_steps")
    return GrowingQueries(*(node[name] for name in names))


@pytest.mark.parametrize("steps", [20, 333, 10_000])
def test_a_run_of_any_length_has_all_epochs_of_the_schedule(steps: int) -> None:
    """Its steps lie as far on in the schedule as in the run: the last ones have all queries.

    Of 160 epochs with b = 0.622 the mean of the counts is 11.0.
    """
    queries = schedule_of(f"steps={steps}")
    found = [queries.num_queries(step) for step in range(steps)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, 15)
    assert sum(found) / steps == pytest.approx(11.0, abs=0.3)


def test_real_epochs_can_be_given() -> None:
    """Five of 1000 rows, 62.5 steps of 16 each; a run may be longer than its schedule."""
    rate = math.log(20 / 0.85) / math.log(5)
    queries = schedule_of("steps=312", "method.num_epochs=5")
    for step in range(312):
        wanted = min(max(int(0.85 * (step * 5 // 312) ** rate), 1), 15)
        assert queries.num_queries(step) == wanted
    longer = schedule_of("steps=20000", "method.schedule_steps=312", "method.num_epochs=5")
    assert [longer.num_queries(step) for step in range(312)] == [
        queries.num_queries(step) for step in range(312)
    ]
    assert longer.num_queries(20_000) == 15


class Linear:
    """An `Ask` whose loss is g . theta, so that a difference is exactly g . z."""

    eps = 1.0

    def __init__(self, step: int, g: Tensor) -> None:
        self.step, self.g = step, g

    def z(self, keys: Sequence[Key]) -> Tensor:
        streams = [stream_key(3, k.purpose, k.step, k.query, "w") for k in keys]
        key = torch.tensor(streams).T[:, :, None]  # (2, keys, 1)
        numel = len(self.g)
        return draw(torch.arange(numel)[None], numel, key, "gaussian").double()

    def losses(self, groups: object, objective: str = "batch") -> list[list[float]]:
        raise NotImplementedError

    def two_sided(
        self, keys: Sequence[Key], objective: str = "batch", base: str = ""
    ) -> list[float]:
        return (self.z(keys) @ self.g).tolist()


def test_the_mean_of_the_estimate_is_the_gradient() -> None:
    """Of a quadratic a two-sided difference is g . z; 20,000 draws, nearly all by 100 a step."""
    g = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    queries = GrowingQueries(100, 20.0, 100, 2, 2)
    total, draws, counts = torch.zeros(4, dtype=torch.float64), 0, set[int]()
    for step in range(204):
        ask = Linear(step, g)
        gradient = queries.read(queries.measure(ask), step)
        z = ask.z([term.key for term in gradient.terms])
        c = torch.tensor([term.coefficient for term in gradient.terms], dtype=torch.float64)
        assert gradient.divisor == len(c)
        total += c @ z
        draws += len(c)
        counts.add(len(c))
    assert draws > 20_000
    assert counts >= {1, 20, 100}
    error = (total / draws - g).abs()
    deviation = ((g.square().sum() + g.square()) / draws).sqrt()  # of (g . z) z
    assert (error < 4 * deviation).all()


def test_numbers_beyond_the_queries_of_a_step_are_zeros_and_are_not_read() -> None:
    queries = GrowingQueries(5, 0.9, 8, 8, 32)
    g = torch.ones(3, dtype=torch.float64)
    for step in (0, 12, 28):
        scalars = queries.measure(Linear(step, g))
        used = queries.num_queries(step)
        assert len(scalars) == queries.num_scalars == 5
        assert all(scalars[:used])
        assert scalars[used:] == [0.0] * (5 - used)
        other = [*scalars[:used], *[7.0] * (5 - used)]
        assert queries.read(other, step) == queries.read(scalars, step)
        assert queries.forwards(step) == 2 * used


def test_the_weights_after_probes_are_those_before_them() -> None:
    """The released code adds and subtracts in the weights, and leaves rounding errors in them."""
    model = mlp(torch.bfloat16)
    opt = adazeta(model, lr=1e-30)  # an update below rounding
    before = weights_of(model)
    for _ in range(12):
        opt.step(closure_of(model))
    assert same(weights_of(model), before)


def test_the_logged_loss_is_the_mean_of_all_that_were_measured() -> None:
    model = mlp()
    opt, seen, closure = adazeta(model, schedule_steps=8), list[float](), closure_of(model)

    def noted() -> Tensor:
        loss = closure()
        seen.append(float(loss))
        return loss

    for _ in range(6):
        seen.clear()
        record = opt.step(noted)
        assert len(seen) == record.num_forwards
        assert record.loss == sum(seen) / len(seen)


def test_replays_of_a_growing_number_of_queries_are_the_run() -> None:
    """And a schedule of other numbers is another method to a trajectory."""
    first, second = mlp(), mlp()
    ran, replayed = adazeta(first), adazeta(second)
    for _ in range(30):
        record = ran.step(closure_of(first))
        assert len(record.scalars) == 5
        replayed.replay(1e-2, record.scalars)
    assert same(weights_of(first), weights_of(second))
    assert ran.identity() == replayed.identity()
    for key in GROWS:
        assert adazeta(mlp(), **{key: GROWS[key] + 1}).identity() != ran.identity()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_queries": 0}, "num_queries=0: must be at least 1"),
        ({"query_scale": 0.0}, "query_scale=0.0: must be above 0"),
        ({"query_scale": 9.0}, "last_queries=8: must not be below query_scale=9.0"),
        ({"num_epochs": 1}, "num_epochs=1: must be at least 2"),
        ({"schedule_steps": 0}, "schedule_steps=0: must be at least 1"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        adazeta(mlp(), **options)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("method.num_epochs=1", "method.num_epochs must be a whole number of at least 2"),
        ("method.schedule_steps=0", "method.schedule_steps must be a whole number of at least 1"),
        ("method.query_scale=0", "method.query_scale must be a number above 0"),
    ],
)
def test_mistakes_are_one_sentence(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(compose([*SMALL, word]))


def test_a_plan_counts_the_forwards_of_every_step() -> None:
    words = ["method.num_epochs=5", "steps=10", "eval_every=10"]
    settings = check(compose([*SMALL, *words]))
    work = plan(settings, capacity=10**9, tokens=64).work
    rate = math.log(20 / 0.85) / math.log(5)
    wanted = [2 * 2 * min(max(int(0.85 * e**rate), 1), 15) for e in range(5)]
    assert work["forwards of training"] == sum(wanted) > 20
