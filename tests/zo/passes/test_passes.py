"""The pass that draws, masks and moves: eager or fused, whole or picked, the same bits."""

import math
import re

import pytest
import torch
from torch import Tensor

from smezo_cli.zo import noise
from smezo_cli.zo.passes import choose
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.by_triton import TritonPasses
from smezo_cli.zo.passes.choose import choose_passes
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.selections.masks import RULES
from tests.zo.passes.scales import weight_of

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
# Below 64 pairs compiled passes are eager ones; 70,001 is more than one eager chunk.
SIZES = [1, 2, 3, 127, 128, 129, 1000, 4099, 70_001]


def draw_of(rule: Rule, queries: int = 1, *, decay: bool = False, scale: float = 0.05) -> Draw:
    """Keys that are those of a step; half of ordinary weights are masked."""
    words = [noise.stream_key(0, "z", 5, q, "w") for q in range(queries)]
    keys = torch.tensor(words, dtype=torch.int64)
    mask_key, round_key = (
        torch.tensor(noise.stream_key(0, purpose, 5, "w"), dtype=torch.int64)
        for purpose in ("mask", "round")
    )
    h = torch.tensor(0.5 if rule.mask == "random" else 0.67)
    coefficients = torch.tensor([scale * (-0.7) ** q for q in range(queries)])
    return Draw(keys, mask_key, round_key, h, coefficients, torch.tensor(0.01) if decay else None)


def bits(x: Tensor) -> Tensor:
    """The pattern of each entry, so that -0.0 is not 0.0."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def moved_by(worker: choose.Passes, weight: Tensor, draw: Draw) -> Tensor:
    out = torch.full_like(weight, math.nan)
    worker.move(weight, out, draw)
    return out


def directions_of(worker: choose.Passes, weight: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """sum a z of all parts of a flat weight, and what rounds it by chance (-1: nothing does)."""
    total = torch.full_like(weight, math.nan, dtype=F32)
    chance = torch.full_like(weight, -1, dtype=torch.int32)

    def use(part: slice, of_part: Tensor, bits: Tensor | None) -> None:
        total[part] = of_part
        if bits is not None:
            chance[part] = bits

    worker.along(weight, draw, use)
    return total, chance


def by_the_book(weight: Tensor, rule: Rule, draw: Draw) -> Tensor:
    """The documented formula over the whole tensor at once, before it is rounded; float32."""
    index, numel = torch.arange(weight.numel()), weight.numel()
    direction = torch.zeros(numel)
    for q in range(len(draw.keys)):
        direction += draw.coefficients[q] * noise.draw(index, numel, draw.keys[q], rule.noise)
    w = weight.float()
    if rule.mask == "random":
        counter, is_first = noise.locate(index, numel)
        u = torch.where(is_first, *noise.uniform_pair(counter, draw.mask_key))
        mask = RULES["random"](u, draw.h)
    else:
        mask = RULES[rule.mask](w.abs(), draw.h)
    if draw.decay is not None:
        direction = direction - draw.decay * w
    return torch.where(mask, w + direction, w)


# ---------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("mask", RULES)
def test_a_pass_is_the_documented_formula(mask: str, kind: str, queries: int, decay: bool) -> None:
    """where(mask, w + sum a z - d w, w) in float32, rounded to nearest, for any dtype and size."""
    rule = Rule(mask, kind)
    draw = draw_of(rule, queries, decay=decay)
    for dtype in DTYPES:
        for numel in SIZES:
            weight = weight_of(numel, dtype)
            wanted = by_the_book(weight, rule, draw).to(dtype)
            assert same(moved_by(EagerPasses(rule), weight, draw), wanted)


@pytest.mark.parametrize("numel", [3, 1000, 70_001])
def test_draws_can_be_had_one_by_one(numel: int) -> None:
    """Each a_q z_q with the bits of a pass of its own, and what rounds by chance is the same."""
    rule = Rule("small", stochastic=True)
    draw, weight = draw_of(rule, 3), weight_of(numel, F32)
    alone = [
        draw._replace(keys=draw.keys[q : q + 1], coefficients=draw.coefficients[q : q + 1])
        for q in range(3)
    ]
    for worker in (EagerPasses(rule), NumbaPasses(rule)):
        wanted = [directions_of(worker, weight, one) for one in alone]
        found = torch.empty(3, numel)

        def use(
            part: slice,
            drawn: Tensor,
            chance: Tensor | None,
            found: Tensor = found,
            bits: Tensor = wanted[0][1],
        ) -> None:
            found[:, part] = drawn
            assert chance is not None
            assert torch.equal(chance, bits[part])

        worker.along(weight, draw, use, lambda draws: torch.stack(list(draws), -2))
        for q in range(3):
            assert same(found[q], wanted[q][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_the_chunks_of_an_eager_pass(dtype: torch.dtype) -> None:
    """One, two or five threads write the same bits, also when the output is the weight."""
    rule = Rule("small")
    draw, weight = draw_of(rule), weight_of(400_003, dtype)
    wanted = moved_by(EagerPasses(rule), weight, draw)
    for threads in (2, 5):
        torch.set_num_threads(threads)  # put back by the fixture
        assert same(moved_by(EagerPasses(rule), weight, draw), wanted)
        in_place = weight.clone()
        EagerPasses(rule).move(in_place, in_place, draw)
        assert same(in_place, wanted)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_may_have_another_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """The float32 result is rounded once, to the output's dtype; masked-out weights are cast."""
    rule = Rule("small")
    draw = draw_of(rule, decay=True)
    for numel in (129, 1001):
        weight = weight_of(numel, dtype)
        out = torch.empty(numel, dtype=out_dtype)
        EagerPasses(rule).move(weight, out, draw)
        assert same(out, by_the_book(weight, rule, draw).to(out_dtype))


