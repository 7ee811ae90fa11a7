"""QuZO: the paper's step, its two roundings of one z, and that codes are the weights of record."""

import copy
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.methods.quzo import RANGE, QuZO, RoundedMover, RoundedPair
from smezo_cli.zo import noise
from smezo_cli.zo.directions.base import DirectionContext
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.passes.rounded import EagerDraws, NumbaDraws, Stream
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.state import State
from smezo_cli.zo.targets import select
from tests.methods.test_every_method import Ranks
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(16, 32, generator=seeded(1))
Y = torch.randn(16, 33, generator=seeded(2))
FORMS = [(8, torch.float32), (4, torch.float32), (8, torch.bfloat16), (4, torch.float16)]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two matrices that are held as codes, one with an odd number of weights; and a norm."""
    model = nn.Sequential(nn.Linear(32, 49), nn.Tanh(), nn.LayerNorm(49), nn.Linear(49, 33))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) * 0.3)
    return model.to(dtype)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        dtype = model[2].weight.dtype
        return (model(X.to(dtype)).double() - Y).square().mean()

    return closure


def quzo(model: nn.Module, **options: Any) -> QuZO:
    given = {"lr": 1e-3, "eps": 1e-3, "group_size": 16, "check": False, "executor": "sequential"}
    return QuZO(model, **(given | options))


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- the paper's step --------------------------------------------------------------------------


class Reference:
    """The paper's Q-RGE2 with q = 1, tensor by tensor, in float64."""

    def __init__(self, model: nn.Module, bits: int, group: int, lr: float, eps: float) -> None:
        self.model, self.lr, self.eps, self.top = model, lr, eps, 2 ** (bits - 1) - 1
        self.w = {n: p.detach().double() for n, p in model.named_parameters()}
        self.s, self.q = {}, {}
        for name, w in self.w.items():
            if w.numel() >= 1024:
                groups = [g.abs().amax(1, keepdim=True).expand_as(g) for g in w.split(group, 1)]
                self.s[name] = torch.cat(groups, 1) / self.top
                self.q[name] = (w / self.s[name]).round()

    def drawn(self, kind: str, step: int, name: str) -> Tensor:
        n = self.w[name].numel()
        key = torch.tensor(stream_key(0, kind, step, 0, name))
        draw = noise.draw(torch.arange(n), n, key, "gaussian") if kind == "z" else None
        draw = noise.uniform_at(torch.arange(n), n, key) if draw is None else draw
        return draw.double().view(self.w[name].shape)

    def u(self, purpose: str, step: int, name: str, bits: int = 8) -> Tensor:
        size = 2 * RANGE / (2**bits - 1)
        z, chance = self.drawn("z", step, name), self.drawn(purpose, step, name)
        return ((z / size - 0.5 + chance).floor() + 0.5) * size

    def step(self, t: int, loss: Callable[[Tensor], Tensor]) -> float:
        at = []
        for sign in (1, -1):
            w = {n: self.q[n] * self.s[n] if n in self.q else w for n, w in self.w.items()}
            w = {n: x + sign * self.eps * self.u("round u1", t, n) for n, x in w.items()}
            at.append(float(loss(functional_call(self.model, w, (X.double(),)))))
        mu = (at[0] - at[1]) / (2 * self.eps)
        for n, w in self.w.items():
            move = -self.lr * mu * self.u("round u2", t, n)
            if n in self.q:
                whole = (move / self.s[n] + self.drawn("round codes", t, n)).floor()
                self.q[n] = (self.q[n] + whole).clamp(-self.top, self.top)
            else:
                self.w[n] = w + move
        return mu


@pytest.mark.parametrize("bits", [8, 4])
def test_thirty_steps_are_those_of_the_paper(bits: int) -> None:
    """In float32 against float64: mu to 1e-2 of its size over 30 steps.

    A loss of size 1 has 1e-7 of rounding, which mu = dL / 2 eps has times 500; and a draw within
    rounding of a threshold goes the other way, at most one code in a thousand.
    """
    model = network()
    reference = Reference(copy.deepcopy(model).double(), bits, 16, lr=1e-3, eps=1e-3)
    opt = quzo(model, weight_bits=bits)
    size = 0.0
    for step in range(30):
        (mu,) = opt.step(closure_of(model)).projected_grad
        wanted = reference.step(step, lambda y: (y - Y).square().mean())
        size = max(size, abs(wanted))
        assert mu == pytest.approx(wanted, abs=1e-2 * size)
    assert size > 0.1
    assert list(opt.layers) == list(reference.q) == ["0.weight", "3.weight"]
    for name, layer in opt.layers.items():
        first = (network().get_parameter(name).double() / reference.s[name]).round()
        now = layer.codes(slice(0, layer.out_features)).double()
        assert (now != first).float().mean() > 0.05  # they have moved
        assert (now != reference.q[name]).float().mean() < 1e-3
    for name in ("0.bias", "2.weight", "2.bias", "3.bias"):
        found = model.get_parameter(name).double()
        torch.testing.assert_close(found, reference.w[name], atol=1e-3, rtol=0)


