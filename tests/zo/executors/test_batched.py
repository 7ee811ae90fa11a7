"""Several points in one batch, and products beside a weight: losses of forwards of their own."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from smezo_cli.methods.eggroll import EGGROLL
from smezo_cli.methods.fzoo import FZOO
from smezo_cli.methods.hizoo import HiZOO
from smezo_cli.methods.lozo import LOZO
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.methods.subzero import SubZero
from smezo_cli.methods.zo_block import ZOBlock
from smezo_cli.methods.zo_muon import ZOMuon
from smezo_cli.models.onednn import use_onednn
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.points import NotBatched, Points
from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.step import StepRecord
from tests.zo.test_optimizer import closure_of, language_loss, llama, mlp, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

INEXACT = ["batched", "side_path"]
METHODS: dict[str, tuple[type[ZeroOrder], dict[str, Any]]] = {
    "mezo": (MeZO, {"num_queries": 3}),
    "sparse": (SparseMeZO, {"sparsity": 0.5}),
    "lozo": (LOZO, {"rank": 2, "refresh_every": 2, "num_queries": 2}),
    "eggroll": (EGGROLL, {"rank": 2, "num_queries": 2}),
    "fzoo": (FZOO, {"num_queries": 3}),
    "hizoo": (HiZOO, {}),
    "zo_muon": (ZOMuon, {"rank": 2, "refresh_every": 2, "num_queries": 3}),
    "subzero": (SubZero, {"rank": 2, "refresh_every": 2, "num_queries": 2}),
    "block": (ZOBlock, {"num_blocks": 2}),
}


def made(name: str, model: nn.Module, executor: str, **more: Any) -> ZeroOrder:
    kind, options = METHODS[name]
    common: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "backend": "eager", "check": False}
    return kind(model, executor=executor, **(common | options | more))


def gpt2() -> nn.Module:
    """Learned positions, of which all rows have one, and a linear layer of its own make."""
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        g = seeded(3)
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def gpt2_loss(model: nn.Module) -> Callable[[], Tensor]:
    ids = torch.arange(40).view(4, 10) % 32
    return lambda: model(input_ids=ids, use_cache=False).logits.logsumexp(-1).mean()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Callable[[], Tensor]]]] = {
    "mlp": (mlp, closure_of),
    "llama": (llama, language_loss),
    "gpt2": (gpt2, gpt2_loss),
}


@functools.cache
def stepped(name: str, model: str, executor: str) -> list[StepRecord]:
    """What four steps recorded."""
    build, loss = MODELS[model]
    network = build()
    opt = made(name, network, executor, lr=1e-4)
    return [opt.step(loss(network)) for _ in range(4)]


@pytest.mark.parametrize("executor", INEXACT)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_forwards_of_their_own(name: str, model: str, executor: str) -> None:
    """To rounding: matrix products of other shapes add in another order; weights stay near."""
    alone, found = stepped(name, model, "sequential"), stepped(name, model, executor)
    for a, b in zip(alone, found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.num_forwards == a.num_forwards
        # A difference of two losses over 2 eps = 0.02.
        assert b.projected_grad == pytest.approx(a.projected_grad, abs=1e-3 * max(1, abs(a.loss)))
    assert alone[0].loss != alone[-1].loss


@pytest.mark.parametrize(("name", "points"), [("mezo", 6), ("fzoo", 4), ("hizoo", 3)])
def test_a_batch_reads_the_model_once_for_all_points(name: str, points: int) -> None:
    """Also for the weights themselves, to which one-sided differences are taken."""
    model = mlp()
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    opt = made(name, model, "batched")
    opt.choose_executor(closure_of(model))
    rows.clear()
    opt.step(closure_of(model))
    # The model is called for each point, and computes in the first call alone.
    assert rows == [16] * points
    inner: list[int] = []
    handle = model[1].register_forward_pre_hook(lambda _, args: inner.append(len(args[0])))
    opt.step(closure_of(model))
    handle.remove()
    assert inner == [points * 16]


@pytest.mark.parametrize("name", ["fzoo", "zo_muon"])
def test_the_weights_themselves_are_in_the_batch_of_any_points_beside_them(name: str) -> None:
    """In the order asked for; points that move other tensors have a forward of their own."""
    model = mlp()
    opt, closure = made(name, model, "batched"), closure_of(model)
    here = Move(())
    some = Move((Term(Key(0), 1e-2, only=frozenset({"0.weight", "3.bias"})),))
    there = [Move((Term(Key(0, query), 1e-2),)) for query in (1, 2)]
    movers = [opt.direction.mover(0, move) for move in (here, some, here, *there, here)]
    with torch.no_grad():
        expected = opt.executors.by(opt.executors.sequential, closure, movers)
    sizes: list[int] = []
    model[1].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with torch.no_grad():
        found = opt.executors.by(opt.executors.used, closure, movers)
    assert sizes == [3 * 16, 3 * 16]
    # Products in float32 add in another order.
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=0)
    assert len({round(float(x), 4) for x in expected}) == 4  # the weights, and three points


@pytest.mark.parametrize("executor", INEXACT)
@pytest.mark.parametrize("name", ["lozo", "subzero", "zo_muon", "eggroll"])
def test_a_matrix_that_is_moved_along_a_product_gets_no_copy(
    name: str, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only biases and gains, of one dimension, are written out."""
    model = mlp()
    opt = made(name, model, executor)
    opt.choose_executor(closure_of(model))
    kind = type(opt._pair(0, 1e-2)[0])
    written: list[int] = []
    whole = kind.whole

    def watched(self: Any, parameter: Tensor, out: Tensor) -> None:
        written.append(parameter.dim())
        whole(self, parameter, out)

    monkeypatch.setattr(kind, "whole", watched)
    opt.step(closure_of(model))
    assert set(written) == {1}


