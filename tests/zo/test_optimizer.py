"""The zeroth-order step: eight invariants, its parity with the textbook, and what may go wrong."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from smezo_cli.methods.first_order import FirstOrder
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.zo import noise
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.selections.masks import threshold
from smezo_cli.zo.step import NonFiniteLoss, StepRecord

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Closure = Callable[[], Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.randn(16, 6, generator=seeded(1))
Y = torch.randn(16, 3, generator=seeded(2))


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small network none of whose tensors is constant."""
    model = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.LayerNorm(11), nn.Linear(11, 3))
    g = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return model.to(dtype)


def closure_of(model: nn.Module) -> Closure:
    """Squared error on fixed data, in float64 so that losses are not the limit."""

    def closure() -> Tensor:
        dtype = next(model.parameters()).dtype
        return (model(X.to(dtype)).double() - Y).square().mean()

    return closure


def sparse(model: nn.Module, **options: Any) -> SparseMeZO:
    defaults: dict[str, Any] = {
        "lr": 1e-2,
        "eps": 1e-3,
        "sparsity": 0.5,
        "backend": "eager",
        "check": False,
    }
    defaults["executor"] = "sequential"
    return SparseMeZO(model, **(defaults | options))


def bits(x: Tensor) -> Tensor:
    return x.detach().view({2: torch.int16, 4: torch.int32}[x.element_size()]).clone()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(p) for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(opt: Any, closure: Closure, steps: int) -> list[StepRecord]:
    return [opt.step(closure) for _ in range(steps)]


class Watched(nn.Module):
    """One tensor of weights; each forward notes the values that it computes with."""

    def __init__(self, weight: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(weight.clone())
        self.loss = loss
        self.seen: list[Tensor] = []

    def forward(self) -> Tensor:
        self.seen.append(self.w.detach().clone())
        return self.loss(self.w.double())


def watched(numel: int = 200) -> Watched:
    """Weights of size 1 and a loss that is not even; moving any of them changes it."""
    slopes = torch.linspace(0.5, 3, numel, dtype=torch.float64)
    weight = torch.randn(numel, generator=seeded(3))
    return Watched(weight, lambda w: (slopes * w + 0.1 * w**2 + 0.01 * w**3).sum())


# ------------------------------------------------------------------------------ eight invariants

WAYS = {
    "sequential": {"executor": "sequential", "keep_noise": False},
    "sequential, kept": {"executor": "sequential", "keep_noise": True},
    "lockstep": {"executor": "lockstep", "keep_noise": False},
    "lockstep, kept": {"executor": "lockstep", "keep_noise": True},
    "in place": {"executor": "in_place"},
}
MASKS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0.0},
    "small": {"mask": "small"},
    "large": {"mask": "large"},
    "random": {"mask": "random"},
    "random, resampled": {"mask": "random", "mask_resample": "step"},
}


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_1_the_update_goes_along_the_probed_direction(way: str, mask: str, kind: str) -> None:
    """Every step, what the two forwards saw spans the very line on which the weights then move."""
    model, eps, lr = watched(), 0.1, 0.01
    opt = sparse(model, eps=eps, lr=lr, noise=kind, **WAYS[way], **MASKS[mask])
    for _ in range(5):
        before = model.w.detach().double()
        model.seen.clear()
        (g,) = opt.step(model).projected_grad
        plus, minus = (seen.double() for seen in model.seen)
        after = model.w.detach().double()
        probed = (plus - minus) / (2 * eps)
        updated = (after - before) / (-lr * g)
        assert torch.equal(probed != 0, updated != 0)
        # Weights below 8 are stored to 2.4e-7 at worst: five roundings in place, seen through eps
        # and lr g.
        assert (probed - updated).abs().max().item() < 5 * 2.4e-7 * (1 / eps + 1 / abs(lr * g))
        assert (plus + minus - 2 * before).abs().max().item() < 5 * 2.4e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_queries": 3}, {"keep_noise": True}], ids=str)
