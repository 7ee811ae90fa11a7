"""DiZO against a reference written from its rule; its probes only read, and nothing is divided."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.dizo import DiZO, Stretched, distance, stretched
from smezo_cli.methods.mezo import MeZO
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key
from smezo_cli.zo.step import NonFiniteLoss
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import bits, closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECTED = ("0.weight", "3.weight", "3.bias")
EVERY, INNER = 4, 3


def made(model: nn.Module, **more: Any) -> DiZO:
    given: dict[str, Any] = {"lr": 2e-2, "eps": 1e-3, "backend": "eager", "check": False}
    given |= {"project": ["*.weight", "3.*"], "freeze": ["2.*"], "executor": "sequential"}
    given |= {"project_every": EVERY, "project_steps": INNER}
    return DiZO(model, **given | more)


def reference(steps: int, lr: float, eps: float, eps_p: float, s: float, tau: float) -> Any:
    """The rule in float64; returns the weights, gamma / |Delta|, and whether each z was cut."""
    start = {n: x for n, x in weights64(mlp()).items() if not n.startswith("2.")}
    rest = {n: x for n, x in weights64(mlp()).items() if n.startswith("2.")}
    theta, ratios, was_cut = dict(start), [], []

    def loss(at: dict[str, Tensor]) -> float:
        return loss64(at | rest)

    for step in range(steps):
        z = z_of(theta, step)
        plus, minus = ({n: x + sign * eps * z[n] for n, x in theta.items()} for sign in (1, -1))
        p = (loss(plus) - loss(minus)) / (2 * eps)
        theta = {n: x - lr * p * z[n] for n, x in theta.items()}
        if (step + 1) % EVERY:
            continue
        delta = {n: theta[n] - start[n] for n in PROJECTED}
        length = {n: float(d.norm()) for n, d in delta.items()}
        gamma = dict(length)

        def at(gamma: dict[str, float]) -> dict[str, Tensor]:
            return theta | {n: start[n] + g / length[n] * delta[n] for n, g in gamma.items()}  # noqa: B023  # called at once

        for inner in range(INNER):
            cut = {}
            for n in PROJECTED:
                key = torch.tensor(stream_key(0, "gamma", step, inner, n))
                drawn = float(draw(torch.zeros(1, dtype=torch.int64), 1, key, "gaussian"))
                most = tau * length[n] / eps_p
                cut[n] = max(-most, min(drawn, most))
                was_cut.append(cut[n] != drawn)
            there = loss(at({n: g + eps_p * cut[n] for n, g in gamma.items()}))
            back = loss(at({n: g - eps_p * cut[n] for n, g in gamma.items()}))
            slope = (there - back) / (2 * eps_p)
            for n, g in gamma.items():
                low, high = (1 - tau) * length[n], (1 + tau) * length[n]
                gamma[n] = max(low, min(g - s * length[n] * slope * cut[n], high))
        theta = at(gamma)
        ratios.append({n: gamma[n] / length[n] for n in PROJECTED})
    return theta, ratios, was_cut


@pytest.mark.parametrize(("eps_p", "s", "tau"), [(0.1, 2.0, 0.2), (0.05, 3.0, 0.3)])
@pytest.mark.parametrize("executor", ["sequential", "lockstep", "batched"])
def test_thirty_steps_are_those_of_the_rule(
    eps_p: float, s: float, tau: float, executor: str
) -> None:
    """Within 5e-4: weights are float32, and eps 1e-3 makes 1e-4 of their rounding in p.

    Both sets of numbers meet z that are cut and others, gamma at its bounds and between.
    """
    model = mlp()
    more = {"project_eps": eps_p, "project_lr": s, "project_bound": tau, "executor": executor}
    opt = made(model, **more)
    for _ in range(30):
        opt.step(closure_of(model))
    expected, ratios, was_cut = reference(30, 2e-2, 1e-3, eps_p, s, tau)
    for name, wanted in expected.items():
        found = model.get_parameter(name).detach().double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4)
    changes = [abs(r - 1) for of_step in ratios for r in of_step.values()]
    assert len(ratios) == 7
    assert max(changes) > 0.02  # projections matter
    at_bound = [math.isclose(change, tau, rel_tol=1e-6) for change in changes]
    for what in (at_bound, was_cut):
        assert any(what)
        assert not all(what)


def test_without_a_change_of_length_it_is_mezo_bit_for_bit() -> None:
    """At project_lr 0 a projection leaves every bit of what MeZO's step made, in any dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours, plain = mlp(dtype), mlp(dtype)
        opt = made(ours, project_lr=0.0)
        mezo = MeZO(plain, lr=2e-2, eps=1e-3, freeze=["2.*"], backend="eager", check=False)
        for _ in range(9):
            opt.step(closure_of(ours))
            mezo.step(closure_of(plain))
        assert same(weights_of(ours), weights_of(plain))