@pytest.mark.parametrize("masked", [{"sparsity": 0.5}, {}])
def test_what_a_mask_leaves_out_is_not_moved(masked: dict[str, float]) -> None:
    """Products are for whole matrices: with a mask a copy is made, and the loss is the masked."""
    from smezo_cli.zo.directions.factored import Factored
    from smezo_cli.zo.estimators.two_sided import TwoSided
    from smezo_cli.zo.selections.masked import Masked
    from smezo_cli.zo.updates.sgd import SGD

    found = []
    for executor in ("sequential", "batched"):
        model = mlp()
        opt = ZeroOrder(
            model,
            selection=Masked("small", **masked),
            direction=Factored("uv", 2, 3),
            estimator=TwoSided(2),
            update=SGD(),
            lr=1e-2,
            eps=1e-2,
            executor=executor,
            check=False,
        )
        found.append(opt.step(closure_of(model)))
    assert found[1].projected_grad == pytest.approx(found[0].projected_grad, abs=1e-3)


def test_a_recorded_step_is_made_again_by_any_executor() -> None:
    """An update is a function of scalars, however they were measured."""
    model, again = mlp(), mlp()
    opt, other = made("lozo", model, "batched"), made("lozo", again, "sequential")
    for _ in range(4):
        record = opt.step(closure_of(model))
        other.replay(1e-2, record.scalars)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fewer_points_go_on_where_the_memory_is_too_small() -> None:
    model = mlp()
    sizes: list[int] = []

    def small(_: nn.Module, args: Any) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 40:
            raise MemoryError("too small")

    opt, plain = made("mezo", model, "batched", lr=1e-9), made("mezo", mlp(), "sequential")
    model[1].register_forward_pre_hook(small)
    record = opt.step(closure_of(model))
    assert sizes[-3:] == [32] * 3  # two points at once, of six
    other = plain.step(closure_of(plain._model))
    assert record.projected_grad == pytest.approx(other.projected_grad, abs=1e-3)