def bound(model: nn.Module, bits: int) -> RoundedPair:
    direction = RoundedPair(bits)
    targets = select(model, [], [], codes=True)
    context = DirectionContext(
        targets=targets,
        selection=Everything(),
        seed=0,
        is_stochastic=False,
        backend="eager",
        keep_noise="auto",
        is_in_place=False,
        state=State((), direction.state_size),
    )
    direction.bind(context, 1)
    return direction


def variance_of_rounding(step: float) -> float:
    """E[(Q_SR(z) - z)^2] for z ~ N(0, 1): step^2 E[f (1 - f)], f the place between two levels."""
    z = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    f = z / step - 0.5 - (z / step - 0.5).floor()
    return step**2 * float(torch.trapezoid(f * (1 - f) * density, z))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_two_roundings_leave_no_bias_and_one_has_that_of_its_variance(bits: int) -> None:
    """The mean of (g u_1) u over 20,000 draws is g for u = u_2, and (1 + v) g for u = u_1.

    Within five standard errors of the mean, which are measured. v of 2 bits is above 1.
    """
    draws, g = 20_000, torch.tensor([1.0, -2.0, 0.5])
    model = nn.ParameterList([nn.Parameter(torch.zeros(draws * len(g)))])
    direction = bound(model, bits)
    (target,) = direction.targets
    index = torch.arange(draws * len(g))

    def u(purpose: str) -> Tensor:
        z, of = (direction.stream(target, p, 0, 0) for p in ("z", purpose))
        found = direction.passes.at(index, len(index), Stream(z, of, 1.0))
        return found.view(draws, len(g)).double()

    v = variance_of_rounding(direction.step)
    first, second = u("round u1"), u("round u2")
    c = (first * g).sum(1, keepdim=True)
    for other, factor in ((second, 1.0), (first, 1.0 + v)):
        found = c * other
        error = found.std(0) / math.sqrt(draws)
        assert ((found.mean(0) - factor * g).abs() < 5 * error).all()
        if bits == 2:  # so that the two can be told apart
            assert v > 1
            wrong = 2 + v - factor
            assert ((found.mean(0) - wrong * g).abs() > 5 * error).any()
    # Levels: half a step apart from 0, as many as bits can tell apart.
    levels = torch.unique(torch.cat([first, second]).float())
    assert len(levels) <= 2**bits
    assert levels.abs().min() == pytest.approx(direction.step / 2)
    assert levels.abs().max() <= RANGE * (1 + 1e-6)