def test_2_probing_leaves_every_bit_of_the_weights(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """While forwards run the parameters hold their old bits, and nothing wrote to them."""
    model = mlp(dtype)
    loss, before = closure_of(model), weights_of(model)
    versions = [p._version for p in model.parameters()]
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        value = loss()
        assert same(weights_of(model), before)
        assert [p._version for p in model.parameters()] == versions
        return value

    sparse(model, eps=0.1, **options).step(closure)
    assert calls == 2 * options.get("num_queries", 1)
    assert not same(weights_of(model), before)  # the update did move them


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_2_many_probes_leave_every_bit_of_the_weights(dtype: torch.dtype) -> None:
    """Fifty steps whose updates vanish in rounding end with the first weights, bit for bit."""
    model = mlp(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.1 * p.sign())  # away from zero, where any step is stored
    before = weights_of(model)
    run(sparse(model, lr=1e-30, eps=0.1), closure_of(model), 50)
    assert same(weights_of(model), before)


def test_3_one_key_gives_one_direction_at_any_two_points() -> None:
    """z depends on (seed, step, query, name) alone, not on the weights or on what ran before."""
    here, there = mlp(seed=0), mlp(seed=1)
    a, b = (sparse(m, sparsity=0.0, keep_noise=False) for m in (here, there))
    run(b, closure_of(there), 3)
    b.restore({**b.snapshot()[0], "num_steps": 0}, {})

    def z_of(opt: ZeroOrder) -> list[Tensor]:
        return [opt.mover([0], [1.0]).dense(target)[0] for target in opt.targets]

    at_here, at_there = z_of(a), z_of(b)
    assert all(torch.equal(x, y) for x, y in zip(at_here, at_there, strict=True))
    run(a, closure_of(here), 1)
    assert not any(torch.equal(x, y) for x, y in zip(z_of(a), at_here, strict=True))


def test_3_a_snapshot_is_no_view_of_the_state() -> None:
    """What was saved does not change while the run goes on."""
    model = mlp()
    opt = sparse(model, mask_refresh_every=1)
    run(opt, closure_of(model), 2)
    saved = opt.snapshot()
    text = json.dumps(saved)
    run(opt, closure_of(model), 3)
    assert json.dumps(saved) == text != json.dumps(opt.snapshot())


@pytest.mark.parametrize("mask", MASKS)
def test_4_q_queries_use_q_directions_and_average(mask: str) -> None:
    """The directions are unlike one another; the update is the mean of g_q z_q."""
    model, eps, lr = watched(), 0.1, 0.01
    opt = sparse(model, eps=eps, lr=lr, num_queries=3, **MASKS[mask])
    before = model.w.detach().double()
    record = opt.step(model)
    z = [
        (a.double() - b.double()) / (2 * eps) for a, b in zip(*[iter(model.seen)] * 2, strict=True)
    ]
    cosines = torch.corrcoef(torch.stack(z)) - torch.eye(3)
    # 100 entries are active in the sparse masks: 0.1 is one standard error.
    assert cosines.abs().max().item() < 0.5
    mean = torch.stack([g * x for g, x in zip(record.projected_grad, z, strict=True)]).mean(0)
    moved = before - lr * mean - model.w.detach().double()
    # Directions recovered through 1 / eps from weights below 8, stored to 2.4e-7.
    largest = max(map(abs, record.projected_grad))
    assert moved.abs().max().item() < 5 * 2.4e-7 * (1 + lr * largest / eps)


def test_4_the_mean_of_queries_is_the_mean_of_single_probes() -> None:
    """Each query's projected gradient is that of this query probed alone at the same weights."""
    model = mlp()
    opt = sparse(model, num_queries=3)
    closure, eps = closure_of(model), 1e-3
    alone = []
    with torch.no_grad():
        for q in (2, 0, 1):  # in another order than the step's
            pair = [opt.mover([q], [eps]), opt.mover([q], [-eps])]
            losses = opt.executors.used.losses(closure, pair)
            alone.append((q, float(losses[0] - losses[1]) / (2 * eps)))
    assert opt.step(closure).projected_grad == tuple(g for _, g in sorted(alone))


def counted(closure: Closure) -> tuple[Closure, list[None]]:
    """The closure, and a list that grows by one each time it is called."""
    calls: list[None] = []

    def counting() -> Tensor:
        calls.append(None)
        return closure()

    return counting, calls


@pytest.mark.parametrize("options", [*WAYS.values(), {"num_queries": 3}], ids=str)
def test_5_forwards_counted_are_forwards_made(options: dict[str, Any]) -> None:
    """The closure is called twice a query, as documented, and so the record says."""
    model = mlp()
    closure, calls = counted(closure_of(model))
    opt = sparse(model, **options)
    queries = options.get("num_queries", 1)
    for step in range(1, 4):
        record = opt.step(closure)
        assert record.num_forwards == 2 * queries
        assert len(calls) == step * 2 * queries
        assert len(record.projected_grad) == queries


class Ordered(nn.Module):
    """Three layers that compute the same in whatever order they were registered."""

    def __init__(self, order: str) -> None:
        super().__init__()
        sizes = {"a": (6, 11), "b": (11, 11), "c": (11, 3)}
        for name in order:
            layer = nn.Linear(*sizes[name])
            with torch.no_grad():
                layer.weight.normal_(generator=seeded(ord(name)))
                layer.bias.normal_(generator=seeded(ord(name) + 1))
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y


@pytest.mark.parametrize("mask", MASKS)
def test_6_the_order_of_parameters_changes_nothing(mask: str) -> None:
    """Two models that name their parameters in another order train to the same bits."""
    ended = []
    for order in ("abc", "cab"):
        model = Ordered(order)
        records = run(sparse(model, **MASKS[mask]), closure_of(model), 5)
        weights = weights_of(model)
        assert next(iter(weights))[0] == order[0]
        ended.append((records, {name: weights[name] for name in sorted(weights)}))
    assert ended[0][0] == ended[1][0]
    assert same(ended[0][1], ended[1][1])


def test_6_freezing_one_tensor_leaves_the_noise_of_the_others() -> None:
    """A stream belongs to a name, not to a place in a list."""
    whole, part = mlp(), mlp()
    a = sparse(whole, sparsity=0.0)
    b = sparse(part, sparsity=0.0, freeze=["0.*"])
    x, y = ({t.name: opt.mover([0], [1.0]).dense(t)[0] for t in opt.targets} for opt in (a, b))
    assert y.keys() == {"2.weight", "2.bias", "3.weight", "3.bias"}
    assert all(torch.equal(x[name], y[name]) for name in y)


def test_6_a_probe_of_some_rows_or_of_a_kept_noise_is_the_same_probe() -> None:
    """Whole, by rows, kept or redrawn, the moved weights have the same bits."""
    model = Ordered("abc")
    copies = []
    for keep in (False, True):
        opt = sparse(model, mask="random", keep_noise=keep)
        direction = opt.mover([0], [0.1])
        weight = model.b.weight
        whole = torch.empty(weight.numel())
        direction.whole(weight, whole)
        rows = torch.tensor([4, 0, 10])
        assert torch.equal(bits(direction.rows(weight, rows)), bits(whole.view(11, 11)[rows]))
        copies.append(bits(whole))
    assert torch.equal(*copies)


@pytest.mark.parametrize("mask", ["small", "large"])
@pytest.mark.parametrize("way", WAYS)
def test_7_the_mask_is_taken_at_the_unperturbed_weights(way: str, mask: str) -> None:
    """With an eps that carries weights far over h, both probes and the update keep the mask."""
    model = watched()
    opt = sparse(model, eps=5.0, lr=1e-2, seed=1, mask=mask, **WAYS[way])
    h = threshold(model.w, mask, 0.5)
    for _ in range(3):
        before = model.w.detach().clone()
        inside = before.abs() <= h if mask == "small" else before.abs() >= h
        model.seen.clear()
        opt.step(model)
        plus, minus = model.seen
        crossed = (plus.abs() <= h) != (before.abs() <= h)
        assert crossed.sum() >= 5  # perturbed weights would have had another mask
        assert torch.equal(plus != before, inside)
        if way == "in place":  # comes back only as near as rounding allows
            assert torch.equal((minus - before).abs() > 1e-5, inside)
        else:
            assert torch.equal(minus != before, inside)
        assert torch.equal((model.w.detach() - before).abs() > 1e-5, inside)


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_8_on_a_quadratic_the_mean_estimate_is_the_gradient(sparsity: float, kind: str) -> None:
    """The mean of 600 estimates is the (masked) gradient within its sampling error."""
    n, queries = 12, 600
    root = torch.randn(n, n, generator=seeded(5), dtype=torch.float64)
    matrix = root @ root.T / n
    model = Watched(torch.randn(n, generator=seeded(6)), lambda w: 0.5 * w @ matrix @ w)
    w = model.w.detach().double()
    opt = sparse(model, lr=1.0, eps=0.05, sparsity=sparsity, noise=kind, num_queries=queries)
    inside = (w.abs() <= threshold(model.w, "small", sparsity)).double()
    opt.step(model)
    gradient = matrix @ w * inside
    # E[(z . g)**2 z_i**2] - g_i**2 = |g|**2 + g_i**2 for normal z, |g|**2 - g_i**2 for signs.
    sign = 1 if kind == "gaussian" else -1
    error = ((gradient.square().sum() + sign * gradient**2) * inside / queries).sqrt()
    estimate = w - model.w.detach().double()
    assert ((estimate - gradient).abs() <= 5 * error + 1e-6).all()  # 1e-6: stored in float32
    assert (estimate[inside == 0] == 0).all()


# ------------------------------------------------------------------ what the first step checks


class Bypass(nn.Module):
    """Reads the weight of a child without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.child = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.good(x)), self.child.weight)


def test_the_first_step_checks_that_probes_reach_every_parameter() -> None:
    """Unless told not to: a model that bypasses a module is refused before it trains wrongly."""
    model = Bypass()
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"do not reach child\.weight"):
        sparse(model, check=True).step(closure_of(model))
    assert same(weights_of(model), before)
    sparse(model, check=False).step(closure_of(model))  # asked for, so done


def test_the_check_changes_nothing_but_the_forwards_of_the_first_step() -> None:
    """Two forwards a kind of parameter, once; then the steps have the bits of unchecked ones."""
    for keep_noise in (False, True):
        a, b = mlp(), mlp()
        checked, calls = counted(closure_of(a))
        opt = sparse(a, check=True, keep_noise=keep_noise)
        records, made = [], []
        for _ in range(3):
            records.append(opt.step(checked))
            made.append(len(calls))
        assert made == [13 + 2, 13 + 4, 13 + 6]  # 4 * 2: Linear and LayerNorm, two kinds each
        assert records == run(sparse(b, keep_noise=keep_noise), closure_of(b), 3)
        assert same(weights_of(a), weights_of(b))


@pytest.mark.parametrize("keep_noise", [False, True])
def test_a_step_under_inference_mode_is_the_same_step(keep_noise: bool) -> None:
    """Users may wrap a part of their loop in torch.inference_mode(), before a part without."""
    a, b = mlp(), mlp()
    run(sparse(a, keep_noise=keep_noise), closure_of(a), 4)
    opt = sparse(b, keep_noise=keep_noise)
    with torch.inference_mode():
        run(opt, closure_of(b), 2)
    run(opt, closure_of(b), 2)
    assert same(weights_of(a), weights_of(b))


def test_what_is_trained_cannot_be_added_to_later() -> None:
    """A parameter group that came late would have no threshold and never move."""
    opt = sparse(mlp())
    with pytest.raises(ValueError, match="make a new optimizer"):
        opt.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})


def test_a_check_under_inference_mode_spoils_no_later_step() -> None:
    """The scratch that the check made can be written to by a step outside inference mode."""
    model = mlp()
    opt = sparse(model, keep_noise=False)
    with torch.inference_mode():
        opt.self_check(closure_of(model))
    opt.step(closure_of(model))


def test_a_look_at_a_direction_leaves_no_mask_behind() -> None:
    """A step after someone evaluated a direction and then moved the weights masks these."""
    for keep_noise in (False, True):
        model = watched()
        opt = sparse(model, keep_noise=keep_noise)
        opt.mover([0], [1.0]).whole(model.w, torch.empty(200))
        with torch.no_grad():
            model.w.copy_(model.w.flip(0))
        before = model.w.detach().clone()
        opt.step(model)
        assert torch.equal(model.w.detach() != before, before.abs() <= opt.targets[0].h)


# ------------------------------------------------------------------------ against the textbook


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of 20,000 weights."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def language_loss(model: nn.Module) -> Closure:
    ids = torch.randint(64, (4, 12), generator=seeded(9))

    def closure() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return closure


def paper_step(
    weights: dict[str, Tensor], h: dict[str, float], loss: Closure, step: int, lr: float, eps: float
) -> tuple[float, float, float]:
    """One step of Algorithm 1 of arXiv 2402.15751, written from its listing; h of inf is MeZO."""
    z = {}
    for name, w in weights.items():
        key = torch.tensor(noise.stream_key(7, "z", step, 0, name))
        z[name] = noise.draw(torch.arange(w.numel()), w.numel(), key, "gaussian").view(w.shape)
    m = {name: (w.abs() <= h[name]).float() for name, w in weights.items()}  # GetMask

    def perturb(scale: float) -> None:  # PerturbParameters
        for name, w in weights.items():
            w += m[name] * scale * z[name]

    perturb(eps)
    l_plus = float(loss())
    perturb(-2 * eps)
    l_minus = float(loss())
    perturb(eps)
    projected_grad = (l_plus - l_minus) / (2 * eps)
    for name, w in weights.items():
        w -= lr * projected_grad * (m[name] * z[name])
    return l_plus, l_minus, projected_grad


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
@torch.no_grad()
def test_a_step_is_that_of_the_paper(sparsity: float) -> None:
    """An independent in-place step gives the losses and, in place, the very bits of the weights."""
    theirs, ours = llama(), llama()
    weights = {name: p.data for name, p in theirs.named_parameters()}
    h = {}
    for name, w in weights.items():
        magnitudes = w.abs().flatten().sort().values
        kept = round((1 - sparsity) * w.numel())
        constant = bool(magnitudes[0] == magnitudes[-1])  # gains: dense, as is the default
        h[name] = math.inf if sparsity == 0 or constant else float(magnitudes[kept - 1])
    opt = sparse(ours, lr=1e-3, sparsity=sparsity, seed=7, executor="in_place")
    for step in range(5):
        l_plus, l_minus, g = paper_step(weights, h, language_loss(theirs), step, 1e-3, 1e-3)
        record = opt.step(language_loss(ours))
        assert record.loss == (l_plus + l_minus) / 2
        assert record.projected_grad == (g,)
    assert all(torch.equal(p, weights[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize(("sparsity", "keep_noise"), [(0.0, False), (0.75, False), (0.75, True)])
def test_functional_probes_train_as_in_place_ones(sparsity: float, keep_noise: bool) -> None:
    """50 fp32 steps at lr 1e-3: losses, projected gradients and weights agree to rounding."""
    ends = []
    for options in ({"executor": "sequential", "keep_noise": keep_noise}, {"executor": "in_place"}):
        model = llama()
        opt = sparse(model, lr=1e-3, sparsity=sparsity, **options)
        records = run(opt, language_loss(model), 50)
        thresholds = {t.name: t.h for t in opt.targets}
        ends.append((records, {n: p.detach() for n, p in model.named_parameters()}, thresholds))
    (a, w, h), (b, v, _) = ends
    # In place each weight is rounded three times more a step; bounds as the design measured them.
    assert max(abs(x.loss - y.loss) for x, y in zip(a, b, strict=True)) < 1.5e-6
    grads = [abs(x.projected_grad[0] - y.projected_grad[0]) for x, y in zip(a, b, strict=True)]
    assert max(grads) < 1.5e-4
    left_out = 0
    for name in w:
        near = (w[name].abs() - h[name]).abs() < 1e-6  # a rounding may flip the mask here
        left_out += int(near.sum())
        # Gains lie around 1, where 150 roundings to 1.2e-7 walk by 0.42e-6: six standard errors.
        bound = 2.5e-6 if w[name].ndim == 1 else 1.4e-6
        assert (w[name] - v[name])[~near].abs().max().item() < bound
    assert left_out < 20
    assert a[-1].loss != a[0].loss


@pytest.mark.parametrize("mask", ["small", "large", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsity_0_is_mezo_bit_for_bit(dtype: torch.dtype, mask: str) -> None:
    """Twenty large steps of Sparse-MeZO without sparsity are those of MeZO, under any rule."""
    a, b = mlp(dtype), mlp(dtype)
    settings: dict[str, Any] = {"lr": 0.02, "eps": 0.05, "seed": 3, "weight_decay": 0.1}
    mezo = MeZO(a, backend="eager", **settings)
    ours = SparseMeZO(b, backend="eager", sparsity=0.0, mask=mask, **settings)
    assert run(mezo, closure_of(a), 20) == run(ours, closure_of(b), 20)
    assert same(weights_of(a), weights_of(b))


def test_compiled_training_is_eager_training() -> None:
    """A Llama after four steps has the same bits with compiled, eager and kept noise."""
    ends = []
    for options in (
        {"backend": "compiled"},
        {"backend": "eager", "keep_noise": False},
        {"backend": "eager", "keep_noise": True},
    ):
        model = llama()
        opt = sparse(model, **options)
        assert opt.passes.name == {"compiled": "numba", "eager": "eager"}[str(options["backend"])]
        ends.append((run(opt, language_loss(model), 4), weights_of(model)))
    for records, weights in ends[1:]:
        assert records == ends[0][0]
        assert same(weights, ends[0][1])


# ------------------------------------------------------------------------------- what is frozen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["small", "large", "random"])
def test_frozen_weights_are_bit_identical_after_50_steps(mask: str, dtype: torch.dtype) -> None:
    """What the mask leaves out at first and what ``freeze`` names keeps its bits."""
    model = mlp(dtype)
    before = weights_of(model)
    opt = sparse(model, mask=mask, sparsity=0.75, eps=0.02, freeze=["2.*"], weight_decay=0.01)
    outside = {}
    for target in opt.targets:
        probe = torch.empty_like(target.flat)
        opt.mover([0], [10.0]).whole(target.parameter, probe)
        outside[target.name] = (probe == target.flat).view(target.parameter.shape)
    opt.direction.end()
    assert outside.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    run(opt, closure_of(model), 50)
    after = weights_of(model)
    for name, out in outside.items():
        assert torch.equal(after[name][out], before[name][out])
        if name.endswith("weight"):
            assert out.numel() / 2 < out.sum() < out.numel()
            assert not torch.equal(after[name], before[name])
    for name in ("2.weight", "2.bias"):
        assert torch.equal(after[name], before[name])


def test_parameters_without_gradients_are_left_alone() -> None:
    """requires_grad=False freezes, and such a parameter matches no glob."""
    model = mlp()
    model[0].requires_grad_(False)
    before = weights_of(model)
    opt = sparse(model)
    run(opt, closure_of(model), 3)
    assert [t.name for t in opt.targets] == ["2.weight", "2.bias", "3.weight", "3.bias"]
    assert opt.trained.keys() == {t.name for t in opt.targets}
    assert opt.num_weights == 11 + 11 + 33 + 3
    assert torch.equal(weights_of(model)["0.weight"], before["0.weight"])
    with pytest.raises(ValueError, match=r"'0\.\*' matches no trainable parameter"):
        sparse(model, freeze=["0.*"])


def test_dense_globs_are_perturbed_without_a_mask() -> None:
    """Tensors that ``dense`` names move whole, whatever they grow to; the others by half."""
    model = mlp()
    opt = sparse(model, dense=["*.bias"])
    sizes = {t.name: t.parameter.numel() for t in opt.targets}
    dense = sum(n for name, n in sizes.items() if name.endswith("bias"))
    masked = [n for name, n in sizes.items() if name.endswith("weight")]
    assert opt.active_share() == (dense + sum(n - round(n / 2) for n in masked)) / sum(
        sizes.values()
    )
    before = weights_of(model)
    opt.step(closure_of(model))
    for name, after in weights_of(model).items():
        assert (after != before[name]).all() == name.endswith("bias")


class LoRA(nn.Module):
    """A frozen layer with a low-rank addition whose second factor starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.A = nn.Linear(6, 4, bias=False)
        self.B = nn.Linear(4, 3, bias=False)
        with torch.no_grad():  # not by torch's own generator, which other tests have drawn from
            self.base.weight.normal_(std=0.4, generator=seeded(1))
            self.base.bias.zero_()
            self.A.weight.normal_(generator=seeded())
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.B(self.A(x))
        return y


def test_a_zero_initialised_lora_factor_trains_under_a_sparse_mask() -> None:
    """constant_tensors=dense: all of B moves at the first step and at the last."""
    model = LoRA()
    opt = sparse(model, sparsity=0.75, constant_tensors="dense")
    before = weights_of(model)["B.weight"]
    first = closure_of(model)().item()
    for _ in range(60):
        opt.step(closure_of(model))
        after = weights_of(model)["B.weight"]
        assert (after != before).all()
        before = after
    assert closure_of(model)().item() < first - 0.1


def test_a_zero_initialised_lora_factor_can_be_frozen() -> None:
    """constant_tensors=frozen: B stays zero to the bit, A trains."""
    model = LoRA()
    before = weights_of(model)
    opt = sparse(model, sparsity=0.75, constant_tensors="frozen")
    run(opt, closure_of(model), 20)
    after = weights_of(model)
    assert torch.equal(after["B.weight"], before["B.weight"])
    assert not after["B.weight"].any()
    assert opt.active_share() <= 6 / 36


# ------------------------------------------------------------------------------- masks over time


def test_thresholds_are_those_of_the_first_weights() -> None:
    """Without a refresh h never changes, as in the paper."""
    model = mlp()
    wanted = {name: threshold(p, "small", 0.5) for name, p in model.named_parameters()}
    opt = sparse(model, lr=0.1)
    run(opt, closure_of(model), 7)
    assert {t.name: t.h for t in opt.targets} == wanted
    now = {name: threshold(p, "small", 0.5) for name, p in model.named_parameters()}
    assert now != wanted


def test_thresholds_are_refreshed_every_so_many_steps() -> None:
    """At steps 3, 6, ... h is that of the weights just before the step; between, it stays."""
    model = mlp()
    opt = sparse(model, lr=0.1, mask_refresh_every=3)
    wanted = {name: threshold(p, "small", 0.5) for name, p in model.named_parameters()}
    for step in range(8):
        if step in (3, 6):
            previous = wanted
            wanted = {name: threshold(p, "small", 0.5) for name, p in model.named_parameters()}
            assert wanted != previous
        opt.step(closure_of(model))
        assert {t.name: t.h for t in opt.targets} == wanted


@pytest.mark.parametrize("keep_noise", [False, True])
@pytest.mark.parametrize("resample", ["run", "step"])
def test_a_random_mask_is_drawn_once_a_run_or_every_step(resample: str, keep_noise: bool) -> None:
    """The same entries move at every step, or each time others, of the share asked for."""
    model = watched(2000)
    opt = sparse(model, mask="random", mask_resample=resample, sparsity=0.7, keep_noise=keep_noise)
    moved = []
    for _ in range(4):
        before = model.w.detach().clone()
        share = opt.active_share()
        opt.step(model)
        moved.append(model.w.detach() != before)
        assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)
        assert moved[-1].sum().item() == pytest.approx(share * 2000)
    for other in moved[1:]:
        both = (moved[0] & other).sum().item()
        if resample == "run":
            assert torch.equal(other, moved[0])
        else:  # independent: in both with probability 0.09
            assert abs(both - 180) < 5 * math.sqrt(2000 * 0.09 * 0.91)


