"""Linear layers of codes: what they store, what they compute, and which layers become such."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.zo.quantised import (
    QuantisedLinear,
    linear_layers,
    quantise,
    quantised_layers,
)
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

# Columns that a byte and a group divide, and such that neither does.
SHAPES = [(48, 64, 16), (37, 51, 16), (40, 33, 128)]
BITS = [8, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(columns)))
    return layer.to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_a_code_is_the_nearest_multiple_of_its_scale(
    rows: int, columns: int, group: int, bits: int
) -> None:
    weight = (plain := linear(rows, columns)).weight.detach()
    layer = QuantisedLinear(plain, bits, group)
    scales = torch.stack([part.abs().amax(1) for part in weight.split(group, 1)], 1)
    scales /= 2 ** (bits - 1) - 1
    assert torch.equal(layer.scales, scales)
    each = scales.repeat_interleave(group, 1)[:, :columns]
    every = slice(0, rows)
    assert torch.equal(layer.codes(every), (weight / each).round().to(torch.int8))
    # Half a scale, and the rounding of a product in float32.
    assert ((layer.rows(every) - weight).abs() <= each * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_codes_come_back_as_they_were_stored(
    rows: int, columns: int, group: int, bits: int
) -> None:
    layer = QuantisedLinear(linear(rows, columns), bits, group)
    codes = torch.randint(
        -layer.largest, layer.largest + 1, (9, columns), dtype=torch.int8, generator=seeded()
    )
    before = layer.codes(slice(0, rows))
    layer.store(slice(3, 12), codes)
    now = layer.codes(slice(0, rows))
    assert torch.equal(now[3:12], codes)
    assert torch.equal(now[12:], before[12:])
    assert torch.equal(now[:3], before[:3])
    picked = torch.tensor([11, 0, 30])
    assert torch.equal(layer.codes(picked), now[picked])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_all_ways_to_read_the_weights_agree(
    rows: int, columns: int, group: int, dtype: torch.dtype, bits: int
) -> None:
    layer = QuantisedLinear(linear(rows, columns, dtype), bits, group)
    whole = layer.rows(slice(0, rows))
    assert whole.dtype == dtype
    assert torch.equal(layer.dense(), whole)
    assert torch.equal(layer.plain().weight, whole)
    flat = torch.empty(rows * columns, dtype=dtype)
    layer.write(flat)
    assert torch.equal(flat.view(rows, columns), whole)
    index = torch.tensor([0, columns, rows * columns - 1, columns + 1])
    assert torch.equal(layer.values(index).to(dtype), whole.view(-1)[index])
    assert torch.equal(layer.values().to(dtype), whole.view(-1))


@pytest.mark.parametrize("bits", BITS)
def test_it_computes_what_a_linear_layer_of_its_weights_does(bits: int) -> None:
    for dtype in DTYPES:
        layer = QuantisedLinear(linear(48, 64, dtype), bits, 16)
        x = torch.randn(5, 64, generator=seeded()).to(dtype)
        assert torch.equal(layer(x), layer.plain()(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), layer.plain()(x))


def test_a_row_of_zeros_gets_a_scale_that_a_step_can_use() -> None:
    plain = linear(48, 64)
    with torch.no_grad():
        plain.weight[3] = 0
    layer = QuantisedLinear(plain, 8, 16)
    assert not layer.rows(torch.tensor([3])).any()
    assert (layer.scales[3] == layer.scales.max()).all()
    with torch.no_grad():
        plain.weight.zero_()
    assert torch.isfinite(QuantisedLinear(plain, 8, 16).scales).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    plain = linear(48, 64)
    with torch.no_grad():
        plain.weight[3, 5] = value
    with pytest.raises(ValueError, match="a weight is NaN or infinite before training"):
        QuantisedLinear(plain, 8, 16)


class Tied(nn.Module):
    """An embedding with the output layer tied to it, a layer to hold, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.up = nn.Linear(32, 64)
        self.again = self.up
        self.small = nn.Linear(32, 16)
        self.attention = nn.MultiheadAttention(64, 2)  # reads out_proj.weight without calling it
        self.frozen = nn.Linear(64, 32).requires_grad_(False)
        self.own_head = nn.Linear(32, 40)
        self.tied = nn.Linear(32, 40)
        self.tied.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.own_head


def test_only_trained_matrices_of_linear_layers_become_codes() -> None:
    model = Tied()
    assert list(linear_layers(model)) == ["up"]
    assert list(linear_layers(model, trained=False)) == ["up", "frozen"]
    before = {name: p for name, p in model.named_parameters() if not name.startswith("up.")}
    assert quantise(model, 8, 128) == 1
    assert isinstance(model.up, QuantisedLinear)
    assert model.again is model.up  # wherever it stood
    assert model.up.is_trained
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    held = dict(model.named_parameters())["up.weight"]
    assert quantise(model, 8, 128) == 1  # once more changes nothing
    assert dict(model.named_parameters())["up.weight"] is held
    with pytest.raises(ValueError, match="up holds codes of 8 bits in groups of 32 already"):
        quantise(model, 4, 128)


@pytest.mark.parametrize(("bits", "most"), [(8, 1.04), (4, 0.54)])
def test_the_memory_is_that_of_codes_and_scales(bits: int, most: float) -> None:
    """No float copy is left: the old weights are gone, and so is what a forward wrote out."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    old = [weakref.ref(p) for p in model.parameters()]
    numel = sum(p.numel() for p in model.parameters())
    quantise(model, bits, 128)
    model(torch.ones(3, 256)).sum()
    gc.collect()
    assert not any(ref() is not None for ref in old)
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert held <= most * numel  # a byte or half of one, and 4/128 for the scale
    largest = [
        x.numel()
        for x in gc.get_objects()
        if type(x) is Tensor and x.is_floating_point() and x.numel() >= 256 * 256
    ]
    assert not largest


@pytest.mark.parametrize("bits", BITS)
def test_a_copy_is_a_model_of_its_own(bits: int) -> None:
    model = nn.Sequential(linear(48, 64))
    quantise(model, bits, 16)
    other = copy.deepcopy(model)
    before = model[0].rows(slice(0, 48))
    (layer,) = quantised_layers(other).values()
    layer.store(slice(0, 48), torch.zeros(48, 64, dtype=torch.int8))
    assert torch.equal(model[0].rows(slice(0, 48)), before)
    assert not other[0].dense().any()
