"""Two forwards in turns: the numbers of one after the other, and what is refused."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.zo.turns import NotInLockstep
from tests.zo.test_optimizer import (
    DTYPES,
    MASKS,
    Bypass,
    Closure,
    X,
    Y,
    closure_of,
    counted,
    language_loss,
    llama,
    mlp,
    run,
    same,
    seeded,
    sparse,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def ends(build: Callable[[], nn.Module], loss: Any, steps: int, **options: Any) -> list[Any]:
    """Records and weights after some steps, sequentially and in lockstep."""
    found = []
    for executor in ("sequential", "lockstep"):
        model = build()
        opt = sparse(model, executor=executor, **options)
        found.append((run(opt, loss(model), steps), weights_of(model)))
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_twenty_steps_of_a_llama_have_the_bits_of_sequential_ones(
    backend: str, threads: int
) -> None:
    """With tied embeddings, several owners of each kind and a head."""
    torch.set_num_threads(threads)  # put back by the fixture
    options = {"backend": backend, "lr": 1e-3, "keep_noise": False}
    (a, w), (b, v) = ends(llama, language_loss, 20, **options)
    assert a == b
    assert same(w, v)
    assert a[0].loss != a[-1].loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_dtype_trains_as_sequentially(mask: str, dtype: torch.dtype) -> None:
    """Also the mean over queries, stochastic rounding of updates, decay and frozen tensors."""
    options = MASKS[mask] | {"num_queries": 2, "rounding": "stochastic", "weight_decay": 0.01}
    options |= {"lr": 0.05, "eps": 0.05, "freeze": ["2.*"]}
    (a, w), (b, v) = ends(lambda: mlp(dtype), closure_of, 4, **options)
    assert a == b
    assert same(w, v)
    assert not same(w, weights_of(mlp(dtype)))
    assert torch.equal(w["2.weight"], weights_of(mlp(dtype))["2.weight"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_noise", [False, True])
def test_probing_in_turns_leaves_every_bit_of_the_weights(
    keep_noise: bool, dtype: torch.dtype
) -> None:
    model = mlp(dtype)
    before, loss = weights_of(model), closure_of(model)
    opt = sparse(model, executor="lockstep", eps=0.1, lr=1e-30, keep_noise=keep_noise)

    def closure() -> Tensor:
        value = loss()
        assert same(weights_of(model), before)
        return value

    forwards = [m.__dict__.get("forward") for m in model.modules()]
    run(opt, closure, 3)
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards


def in_parts(model: nn.Module) -> Closure:
    """A loss that calls the model three times, on parts of unlike size."""

    def closure() -> Tensor:
        dtype = next(model.parameters()).dtype
        parts = zip(X.split([5, 1, 10]), Y.split([5, 1, 10]), strict=True)
        errors = [(model(x.to(dtype)).double() - y).square().sum() for x, y in parts]
        return torch.stack(errors).sum() / Y.numel()

    return closure


def test_a_closure_may_split_its_batch() -> None:
    (a, w), (b, v) = ends(mlp, in_parts, 5)
    assert a == b
    assert same(w, v)


def test_outputs_of_the_second_forward_go_as_they_are_read() -> None:
    """A closure in micro-batches does not hold all of them to its end."""
    model = mlp()
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x in X.split(4):
            y = model(x)
            alive.append(sum(output() is not None for output in outputs))
            outputs.append(weakref.ref(y))
            total += y.double().square().sum()
            del y
        return total

    sparse(model, executor="lockstep").step(closure)
    assert alive == [0] * 8


class Counting:
    """Passes that count what they draw."""

    def __init__(self, passes: Any) -> None:
        self.passes, self.draws = passes, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.passes, name)

    def move(self, *args: Any) -> None:
        self.draws += 1
        self.passes.move(*args)

    def move_both(self, *args: Any) -> None:
        self.draws += 1
        self.passes.move_both(*args)


def test_both_forwards_share_one_draw_a_tensor() -> None:
    """Two draws a tensor and step where sequential probes take three; the forwards stay two."""
    for executor, draws in (("sequential", 3), ("lockstep", 2)):
        model = mlp()
        opt = sparse(model, executor=executor, keep_noise=False)
        passes: Any = Counting(opt.passes)
        opt.direction.passes = opt.direction.probe_passes = passes
        closure, calls = counted(closure_of(model))
        assert opt.step(closure).num_forwards == len(calls) == 2
        assert passes.draws == draws * len(opt.targets)


class Outside(nn.Module):
    """Owners within an owner, one shared tensor, one layer called twice, tuples for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6, generator=seeded(3)))
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.tied = nn.Linear(6, 3)
        self.tied.bias = self.head.bias
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=seeded(i)) * 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        y = self.inner(self.inner(x * self.scale))
        return self.head(y) + self.tied(y), {"scale": self.scale, "more": [y]}


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
def test_nested_and_shared_owners_pass_the_check(executor: str) -> None:
    """Owners inside an owner are drawn for each forward, the outermost ones for both."""
    model = Outside()

    def closure() -> Tensor:
        out, more = model(X)
        return (out.double() - Y).square().mean() + more["scale"].double().sum() * 0.01

    opt = sparse(model, executor=executor, check=True)
    records = run(opt, closure, 3)
    other = Outside()
    model = other
    assert records == run(sparse(other, executor="sequential"), closure, 3)