def test_seeds_give_other_noise_and_other_random_masks() -> None:
    """Two seeds share neither the directions nor the mask."""
    ends = []
    for seed in (0, 1):
        model = watched()
        opt = sparse(model, mask="random", seed=seed)
        before = model.w.detach().clone()
        opt.step(model)
        ends.append(model.w.detach() - before)
    assert not torch.equal(ends[0] != 0, ends[1] != 0)
    both = (ends[0] != 0) & (ends[1] != 0)
    assert not torch.isclose(ends[0][both], ends[1][both]).any()


# ---------------------------------------------------------------------------------- the settings


def test_weight_decay_is_that_of_the_formula() -> None:
    """Inside the mask theta <- theta - lr (g z + decay theta), outside nothing."""
    plain, decayed = watched(), watched()
    a = sparse(plain)
    b = sparse(decayed, weight_decay=0.5)
    w = plain.w.detach().clone()
    a.step(plain)
    b.step(decayed)
    inside = w.abs() <= a.targets[0].h
    difference = plain.w.detach() - decayed.w.detach()
    # Weights below 8 are stored to 2.4e-7.
    assert (difference - 1e-2 * 0.5 * w)[inside].abs().max().item() < 1e-6
    assert (difference[~inside] == 0).all()


def test_stochastic_rounding_is_for_the_update_alone() -> None:
    """Probes round to nearest; the stored weights get steps that nearest would lose."""
    seen, ended = [], []
    for rounding in ("nearest", "stochastic"):
        weight = 1.25 + torch.arange(2000).remainder(64) / 128  # bf16 numbers 2**-7 apart
        model = Watched(weight.to(torch.bfloat16), torch.sum)
        opt = sparse(model, sparsity=0.0, eps=0.1, lr=1e-5, rounding=rounding)
        (g,) = opt.step(model).projected_grad
        seen.append(model.seen)
        ended.append((model.w.detach().float() != weight).sum().item())
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    # A step of lr g |z| is stored with a probability of itself over the spacing; E|z| = 0.8.
    expected = 2000 * 0.8 * 1e-5 * abs(g) * 2**7
    assert ended[0] == 0
    assert abs(ended[1] - expected) < 5 * math.sqrt(expected)
    assert expected > 30  # so none would be five standard errors away


