"""Functional probes: the loss of moved weights, to the last bit, without a write to the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from smezo_cli.methods.mezo import MeZO
from smezo_cli.zo.probe import FunctionalProbe, only_rows, renumbered

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.tensor([[3, 1, 4, 1, 5, 0], [2, 6, 5, 3, 0, 0]])  # 0 is the padding
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))


class Shift:
    """Moves each parameter by a fixed tensor of its own, and notes how it was asked."""

    def __init__(self, model: nn.Module, scale: float = 0.1) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        g = torch.Generator().manual_seed(1)
        self.shift = {id(p): scale * torch.randn(p.shape, generator=g) for p in model.parameters()}
        self.asked: list[tuple[str, str]] = []

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        self.asked.append((self.names[id(parameter)], "whole"))
        moved = parameter.detach().float() + self.shift[id(parameter)]
        out.copy_(moved.to(parameter.dtype).view(-1))

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        self.asked.append((self.names[id(parameter)], "rows"))
        moved = parameter.detach().float() + self.shift[id(parameter)]
        return moved.to(parameter.dtype)[rows]


@contextmanager
def moved_in_place(model: nn.Module, mover: Shift, only: set[int] | None = None) -> Iterator[None]:
    """The reference: every parameter overwritten once, and an exact copy put back."""
    saved = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters():
        if only is None or id(p) in only:
            out = torch.empty_like(p).view(-1)
            mover.whole(p, out)
            p.data.copy_(out.view(p.shape))
    try:
        yield
    finally:
        for p, copy in saved.items():
            p.data.copy_(copy)


def bits(x: Tensor) -> Tensor:
    return x.detach().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def state_of(model: nn.Module) -> list[tuple[object, ...]]:
    """What a probe must leave: each module's parameter objects, their writes, its own forward."""
    return [
        (
            [(name, id(p), p is not None and p._version) for name, p in m._parameters.items()],
            m.__dict__.get("forward"),
            getattr(m, "padding_idx", None),
        )
        for m in model.modules()
    ]


# ------------------------------------------------------------------------------------ the models


class Tied(nn.Module):
    """The embedding is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.embed(IDS))))
        return logits


class Pair(nn.Module):
    """Two layers of one class that hold the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(X.to(self.a.weight.dtype))))
        return y


class ScaledEmbedding(nn.Embedding):
    """Scales what it looked up, as Gemma does."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * 8**0.5


class PositionEmbedding(nn.Embedding):
    """Computes the rows from a mask, with an offset, as OPT does."""

    def forward(self, attention_mask: Tensor) -> Tensor:
        positions = attention_mask.cumsum(1) * attention_mask - 1
        return super().forward(positions + 2)


class Embedded(nn.Module):
    """An embedding, asked for what ``ids`` says, and a layer."""

    def __init__(self, embed: nn.Embedding, ids: Tensor = IDS) -> None:
        super().__init__()
        self.embed, self.mix, self.ids = embed, nn.Linear(8, 8), ids

    def forward(self) -> Tensor:
        y: Tensor = self.mix(torch.tanh(self.embed(self.ids)))
        return y


class Twice(nn.Module):
    """One embedding and one layer, each used twice, on other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self) -> Tensor:
        return self.mix(torch.tanh(self.mix(self.embed(IDS)))) + self.embed(IDS[0])  # type: ignore[no-any-return]


class NestedHead(nn.Module):
    """Owns the bias that its child owns too (BERT's head), and adds it once more."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))
        self.decoder = nn.Linear(8, 8)
        self.decoder.bias = self.bias

    def forward(self) -> Tensor:
        before = X.to(self.bias.dtype) * self.scale
        return self.decoder(before) * self.scale + self.bias  # type: ignore[no-any-return]


class Recursive(nn.Module):
    """Calls itself: moved once, not once a level."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor | None = None, depth: int = 3) -> Tensor:
        y = torch.tanh((X.to(self.w.dtype) if x is None else x) @ self.w)
        return self(y, depth - 1) if depth else y  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Every level owns a weight and reads it before and after its child ran."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.child = Deep(depth - 1) if depth else None

    def forward(self, x: Tensor | None = None) -> Tensor:
        y = torch.tanh((X.to(self.w.dtype) if x is None else x) @ self.w)
        return y if self.child is None else self.child(y) @ self.w  # type: ignore[no-any-return]


class OnX(nn.Module):
    """A layer that takes X."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> Tensor:
        y: Tensor = self.inner(X.to(next(self.parameters()).dtype))
        return y


class Language(nn.Module):
    """A causal language model's logits."""

    def __init__(self, config: LlamaConfig | OPTConfig) -> None:
        super().__init__()
        self.lm = AutoModelForCausalLM.from_config(config).eval()

    def forward(self) -> Tensor:
        mask = (IDS != 0).long()
        logits: Tensor = self.lm(input_ids=IDS, attention_mask=mask, use_cache=False).logits
        return logits