class Loose(nn.Module):
    """A model of two linear layers that can be asked for wrong things."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a, self.b, self.what = nn.Linear(6, 4), nn.Linear(4, 3), what
        g = seeded(5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        self.norm = nn.BatchNorm1d(4) if what == "batch norm" else nn.Identity()
        self.calls = 0
        self.loss: Callable[[], Tensor] = lambda: self(torch.ones(4, 6)).square().mean()

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        y = self.b(self.norm(self.a(x)).tanh() * scale)
        if self.what == "sum":
            return y.sum()
        if self.what == "over the batch":
            return y - y.mean(0)
        return y


def other_inputs(model: Loose) -> Tensor:
    model.calls += 1
    return model(torch.ones(4, 6), scale=float(model.calls)).mean()


REFUSED: dict[str, tuple[Callable[[Loose], Callable[[], Tensor]], str]] = {
    "sum": (lambda m: lambda: m(torch.ones(4, 6)), "shape [], which is not row by row"),
    "batch norm": (lambda m: m.train().loss, "see each other in its BatchNorm1d"),
    "inputs": (lambda m: lambda: other_inputs(m), "give the model other inputs"),
    "a module": (
        lambda m: lambda: m.loss() + m.b(torch.ones(4, 4)).mean(),
        "calls a Linear of the model by itself",
    ),
    "one dimension": (lambda m: lambda: m(torch.ones(6)).mean(), "has rows"),
    "over the batch": (
        lambda m: lambda: m(torch.eye(6)[:4]).square().mean(),
        "more than rounding: use executor=sequential",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_run_as_a_batch_is_refused_in_a_sentence(what: str) -> None:
    loss, words = REFUSED[what]
    model = Loose(what)
    opt = made("mezo", model, "batched")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NotBatched, match="executor=batched") as refused:
        opt.step(loss(model))
    assert words in str(refused.value)
    assert "use executor=sequential" in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_refusal_names_the_executor_that_it_is_for() -> None:
    model = Loose("sum")
    probe = FunctionalProbe(model, list(model.parameters()))
    pair = made("mezo", model, "sequential")._pair(0, 1e-2)
    points = Points(model, probe, "side_path")
    with (
        pytest.raises(NotBatched, match=r"^executor=side_path cannot be used: the model returns"),
        points.first(pair),
    ):
        REFUSED["sum"][0](model)()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("executor", INEXACT)
def test_narrow_weights_are_probed_to_their_precision(executor: str, dtype: torch.dtype) -> None:
    """Losses near 2, of numbers with 8 or 11 bits; a probe of 0.1 moves them by far more."""
    found = []
    for how in ("sequential", executor):
        model = mlp(dtype)
        opt = made("lozo", model, how, eps=0.1, lr=1e-9)
        found.append(opt.step(closure_of(model)))
    bound = 0.1 if dtype == torch.bfloat16 else 0.01
    assert found[1].loss == pytest.approx(found[0].loss, rel=bound / 4)
    assert found[1].projected_grad == pytest.approx(found[0].projected_grad, abs=10 * bound)


@pytest.mark.parametrize("executor", INEXACT)
def test_layers_that_compute_by_another_library_are_products_too(executor: str) -> None:
    """In float32 on a CPU runs give linear layers another forward, which says what it computes."""
    model, plain = llama(), llama()
    assert use_onednn(model) > 0
    opt, other = made("lozo", model, executor), made("lozo", plain, "sequential")
    written: list[tuple[int, ...]] = []
    kind = type(opt._pair(0, 1e-2)[0])
    with pytest.MonkeyPatch.context() as patched:
        whole = kind.whole

        def watched(self: Any, parameter: Tensor, out: Tensor) -> None:
            written.append(tuple(parameter.shape))
            whole(self, parameter, out)

        opt.choose_executor(language_loss(model))
        patched.setattr(kind, "whole", watched)
        record = opt.step(language_loss(model))
    assert {len(shape) for shape in written} == {1}
    assert record.loss == pytest.approx(other.step(language_loss(plain)).loss, rel=1e-5)
