"""The self-check: what users write is accepted where probes are right, and named where not."""

import copy
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MambaConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from smezo_cli import train
from smezo_cli.config.compose import compose
from smezo_cli.errors import UserError
from smezo_cli.methods.mezo import MeZO
from smezo_cli.zo.reached import Losses, Rounding, Unreached, globs_of, is_reached
from smezo_cli.zo.step import Closure

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3]])
LABELS = torch.tensor([0, 1, 1])
WORDS = torch.tensor([7, 2])  # of the labels


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def llama(**changes: Any) -> nn.Module:
    """A small model whose head is its embedding; odd sizes, as GEMMs take other paths for them."""
    numbers = {
        **{"vocab_size": 67, "hidden_size": 40, "intermediate_size": 50, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    }
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**(numbers | changes))).eval())


def mezo(model: nn.Module, **options: Any) -> MeZO:
    return MeZO(model, **({"lr": 1e-3, "eps": 1e-3, "backend": "eager", "seed": 5} | options))


def textbook(model: nn.Module, make: Callable[[Any], Closure], **options: Any) -> float:
    """The projected gradient with the weights overwritten, those of a copy of the model."""
    model = copy.deepcopy(model)
    closure, opt = make(model), mezo(model, executor="in_place", check=False, **options)
    with torch.no_grad():
        plus, minus = opt.mover([0], [1e-3]), opt.mover([0], [-1e-3])
        a, b = opt.executors.used.losses(closure, [plus, minus])
    return (a.detach().double() - b.detach().double()).item() / 2e-3


def state_of(model: nn.Module) -> list[tuple[Tensor, Any]]:
    return [(p.detach().clone(), p.requires_grad) for p in model.parameters()]


def logits(model: nn.Module, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False, **options).logits
    return found


def autocast(closure: Closure) -> Closure:
    def inside() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return closure()

    return inside


def inference(closure: Closure) -> Closure:
    return lambda: torch.inference_mode()(closure)()


def label_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(logits(model, logits_to_keep=1)[:, -1][:, WORDS], LABELS)


def checkpointed(model: nn.Module) -> Tensor:
    """Layer by layer by the user's own loop, with gradients asked for and thrown away."""
    with torch.enable_grad():
        x = model.model.embed_tokens(IDS)
        for layer in model.model.layers:
            x = checkpoint(layer.mlp, x, use_reentrant=False) + x
        return F.cross_entropy(model.lm_head(model.model.norm(x))[:, -1], IDS[:, 0])


def accuracy(model: nn.Module) -> Tensor:
    return 1 - (logits(model)[:, -1][:, WORDS].argmax(1) == LABELS).double().mean()


def penalty(model: nn.Module) -> Tensor:
    return label_loss(model) + 1e-2 * model.model.norm.weight.square().sum()


def own_head(model: nn.Module) -> Tensor:
    """The head read as a matrix instead of called."""
    states = model.model(input_ids=IDS, use_cache=False).last_hidden_state[:, -1]
    return F.cross_entropy(states @ model.lm_head.weight.T, IDS[:, 0])


def logged(model: nn.Module) -> Tensor:
    """A norm that is computed for a log, of a weight that the loss reads where it should."""
    model.seen = model.lm_head.weight.norm()
    return label_loss(model)