def test_stochastic_rounding_is_drawn_anew_every_step() -> None:
    """A weight that was rounded up at one step is no likelier to be at the next."""
    n = 20_000
    model = Watched(torch.full((n,), 1.5, dtype=torch.bfloat16), torch.sum)
    opt = sparse(model, sparsity=0.0, noise="rademacher", rounding="stochastic")
    moved = []
    for step in range(2):
        opt.restore({**opt.snapshot()[0], "num_steps": step}, {})
        with torch.no_grad():
            model.w.fill_(1.5)
            move = Move((Term(Key(step), 0.3 * 2.0**-7),))
            opt.direction.apply(step, move)
        moved.append(model.w.detach() != 1.5)
    for share, mask in ((0.3, moved[0]), (0.3, moved[1]), (0.09, moved[0] & moved[1])):
        assert abs(mask.sum().item() - share * n) < 5 * math.sqrt(n * share * (1 - share))


def test_the_factor_of_the_lr_scales_the_update() -> None:
    """Half the lr is half the step, counted from the lr that was given; eps is as it was."""
    steps = []
    for factors in ((1.0,), (0.1, 0.5)):
        model = watched()
        opt = sparse(model)
        before = model.w.detach().double()
        for factor in factors:
            opt.set_lr_factor(factor)
        opt.step(model)
        steps.append(model.w.detach().double() - before)
    # Weights below 8 are stored to 2.4e-7.
    assert (steps[0] / 2 - steps[1]).abs().max().item() < 5e-7