def test_both_are_roundings_of_one_z_in_every_tensor() -> None:
    """Generators that are seeded anew in between change nothing, and nobody's generator is used.

    Another implementation seeds the global generator in its quantiser: from the second tensor on
    its update goes along another z than its probe.
    """
    model = network()
    opt: Any = quzo(model, perturb_bits=4)
    step = opt.direction.step
    mover = opt.direction.mover(0, Move((Term(Key(0), 1.0),)))
    assert len(opt.targets) == 6
    for target in opt.targets:
        numel = target.parameter.numel() if target.layer is None else target.layer.num_weights
        index = torch.arange(numel)
        key = torch.tensor(stream_key(0, "z", 0, 0, target.name))
        z = noise.draw(index, numel, key, "gaussian")
        both = []
        for purpose in ("round u1", "round u2"):
            (stream,) = mover.streams(target, purpose)
            u = opt.passes.at(index, numel, stream)
            assert ((u - z).abs() < step * (1 + 1e-5)).all()
            both.append(u)
        assert (both[0] != both[1]).any()

    def seeding() -> Tensor:
        torch.manual_seed(0)
        return closure_of(other)()

    other = copy.deepcopy(model)
    again = quzo(other, perturb_bits=4)
    for _ in range(5):
        state = torch.get_rng_state()
        opt.step(closure_of(model))
        assert torch.equal(torch.get_rng_state(), state)
        again.step(seeding)
    assert same(held(model), held(other))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_move_by_the_update_in_the_mean(bits: int, decay: float) -> None:
    """The sum over 60,000 codes is that of the amounts, within five standard deviations."""
    model = nn.Sequential(nn.Linear(200, 300, bias=False))
    opt = quzo(model, weight_bits=bits)
    (layer,) = opt.layers.values()
    every = slice(0, 300)
    layer.store(every, torch.full((300, 200), 3, dtype=torch.int8))
    mover: RoundedMover = opt.direction.mover(0, Move((Term(Key(0), 1e-4),), decay))
    (target,) = opt.targets
    (stream,) = mover.streams(target, "round u2")
    u = opt.passes.at(torch.arange(60_000), 60_000, stream).view(300, 200)
    amounts = [u / layer.scale_of(every)]
    amounts += [torch.full_like(u, -3 * decay)] if decay else []
    mover.update(target)
    moved = (layer.codes(every) - 3).double()
    f = torch.stack([a - a.floor() for a in amounts]).double()
    spread = math.sqrt(float((f * (1 - f)).sum()))
    weight = torch.where(u > 0, 1.0, -1.0).double()  # lest the two signs cancel
    for sign in (torch.ones_like(weight), weight):
        expected = float((torch.stack(amounts).sum(0).double() * sign).sum())
        assert abs(float((moved * sign).sum()) - expected) < 5 * spread
    assert moved.abs().max() <= len(amounts) * (1 + float(amounts[0].abs().max().ceil()))
    assert (moved != 0).any()


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("rows", [400, 401])
@pytest.mark.parametrize("bits", [8, 4])
def test_large_layers_are_moved_part_by_part_as_each_weight_is(
    bits: int, rows: int, backend: str
) -> None:
    """In two threads and several chunks: against what the streams give position by position."""
    columns, decay = 300, 0.05
    torch.set_num_threads(2)  # the fixture puts it back
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    opt = quzo(model, weight_bits=bits, backend=backend)
    ((name, layer),) = opt.layers.items()
    every, numel = slice(0, rows), rows * columns
    index = torch.arange(numel)

    def uniform(*parts: str | int) -> Tensor:
        key = torch.tensor(stream_key(0, *parts, name))
        return noise.uniform_at(index, numel, key).view(rows, columns)

    terms = tuple(Term(Key(3, query), c) for query, c in enumerate((4e-3, -2e-2)))
    mover = opt.direction.mover(3, Move(terms, decay))
    (target,) = opt.targets
    codes, scales = layer.codes(every).float(), layer.scale_of(every)
    moved, step = codes.clone(), layer.rows(every)
    eager = EagerDraws(opt.passes.step)
    both = zip(mover.streams(target, "round u1"), mover.streams(target, "round u2"), strict=True)
    total = torch.zeros(rows, columns)
    for query, (first, second) in enumerate(both):
        total += eager.at(index, numel, first).view(rows, columns)
        u = eager.at(index, numel, second).view(rows, columns)
        moved += (u / scales + uniform("round codes", 3, query)).floor()
    moved += (codes * -decay + uniform("round decay", 3)).floor()
    out = torch.empty(numel)
    mover.whole(target.parameter, out)
    assert torch.equal(out.view(rows, columns), step + total)
    mover.update(target)
    assert torch.equal(layer.codes(every).float(), moved.clamp(-layer.largest, layer.largest))
    assert (layer.codes(every).float() != codes).any()


def test_codes_stay_in_their_range() -> None:
    model = network()
    opt = quzo(model, lr=10.0, weight_bits=4)
    for step in range(3):
        opt.replay(10.0, [(-1.0) ** step * 50])
    for layer in opt.layers.values():
        codes = layer.codes(slice(0, layer.out_features))
        assert codes.min() == -7
        assert codes.max() == 7


# --- what every method promises, with codes -----------------------------------------------------