class Routed(nn.Module):
    """Chooses a layer by the values that it sees: both forwards need not take the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=seeded(i)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out = y.new_zeros(len(x), 3)
        chosen = (y.sum(1).abs() * 40).long() % 4
        for k in chosen.unique().tolist():
            out[chosen == k] = self.experts[k](y[chosen == k])
        return out


def test_forwards_that_part_ways_still_give_their_own_losses() -> None:
    """With so large an eps the two see other experts, in another number."""

    def loss(model: nn.Module) -> Closure:
        return lambda: (model(X[:3]).double() - Y[:3]).square().mean()

    (a, w), (b, v) = ends(Routed, loss, 20, eps=0.5, lr=1e-4)
    assert a == b
    assert same(w, v)


def test_no_grad_and_autocast_reach_the_second_forward() -> None:
    """What torch keeps a thread is that of the closure in both."""
    model, seen = mlp(), []
    model[3].register_forward_hook(
        lambda m, x, y: seen.append((y.dtype, torch.is_grad_enabled(), threading.get_ident()))
    )

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return model(X).double().square().mean()

    sparse(model, executor="lockstep").step(closure)
    assert [s[:2] for s in seen] == [(torch.bfloat16, False)] * 2
    assert seen[0][2] != seen[1][2]


# ---------------------------------------------------------------------------------- what is refused


class Cache:
    """Something a forward writes to."""


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def refused(model: nn.Module, closure: Closure, message: str, check: bool = True) -> None:
    """Refused by lockstep with the weights as they were; auto goes on as sequential does."""
    before = weights_of(model)
    with pytest.raises(NotInLockstep, match=f"executor=lockstep cannot be used: .*{message}"):
        sparse(model, executor="lockstep", check=check).step(closure)
    assert same(weights_of(model), before)
    opt = sparse(model, executor="auto")
    opt.step(closure)
    assert opt.executor == "sequential"


def test_a_cache_that_both_would_write_to_is_refused() -> None:
    model = Remembers()
    refused(model, lambda: model(X, cache=Cache()).sum(), "given a Cache")


def test_a_part_of_the_model_called_by_itself_is_refused() -> None:
    model = Remembers()
    refused(model, lambda: model.layer(X).sum(), "calls a Linear of the model by itself")


def test_calls_on_other_inputs_are_refused() -> None:
    model, inputs = Remembers(), iter(range(100))
    refused(model, lambda: model(X[: 2 + next(inputs)]).sum(), "other inputs", check=False)


class Stashes(nn.Module):
    """Keeps a value between two modules where the other forward overwrites it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.stash = self.first(x)
        self.second(self.stash.relu())
        y: Tensor = self.second(self.stash)
        return y


def test_a_model_that_keeps_values_between_modules_is_refused() -> None:
    model = Stashes()
    refused(model, lambda: model(X).sum(), "losses differ")