#: closures on a model with a tied head, and the names that are refused (None: accepted)
CLOSURES: dict[str, tuple[Callable[[nn.Module], Closure], str | None]] = {
    "last position of two words": (lambda m: lambda: label_loss(m), None),
    "mean over tokens": (
        lambda m: lambda: F.cross_entropy(logits(m)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()),
        None,
    ),
    "labels of transformers": (lambda m: lambda: m(input_ids=IDS, labels=IDS).loss, None),
    "a softmax": (lambda m: lambda: -logits(m)[:, -1].softmax(-1)[:, 7].mean(), None),
    "accuracy": (lambda m: lambda: accuracy(m), None),
    "times 1e6": (lambda m: lambda: 1e6 * label_loss(m), None),
    "times 1e-6": (lambda m: lambda: 1e-6 * label_loss(m), None),
    "near zero": (lambda m: lambda: (lambda x: x[0, 7] - x[0, 7].detach())(logits(m)[:, -1]), None),
    "float64": (lambda m: lambda: label_loss(m).double(), None),
    "half of it": (lambda m: lambda: label_loss(m).half(), None),
    "autocast": (lambda m: autocast(lambda: label_loss(m)), None),
    "inference mode": (lambda m: inference(lambda: label_loss(m)), None),
    "checkpointed": (lambda m: lambda: checkpointed(m), None),
    "modules by themselves": (
        lambda m: lambda: m.lm_head(m.model.norm(m.model.embed_tokens(IDS))).square().mean(),
        None,
    ),
    "a weight for a log": (lambda m: lambda: logged(m), None),
    "a penalty": (lambda m: lambda: penalty(m), "model.norm.weight"),
    "a head of its own": (lambda m: lambda: own_head(m), "model.embed_tokens.weight"),
    "a head of its own, accuracy": (
        lambda m: lambda: (own_head(m) > 4.2).double(),
        "model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.usefixtures("threads")
def test_closures_on_a_tied_head(name: str) -> None:
    """Accepted with the textbook's projected gradient, or refused by the name that is meant."""
    model = llama()
    make, refused = CLOSURES[name]
    closure, before = make(model), state_of(model)
    if refused is not None:
        with pytest.raises(Unreached) as caught:
            mezo(model).step(closure)
        assert caught.value.names == [refused]
        opt = mezo(model, freeze=caught.value.globs)
        opt.self_check(closure)
        assert refused not in opt.trained
        assert len(opt.trained) == len(before) - 1
        return
    wanted = textbook(model, make)
    opt = mezo(model)
    opt.self_check(closure)
    for (was, wants), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(p, was)
        assert p.requires_grad == wants
    size = abs(float(closure().detach()))
    (got,) = opt.step(closure).projected_grad
    noise = 0.2 if name in ("autocast", "half of it") else 2e-3
    assert got == pytest.approx(wanted, rel=noise, abs=noise * size / 1e-3 * 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_closures_in_low_precision(dtype: torch.dtype) -> None:
    """The same, on a model in it: a head read as a matrix is still told from rounding."""
    model = llama().to(dtype)
    assert mezo(model).self_check(lambda: label_loss(model)) == 3
    with pytest.raises(Unreached, match=r"model\.embed_tokens\.weight"):
        mezo(model).self_check(lambda: own_head(model))


def test_a_moved_copy_takes_the_paths_of_the_weight() -> None:
    """It asks for a gradient as the weight does, by which torch chooses how to multiply."""
    model = llama()
    seen = []
    model.lm_head.register_forward_hook(lambda m, *_: seen.append(m.weight.requires_grad))
    mezo(model, check=False, executor="sequential").step(lambda: label_loss(model))
    assert seen == [True, True]


def test_casts_of_an_outer_autocast_are_those_of_the_present_weights() -> None:
    """A loop inside of torch.autocast keeps casts; probes and updates are seen all the same."""
    inside, outside = llama(), llama()
    with torch.autocast("cpu", torch.bfloat16):
        opt = mezo(inside)
        got = [opt.step(lambda: label_loss(inside)) for _ in range(3)]
    opt = mezo(outside)
    assert got == [opt.step(autocast(lambda: label_loss(outside))) for _ in range(3)]
    assert len({r.loss for r in got}) == 3


# -------------------------------------------------------------------- all parameters of a kind

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(7))


class Alike(nn.Module):
    """Layers of one kind, of which some are read without being called."""

    def __init__(self, number: int, read: set[int], width: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(number))
        self.read = read
        self.hides = False

    def forward(self) -> Tensor:
        x = X.to(self.layers[0].weight.dtype)
        for i, layer in enumerate(self.layers):
            weight, bias = layer.weight, layer.bias
            if i in self.read and self.hides:
                weight, bias = (torch.from_numpy(p.data.numpy()) for p in (weight, bias))
            x = torch.tanh((F.linear(x, weight, bias) if i in self.read else layer(x)) + x)
        return x.square().mean()


@pytest.mark.parametrize("hides", [False, True], ids=["seen by torch", "hidden from torch"])
@pytest.mark.parametrize(
    ("number", "read"),
    [(5, {2}), (30, {13}), (30, {0}), (30, {7, 8, 21}), (6, {1, 2, 3, 4}), (3, {0, 1, 2})],
)
def test_those_that_are_not_called_are_named_among_alike_ones(
    number: int, read: set[int], hides: bool
) -> None:
    """A middle one too, and no other; what is said to be frozen makes the step the textbook's."""
    model = seeded(lambda: Alike(number, read))
    model.hides = hides
    with pytest.raises(Unreached) as caught:
        mezo(model).step(model)
    wanted = [f"layers.{i}.{name}" for i in sorted(read) for name in ("weight", "bias")]
    assert caught.value.names == wanted
    if len(read) == number:  # nothing would be left
        return
    frozen = {"freeze": caught.value.globs}
    wanted = textbook(model, lambda m: m, **frozen)
    (got,) = mezo(model, **frozen).step(model).projected_grad
    assert got == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_among_a_hundred_is_seen_where_losses_are_noisy(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose sums differ from call to call nothing sound is refused."""
    model = seeded(lambda: Alike(20, set())).to(dtype)
    g = torch.Generator().manual_seed(3)
    size = {torch.float32: 3e-6, torch.bfloat16: 3e-3}[dtype]

    def noisy() -> Tensor:
        return model().double() * (1 + size * float(torch.randn((), generator=g)))

    mezo(model).self_check(noisy)
    model.read = {11}
    with pytest.raises(Unreached) as caught:
        mezo(model).self_check(noisy)
    assert caught.value.names == ["layers.11.weight", "layers.11.bias"]


def losses_of(functional: float, in_place: float) -> Callable[[float], Losses]:
    """Losses in proportion to the move, around 1."""
    return lambda scale: Losses(1 + functional * scale, 1 + in_place * scale, 1.0)


@pytest.mark.parametrize(
    ("functional", "in_place", "was_read_directly", "answer"),
    [
        (0.1, 0.1, False, True),
        (0.0, 0.1, False, False),  # where it was
        (0.05, 0.1, False, False),  # half of the places that read it
        (0.1 + 1e-5, 0.1, False, True),  # rounding
        (0.0, 1e-6, False, False),  # too small to see, until it is enlarged
        (0.0, 1e-12, False, True),  # never seen, and nothing speaks against it
        (0.0, 1e-12, True, False),  # never seen, and read past the probe
        (0.1 + 3e-4, 0.1, True, False),  # read past the probe: no half of the digits
    ],
)
def test_a_parameter_is_reached_if_its_move_is_seen(
    functional: float, in_place: float, was_read_directly: bool, answer: bool
) -> None:
    rounding = Rounding(1.2e-7, 1.2e-7, 1e-6)
    assert is_reached(losses_of(functional, in_place), rounding, was_read_directly) == answer


class Dead(nn.Module):
    """A unit that is never on, an expert that no row is sent to, a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.live = nn.Linear(12, 12), nn.Linear(12, 12)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.unread = nn.Parameter(torch.ones(3))
        with torch.no_grad():
            self.dead.bias -= 1e4

    def forward(self) -> Tensor:
        x = self.live(X) + torch.relu(self.dead(X))
        return self.experts[1](x).square().mean()


def test_what_no_move_is_seen_of_is_accepted() -> None:
    model = seeded(Dead)
    assert mezo(model).self_check(model) == 3
    assert not any(name.startswith("forward") for name in vars(model))


# ---------------------------------------------------------------------------- random closures


class Dropping(nn.Module):
    """Dropout behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(12, 12), nn.Dropout(0.3)

    def forward(self) -> Tensor:
        y: Tensor = self.drop(self.layer(X)).square().mean()
        return y


@pytest.mark.parametrize("executor", ["auto", "sequential", "lockstep", "in_place"])
def test_a_random_closure_is_called_random(executor: str) -> None:
    model = seeded(Dropping)
    with pytest.raises(ValueError, match=r"the closure is random: .*model\.eval\(\)") as caught:
        mezo(model, executor=executor).step(model)
    assert not isinstance(caught.value, Unreached)
    mezo(model.eval(), executor=executor).step(model)


def test_a_closure_that_seeds_what_it_draws_is_not_random() -> None:
    model = seeded(Dropping)

    def closure() -> Tensor:
        torch.manual_seed(1)
        return model()

    mezo(model).step(closure)


def test_a_closure_with_other_data_at_each_call_is_named_as_that() -> None:
    model, batches = seeded(lambda: nn.Linear(12, 1)), iter(torch.randn(40, 4, 12))
    with pytest.raises(ValueError, match=r"another loss at each call: .* take the batch before"):
        mezo(model).step(lambda: model(next(batches)).square().mean())
    counted = iter(range(100))
    with pytest.raises(ValueError, match="another loss at each call"):
        mezo(model).step(lambda: model(X).square().mean() + next(counted))


def test_a_loss_that_is_not_finite_is_said_of_the_model_as_it_is() -> None:
    model = seeded(lambda: nn.Linear(12, 1))
    with pytest.raises(ArithmeticError, match="loss nan"):
        mezo(model).step(lambda: model(X).square().mean() * float("nan"))


# ------------------------------------------------------------------- torch's own fast paths


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options).eval()


def test_the_fast_path_of_a_transformer_is_meant_by_name() -> None:
    """All that it reads is named with the switch that turns it off; then all is reached."""
    model = seeded(encoder)
    closure = lambda: model(X[None]).square().mean()  # noqa: E731  # short
    with pytest.raises(
        Unreached, match=r"so switch it off \(torch\.backends\.mha\.set_fast"
    ) as caught:
        mezo(model).step(closure)
    assert set(caught.value.names) == {name for name, _ in model.named_parameters()}
    with pytest.raises(Unreached) as caught:
        mezo(model, freeze=["*self_attn*"]).step(closure)
    assert {name.split(".")[2] for name in caught.value.names} == {
        *("linear1", "linear2", "norm1", "norm2")
    }
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        wanted = textbook(model, lambda m: lambda: m(X[None]).square().mean())
        (got,) = mezo(model).step(closure).projected_grad
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert got == pytest.approx(wanted, rel=1e-3)


class Attending(nn.Module):
    """An attention whose output projection is read by its parent's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 12)

    def forward(self) -> Tensor:
        x = X[None]
        y: Tensor = self.head(self.attention(x, x, x)[0]).square().mean()
        return y


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
def test_a_weight_that_the_forward_around_its_owner_reads_is_moved_there(executor: str) -> None:
    """With the losses of weights overwritten, and nothing left behind."""
    model = seeded(Attending).eval()
    wanted = textbook(model, lambda m: m)
    opt = mezo(model, executor=executor)
    before = state_of(model)
    opt.self_check(model)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(before, state_of(model), strict=True))
    (got,) = opt.step(model).projected_grad
    assert got == pytest.approx(wanted, rel=1e-4)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
def test_a_weight_that_a_forward_put_in_place_reads_is_moved_there(executor: str) -> None:
    """As TRL's SFTTrainer multiplies by the output layer's weight in a forward of its own."""
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)))

    def put_in_place(self: nn.Sequential) -> Tensor:
        loss: Tensor = (self[0](X) @ self[1].weight.T).square().mean()  # type: ignore[operator]  # of a layer
        return loss

    model.forward = MethodType(put_in_place, model)
    wanted = textbook(model, lambda m: m, freeze=["1.bias"])
    opt = mezo(model, executor=executor, freeze=["1.bias"])
    opt.self_check(model)
    (got,) = opt.step(model).projected_grad
    assert got == pytest.approx(wanted, rel=1e-4)