SMALL = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> nn.Module:
    return Language(LlamaConfig(intermediate_size=24, tie_word_embeddings=True, **SMALL))


def opt() -> nn.Module:
    return Language(
        OPTConfig(ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0, dropout=0.0, **SMALL)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: OnX(
        nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    ),
    "convolution": lambda: OnX(nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2))),
    "tied": Tied,
    "tied layers": Pair,
    "padding": lambda: Embedded(nn.Embedding(9, 8, padding_idx=8)),  # more than the rows in use
    "scaled": lambda: Embedded(ScaledEmbedding(9, 8, padding_idx=0)),
    "positions": lambda: Embedded(PositionEmbedding(9, 8), (IDS != 0).long()),
    "used twice": Twice,
    "nested owners": NestedHead,
    "recursive": Recursive,
    "deep": Deep,
    "weight norm": lambda: OnX(weight_norm(nn.Linear(8, 4))),
    "llama": llama,
    "opt": opt,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # gains and biases that are not all alike
            p += 0.01 * torch.arange(p.numel(), dtype=dtype).view(p.shape).sin()
    return model


# --------------------------------------------------------------------------- equal to in place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_probe_gives_the_outputs_of_moved_weights(name: str, dtype: torch.dtype) -> None:
    """To the last bit those of a model with its weights overwritten; then all is as before."""
    model = build(name, dtype)
    mover = Shift(model)
    probe = FunctionalProbe(model, list(model.parameters()))
    weights = [bits(p).clone() for p in model.parameters()]
    plain, before = model(), state_of(model)
    for _ in range(2):  # the second time in a scratch that is not fresh
        with probe.at(mover):
            functional = model()
        assert state_of(model) == before
    assert all(torch.equal(bits(p), w) for p, w in zip(model.parameters(), weights, strict=True))
    assert torch.equal(model(), plain)
    with moved_in_place(model, mover):
        in_place = model()
    assert torch.equal(bits(functional), bits(in_place))
    assert not torch.equal(functional, plain)
    assert {name for name, _ in mover.asked} == set(mover.names.values())  # reached every one


@pytest.mark.parametrize("name", ["mlp", "tied", "nested owners", "llama"])
@torch.no_grad()
def test_some_parameters_can_be_moved_alone(name: str) -> None:
    """``only`` moves what it names and nothing else, in every owner; one by one as well."""
    model = build(name)
    mover = Shift(model)
    probe = FunctionalProbe(model, list(model.parameters()))
    for p in model.parameters():
        with probe.at(mover, only={id(p)}):
            functional = model()
        with moved_in_place(model, mover, only={id(p)}):
            in_place = model()
        assert torch.equal(functional, in_place)
    with probe.at(mover, only=set()):
        assert torch.equal(model(), model())


@torch.no_grad()
def test_parameters_that_were_not_named_stay() -> None:
    """A probe of some parameters leaves the others, also those of the same module."""
    model = build("mlp")
    mover = Shift(model)
    chosen = [p for name, p in model.named_parameters() if name.endswith("weight")]
    with FunctionalProbe(model, chosen).at(mover):
        functional = model()
    with moved_in_place(model, mover, only={id(p) for p in chosen}):
        in_place = model()
    assert torch.equal(functional, in_place)


@pytest.mark.parametrize(
    ("name", "how"),
    [("padding", "rows"), ("scaled", "rows"), ("positions", "whole"), ("used twice", "rows")],
)
@torch.no_grad()
def test_embeddings_move_looked_up_rows_where_ids_can_be_renumbered(name: str, how: str) -> None:
    """Only forwards that take the ids themselves; one that computes them is moved whole."""
    model = build(name)
    mover = Shift(model)
    with FunctionalProbe(model, list(model.parameters())).at(mover):
        model()
    assert {h for n, h in mover.asked if n == "embed.weight"} == {how}


@torch.no_grad()
def test_rows_of_narrow_ids_are_numbers_of_64_bits() -> None:
    """A row times its width may be more than an int32 id can hold."""
    rows, (places,) = renumbered(torch.tensor([[7, 3], [7, 1]], dtype=torch.int32))
    assert rows.dtype == torch.int64
    assert rows.tolist() == [1, 3, 7]
    assert places.tolist() == [[2, 1], [2, 0]]


def test_the_positions_of_opt_are_moved_whole() -> None:
    """transformers' OPT: token rows alone, positions (an embedding by class) whole."""
    model = build("opt")
    mover = Shift(model)
    with FunctionalProbe(model, list(model.parameters())).at(mover):
        model()
    asked = {(name.rsplit(".", 2)[-2], how) for name, how in mover.asked}
    assert ("embed_positions", "whole") in asked
    assert ("embed_tokens", "rows") in asked
    assert ("embed_positions", "rows") not in asked