def test_probes_of_a_projection_leave_every_bit_where_the_released_way_does_not() -> None:
    """In float16 weights times alpha over alpha are others; ours are the bits of before."""
    model = mlp(torch.float16)
    opt, closure = made(model), closure_of(model)
    for _ in range(EVERY - 1):
        opt.step(closure)
    before, seen = weights_of(model), 0

    def looking() -> Tensor:
        nonlocal seen
        seen += 1
        # While a forward runs, a module holds its moved copy: between forwards it must not.
        assert same(weights_of(model), before)
        return closure()

    record = opt.step(looking)
    assert seen == record.num_forwards == 2 + 2 * INNER
    assert not same(weights_of(model), before)
    w = mlp(torch.float16).get_parameter("0.weight").detach()
    there_and_back = (w * 1.1) / 1.1
    assert not torch.equal(bits(there_and_back), bits(w))
    assert torch.equal(bits(stretched(w, torch.zeros_like(w), 0.0).half()), bits(w))


@pytest.mark.parametrize("failing", [2, 2 + 2 * INNER - 1])
def test_a_projection_that_fails_leaves_the_weights_of_before_the_step(failing: int) -> None:
    """The update, too, is not written: its first loss fails, or its last one is not finite."""
    model = mlp()
    opt, closure = made(model), closure_of(model)
    for _ in range(EVERY - 1):
        opt.step(closure)
    before, numbers, calls = weights_of(model), opt.snapshot()[0], 0

    def bad() -> Tensor:
        nonlocal calls
        calls += 1
        return closure() * (math.nan if calls > failing else 1.0)

    with pytest.raises(NonFiniteLoss):
        opt.step(bad)
    assert calls == failing + (1 if failing % 2 else 2)  # both of a pair are measured
    assert same(weights_of(model), before)
    assert opt.snapshot()[0] == numbers
    again = mlp()
    whole = made(again)
    for _ in range(EVERY):
        whole.step(closure_of(again))
    opt.step(closure)
    assert same(weights_of(model), weights_of(again))


def test_the_start_of_projected_tensors_alone_is_kept() -> None:
    model = mlp(torch.bfloat16)
    opt = made(model)
    start = {name: p.detach().clone().view(-1) for name, p in model.named_parameters()}
    for _ in range(EVERY + 1):
        opt.step(closure_of(model))
    kept = opt.snapshot()[1]
    assert kept.keys() == {f"{name}/start" for name in PROJECTED}
    assert all(torch.equal(kept[f"{name}/start"], start[name]) for name in PROJECTED)
    assert opt.state_bytes == sum(x.numel() * 2 for x in kept.values())
    assert opt.remark == f"projects 3 tensors, whose start takes {opt.state_bytes:,} bytes"