class Scaling(nn.Module):
    """A layer that has its scales in a ParameterDict, as adapters of peft have."""

    def __init__(self, scales: nn.ParameterDict) -> None:
        super().__init__()
        self.layer, self.scales = nn.Linear(12, 12), scales

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.scales["one"] + self.scales["other"]
        return y


@pytest.mark.parametrize("is_shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
def test_a_weight_in_a_parameter_dict_is_moved_where_it_is_read(
    executor: str, is_shared: bool
) -> None:
    """Also one that two layers share: then around both."""

    def scales() -> nn.ParameterDict:
        return nn.ParameterDict({"one": torch.ones(12), "other": torch.zeros(12)})

    def layers() -> nn.ModuleDict:
        first = scales()
        both = nn.Sequential(Scaling(first), nn.Tanh(), Scaling(first if is_shared else scales()))
        return nn.ModuleDict({"layers": both})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layers()

        def forward(self) -> Tensor:
            loss: Tensor = self.inner["layers"](X).square().mean()
            return loss

    model = seeded(Model)
    wanted = textbook(model, lambda m: m)
    opt = mezo(model, executor=executor)
    opt.self_check(model)
    (got,) = opt.step(model).projected_grad
    # Losses of order 1 in float32, over 2 eps.
    assert got == pytest.approx(wanted, rel=1e-4, abs=3e-5)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


# ---------------------------------------------------------------------------- compiled models


def compiled_closures() -> dict[str, Callable[[], tuple[nn.Module, Closure]]]:
    def wrapper() -> tuple[nn.Module, Closure]:
        model = torch.compile(llama(), backend="eager")
        return model, lambda: label_loss(model)

    def inner() -> tuple[nn.Module, Closure]:
        model = llama()
        compiled = torch.compile(model, backend="eager")
        return model, lambda: label_loss(compiled)

    def in_place() -> tuple[nn.Module, Closure]:
        model = llama()
        model.compile(backend="eager")
        return model, lambda: label_loss(model)

    def part() -> tuple[nn.Module, Closure]:
        model = llama()
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
        model.model.layers[0].mlp.compile(backend="aot_eager", fullgraph=True)
        return model, lambda: label_loss(model)

    def closure() -> tuple[nn.Module, Closure]:
        model = llama()
        return model, torch.compile(lambda: label_loss(model), backend="eager")

    return {f.__name__: f for f in (wrapper, inner, in_place, part, closure)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports
@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("how", compiled_closures())
@pytest.mark.usefixtures("one_thread")
def test_a_compiled_model_has_the_losses_of_the_model(how: str, executor: str) -> None:
    """Whoever was compiled and given to the optimizer; noise and names are the model's."""
    plain = llama()
    wanted = mezo(plain, executor=executor)
    model, closure = compiled_closures()[how]()
    opt = mezo(model, executor=executor)
    assert list(opt.trained) == list(wanted.trained)
    for _ in range(2):
        assert opt.step(closure) == wanted.step(lambda: label_loss(plain))
    pairs = zip(opt.trained.values(), wanted.trained.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with torch.no_grad():
        torch.testing.assert_close(closure(), label_loss(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
def test_a_compiled_model_without_a_self_check() -> None:
    """With fullgraph, where dynamo gives up at a probe."""
    model, plain = seeded(Attending).eval(), seeded(Attending).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    options = {"check": False, "freeze": ["attention.*"], "executor": "sequential"}
    got = mezo(model, **options).step(compiled)
    assert got == mezo(plain, **options).step(plain)


# ------------------------------------------------------------------------- a later other path


class Switching(nn.Module):
    """Takes a functional path once a switch is thrown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.switched = nn.Linear(12, 12), False

    def forward(self) -> Tensor:
        if self.switched:
            return F.linear(X, self.layer.weight, self.layer.bias).square().mean()
        y: Tensor = self.layer(X).square().mean()
        return y


def test_a_functional_path_that_is_taken_later_is_named_when_a_probe_moves_nothing() -> None:
    """Not silently a projected gradient of 0; a loss that is a step function counts its zeros."""
    model = seeded(Switching)
    opt = mezo(model)
    assert opt.step(model).unmoved == 0
    model.switched = True
    for _ in range(2):  # the next step asks again
        with pytest.raises(Unreached, match=r"layer\.weight, layer\.bias"):
            opt.step(model)
    model.switched = False
    opt = mezo(model)
    record = opt.step(lambda: (model() > 1e9).double())
    assert (record.unmoved, record.projected_grad) == (1, (0.0,))


class Fussy(MeZO):
    """Finds fault with what the check has accepted."""

    @torch.no_grad()
    def self_check(self, closure: Closure) -> int:
        super().self_check(closure)
        raise ValueError("fussy")


def test_a_check_that_failed_is_asked_again_by_the_next_step() -> None:
    """Whatever failed in it: a bypassed layer, a loss, the memory, or what a method adds to it."""
    model = seeded(Switching)

    def failing() -> Tensor:
        model()
        raise MemoryError

    opt, fussy = mezo(model), Fussy(model, lr=1e-3, eps=1e-3, backend="eager")
    for _ in range(2):
        with pytest.raises(MemoryError):
            opt.step(failing)
        with pytest.raises(ArithmeticError):
            opt.step(lambda: model() * float("nan"))
        with pytest.raises(ValueError, match="fussy"):
            fussy.step(model)
    model.switched = True
    for _ in range(2):
        with pytest.raises(Unreached):
            opt.step(model)
    model.switched = False
    opt.step(model)
    assert opt.num_steps == 1


def test_another_closure_can_be_asked_about() -> None:
    model = seeded(Switching)
    opt = mezo(model)
    opt.self_check(model)
    opt.check_reads(model)
    model.switched = True
    with pytest.raises(Unreached, match=r"layer\.weight"):
        opt.check_reads(model)


# ----------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    ("names", "others", "globs"),
    [
        (["a.0.b.w", "a.1.b.w"], ["a.0.c.w"], ["*.b.w"]),
        (["a.0.b.w", "a.1.b.w"], ["a.0.c.w", "d.b.w"], ["*.*.b.w"]),
        (["a.0.b.w", "a.2.b.w"], ["a.1.b.w"], ["a.0.b.w", "a.2.b.w"]),
        (["head.w"], ["a.0.w"], ["head.w"]),
        (["a.0.x1.w", "a.1.x1.w", "head.w"], ["a.0.x2.w"], ["*.x1.w", "head.w"]),
    ],
)
def test_globs_match_these_names_alone(
    names: list[str], others: list[str], globs: list[str]
) -> None:
    assert globs_of(names, [*names, *others]) == globs


# --------------------------------------------------------------------------------- of models

STATES = {
    "mamba": lambda: MambaConfig(
        vocab_size=67, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0
    ),
    "mamba2": lambda: Mamba2Config(
        **{"vocab_size": 67, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        **{"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "pad_token_id": 0},
    ),
}


@pytest.mark.filterwarnings("ignore")  # that the fast kernels are not installed
@pytest.mark.parametrize("name", STATES)
@pytest.mark.usefixtures("one_thread")
def test_the_convolution_that_a_mixer_reads_is_moved_with_the_mixer(name: str) -> None:
    """Mamba's conv1d and dt_proj: every weight moves the loss as in the textbook."""
    model = seeded(lambda: AutoModelForCausalLM.from_config(STATES[name]()).eval())

    def make(m: nn.Module) -> Closure:
        return lambda: F.cross_entropy(m(input_ids=IDS, use_cache=False).logits[:, -1], IDS[:, 0])

    wanted = textbook(model, make)
    opt = mezo(model)
    opt.self_check(make(model))
    assert len(opt.trained) == len(list(model.parameters()))
    (got,) = opt.step(make(model)).projected_grad
    assert got == pytest.approx(wanted, rel=1e-2, abs=1e-3)


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    few = ["task.num_train=8", "task.num_dev=4", "task.num_test=4", "task.prompt=0", "lr=1e-4"]
    short = ["steps=4", "batch_size=4", "eval_every=2", "device=cpu", f"runs_dir={tmp_path}"]
    return train.run(compose(["task=toy", "model=tiny-llama", *few, *short, *words]))


def by_itself(self: Any, x: Tensor) -> Tensor:
    """A layer that multiplies by the weight of another in place of calling it."""
    found: Tensor = F.linear(
        self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight
    )
    return found


@pytest.mark.usefixtures("one_thread")
def test_a_run_names_what_is_not_reached_before_it_scores_with_the_words_that_let_it_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", by_itself)
    with pytest.raises(UserError) as caught:
        run(tmp_path, "method=sparse_mezo", "method.freeze=[model.norm*]")
    assert "zero-shot" not in capsys.readouterr().out
    message = str(caught.value)
    assert message.startswith("method: functional probes do not reach model.layers.0.mlp.down_proj")
    (word,) = (w for w in shlex.split(message.replace(", or use", " ")) if "method.freeze" in w)
    assert word == 'method.freeze=["model.norm*","*.down_proj.weight"]'
    assert run(tmp_path, "method=sparse_mezo", word)["status"] == "done"


@pytest.mark.usefixtures("one_thread")
def test_a_run_checks_again_at_its_first_dev_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A path that is first taken after a step does not spoil a run in silence."""
    step = MeZO.step

    def then_another_path(self: MeZO, closure: Closure) -> Any:
        record = step(self, closure)
        monkeypatch.setattr(LlamaMLP, "forward", by_itself)
        return record

    monkeypatch.setattr(MeZO, "step", then_another_path)
    with pytest.raises(
        UserError, match=r"do not reach .*down_proj.*freeze them by 'method\.freeze="
    ):
        run(tmp_path, "method=mezo")


@pytest.mark.usefixtures("one_thread")
def test_a_run_counts_the_probes_that_moved_nothing(tmp_path: Path) -> None:
    """Of an accuracy that is a step function they are no error."""
    result = run(tmp_path, "method=mezo", "method.objective=accuracy")
    (file,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    gradients = [line["projected_grad"] for line in lines if "projected_grad" in line]
    assert result["watch"]["unmoved"] == gradients.count([0.0]) > 0
    assert [line.get("unmoved", 0) for line in lines if "projected_grad" in line] == [
        int(g == [0.0]) for g in gradients
    ]
    (console,) = tmp_path.rglob("console.log")
    assert f"unmoved        {result['watch']['unmoved']} of 4 probes" in console.read_text()