@pytest.mark.parametrize(("bits", "dtype"), FORMS)
def test_a_replay_is_the_run_to_the_last_code(bits: int, dtype: torch.dtype) -> None:
    first, second = network(dtype), network(dtype)
    options = {"weight_bits": bits, "num_queries": 2, "weight_decay": 0.1, "lr": 1e-2}
    options["rounding"] = "stochastic"
    ran, replayed = quzo(first, **options), quzo(second, **options)
    before = held(first)
    for _ in range(5):
        replayed.replay(1e-2, ran.step(closure_of(first)).scalars)
    assert same(held(first), held(second))
    assert ran.identity() == replayed.identity()
    moved = {n for n, x in held(first).items() if not torch.equal(x, before[n])}
    assert moved == set(ran.trained)


@pytest.mark.parametrize(("bits", "dtype"), FORMS)
def test_a_run_goes_on_from_any_step(bits: int, dtype: torch.dtype) -> None:
    model = network(dtype)
    opt = quzo(model, weight_bits=bits, lr=1e-2)
    saved = []
    for _ in range(4):
        saved.append((copy.deepcopy(model), opt.snapshot()))
        opt.step(closure_of(model))
    for step, (other, (numbers, tensors)) in enumerate(saved):
        again = quzo(other, weight_bits=bits, lr=1e-2)
        again.restore(numbers, tensors)
        for _ in range(4 - step):
            again.step(closure_of(other))
        assert same(held(other), held(model))


@pytest.mark.parametrize(("bits", "dtype"), FORMS)
def test_lockstep_gives_the_numbers_of_sequential(bits: int, dtype: torch.dtype) -> None:
    models = [network(dtype), network(dtype)]
    found = []
    for model, executor in zip(models, ("sequential", "lockstep"), strict=True):
        opt = quzo(model, weight_bits=bits, executor=executor, lr=1e-2, check=True)
        found.append([opt.step(closure_of(model)).projected_grad for _ in range(4)])
    assert found[0] == found[1]
    assert same(held(models[0]), held(models[1]))


@pytest.mark.parametrize("bits", [8, 4])
def test_parts_of_a_tensor_are_moved_as_the_whole(bits: int) -> None:
    """Rows alone, all of it, and both sides at once: one u_1 at every place."""
    model = network()
    opt = quzo(model, weight_bits=bits)
    for target in opt.targets:
        plus, minus = (opt.direction.mover(0, Move((Term(Key(0), c),))) for c in (0.1, -0.1))
        shape = target.parameter.shape
        if target.layer is not None:
            shape = (target.layer.out_features, target.layer.in_features)
        out = [torch.empty(math.prod(shape)) for _ in range(4)]
        plus.whole(target.parameter, out[0])
        minus.whole(target.parameter, out[1])
        plus.both(target.parameter, out[2], out[3])
        assert torch.equal(out[0], out[2])
        assert torch.equal(out[1], out[3])
        rows = torch.tensor([0, 5, shape[0] - 1])
        assert torch.equal(plus.rows(target.parameter, rows), out[0].view(shape)[rows])
        step, mask = plus.dense(target)
        torch.testing.assert_close((out[0] - out[1]) / 2, step, atol=1e-6, rtol=1e-5)
        assert mask.all()