WRONG = [
    ({"lr": 0.0}, "lr=0.0: must be above 0"),
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": math.nan}, "lr=nan"),
    ({"lr": math.inf}, "lr=inf"),
    ({"eps": 0.0}, "eps=0.0: must be above 0"),
    ({"eps": -1e-3}, "eps=-0.001"),
    ({"eps": math.nan}, "eps=nan"),
    ({"eps": math.inf}, "eps=inf"),
    ({"num_queries": 0}, "num_queries=0: must be at least 1"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1: must not be negative"),
    ({"weight_decay": math.nan}, "weight_decay=nan"),
    ({"sparsity": -0.1}, r"sparsity=-0.1: the fraction NOT perturbed, in \[0, 1\)"),
    ({"sparsity": 1.0}, "sparsity=1.0"),
    ({"sparsity": math.nan}, "sparsity=nan"),
    ({"mask": "tiny"}, "mask=tiny: one of none, small, large, random"),
    ({"mask": "none"}, "sparsity=0.5 has no effect with mask=none"),
    ({"mask_refresh_every": -1}, "mask_refresh_every=-1"),
    ({"mask_resample": "epoch"}, "mask_resample=epoch: one of run, step"),
    ({"mask_resample": "step"}, "mask_resample=step has no effect with mask=small"),
    ({"constant_tensors": "free"}, "constant_tensors=free: one of dense, frozen"),
    ({"noise": "uniform"}, "noise=uniform: one of gaussian, rademacher"),
    ({"rounding": "up"}, "rounding=up: one of nearest, stochastic"),
    ({"executor": "both"}, "executor=both: one of auto, sequential, lockstep, in_place"),
    ({"backend": "numpy"}, "backend=numpy: one of auto, compiled, eager"),
    ({"freeze": ["head.*"]}, r"'head\.\*' matches no trainable parameter, e\.g\. '0\.weight'"),
    ({"dense": ["head.*"]}, r"'head\.\*' matches no trainable parameter"),
    ({"freeze": ["*"]}, "no parameter is left to train"),
    ({"keep_noise": True, "num_queries": 2}, "keep_noise=true needs num_queries=1"),
    ({"keep_noise": True, "rounding": "stochastic"}, "keep_noise=true needs .* rounding=nearest"),
    ({"executor": "in_place", "num_queries": 2}, "executor=in_place needs num_queries=1"),
    ({"executor": "in_place", "keep_noise": False}, "keep_noise=false: executor=in_place updates"),
    ({"keep_noise": "yes"}, "keep_noise=yes: one of auto, True, False"),
    ({"executor": "in_place", "rounding": "stochastic"}, "in_place needs .* rounding=nearest"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda x: str(x))
def test_a_wrong_setting_is_refused(options: dict[str, Any], message: str) -> None:
    """With the setting, what was got and what is allowed; the model is not touched."""
    model = mlp()
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        sparse(model, **options)
    assert same(weights_of(model), before)


def test_models_that_cannot_be_trained_are_refused() -> None:
    """Nothing that requires gradients, weights that are NaN, a tensor that is not contiguous."""
    for globs in ([], ["0.*"]):
        with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
            sparse(mlp().requires_grad_(False), freeze=globs)
    model = mlp()
    with torch.no_grad():
        model[0].weight[2, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite, so that its tensor has no mask"):
        sparse(model)
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(6, 11).T)
    with pytest.raises(ValueError, match=r"parameter 0\.weight is not contiguous"):
        sparse(model)


def test_float64_weights_are_refused() -> None:
    """Passes compute in float32, which would cut what float64 holds, masked or not."""
    for sparsity in (0.5, 0.0):
        with pytest.raises(ValueError, match="float64"):
            sparse(mlp(torch.float64), sparsity=sparsity)


# ------------------------------------------------------------------------------ stop and go on

RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "refresh": {"mask_refresh_every": 3},
    "resampled": {"mask": "random", "mask_resample": "step"},
    "queries": {"num_queries": 2, "weight_decay": 0.1},
    "kept": {"keep_noise": True},
}


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind: str, stop: int) -> None:
    """Weights and plain numbers, through JSON, are all that the next steps depend on."""
    whole = mlp(torch.bfloat16)
    options = {"lr": 0.1, "eps": 0.05, "rounding": "stochastic"} | RESUMED[kind]
    if kind == "kept":
        options["rounding"] = "nearest"
    wanted = run(sparse(whole, **options), closure_of(whole), 8)
    first = mlp(torch.bfloat16)
    opt = sparse(first, **options)
    got = run(opt, closure_of(first), stop)
    numbers, tensors = opt.snapshot()
    assert tensors == {}
    second = copy.deepcopy(first)
    resumed = sparse(second, **options)
    resumed.restore(json.loads(json.dumps(numbers)), {})
    got += run(resumed, closure_of(second), 8 - stop)
    assert got == wanted
    assert same(weights_of(second), weights_of(whole))