def test_scalars_and_forwards_of_a_step() -> None:
    """A fixed count of scalars; the slopes of the inner steps are there with a projection alone."""
    model = mlp()
    opt = made(model, num_queries=2)
    for step in range(2 * EVERY):
        record = opt.step(closure_of(model))
        is_due = step % EVERY == EVERY - 1
        assert record.num_forwards == opt.forwards(step) == 4 + 2 * INNER * is_due
        assert len(record.scalars) == opt.num_scalars == 2 + INNER
        assert len(record.projected_grad) == 2
        assert all((slope != 0) == is_due for slope in record.scalars[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_round_by_chance_where_asked(dtype: torch.dtype) -> None:
    """By chance, a stretch of half a unit in the last place moves half of the weights."""

    def moved(rounding: str) -> Tensor:
        model = nn.ParameterDict({"w": torch.full((4000,), 1.0, dtype=dtype)})
        opt: Any = made(model, project=["w"], freeze=[], rounding=rounding)
        opt.state_of_update.copy_weights("start", opt.targets)
        (target,) = opt.targets
        unit = torch.finfo(dtype).eps
        target.flat.fill_(1 + unit)
        opt.direction.stretch(target, 0.25, step=3)
        found = (target.flat.double() - 1) / unit
        assert set(found.tolist()) <= {1.0, 2.0}
        return found

    assert (moved("nearest") == 1).all()
    # Of 4,000 draws with chance 1/4 the mean has a standard deviation of 0.007: 5 of them.
    assert abs(float(moved("stochastic").mean()) - 1.25) < 0.035


def test_a_replay_under_stochastic_rounding_is_the_run() -> None:
    ran, again = mlp(torch.bfloat16), mlp(torch.bfloat16)
    first, second = (made(m, rounding="stochastic", weight_decay=0.1) for m in (ran, again))
    for _ in range(2 * EVERY):
        second.replay(2e-2, first.step(closure_of(ran)).scalars)
    assert same(weights_of(ran), weights_of(again))


def test_distances_are_exact_and_small_ones_do_not_vanish() -> None:
    """1e-9 squared is below the grid of the exact sums; to 1e-6, for float32 differences."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(3_000_000, generator=g)
    for size in (1e-3, 1.0, 1e4):
        there = start + size * torch.randn(len(start), generator=g)
        wanted = float((there.double() - start.double()).norm())
        assert distance(there, start) == pytest.approx(wanted, rel=1e-6)
    tiny = torch.full((100,), 1e-9)
    assert distance(tiny, torch.zeros(100)) == pytest.approx(1e-8, rel=1e-6)
    order = torch.randperm(len(start), generator=g)
    assert distance(there[order], start[order]) == distance(there, start)
    assert distance(start, start) == 0.0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"project": ["*.weight", "*q_proj*"]}, "project '*q_proj*' matches no trained tensor"),
        ({"project": ["2.*"]}, "there are 0.weight, 0.bias: give globs"),
        ({"project": []}, "project=[] names no tensor"),
        ({"project_every": 1}, "project_every=1: a whole number of at least 2"),
        ({"project_bound": 1.0}, "project_bound=1.0: a number in (0, 1)"),
        ({"executor": "in_place"}, "executor=in_place measures two points"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        made(mlp(), **more)


def test_the_default_takes_keys_and_values_of_a_transformer() -> None:
    attention = nn.ModuleDict({f"{k}_proj": nn.Linear(2, 2, bias=False) for k in "qkvo"})
    model = nn.ModuleDict({"layers": nn.ModuleList([attention])})
    opt = DiZO(model, lr=1e-2, eps=1e-3)
    assert opt.identity()["project"] == ["layers.0.k_proj.weight", "layers.0.v_proj.weight"]


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_an_embedding_are_measured_as_the_update_then_writes_them(
    dtype: torch.dtype, backend: str
) -> None:
    """Where the update rounds by chance, a projection begins at what chance has made of it."""
    model = nn.Embedding(64, 8).to(dtype)
    more = {"project": ["weight"], "freeze": [], "backend": backend}
    opt: Any = made(model, rounding="stochastic", **more)
    opt.state_of_update.copy_weights("start", opt.targets)
    move, picked = Move((Term(Key(3), 1e-3),), decay=1e-3), torch.tensor([5, 0, 63])
    stretch = [Stretched(move.terms, move.decay, middle={"weight": by}) for by in (0.0, 0.3)]
    rows, further = (opt.direction.mover(3, m).rows(model.weight, picked) for m in stretch)
    nearest = opt.direction.mover(3, move).rows(model.weight, picked)
    whole = torch.empty_like(model.weight.view(-1))
    opt.direction.mover(3, stretch[1]).whole(model.weight, whole)
    opt.direction.apply(3, move)
    assert torch.equal(bits(rows), bits(model.weight[picked]))
    assert torch.equal(bits(further), bits(whole.view(64, 8)[picked]))
    assert not torch.equal(bits(rows), bits(nearest))


def test_the_identity_says_which_scalars_are_slopes_of_a_projection() -> None:
    """(Q, project_steps) = (1, 10) and (2, 9) record as many scalars, which mean other steps."""
    one = made(mlp(), num_queries=1, project_steps=10).identity()
    two = made(mlp(), num_queries=2, project_steps=9).identity()
    assert one["num_scalars"] == two["num_scalars"]
    assert one != two