def test_a_step_that_fails_changes_nothing_and_two_ranks_make_the_steps_of_one() -> None:
    alone, models = network(), [network(), network()]
    of_one = quzo(alone, num_queries=2, lr=1e-2)

    def failing() -> Tensor:
        raise RuntimeError("no loss")

    before = held(alone)
    with pytest.raises(RuntimeError, match="no loss"):
        of_one.step(failing)
    assert same(held(alone), before)
    for _ in range(3):
        of_one.step(closure_of(alone))
    ranks = Ranks(2)

    def steps(rank: int) -> None:
        opt = quzo(models[rank], num_queries=2, lr=1e-2)
        for _ in range(3):
            opt.step(ranks.closure(rank, closure_of(models[rank])))

    threads = [threading.Thread(target=steps, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(held(model), held(alone)) for model in models)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_loss_falls_and_codes_alone_can_do_it(bits: int) -> None:
    model = network()
    opt = quzo(model, weight_bits=bits, freeze=["*bias", "2.weight"], lr=1e-2)
    assert list(opt.trained) == ["0.weight", "3.weight"]
    assert opt.num_weights == 32 * 49 + 49 * 33
    assert opt.active_share() == 1.0
    first = closure_of(model)().item()
    for _ in range(100):
        opt.step(closure_of(model))
    assert closure_of(model)().item() < 0.9 * first


def test_a_step_holds_the_float_weights_of_one_layer_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    opt: Any = quzo(model)
    opt.step(lambda: model(torch.ones(2, 64)).square().mean())
    scratch = sum(b.numel() for b in opt._probe._scratch.values())
    assert scratch <= 64 * 64 + 64  # of one layer and its bias, for one forward at a time


def test_numba_draws_what_torch_draws() -> None:
    """Bit for bit, at every place of a tensor with an odd number of weights."""
    step = 2 * RANGE / 15
    eager, numba = EagerDraws(step), NumbaDraws(step)
    cpu, stream = torch.device("cpu"), Stream((1 << 62, -5), (17, -(1 << 60)), -3e-3)
    for ask in (
        lambda draws: torch.stack(draws.pair(1000, 21_001, cpu, stream)),
        lambda draws: torch.stack(draws.chances(1000, 21_001, cpu, stream.chance)),
        lambda draws: draws.at(torch.arange(20_001).flip(0).view(3, -1), 20_001, stream),
    ):
        assert torch.equal(ask(eager), ask(numba))


def test_numba_makes_the_same_steps() -> None:
    models = [network(), network()]
    for model, backend in zip(models, ("eager", "compiled"), strict=True):
        opt = quzo(model, backend=backend, num_queries=2, weight_decay=0.1, lr=1e-2)
        assert opt.passes.name == {"eager": "eager", "compiled": "numba"}[backend]
        for _ in range(3):
            opt.step(closure_of(model))
    assert same(held(models[0]), held(models[1]))


# --- what does not go with it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"executor": "in_place"}, "executor=in_place moves the weights themselves"),
        ({"keep_noise": True}, "keep_noise=true keeps one z"),
        ({"perturb_bits": 1}, "perturb_bits=1: from 2 to 8"),
        ({"weight_bits": 3}, "bits=3: 8 or 4"),
    ],
)
def test_what_does_not_go_with_codes_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        quzo(network(), **options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method.executor=in_place", "method=quzo are integers: use method.executor=auto"),
        ("sparsity=0.5", "method quzo has no sparsity"),
        ("method.weight_bits=3", "method.weight_bits must be 8 or 4"),
        ("method.perturb_bits=16", "method.perturb_bits must be 8, 7, 6, 5, 4, 3 or 2"),
        (
            "+method.adapter={kind:lora,r:2,alpha:4,targets:[q_proj]}",
            "method.adapter beside method=quzo",
        ),
        ("device=auto +model.device_map=auto", "a model of integers lies on one device so far"),
    ],
)
def test_a_run_refuses_it_before_torch_is_loaded(words: str, said: str) -> None:
    line = ["task=toy", "model=tiny-llama", "method=quzo", "device=cpu", *words.split()]
    with pytest.raises(UserError, match=said):
        check(compose(line))


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_of_codes_is_exported_as_an_ordinary_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its test metric is that of the exported model; its delta makes the same codes again."""
    words = "train method=quzo model=tiny-llama task=toy device=cpu steps=6 eval_every=3 lr=1e-2"
    words += " task.num_train=16 task.num_dev=8 task.num_test=16 method.weight_bits=4 task.prompt=0"
    assert main([*words.split(), f"runs_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "codes   14 linear layers in 4 bits" in said
    (run,) = (tmp_path / "default").iterdir()
    assert main(["export", str(run), str(tmp_path / "delta"), "--delta"]) == 0
    assert main(["replay", str(tmp_path / "delta"), "--split", "none"]) == 0
    assert main(["export", str(run), str(tmp_path / "model"), "--step", "6"]) == 0
    capsys.readouterr()
    from transformers import AutoModelForCausalLM

    from smezo_cli.run.loaded import Loaded
    from smezo_cli.run.trained import opened, trained

    with opened(str(run)) as (folder, state, settings, _):
        job = Loaded(settings, "cpu", lambda line: None, with_rows=False)
        assert trained(folder, state, job, 6, print) == 6
    ids = torch.tensor([[5, 9, 11, 7]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        mine: Any = job.model(input_ids=ids).logits
        assert torch.equal(mine, theirs(input_ids=ids).logits)
    assert main(["eval", str(run), "dtype=bfloat16"]) == 2
    assert "the codes of method=quzo belong to scales" in capsys.readouterr().err