@torch.no_grad()
def test_an_embedding_that_renormalises_is_moved_whole_and_not_written_to() -> None:
    """max_norm writes to its weight in the forward: to the scratch, not to the weight."""
    model = Embedded(nn.Embedding(9, 8, max_norm=0.5))
    before = model.embed.weight.detach().clone()
    mover = Shift(model)
    with FunctionalProbe(model, list(model.parameters())).at(mover):
        model()
    assert ("embed.weight", "whole") in mover.asked
    assert torch.equal(model.embed.weight, before)


class Offset(nn.Module):
    """Gives its weight away instead of using it (learned latents)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(9, 8))

    def forward(self) -> Tensor:
        return self.w[:5]


class Latents(nn.Module):
    """Holds on to what Offset gave while another module runs."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.mix = Offset(), nn.Linear(8, 8)

    def forward(self) -> Tensor:
        offset = self.offset()
        return self.mix(X) + offset  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_weight_given_away_keeps_its_moved_value() -> None:
    """A module that returns its weight (or a view) is not overwritten by the next module."""
    model = Latents()
    mover = Shift(model)
    with FunctionalProbe(model, list(model.parameters())).at(mover):
        functional = model()
    with moved_in_place(model, mover):
        in_place = model()
    assert torch.equal(functional, in_place)


# -------------------------------------------------------------------------------- put back


class Failing(nn.Module):
    """Raises inside the innermost forward, while every level's scratch is in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=0)
        self.mix = nn.Linear(8, 8)
        self.fail = True

    def forward(self) -> Tensor:
        y: Tensor = self.mix(self.embed(IDS))
        if self.fail:
            self.mix(y[..., :3])  # sizes do not fit
        return y


class FailingLookup(Failing):
    """Raises inside the lookup."""

    def forward(self) -> Tensor:
        return self.embed(IDS if not self.fail else IDS.float())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Failing, FailingLookup])
@torch.no_grad()
def test_an_exception_inside_a_forward_puts_everything_back(kind: type[Failing]) -> None:
    """Parameters, forwards and padding are as before, and the next probe is right."""
    model = kind()
    mover = Shift(model)
    probe = FunctionalProbe(model, list(model.parameters()))
    before = state_of(model)
    with pytest.raises((RuntimeError, IndexError)), probe.at(mover):
        model()
    assert state_of(model) == before
    model.fail = False
    with probe.at(mover):
        functional = model()
    with moved_in_place(model, mover):
        in_place = model()
    assert torch.equal(functional, in_place)


@torch.no_grad()
def test_an_exception_below_several_owners_puts_everything_back() -> None:
    """Each level restores its own parameters and its depth of scratch."""
    model = build("deep")
    innermost = model.child.child.child
    mover = Shift(model)
    probe = FunctionalProbe(model, list(model.parameters()))
    before = state_of(model)

    def broken(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    innermost.forward = broken
    with pytest.raises(KeyboardInterrupt), probe.at(mover):
        model()
    del innermost.forward
    assert state_of(model) == before
    with probe.at(mover):
        functional = model()
    with moved_in_place(model, mover):
        in_place = model()
    assert torch.equal(functional, in_place)


@torch.no_grad()
def test_a_forward_that_was_replaced_before_is_kept() -> None:
    """An instance's own forward (a hook of another library) runs inside the probe and stays."""
    model = build("mlp")
    layer = model.inner[0]
    calls = []

    def hooked(x: Tensor) -> Tensor:
        calls.append(type(layer._parameters["weight"]))
        return type(layer).forward(layer, x)

    layer.forward = hooked
    mover = Shift(model)
    with FunctionalProbe(model, list(model.parameters())).at(mover):
        functional = model()
    assert layer.__dict__["forward"] is hooked
    assert calls == [Tensor]  # it saw the scratch
    with moved_in_place(model, mover):
        in_place = model()
    assert torch.equal(functional, in_place)


# ---------------------------------------------------------------------------------- only rows

ROWS = torch.tensor([7, 2])


@pytest.mark.parametrize("bias", [True, False])
def test_only_rows_without_a_probe(bias: bool) -> None:
    """The chosen logits alone, equal to those of the whole head but for the order of sums."""
    layer = nn.Linear(8, 9, bias=bias)
    before = state_of(layer)
    with only_rows(layer, ROWS):
        some = layer(X)
    assert state_of(layer) == before
    assert some.shape == (5, 2)
    torch.testing.assert_close(
        some, layer(X)[:, ROWS], rtol=0, atol=1e-6
    )  # sums of 8 numbers near 1


