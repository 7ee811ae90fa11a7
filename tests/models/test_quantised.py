"""A frozen model in few bits around a few trained weights, and how a model of codes is saved."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smezo_cli.methods.first_order import FirstOrder
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.quantised import as_numbers, bytes_as_numbers, freeze_as_codes
from smezo_cli.zo.quantised import QuantisedLinear, quantise, quantised_layers
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(16, 32, generator=seeded(1))


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) * 0.3)
    return model


def frozen(model: nn.Module, bits: int = 4) -> dict[str, nn.Parameter]:
    """Of both layers seven weights stay numbers, and they alone are trained."""
    model.requires_grad_(False)
    at = {f"{i}.weight": torch.arange(7) * 200 + i for i in (0, 2)}
    return freeze_as_codes(model, at, bits=bits, group_size=16)


@pytest.mark.parametrize("bits", [8, 4])
def test_kept_weights_are_exact_and_the_others_are_codes(bits: int) -> None:
    plain, model = network(), network()
    kept = frozen(model, bits)
    assert list(kept) == ["0.kept", "2.kept"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(kept)
    for i in (0, 2):
        layer = model[i]
        assert isinstance(layer, QuantisedLinear)
        at = torch.arange(7) * 200 + i
        assert torch.equal(layer.dense().view(-1)[at], plain[i].weight.view(-1)[at])
        others = torch.ones(layer.num_weights, dtype=torch.bool)
        others[at] = False
        codes = QuantisedLinear(plain[i], bits, 16).dense().view(-1)
        assert torch.equal(layer.dense().view(-1)[others], codes[others])


def test_a_zeroth_order_method_trains_the_kept_weights_alone() -> None:
    """And the codes stay as they are."""
    model = network()
    kept = frozen(model)
    codes = {name: layer.weight.clone() for name, layer in quantised_layers(model).items()}
    before = {name: p.clone() for name, p in kept.items()}

    def loss() -> torch.Tensor:
        return model(X).double().square().mean()

    opt = MeZO(model, lr=1e-2, eps=1e-3, backend="eager")
    assert opt.num_weights == 14
    first = loss().item()
    for _ in range(60):
        opt.step(loss)
    assert loss().item() < first
    for name, layer in quantised_layers(model).items():
        assert torch.equal(layer.weight, codes[name])
        assert (layer.kept != before[f"{name}.kept"]).all()


def test_a_probe_moves_the_kept_weights_by_eps_z() -> None:
    model = network()
    frozen(model)
    plain = nn.Sequential(model[0].plain(), nn.Tanh(), model[2].plain())
    opt = MeZO(model, lr=1e-2, eps=1e-1, backend="eager", executor="sequential")
    moved = opt.mover([0], [0.1])
    with torch.no_grad():
        for i in (0, 2):
            out = torch.empty(7)
            moved.whole(model[i].kept, out)
            plain[i].weight.view(-1)[torch.arange(7) * 200 + i] = out
        expected = plain(X).double().square().mean()
    plus, _ = opt.losses_at(lambda: model(X).double().square().mean(), 0)
    assert plus == float(expected)


def test_gradients_reach_the_kept_weights() -> None:
    """As those of a float model with the same numbers, at the same places."""
    model = network()
    kept = frozen(model)
    plain = copy.deepcopy(nn.Sequential(model[0].plain(), nn.Tanh(), model[2].plain()))
    plain.requires_grad_(True)
    plain(X).square().mean().backward()
    model(X).square().mean().backward()
    for i in (0, 2):
        wanted = plain[i].weight.grad.view(-1)[torch.arange(7) * 200 + i]
        torch.testing.assert_close(kept[f"{i}.kept"].grad, wanted)
    opt = FirstOrder(model, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    assert opt.num_weights == 14


@pytest.mark.parametrize(
    ("name", "at", "said"),
    [
        ("1.weight", [0], "1.weight is not the weight of a linear layer that codes can hold"),
        ("0.weight", [0, 1536], "0.weight has 1536 weights, and a position is outside of it"),
        ("0.weight", [-1, 3], "0.weight has 1536 weights, and a position is outside of it"),
        ("0.weight", [5, 3, 5], "a position in 0.weight stands twice"),
    ],
)
def test_positions_that_cannot_be_kept_are_refused(name: str, at: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        freeze_as_codes(network(), {name: torch.tensor(at)})


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_of_codes_is_saved_as_an_ordinary_one(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).eval()
    assert quantise(model, bits, 16) == 14
    ids = torch.tensor([[5, 9, 11, 7]])
    with torch.no_grad():
        mine = model(input_ids=ids).logits
        with as_numbers(model):
            assert not quantised_layers(model)
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            model.save_pretrained(tmp_path)
        assert len(quantised_layers(model)) == 14
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=ids).logits
    assert torch.equal(mine, theirs)
    assert bytes_as_numbers(model) == size