def broken_at(model: nn.Module, calls: set[int], by: Callable[[Tensor], Tensor]) -> Closure:
    """The usual closure, but for some of its calls (from 0)."""
    loss = closure_of(model)
    counter: Iterator[int] = iter(range(10**6))

    def closure() -> Tensor:
        value = loss()
        return by(value) if next(counter) in calls else value

    return closure


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"keep_noise": True}, {"num_queries": 2}], ids=str)
def test_a_loss_that_is_not_finite_leaves_the_weights(
    options: dict[str, Any], call: int, bad: float
) -> None:
    """Whichever forward gives it: nothing was written, and the step can be tried again."""
    model, other = mlp(), mlp()
    opt, sound = sparse(model, **options), sparse(other, **options)
    before = weights_of(model)
    closure = broken_at(model, {call}, lambda x: x * 0 + bad)
    if call >= 2 * opt.num_scalars:  # in the second step
        opt.step(closure)
        sound.step(closure_of(other))
        before = weights_of(model)
    with pytest.raises(NonFiniteLoss, match=f"{bad}.* at step {opt.num_steps}"):
        opt.step(closure)
    assert same(weights_of(model), before)
    opt.step(closure_of(model))
    sound.step(closure_of(other))
    assert same(weights_of(model), weights_of(other))