@pytest.mark.parametrize("mask", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decay_acts_inside_the_mask_only(mask: str, dtype: torch.dtype) -> None:
    """Without noise, masked weights become w - d w and all others keep their bits."""
    rule = Rule(mask)
    draw = draw_of(rule, decay=True, scale=0.0)
    weight = weight_of(1001, dtype).abs() + 0.25  # no zeros: each moves by decay
    mask_now = EagerPasses(rule).mask_of(weight, draw)
    assert 0 < mask_now.sum() < 1001
    moved = moved_by(EagerPasses(rule), weight, draw)
    assert same(moved[~mask_now], weight[~mask_now])
    w = weight.float()
    assert same(moved[mask_now], (w - draw.decay * w).to(dtype)[mask_now])
    assert (moved < weight)[mask_now].all()


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("mask", RULES)
def test_kept_noise_is_redrawn_noise(mask: str, kind: str, decay: bool) -> None:
    """A probe or update from a z and a mask kept for the step has the bits of a fresh draw."""
    rule = Rule(mask, kind)
    draw, eager = draw_of(rule, decay=decay), EagerPasses(rule)
    for dtype in DTYPES:
        for numel in SIZES:
            weight = weight_of(numel, dtype)
            z, active = eager.noise_and_mask(weight, draw)
            assert same(z, noise.draw(torch.arange(numel), numel, draw.keys[0], kind))
            assert torch.equal(active, eager.mask_of(weight, draw))
            out = torch.full_like(weight, math.nan)
            eager.move_kept(weight, out, z, active, draw)
            assert same(out, moved_by(eager, weight, draw))


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("mask", RULES)
def test_picked_entries_move_as_in_the_whole_pass(mask: str, kind: str, stochastic: bool) -> None:
    """Entries picked in any order, repeated, in any shape, get the bits of the whole tensor."""
    rule = Rule(mask, kind, stochastic)
    draw = draw_of(rule, 3, decay=True)
    for dtype in DTYPES:
        for numel in SIZES[:-1]:
            weight = weight_of(numel, dtype)
            whole = moved_by(EagerPasses(rule), weight, draw)
            g = torch.Generator().manual_seed(numel)
            for index in (
                torch.arange(numel),
                torch.randperm(numel, generator=g),
                torch.randint(numel, (5, 3), generator=g),
            ):
                moved = EagerPasses(rule).move_at(weight[index], index, numel, draw)
                assert moved.shape == index.shape
                assert same(moved, whole[index])


# ---------------------------------------------------------------------------- stochastic rounding


def rounded_copies(value: float, dtype: torch.dtype, count: int) -> Tensor:
    """One float32 value rounded ``count`` times by a pass that moves nothing."""
    rule = Rule("small", stochastic=True)
    draw = draw_of(rule, scale=0.0)._replace(h=torch.tensor(math.inf))
    out = torch.empty(count, dtype=dtype)
    EagerPasses(rule).move(torch.full((count,), value), out, draw)
    return out


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The nearest numbers of the dtype at or below and at or above a float32 value."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)].double()
    x = torch.tensor(value, dtype=F32).double()
    return every[every <= x].max().item(), every[every >= x].min().item()


VALUES = [
    *(1.0, 1.001, -1.001, 0.3, -0.3, 2.0 - 1e-6, 1234.567, -3.14159e-3),
    *(6.2e-5, 6.103e-5, -6.1035e-5, 2.0**-14 - 2.0**-26),  # around the least normal float16
    *(3.3e-6, -3.3e-6, 2.0**-24, 1.5 * 2.0**-24, 0.3 * 2.0**-24, -0.3 * 2.0**-24, 1e-9, 0.0),
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_is_unbiased_between_two_neighbours(
    dtype: torch.dtype, value: float
) -> None:
    """Only the two neighbours occur, the upper one as often as the value is near to it."""
    n = 1 << 16
    value = float(torch.tensor(value, dtype=F32))
    low, high = neighbours(value, dtype)
    rounded = rounded_copies(value, dtype, n).double()
    assert ((rounded == low) | (rounded == high)).all()
    if low == high:
        return
    share = (value - low) / (high - low)
    error = math.sqrt(share * (1 - share) / n)
    # Five standard errors, and the coarseness of 13 bits in float16 and 16 in bfloat16.
    assert abs((rounded == high).double().mean().item() - share) < 5 * error + 2.0**-13


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_of_many_weights_has_no_drift(dtype: torch.dtype) -> None:
    """Over weights of one scale the mean of the rounding errors is zero within its error."""
    n = 1 << 20
    weight = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 1.0
    rule = Rule("small", stochastic=True)
    draw = draw_of(rule, scale=1e-3)._replace(h=torch.tensor(math.inf))
    out = torch.empty(n, dtype=dtype)
    EagerPasses(rule).move(weight, out, draw)
    step = torch.finfo(dtype).eps
    errors = (out.double() - by_the_book(weight, rule, draw).double()) / step
    inside = (out > 1) & (out < 2)  # where numbers lie one step apart
    assert errors[inside].abs().max().item() < 1
    # A sum of independent errors of variance at most 1/4 step**2, 1/6 on average.
    assert abs(errors[inside].mean().item()) < 5 * math.sqrt(1 / 6 / n)
    halves = errors[: n // 2], errors[n // 2 :]
    assert abs((halves[0] * halves[1]).mean().item()) < 5 / 6 / math.sqrt(n / 2)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_zero_step_leaves_normal_numbers_as_they_are(dtype: torch.dtype) -> None:
    """What the dtype can hold is not rounded, whatever the random bits are."""
    n = 1 << 20
    least = torch.finfo(dtype).smallest_normal
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = weight[weight.abs() >= least]
    rule = Rule("small", stochastic=True)
    draw = draw_of(rule, scale=0.0)._replace(h=torch.tensor(math.inf))
    assert same(moved_by(EagerPasses(rule), weight, draw), weight)


def test_a_zero_step_leaves_float16_subnormals_as_they_are() -> None:
    """Exact subnormals stay too: the sum of value and random bits must not round up."""
    n = 1 << 20
    weight = (torch.arange(n) % 1023 + 1).float() * 2.0**-24
    rule = Rule("small", stochastic=True)
    draw = draw_of(rule, scale=0.0)._replace(h=torch.tensor(math.inf))
    assert same(moved_by(EagerPasses(rule), weight.to(F16), draw), weight.to(F16))


def test_float16_subnormals_are_rounded_with_the_bias_that_is_stated() -> None:
    """Over all fourteen bits of chance, of values of every size below the least normal number."""
    chances = torch.arange(1 << 14, dtype=torch.int32) << 17
    sizes = 2.0 ** -torch.arange(14.0, 40.0).repeat_interleave(20)
    random = torch.rand(sizes.numel(), generator=torch.Generator().manual_seed(0)) - 0.5
    value = random * 2 * sizes
    bias = ROUNDINGS[F16](value[:, None], chances).double().mean(1) - value.double()
    assert -(2.0**-38) <= bias.min().item() < -(2.0**-39)
    assert bias.max().item() < 2.0**-48  # the sum is rounded, too


def test_stochastic_rounding_moves_weights_that_nearest_leaves() -> None:
    """A step of a thousandth of the spacing moves a thousandth of bf16 weights, nearest none."""
    n = 1 << 20
    weight = torch.full((n,), 1.5, dtype=BF16)
    for stochastic in (False, True):
        rule = Rule("small", "rademacher", stochastic)
        draw = draw_of(rule, scale=1e-3 * 2.0**-7)._replace(h=torch.tensor(math.inf))
        moved = (moved_by(EagerPasses(rule), weight, draw) != weight).sum().item()
        # 2**-16 of the spacing is the grain of the 16 random bits.
        grain = n * 2.0**-16
        assert abs(moved - stochastic * n / 1000) <= (5 * math.sqrt(n / 1000) + grain) * stochastic


# ------------------------------------------------------------------------------ which passes


def test_eager_passes_are_given_where_they_are_asked_for() -> None:
    """backend=eager compiles nothing and gives no reason."""
    worker, why = choose_passes(Rule("small"), "eager", torch.device("cpu"))
    assert (worker.name, why) == ("eager", "")


@pytest.mark.parametrize(
    ("device", "kind", "missing"),
    [("cpu", NumbaPasses, "Numba"), ("cuda", TritonPasses, "Triton")],
)
def test_where_no_compiler_works_auto_is_eager_and_says_why(
    device: str, kind: type, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto falls back with the first line of the reason; compiled refuses with it."""

    def broken(self: object, rule: Rule) -> None:
        raise OSError("no tools here\nand more lines")

    monkeypatch.setattr(kind, "__init__", broken)
    worker, why = choose_passes(Rule("small"), "auto", torch.device(device))
    assert worker.name == "eager"
    assert missing in why
    assert why.endswith(": no tools here")
    with pytest.raises(choose.NoCompiler, match=f"^{re.escape(why)}$"):
        choose_passes(Rule("small"), "compiled", torch.device(device))


def test_passes_of_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tried out against eager ones; one weight in thousands that differs is enough."""

    def wrong(self: NumbaPasses, weight: Tensor, out: Tensor, draw: Draw) -> None:
        EagerPasses(self.rule).move(weight, out, draw)
        out[-1] += 1.0

    monkeypatch.setattr(NumbaPasses, "move", wrong)
    worker, why = choose_passes(Rule("small"), "auto", torch.device("cpu"))
    assert worker.name == "eager"
    assert "the bits of numba passes in torch.float32 are not the eager ones" in why