def test_the_check_of_a_bypassed_module_comes_first() -> None:
    model = Bypass()
    with pytest.raises(ValueError, match=r"do not reach child\.weight"):
        sparse(model, executor="lockstep", check=True).step(closure_of(model))


def test_auto_leaves_lockstep_at_a_batch_that_does_not_allow_it() -> None:
    """A later batch may call the model in another way, e.g. with a cache; the step then goes on."""
    model, other = Remembers(), Remembers()
    other.load_state_dict(model.state_dict())
    opt, sound = sparse(model, executor="auto"), sparse(other, executor="sequential")
    opt.choose_executor(lambda: model(X).sum())
    opt.executors.use(opt.executors.lockstep)  # whatever was faster
    records = run(opt, lambda: model(X).sum(), 1)
    records += run(opt, lambda: model(X, cache=Cache()).sum(), 1)
    assert opt.executor == "sequential"
    assert records == run(sound, lambda: other(X).sum(), 2)


class Hungry(nn.Module):
    """Runs out of memory where more rows are under way than it has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.room, self.inside = 20, 0
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=seeded(i)))

    def forward(self, x: Tensor) -> Tensor:
        self.inside += len(x)
        try:
            if self.inside > self.room:
                raise MemoryError("too small")
            y: Tensor = self.second(self.first(x))
            return y
        finally:
            self.inside -= len(x)


def test_auto_leaves_lockstep_where_the_memory_is_too_small_for_it() -> None:
    """In the trial, or at a later batch of longer rows; what lockstep held is freed."""
    model, other = Hungry(), Hungry()
    opt, sound = sparse(model, executor="auto"), sparse(other, executor="sequential")

    def loss(model: nn.Module) -> Closure:
        return lambda: model(X[:4]).square().mean() + model(X).square().mean()

    assert opt.choose_executor(loss(model)).keys() == {"sequential"}
    records = run(opt, loss(model), 1)
    opt.executors.use(opt.executors.lockstep)  # as if the first rows had been short
    records += run(opt, loss(model), 2)
    assert opt.executor == "sequential"
    assert records == run(sound, loss(other), 3)
    assert same(weights_of(model), weights_of(other))
    assert {side for _, _, side, *_ in opt._probe._scratch} == {0}
    assert not opt.executors.lockstep._turns._kept


def test_memory_that_is_too_small_for_all_that_may_be_used_is_said() -> None:
    model = Hungry()
    with pytest.raises(MemoryError):
        sparse(model, executor="lockstep").step(lambda: model(X).square().mean())
    model.room = 0
    with pytest.raises(MemoryError):
        sparse(model, executor="auto").step(lambda: model(X).square().mean())


def test_auto_has_the_numbers_of_sequential_and_names_its_choice() -> None:
    model, other = llama(), llama()
    opt = sparse(model, executor="auto", check=True)
    assert opt.executor == "auto"
    records = run(opt, language_loss(model), 3)
    assert opt.executor in ("sequential", "lockstep")
    assert records == run(sparse(other, executor="sequential"), language_loss(other), 3)
    assert opt.choose_executor(language_loss(model)) == {}


# -------------------------------------------------------------------------------- what may go wrong


class Fails(nn.Module):
    """Fails in one of its forwards behind the first layer."""

    def __init__(self, error: BaseException, call: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.error, self.call, self.calls = error, call, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        z: Tensor = self.second(y)
        return z


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_a_forward_that_fails_leaves_all_as_it_was(error: BaseException, call: int) -> None:
    """Whichever of the two it is: its own error comes out, and the step can be taken again."""
    model = Fails(error, call)
    before = weights_of(model)
    opt = sparse(model, executor="lockstep")
    with pytest.raises(type(error)):
        opt.step(lambda: model(X).square().mean())
    assert same(weights_of(model), before)
    assert all("forward" not in m.__dict__ for m in model.modules())
    other = Fails(error, 0)
    other.load_state_dict(model.state_dict())
    records = run(opt, lambda: model(X).square().mean(), 2)
    sound = sparse(other, executor="sequential")
    assert records == run(sound, lambda: other(X).square().mean(), 2)