def test_an_interrupted_probe_leaves_the_weights_and_can_be_repeated() -> None:
    """An exception inside a forward leaves every bit, and the same step then goes as ever."""
    for keep_noise in (False, True):
        model, other = mlp(), mlp()
        opt, sound = (sparse(m, keep_noise=keep_noise) for m in (model, other))
        before = weights_of(model)

        def stop(x: Tensor) -> Tensor:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            opt.step(broken_at(model, {1}, stop))
        assert same(weights_of(model), before)
        assert opt.num_steps == 0
        run(opt, closure_of(model), 2)
        run(sound, closure_of(other), 2)
        assert same(weights_of(model), weights_of(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", [0, 1])
def test_an_interrupted_in_place_probe_is_undone(call: int, dtype: torch.dtype) -> None:
    """The reference takes its step out again: frozen bits exactly, the others as it can."""
    model = mlp(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = sparse(model, eps=0.1, executor="in_place")

    def stop(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(broken_at(model, {call}, stop))
    for target in opt.targets:
        now, then = target.parameter.detach(), before[target.name]
        frozen = then.abs() > target.h
        assert torch.equal(bits(now[frozen]), bits(then[frozen]))
        # Two or three roundings of numbers below 2, each by half a spacing.
        spacing = 2 * torch.finfo(dtype).eps
        assert (now - then).abs().max().item() <= 1.5 * spacing


def test_restoring_after_an_interrupted_probe_forgets_the_kept_noise() -> None:
    """Back at an earlier step, the direction is that of the earlier step."""
    model, other = mlp(), mlp()
    opt, sound = (sparse(m, keep_noise=True) for m in (model, other))
    start = opt.snapshot()
    weights = copy.deepcopy(model.state_dict())
    opt.step(closure_of(model))

    def stop(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(broken_at(model, {1}, stop))
    model.load_state_dict(weights)
    opt.restore(*start)
    opt.step(closure_of(model))
    sound.step(closure_of(other))
    assert same(weights_of(model), weights_of(other))


# ---------------------------------------------------------------------------------- first order

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_order_is_the_torch_optimizer(name: str, max_grad_norm: float | None) -> None:
    """Ten steps have the losses and bits of a training loop written out; one forward each."""
    ours, theirs = mlp(), mlp()
    opt = FirstOrder(ours, optimizer=OPTIMIZERS[name], max_grad_norm=max_grad_norm)
    records = run(opt, closure_of(ours), 10)
    reference = OPTIMIZERS[name](theirs.parameters())
    losses = []
    for _ in range(10):
        reference.zero_grad()
        loss = closure_of(theirs)()
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        reference.step()
        losses.append(loss.item())
    assert records == [StepRecord(loss, (), 1) for loss in losses]
    assert same(weights_of(ours), weights_of(theirs))
    assert opt.num_steps == 10
    assert opt.active_share() == 1.0
    assert opt.self_check(closure_of(ours)) == 0


class Dropped(nn.Module):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(F.dropout(x, 0.5))
        return y


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_first_order_run_is_the_run_that_was_not_stopped(name: str, stop: int) -> None:
    """Its tensors and numbers, copied and through JSON, carry moments, counts and dropout."""
    whole = Dropped()
    wanted = run(FirstOrder(whole, optimizer=OPTIMIZERS[name], seed=5), closure_of(whole), 8)
    first = Dropped()
    opt = FirstOrder(first, optimizer=OPTIMIZERS[name], seed=5)
    got = run(opt, closure_of(first), stop)
    numbers, tensors = opt.snapshot()
    saved = {path: tensor.clone() for path, tensor in tensors.items()}
    second = copy.deepcopy(first)
    run(opt, closure_of(first), 1)  # the first run goes on
    resumed = FirstOrder(second, optimizer=OPTIMIZERS[name], seed=5)
    resumed.restore(json.loads(json.dumps(numbers)), saved)
    got += run(resumed, closure_of(second), 8 - stop)
    assert got == wanted
    assert same(weights_of(second), weights_of(whole))


def test_a_first_order_snapshot_is_no_view_of_the_state() -> None:
    """What was saved does not change while the run goes on."""
    model = mlp()
    opt = FirstOrder(model, optimizer=OPTIMIZERS["adamw"])
    run(opt, closure_of(model), 2)
    _, tensors = opt.snapshot()
    before = {path: tensor.clone() for path, tensor in tensors.items()}
    run(opt, closure_of(model), 2)
    assert all(torch.equal(tensors[path], before[path]) for path in before)


def test_dropout_is_keyed_and_the_global_generator_left_alone() -> None:
    """Another seed or step drops others; torch's own state is neither read nor moved."""
    losses = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        with torch.random.fork_rng(devices=[]):
            model = Dropped()
            torch.manual_seed(global_seed)
            state = torch.random.get_rng_state()
            opt = FirstOrder(model, optimizer=OPTIMIZERS["sgd"], seed=seed)
            losses.append([r.loss for r in run(opt, closure_of(model), 3)])
            assert torch.equal(torch.random.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]
    still = Dropped()
    frozen = FirstOrder(still, optimizer=partial(torch.optim.SGD, lr=1e-30))
    a, b = run(frozen, closure_of(still), 2)
    assert a.loss != b.loss


def test_first_order_freezes_by_glob() -> None:
    """Frozen tensors keep their bits and get no gradient, and can be trained again later."""
    model = mlp()
    before = weights_of(model)
    opt = FirstOrder(model, optimizer=OPTIMIZERS["adamw"], freeze=["0.*", "2.bias"])
    grads: list[bool] = []

    def closure() -> Tensor:
        grads.append(model[0].weight.requires_grad)
        return closure_of(model)()

    run(opt, closure, 3)
    after = weights_of(model)
    frozen = {"0.weight", "0.bias", "2.bias"}
    assert {name for name in after if torch.equal(after[name], before[name])} == frozen
    assert opt.trained.keys() == after.keys() - frozen
    assert opt.num_weights == 11 + 33 + 3
    assert grads == [False] * 3
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"freeze 'head\.\*' matches no trainable parameter"):
        FirstOrder(model, optimizer=OPTIMIZERS["sgd"], freeze=["head.*"])
    with pytest.raises(ValueError, match="no parameter is left to train"):
        FirstOrder(model, optimizer=OPTIMIZERS["sgd"], freeze=["*"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_order_loss_that_is_not_finite_leaves_the_weights(bad: float) -> None:
    """Nothing was written, neither weights nor moments, and the run can go on."""
    model, other = mlp(), mlp()
    opt, sound = (FirstOrder(m, optimizer=OPTIMIZERS["adamw"]) for m in (model, other))
    run(opt, closure_of(model), 2)
    run(sound, closure_of(other), 2)
    before = weights_of(model)
    with pytest.raises(NonFiniteLoss, match=f"loss {bad} at step 2"):
        opt.step(broken_at(model, {0}, lambda x: x * bad))
    assert same(weights_of(model), before)
    run(opt, closure_of(model), 2)
    run(sound, closure_of(other), 2)
    assert same(weights_of(model), weights_of(other))


def test_a_gradient_that_is_not_finite_leaves_the_weights() -> None:
    """A finite loss may have an infinite slope: it is refused before anything is written."""
    model = mlp()
    opt = FirstOrder(model, optimizer=OPTIMIZERS["adamw"])
    run(opt, closure_of(model), 1)
    before, state = weights_of(model), opt.snapshot()
    with pytest.raises(NonFiniteLoss, match=r"gradient norm .* at step 1"):
        opt.step(lambda: (model[0].weight * 0).sqrt().sum())
    assert same(weights_of(model), before)
    assert opt.snapshot()[0] == state[0]
    assert all(torch.equal(x, state[1][path]) for path, x in opt.snapshot()[1].items())


def test_an_optimizer_that_calls_the_loss_itself_is_refused() -> None:
    """LBFGS needs several evaluations a step, which is not one forward and one backward."""
    with pytest.raises(ValueError, match="LBFGS"):
        FirstOrder(mlp(), optimizer=torch.optim.LBFGS)


def test_the_factor_of_the_lr_scales_first_order_steps() -> None:
    """A factor counts from the optimizer's own lr, not from the last one."""
    model, other = mlp(), mlp()
    opt = FirstOrder(model, optimizer=partial(torch.optim.SGD, lr=1e-2))
    half = FirstOrder(other, optimizer=partial(torch.optim.SGD, lr=5e-3))
    opt.set_lr_factor(0.1)
    opt.set_lr_factor(0.5)
    run(opt, closure_of(model), 2)
    run(half, closure_of(other), 2)
    assert same(weights_of(model), weights_of(other))