@pytest.mark.parametrize("perturbed", ["both", "weight", "bias"])
@pytest.mark.parametrize("outer", ["probe", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_only_rows_within_and_around_a_probe(
    dtype: torch.dtype, outer: str, perturbed: str
) -> None:
    """In either order the chosen logits are those of the moved weights, to the last bit."""
    layer = nn.Linear(8, 9).to(dtype)
    chosen = [p for n, p in layer.named_parameters() if perturbed in (n, "both")]
    mover, probe, x = Shift(layer), FunctionalProbe(layer, chosen), X.to(dtype)
    before = state_of(layer)
    if outer == "probe":
        with probe.at(mover), only_rows(layer, ROWS):
            functional = layer(x)
        if perturbed == "both":
            assert mover.asked == [("weight", "rows"), ("bias", "rows")]  # nothing else was drawn
    else:
        with only_rows(layer, ROWS), probe.at(mover):
            functional = layer(x)
    assert state_of(layer) == before
    with moved_in_place(layer, mover, only={id(p) for p in chosen}), only_rows(layer, ROWS):
        in_place = layer(x)
    assert torch.equal(functional, in_place)


@torch.no_grad()
def test_only_rows_of_a_tied_head() -> None:
    """The head computes some rows while the embedding that it is looks up others."""
    model = build("tied")
    mover = Shift(model)
    probe = FunctionalProbe(model, list(model.parameters()))
    with probe.at(mover), only_rows(model.head, ROWS):
        functional = model()
    with moved_in_place(model, mover), only_rows(model.head, ROWS):
        in_place = model()
    assert functional.shape == (2, 6, 2)
    assert torch.equal(functional, in_place)


def test_gradients_through_only_rows_reach_the_whole_weight() -> None:
    """The gradient has the weight's shape, that of the whole head's loss on these logits."""
    layer = nn.Linear(8, 9)
    with only_rows(layer, ROWS):
        layer(X).square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    layer(X)[:, ROWS].square().sum().backward()
    wanted = [p.grad for p in layer.parameters()]
    assert [g.shape for g in got] == [(9, 8), (9,)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the order of sums of 5 x 8 numbers
        others = [row for row in range(9) if row not in ROWS.tolist()]
        assert not a[others].any()


def test_only_rows_puts_everything_back_after_an_exception() -> None:
    """Wrong sizes inside, an exception in the body: parameters and forward are as before."""
    layer = nn.Linear(8, 9)
    before = state_of(layer)
    with pytest.raises(RuntimeError), only_rows(layer, ROWS):
        layer(X[:, :3])
    assert state_of(layer) == before
    with pytest.raises(KeyError), only_rows(layer, ROWS):
        raise KeyError
    assert state_of(layer) == before


# --------------------------------------------------------------------------------- self-check


def mezo(model: nn.Module, **options: object) -> MeZO:
    settings = {"lr": 1e-3, "eps": 1e-3, "backend": "eager"} | options
    return MeZO(model, **settings)  # type: ignore[arg-type]  # a dict of settings


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model().float().square().mean()


@pytest.mark.parametrize("keep_noise", [False, True])
@pytest.mark.parametrize(
    "name",
    list(MODELS),
)
def test_self_check_passes_where_probes_are_right(name: str, keep_noise: bool) -> None:
    """Each kind of (class, parameter) is tried, and the weights are bit for bit as before."""
    model = build(name)
    weights = [bits(p).clone() for p in model.parameters()]
    kinds = {
        (type(m).__name__, n)
        for m in model.modules()
        for n, p in m._parameters.items()
        if p is not None
    }
    assert mezo(model, keep_noise=keep_noise).self_check(closure_of(model)) == len(kinds)
    assert all(torch.equal(bits(p), w) for p, w in zip(model.parameters(), weights, strict=True))


class Bypass(nn.Module):
    """Reads the weight of one child without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.child, self.fine = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self) -> Tensor:
        y = self.fine(self.good(X.to(self.good.weight.dtype)))
        return F.linear(torch.tanh(y), self.child.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_check_names_a_weight_read_without_its_module(dtype: torch.dtype) -> None:
    """The one that no wrapped forward moves is named, its sound siblings are not."""
    model = Bypass().to(dtype)
    weights = [bits(p).clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"do not reach child\.weight \(Linear\.weight\): freeze"):
        mezo(model).self_check(closure_of(model))
    assert all(torch.equal(bits(p), w) for p, w in zip(model.parameters(), weights, strict=True))
    assert mezo(model, freeze=["child.*"]).self_check(closure_of(model)) == 4
    assert mezo(model, executor="in_place").self_check(closure_of(model)) == 0


def test_self_check_refuses_a_weight_that_is_made_before_the_forward() -> None:
    """torch's old spectral norm, a hook of the layer that computes the weight."""
    model = OnX(nn.utils.spectral_norm(nn.Linear(8, 8))).eval()
    with pytest.raises(ValueError, match=r"do not reach inner\.weight_orig"):
        mezo(model).self_check(lambda: model.inner(X)[0].square().mean())
